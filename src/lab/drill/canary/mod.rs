//! Canary traffic: what a client would see. Each canary is a thread with sockets in the client's
//! namespace, at normal priority, and keeps a record of everything it tried, by the monotonic
//! clock.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::outage::Attempt;

pub(super) mod churn;
pub(super) mod fresh;
pub(super) mod steady;
pub(super) mod udp;

/// Attempts in order of their start; written by a canary, read by the drill while it runs.
pub(super) type Ledger = Arc<Mutex<Vec<Attempt>>>;

/// The attempts of a ledger.
pub(super) fn read(ledger: &Ledger) -> MutexGuard<'_, Vec<Attempt>> {
    ledger.lock().expect("a canary does not panic while it writes")
}

/// A thread that works until it is told to stop.
#[derive(Debug)]
pub(super) struct Worker<T> {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

/// Tells a worker to stop.
#[derive(Debug, Clone)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether it is time to stop.
    pub(super) fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `work` on a thread of its own.
    pub(super) fn spawn(
        name: &str,
        work: impl FnOnce(Stop) -> T + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Stop(Arc::clone(&stop));
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || work(flag))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Tells it to stop; [`Worker::finish`] waits.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Stops it and returns what it has to say.
    pub(super) fn finish(self) -> T {
        self.stop();
        self.join()
    }

    /// Waits until it ends by itself.
    pub(super) fn join(mut self) -> T {
        let thread = self.thread.take().expect("only this takes it, and it consumes the worker");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Waits until one of the sockets is ready, or for `timeout`. Errors are those of a signal: the
/// caller goes round again.
pub(super) fn wait(sockets: &mut [PollFd<'_>], timeout: Duration) {
    let outcome = ppoll(sockets, Some(TimeSpec::from_duration(timeout)), None);
    debug_assert!(matches!(outcome, Ok(_) | Err(Errno::EINTR)), "{outcome:?}");
}

/// Waits for a socket to be readable.
pub(super) fn readable(socket: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(socket, PollFlags::POLLIN)
}

/// Waits for one socket to be readable, or for `timeout`.
pub(super) fn wait_readable(socket: &impl AsFd, timeout: Duration) {
    wait(&mut [readable(socket.as_fd())], timeout);
}
