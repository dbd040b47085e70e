//! What `dsr = "ipip"` puts around a packet, field by field, and when it does not.

use baton::datapath::skeleton::types::{drop_reason, forward_mode};
use pnet_packet::ipv4::Ipv4Packet;
use pnet_packet::ipv6::Ipv6Packet;

use crate::golden::{LABS, Lab};
use crate::icmp::Message;
use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ETHERNET, Packet, SYN, carried};

/// Each family in each.
const WAYS: [(&Lab, &Lab); 4] =
    [(&LABS[0], &LABS[0]), (&LABS[0], &LABS[1]), (&LABS[1], &LABS[0]), (&LABS[1], &LABS[1])];

fn kernel(inner: &Lab, outer: &Lab, protocol: u8) -> (Kernel, u16) {
    let mut kernel = Kernel::new();
    let listen = (inner.vip, protocol);
    let mode = forward_mode::MODE_DSR_IPIP;
    let ids = kernel.service(1, mode, listen, outer.nat, &[outer.backend]);
    (kernel, ids[0])
}

/// With this TOS, or traffic class.
fn marked(packet: &Packet, tos: u8) -> Vec<u8> {
    let mut bytes = packet.bytes();
    if packet.from.is_ipv4() {
        bytes[ETHERNET + 1] = tos;
        let sum = pnet_packet::ipv4::checksum(&Ipv4Packet::new(&bytes[ETHERNET..]).unwrap());
        bytes[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes[ETHERNET] |= tos >> 4;
        bytes[ETHERNET + 1] |= tos << 4;
    }
    bytes
}

/// Source, destination, TTL, TOS and what follows of the outer header.
fn outer(bytes: &[u8]) -> (String, String, u8, u8, u8) {
    if bytes[ETHERNET] >> 4 == 4 {
        let ip = Ipv4Packet::new(&bytes[ETHERNET..]).unwrap();
        assert_eq!((ip.get_flags(), ip.get_fragment_offset(), ip.get_identification()), (2, 0, 0));
        let tos = ip.get_dscp() << 2 | ip.get_ecn();
        let (from, to) = (ip.get_source().to_string(), ip.get_destination().to_string());
        (from, to, ip.get_ttl(), tos, ip.get_next_level_protocol().0)
    } else {
        let ip = Ipv6Packet::new(&bytes[ETHERNET..]).unwrap();
        assert_ne!(ip.get_flow_label(), 0);
        let (from, to) = (ip.get_source().to_string(), ip.get_destination().to_string());
        (from, to, ip.get_hop_limit(), ip.get_traffic_class(), ip.get_next_header().0)
    }
}

fn ip_of(address: &str) -> String {
    address.parse::<std::net::SocketAddr>().unwrap().ip().to_string()
}

#[test]
fn either_family_travels_in_either() {
    for (inner, way) in WAYS {
        for (protocol, packet) in [
            (TCP, Packet::tcp(inner.client, inner.vip, SYN, 1, 0)),
            (UDP, Packet::udp(inner.client, inner.vip)),
        ] {
            let (kernel, _) = kernel(inner, way, protocol);
            // EF, and the network has met congestion.
            let bytes = marked(&packet, 46 << 2 | 3);
            let (verdict, out) = kernel.run(&bytes);
            assert_eq!(verdict, 7, "{} in {}", inner.name, way.name);
            let next = if inner.name == "IPv4" { 4 } else { 41 };
            let expected = (way.nat.to_owned(), ip_of(way.backend), 64, 46 << 2 | 3, next);
            assert_eq!(outer(&out), expected, "{} in {}", inner.name, way.name);
            let ethertype = if way.name == "IPv4" { [8, 0] } else { [0x86, 0xdd] };
            assert_eq!(out[12..14], ethertype);
            // But for its TTL the packet is what it was.
            let carried = carried(&out).unwrap();
            let sent = Packet::read(&carried);
            assert_eq!(sent, Packet { ttl: 63, ..packet.clone() });
            let tos = marked(&Packet { ttl: 63, ..packet.clone() }, 46 << 2 | 3);
            assert_eq!(carried, tos, "{} in {}", inner.name, way.name);
        }
    }
}

#[test]
fn flows_differ_in_their_label() {
    let (kernel, _) = kernel(&LABS[1], &LABS[1], UDP);
    let label = |port: u16| {
        let client = format!("[fd77::10]:{port}");
        let (_, out) = kernel.run(&Packet::udp(&client, LABS[1].vip).bytes());
        Ipv6Packet::new(&out[ETHERNET..]).unwrap().get_flow_label()
    };
    let labels: std::collections::HashSet<u32> = (1000..1100).map(label).collect();
    assert!(labels.len() > 95, "{}", labels.len());
    assert_eq!(label(1000), label(1000));
}

#[test]
fn what_does_not_fit_with_its_outer_header_is_not_sent() {
    for (inner, way) in WAYS {
        let (kernel, backend) = kernel(inner, way, UDP);
        let room = if way.name == "IPv4" { 1480 } else { 1460 };
        let header = if inner.name == "IPv4" { 28 } else { 48 };
        kernel.set_mtu(backend, 1500);
        let packet = |length: usize| {
            let payload = vec![b'x'; length - header];
            Packet { payload, ..Packet::udp(inner.client, inner.vip) }
        };
        let fits = packet(room);
        assert_eq!(kernel.sent(&fits), Packet { ttl: 63, ..fits });
        let fate = kernel.fate(&packet(room + 1));
        let Fate::Answered(drop_reason::DROP_TOO_BIG, answer) = fate else {
            panic!("{} in {}: {fate:?}", inner.name, way.name);
        };
        assert_eq!(Message::read(&answer).rest as usize, room, "{} in {}", inner.name, way.name);
    }
}
