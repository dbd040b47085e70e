//! The XDP hook in a namespace with interfaces, and ways in its maps: what it sends on is, but for
//! the Ethernet header, what the TC hook sends on; what it can't send on goes there marked.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use baton::datapath::skeleton::types;
use baton::datapath::skeleton::types::{drop_reason, forward_mode};
use baton::lab::netns::Netns;
use nix::net::if_::if_nametoindex;

use crate::golden::{LABS, Lab, MODES, conversation};
use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ETHERNET, Packet, SYN};

const DROP: u32 = 1;
const PASS: u32 = 2;
const TX: u32 = 3;
const REDIRECT: u32 = 4;

/// The way to backends, which kernel.rs says of each of them.
const BACK: u32 = 1;

/// What `hand_over` puts in front: its magic, then the interface.
const MARK: usize = 8;

/// A namespace with an interface `front`.
struct Relay(Netns);

impl Relay {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let relay = Self(Netns::create(&format!("bt-xdp{}-{count}", std::process::id())).unwrap());
        relay
            .0
            .ip_batch(
                "link add front type veth peer name peer\nlink set front up\nlink set peer up\n",
            )
            .unwrap();
        relay
    }

    /// Runs it in there, with the index of `front`.
    fn run(&self, test: impl FnOnce(u32) + Send) {
        self.0.enter(|| test(if_nametoindex("front").unwrap())).unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}

fn mac(leg: u8, host: u8) -> [u8; 6] {
    [2, 0, 0, 0, leg, host]
}

impl Kernel {
    fn leg(&self, ifindex: u32, mac: [u8; 6], flags: u8, mtu: u32) {
        let leg = types::leg { mac, flags, mtu, ..Default::default() };
        self.maps.legs.set(&ifindex, &leg).unwrap();
    }

    fn route(&self, ifindex: u32, to: &str, kind: types::way_kind, gateway: &str) {
        let (to, length) = to.split_once('/').unwrap();
        let (to, gateway): (IpAddr, IpAddr) = (to.parse().unwrap(), gateway.parse().unwrap());
        let length = length.parse::<u32>().unwrap() + if to.is_ipv4() { 96 } else { 0 };
        let key = types::way_key { prefix: 32 + length, ifindex, to: to.into() };
        let way = types::way { gateway: gateway.into(), kind: kind.0 };
        self.maps.ways.set(&key, &way).unwrap();
    }

    fn neighbour(&self, ifindex: u32, address: &str, mac: [u8; 6]) {
        let address: IpAddr = address.parse().unwrap();
        let key = types::neighbour_key { address: address.into(), ifindex };
        let neighbour = types::neighbour { mac, ..Default::default() };
        self.maps.neighbours.set(&key, &neighbour).unwrap();
    }

    /// Legs, routes and neighbours: clients behind `front`, backends behind `BACK`.
    fn wired(&self, front: u32) {
        let on_link = types::way_kind::WAY_ON_LINK;
        for (ifindex, network, host) in [(front, 77, 10), (BACK, 78, 11)] {
            self.leg(ifindex, mac(network, 2), types::leg_flag::LEG_REDIRECT.0 as u8, 1500);
            self.route(ifindex, &format!("10.{network}.0.0/24"), on_link, "0.0.0.0");
            self.route(ifindex, &format!("fd{network}::/64"), on_link, "::");
            self.neighbour(ifindex, &format!("10.{network}.0.{host}"), mac(network, host));
            self.neighbour(ifindex, &format!("fd{network}::{host}"), mac(network, host));
        }
    }

    /// Asserts that it goes on to the TC hook unchanged, and marked; nothing is counted.
    fn hands_over(&self, bytes: &[u8], from: u32, about: &str) {
        let (verdict, out) = self.run_xdp(bytes, from);
        assert_eq!(verdict, PASS, "{about}");
        assert_eq!(out.len(), MARK + bytes.len(), "{about}: no mark");
        assert_eq!(out[..4], 0xba70_ba70_u32.to_ne_bytes(), "{about}");
        assert_eq!(out[4..8], from.to_ne_bytes(), "{about}");
        assert_eq!(out[MARK..], *bytes, "{about}");
        assert_eq!(self.packets_in(), 0, "{about}: counted, and not sent");
    }

