//! What somebody sends who means harm, or whose stack is broken: each kind by the name of its
//! counter, and that nothing of it is sent on.

use baton::datapath::skeleton::types::{backend_state, drop_reason, forward_mode};
use pnet_packet::ipv4::{self, MutableIpv4Packet};

use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, ETHERNET, Packet, RST, SYN, Transport};

const CLIENT: &str = "10.77.0.10:40000";
const CLIENT6: &str = "[fd77::10]:40000";
const VIP: &str = "10.77.0.100:80";
const VIP6: &str = "[fd77::100]:80";
const NAT: &str = "10.78.0.100";
const BACKENDS: [&str; 2] = ["10.78.0.11:8080", "10.78.0.12:8080"];
const BACKEND6: &str = "[fd78::11]:8080";

fn kernel(mode: forward_mode) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.service(1, mode, (VIP, TCP), NAT, &BACKENDS);
    kernel.service(2, mode, (VIP6, TCP), "fd78::100", &[BACKEND6]);
    kernel.service(3, mode, (VIP, UDP), NAT, &BACKENDS);
    kernel.service(4, mode, (VIP6, UDP), "fd78::100", &[BACKEND6]);
    kernel
}

fn dropped(reason: drop_reason) -> Fate {
    Fate::Dropped(reason)
}

/// Bytes put in between the network header and the transport header.
fn with_options(packet: &Packet, options: &[u8]) -> Vec<u8> {
    let (bytes, at) = (packet.bytes(), packet.transport_at());
    let mut bytes = [&bytes[..at], options, &bytes[at..]].concat();
    if packet.from.is_ipv4() {
        let mut ip = MutableIpv4Packet::new(&mut bytes[ETHERNET..]).unwrap();
        ip.set_header_length(5 + (options.len() / 4) as u8);
        ip.set_total_length(ip.get_total_length() + options.len() as u16);
        let checksum = ipv4::checksum(&ip.to_immutable());
        ip.set_checksum(checksum);
    } else {
        bytes[ETHERNET + 5] += options.len() as u8;
    }
    bytes
}

/// `count` IPv6 destination options headers; the last leads to `next`.
fn destination_options(count: usize, next: u8) -> Vec<u8> {
    let last = count - 1;
    (0..count).flat_map(|n| [if n == last { next } else { 60 }, 0, 1, 4, 0, 0, 0, 0]).collect()
}

#[test]
fn options_and_extension_headers_cut_anywhere_are_truncated() {
    let kernel = kernel(forward_mode::MODE_NAT);
    let v4 = Packet::tcp(CLIENT, VIP, SYN, 1, 0);
    let v6 = Packet::tcp(CLIENT6, VIP6, SYN, 1, 0);
    let mut extended = with_options(&v6, &destination_options(3, TCP));
    extended[ETHERNET + 6] = 60;
    for (packet, bytes) in [(&v4, with_options(&v4, &[1; 40])), (&v6, extended)] {
        assert!(matches!(kernel.run(&bytes).0, 7), "whole, it is sent on");
        let header = bytes.len() - packet.payload.len();
        for length in packet.transport_at()..header {
            let fate = kernel.fate_of_bytes(&bytes[..length]);
            assert_eq!(fate, dropped(drop_reason::DROP_TRUNCATED), "{packet:?} cut to {length}");
        }
    }
}

/// An attacker who cuts a packet puts its lengths right, too.
#[test]
fn short_packets_with_right_lengths_are_truncated() {
    let kernel = kernel(forward_mode::MODE_NAT);
    for packet in [
        Packet::tcp(CLIENT, VIP, SYN, 1, 0),
        Packet::tcp(CLIENT6, VIP6, SYN, 1, 0),
        Packet::udp(CLIENT, VIP),
        Packet::udp(CLIENT6, VIP6),
    ] {
        let (bytes, at) = (packet.bytes(), packet.transport_at());
        for length in at..bytes.len() - packet.payload.len() {
            // As it is on Ethernet: padded to what a frame must have.
            let mut short = bytes[..length].to_vec();
            if packet.from.is_ipv4() {
                let mut ip = MutableIpv4Packet::new(&mut short[ETHERNET..]).unwrap();
                ip.set_total_length((length - ETHERNET) as u16);
                let checksum = ipv4::checksum(&ip.to_immutable());
                ip.set_checksum(checksum);
            } else {
                short[ETHERNET + 5] = (length - at) as u8;
            }
            for padding in [0, 60] {
                let mut frame = short.clone();
                frame.resize(length.max(padding), 0);
                let fate = kernel.fate_of_bytes(&frame);
                assert_eq!(fate, dropped(drop_reason::DROP_TRUNCATED), "{packet:?} {length}");
            }
        }
    }
}

