//! Announcements byte by byte, and the reading of a rival's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use baton_ha::announce::{
    ArpOperation, ArpSeen, Evidence, Mac, NaSeen, Rival, RouterFlag, SeenError, gratuitous_arp,
    parse_arp, parse_na, unsolicited_na,
};
use proptest::prelude::*;

const MAC: Mac = [2, 0, 0, 0, 0, 0xa1];
const RIVAL: Mac = [2, 0, 0, 0, 0, 0xb2];
const VIP4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100);

/// Ethernet: broadcast, from MAC, ARP; then Ethernet/IPv4, request; sender; target.
const ARP_REQUEST: &str = "ffffffffffff0200000000a10806\
                           00010800060400010200000000a10a4d00640000000000000a4d0064";
const ARP_REPLY: &str = "ffffffffffff0200000000a10806\
                         00010800060400020200000000a10a4d00640200000000a10a4d0064";

/// Ethernet: all nodes, from MAC, IPv6; hop limit 255; NA with the override flag and the target
/// link-layer option. Its checksum, 570f, was summed apart from this code.
const NA: &str = "3333000000010200000000a186dd6000000000203aff\
                  fd770000000000000000000000000100ff020000000000000000000000000001\
                  8800570f20000000fd77000000000000000000000000010002010200000000a1";

/// What keepalived 2.2.7 sends: a request whose target MAC is broadcast.
const KEEPALIVED_ARP: &str = "ffffffffffffea2e77263f560806\
                              0001080006040001ea2e77263f560a4d0064ffffffffffff0a4d0064";
const KEEPALIVED_NA: &str = "333300000001ea2e77263f5686dd6000000000203aff\
                             fe800000000000000000000000050001ff020000000000000000000000000001\
                             8800b8e620000000fe8000000000000000000000000500010201ea2e77263f56";
const KEEPALIVED_MAC: Mac = [0xea, 0x2e, 0x77, 0x26, 0x3f, 0x56];

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// The golden NA with some bytes changed and its checksum put right.
fn na_with(changes: &[(usize, u8)]) -> Vec<u8> {
    let mut frame = bytes(NA);
    for (at, value) in changes {
        frame[*at] = *value;
    }
    seal(&mut frame);
    frame
}

/// Puts the ICMPv6 checksum and the payload length of an IPv6 frame right.
fn seal(frame: &mut [u8]) {
    let length = (frame.len() - 54) as u16;
    frame[18..20].copy_from_slice(&length.to_be_bytes());
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap());
    let sum = pnet_packet::util::ipv6_checksum(
        &frame[54..],
        1,
        &[],
        &address(22),
        &address(38),
        pnet_packet::ip::IpNextHeaderProtocols::Icmpv6,
    );
    frame[56..58].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn announcements_are_these_bytes() {
    assert_eq!(gratuitous_arp(MAC, VIP4, ArpOperation::Request).to_vec(), bytes(ARP_REQUEST));
    assert_eq!(gratuitous_arp(MAC, VIP4, ArpOperation::Reply).to_vec(), bytes(ARP_REPLY));
    assert_eq!(unsolicited_na(MAC, VIP6, VIP6, RouterFlag::Host).to_vec(), bytes(NA));
    let router = unsolicited_na(MAC, VIP6, VIP6, RouterFlag::Router);
    assert_eq!(router.to_vec(), na_with(&[(58, 0xa0)]));
}

#[test]
fn announcements_of_others_are_read() {
    let seen =
        |operation, sender_mac| ArpSeen { operation, sender_mac, sender: VIP4, target: VIP4 };
    assert_eq!(parse_arp(&bytes(ARP_REQUEST)), Ok(seen(ArpOperation::Request, MAC)));
    assert_eq!(parse_arp(&bytes(ARP_REPLY)), Ok(seen(ArpOperation::Reply, MAC)));
    assert_eq!(parse_arp(&bytes(KEEPALIVED_ARP)), Ok(seen(ArpOperation::Request, KEEPALIVED_MAC)));
    let mut padded = bytes(ARP_REQUEST);
    padded.extend([0xee; 18]);
    assert_eq!(parse_arp(&padded), Ok(seen(ArpOperation::Request, MAC)));

    let seen = NaSeen { source: VIP6, target: VIP6, mac: MAC, solicited: false };
    assert_eq!(parse_na(&bytes(NA)), Ok(seen));
    let address = "fe80::5:1".parse().unwrap();
    let keepalived =
        NaSeen { source: address, target: address, mac: KEEPALIVED_MAC, solicited: false };
    assert_eq!(parse_na(&bytes(KEEPALIVED_NA)), Ok(keepalived));
    let mut padded = bytes(NA);
    padded.extend([0xee; 18]);
    assert_eq!(parse_na(&padded), Ok(seen));
}

