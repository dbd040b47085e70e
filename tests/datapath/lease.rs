//! Who asks for a VIP, and what says that it is here: only while the lease holds.

use baton::datapath::gate::Deadline;
use baton::datapath::skeleton::types::drop_reason;
use baton_ha::announce::{ArpOperation, RouterFlag, gratuitous_arp, unsolicited_na};
use baton_ha::lease;

use crate::kernel::{Fate, Kernel};

const VIPS: [&str; 2] = ["10.77.0.100", "fd77::100"];
const OTHERS: [&str; 2] = ["10.77.0.2", "fd77::2"];
const LOOPBACK: u32 = 1;
const XDP_DROP: u32 = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const ARP: drop_reason = drop_reason::DROP_ARP_NO_LEASE;
const ND: drop_reason = drop_reason::DROP_ND_NO_LEASE;
const SENT: drop_reason = drop_reason::DROP_SENT_NO_LEASE;

fn kernel() -> Kernel {
    let kernel = Kernel::new();
    kernel.vips(&VIPS);
    kernel
}

/// Who has `target`? Tell `sender`.
fn request(sender: &str, target: &str) -> Vec<u8> {
    let octets = |address: &str| address.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut frame = gratuitous_arp(MAC, target.parse().unwrap(), ArpOperation::Request).to_vec();
    frame[28..32].copy_from_slice(&octets(sender));
    frame
}

/// A Neighbor Solicitation for `target` from `source`, to its solicited-node group or itself.
fn solicitation(source: &str, to: &str, target: &str) -> Vec<u8> {
    let octets = |address: &str| address.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let mut frame =
        unsolicited_na(MAC, target.parse().unwrap(), target.parse().unwrap(), RouterFlag::Host)
            .to_vec();
    frame[22..38].copy_from_slice(&octets(source));
    frame[38..54].copy_from_slice(&octets(to));
    frame[54] = 135;
    frame
}

fn questions() -> Vec<(Vec<u8>, drop_reason)> {
    let [vip4, vip6] = VIPS;
    vec![
        (request("10.77.0.9", vip4), ARP),
        // A probe (RFC 5227).
        (request("0.0.0.0", vip4), ARP),
        (solicitation("fd77::9", "ff02::1:ff00:100", vip6), ND),
        (solicitation("fd77::9", vip6, vip6), ND),
        // Duplicate address detection.
        (solicitation("::", "ff02::1:ff00:100", vip6), ND),
    ]
}

fn announcements(addresses: [&str; 2]) -> Vec<Vec<u8>> {
    let [v4, v6] = addresses;
    let arp = |operation| gratuitous_arp(MAC, v4.parse().unwrap(), operation).to_vec();
    let na = unsolicited_na(MAC, v6.parse().unwrap(), v6.parse().unwrap(), RouterFlag::Host);
    vec![arp(ArpOperation::Request), arp(ArpOperation::Reply), na.to_vec()]
}

#[test]
fn whoever_asks_for_a_vip_is_heard_only_while_the_lease_holds() {
    let kernel = kernel();
    for (frame, _) in questions() {
        assert_eq!(kernel.fate_of_bytes(&frame), Fate::Passed, "{frame:?}");
    }
    kernel.gate.close();
    for (frame, reason) in questions() {
        assert_eq!(kernel.fate_of_bytes(&frame), Fate::Dropped(reason), "{frame:?}");
        assert_eq!(kernel.run_xdp(&frame, LOOPBACK).0, XDP_DROP, "{frame:?}");
    }
    // Jiffies that are late do not make it longer.
    let over = Deadline { jiffies: kernel.jiffies() + 1000, nanoseconds: lease::now() };
    kernel.gate.open_until(over);
    for (frame, reason) in questions() {
        assert_eq!(kernel.fate_of_bytes(&frame), Fate::Dropped(reason), "{frame:?}");
    }
}

#[test]
fn without_a_lease_others_are_heard_and_other_addresses_asked_for() {
    let kernel = kernel();
    kernel.gate.close();
    let [other4, other6] = OTHERS;
    let mut passing = announcements(VIPS);
    passing.extend([
        request(VIPS[0], other4),
        request("10.77.0.9", other4),
        solicitation("fd77::9", other6, other6),
    ]);
    for frame in passing {
        assert_eq!(kernel.fate_of_bytes(&frame), Fate::Passed, "{frame:?}");
    }
    // Cut anywhere it is no question, and nobody's.
    for (frame, _) in questions() {
        // The kernel runs nothing on less than the header of IP.
        let shortest = if frame[12..14] == [8, 6] { 14 } else { 14 + 40 };
        for length in shortest..frame.len() {
            let fate = kernel.fate_of_bytes(&frame[..length]);
            let truncated = Fate::Dropped(drop_reason::DROP_TRUNCATED);
            let closed = Fate::Dropped(drop_reason::DROP_GATE_CLOSED);
            let asks = length >= 14 + 28 && frame[12..14] == [8, 6];
            let asks = asks || length >= 14 + 40 + 24;
            assert!(
                asks || [Fate::Passed, truncated, closed].contains(&fate),
                "{length}: {fate:?}"
            );
        }
    }
}

#[test]
fn the_stack_says_nothing_in_the_name_of_a_vip_without_a_lease() {
    let kernel = kernel();
    let speaking = || {
        let mut frames = announcements(VIPS);
        // ARP of its own for somebody else, with the VIP as who asks; a solicitation; data.
        frames.extend([
            request(VIPS[0], OTHERS[0]),
            solicitation(VIPS[1], OTHERS[1], OTHERS[1]),
            ipv4_from(VIPS[0]),
        ]);
        // The kernel's answer from its own address.
        let mut na = announcements(VIPS).pop().unwrap();
        na[22..38].copy_from_slice(&OTHERS[1].parse::<std::net::Ipv6Addr>().unwrap().octets());
        frames.push(na);
        frames
    };
    for frame in speaking() {
        assert_eq!(kernel.sends(&frame), Fate::Passed, "{frame:?}");
    }
    kernel.gate.close();
    for frame in speaking() {
        assert_eq!(kernel.sends(&frame), Fate::Dropped(SENT), "{frame:?}");
    }
    let mut own = announcements(OTHERS);
    own.extend([request(OTHERS[0], VIPS[0]), solicitation(OTHERS[1], VIPS[1], VIPS[1])]);
    own.push(ipv4_from(OTHERS[0]));
    for frame in own {
        assert_eq!(kernel.sends(&frame), Fate::Passed, "{frame:?}");
    }
}

/// A datagram's beginning.
fn ipv4_from(source: &str) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[23] = 17;
    frame[26..30].copy_from_slice(&source.parse::<std::net::Ipv4Addr>().unwrap().octets());
    frame[30..34].copy_from_slice(&[10, 77, 0, 9]);
    frame
}