#[test]
fn every_wrong_bit_of_an_ipv4_header_is_a_bad_checksum_or_worse() {
    let kernel = kernel(forward_mode::MODE_NAT);
    let bytes = Packet::tcp(CLIENT, VIP, SYN, 1, 0).bytes();
    for bit in 0..20 * 8 {
        let mut wrong = bytes.clone();
        wrong[ETHERNET + bit / 8] ^= 1 << (bit % 8);
        let fate = kernel.fate_of_bytes(&wrong);
        // Another protocol or another's address: not ours.
        assert!(matches!(fate, Fate::Dropped(_) | Fate::Passed), "bit {bit}: {fate:?}");
        if !matches!(bit / 8, 0 | 2 | 3 | 9 | 16..20) {
            assert_eq!(fate, dropped(drop_reason::DROP_BAD_CHECKSUM), "bit {bit}");
        }
    }
}

/// A wrong transport checksum is for the end to see: what is made of it must be as wrong.
#[test]
fn a_wrong_transport_checksum_stays_wrong() {
    for mode in [forward_mode::MODE_NAT, forward_mode::MODE_DNAT] {
        let kernel = kernel(mode);
        for (packet, field) in [
            (Packet::tcp(CLIENT, VIP, SYN, 1, 0), 16),
            (Packet::tcp(CLIENT6, VIP6, SYN, 1, 0), 16),
            (Packet::udp(CLIENT, VIP), 6),
            (Packet::udp(CLIENT6, VIP6), 6),
        ] {
            let at = packet.transport_at() + field;
            let right = packet.bytes();
            let (_, right_out) = kernel.run(&right);
            let word = |bytes: &[u8]| u32::from(bytes[at]) << 8 | u32::from(bytes[at + 1]);
            for wrong_by in [1_u32, 0x100, 0x7fff, 0xfffe] {
                let mut wrong = right.clone();
                let value = ((word(&right) + wrong_by) % 65535) as u16;
                // UDP's 0 means that there is none.
                if value == 0 {
                    continue;
                }
                wrong[at..at + 2].copy_from_slice(&value.to_be_bytes());
                let (verdict, out) = kernel.run(&wrong);
                assert_eq!(verdict, 7);
                let off = (word(&out) + 65535 - word(&right_out)) % 65535;
                assert_eq!(off, wrong_by % 65535, "{packet:?}");
            }
        }
    }
}

#[test]
fn land_attacks_are_dropped_whatever_the_ports() {
    for mode in [forward_mode::MODE_NAT, forward_mode::MODE_DNAT, forward_mode::MODE_DSR_L2] {
        let kernel = kernel(mode);
        for port in [80, 81, 40000] {
            for (address, vip) in [("10.77.0.100", VIP), ("[fd77::100]", VIP6)] {
                let from = format!("{address}:{port}");
                for land in [Packet::tcp(&from, vip, SYN, 1, 0), Packet::udp(&from, vip)] {
                    assert_eq!(kernel.fate(&land), dropped(drop_reason::DROP_LAND), "{land:?}");
                }
            }
        }
    }
}

/// A client that has an address of ours could take the place of others' flows.
#[test]
fn a_client_with_an_address_of_ours_is_spoofed() {
    for mode in [forward_mode::MODE_NAT, forward_mode::MODE_DNAT, forward_mode::MODE_DSR_L2] {
        let mut kernel = kernel(mode);
        kernel.service(5, mode, ("10.77.0.101:80", TCP), NAT, &BACKENDS);
        for from in ["10.78.0.100:5000", "10.77.0.101:5000"] {
            let packet = Packet::tcp(from, VIP, SYN, 1, 0);
            assert_eq!(kernel.fate(&packet), dropped(drop_reason::DROP_BAD_SOURCE), "{from}");
        }
    }
}

