//! Which way an address is, as the kernel's routing says it: interface, source, MTU.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;

/// The way to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The interface.
    pub ifindex: u32,
    /// Our own address on it, where packets to there come from.
    pub source: IpAddr,
    /// Longest packet that it takes, in bytes, as far as the kernel knows: the interface's MTU, the
    /// route's, or what a router further on has said.
    pub mtu: u32,
}

/// The way to an address, in this thread's network namespace.
///
/// A connected UDP socket sends nothing; it shows the route that the kernel chose.
pub fn way_to(address: IpAddr) -> io::Result<Way> {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    // Any port will do but 0.
    socket.connect(SocketAddr::new(address, 9))?;
    let source = socket.local_addr()?.ip();
    let here = getifaddrs()?
        .find(|interface| interface.address.as_ref().and_then(ip_of) == Some(source))
        .ok_or_else(|| io::Error::other(format!("{source} is on no interface")))?;
    let ifindex = interface_named(&here.interface_name)?;
    Ok(Way { ifindex, source, mtu: mtu_of(&socket, address)? })
}

fn mtu_of(socket: &UdpSocket, address: IpAddr) -> io::Result<u32> {
    let (level, option) = match address {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both pointers are to locals of the size that is given.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut mtu).cast(), &raw mut size)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u32::try_from(mtu).unwrap_or(0))
}

/// The index of an interface.
pub fn interface_named(name: &str) -> io::Result<u32> {
    if_nametoindex(name).map_err(io::Error::from)
}

pub(crate) fn ip_of(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(v4.ip().into());
    }
    address.as_sockaddr_in6().map(|v6| v6.ip().into())
}
