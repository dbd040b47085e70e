//! The gate of the datapath, as memory shared with the kernel: renewing the lease is a few stores.
//!
//! [`Gate`] is one of them, [`Gates`] what the HA thread renews: every one that this node has, from
//! the moment on at which there is one. Nobody needs to close them, since they close by themselves
//! when they are not renewed. They are the only thing that a node needs to touch to stop answering
//! for its VIPs.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use baton_ha::lease;

use super::clock::Tick;
use super::mapped::Mapped;
use super::skeleton::types;

/// For how long after a takeover flows of the node before are adopted (bpf/adopt.h), in nanoseconds
/// and on top of the first lease: clients that have something to say repeat it by then.
const ADOPTION: u64 = 3_000_000_000;

/// A gate, mapped.
#[derive(Debug)]
pub struct Gate(Mapped<types::gate>);

/// Until when a gate is open, by the clocks that the kernel has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// jiffies64 from which on it is closed.
    pub jiffies: u64,
    /// Nanoseconds of the kernel's monotonic clock.
    pub nanoseconds: u64,
}

impl Deadline {
    /// Closed now.
    const NEVER: Self = Self { jiffies: 0, nanoseconds: 0 };
}

impl Gate {
    /// Maps the gate of a map that holds one.
    pub(super) fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Mapped::map(fd).map(Self)
    }

    /// Opens it until then.
    pub fn open_until(&self, deadline: Deadline) {
        self.0.open_until_ns().store(deadline.nanoseconds, Ordering::Release);
        self.0.open_until().store(deadline.jiffies, Ordering::Release);
    }

    /// The same, under the fencing number of the lease. With a new number begins the time in which
    /// flows of the node before are adopted, until `adopt_until` in jiffies.
    fn open(&self, deadline: Deadline, epoch: u64, adopt_until: u64) {
        if self.0.epoch().swap(epoch, Ordering::AcqRel) != epoch {
            self.adopt_until(adopt_until);
        }
        self.open_until(deadline);
    }

    /// Flows of the node before are adopted until then, in jiffies.
    pub fn adopt_until(&self, jiffies: u64) {
        self.0.adopt_until().store(jiffies, Ordering::Release);
    }

    /// Closes it now.
    pub fn close(&self) {
        self.open_until(Deadline::NEVER);
    }

    /// Until when it is open, in jiffies; 0: it was never opened, or was closed.
    pub fn deadline_jiffies(&self) -> u64 {
        self.0.open_until().load(Ordering::Acquire)
    }

    /// Under which fencing number it was opened last.
    pub fn epoch(&self) -> u64 {
        self.0.epoch().load(Ordering::Acquire)
    }
}

/// The gates that the lease opens, of which there are none before the datapath is loaded.
#[derive(Debug, Default)]
pub struct Gates {
    doors: OnceLock<Doors>,
    /// What the lease said last, for gates that come later: until when, by this process's
    /// monotonic clock, and the epoch.
    until: AtomicU64,
    epoch: AtomicU64,
}

#[derive(Debug)]
struct Doors {
    gates: Vec<Arc<Gate>>,
    tick: Arc<Tick>,
}

impl Gates {
    /// From here on these are opened and closed with the lease; at once, if it holds. What an
    /// earlier daemon's lease has left is not touched. Once per process.
    pub(super) fn hang(&self, gates: Vec<Arc<Gate>>, tick: Arc<Tick>) {
        let doors = self.doors.get_or_init(|| Doors { gates, tick });
        // The HA thread may speak between its look for doors and their coming.
        let mut done = 0;
        loop {
            let until = self.until.load(Ordering::Acquire);
            if until == done {
                return;
            }
            doors.open_until(until, self.epoch.load(Ordering::Acquire));
            done = until;
        }
    }
}

impl Doors {
    fn open_until(&self, until: u64, epoch: u64) {
        let deadline = if until == 0 { Deadline::NEVER } else { self.tick.deadline(until) };
        let adopt_until = match until {
            0 => 0,
            until => self.tick.deadline(until + ADOPTION).jiffies,
        };
        self.gates.iter().for_each(|gate| gate.open(deadline, epoch, adopt_until));
    }
}

impl lease::Gate for Gates {
    fn open(&self, until: u64, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
        self.until.store(until, Ordering::Release);
        if let Some(doors) = self.doors.get() {
            doors.open_until(until, epoch);
        }
    }

    fn close(&self) {
        self.until.store(0, Ordering::Release);
        if let Some(doors) = self.doors.get() {
            doors.gates.iter().for_each(|gate| gate.close());
        }
    }
}
