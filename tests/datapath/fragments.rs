//! Fragments: the later ones go the way of the first, in every mode and direction; what is ahead
//! of its first, too small or a flood is dropped under its name and harms nobody else.

use baton::datapath::skeleton::types::{backend_state, drop_reason, forward_mode};
use pnet_packet::ipv4;

use crate::golden::{LABS, Lab, MODES};
use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, ETHERNET, IPV4, IPV6, Packet, SYN, Transport, carried};
use crate::pieces::{cut, fix};

/// What the end host makes of fragments, in order: one frame. Every header must be alike.
fn join(fragments: &[Vec<u8>]) -> Vec<u8> {
    let ipv4 = fragments[0][12..14] == [8, 0];
    let (l4, id) = if ipv4 {
        (ETHERNET + IPV4, ETHERNET + 4..ETHERNET + 6)
    } else {
        (ETHERNET + IPV6 + 8, ETHERNET + IPV6 + 4..ETHERNET + IPV6 + 8)
    };
    let first = &fragments[0];
    let mut payload = Vec::new();
    for fragment in fragments {
        assert_eq!(fragment[id.clone()], first[id.clone()], "one datagram, one identification");
        let ends = if ipv4 { ETHERNET + 12..ETHERNET + 20 } else { ETHERNET + 8..ETHERNET + 40 };
        assert_eq!(fragment[ends.clone()], first[ends], "one datagram, one way");
        let place = if ipv4 {
            let ip = ipv4::Ipv4Packet::new(&fragment[ETHERNET..]).unwrap();
            assert_eq!(ip.get_checksum(), ipv4::checksum(&ip));
            usize::from(ip.get_fragment_offset()) * 8
        } else {
            let at = ETHERNET + IPV6 + 2;
            usize::from(u16::from_be_bytes([fragment[at], fragment[at + 1]]) & 0xfff8)
        };
        assert_eq!(place, payload.len());
        payload.extend(&fragment[l4..]);
    }
    let mut whole = first[..ETHERNET + if ipv4 { IPV4 } else { IPV6 }].to_vec();
    if ipv4 {
        whole.extend(&payload);
        fix(&mut whole, |ip| {
            ip.set_flags(0);
            ip.set_total_length((IPV4 + payload.len()) as u16);
        });
    } else {
        whole[ETHERNET + 6] = first[ETHERNET + IPV6];
        let length = payload.len() as u16;
        whole[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&length.to_be_bytes());
        whole.extend(&payload);
    }
    whole
}

fn large(packet: Packet) -> Packet {
    let payload = (0..3000_u32).map(|n| (n * 7 + n / 256) as u8).collect();
    Packet { payload, ..packet }
}

/// What comes out of fragments that are all sent on.
fn sent(kernel: &Kernel, fragments: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let out = fragments.iter().map(|fragment| kernel.run(fragment));
    out.map(|(verdict, out)| {
        assert_eq!(verdict, 7, "TC_ACT_REDIRECT");
        out
    })
    .collect()
}

fn kernel(mode: forward_mode, lab: &Lab, protocol: u8) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.service(1, mode, (lab.vip, protocol), lab.nat, &[lab.backend]);
    kernel
}

fn dropped(reason: drop_reason) -> Fate {
    Fate::Dropped(reason)
}

#[test]
fn a_datagram_in_fragments_arrives_as_a_whole_one_does() {
    for (name, mode) in MODES {
        for lab in &LABS {
            let about = format!("{name} {}", lab.name);
            let kernel = kernel(mode, lab, UDP);
            let datagram = large(Packet::udp(lab.client, lab.vip));
            let toward = kernel.sent(&datagram);
            let out = sent(&kernel, &cut(&datagram.bytes(), 0xabcd, 1480));
            // Each in its tunnel.
            let out: Vec<_> = out.into_iter().map(|out| carried(&out).unwrap_or(out)).collect();
            assert_eq!(Packet::read(&join(&out)), toward, "{about}");
            if mode != forward_mode::MODE_NAT && mode != forward_mode::MODE_DNAT {
                continue;
            }
            let answer = large(toward.answer(Transport::Udp));
            let expected = kernel.sent(&answer);
            let out = sent(&kernel, &cut(&answer.bytes(), 0xabcd, 1480));
            assert_eq!(Packet::read(&join(&out)), expected, "{about}");
        }
    }
}