/// In the tables an IPv4 address is a mapped one of IPv6; on the wire a mapped one is nobody's.
#[test]
fn ipv4_addresses_in_ipv6_headers_reach_no_ipv4_service() {
    let kernel = kernel(forward_mode::MODE_NAT);
    let syn = Packet::tcp(CLIENT6, "[::ffff:10.77.0.100]:80", SYN, 1, 0);
    assert_eq!(kernel.fate(&syn), dropped(drop_reason::DROP_BAD_HEADER));
    let from = Packet::tcp("[::ffff:10.77.0.10]:40000", VIP6, SYN, 1, 0);
    assert_eq!(kernel.fate(&from), dropped(drop_reason::DROP_BAD_SOURCE));
    // A reply of a server to a flow, in the wrong family.
    let toward = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    let (server, nat) = (format!("[::ffff:{}]:8080", toward.to.ip()), toward.from.port());
    let flags = SYN | ACK;
    let reply = Packet::tcp(&server, &format!("[::ffff:{NAT}]:{nat}"), flags, 5000, 1001);
    assert_eq!(kernel.fate(&reply), dropped(drop_reason::DROP_BAD_SOURCE));
}

#[test]
fn extension_headers_that_hide_the_transport_are_not_believed() {
    let kernel = kernel(forward_mode::MODE_NAT);
    let syn = Packet::tcp(CLIENT6, VIP6, SYN, 1, 0);
    let with = |headers: &[u8], first: u8| {
        let mut bytes = with_options(&syn, headers);
        bytes[ETHERNET + 6] = first;
        bytes
    };
    assert_eq!(kernel.run(&with(&destination_options(6, TCP), 60)).0, 7, "six are read");
    // The kernel's stack would read on, and answer with a RST.
    let seven = kernel.fate_of_bytes(&with(&destination_options(7, TCP), 60));
    assert_eq!(seven, dropped(drop_reason::DROP_BAD_HEADER));
    // A routing header: it is for us if nothing of its way is left.
    assert_eq!(kernel.run(&with(&[TCP, 0, 4, 0, 0, 0, 0, 0], 43)).0, 7);
    let on = kernel.fate_of_bytes(&with(&[TCP, 0, 4, 1, 0, 0, 0, 0], 43));
    assert_eq!(on, dropped(drop_reason::DROP_BAD_HEADER));
}

#[test]
fn servers_packets_of_no_flow_reach_no_client() {
    for mode in [forward_mode::MODE_NAT, forward_mode::MODE_DNAT] {
        let kernel = kernel(mode);
        for (server, nat) in [(BACKENDS[0], "10.78.0.100:33333"), (BACKEND6, "[fd78::100]:33333")] {
            for flags in [SYN, SYN | ACK, ACK, RST] {
                let stray = Packet::tcp(server, nat, flags, 1, 1);
                assert_eq!(kernel.fate(&stray), dropped(drop_reason::DROP_REPLY_NO_FLOW));
            }
            let stray = Packet::udp(server, nat);
            assert_eq!(kernel.fate(&stray), dropped(drop_reason::DROP_REPLY_NO_FLOW));
        }
    }
}

