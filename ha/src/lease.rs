//! The lease on the VIPs, and its guard: a process of its own that removes them when the node no
//! longer renews its lease, because its daemon is dead or frozen.
//!
//! The driver renews the lease with every advert, for a little less than the shortest time that
//! any Backup waits for the next one: so the VIPs are gone from this node before another claims
//! them. The lease is a word of shared memory, and renewing it is one store.
//!
//! The guard is the second of three: the driver itself releases what it finds it has lost
//! ([`crate::vrrp::router`], "stalled"), the guard does where the driver can't, and where the
//! guard is gone too the kernel drops the VIPs at the end of their `valid_lft`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
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

/// The lease, shared between the driver, which renews it, and the guard.
#[derive(Debug)]
pub struct Lease {
    page: NonNull<AtomicU64>,
}

/// Bytes that are shared: the moment at which the lease ends, in nanoseconds of CLOCK_MONOTONIC;
/// 0 where this node holds nothing.
const PAGE: std::num::NonZeroUsize = std::num::NonZeroUsize::new(size_of::<AtomicU64>()).unwrap();

// SAFETY: the page is only ever accessed atomically, and unmapped by the one owner's drop.
unsafe impl Send for Lease {}

impl Lease {
    /// A lease that is not held, and the memory for [`Lease::shared`] in another process.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let memory = memfd_create("baton-lease", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memory, size_of::<AtomicU64>() as i64)?;
        Ok((Self::shared(&memory)?, memory))
    }

    /// The lease in memory that another process made.
    pub fn shared(memory: &OwnedFd) -> io::Result<Self> {
        if File::from(memory.try_clone()?).metadata()?.len() < size_of::<AtomicU64>() as u64 {
            return Err(io::Error::other("this is no lease"));
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the memory is as large.
        let page = unsafe { mmap(None, PAGE, access, MapFlags::MAP_SHARED, memory, 0)? };
        Ok(Self { page: page.cast() })
    }

    /// Holds it for that long from now.
    pub fn renew(&self, length: Duration) {
        self.word().store(now().saturating_add(nanos(length)), Ordering::Release);
    }

    /// Holds nothing any more; to be called when the VIPs are removed.
    pub fn end(&self) {
        self.word().store(0, Ordering::Release);
    }

    /// When it ends, on the clock of [`now`]; `None` if it is not held.
    fn until(&self) -> Option<u64> {
        Some(self.word().load(Ordering::Acquire)).filter(|until| *until != 0)
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: mapped for as long as self lives, aligned to a page, zero or stored by us.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // SAFETY: mapped by `shared` with this length, and nobody holds a reference to it.
        let _ = unsafe { munmap(self.page.cast(), PAGE.get()) };
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
    /// Guards until the daemon is gone and its lease has ended. The daemon is gone when `alive`,
    /// of which it holds the other end, is closed. `told` hears of each removal.
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
        let mut removed_at = None;
        let mut gone = false;
        loop {
            let (until, now) = (lease.until(), now());
            match until {
                Some(until) if until <= now && removed_at != Some(until) => {
                    let result = self.remove();
                    removed_at = result.is_ok().then_some(until);
                    told(result);
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
    }

    /// The netlink thread of a node that owns nothing begins with removing the VIPs.
    fn remove(&self) -> Result<(), String> {
        let watch = Watch {
            interfaces: self.vips.iter().map(|vip| vip.interface.clone()).collect(),
            vips: self.vips.clone(),
            valid_lft: Duration::ZERO,
            owner: false,
        };
        let prepare = if self.realtime { realtime::follow } else { || () };
        Netlink::start(watch, prepare).map(drop).map_err(|error| error.to_string())
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
fn now() -> u64 {
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

    #[test]
    fn both_sides_see_the_same_lease() {
        let (driver, memory) = Lease::new().unwrap();
        let guard = Lease::shared(&memory).unwrap();
        assert_eq!(guard.until(), None);
        let before = now();
        driver.renew(Duration::from_secs(5));
        let until = guard.until().unwrap();
        assert!((before + 5_000_000_000..=now() + 5_000_000_000).contains(&until));
        driver.end();
        assert_eq!(guard.until(), None);
    }

    #[test]
    fn memory_that_is_too_short_is_no_lease() {
        let memory = memfd_create("short", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(Lease::shared(&memory).is_err());
    }

    /// Without VIPs nothing is asked of the kernel; that removal happens is a test in namespaces.
    fn guard() -> Guard {
        Guard { vips: Vec::new(), advert_interval: Duration::from_millis(10), realtime: false }
    }

    #[test]
    fn the_guard_of_a_daemon_that_held_nothing_ends_with_it() {
        let (alive, held) = nix::unistd::pipe().unwrap();
        let (lease, _memory) = Lease::new().unwrap();
        drop(held);
        guard().stand(&lease, &alive, |_| panic!("there is nothing to remove")).unwrap();
    }

    #[test]
    fn the_guard_of_a_dead_daemon_waits_for_the_end_of_its_lease() {
        let (alive, held) = nix::unistd::pipe().unwrap();
        let (lease, _memory) = Lease::new().unwrap();
        lease.renew(Duration::from_millis(50));
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
        let (lease, memory) = Lease::new().unwrap();
        let again = Lease::shared(&memory).unwrap();
        lease.renew(Duration::from_millis(20));
        let mut removals = 0;
        let mut held = Some(held);
        guard()
            .stand(&lease, &alive, |_| {
                removals += 1;
                match removals {
                    // It woke up, released, and became Active once more.
                    1 => again.renew(Duration::from_millis(20)),
                    _ => drop(held.take()),
                }
            })
            .unwrap();
        assert_eq!(removals, 2);
    }
}