    /// Packets from clients that were counted for service 1.
    fn packets_in(&self) -> u64 {
        let traffic = self.maps.service_traffic.find_per_cpu(&1).unwrap();
        traffic.iter().map(|of_cpu| of_cpu.packets_in).sum()
    }
}

fn kernel(mode: forward_mode, lab: &Lab, protocol: u8) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.service(1, mode, (lab.vip, protocol), lab.nat, &[lab.backend]);
    kernel
}

fn wired(mode: forward_mode, lab: &Lab, protocol: u8, front: u32) -> Kernel {
    let kernel = kernel(mode, lab, protocol);
    kernel.wired(front);
    kernel
}

#[test]
fn it_does_what_the_tc_hook_does() {
    Relay::new().run(|front| {
        for (mode_name, mode) in MODES {
            for lab in &LABS {
                for protocol in [TCP, UDP] {
                    compare(
                        &format!("{mode_name} {} {protocol}", lab.name),
                        mode,
                        lab,
                        protocol,
                        front,
                    );
                }
            }
        }
    });
}

fn compare(about: &str, mode: forward_mode, lab: &Lab, protocol: u8, front: u32) {
    let (tc, xdp) = (kernel(mode, lab, protocol), wired(mode, lab, protocol, front));
    let mut sent = 0;
    for (what, packet) in conversation(lab, protocol, mode, &tc) {
        let about = format!("{about} {what}");
        let outward = packet.to.to_string() == lab.vip;
        let (from, to, host) = if outward { (front, 78, 11) } else { (BACK, 77, 10) };
        let bytes = packet.bytes();
        // Once more where the conversation has sent it already, to find out more.
        let (_, expected) = tc.run(&bytes);
        let (verdict, out) = xdp.run_xdp(&bytes, from);
        assert_eq!(verdict, REDIRECT, "{about}");
        assert_eq!(out[ETHERNET..], expected[ETHERNET..], "{about}");
        assert_eq!(out[..6], mac(to, host), "{about}");
        assert_eq!(out[6..12], mac(to, 2), "{about}");
        assert_eq!(out[12..14], bytes[12..14], "{about}");
        Packet::read(&out);
        sent += u64::from(outward);
        assert_eq!(xdp.packets_in(), sent, "{about}");
    }
}

/// The packet of a UDP service's client, IPv4.
fn datagram() -> Vec<u8> {
    Packet::udp(LABS[0].client, LABS[0].vip).bytes()
}

