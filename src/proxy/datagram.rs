//! The socket of a UDP service: what a client sends to it, and answers that leave by the address
//! that the client knows.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// A service's socket.
#[derive(Debug)]
pub(crate) struct Datagrams {
    socket: UdpSocket,
    /// Bound to every address of the node: each datagram says to which of them it came, and each
    /// answer from which of them it leaves. Otherwise the address is the socket's own.
    everywhere: bool,
}

/// Who talks to the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Peer {
    pub(crate) client: SocketAddr,
    /// The address that it came to, where that is not the socket's own.
    pub(crate) at: Option<IpAddr>,
}

impl Datagrams {
    pub(crate) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let address = socket.local_addr()?;
        let everywhere = address.ip().is_unspecified();
        if everywhere && address.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        } else if everywhere {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
        Ok(Self { socket: UdpSocket::from_std(socket)?, everywhere })
    }

    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// The next datagram that waits, its length and who sent it.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Peer)> {
        if !self.everywhere {
            let (len, client) = self.socket.try_recv_from(buffer)?;
            return Ok((len, Peer { client, at: None }));
        }
        self.socket.try_io(Interest::READABLE, || {
            let mut space = nix::cmsg_space!(libc::in6_pktinfo);
            let mut parts = [IoSliceMut::new(buffer)];
            let fd = self.socket.as_raw_fd();
            let message =
                recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut space), MsgFlags::empty())?;
            let at = message.cmsgs()?.find_map(|control| match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    Some(IpAddr::V4(u32::from_be(info.ipi_addr.s_addr).into()))
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    Some(IpAddr::V6(info.ipi6_addr.s6_addr.into()))
                }
                _ => None,
            });
            let client = message.address.and_then(|address| socket_address(&address));
            // An internet socket has no other senders.
            let client = client.ok_or(io::ErrorKind::AddrNotAvailable)?;
            Ok((message.bytes, Peer { client, at }))
        })
    }

    /// Sends without asking the runtime whether the socket is writable; where its buffer is full,
    /// the datagram is lost as on any link.
    pub(crate) fn send(&self, datagram: &[u8], peer: Peer) -> io::Result<usize> {
        let parts = [IoSlice::new(datagram)];
        let fd = self.socket.as_raw_fd();
        let to = SockaddrStorage::from(peer.client);
        let from = |control| sendmsg(fd, &parts, &[control], MsgFlags::empty(), Some(&to));
        match peer.at {
            None => SockRef::from(&self.socket).send_to(datagram, &peer.client.into()),
            Some(IpAddr::V4(at)) => Ok(from(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: at.to_bits().to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            }))?),
            Some(IpAddr::V6(at)) => Ok(from(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: at.octets() },
                ipi6_ifindex: 0,
            }))?),
        }
    }
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}
