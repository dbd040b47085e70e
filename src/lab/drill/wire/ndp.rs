//! Neighbor Discovery (RFC 4861) on the wire. Probes come from link-local addresses that belong to
//! nobody, so the answers go to nobody; a probe from `::` would be answered to everyone.

use std::net::Ipv6Addr;

use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::util::ipv6_checksum;

use super::{Heard, source, source_number};
use crate::lab::topology::Mac;

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const ICMP: usize = ETHERNET + IPV6;
/// Header and target address, without options.
const MESSAGE: usize = 24;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Options (RFC 4861 §4.6.1), each eight bytes with an Ethernet address.
const SOURCE_ADDRESS: [u8; 2] = [1, 1];
const TARGET_ADDRESS: [u8; 2] = [2, 1];

/// Who has `vip`?
pub(super) fn question(number: usize, vip: Ipv6Addr) -> Vec<u8> {
    let group = solicited_node(vip);
    let o = group.octets();
    let destination = (Mac([0x33, 0x33, o[12], o[13], o[14], o[15]]), group);
    let sender = source(number);
    frame(SOLICITATION, [0; 4], (sender, asker(sender)), destination, vip, SOURCE_ADDRESS, sender)
}

/// RFC 4291 §2.7.1.
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (high & 0xff), low)
}

/// The address from which a probe comes: its number is in the last byte, as in the hardware's.
fn asker(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, a, b << 8 | c, d << 8 | e, f)
}

/// ```text
/// | destination 6 | source 6 | 86 dd |
/// | 60 00 00 00 | length 2 | 3a | ff | source 16 | destination 16 |
/// | type 1 | 00 | checksum 2 | flags 4 | target 16 | option 2 | address 6 |
/// ```
fn frame(
    kind: u8,
    flags: [u8; 4],
    from: (Mac, Ipv6Addr),
    to: (Mac, Ipv6Addr),
    target: Ipv6Addr,
    option: [u8; 2],
    address: Mac,
) -> Vec<u8> {
    let head = [kind, 0, 0, 0];
    let message = [&head, &flags, &target.octets()[..], &option, &address.0].concat();
    let length = (message.len() as u16).to_be_bytes();
    let ipv6 = [0x60, 0, 0, 0, length[0], length[1], 58, 255];
    let ethertype = (libc::ETH_P_IPV6 as u16).to_be_bytes();
    let (source, destination) = (from.1.octets(), to.1.octets());
    let parts: [&[u8]; 7] =
        [&to.0.0, &from.0.0, &ethertype, &ipv6, &source, &destination, &message];
    let mut frame = parts.concat();
    let icmpv6 = IpNextHeaderProtocols::Icmpv6;
    let checksum = ipv6_checksum(&message, 1, &[], &from.1, &to.1, icmpv6).to_be_bytes();
    frame[ICMP + 2..ICMP + 4].copy_from_slice(&checksum);
    frame
}

/// What a frame says of `vip`. An advertisement to a probe's address is an answer, to all nodes
/// an announcement; the one who sent it is in its option.
pub(super) fn hear(frame: &[u8], vip: Ipv6Addr) -> Option<Heard> {
    let bytes = |at: usize| -> Option<[u8; 16]> { frame.get(at..at + 16)?.try_into().ok() };
    let destination = Ipv6Addr::from(bytes(ETHERNET + 24)?);
    let message = frame.get(ICMP..)?;
    if frame[ETHERNET + 6] != 58 || message.len() < MESSAGE + 8 || message[0] != ADVERTISEMENT {
        return None;
    }
    if Ipv6Addr::from(bytes(ICMP + 8)?) != vip || message[MESSAGE..MESSAGE + 2] != TARGET_ADDRESS {
        return None;
    }
    let mac = Mac(message[MESSAGE + 2..MESSAGE + 8].try_into().ok()?);
    if destination.is_multicast() {
        return Some(Heard::Announcement(mac));
    }
    let asked = Mac(frame[..6].try_into().ok()?);
    Some(Heard::Answer(source_number(asked)?, mac))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100);
    const RELAY: Mac = Mac([2, 0, 0, 0x77, 0, 2]);

    fn advertisement(to: (Mac, Ipv6Addr)) -> Vec<u8> {
        frame(ADVERTISEMENT, [0x60, 0, 0, 0], (RELAY, VIP), to, VIP, TARGET_ADDRESS, RELAY)
    }

    #[test]
    fn an_answer_says_to_which_probe_and_an_announcement_is_none() {
        let asked = source(70);
        let answer = advertisement((asked, asker(asked)));
        assert_eq!(hear(&answer, VIP), Some(Heard::Answer(6, RELAY)));
        let everyone = (Mac([0x33, 0x33, 0, 0, 0, 1]), Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
        assert_eq!(hear(&advertisement(everyone), VIP), Some(Heard::Announcement(RELAY)));
    }

    #[test]
    fn other_traffic_is_nothing() {
        let answer = advertisement((source(1), asker(source(1))));
        assert_eq!(hear(&answer, Ipv6Addr::LOCALHOST), None);
        assert_eq!(hear(&question(1, VIP), VIP), None);
        for length in 0..answer.len() {
            assert_eq!(hear(&answer[..length], VIP), None, "{length}");
        }
    }

    #[test]
    fn a_question_goes_to_the_solicited_node_group() {
        let question = question(5, VIP);
        assert_eq!(question[..6], [0x33, 0x33, 0xff, 0, 1, 0]);
        assert_eq!(solicited_node(VIP).to_string(), "ff02::1:ff00:100");
        assert_eq!(asker(source(5)).to_string(), "fe80::2:ba70:0:5");
    }
}
