//! Load that goes on while something happens: sessions that echo without pause and look at every
//! byte, and connections that come and go.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::net::{Net, PATIENCE};
use crate::server::{Session, connect};

/// Bytes of a round there, and as many back.
const ROUND: usize = 4096;

/// The load; ends when dropped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    sessions: Vec<Worker>,
    /// Connects, echoes and closes, over and over.
    newcomers: Worker,
    /// Newcomers that failed: for whom a backend was lost under way.
    failed: Arc<AtomicU64>,
}

struct Worker {
    /// Of a session: its backend.
    backend: String,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Worker {
    /// Does `round` until it is told to stop or fails.
    fn start(
        backend: String,
        stop: &Arc<AtomicBool>,
        mut round: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> Self {
        let (stop, rounds) = (Arc::clone(stop), Arc::<AtomicU64>::default());
        let counted = Arc::clone(&rounds);
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                round()?;
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Self { backend, rounds, thread: Some(thread) }
    }

    fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn end(&mut self) -> io::Result<()> {
        self.thread.take().expect("it is ended once").join().expect("it does not panic")
    }
}

impl Load {
    /// As many sessions on `vip`, and newcomers there too.
    pub(crate) fn start(net: &Net, vip: &'static str, sessions: usize) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let client = net.node("client");
        let session = |_| {
            let mut session: Session = connect(&client, vip, PATIENCE).expect("a session");
            let backend = session.backend.clone();
            Worker::start(backend, &stop, move || session.try_echo(ROUND))
        };
        let sessions = (0..sessions).map(session).collect();
        let failed = Arc::<AtomicU64>::default();
        let counted = Arc::clone(&failed);
        let newcomers = Worker::start(String::new(), &stop, move || {
            let round =
                connect(&client, vip, PATIENCE).and_then(|mut session| session.try_echo(10));
            if round.is_err() {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        Self { stop, sessions, newcomers, failed }
    }

    /// How many sessions a backend has.
    pub(crate) fn sessions_on(&self, backend: &str) -> usize {
        self.sessions.iter().filter(|session| session.backend == backend).count()
    }

    /// Waits until newcomers and every session have gone on, or the sessions on a backend alone.
    pub(crate) fn goes_on(&self, net: &Net, backend: Option<&str>) {
        let of_backend = |worker: &&Worker| backend.is_none_or(|backend| worker.backend == backend);
        let newcomers = backend.is_none().then_some(&self.newcomers);
        let workers: Vec<&Worker> =
            self.sessions.iter().filter(of_backend).chain(newcomers).collect();
        let before: Vec<u64> = workers.iter().map(|worker| worker.rounds()).collect();
        let end = Instant::now() + 2 * PATIENCE;
        for (worker, before) in workers.iter().zip(before) {
            while worker.rounds() < before + 3 {
                let to = &worker.backend;
                assert!(!worker.has_ended(), "a session to {to:?} has broken; {}", net.log());
                assert!(Instant::now() < end, "a session to {to:?} hangs; {}", net.log());
                thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }

    /// Ends it; how each session to a backend ended, and how many newcomers failed.
    pub(crate) fn end(mut self) -> (Vec<(String, io::Result<()>)>, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let end = |session: &mut Worker| (session.backend.clone(), session.end());
        let ended = self.sessions.iter_mut().map(end).collect();
        self.newcomers.end().expect("it counts its errors");
        (ended, self.failed.load(Ordering::Relaxed))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
