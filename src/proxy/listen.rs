//! The sockets that clients reach: bound to the VIP whether or not it is here now.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use super::inq;

/// Connections that may wait to be accepted; the kernel clamps it to `net.core.somaxconn`. When
/// it is full the kernel drops SYNs (or answers with cookies), and clients try again.
pub(crate) const BACKLOG: i32 = 4096;

/// Bytes that may wait in a socket for datagrams that are not read yet (clamped to
/// `net.core.rmem_max`). When it is full the kernel drops the next.
const DATAGRAM_BUFFER: usize = 4 << 20;

/// Unsent bytes at which a socket stops being writable. With it, a peer that reads slowly holds
/// this much of our memory rather than all of `net.ipv4.tcp_wmem`'s maximum.
const UNSENT_MOST: u32 = 1 << 20;

/// A listener of its own for each worker: the kernel spreads connections over them.
///
/// What is set here holds for every connection accepted from it, at no further cost.
pub(crate) fn tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = bound(address, Type::STREAM)?;
    prepare(&socket)?;
    settle(&SockRef::from(&socket))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// What a TCP socket of a session has from its first moment.
///
/// `SO_LINGER` 0 above all: with it, a connection that isn't ended properly is reset rather than
/// closed, whatever ends it, a crash of this process included. A truncated stream never looks
/// like a whole one. Urgent data stays where it is in the stream (RFC 6093 §4): no byte is lost.
pub(crate) fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    inq::enable(socket)?;
    socket.set_linger(Some(Duration::ZERO))
}

/// What it has once the session has turned out to be long or to carry much; short sessions, of
/// which there may be many a second, do without.
pub(crate) fn settle(socket: &SockRef<'_>) -> io::Result<()> {
    // A vanished peer is found after two minutes of silence, if the idle timeout is longer.
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(15))
        .with_retries(4);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_notsent_lowat(UNSENT_MOST)
}

/// A socket for datagrams of its own for each worker: the kernel sends all of one client to the
/// same one. What it sends leaves with the VIP as its source.
pub(crate) fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bound(address, Type::DGRAM)?;
    socket.set_recv_buffer_size(DATAGRAM_BUFFER)?;
    socket.set_send_buffer_size(DATAGRAM_BUFFER)?;
    Ok(socket.into())
}

/// `IP_TRANSPARENT` lets a Backup bind the VIP before it has it, and lets a node that has lost
/// the VIP still send the resets that tell its clients. Where it is not permitted
/// (`CAP_NET_ADMIN`), `IP_FREEBIND` at least does the first.
fn bound(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    let transparent = if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)
    };
    match transparent {
        Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
            if address.is_ipv4() {
                socket.set_freebind_v4(true)?;
            } else {
                socket.set_freebind_v6(true)?;
            }
        }
        other => other?,
    }
    socket.bind(&address.into())?;
    Ok(socket)
}
