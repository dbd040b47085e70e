//! How many sessions the file descriptors of this process allow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::health::PROBES_AT_ONCE;
use crate::pool::Pool;

/// Sessions that may be open at once, over all services. At the bound a client is refused as at
/// its service's own `max_connections`: accepted and reset at once, and counted there.
#[derive(Debug)]
pub(crate) struct Capacity {
    /// Sessions that fit beside the listeners and checks of now.
    sessions: AtomicUsize,
    /// Pipes that may be open in each worker; without one a session copies instead of splicing.
    pub(crate) pipes: usize,
    open: AtomicUsize,
    files: usize,
    workers: usize,
}

/// A session's share of the capacity; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Capacity>);

/// Descriptors for what is neither a session, a listener nor a probe: netlink, control, libraries.
const RESERVED: usize = 256;

/// Descriptors of a probe: at most those of a script, its process and both ends of its output.
const PER_PROBE: usize = 3;

/// Descriptors of a session: client and backend. (A UDP session has one.)
const PER_SESSION: usize = 2;

/// Most pipes in each worker, two descriptors each. A pipe is held while bytes wait in it, so
/// this many sessions per worker can wait for a slow reader with spliced bytes.
const PIPES: usize = 512;

impl Capacity {
    /// Raises the limit of open files to the hard one and divides it up.
    pub(crate) fn of_this_process(workers: usize, pools: &[Arc<Pool>]) -> Self {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        let raised = soft == hard || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
        let files = usize::try_from(if raised { hard } else { soft }).unwrap_or(usize::MAX);
        Self::of(files, workers, kept(workers, pools))
    }

    fn of(files: usize, workers: usize, kept: usize) -> Self {
        let free = files.saturating_sub(RESERVED + kept);
        let pipes = PIPES.min(free / 8 / workers.max(1));
        let capacity = Self { sessions: 0.into(), pipes, open: 0.into(), files, workers };
        capacity.keep(kept);
        capacity
    }

    /// Sessions that fit.
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Makes room for the listeners and checks of these pools. Sessions that are open stay; pipes
    /// are as many as they were.
    pub(crate) fn renew(&self, pools: &[Arc<Pool>]) {
        self.keep(kept(self.workers, pools));
    }

    fn keep(&self, kept: usize) {
        let taken = RESERVED + kept + self.pipes * self.workers * 2;
        let sessions = self.files.saturating_sub(taken) / PER_SESSION;
        self.sessions.store(sessions, Ordering::Relaxed);
    }

    pub(crate) fn enter(self: &Arc<Self>) -> Option<Permit> {
        self.open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| {
                (open < self.sessions()).then(|| open + 1)
            })
            .ok()
            .map(|_| Permit(Arc::clone(self)))
    }
}

/// Descriptors that listeners and probes may take.
fn kept(workers: usize, pools: &[Arc<Pool>]) -> usize {
    let checked = pools.iter().filter(|pool| pool.service.check.is_some());
    let probes: usize = checked.map(|pool| pool.members.len()).sum();
    pools.len() * workers + probes.min(PROBES_AT_ONCE) * PER_PROBE
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn sessions_and_pipes_never_need_more_files_than_there_are() {
        for files in [0, 255, 300, 1024, 20_000, 1 << 20, usize::MAX] {
            for (workers, kept) in [(1, 0), (2, 12), (64, 3000)] {
                let capacity = Capacity::of(files, workers, kept);
                for kept in [kept, 0, 500] {
                    capacity.keep(kept);
                    let pipes = capacity.pipes * workers * 2;
                    let needed = capacity.sessions() * PER_SESSION;
                    let free = files.saturating_sub(RESERVED + kept + pipes);
                    assert!(needed <= free, "{files} {workers} {kept}");
                }
            }
        }
        assert_eq!(Capacity::of(20_000, 2, 0).sessions(), 8848);
    }

    #[test]
    fn listeners_and_probes_have_their_share() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/config/full.toml");
        let services = Config::load(file.as_ref()).unwrap().services;
        let pools: Vec<_> = services.into_iter().map(|it| Arc::new(Pool::new(it))).collect();
        let checked = pools.iter().filter(|pool| pool.service.check.is_some());
        let probes: usize = checked.map(|pool| pool.members.len()).sum();
        assert!(pools.len() >= 2 && probes >= 2);
        assert_eq!(kept(4, &pools), pools.len() * 4 + probes * 3);
        let many: Vec<_> = pools.iter().cycle().take(1000 * pools.len()).cloned().collect();
        assert_eq!(kept(4, &many), many.len() * 4 + 256 * 3);
        let capacity = Capacity::of(20_000, 4, 0);
        let before = capacity.sessions();
        capacity.keep(kept(4, &pools));
        assert!(capacity.sessions() < before);
    }

    #[test]
    fn permits_are_bounded_and_given_back() {
        let capacity = Arc::new(Capacity::of(RESERVED + PER_SESSION, 1, 0));
        assert_eq!((capacity.sessions(), capacity.pipes), (1, 0));
        let permit = capacity.enter();
        assert!(permit.is_some() && capacity.enter().is_none());
        drop(permit);
        assert!(capacity.enter().is_some());
    }
}
