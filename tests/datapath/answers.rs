//! What is answered, with which bytes, and what never is.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use baton::datapath::skeleton::types::{drop_reason, forward_mode};
use baton::lab::netns::Netns;

use crate::golden::{LABS, Lab, MODES};
use crate::icmp::Message;
use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, ETHERNET, Packet, SYN, Transport};

const TX: u32 = 3;

/// A namespace of a test, whose loopback is the way out of every service there.
struct Link(Netns);

impl Link {
    fn with_mtu(mtu: u32) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let link = Self(Netns::create(&format!("bt-mtu{}-{count}", std::process::id())).unwrap());
        link.0.ip_batch(&format!("link set lo mtu {mtu} up\n")).unwrap();
        link
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}

fn kernel(mode: forward_mode, lab: &Lab, protocol: u8) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.service(1, mode, (lab.vip, protocol), lab.nat, &[lab.backend]);
    kernel
}

fn first(lab: &Lab, protocol: u8) -> Packet {
    match protocol {
        TCP => Packet::tcp(lab.client, lab.vip, SYN, 1000, 0),
        _ => Packet::udp(lab.client, lab.vip),
    }
}

/// The answer to a packet, which both hooks give alike: back to whence it came.
fn answer(kernel: &Kernel, bytes: &[u8], reason: drop_reason) -> Vec<u8> {
    let answer = match kernel.fate_of_bytes(bytes) {
        Fate::Answered(counted, answer) => {
            assert_eq!(counted, reason);
            answer
        }
        Fate::Sent(_) => panic!("sent on"),
        other => panic!("{other:?}"),
    };
    assert_eq!((&answer[..6], &answer[6..12]), (&bytes[6..12], &bytes[..6]), "turned round");
    answer
}

/// The same of an ICMP answer, which says what it should and quotes what it can.
fn told(kernel: &Kernel, bytes: &[u8], reason: drop_reason, says: [(u8, u8); 2]) -> Message {
    let answer = answer(kernel, bytes, reason);
    let message = Message::read(&answer);
    let most = if message.from.is_ipv4() { 576 } else { 1280 };
    assert!(answer.len() - ETHERNET <= most, "{} bytes", answer.len());
    let quotable = most - (answer.len() - ETHERNET - message.quote.len());
    let whole = &bytes[ETHERNET..];
    assert_eq!(message.quote, whole[..whole.len().min(quotable)]);
    assert_eq!(message.says, says[usize::from(message.from.is_ipv6())]);
    assert_eq!(message.ttl, 64);
    message
}

#[test]
fn the_end_of_the_ttl_is_told() {
    for (mode_name, mode) in MODES {
        for lab in &LABS {
            for protocol in [TCP, UDP] {
                let kernel = kernel(mode, lab, protocol);
                for length in [0, 1, 2, 3, 5, 64, 400, 600, 1300, 1400] {
                    let payload = (0..length).map(|n: u32| n as u8).collect();
                    let packet = Packet { ttl: 1, payload, ..first(lab, protocol) };
                    let says = [(11, 0), (3, 0)];
                    let bytes = packet.bytes();
                    let message = told(&kernel, &bytes, drop_reason::DROP_TTL, says);
                    assert_eq!(message.from, packet.to.ip(), "{mode_name}");
                    assert_eq!(message.to, packet.from.ip());
                    assert_eq!(message.rest, 0);
                }
                assert_eq!(kernel.maps.half_flows.slices(256).unwrap().count(), 0);
            }
        }
    }
}

#[test]
fn both_hooks_answer_alike() {
    for lab in &LABS {
        for protocol in [TCP, UDP] {
            let kernel = kernel(forward_mode::MODE_NAT, lab, protocol);
            for length in [0, 7, 1400] {
                let payload = vec![7; length];
                let bytes = Packet { ttl: 1, payload, ..first(lab, protocol) }.bytes();
                let tc = answer(&kernel, &bytes, drop_reason::DROP_TTL);
                assert_eq!(kernel.run_xdp(&bytes, 1), (TX, tc), "{} {protocol}", lab.name);
            }
        }
    }
}

