//! Adverts in and out: one raw socket (IP protocol 112) per path, bound to the path's interface.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::task::{Context, Poll};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, recvmsg, sendmsg,
    setsockopt, sockopt,
};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

use super::Watched;
use crate::config::Family;
use crate::vrrp::packet::{
    DecodeError, Ends, Envelope, GROUP_V4, GROUP_V6, PROTOCOL, TTL, open_ipv4,
};

/// Room for the longest advert, 255 IPv6 addresses, and an IPv4 header; what is longer is cut
/// off, and then is no advert.
pub const RECEIVE_BUFFER: usize = 8 + 255 * 16 + 60;

/// DSCP CS6, "network control".
const TRAFFIC_CLASS: u32 = 0xc0;

/// The socket of a path.
#[derive(Debug)]
pub struct AdvertSocket {
    watched: Watched,
    family: Family,
    index: u32,
}

/// A packet as it came; its bytes are in the buffer that [`AdvertSocket::receive`] was given.
#[derive(Debug, Clone, Copy)]
pub enum Datagram {
    /// A raw IPv4 socket hands up the header too.
    V4 {
        /// Header and payload.
        length: usize,
    },
    /// A raw IPv6 socket hands up the payload, and beside it what matters of the header.
    V6 {
        /// From where, to where, hop limit.
        envelope: Envelope,
        /// The payload.
        length: usize,
    },
}

impl Datagram {
    /// Header and payload.
    pub fn open(self, buffer: &[u8]) -> Result<(Envelope, &[u8]), DecodeError> {
        match self {
            Self::V4 { length } => open_ipv4(&buffer[..length]),
            Self::V6 { envelope, length } => Ok((envelope, &buffer[..length])),
        }
    }
}

impl AdvertSocket {
    /// Opens a socket on an interface, in the groups of adverts.
    pub fn open(family: Family, interface: &str, index: u32) -> io::Result<Self> {
        let domain = match family {
            Family::V4 => Domain::IPV4,
            Family::V6 => Domain::IPV6,
        };
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(PROTOCOL))))?;
        socket.set_nonblocking(true)?;
        socket.bind_device(Some(interface.as_bytes()))?;
        match family {
            Family::V4 => {
                socket.set_multicast_all_v4(false)?;
                socket.set_multicast_loop_v4(false)?;
                socket.set_multicast_ttl_v4(TTL.into())?;
                socket.set_ttl_v4(TTL.into())?;
                socket.set_tos_v4(TRAFFIC_CLASS)?;
                socket.join_multicast_v4_n(&GROUP_V4, &InterfaceIndexOrAddress::Index(index))?;
            }
            Family::V6 => {
                socket.set_multicast_all_v6(false)?;
                socket.set_multicast_loop_v6(false)?;
                socket.set_multicast_hops_v6(TTL.into())?;
                socket.set_unicast_hops_v6(TTL.into())?;
                socket.set_tclass_v6(TRAFFIC_CLASS)?;
                socket.set_multicast_if_v6(index)?;
                socket.set_recv_hoplimit_v6(true)?;
                setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
                socket.join_multicast_v6(&GROUP_V6, index)?;
            }
        }
        Ok(Self { watched: Watched::new(socket)?, family, index })
    }

    /// Index of the interface on which it was opened.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Ready while there may be packets.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched.poll_readable(context)
    }

    /// Sends a message from one of this node's addresses.
    pub fn send(&self, message: &[u8], source: IpAddr, destination: IpAddr) -> io::Result<()> {
        let iov = [IoSlice::new(message)];
        let fd = self.watched.raw();
        let flags = MsgFlags::empty();
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: self.index.cast_signed(),
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from(source).to_be() },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let to = SockaddrIn::from(SocketAddrV4::new(destination, 0));
                sendmsg(fd, &iov, &[ControlMessage::Ipv4PacketInfo(&info)], flags, Some(&to))?;
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: source.octets() },
                    ipi6_ifindex: self.index,
                };
                let to = SockaddrIn6::from(SocketAddrV6::new(destination, 0, 0, self.index));
                sendmsg(fd, &iov, &[ControlMessage::Ipv6PacketInfo(&info)], flags, Some(&to))?;
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                return Err(io::Error::other("source and destination are of two families"));
            }
        }
        Ok(())
    }

    /// The next packet; `None` once the queue is empty.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Datagram>> {
        self.watched.read(|fd| match self.family {
            Family::V4 => Ok(Datagram::V4 { length: nix::unistd::read(fd, buffer)? }),
            Family::V6 => receive_v6(fd, buffer),
        })
    }
}

fn receive_v6(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::c_int);
    let mut iov = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrIn6>(fd.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::empty())?;
    let source = received.address.map_or(Ipv6Addr::UNSPECIFIED, |address| address.ip());
    let (mut destination, mut ttl) = (Ipv6Addr::UNSPECIFIED, 0);
    for control in received.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                destination = Ipv6Addr::from(info.ipi6_addr.s6_addr);
            }
            ControlMessageOwned::Ipv6HopLimit(hops) => ttl = u8::try_from(hops).unwrap_or(0),
            _ => {}
        }
    }
    let envelope = Envelope { ends: Ends::V6 { source, destination }, ttl };
    Ok(Datagram::V6 { envelope, length: received.bytes })
}