#[test]
fn after_the_first_the_order_is_free_and_copies_do_no_harm() {
    for lab in &LABS {
        let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
        let datagram = large(Packet::udp(lab.client, lab.vip));
        let fragments = cut(&datagram.bytes(), 7, 520);
        assert_eq!(fragments.len(), 6);
        let mut out = vec![Vec::new(); 6];
        for nth in [0, 5, 3, 3, 1, 4, 0, 2] {
            out[nth] = sent(&kernel, &fragments[nth..=nth]).remove(0);
        }
        assert_eq!(Packet::read(&join(&out)), kernel.sent(&datagram));
        assert_eq!(kernel.maps.half_flows.slices(256).unwrap().count(), 1);
    }
}

/// TCP, that sets no DF and crosses a narrow link.
#[test]
fn segments_in_fragments_arrive_too() {
    for lab in &LABS {
        let kernel = kernel(forward_mode::MODE_NAT, lab, TCP);
        let toward = kernel.sent(&Packet::tcp(lab.client, lab.vip, SYN, 1000, 0));
        let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
        kernel.sent(&toward.answer(answer));
        kernel.sent(&Packet::tcp(lab.client, lab.vip, ACK, 1001, 5001));
        let segment = large(Packet::tcp(lab.client, lab.vip, ACK, 1001, 5001));
        let out = sent(&kernel, &cut(&segment.bytes(), 1, 1232));
        assert_eq!(Packet::read(&join(&out)), kernel.sent(&segment));
    }
}

/// The whole conversation goes on as it was planned, whatever happens to the flow meanwhile.
#[test]
fn later_fragments_need_no_flow() {
    for lab in &LABS {
        let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
        let datagram = large(Packet::udp(lab.client, lab.vip));
        let fragments = cut(&datagram.bytes(), 9, 1480);
        let mut out = sent(&kernel, &fragments[..1]);
        let half: Vec<_> = kernel.maps.half_flows.slices(256).unwrap().collect();
        kernel.maps.half_flows.remove(&half[0].0).unwrap();
        out.extend(sent(&kernel, &fragments[1..]));
        Packet::read(&join(&out));
        assert_eq!(kernel.maps.half_flows.slices(256).unwrap().count(), 0, "they began a flow");
    }
}

/// In DSR a client's second packet establishes a UDP flow; a second fragment is no second packet.
#[test]
fn one_datagram_does_not_establish_a_flow() {
    let kernel = kernel(forward_mode::MODE_DSR_L2, &LABS[0], UDP);
    let datagram = large(Packet::udp(LABS[0].client, LABS[0].vip)).bytes();
    sent(&kernel, &cut(&datagram, 3, 1480));
    assert_eq!(kernel.flows().len(), 0);
    sent(&kernel, &cut(&datagram, 4, 1480));
    assert_eq!(kernel.flows().len(), 1);
}

#[test]
fn without_a_first_and_a_daemon_it_is_dropped_if_it_is_for_us() {
    for lab in &LABS {
        for (mode, out_of_order) in [
            (forward_mode::MODE_NAT, dropped(drop_reason::DROP_EARLY_FRAGMENT)),
            // To a client, who is none of our addresses.
            (forward_mode::MODE_DNAT, Fate::Passed),
        ] {
            let kernel = kernel(mode, lab, UDP);
            let datagram = large(Packet::udp(lab.client, lab.vip));
            let fragments = cut(&datagram.bytes(), 1, 1480);
            let early = dropped(drop_reason::DROP_EARLY_FRAGMENT);
            assert_eq!(kernel.fate_of_bytes(&fragments[1]), early, "{}", lab.name);
            let answer = large(kernel.sent(&datagram).answer(Transport::Udp));
            let back = cut(&answer.bytes(), 1, 1480);
            assert_eq!(kernel.fate_of_bytes(&back[2]), out_of_order, "{}", lab.name);
            // Of somebody else, to somebody else.
            let other = cut(&large(Packet::udp(lab.client, lab.backend)).bytes(), 1, 1480);
            assert_eq!(kernel.fate_of_bytes(&other[1]), Fate::Passed, "{}", lab.name);
        }
    }
}

