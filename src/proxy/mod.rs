//! Proxy mode: accept, connect, splice, half-close; UDP sessions.
//!
//! A connection's way: `listen` (a socket per worker, bound to the VIP) → `tcp` (admit,
//! choose, connect, retry, `header`) → `join` (both directions, timeouts) → `half` (one
//! direction: copy a little, splice a lot through a `pipe`). A datagram's:
//! `datagram` → `udp`. Orders from
//! outside come through `worker` and reach each session at its `seat`.
//!
//! A session that doesn't end properly is reset on both sides, whatever ended it: see
//! `listen::tcp`.
//!
//! What a client can hold is bounded: sessions by `capacity`, by the service and by the source;
//! a session by one buffer or one filled pipe in each direction, by the bound on unsent bytes
//! (`listen::prepare`) and by the kernel's receive buffer, and in time by the idle timeout.

mod capacity;
mod datagram;
mod half;
pub(crate) mod header;
mod inq;
mod join;
mod listen;
mod pipe;
mod seat;
mod tcp;
mod udp;
mod worker;

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use self::capacity::Capacity;
use self::seat::Which;
pub(crate) use self::worker::key;
use self::worker::{Asked, Command, Key, Opened};
use crate::pool::Pool;
use crate::service::{Protocol, Service};

/// The running proxy: its services on its workers. Dropping it stops accepting, resets what is
/// left, and waits for the workers' threads to end.
#[derive(Debug)]
pub struct Proxy {
    workers: Vec<Worker>,
    served: Mutex<Vec<Key>>,
    capacity: Arc<Capacity>,
}

/// A worker's thread. `None` once it is told to end.
#[derive(Debug)]
struct Worker {
    commands: Option<mpsc::Sender<Asked>>,
    thread: Option<JoinHandle<()>>,
}

