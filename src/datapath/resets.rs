//! RSTs to both ends of a TCP flow that was ended: to clients in the name of the service, to
//! backends in the name of whom they talk to.
//!
//! Raw sockets with headers of our own: the kernel looks up route and neighbour. What can't be sent
//! is counted and forgotten: an end that is not told now gets its RST with its next packet.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};

use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::{self, MutableIpv4Packet};
use pnet_packet::ipv6::MutableIpv6Packet;
use pnet_packet::tcp::{self, MutableTcpPacket, TcpFlags};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
const TTL: u8 = 64;

/// The sockets.
#[derive(Debug)]
pub(super) struct Resets {
    ipv4: Socket,
    /// `None` where the kernel has no IPv6.
    ipv6: Option<Socket>,
    failed: AtomicU64,
}

/// A RST that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reset {
    /// In whose name.
    pub(super) from: SocketAddr,
    /// To whom; of the same family.
    pub(super) to: SocketAddr,
    /// What the receiver expects next: nothing else ends its connection at once (RFC 5961 §3.2).
    pub(super) sequence: u32,
    /// What it has sent; one that is waiting for its SYN to be answered looks at this alone.
    pub(super) acknowledgement: u32,
}

impl Resets {
    /// Opens the sockets; needs CAP_NET_RAW.
    pub(super) fn open() -> io::Result<Self> {
        let open = |domain| -> io::Result<Socket> {
            // Of this protocol, headers are always the sender's.
            let protocol = Protocol::from(libc::IPPROTO_RAW);
            let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let ipv6 = match open(Domain::IPV6) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            other => Some(other?),
        };
        Ok(Self { ipv4: open(Domain::IPV4)?, ipv6, failed: AtomicU64::new(0) })
    }

    /// Sends one, or counts that it could not be sent.
    pub(super) fn send(&self, reset: &Reset) {
        let packet = reset.packet();
        let socket = if reset.to.is_ipv4() { Some(&self.ipv4) } else { self.ipv6.as_ref() };
        // A raw socket wants no port.
        let to = SockAddr::from(SocketAddr::new(reset.to.ip(), 0));
        let sent = socket.is_some_and(|socket| socket.send_to(&packet, &to).is_ok());
        if !sent {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many could not be sent since it was last asked.
    pub(super) fn take_failed(&self) -> u64 {
        self.failed.swap(0, Ordering::Relaxed)
    }
}

impl Reset {
    fn packet(&self) -> Vec<u8> {
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut packet = vec![0; IPV4 + TCP];
                let mut ip = MutableIpv4Packet::new(&mut packet).expect("it has the size");
                ip.set_version(4);
                ip.set_header_length(5);
                ip.set_total_length((IPV4 + TCP) as u16);
                ip.set_flags(ipv4::Ipv4Flags::DontFragment);
                ip.set_ttl(TTL);
                ip.set_next_level_protocol(IpNextHeaderProtocols::Tcp);
                ip.set_source(from);
                ip.set_destination(to);
                ip.set_checksum(ipv4::checksum(&ip.to_immutable()));
                self.write_tcp(&mut packet[IPV4..]);
                packet
            }
            (from, to) => {
                // The families of both are the same; of mapped addresses this is what is meant.
                let v6 = |address| match address {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                let mut packet = vec![0; IPV6 + TCP];
                let mut ip = MutableIpv6Packet::new(&mut packet).expect("it has the size");
                ip.set_version(6);
                ip.set_payload_length(TCP as u16);
                ip.set_hop_limit(TTL);
                ip.set_next_header(IpNextHeaderProtocols::Tcp);
                ip.set_source(v6(from));
                ip.set_destination(v6(to));
                self.write_tcp(&mut packet[IPV6..]);
                packet
            }
        }
    }

    fn write_tcp(&self, bytes: &mut [u8]) {
        let mut tcp = MutableTcpPacket::new(bytes).expect("it has the size");
        tcp.set_source(self.from.port());
        tcp.set_destination(self.to.port());
        tcp.set_sequence(self.sequence);
        tcp.set_acknowledgement(self.acknowledgement);
        tcp.set_data_offset(5);
        tcp.set_flags(TcpFlags::RST | TcpFlags::ACK);
        let checksum = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                tcp::ipv4_checksum(&tcp.to_immutable(), &from, &to)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                tcp::ipv6_checksum(&tcp.to_immutable(), &from, &to)
            }
            _ => 0,
        };
        tcp.set_checksum(checksum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_a_packet_with_right_checksums() {
        let reset = |from: &str, to: &str| Reset {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            sequence: 0x0102_0304,
            acknowledgement: 0x0506_0708,
        };
        let v4 = reset("10.77.0.100:80", "10.77.0.10:40000").packet();
        assert_eq!(v4.len(), 40);
        assert_eq!(v4[20..36], [0, 80, 156, 64, 1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x14, 0, 0]);
        let sum = |bytes: &[u8]| {
            let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
            let sum: u32 = words.sum();
            (sum & 0xffff) + (sum >> 16)
        };
        assert_eq!(sum(&v4[..20]), 0xffff);
        let pseudo = |packet: &[u8], addresses: std::ops::Range<usize>, tcp: usize| {
            let mut bytes = packet[addresses].to_vec();
            bytes.extend([0, 6, 0, 20]);
            bytes.extend(&packet[tcp..]);
            sum(&bytes)
        };
        assert_eq!(pseudo(&v4, 12..20, 20), 0xffff);
        let v6 = reset("[fd77::100]:80", "[fd77::10]:40000").packet();
        assert_eq!(pseudo(&v6, 8..40, 40), 0xffff);
    }
}
