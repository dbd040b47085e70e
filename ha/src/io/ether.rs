//! Announcements out, ARP and Neighbor Advertisements in: AF_PACKET sockets on the interfaces of
//! the VIPs.
//!
//! One socket per family, each bound to the EtherType that it is about, so that the rest of the
//! traffic never gets to it; among IPv6 packets a classic BPF program picks the NAs.

use std::io;
use std::os::fd::AsRawFd;
use std::task::{Context, Poll};

use nix::sys::socket::{LinkAddr, SockaddrLike};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::Watched;
use crate::config::Family;

/// Room for every ARP and NA that is looked at; what is longer is cut off.
pub const RECEIVE_BUFFER: usize = 512;

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

/// A socket for the frames of one family on one interface.
#[derive(Debug)]
pub struct FrameSocket {
    watched: Watched,
    index: u32,
}

impl FrameSocket {
    /// Opens a socket that hears the ARP (IPv4) or the NAs (IPv6) of an interface.
    pub fn open(family: Family, index: u32) -> io::Result<Self> {
        let ether_type = match family {
            Family::V4 => ETH_P_ARP,
            Family::V6 => ETH_P_IPV6,
        };
        // Protocol 0: nothing is queued before the filter is there and the interface is chosen.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        socket.set_nonblocking(true)?;
        if family == Family::V6 {
            socket.attach_filter(&neighbor_advertisements())?;
        }
        ignore_outgoing(&socket)?;
        let address = link_address(ether_type, index)?;
        // SAFETY: the address and its length describe one valid sockaddr_ll.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr(), address.len()) };
        nix::errno::Errno::result(bound)?;
        Ok(Self { watched: Watched::new(socket)?, index })
    }

    /// Index of the interface on which it was opened.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Ready while there may be frames.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched.poll_readable(context)
    }

    /// Sends a whole Ethernet frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::unistd::write(self.watched.fd(), frame)?;
        Ok(())
    }

    /// The next frame's length; `None` once the queue is empty.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        self.watched.read(|fd| Ok(nix::unistd::read(fd, buffer)?))
    }
}

fn link_address(ether_type: u16, index: u32) -> io::Result<LinkAddr> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET.cast_unsigned() as libc::sa_family_t,
        sll_protocol: ether_type.to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: a sockaddr_ll with its length, living until the copy is made.
    unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) }
        .ok_or_else(|| io::Error::other("not a link-layer address"))
}

/// What this host sends itself is not heard.
fn ignore_outgoing(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}

/// IPv6 packets whose next header is ICMPv6 and whose type is Neighbor Advertisement, from the
/// Ethernet header on.
fn neighbor_advertisements() -> [SockFilter; 6] {
    const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const NEXT_HEADER: u32 = 14 + 6;
    const ICMP_TYPE: u32 = 14 + 40;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, NEXT_HEADER),
        SockFilter::new(JUMP_EQUAL, 0, 3, libc::IPPROTO_ICMPV6 as u32),
        SockFilter::new(LOAD_BYTE, 0, 0, ICMP_TYPE),
        SockFilter::new(JUMP_EQUAL, 0, 1, 136),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}
