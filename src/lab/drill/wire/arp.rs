//! ARP (RFC 826) on the wire. Probes have the form of RFC 5227 §2.1.1: their sender protocol
//! address is 0.0.0.0, so they change nobody's neighbour table.

use std::net::Ipv4Addr;

use super::{Heard, source, source_number};
use crate::lab::topology::Mac;

const ETHERNET: usize = 14;
const FRAME: usize = ETHERNET + 28;
/// Ethernet and IPv4, six and four bytes of address: the only kind of ARP that matters here.
const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// Who has `vip`?
pub(super) fn question(number: usize, vip: Ipv4Addr) -> Vec<u8> {
    let nobody = (Mac([0; 6]), vip);
    frame(REQUEST, Mac([0xff; 6]), (source(number), Ipv4Addr::UNSPECIFIED), nobody)
}

/// ```text
/// | destination 6 | source 6 | 08 06 |
/// | KIND 6 | operation 2 | sender 6 + 4 | target 6 + 4 |
/// ```
fn frame(
    operation: [u8; 2],
    destination: Mac,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
) -> Vec<u8> {
    let ethertype = (libc::ETH_P_ARP as u16).to_be_bytes();
    let (sender_ip, target_ip) = (sender.1.octets(), target.1.octets());
    let parts: [&[u8]; 9] = [
        &destination.0,
        &sender.0.0,
        &ethertype,
        &KIND,
        &operation,
        &sender.0.0,
        &sender_ip,
        &target.0.0,
        &target_ip,
    ];
    parts.concat()
}

/// What a frame says of `vip`.
pub(super) fn hear(frame: &[u8], vip: Ipv4Addr) -> Option<Heard> {
    let arp: &[u8; FRAME - ETHERNET] = frame.get(ETHERNET..FRAME)?.try_into().ok()?;
    let mac = |at: usize| Mac(std::array::from_fn(|index| arp[at + index]));
    let ip = |at: usize| Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(|index| arp[at + index]));
    let (sender, target) = ((mac(8), ip(14)), (mac(18), ip(24)));
    if arp[..6] != KIND || sender.1 != vip {
        return None;
    }
    match source_number(target.0) {
        Some(number) if arp[6..8] == REPLY => Some(Heard::Answer(number, sender.0)),
        _ => (target.1 == vip).then_some(Heard::Announcement(sender.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
    const RELAY: Mac = Mac([2, 0, 0, 0x77, 0, 2]);

    #[test]
    fn an_answer_says_to_which_probe_and_an_announcement_is_none() {
        let none = Ipv4Addr::UNSPECIFIED;
        let answer = frame(REPLY, source(70), (RELAY, VIP), (source(70), none));
        assert_eq!(hear(&answer, VIP), Some(Heard::Answer(6, RELAY)));
        for operation in [REQUEST, REPLY] {
            let everyone = Mac([0xff; 6]);
            let gratuitous = frame(operation, everyone, (RELAY, VIP), (everyone, VIP));
            assert_eq!(hear(&gratuitous, VIP), Some(Heard::Announcement(RELAY)));
        }
    }

    #[test]
    fn other_traffic_is_nothing() {
        let answer = frame(REPLY, source(1), (RELAY, VIP), (source(1), VIP));
        assert_eq!(hear(&answer, Ipv4Addr::new(10, 77, 0, 101)), None);
        assert_eq!(hear(&question(1, VIP), VIP), None);
        for length in 0..answer.len() {
            assert_eq!(hear(&answer[..length], VIP), None, "{length}");
        }
    }
}
