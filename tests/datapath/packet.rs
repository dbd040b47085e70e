//! Packets as the tests write and read them. Built and taken apart with pnet_packet, so that
//! lengths and checksums come from code that the datapath does not share.

use std::net::{IpAddr, SocketAddr};

use pnet_packet::Packet as _;
use pnet_packet::ethernet::{EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::{self, Ipv4Packet, MutableIpv4Packet};
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use pnet_packet::tcp::{self, MutableTcpPacket, TcpFlags, TcpPacket};
use pnet_packet::udp::{self, MutableUdpPacket, UdpPacket};

pub(crate) const ETHERNET: usize = 14;
pub(crate) const IPV4: usize = 20;
pub(crate) const IPV6: usize = 40;
const TCP: usize = 20;
const UDP: usize = 8;

pub(crate) const SYN: u8 = TcpFlags::SYN;
pub(crate) const ACK: u8 = TcpFlags::ACK;
pub(crate) const FIN: u8 = TcpFlags::FIN;
pub(crate) const RST: u8 = TcpFlags::RST;

/// What a packet says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) ttl: u8,
    pub(crate) payload: Vec<u8>,
    pub(crate) transport: Transport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp { flags: u8, sequence: u32, acknowledgement: u32 },
}

impl Packet {
    pub(crate) fn tcp(
        from: &str,
        to: &str,
        flags: u8,
        sequence: u32,
        acknowledgement: u32,
    ) -> Self {
        let transport = Transport::Tcp { flags, sequence, acknowledgement };
        Self::new(from, to, transport)
    }

    pub(crate) fn udp(from: &str, to: &str) -> Self {
        Self::new(from, to, Transport::Udp)
    }

    fn new(from: &str, to: &str, transport: Transport) -> Self {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        Self { from, to, ttl: 64, payload: b"baton".to_vec(), transport }
    }

    /// The way back: ends swapped.
    pub(crate) fn answer(&self, transport: Transport) -> Self {
        Self { from: self.to, to: self.from, transport, ttl: 64, payload: b"answer".to_vec() }
    }

    /// Where the network header ends.
    pub(crate) fn transport_at(&self) -> usize {
        ETHERNET + if self.from.is_ipv4() { IPV4 } else { IPV6 }
    }