#[test]
fn a_rival_speaks_for_a_vip_with_another_mac() {
    let own = [[2, 0, 0, 0, 0, 0xff], MAC];
    let vips = [IpAddr::V4(VIP4), IpAddr::V6(VIP6)];
    let arp = |mac, vip, operation| {
        parse_arp(&gratuitous_arp(mac, vip, operation)).unwrap().rival(&own, &vips)
    };
    let found = |vip: IpAddr, evidence| Some(Rival { vip, mac: RIVAL, evidence });
    let request = arp(RIVAL, VIP4, ArpOperation::Request);
    assert_eq!(request, found(VIP4.into(), Evidence::ArpRequest));
    let reply = arp(RIVAL, VIP4, ArpOperation::Reply);
    assert_eq!(reply, found(VIP4.into(), Evidence::ArpReply));
    assert_eq!(arp(MAC, VIP4, ArpOperation::Request), None, "this node's own");
    assert_eq!(arp(RIVAL, Ipv4Addr::new(10, 77, 0, 101), ArpOperation::Reply), None);

    let na = |mac, vip| {
        parse_na(&unsolicited_na(mac, vip, vip, RouterFlag::Host)).unwrap().rival(&own, &vips)
    };
    assert_eq!(na(RIVAL, VIP6), found(VIP6.into(), Evidence::NeighborAdvert));
    assert_eq!(na(MAC, VIP6), None);
    assert_eq!(na(RIVAL, Ipv6Addr::LOCALHOST), None);
}

/// A client that asks for the VIP, or probes for it (RFC 5227 §2.1.1), does not claim it.
#[test]
fn who_asks_is_no_rival() {
    for sender in [Ipv4Addr::new(10, 77, 0, 10), Ipv4Addr::UNSPECIFIED] {
        let mut frame = gratuitous_arp(RIVAL, VIP4, ArpOperation::Request);
        frame[28..32].copy_from_slice(&sender.octets());
        let seen = parse_arp(&frame).unwrap();
        assert_eq!((seen.sender, seen.target), (sender, VIP4));
        assert_eq!(seen.rival(&[MAC], &[VIP4.into()]), None);
    }
}

#[test]
fn each_fault_of_an_arp_has_its_error() {
    let changed = |at: usize, value: u8| {
        let mut frame = bytes(ARP_REQUEST);
        frame[at] = value;
        parse_arp(&frame).unwrap_err()
    };
    assert_eq!(changed(13, 0), SeenError::EtherType(0x0800));
    assert_eq!(changed(15, 6), SeenError::ArpKind, "IEEE 802 as hardware");
    assert_eq!(changed(17, 1), SeenError::ArpKind, "another protocol");
    assert_eq!(changed(18, 8), SeenError::ArpKind, "hardware length");
    assert_eq!(changed(19, 16), SeenError::ArpKind, "protocol length");
    assert_eq!(changed(21, 3), SeenError::ArpOperation(3));
    assert_eq!(changed(22, 3), SeenError::Mac, "a group as sender");
    let mut zero = bytes(ARP_REQUEST);
    zero[22..28].fill(0);
    assert_eq!(parse_arp(&zero), Err(SeenError::Mac));
    for tag in [[0x81, 0x00], [0x88, 0xa8]] {
        let mut tagged = bytes(ARP_REQUEST);
        tagged.splice(12..12, [tag[0], tag[1], 0, 7]);
        assert_eq!(parse_arp(&tagged), Err(SeenError::Tagged));
        assert_eq!(parse_na(&tagged), Err(SeenError::Tagged));
    }
    let golden = bytes(ARP_REQUEST);
    for length in 0..golden.len() {
        assert_eq!(parse_arp(&golden[..length]), Err(SeenError::Truncated(length)));
    }
}

