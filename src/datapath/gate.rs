//! The gate of the datapath, as memory shared with the kernel: renewing the lease is one store.
//!
//! Whoever holds a [`Gate`] can open it; nobody needs to close it, since it closes by itself when
//! it is not renewed. It is the only thing that a node needs to touch to stop answering for its
//! VIPs.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use super::mapped::Mapped;
use super::skeleton::types;

/// The gate, mapped.
#[derive(Debug)]
pub struct Gate(Mapped<types::gate>);

impl Gate {
    /// Maps the gate of a map that holds one.
    pub(super) fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Mapped::map(fd).map(Self)
    }

    /// Opens it until that moment, in jiffies (see [`super::clock::Clock`]).
    pub fn open_until(&self, jiffies: u64) {
        self.0.open_until().store(jiffies, Ordering::Release);
    }

    /// Closes it now.
    pub fn close(&self) {
        self.open_until(0);
    }

    /// Until when it is open, in jiffies; 0: it was never opened, or was closed.
    pub fn deadline_jiffies(&self) -> u64 {
        self.0.open_until().load(Ordering::Acquire)
    }
}
