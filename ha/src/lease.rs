//! The lease on the VIPs: what enforces it when the node no longer renews it, because its daemon is
//! dead or frozen.
//!
//! The driver renews the lease with every advert, for a little less than the shortest time that
//! any Backup waits for the next one: so this node is silent before another claims the VIPs. The
//! lease is a word of shared memory, and renewing it is one store, and those of the [`Gate`].
//!
//! * The [`Gate`], in the kernel, lets through what is for the VIPs and from them while the lease
//!   holds. It is the first line where there is one.
//! * The [`Guard`], a process of its own, removes the VIPs.
//! * Where that is gone too the kernel drops them at the end of their `valid_lft`.
//!
//! The driver itself releases what it finds it has lost ([`crate::vrrp::router`], "stalled").

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::time::{ClockId, clock_gettime};

use crate::config::Vip;
use crate::driver::realtime;
use crate::io::netlink::{Netlink, Watch};

/// Intervals after an advert in which no Backup may claim (RFC 9568 §6.1: Active_Down_Interval is
/// three of them and Skew_Time).
const QUIET_INTERVALS: u32 = 3;
/// The share of an interval by which the lease ends earlier: what the guard needs to wake up and
/// to remove the VIPs, 2.5 ms at the shortest interval.
const EARLIER: u32 = 4;

/// How long after an advert the lease ends.
pub fn length(advert_interval: Duration) -> Duration {
    advert_interval * QUIET_INTERVALS - advert_interval / EARLIER
}

/// What is open only while the lease holds, and closes by itself: the kernel's datapath. It is
/// called by the driver's real-time thread, so it must neither wait nor allocate.
pub trait Gate: Send + Sync {
    /// Opens it until that moment of [`now`], under that fencing number; never for longer.
    fn open(&self, until: u64, epoch: u64);

    /// Closes it now.
    fn close(&self);
}

/// The lease, shared between the driver, which renews it, and the guard.
///
/// It lives in a file, so that a daemon that follows on one that was killed has the same lease: the
/// guard of the one before sees that its time is over, and leaves the VIPs alone.
pub struct Lease {
    page: NonNull<Page>,
    gate: Option<Arc<dyn Gate>>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("until", &self.until()).finish_non_exhaustive()
    }
}

/// What is shared; all zero in a new file.
#[repr(C)]
struct Page {
    /// The moment at which the lease ends, in nanoseconds of CLOCK_MONOTONIC; 0 where this node
    /// holds nothing.
    until: AtomicU64,
    /// Grows with each daemon.
    term: AtomicU64,
}

const LENGTH: NonZeroUsize = NonZeroUsize::new(size_of::<Page>()).unwrap();

// SAFETY: the page is only ever accessed atomically, and unmapped by the one owner's drop.
unsafe impl Send for Lease {}

impl Lease {
    /// The lease of a daemon that starts, which holds nothing yet, in a file that is made where
    /// there is none; and the file, for [`Lease::shared`] in the guard. The guard of the daemon
    /// before ends.
    pub fn take(path: &Path) -> io::Result<(Self, File)> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(libc::O_NOFOLLOW).open(path)?;
        file.set_len(LENGTH.get() as u64)?;
        let lease = Self::shared(&file)?;
        lease.page().term.fetch_add(1, Ordering::AcqRel);
        lease.end();
        Ok((lease, file))
    }

    /// The lease in a file that the daemon made.
    pub fn shared(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() != LENGTH.get() as u64 {
            return Err(io::Error::other("this is no lease"));
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is as long, and
        // nobody makes it shorter.
        let page = unsafe { mmap(None, LENGTH, access, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Self { page: page.cast(), gate: None })
    }

    /// One that no guard can see.
    pub fn unguarded() -> io::Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe { mmap_anonymous(None, LENGTH, access, MapFlags::MAP_PRIVATE)? };
        Ok(Self { page: page.cast(), gate: None })
    }

    /// The same lease, which from now on opens and closes a gate too.
    #[must_use]
    pub fn with_gate(mut self, gate: Arc<dyn Gate>) -> Self {
        self.gate = Some(gate);
        self
    }

    /// Holds it for that long from now, under that fencing number.
    pub fn renew(&self, length: Duration, epoch: u64) {
        let until = now().saturating_add(nanos(length));
        self.page().until.store(until, Ordering::Release);
        if let Some(gate) = &self.gate {
            gate.open(until, epoch);
        }
    }

    /// The same for the guard alone: silence goes on, and the VIPs stay.
    pub fn hold(&self, length: Duration) {
        self.page().until.store(now().saturating_add(nanos(length)), Ordering::Release);
    }

    /// Silence from now on, before the VIPs are removed; the guard still sees to it that they are.
    pub fn close(&self) {
        if let Some(gate) = &self.gate {
            gate.close();
        }
    }

    /// What it has left.
    pub fn left(&self) -> Duration {
        self.until()
            .map_or(Duration::ZERO, |until| Duration::from_nanos(until.saturating_sub(now())))
    }

    /// Holds nothing any more; to be called when the VIPs are removed.
    pub fn end(&self) {
        self.close();
        self.page().until.store(0, Ordering::Release);
    }

    /// When it ends, on the clock of [`now`]; `None` if it is not held.
    fn until(&self) -> Option<u64> {
        Some(self.page().until.load(Ordering::Acquire)).filter(|until| *until != 0)
    }

    fn term(&self) -> u64 {
        self.page().term.load(Ordering::Acquire)
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped for as long as self lives, aligned to a page; any bytes are a valid Page.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // SAFETY: mapped by `shared` with this length, and nobody holds a reference to it.
        let _ = unsafe { munmap(self.page.cast(), LENGTH.get()) };
    }
}