    /// Its bytes, from Ethernet on, with right checksums.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let transport = match self.transport {
            Transport::Tcp { flags, sequence, acknowledgement } => {
                self.tcp_bytes(flags, sequence, acknowledgement)
            }
            Transport::Udp => self.udp_bytes(),
        };
        let mut bytes = vec![0; self.transport_at()];
        bytes.extend(&transport);
        let mut ethernet = MutableEthernetPacket::new(&mut bytes).unwrap();
        ethernet.set_destination([2, 0, 0, 0, 0, 1].into());
        ethernet.set_source([2, 0, 0, 0, 0, 2].into());
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                ethernet.set_ethertype(EtherTypes::Ipv4);
                let mut ip = MutableIpv4Packet::new(&mut bytes[ETHERNET..]).unwrap();
                ip.set_version(4);
                ip.set_header_length(5);
                ip.set_total_length((IPV4 + transport.len()) as u16);
                ip.set_identification(0x1234);
                ip.set_ttl(self.ttl);
                ip.set_next_level_protocol(self.protocol());
                ip.set_source(from);
                ip.set_destination(to);
                let checksum = ipv4::checksum(&ip.to_immutable());
                ip.set_checksum(checksum);
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                ethernet.set_ethertype(EtherTypes::Ipv6);
                let mut ip = MutableIpv6Packet::new(&mut bytes[ETHERNET..]).unwrap();
                ip.set_version(6);
                ip.set_payload_length(transport.len() as u16);
                ip.set_hop_limit(self.ttl);
                ip.set_next_header(self.protocol());
                ip.set_source(from);
                ip.set_destination(to);
            }
            _ => panic!("two families in one packet"),
        }
        bytes
    }

    fn protocol(&self) -> pnet_packet::ip::IpNextHeaderProtocol {
        match self.transport {
            Transport::Tcp { .. } => IpNextHeaderProtocols::Tcp,
            Transport::Udp => IpNextHeaderProtocols::Udp,
        }
    }

    fn tcp_bytes(&self, flags: u8, sequence: u32, acknowledgement: u32) -> Vec<u8> {
        let mut bytes = vec![0; TCP];
        bytes.extend(&self.payload);
        let mut tcp = MutableTcpPacket::new(&mut bytes).unwrap();
        tcp.set_source(self.from.port());
        tcp.set_destination(self.to.port());
        tcp.set_sequence(sequence);
        tcp.set_acknowledgement(acknowledgement);
        tcp.set_data_offset(5);
        tcp.set_flags(flags);
        tcp.set_window(1000);
        let checksum = tcp_checksum(&tcp.to_immutable(), self.from.ip(), self.to.ip());
        tcp.set_checksum(checksum);
        bytes
    }

    fn udp_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; UDP];
        bytes.extend(&self.payload);
        let length = bytes.len() as u16;
        let mut udp = MutableUdpPacket::new(&mut bytes).unwrap();
        udp.set_source(self.from.port());
        udp.set_destination(self.to.port());
        udp.set_length(length);
        let checksum = udp_checksum(&udp.to_immutable(), self.from.ip(), self.to.ip());
        udp.set_checksum(checksum);
        bytes
    }

    /// Takes bytes apart, and holds every length and checksum against what it should be. A UDP
    /// checksum of 0 (none, IPv4 only) is let through. Of a packet that carries another one, that
    /// other one.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        if let Some(carried) = carried(bytes) {
            return Self::read(&carried);
        }
        let ethernet = EthernetPacket::new(bytes).unwrap();
        let (from, to, ttl, payload) = match ethernet.get_ethertype() {
            EtherTypes::Ipv4 => {
                let ip = Ipv4Packet::new(ethernet.payload()).unwrap();
                assert_eq!(ip.get_checksum(), ipv4::checksum(&ip), "IPv4 checksum");
                assert_eq!(usize::from(ip.get_total_length()), ethernet.payload().len());
                let (from, to) = (ip.get_source().into(), ip.get_destination().into());
                (from, to, ip.get_ttl(), (ip.get_next_level_protocol(), ip.payload().to_vec()))
            }
            EtherTypes::Ipv6 => {
                let ip = Ipv6Packet::new(ethernet.payload()).unwrap();
                let (from, to): (IpAddr, IpAddr) =
                    (ip.get_source().into(), ip.get_destination().into());
                (from, to, ip.get_hop_limit(), (ip.get_next_header(), ip.payload().to_vec()))
            }
            other => panic!("ethertype {other}"),
        };
        let (protocol, transport) = payload;
        if protocol == IpNextHeaderProtocols::Tcp {
            let tcp = TcpPacket::new(&transport).unwrap();
            assert_eq!(tcp.get_checksum(), tcp_checksum(&tcp, from, to), "TCP checksum");
            return Self {
                from: SocketAddr::new(from, tcp.get_source()),
                to: SocketAddr::new(to, tcp.get_destination()),
                ttl,
                payload: tcp.payload().to_vec(),
                transport: Transport::Tcp {
                    flags: tcp.get_flags(),
                    sequence: tcp.get_sequence(),
                    acknowledgement: tcp.get_acknowledgement(),
                },
            };
        }
        let udp = UdpPacket::new(&transport).unwrap();
        if udp.get_checksum() != 0 || from.is_ipv6() {
            assert_eq!(udp.get_checksum(), udp_checksum(&udp, from, to), "UDP checksum");
        }
        Self {
            from: SocketAddr::new(from, udp.get_source()),
            to: SocketAddr::new(to, udp.get_destination()),
            ttl,
            payload: udp.payload().to_vec(),
            transport: Transport::Udp,
        }
    }
}

/// The packet that another carries, behind an Ethernet header.
pub(crate) fn carried(bytes: &[u8]) -> Option<Vec<u8>> {
    let ethernet = EthernetPacket::new(bytes).unwrap();
    let (next, size) = match ethernet.get_ethertype() {
        EtherTypes::Ipv4 => {
            let ip = Ipv4Packet::new(ethernet.payload())?;
            assert_eq!(ip.get_checksum(), ipv4::checksum(&ip), "IPv4 checksum");
            assert_eq!(usize::from(ip.get_total_length()), ethernet.payload().len());
            (ip.get_next_level_protocol(), IPV4)
        }
        EtherTypes::Ipv6 => {
            let ip = Ipv6Packet::new(ethernet.payload())?;
            assert_eq!(usize::from(ip.get_payload_length()), ethernet.payload().len() - IPV6);
            (ip.get_next_header(), IPV6)
        }
        _ => return None,
    };
    let ethertype = match next {
        IpNextHeaderProtocols::Ipv4 => EtherTypes::Ipv4,
        IpNextHeaderProtocols::Ipv6 => EtherTypes::Ipv6,
        _ => return None,
    };
    let mut frame = bytes[..ETHERNET].to_vec();
    frame[12..].copy_from_slice(&ethertype.0.to_be_bytes());
    frame.extend(&bytes[ETHERNET + size..]);
    Some(frame)
}

fn tcp_checksum(tcp: &TcpPacket<'_>, from: IpAddr, to: IpAddr) -> u16 {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => tcp::ipv4_checksum(tcp, &from, &to),
        (IpAddr::V6(from), IpAddr::V6(to)) => tcp::ipv6_checksum(tcp, &from, &to),
        _ => panic!("two families in one packet"),
    }
}

fn udp_checksum(udp: &UdpPacket<'_>, from: IpAddr, to: IpAddr) -> u16 {
    let sum = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => udp::ipv4_checksum(udp, &from, &to),
        (IpAddr::V6(from), IpAddr::V6(to)) => udp::ipv6_checksum(udp, &from, &to),
        _ => panic!("two families in one packet"),
    };
    // 0 means that there is none (RFC 768).
    if sum == 0 { 0xffff } else { sum }
}