/// Why the proxy could not start, or not serve what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket that clients reach could not be opened.
    #[error("service {service}: can't listen on {listen}: {source}")]
    Listen {
        /// The service.
        service: String,
        /// Its VIP, port and protocol.
        listen: String,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// A worker could not be started.
    #[error("can't start a worker thread: {0}")]
    Worker(#[source] io::Error),
}

impl Proxy {
    /// Serves the pools on `workers` threads (0: one per core). The VIPs need not be here yet.
    ///
    /// Raises the limit of open files to the hard one. The threads belong to the network
    /// namespace of the caller.
    pub fn start(pools: &[Arc<Pool>], workers: usize) -> Result<Self, StartError> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let count = if workers == 0 { cores() } else { workers };
        // First, as the listeners may need more files than the limit is to begin with.
        let capacity = Arc::new(Capacity::of_this_process(count, pools));
        let mut shares: Vec<_> = (0..count).map(|_| Vec::with_capacity(pools.len())).collect();
        for pool in pools {
            for (share, socket) in shares.iter_mut().zip(open(&pool.service, count)?) {
                share.push((Arc::clone(pool), socket));
            }
        }
        let start = |(index, share)| worker::start(index, Arc::clone(&capacity), share);
        let workers: io::Result<_> = shares.into_iter().enumerate().map(start).collect();
        let served = Mutex::new(pools.iter().map(|pool| key(&pool.service)).collect());
        let proxy = Self { workers: workers.map_err(StartError::Worker)?, served, capacity };
        proxy.warn_of_files(pools);
        info!(sessions = proxy.capacity(), workers = count, "proxy started");
        Ok(proxy)
    }

    /// Goes on with other pools after a reload. A service with the same address and protocol goes
    /// on listening, with its sessions ([`Pool::renewed`] keeps what is known of its members);
    /// one that is gone stops listening and its TCP sessions end by themselves. So do TCP sessions
    /// with a backend that is gone; UDP sessions, which have no end of their own, go to another.
    ///
    /// # Errors
    ///
    /// A new service that can't listen. Nothing has changed then.
    pub async fn renew(&self, pools: &[Arc<Pool>]) -> Result<(), StartError> {
        let before = self.served().clone();
        let mut opened = Vec::new();
        for pool in pools.iter().filter(|pool| !before.contains(&key(&pool.service))) {
            opened.push((pool, open(&pool.service, self.workers.len())?));
        }
        self.capacity.renew(pools);
        self.warn_of_files(pools);
        let after: Vec<_> = pools.iter().map(|pool| key(&pool.service)).collect();
        for &gone in before.iter().filter(|gone| !after.contains(gone)) {
            self.ask_all(|| Command::Close(gone)).await;
        }
        for pool in pools.iter().filter(|pool| before.contains(&key(&pool.service))) {
            self.ask_all(|| Command::Renew(Arc::clone(pool))).await;
        }
        for (pool, sockets) in opened {
            for (worker, socket) in self.workers.iter().zip(sockets) {
                worker.ask(Command::Serve(Arc::clone(pool), socket)).await;
            }
        }
        *self.served() = after;
        Ok(())
    }

    /// Resets on both sides every session of a client that came to one of these addresses, so
    /// that clients try again at once, wherever the VIP is by then; how many there were. For when
    /// this node stops being Active: after the VIPs are removed, so that no new client comes in
    /// between (`IP_TRANSPARENT` lets the resets leave all the same). Goes on listening.
    pub async fn reset(&self, vips: impl IntoIterator<Item = IpAddr>) -> usize {
        let vips: Arc<[IpAddr]> = vips.into_iter().collect();
        self.ask_all(|| Command::Reset(Which::At(Arc::clone(&vips)))).await
    }

    /// Resets every session.
    pub async fn reset_all(&self) -> usize {
        self.ask_all(|| Command::Reset(Which::All)).await
    }

    /// Stops accepting for good; sessions go on.
    pub async fn stop_accepting(&self) {
        self.ask_all(|| Command::CloseAll).await;
    }

    /// Waits until no TCP session is left, at most for `patience`; how many are left.
    pub async fn wait_idle(&self, patience: Duration) -> usize {
        let end = Instant::now() + patience;
        loop {
            let left = self.ask_all(|| Command::Count).await;
            if left == 0 || Instant::now() >= end {
                return left;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// How many sessions the limit of open files allows, over all services.
    pub fn capacity(&self) -> usize {
        self.capacity.sessions()
    }

    fn warn_of_files(&self, pools: &[Arc<Pool>]) {
        let most = |pool: &Arc<Pool>| pool.service.limits.max_connections as usize;
        let wanted: usize = pools.iter().map(most).sum();
        let sessions = self.capacity.sessions();
        if wanted > sessions {
            warn!(
                "the services' max_connections come to {wanted}, but the limit of open files \
                 allows {sessions} sessions; raise LimitNOFILE, or expect refusals there"
            );
        }
    }

    /// Asks every worker, all at the same time; the sum of their answers.
    async fn ask_all(&self, command: impl Fn() -> Command) -> usize {
        let mut answers = Vec::with_capacity(self.workers.len());
        for worker in &self.workers {
            answers.push(worker.send(command()).await);
        }
        let mut sum = 0;
        for answer in answers {
            sum += answer.await.unwrap_or(0);
        }
        sum
    }

    fn served(&self) -> MutexGuard<'_, Vec<Key>> {
        self.served.lock().expect("no panic while it is held")
    }
}

impl Worker {
    async fn ask(&self, command: Command) {
        let _ = self.send(command).await.await;
    }

    /// Where the answer will be; an error there is a worker that has ended.
    async fn send(&self, command: Command) -> oneshot::Receiver<usize> {
        let (answer, wait) = oneshot::channel();
        if let Some(commands) = &self.commands {
            let _ = commands.send((command, answer)).await;
        }
        wait
    }
}

/// A socket for each worker.
fn open(service: &Service, workers: usize) -> Result<Vec<Opened>, StartError> {
    let socket = |_| match service.protocol {
        Protocol::Tcp => listen::tcp(service.listen).map(Opened::Tcp),
        Protocol::Udp => listen::udp(service.listen).map(Opened::Udp),
    };
    (0..workers).map(socket).collect::<io::Result<_>>().map_err(|source| StartError::Listen {
        service: service.name.clone(),
        listen: format!("{} {:?}", service.listen, service.protocol).to_lowercase(),
        source,
    })
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.commands = None;
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                let _ = thread.join();
            }
        }
    }
}
