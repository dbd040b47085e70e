//! The XDP hook in a namespace with routes and neighbours: what it sends on is, but for the
//! Ethernet header, what the TC hook sends on.

use std::sync::atomic::{AtomicU32, Ordering};

use baton::datapath::skeleton::types::forward_mode;
use baton::lab::netns::Netns;
use nix::net::if_::if_nametoindex;

use crate::golden::{LABS, Lab, MODES, conversation};
use crate::kernel::{Kernel, TCP, UDP};
use crate::packet::{ETHERNET, Packet, SYN};

const DROP: u32 = 1;
const PASS: u32 = 2;
const TX: u32 = 3;
const REDIRECT: u32 = 4;

/// A relay with a leg on either side, whose neighbours are known.
struct Relay(Netns);

impl Relay {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let relay = Self(Netns::create(&format!("bt-xdp{}-{count}", std::process::id())).unwrap());
        let netns = &relay.0;
        for (side, network, host) in [("front", 77, "10"), ("back", 78, "11")] {
            netns
                .ip_batch(&format!(
                    "link add {side} address 02:00:00:00:{network}:02 type veth peer name {side}-peer\n\
                     link set {side} up\nlink set {side}-peer up\n\
                     addr add 10.{network}.0.2/24 dev {side}\n\
                     addr add fd{network}::2/64 dev {side} nodad\n\
                     neigh add 10.{network}.0.{host} lladdr 02:00:00:00:{network}:{host} dev {side}\n\
                     neigh add fd{network}::{host} lladdr 02:00:00:00:{network}:{host} dev {side}\n"
                ))
                .unwrap();
        }
        netns
            .sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])
            .unwrap();
        relay
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}

fn kernel(mode: forward_mode, lab: &Lab, protocol: u8) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.service(1, mode, (lab.vip, protocol), lab.nat, &[lab.backend]);
    kernel
}

#[test]
fn it_does_what_the_tc_hook_does() {
    let relay = Relay::new();
    relay.0.enter(compare).unwrap();
}

fn compare() {
    let (front, back) = (if_nametoindex("front").unwrap(), if_nametoindex("back").unwrap());
    for (mode_name, mode) in MODES {
        for lab in &LABS {
            for protocol in [TCP, UDP] {
                let (tc, xdp) = (kernel(mode, lab, protocol), kernel(mode, lab, protocol));
                for (what, packet) in conversation(lab, protocol, mode, &tc) {
                    let about = format!("{mode_name} {} {protocol} {what}", lab.name);
                    let outward = packet.to.to_string() == lab.vip;
                    let (from, to) = if outward { (front, 0x78) } else { (back, 0x77) };
                    let bytes = packet.bytes();
                    // Once more where the conversation has sent it already, to find out more.
                    let (_, expected) = tc.run(&bytes);
                    let (verdict, out) = xdp.run_xdp(&bytes, from);
                    assert_eq!(verdict, REDIRECT, "{about}");
                    assert_eq!(out[ETHERNET..], expected[ETHERNET..], "{about}");
                    let host = if outward { 0x11 } else { 0x10 };
                    assert_eq!(out[..6], [2, 0, 0, 0, to, host], "{about}");
                    assert_eq!(out[6..12], [2, 0, 0, 0, to, 2], "{about}");
                    assert_eq!(out[12..14], bytes[12..14], "{about}");
                    Packet::read(&out);
                }
            }
        }
    }
}

#[test]
fn what_has_no_known_neighbour_goes_on_unchanged() {
    let relay = Relay::new();
    relay.0.ip("neigh flush dev back").unwrap();
    relay.0.ip("neigh del 10.78.0.11 dev back").unwrap();
    let send = || {
        let front = if_nametoindex("front").unwrap();
        let kernel = kernel(forward_mode::MODE_NAT, &LABS[0], UDP);
        let bytes = Packet::udp(LABS[0].client, LABS[0].vip).bytes();
        assert_eq!(kernel.run_xdp(&bytes, front), (PASS, bytes));
    };
    relay.0.enter(send).unwrap();
}

#[test]
fn on_one_leg_it_turns_round() {
    let relay = Relay::new();
    let send = || {
        let back = if_nametoindex("back").unwrap();
        let kernel = kernel(forward_mode::MODE_DSR_L2, &LABS[0], UDP);
        let bytes = Packet::udp("10.78.0.55:4000", LABS[0].vip).bytes();
        assert_eq!(kernel.run_xdp(&bytes, back).0, TX);
    };
    relay.0.enter(send).unwrap();
}

/// Here the network header can be cut too, which the kernel does not allow of socket buffers.
#[test]
fn whatever_is_cut_off_is_not_sent_on() {
    let relay = Relay::new();
    let send = || {
        let front = if_nametoindex("front").unwrap();
        for lab in &LABS {
            let kernel = kernel(forward_mode::MODE_NAT, lab, TCP);
            let packet = Packet::tcp(lab.client, lab.vip, SYN, 1, 0);
            let bytes = packet.bytes();
            for length in ETHERNET..bytes.len() {
                let (verdict, out) = kernel.run_xdp(&bytes[..length], front);
                let expected = if length < packet.transport_at() { PASS } else { DROP };
                assert_eq!(verdict, expected, "{} cut to {length}", lab.name);
                assert_eq!(out, bytes[..length]);
            }
        }
    };
    relay.0.enter(send).unwrap();
}