/// What a guard knows.
#[derive(Debug, Clone)]
pub struct Guard {
    /// What it removes.
    pub vips: Vec<Vip>,
    /// How often the Active advertises; the guard looks at the lease as often.
    pub advert_interval: Duration,
    /// Whether to ask for real-time priority and locked memory.
    pub realtime: bool,
}

impl Guard {
    /// Guards until the daemon is gone and its lease has ended, or another daemon has taken the
    /// lease. The daemon is gone when `alive`, of which it holds the other end, is closed. `told`
    /// hears of each removal, and must not wait.
    ///
    /// # Errors
    ///
    /// What kept it from watching. What keeps it from removing is told, and tried again.
    pub fn stand(
        &self,
        lease: &Lease,
        alive: &OwnedFd,
        mut told: impl FnMut(Result<(), String>),
    ) -> io::Result<()> {
        if self.realtime {
            // Without priority it comes a little later.
            let _ = realtime::acquire();
        }
        let term = lease.term();
        let mut removed_at = None;
        let mut gone = false;
        let mut hands = self.hands();
        while lease.term() == term {
            let (until, now) = (lease.until(), now());
            match until {
                Some(until) if until <= now && removed_at != Some(until) => {
                    let removed = hands.as_mut().map_err(|why| why.clone()).and_then(Hands::remove);
                    if removed.is_ok() {
                        removed_at = Some(until);
                    }
                    // Anew: what they were opened with may be broken, and those that have removed
                    // the VIPs go on doing so, while a daemon that wakes up may have them again.
                    hands = self.hands();
                    told(removed);
                }
                None if gone => return Ok(()),
                Some(until) if gone && removed_at == Some(until) => return Ok(()),
                Some(_) | None => {}
            }
            // Not longer than an interval: a lease that begins lasts for more than two.
            let left = until.map(|until| Duration::from_nanos(until.saturating_sub(now)));
            let rest = left.filter(|left| !left.is_zero()).unwrap_or(self.advert_interval);
            gone = closed(alive, rest.min(self.advert_interval), gone)?;
        }
        Ok(())
    }

    /// What it takes to remove the VIPs, opened before it is needed: a guard has little time then.
    fn hands(&self) -> Result<Hands, String> {
        let watch = Watch {
            interfaces: self.vips.iter().map(|vip| vip.interface.clone()).collect(),
            vips: self.vips.clone(),
            valid_lft: Duration::ZERO,
            // Nothing is removed before it is asked for.
            owner: true,
        };
        let prepare = if self.realtime { realtime::follow } else { || () };
        let text = |error: io::Error| error.to_string();
        let netlink = Netlink::start(watch, prepare).map_err(text)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(text)?;
        Ok(Hands { netlink, runtime })
    }
}

/// A way to the kernel's addresses.
struct Hands {
    netlink: Netlink,
    runtime: tokio::runtime::Runtime,
}

impl Hands {
    /// Removes the VIPs.
    fn remove(&mut self) -> Result<(), String> {
        // Reports that came meanwhile are of no use here, and must not be in the way of the answer.
        while self.netlink.events.try_recv().is_ok() {}
        self.runtime.block_on(self.netlink.remove()).0
    }
}