/// Fragments of what goes up the stack go up the stack.
#[test]
fn fragments_of_what_the_stack_serves_are_the_stacks() {
    let kernel = kernel(forward_mode::MODE_NAT, &LABS[0], UDP);
    // A port of the VIP that is no service of the kernel's.
    let fragments = cut(&large(Packet::udp(LABS[0].client, "10.77.0.100:53")).bytes(), 8, 1480);
    for fragment in &fragments {
        assert_eq!(kernel.fate_of_bytes(fragment), Fate::Passed);
    }
    kernel.gate.close();
    let closed = dropped(drop_reason::DROP_GATE_CLOSED);
    for fragment in &fragments {
        assert_eq!(kernel.fate_of_bytes(fragment), closed);
    }
}

#[test]
fn a_closed_gate_holds_fragments_back() {
    for lab in &LABS {
        let kernel = kernel(forward_mode::MODE_DNAT, lab, UDP);
        let datagram = large(Packet::udp(lab.client, lab.vip));
        let answer = large(kernel.sent(&datagram).answer(Transport::Udp));
        let (toward, back) = (cut(&datagram.bytes(), 2, 1480), cut(&answer.bytes(), 2, 1480));
        sent(&kernel, &[toward[0].clone(), back[0].clone()]);
        kernel.gate.close();
        let closed = dropped(drop_reason::DROP_GATE_CLOSED);
        assert_eq!(kernel.fate_of_bytes(&toward[1]), closed);
        assert_eq!(kernel.fate_of_bytes(&back[1]), closed);
    }
}

#[test]
fn what_would_hide_the_header_is_dropped() {
    for lab in &LABS {
        let tiny = dropped(drop_reason::DROP_TINY_FRAGMENT);
        let tcp = kernel(forward_mode::MODE_NAT, lab, TCP);
        let segment = large(Packet::tcp(lab.client, lab.vip, SYN, 1, 0)).bytes();
        // Ports without flags, then flags and ports that come later.
        let fragments = cut(&segment, 1, 8);
        for fragment in &fragments[..3] {
            assert_eq!(tcp.fate_of_bytes(fragment), tiny, "{}", lab.name);
        }
        // Options that the first has not.
        let mut options = segment;
        let doff = if lab.name == "IPv4" { IPV4 } else { IPV6 } + ETHERNET + 12;
        options[doff] = 0x80;
        assert_eq!(tcp.fate_of_bytes(&cut(&options, 1, 24)[0]), tiny, "{}", lab.name);
        assert_eq!(tcp.maps.half_flows.slices(256).unwrap().count(), 0);
        // A first fragment that ends within UDP's header.
        let udp = kernel(forward_mode::MODE_NAT, lab, UDP);
        let mut fragment =
            cut(&large(Packet::udp(lab.client, lab.vip)).bytes(), 1, 8).swap_remove(0);
        fragment.truncate(fragment.len() - 4);
        if lab.name == "IPv4" {
            fix(&mut fragment, |ip| ip.set_total_length(IPV4 as u16 + 4));
        } else {
            fragment[ETHERNET + 5] = 12;
        }
        assert_eq!(udp.fate_of_bytes(&fragment), tiny, "{}", lab.name);
    }
}

/// RFC 6946: a fragment header, and all of the packet with it.
#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    let lab = &LABS[1];
    let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
    let datagram = Packet::udp(lab.client, lab.vip);
    let expected = kernel.sent(&datagram);
    let atomic = cut(&datagram.bytes(), 5, 1480);
    assert_eq!(atomic.len(), 1);
    let out = sent(&kernel, &atomic);
    assert_eq!(Packet::read(&join(&out)), expected);
}

