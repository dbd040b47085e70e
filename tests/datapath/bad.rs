//! Bad input, closed gates, other people's packets: dropped under the right name or left alone,
//! never sent to the wrong place.

use baton::datapath::gate::Deadline;
use baton::datapath::skeleton::types::{drop_reason, forward_mode};
use pnet_packet::ipv4::{self, MutableIpv4Packet};

use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, ETHERNET, Packet, SYN};

const CLIENT: &str = "10.77.0.10:40000";
const CLIENT6: &str = "[fd77::10]:40000";
const VIP: &str = "10.77.0.100:80";
const VIP6: &str = "[fd77::100]:80";

fn kernel() -> Kernel {
    let mut kernel = Kernel::new();
    let mode = forward_mode::MODE_NAT;
    kernel.service(1, mode, (VIP, TCP), "10.78.0.100", &["10.78.0.11:8080"]);
    kernel.service(2, mode, (VIP6, TCP), "fd78::100", &["[fd78::11]:8080"]);
    kernel.service(3, mode, (VIP, UDP), "10.78.0.100", &["10.78.0.11:8080"]);
    kernel.service(4, mode, (VIP6, UDP), "fd78::100", &["[fd78::11]:8080"]);
    kernel
}

fn dropped(reason: drop_reason) -> Fate {
    Fate::Dropped(reason)
}