#[test]
fn each_fault_of_an_na_has_its_error() {
    let changed = |changes: &[(usize, u8)]| parse_na(&na_with(changes)).unwrap_err();
    assert_eq!(changed(&[(13, 0)]), SeenError::EtherType(0x8600));
    assert_eq!(changed(&[(14, 0x40)]), SeenError::IpHeader);
    assert_eq!(changed(&[(20, 6)]), SeenError::NextHeader(6));
    assert_eq!(changed(&[(20, 0)]), SeenError::NextHeader(0), "hop-by-hop options");
    assert_eq!(changed(&[(21, 254)]), SeenError::HopLimit(254));
    assert_eq!(changed(&[(54, 135)]), SeenError::IcmpType(135));
    assert_eq!(changed(&[(55, 1)]), SeenError::Na, "code");
    assert_eq!(changed(&[(58, 0x60)]), SeenError::Na, "solicited, to a group");
    assert_eq!(changed(&[(62, 0xff)]), SeenError::Na, "a group as target");
    assert_eq!(changed(&[(79, 0)]), SeenError::Na, "an option of length 0");
    assert_eq!(changed(&[(79, 2)]), SeenError::Na, "an option past the end");
    assert_eq!(changed(&[(80, 3)]), SeenError::Mac);
    let mut bad = bytes(NA);
    bad[56] ^= 1;
    assert_eq!(parse_na(&bad), Err(SeenError::Checksum));
    let mut long = bytes(NA);
    long[19] += 1;
    assert_eq!(parse_na(&long), Err(SeenError::IpHeader));
    let golden = bytes(NA);
    for length in 0..golden.len() {
        assert!(parse_na(&golden[..length]).is_err(), "{length} bytes");
    }
}

#[test]
fn an_na_answers_without_its_option_or_with_others() {
    let mut bare = bytes(NA);
    bare.truncate(78);
    // Unicast to a client, solicited.
    bare[38..54].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
    bare[58] = 0x60;
    seal(&mut bare);
    let seen = NaSeen { source: VIP6, target: VIP6, mac: MAC, solicited: true };
    assert_eq!(parse_na(&bare), Ok(seen), "the frame's source serves");

    let mut nonce = bytes(NA);
    nonce.splice(78..78, [14, 1, 1, 2, 3, 4, 5, 6]);
    nonce[11] = 0xb2;
    seal(&mut nonce);
    assert_eq!(parse_na(&nonce).map(|seen| seen.mac), Ok(MAC), "the option counts");
    nonce.extend([1]);
    seal(&mut nonce);
    assert_eq!(parse_na(&nonce), Err(SeenError::Na), "half an option");
}

proptest! {
    #[test]
    fn nothing_panics(frame in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_arp(&frame);
        let _ = parse_na(&frame);
    }

    #[test]
    fn nothing_near_an_na_panics(
        changes in prop::collection::vec((54usize..86, any::<u8>()), 0..6),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut frame = na_with(&changes);
        frame.extend(tail);
        seal(&mut frame);
        let _ = parse_na(&frame);
    }

    #[test]
    fn what_is_announced_is_read(mac in any::<Mac>(), v4 in any::<Ipv4Addr>(), v6 in any::<Ipv6Addr>()) {
        prop_assume!(mac[0] & 1 == 0 && mac != [0; 6] && !v6.is_multicast());
        for operation in [ArpOperation::Request, ArpOperation::Reply] {
            let seen = ArpSeen { operation, sender_mac: mac, sender: v4, target: v4 };
            prop_assert_eq!(parse_arp(&gratuitous_arp(mac, v4, operation)), Ok(seen));
        }
        let seen = NaSeen { source: v6, target: v6, mac, solicited: false };
        prop_assert_eq!(parse_na(&unsolicited_na(mac, v6, v6, RouterFlag::Host)), Ok(seen));
    }
}