#[test]
fn what_it_does_not_know_the_way_of_is_handed_over() {
    Relay::new().run(|front| {
        let about = [
            "no interface",
            "an interface that takes no redirected frames",
            "longer than the interface takes",
            "no route",
            "a route that is the kernel's business",
            "a gateway whose neighbour entry is not there",
            "no neighbour",
        ];
        let redirect = types::leg_flag::LEG_REDIRECT.0 as u8;
        for (case, about) in about.into_iter().enumerate() {
            let kernel = wired(forward_mode::MODE_NAT, &LABS[0], UDP, front);
            let there = types::way_key { prefix: 160, ifindex: BACK, to: backend().into() };
            match case {
                0 => kernel.maps.legs.remove(&BACK).unwrap(),
                1 => kernel.leg(BACK, mac(78, 2), 0, 1500),
                2 => kernel.leg(BACK, mac(78, 2), redirect, 32),
                3 => {
                    let network = types::way_key { prefix: 32 + 96 + 24, ..there };
                    let network = types::way_key { to: ip("10.78.0.0").into(), ..network };
                    kernel.maps.ways.remove(&network).unwrap();
                }
                4 => kernel.route(BACK, "10.78.0.11/32", types::way_kind::WAY_KERNEL, "0.0.0.0"),
                5 => {
                    kernel.route(BACK, "10.78.0.8/29", types::way_kind::WAY_GATEWAY, "10.78.0.1");
                }
                _ => {
                    let key = types::neighbour_key { address: backend().into(), ifindex: BACK };
                    kernel.maps.neighbours.remove(&key).unwrap();
                }
            }
            kernel.hands_over(&datagram(), front, about);
        }
    });
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn backend() -> IpAddr {
    ip("10.78.0.11")
}

#[test]
fn the_longest_prefix_leads_and_a_gateway_gets_the_frame() {
    Relay::new().run(|front| {
        let kernel = wired(forward_mode::MODE_NAT, &LABS[0], UDP, front);
        kernel.route(BACK, "10.78.0.8/29", types::way_kind::WAY_GATEWAY, "10.78.0.1");
        kernel.route(BACK, "0.0.0.0/0", types::way_kind::WAY_GATEWAY, "10.78.0.3");
        kernel.route(front, "10.78.0.11/32", types::way_kind::WAY_GATEWAY, "10.77.0.1");
        kernel.neighbour(BACK, "10.78.0.1", mac(78, 1));
        let (verdict, out) = kernel.run_xdp(&datagram(), front);
        assert_eq!((verdict, &out[..6]), (REDIRECT, &mac(78, 1)[..]));
        let used = |address: &str| {
            let key = types::neighbour_key { address: ip(address).into(), ifindex: BACK };
            kernel.maps.neighbours.find(&key).unwrap().unwrap().used
        };
        assert_ne!(used("10.78.0.1"), 0, "it is in use, and nobody would know");
        assert_eq!(used("10.78.0.11"), 0);
    });
}

#[test]
fn on_one_leg_it_turns_round_even_where_no_frame_can_be_redirected() {
    Relay::new().run(|front| {
        let kernel = kernel(forward_mode::MODE_DSR_L2, &LABS[0], UDP);
        kernel.leg(BACK, mac(78, 2), 0, 1500);
        kernel.neighbour(BACK, "10.78.0.11", mac(78, 11));
        let bytes = Packet::udp("10.78.0.55:4000", LABS[0].vip).bytes();
        let (verdict, out) = kernel.run_xdp(&bytes, BACK);
        assert_eq!((verdict, &out[..6]), (TX, &mac(78, 11)[..]));
        assert_eq!(out[ETHERNET..], bytes[ETHERNET..]);
        kernel.hands_over_nothing_else(&bytes, front);
    });
}

impl Kernel {
    fn hands_over_nothing_else(&self, bytes: &[u8], front: u32) {
        let (verdict, out) = self.run_xdp(bytes, front);
        assert_eq!((verdict, out.len()), (PASS, MARK + bytes.len()), "no redirect to that leg");
    }
}

/// Tags are for the VLAN's own interface, which is behind the TC hook; so is VLAN 0, a priority
/// and no VLAN, whose tag the kernel takes off on the way there.
#[test]
fn tagged_frames_go_up_the_stack_as_they_are() {
    Relay::new().run(|front| {
        let kernel = wired(forward_mode::MODE_NAT, &LABS[0], UDP, front);
        for ethertype in [0x8100_u16, 0x88a8] {
            for tci in [0_u16, 0xe000, 5, 0xe005, 4095] {
                let mut bytes = datagram();
                let tag = [ethertype.to_be_bytes(), tci.to_be_bytes()].concat();
                bytes.splice(12..12, tag.iter().copied());
                assert_eq!(kernel.run_xdp(&bytes, front), (PASS, bytes.clone()));
                bytes.splice(12..12, tag);
                assert_eq!(kernel.run_xdp(&bytes, front), (PASS, bytes));
            }
        }
        assert_eq!(kernel.packets_in(), 0);
    });
}

/// A jumbo frame is in several buffers, of which the first is seen.
#[test]
fn jumbo_frames_are_sent_on_whole() {
    Relay::new().run(|front| {
        for lab in &LABS {
            let kernel = wired(forward_mode::MODE_DNAT, lab, UDP, front);
            let redirect = types::leg_flag::LEG_REDIRECT.0 as u8;
            kernel.leg(BACK, mac(78, 2), redirect, 9000);
            let mut packet = Packet::udp(lab.client, lab.vip);
            packet.payload = (0..8900_u32).map(|n| (n * 7) as u8).collect();
            let bytes = packet.bytes();
            let (verdict, out) = kernel.run_xdp(&bytes, front);
            assert_eq!(verdict, REDIRECT, "{}", lab.name);
            let came = Packet::read(&out);
            assert_eq!((came.to.to_string(), came.payload), (lab.backend.into(), packet.payload));
            assert_eq!(kernel.packets_in(), 1);
        }
    });
}

/// Here the network header can be cut too, which the kernel does not allow of socket buffers.
#[test]
fn whatever_is_cut_off_is_not_sent_on() {
    Relay::new().run(|front| {
        for lab in &LABS {
            let kernel = wired(forward_mode::MODE_NAT, lab, TCP, front);
            let packet = Packet::tcp(lab.client, lab.vip, SYN, 1, 0);
            let bytes = packet.bytes();
            let mut counted = 0;
            for length in ETHERNET..bytes.len() {
                let (verdict, out) = kernel.run_xdp(&bytes[..length], front);
                let reason = match length < bytes.len() - packet.payload.len() {
                    true => drop_reason::DROP_TRUNCATED,
                    false => drop_reason::DROP_BAD_LENGTH,
                };
                assert_eq!(verdict, DROP, "{} cut to {length}", lab.name);
                assert_eq!(out, bytes[..length]);
                counted += 1;
                let all = kernel.drops(drop_reason::DROP_TRUNCATED)
                    + kernel.drops(drop_reason::DROP_BAD_LENGTH);
                assert_eq!((kernel.drops(reason) > 0, all), (true, counted));
            }
        }
    });
}

/// Traffic of the TC hook is counted where it is sent, not where it was decided on.
#[test]
fn what_tc_can_not_send_is_no_traffic() {
    let kernel = kernel(forward_mode::MODE_NAT, &LABS[0], UDP);
    let mut backend = kernel.maps.backend_table.find(&1).unwrap().unwrap();
    backend.ifindex = 0;
    kernel.maps.backend_table.set(&1, &backend).unwrap();
    let packet = Packet::udp(LABS[0].client, LABS[0].vip);
    assert_eq!(kernel.fate(&packet), Fate::Dropped(types::drop_reason::DROP_NO_ROUTE));
    assert_eq!(kernel.packets_in(), 0);
}

/// RFC 768: a checksum that comes out as 0 is sent as 0xffff, since 0 says that there is none. Both
/// hooks are brought to it by two bytes of payload.
#[test]
fn a_udp_checksum_of_nought_is_written_as_ones() {
    Relay::new().run(|front| {
        for lab in &LABS {
            let kernel = wired(forward_mode::MODE_NAT, lab, UDP, front);
            let plain = Packet { payload: vec![0; 4], ..Packet::udp(lab.client, lab.vip) };
            let at = plain.transport_at() + 6;
            let (_, out) = kernel.run(&plain.bytes());
            // What the checksum is more than nought, the payload takes over.
            let payload = [&out[at..at + 2], &[0, 0]].concat();
            let bytes = Packet { payload, ..plain }.bytes();
            for out in [kernel.run(&bytes).1, kernel.run_xdp(&bytes, front).1] {
                assert_eq!(out[at..at + 2], [0xff, 0xff], "{}", lab.name);
                Packet::read(&out);
            }
        }
    });
}