/// A change of an IPv4 header with its checksum put right.
fn with_ipv4(packet: &Packet, change: impl FnOnce(&mut MutableIpv4Packet<'_>)) -> Vec<u8> {
    let mut bytes = packet.bytes();
    let mut ip = MutableIpv4Packet::new(&mut bytes[ETHERNET..]).unwrap();
    change(&mut ip);
    let checksum = ipv4::checksum(&ip.to_immutable());
    ip.set_checksum(checksum);
    bytes
}

#[test]
fn whatever_is_cut_off_is_not_sent_on() {
    let kernel = kernel();
    for packet in [
        Packet::tcp(CLIENT, VIP, SYN, 1, 0),
        Packet::tcp(CLIENT6, VIP6, SYN, 1, 0),
        Packet::udp(CLIENT, VIP),
        Packet::udp(CLIENT6, VIP6),
    ] {
        let bytes = packet.bytes();
        // Without a whole network header the kernel does not take it from a test; see xdp.rs.
        for length in packet.transport_at()..bytes.len() {
            let fate = kernel.fate_of_bytes(&bytes[..length]);
            let expected = if length < bytes.len() - packet.payload.len() {
                drop_reason::DROP_TRUNCATED
            } else {
                drop_reason::DROP_BAD_LENGTH
            };
            assert_eq!(fate, dropped(expected), "{packet:?} cut to {length}");
        }
    }
    assert_eq!(kernel.maps.half_flows.slices(256).unwrap().count(), 0);
}

#[test]
fn headers_that_lie_are_dropped_under_their_name() {
    let kernel = kernel();
    let syn = Packet::tcp(CLIENT, VIP, SYN, 1, 0);
    let longer = |extra: i32| {
        with_ipv4(&syn, |ip| ip.set_total_length((i32::from(ip.get_total_length()) + extra) as u16))
    };
    let mut checksum = syn.bytes();
    checksum[ETHERNET + 10] ^= 1;
    let mut doff = syn.bytes();
    doff[syn.transport_at() + 12] = 0x40;
    let mut long_doff = syn.bytes();
    long_doff[syn.transport_at() + 12] = 0xf0;
    let datagram = Packet::udp(CLIENT, VIP);
    let mut udp_length = datagram.bytes();
    udp_length[datagram.transport_at() + 5] += 1;
    let mut udp_short = datagram.bytes();
    udp_short[datagram.transport_at() + 5] = 7;
    let syn6 = Packet::tcp(CLIENT6, VIP6, SYN, 1, 0);
    let mut payload6 = syn6.bytes();
    payload6[ETHERNET + 5] += 1;
    let mut no_room6 = syn6.bytes();
    no_room6[ETHERNET + 5] = 19;
    for (what, bytes, reason) in [
        ("longer than it is", longer(1), drop_reason::DROP_BAD_LENGTH),
        ("no room for TCP", longer(-6), drop_reason::DROP_TRUNCATED),
        ("checksum", checksum, drop_reason::DROP_BAD_CHECKSUM),
        ("ihl", with_ipv4(&syn, |ip| ip.set_header_length(4)), drop_reason::DROP_BAD_HEADER),
        ("version", with_ipv4(&syn, |ip| ip.set_version(5)), drop_reason::DROP_BAD_HEADER),
        ("data offset", doff, drop_reason::DROP_BAD_HEADER),
        ("data offset past the end", long_doff, drop_reason::DROP_BAD_HEADER),
        ("UDP length", udp_length, drop_reason::DROP_BAD_LENGTH),
        ("UDP length below 8", udp_short, drop_reason::DROP_BAD_LENGTH),
        ("IPv6 payload length", payload6, drop_reason::DROP_BAD_LENGTH),
        ("IPv6 without room for TCP", no_room6, drop_reason::DROP_TRUNCATED),
    ] {
        assert_eq!(kernel.fate_of_bytes(&bytes), dropped(reason), "{what}");
    }
}

#[test]
fn sources_that_no_client_has_are_dropped() {
    let kernel = kernel();
    for source in ["0.0.0.1", "127.0.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"] {
        let packet = Packet::tcp(&format!("{source}:4000"), VIP, SYN, 1, 0);
        assert_eq!(kernel.fate(&packet), dropped(drop_reason::DROP_BAD_SOURCE), "{source}");
    }
    for source in ["::", "::1", "ff02::1"] {
        let packet = Packet::tcp(&format!("[{source}]:4000"), VIP6, SYN, 1, 0);
        assert_eq!(kernel.fate(&packet), dropped(drop_reason::DROP_BAD_SOURCE), "{source}");
    }
    for vip in [VIP, VIP6] {
        let land = Packet::tcp(vip, vip, SYN, 1, 0);
        assert_eq!(kernel.fate(&land), dropped(drop_reason::DROP_LAND));
    }
}

#[test]
fn the_ttl_ends_where_it_ends() {
    let kernel = kernel();
    for (client, vip) in [(CLIENT, VIP), (CLIENT6, VIP6)] {
        for ttl in [0, 1] {
            let packet = Packet { ttl, ..Packet::udp(client, vip) };
            let fate = kernel.fate(&packet);
            assert!(matches!(fate, Fate::Answered(drop_reason::DROP_TTL, _)), "{fate:?}");
        }
        let packet = Packet { ttl: 2, ..Packet::udp(client, vip) };
        assert_eq!(kernel.sent(&packet).ttl, 1);
    }
}

#[test]
fn a_closed_gate_holds_back_all_that_is_ours_and_nothing_else() {
    let kernel = kernel();
    let datagram = Packet::udp(CLIENT, VIP);
    let toward = kernel.sent(&datagram);
    kernel.gate.close();
    let closed = dropped(drop_reason::DROP_GATE_CLOSED);
    assert_eq!(kernel.fate(&datagram), closed);
    assert_eq!(kernel.fate(&toward.answer(crate::packet::Transport::Udp)), closed);
    // A port of the VIP without a service, or with a listener of ours.
    assert_eq!(kernel.fate(&Packet::tcp(CLIENT, "10.77.0.100:22", SYN, 1, 0)), closed);
    // The node's own address, the backend's own connections.
    assert_eq!(kernel.fate(&Packet::tcp(CLIENT, "10.77.0.2:22", SYN, 1, 0)), Fate::Passed);
    let own = Packet::tcp("10.78.0.11:8080", "10.78.0.2:5000", ACK, 1, 1);
    assert_eq!(kernel.fate(&own), Fate::Passed);
    // By itself: nobody renews it. Jiffies may say so a little early; the exact clock decides.
    let jiffies = kernel.jiffies() - 1;
    kernel.gate.open_until(Deadline { jiffies, nanoseconds: 1 });
    assert_eq!(kernel.fate(&datagram), closed);
    kernel.gate.open_until(Deadline { jiffies, nanoseconds: u64::MAX / 4 });
    assert_eq!(kernel.sent(&datagram), toward);
    kernel.open_gate();
    assert_eq!(kernel.sent(&datagram), toward);
}

#[test]
fn other_peoples_packets_are_left_alone() {
    let kernel = kernel();
    for packet in [
        Packet::tcp(CLIENT, "10.77.0.100:22", SYN, 1, 0),
        Packet::tcp(CLIENT, "10.77.0.2:80", SYN, 1, 0),
        Packet::udp("10.77.0.1:53", "10.77.0.2:5000"),
        Packet::tcp(CLIENT6, "[fd77::2]:80", SYN, 1, 0),
    ] {
        assert_eq!(kernel.fate(&packet), Fate::Passed, "{packet:?}");
    }
    // Broken, and none of our business.
    let mut bytes = Packet::tcp(CLIENT, "10.77.0.2:80", SYN, 1, 0).bytes();
    bytes[ETHERNET + 10] ^= 1;
    assert_eq!(kernel.fate_of_bytes(&bytes), Fate::Passed);
    // ARP, and a frame of a protocol that nobody knows.
    for ethertype in [[8, 6], [0x88, 0xb5]] {
        let mut bytes = vec![0; 60];
        bytes[12..14].copy_from_slice(&ethertype);
        assert_eq!(kernel.fate_of_bytes(&bytes), Fate::Passed);
    }
}