/// Headers behind the fragment header: only the first fragment has them.
#[test]
fn extension_headers_in_the_first_fragment_alone_are_seen_through() {
    let lab = &LABS[1];
    let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
    let datagram = large(Packet::udp(lab.client, lab.vip));
    let mut frame = datagram.bytes();
    frame[ETHERNET + 6] = 60;
    // Destination options: one PadN of 4.
    frame.splice(ETHERNET + IPV6..ETHERNET + IPV6, [UDP, 0, 1, 4, 0, 0, 0, 0]);
    let out = sent(&kernel, &cut(&frame, 5, 1480));
    let mut whole = join(&out);
    whole[ETHERNET + 6] = UDP;
    whole.drain(ETHERNET + IPV6..ETHERNET + IPV6 + 8);
    let length = (whole.len() - ETHERNET - IPV6) as u16;
    whole[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&length.to_be_bytes());
    assert_eq!(Packet::read(&whole), kernel.sent(&datagram));
}

#[test]
fn no_checksum_stays_none() {
    let kernel = kernel(forward_mode::MODE_NAT, &LABS[0], UDP);
    let mut frame = large(Packet::udp(LABS[0].client, LABS[0].vip)).bytes();
    frame[ETHERNET + IPV4 + 6..ETHERNET + IPV4 + 8].fill(0);
    let out = sent(&kernel, &cut(&frame, 6, 1480));
    assert_eq!(join(&out)[ETHERNET + IPV4 + 6..ETHERNET + IPV4 + 8], [0, 0]);
}

#[test]
fn an_identification_that_comes_round_follows_its_own_first() {
    let mut kernel = Kernel::new();
    let lab = &LABS[0];
    kernel.service(1, forward_mode::MODE_NAT, (lab.vip, UDP), lab.nat, &[lab.backend]);
    kernel.service(2, forward_mode::MODE_NAT, ("10.77.0.100:81", UDP), lab.nat, &["10.78.0.99:9"]);
    for (vip, host) in [(lab.vip, 11), ("10.77.0.100:81", 99), (lab.vip, 11)] {
        let fragments = cut(&large(Packet::udp(lab.client, vip)).bytes(), 1, 1480);
        let out = sent(&kernel, &fragments);
        assert_eq!(out[2][ETHERNET + 16..ETHERNET + 20], [10, 78, 0, host]);
    }
}

/// The table of fragments is one of its own.
#[test]
fn a_flood_of_first_fragments_pushes_out_no_flow() {
    let lab = &LABS[0];
    let mut kernel = Kernel::with_room(64, 64);
    kernel.service(1, forward_mode::MODE_NAT, (lab.vip, UDP), lab.nat, &[lab.backend]);
    let whole = Packet::udp(lab.client, lab.vip);
    let toward = kernel.sent(&whole);
    kernel.sent(&toward.answer(Transport::Udp));
    assert_eq!(kernel.flows().len(), 1);
    let flood = large(Packet::udp("10.66.0.1:6666", lab.vip)).bytes();
    let mut first = cut(&flood, 0, 1480).swap_remove(0);
    for id in 0..20_000_u16 {
        fix(&mut first, |ip| ip.set_identification(id));
        assert_eq!(kernel.run(&first).0, 7);
    }
    assert_eq!(kernel.sent(&whole), toward);
    assert_eq!(kernel.flows().len(), 1);
    // And a datagram that comes now finds its place.
    let out = sent(&kernel, &cut(&large(whole).bytes(), 7, 1480));
    Packet::read(&join(&out));
}

#[test]
fn fragments_of_a_drained_backend_still_reach_it() {
    let lab = &LABS[0];
    let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
    let fragments = cut(&large(Packet::udp(lab.client, lab.vip)).bytes(), 7, 1480);
    sent(&kernel, &fragments[..1]);
    kernel.set_state(1, backend_state::BACKEND_DRAINED);
    sent(&kernel, &fragments[1..]);
}
