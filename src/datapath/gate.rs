//! The gate of the datapath, as memory shared with the kernel: renewing the lease is one store.
//!
//! Whoever holds a [`Gate`] can open it; nobody needs to close it, since it closes by itself when
//! it is not renewed. It is the only thing that a node needs to touch to stop answering for its
//! VIPs.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::skeleton::types;

/// The gate, mapped.
#[derive(Debug)]
pub struct Gate {
    page: NonNull<types::gate>,
}

// SAFETY: it owns its mapping, and goes through atomics alone.
unsafe impl Send for Gate {}
// SAFETY: the same.
unsafe impl Sync for Gate {}

impl Gate {
    /// Maps the gate of a map that holds one.
    pub(super) fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let length = NonZeroUsize::new(size_of::<types::gate>()).expect("a gate has a size");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { page: page.cast() })
    }

    /// Opens it until that moment, in jiffies (see [`super::clock::Clock`]).
    pub fn open_until(&self, jiffies: u64) {
        self.deadline().store(jiffies, Ordering::Release);
    }

    /// Closes it now.
    pub fn close(&self) {
        self.open_until(0);
    }

    /// Until when it is open, in jiffies; 0: it was never opened, or was closed.
    pub fn deadline_jiffies(&self) -> u64 {
        self.deadline().load(Ordering::Acquire)
    }

    fn deadline(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, the field is aligned to 8 bytes, and both
        // sides only load and store it whole.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).open_until) }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, with this length; nothing refers to it any more.
        let unmapped = unsafe { munmap(self.page.cast(), size_of::<types::gate>()) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