/// Waits for so long, or until the other end is closed; whether it is.
fn closed(alive: &OwnedFd, patience: Duration, already: bool) -> io::Result<bool> {
    if already {
        std::thread::sleep(patience);
        return Ok(true);
    }
    let mut fds = [PollFd::new(alive.as_fd(), PollFlags::empty())];
    // A whole millisecond more rather than none: the loop looks at the clock again.
    let timeout = PollTimeout::try_from(patience.as_millis() + 1).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// CLOCK_MONOTONIC, which is the same in every process, in nanoseconds.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has a monotonic clock");
    nanos(Duration::from(time))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_before_any_backup_may_claim() {
        for (interval, length_ms) in [(10, 27.5), (100, 275.0), (1000, 2750.0)] {
            let length = length(Duration::from_millis(interval)).as_secs_f64() * 1e3;
            assert!((length - length_ms).abs() < 1e-6, "{interval}: {length}");
        }
    }

    /// A file for a lease, gone with the test.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let id = std::process::id();
            Self(std::env::temp_dir().join(format!("baton-lease-{id}-{name}")))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn both_sides_see_the_same_lease() {
        let scratch = Scratch::new("both");
        let (driver, file) = Lease::take(&scratch.0).unwrap();
        let guard = Lease::shared(&file).unwrap();
        assert_eq!(guard.until(), None);
        let before = now();
        driver.renew(Duration::from_secs(5), 1);
        let until = guard.until().unwrap();
        assert!((before + 5_000_000_000..=now() + 5_000_000_000).contains(&until));
        driver.end();
        assert_eq!(guard.until(), None);
    }

    #[test]
    fn a_file_of_another_length_is_no_lease_and_becomes_one() {
        let scratch = Scratch::new("length");
        std::fs::write(&scratch.0, "precious").unwrap();
        let file = File::options().read(true).write(true).open(&scratch.0).unwrap();
        assert!(Lease::shared(&file).is_err());
        let (lease, _) = Lease::take(&scratch.0).unwrap();
        assert_eq!(lease.until(), None);
    }

    #[test]
    fn the_guard_of_the_daemon_before_ends_and_removes_nothing() {
        let scratch = Scratch::new("before");
        let (alive, _held) = nix::unistd::pipe().unwrap();
        let (lease, file) = Lease::take(&scratch.0).unwrap();
        let watched = Lease::shared(&file).unwrap();
        lease.renew(Duration::from_millis(100), 1);
        std::thread::scope(|scope| {
            let standing =
                scope.spawn(move || guard().stand(&watched, &alive, |_| panic!("not its own")));
            std::thread::sleep(Duration::from_millis(30));
            let (next, _) = Lease::take(&scratch.0).unwrap();
            next.renew(Duration::from_secs(60), 1);
            standing.join().unwrap().unwrap();
        });
    }

    /// Without VIPs nothing is asked of the kernel; that removal happens is a test in namespaces.
    fn guard() -> Guard {
        Guard { vips: Vec::new(), advert_interval: Duration::from_millis(10), realtime: false }
    }

    #[test]
    fn the_guard_of_a_daemon_that_held_nothing_ends_with_it() {
        let (alive, held) = nix::unistd::pipe().unwrap();
        let scratch = Scratch::new("nothing");
        let (lease, _file) = Lease::take(&scratch.0).unwrap();
        drop(held);
        guard().stand(&lease, &alive, |_| panic!("there is nothing to remove")).unwrap();
    }

    #[test]
    fn the_guard_of_a_dead_daemon_waits_for_the_end_of_its_lease() {
        let (alive, held) = nix::unistd::pipe().unwrap();
        let scratch = Scratch::new("dead");
        let (lease, _file) = Lease::take(&scratch.0).unwrap();
        lease.renew(Duration::from_millis(50), 1);
        let until = lease.until().unwrap();
        drop(held);
        let mut removals = 0;
        guard()
            .stand(&lease, &alive, |result| {
                result.unwrap();
                assert!(now() >= until, "the lease still held");
                removals += 1;
            })
            .unwrap();
        assert_eq!(removals, 1);
    }

    #[test]
    fn the_guard_of_a_frozen_daemon_removes_once_and_goes_on() {
        let (alive, held) = nix::unistd::pipe().unwrap();
        let scratch = Scratch::new("frozen");
        let (lease, file) = Lease::take(&scratch.0).unwrap();
        let again = Lease::shared(&file).unwrap();
        lease.renew(Duration::from_millis(20), 1);
        let mut removals = 0;
        let mut held = Some(held);
        guard()
            .stand(&lease, &alive, |_| {
                removals += 1;
                match removals {
                    // It woke up, released, and became Active once more.
                    1 => again.renew(Duration::from_millis(20), 1),
                    _ => drop(held.take()),
                }
            })
            .unwrap();
        assert_eq!(removals, 2);
    }
}
