//! Receiving with word of whether the socket is empty now (`TCP_INQ`, Linux 4.18): a read that
//! came back short doesn't tell, as it also ends where urgent data begins (RFC 6093 §3.2).

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, RawFd};

use libc::c_int;
use nix::errno::Errno;
use socket2::Socket;

/// Room for the one control message that is asked for, aligned as the kernel wants it.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    left: c_int,
}

/// Has [`receive`] told what is left. Connections inherit it from their listener.
pub(crate) fn enable(socket: &Socket) -> io::Result<()> {
    let on: c_int = 1;
    // SAFETY: the kernel reads an int from the pointer given, before the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INQ,
            (&raw const on).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// How many bytes came in, and whether the socket has neither more of them nor its end. Where
/// [`enable`] was not called, it is never said to be empty.
pub(crate) fn receive(socket: RawFd, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut room = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: both are plain C structures, for which zeros are values.
    let (mut control, mut message) = unsafe { (zeroed::<Control>(), zeroed::<libc::msghdr>()) };
    message.msg_iov = &raw mut room;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: every pointer in `message` is to what lives beyond the call, with its length.
    let taken = unsafe { libc::recvmsg(socket, &raw mut message, 0) };
    let taken = Errno::result(taken).map_err(io::Error::from)?.cast_unsigned();
    let head = &control.head;
    let told = (head.cmsg_level, head.cmsg_type) == (libc::IPPROTO_TCP, libc::TCP_CM_INQ);
    Ok((taken, told && control.left == 0))
}
