//! A section of the datapath's variables, as memory shared with the kernel's programs.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::skeleton::types;

/// One record, mapped. Both sides load and store its fields whole, as atomics.
#[derive(Debug)]
pub(super) struct Mapped<T> {
    page: NonNull<T>,
}

// SAFETY: it owns its mapping, and goes through atomics alone.
unsafe impl<T> Send for Mapped<T> {}
// SAFETY: the same.
unsafe impl<T> Sync for Mapped<T> {}

impl<T> Mapped<T> {
    /// Maps the map of a section that holds one.
    pub(super) fn map(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let length = NonZeroUsize::new(size_of::<T>()).expect("a record has a size");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { page: page.cast() })
    }
}

impl Mapped<types::gate> {
    /// Until when the gate is open, in jiffies.
    pub(super) fn open_until(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, and the field is aligned to its size.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).open_until) }
    }

    /// The same in nanoseconds of the kernel's monotonic clock.
    pub(super) fn open_until_ns(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, and the field is aligned to its size.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).open_until_ns) }
    }

    /// Until when flows of the node before are adopted, in jiffies.
    pub(super) fn adopt_until(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, and the field is aligned to its size.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).adopt_until) }
    }

    /// Under which fencing number.
    pub(super) fn epoch(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, and the field is aligned to its size.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).epoch) }
    }
}

impl Mapped<types::reporting> {
    /// Events that found no room.
    pub(super) fn lost(&self) -> &AtomicU64 {
        // SAFETY: the mapping lives as long as `self`, and the field is aligned to its size.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).lost) }
    }

    /// Whether events are reported.
    pub(super) fn on(&self) -> &AtomicU32 {
        // SAFETY: the mapping lives as long as `self`, and the field is aligned to its size.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).on) }
    }
}

impl Mapped<u32> {
    /// How often tables were changed of which the kernel keeps what it found (recent.h).
    pub(super) fn changes(&self) -> &AtomicU32 {
        // SAFETY: the mapping lives as long as `self`, and a page is aligned to anything.
        unsafe { AtomicU32::from_ptr(self.page.as_ptr()) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, with this length; nothing refers to it any more.
        let unmapped = unsafe { munmap(self.page.cast(), size_of::<T>()) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
