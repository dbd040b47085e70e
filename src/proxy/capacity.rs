//! How many sessions the file descriptors of this process allow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Sessions that may be open at once, over all services. At the bound a client is refused as at
/// its service's own `max_connections`: accepted and reset at once, and counted there.
#[derive(Debug)]
pub(crate) struct Capacity {
    /// Sessions that fit.
    pub(crate) sessions: usize,
    /// Pipes that may be open in each worker; without one a session copies instead of splicing.
    pub(crate) pipes: usize,
    open: AtomicUsize,
}

/// A session's share of the capacity; gives it back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Capacity>);

/// Descriptors for everything that is not a session: probes, netlink, control, libraries.
const RESERVED: usize = 256;

/// Descriptors of a session: client and backend. (A UDP session has one.)
const PER_SESSION: usize = 2;

/// Most pipes in each worker, two descriptors each. A pipe is held while bytes wait in it, so
/// this many sessions per worker can wait for a slow reader with spliced bytes.
const PIPES: usize = 512;

impl Capacity {
    /// Raises the limit of open files to the hard one and divides it up.
    pub(crate) fn of_this_process(workers: usize) -> Self {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        let raised = soft == hard || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
        let files = usize::try_from(if raised { hard } else { soft }).unwrap_or(usize::MAX);
        Self::of(files, workers)
    }

    fn of(files: usize, workers: usize) -> Self {
        let free = files.saturating_sub(RESERVED);
        let pipes = PIPES.min(free / 8 / workers.max(1));
        let sessions = free.saturating_sub(pipes * workers * 2) / PER_SESSION;
        Self { sessions, pipes, open: AtomicUsize::new(0) }
    }

    pub(crate) fn enter(self: &Arc<Self>) -> Option<Permit> {
        self.open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| {
                (open < self.sessions).then(|| open + 1)
            })
            .ok()
            .map(|_| Permit(Arc::clone(self)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_and_pipes_never_need_more_files_than_there_are() {
        for files in [0, 255, 300, 1024, 20_000, 1 << 20, usize::MAX] {
            for workers in [1, 2, 64] {
                let capacity = Capacity::of(files, workers);
                let needed = capacity.sessions * PER_SESSION + capacity.pipes * workers * 2;
                assert!(needed <= files.saturating_sub(RESERVED), "{files} {workers}");
            }
        }
        assert_eq!(Capacity::of(20_000, 2).sessions, 8848);
    }

    #[test]
    fn permits_are_bounded_and_given_back() {
        let capacity = Arc::new(Capacity { sessions: 1, pipes: 0, open: AtomicUsize::new(0) });
        let permit = capacity.enter();
        assert!(permit.is_some() && capacity.enter().is_none());
        drop(permit);
        assert!(capacity.enter().is_some());
    }
}