/// In both directions, and the packet is quoted as its sender knows it.
#[test]
fn what_is_too_long_for_the_way_out_is_told() {
    let link = Link::with_mtu(1300);
    link.0.enter(too_long).unwrap();
}

fn too_long() {
    // What goes in a tunnel is in encap.rs.
    let direct = MODES.into_iter().filter(|(_, mode)| *mode != forward_mode::MODE_DSR_IPIP);
    for (mode_name, mode) in direct {
        for lab in &LABS {
            for protocol in [TCP, UDP] {
                let kernel = kernel(mode, lab, protocol);
                let toward = kernel.sent(&first(lab, protocol));
                let header = first(lab, protocol).bytes().len() - ETHERNET - 5;
                let mut senders = vec![(first(lab, protocol), lab.vip)];
                if [forward_mode::MODE_NAT, forward_mode::MODE_DNAT].contains(&mode) {
                    let transport = match protocol {
                        TCP => Transport::Tcp { flags: ACK, sequence: 1, acknowledgement: 1001 },
                        _ => Transport::Udp,
                    };
                    senders.push((toward.answer(transport), lab.nat));
                }
                for (packet, from) in senders {
                    let about = format!("{mode_name} {} {}", lab.name, packet.from);
                    let fits = Packet { payload: vec![1; 1300 - header], ..packet.clone() };
                    kernel.sent(&fits);
                    let long = Packet { payload: vec![1; 1301 - header], ..packet.clone() };
                    let says = [(3, 4), (2, 0)];
                    let message = told(&kernel, &long.bytes(), drop_reason::DROP_TOO_BIG, says);
                    assert_eq!(message.rest, 1300, "{about}");
                    assert_eq!(message.to, packet.from.ip(), "{about}");
                    // Whoever was spoken to, if that is one of ours; else the VIP.
                    let ours = match mode {
                        forward_mode::MODE_DNAT => lab.vip,
                        _ => from,
                    };
                    let ours = ours.strip_suffix(":80").unwrap_or(ours);
                    let ours = ours.trim_matches(['[', ']']);
                    assert_eq!(message.from.to_string(), ours, "{about}");
                }
            }
        }
    }
}

#[test]
fn nobody_is_answered_who_may_not_be() {
    for lab in &LABS {
        let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
        let bytes = Packet { ttl: 1, ..first(lab, UDP) }.bytes();
        told(&kernel, &bytes, drop_reason::DROP_TTL, [(11, 0), (3, 0)]);
        // To all of the link, or from there.
        for at in [0, 6] {
            let mut bytes = bytes.clone();
            bytes[at..at + 6].copy_from_slice(&[0xff; 6]);
            assert_eq!(kernel.fate_of_bytes(&bytes), Fate::Dropped(drop_reason::DROP_TTL));
        }
    }
}

#[test]
fn answers_are_limited_and_what_is_beyond_is_counted() {
    let lab = &LABS[0];
    let kernel = kernel(forward_mode::MODE_NAT, lab, UDP);
    let bytes = Packet { ttl: 1, ..first(lab, UDP) }.bytes();
    let begin = Instant::now();
    let (mut answered, mut limited) = (0, 0);
    for _ in 0..5000 {
        match kernel.fate_of_bytes(&bytes) {
            Fate::Answered(..) => answered += 1,
            Fate::Dropped(reason) => {
                assert_eq!(reason, drop_reason::DROP_ANSWER_LIMITED);
                limited += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let cpus = std::thread::available_parallelism().unwrap().get();
    let seconds = begin.elapsed().as_secs_f64();
    let most = cpus as f64 * (251.0 + 1000.0 * seconds);
    assert!(f64::from(answered) <= most, "{answered} in {seconds} s");
    assert!(answered >= 250, "{answered}");
    // On a machine so slow that all may be answered, nothing shows.
    assert!(limited > 0 || most >= 5000.0, "{answered} in {seconds} s");
}
