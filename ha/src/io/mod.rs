//! Raw sockets, AF_PACKET, netlink and the timer. Thin: bytes and kernel objects in, bytes and
//! kernel objects out; what they mean is decided by [`crate::node`] and [`crate::driver`].
//!
//! * [`interfaces`]: what the kernel says of the interfaces that matter here. Pure.
//! * [`netlink`]: asks the kernel, on a thread of its own, and configures the VIPs.
//! * [`vrrp`]: adverts in and out, one raw socket per path.
//! * [`ether`]: announcements out, ARP and NA in, AF_PACKET per interface.
//! * [`timer`]: a timerfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub mod ether;
pub mod interfaces;
pub mod netlink;
pub mod timer;
pub mod vrrp;

/// A descriptor, in non-blocking mode, that the runtime watches for input.
#[derive(Debug)]
struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    /// To be called on the runtime's thread.
    fn new(fd: impl Into<OwnedFd>) -> io::Result<Self> {
        // SAFETY: an OwnedFd is open for as long as it lives, and its descriptor does not change.
        let fd = unsafe { AsyncFd::register_with_interest(fd.into(), Interest::READABLE) }?;
        Ok(Self(fd))
    }

    /// Ready while there may be input.
    fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut guard = ready!(self.0.poll_read_ready(context))?;
        guard.retain_ready();
        Poll::Ready(Ok(()))
    }

    /// One read; `None` once there is nothing left.
    fn read<T>(&self, read: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<Option<T>> {
        match self.0.try_io(Interest::READABLE, |fd| read(fd.as_fd())) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }

    fn raw(&self) -> RawFd {
        self.0.get_ref().as_raw_fd()
    }
}
