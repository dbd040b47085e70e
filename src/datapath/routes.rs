//! Which way an address is, as the kernel's routing says it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;

/// The interface through which an address is reached, in this thread's network namespace.
///
/// A connected UDP socket sends nothing; its local address shows the route that the kernel chose.
pub fn interface_to(address: IpAddr) -> io::Result<u32> {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    // Any port will do but 0.
    socket.connect(SocketAddr::new(address, 9))?;
    let local = socket.local_addr()?.ip();
    let here = getifaddrs()?
        .find(|interface| interface.address.as_ref().and_then(ip_of) == Some(local))
        .ok_or_else(|| io::Error::other(format!("{local} is on no interface")))?;
    interface_named(&here.interface_name)
}

/// The index of an interface.
pub fn interface_named(name: &str) -> io::Result<u32> {
    if_nametoindex(name).map_err(io::Error::from)
}

fn ip_of(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(v4.ip().into());
    }
    address.as_sockaddr_in6().map(|v6| v6.ip().into())
}