/// The tuple of a flow, but for one part of it.
#[test]
fn spoofed_reply_tuples_reach_no_client() {
    let kernel = kernel(forward_mode::MODE_NAT);
    for protocol in [TCP, UDP] {
        let (first, answer) = if protocol == TCP {
            let flags = SYN | ACK;
            let transport = Transport::Tcp { flags, sequence: 5000, acknowledgement: 1001 };
            (Packet::tcp(CLIENT, VIP, SYN, 1000, 0), transport)
        } else {
            (Packet::udp(CLIENT, VIP), Transport::Udp)
        };
        let right = kernel.sent(&first).answer(answer);
        let other = BACKENDS.iter().find(|it| **it != right.from.to_string()).unwrap();
        let other_port = (right.to.ip(), right.to.port() ^ 1).into();
        for (what, spoofed) in [
            ("another server", Packet { from: other.parse().unwrap(), ..right.clone() }),
            ("another port", Packet { to: other_port, ..right.clone() }),
            ("the VIP", Packet { to: VIP.parse().unwrap(), ..right.clone() }),
        ] {
            match kernel.fate(&spoofed) {
                Fate::Dropped(drop_reason::DROP_REPLY_NO_FLOW) => {}
                // To a service: as a client's, which begins nothing, or a flow of its own.
                Fate::Dropped(drop_reason::DROP_NO_FLOW) if protocol == TCP => {}
                Fate::Sent(sent) if what == "the VIP" => assert_ne!(sent.to, first.from),
                other => panic!("{what}: {other:?}"),
            }
        }
        assert_eq!(kernel.sent(&right).to, first.from);
    }
}

/// Where replies go to the client's own address, the gate holds them back all the same.
#[test]
fn a_closed_gate_holds_back_replies_in_every_mode() {
    let kernel = kernel(forward_mode::MODE_DNAT);
    let half_open = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    let flags = SYN | ACK;
    let answer = Transport::Tcp { flags, sequence: 5000, acknowledgement: 1001 };
    let reply = kernel.sent(&Packet::udp(CLIENT, VIP)).answer(Transport::Udp);
    kernel.sent(&reply);
    kernel.gate.close();
    assert_eq!(kernel.fate(&reply), dropped(drop_reason::DROP_GATE_CLOSED));
    let reply = half_open.answer(answer);
    assert_eq!(kernel.fate(&reply), dropped(drop_reason::DROP_GATE_CLOSED));
    // The server's own conversations with others are not ours.
    let own = Packet::udp(BACKENDS[0], "10.77.0.99:5000");
    assert_eq!(kernel.fate(&own), Fate::Passed);
}

/// A try that was refused leaves nothing on the next one.
#[test]
fn a_refused_try_does_not_mark_the_next() {
    let kernel = kernel(forward_mode::MODE_NAT);
    let syn = Packet::tcp(CLIENT, VIP, SYN, 1000, 0);
    let toward = kernel.sent(&syn);
    let flags = RST | ACK;
    kernel.sent(&toward.answer(Transport::Tcp { flags, sequence: 0, acknowledgement: 1001 }));
    kernel.sent(&Packet::tcp(CLIENT, VIP, RST, 1001, 0));
    kernel.sent(&syn);
    let flags = SYN | ACK;
    kernel.sent(&toward.answer(Transport::Tcp { flags, sequence: 5000, acknowledgement: 1001 }));
    kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    assert_eq!(kernel.flows().len(), 1, "established");
    let (_, reply) = kernel.maps.replies.slices(256).unwrap().next().unwrap();
    assert_eq!((kernel.flows()[0].1.flags, reply.flags & 3), (0, 0), "and alive");
}

/// A flow that has gone on to another backend takes no answers of the one before.
#[test]
fn a_late_answer_of_the_backend_before_is_not_believed() {
    let mut kernel = Kernel::new();
    let ids = kernel.service(1, forward_mode::MODE_NAT, (VIP, UDP), NAT, &BACKENDS);
    let datagram = Packet::udp(CLIENT, VIP);
    let before = kernel.sent(&datagram);
    let on = BACKENDS.iter().position(|it| *it == before.to.to_string()).unwrap();
    kernel.set_state(ids[on], backend_state::BACKEND_DOWN);
    kernel.maps.schedules.set(1, &vec![ids[1 - on]; baton::maglev::SLOTS]).unwrap();
    let after = kernel.sent(&datagram);
    assert_ne!(after.to, before.to);
    let late = kernel.fate(&before.answer(Transport::Udp));
    assert_eq!(late, dropped(drop_reason::DROP_REPLY_NO_FLOW));
    kernel.sent(&after.answer(Transport::Udp));
    assert_eq!(kernel.sent(&datagram).to, after.to);
    kernel.sent(&after.answer(Transport::Udp));
}
