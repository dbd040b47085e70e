//! ICMP messages, taken apart with pnet_packet: what the datapath says of lengths and checksums is
//! held against code that it does not share.

use std::net::IpAddr;

use pnet_packet::Packet as _;
use pnet_packet::ethernet::{EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::icmp::{self, IcmpPacket};
use pnet_packet::icmpv6::{self, Icmpv6Packet};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::{self, Ipv4Packet, MutableIpv4Packet};
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};

/// An ICMP error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) ttl: u8,
    /// Type and code.
    pub(crate) says: (u8, u8),
    /// The word after the checksum.
    pub(crate) rest: u32,
    /// From its network header on.
    pub(crate) quote: Vec<u8>,
}

impl Message {
    /// Takes bytes apart, and holds lengths and checksums against what they should be.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let ethernet = EthernetPacket::new(bytes).unwrap();
        let (from, to, ttl, payload) = match ethernet.get_ethertype() {
            EtherTypes::Ipv4 => {
                let ip = Ipv4Packet::new(ethernet.payload()).unwrap();
                assert_eq!(ip.get_checksum(), ipv4::checksum(&ip), "IPv4 checksum");
                assert_eq!(usize::from(ip.get_total_length()), ethernet.payload().len());
                assert_eq!(ip.get_next_level_protocol(), IpNextHeaderProtocols::Icmp);
                let icmp = IcmpPacket::new(ip.payload()).unwrap();
                assert_eq!(icmp.get_checksum(), icmp::checksum(&icmp), "ICMP checksum");
                let (from, to) = (ip.get_source().into(), ip.get_destination().into());
                (from, to, ip.get_ttl(), ip.payload().to_vec())
            }
            EtherTypes::Ipv6 => {
                let ip = Ipv6Packet::new(ethernet.payload()).unwrap();
                assert_eq!(usize::from(ip.get_payload_length()), ip.payload().len());
                assert_eq!(ethernet.payload().len(), 40 + ip.payload().len());
                assert_eq!(ip.get_next_header(), IpNextHeaderProtocols::Icmpv6);
                let (from, to) = (ip.get_source(), ip.get_destination());
                let icmp = Icmpv6Packet::new(ip.payload()).unwrap();
                let checksum = icmpv6::checksum(&icmp, &from, &to);
                assert_eq!(icmp.get_checksum(), checksum, "ICMPv6 checksum");
                (from.into(), to.into(), ip.get_hop_limit(), ip.payload().to_vec())
            }
            other => panic!("ethertype {other}"),
        };
        Self {
            from,
            to,
            ttl,
            says: (payload[0], payload[1]),
            rest: u32::from_be_bytes(payload[4..8].try_into().unwrap()),
            quote: payload[8..].to_vec(),
        }
    }

    /// Its bytes, from Ethernet on, with right checksums.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut body = vec![self.says.0, self.says.1, 0, 0];
        body.extend(self.rest.to_be_bytes());
        body.extend(&self.quote);
        let header = if self.from.is_ipv4() { 20 } else { 40 };
        let mut bytes = vec![0; 14 + header];
        let mut ethernet = MutableEthernetPacket::new(&mut bytes).unwrap();
        ethernet.set_destination([2, 0, 0, 0, 0, 1].into());
        ethernet.set_source([2, 0, 0, 0, 0, 2].into());
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let checksum = icmp::checksum(&IcmpPacket::new(&body).unwrap());
                body[2..4].copy_from_slice(&checksum.to_be_bytes());
                ethernet.set_ethertype(EtherTypes::Ipv4);
                let mut ip = MutableIpv4Packet::new(&mut bytes[14..]).unwrap();
                ip.set_version(4);
                ip.set_header_length(5);
                ip.set_total_length((header + body.len()) as u16);
                ip.set_ttl(self.ttl);
                ip.set_next_level_protocol(IpNextHeaderProtocols::Icmp);
                ip.set_source(from);
                ip.set_destination(to);
                let checksum = ipv4::checksum(&ip.to_immutable());
                ip.set_checksum(checksum);
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let checksum = icmpv6::checksum(&Icmpv6Packet::new(&body).unwrap(), &from, &to);
                body[2..4].copy_from_slice(&checksum.to_be_bytes());
                ethernet.set_ethertype(EtherTypes::Ipv6);
                let mut ip = MutableIpv6Packet::new(&mut bytes[14..]).unwrap();
                ip.set_version(6);
                ip.set_payload_length(body.len() as u16);
                ip.set_hop_limit(self.ttl);
                ip.set_next_header(IpNextHeaderProtocols::Icmpv6);
                ip.set_source(from);
                ip.set_destination(to);
            }
            _ => panic!("two families in one message"),
        }
        bytes.extend(body);
        bytes
    }
}

/// Whether a frame is one of ICMP.
pub(crate) fn is_icmp(bytes: &[u8]) -> bool {
    match bytes[12..14] {
        [0x08, 0x00] => bytes[14 + 9] == 1,
        [0x86, 0xdd] => bytes[14 + 6] == 58,
        _ => false,
    }
}
