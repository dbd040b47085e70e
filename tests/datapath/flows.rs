//! The life of flows: how they begin, when they are established, what floods and full tables do.

use std::collections::HashSet;

use baton::datapath::skeleton::types::{backend_state, drop_reason, forward_mode};

use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, Packet, RST, SYN, Transport};

const CLIENT: &str = "10.77.0.10:40000";
const VIP: &str = "10.77.0.100:80";
const NAT: &str = "10.78.0.100";
const BACKENDS: [&str; 2] = ["10.78.0.11:8080", "10.78.0.12:8080"];

fn web(flows: u32, half_open: u32) -> Kernel {
    let mut kernel = Kernel::with_room(flows, half_open);
    kernel.service(1, forward_mode::MODE_NAT, (VIP, TCP), NAT, &BACKENDS);
    kernel
}

fn dropped(reason: drop_reason) -> Fate {
    Fate::Dropped(reason)
}

/// SYN, SYN+ACK; then the client's ACK, which is for the caller to send. With what the backend saw.
fn shake(kernel: &Kernel, client: &str) -> (Packet, Packet) {
    let toward = kernel.sent(&Packet::tcp(client, VIP, SYN, 1000, 0));
    let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
    kernel.sent(&toward.answer(answer));
    (toward, Packet::tcp(client, VIP, ACK, 1001, 5001))
}

fn establish(kernel: &Kernel, client: &str) -> Packet {
    let (toward, ack) = shake(kernel, client);
    kernel.sent(&ack);
    toward
}

#[test]
fn a_handshake_establishes_a_flow() {
    let kernel = web(64, 64);
    let (_, ack) = shake(&kernel, CLIENT);
    assert_eq!(kernel.flows().len(), 0);
    kernel.sent(&ack);
    assert_eq!(kernel.flows().len(), 1);
}

/// What is sent there would be taken for the service's, and never reach the client.
#[test]
fn no_nat_port_is_taken_where_a_service_listens() {
    let first = establish(&web(64, 64), CLIENT).from;
    let mut kernel = web(64, 64);
    kernel.service(2, forward_mode::MODE_NAT, (&first.to_string(), TCP), NAT, &BACKENDS);
    let toward = establish(&kernel, CLIENT);
    assert_eq!(toward.from.ip(), first.ip());
    assert_ne!(toward.from.port(), first.port());
    let data = Transport::Tcp { flags: ACK, sequence: 5001, acknowledgement: 1001 };
    assert_eq!(kernel.sent(&toward.answer(data)).to.to_string(), CLIENT);
}

#[test]
fn an_ack_that_confirms_nothing_establishes_nothing() {
    let kernel = web(64, 64);
    let toward = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    let early = Packet::tcp(CLIENT, VIP, ACK, 1001, 1);
    assert_eq!(kernel.fate(&early), dropped(drop_reason::DROP_HANDSHAKE));
    let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
    kernel.sent(&toward.answer(answer));
    for wrong in [0, 5000, 4999, 0x8000_0000] {
        let ack = Packet::tcp(CLIENT, VIP, ACK, 1001, wrong);
        assert_eq!(kernel.fate(&ack), dropped(drop_reason::DROP_HANDSHAKE), "{wrong}");
    }
    assert_eq!(kernel.flows().len(), 0);
    kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    assert_eq!(kernel.flows().len(), 1);
}

#[test]
fn packets_of_no_flow_are_dropped_not_answered() {
    let kernel = web(64, 64);
    for flags in [ACK, RST, SYN | ACK, SYN | RST] {
        let stray = Packet::tcp(CLIENT, VIP, flags, 1, 1);
        assert_eq!(kernel.fate(&stray), dropped(drop_reason::DROP_NO_FLOW), "{flags:#x}");
    }
    let stray = Packet::tcp(BACKENDS[0], "10.78.0.100:33333", ACK, 1, 1);
    assert_eq!(kernel.fate(&stray), dropped(drop_reason::DROP_REPLY_NO_FLOW));
    // To an address of the node itself: its own connection to the backend.
    let own = Packet::tcp(BACKENDS[0], "10.78.0.2:33333", ACK, 1, 1);
    assert_eq!(kernel.fate(&own), Fate::Passed);
    // From somebody else's port: for whoever listens on that address.
    let other = Packet::tcp("10.78.0.11:22", "10.78.0.100:33333", ACK, 1, 1);
    assert_eq!(kernel.fate(&other), Fate::Passed);
}

#[test]
fn a_syn_flood_does_not_touch_established_flows() {
    let kernel = web(64, 64);
    let toward = establish(&kernel, CLIENT);
    for n in 0..5000_u32 {
        let client = format!("10.79.{}.{}:{}", n >> 8 & 0xff, n & 0xff, 1024 + n);
        kernel.sent(&Packet::tcp(&client, VIP, SYN, n, 0));
    }
    assert_eq!(kernel.flows().len(), 1);
    kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    let answer = Transport::Tcp { flags: ACK, sequence: 5001, acknowledgement: 1001 };
    kernel.sent(&toward.answer(answer));
    // And a handshake in the middle of it comes to its end.
    establish(&kernel, "10.77.0.11:50000");
}

#[test]
fn a_full_table_keeps_what_it_has() {
    let kernel = web(16, 256);
    let mut clients = (0..).map(|n: u32| format!("10.77.0.10:{}", 20000 + n));
    for client in clients.by_ref().take(16) {
        establish(&kernel, &client);
    }
    let late = clients.next().unwrap();
    let (_, ack) = shake(&kernel, &late);
    assert_eq!(kernel.fate(&ack), dropped(drop_reason::DROP_TABLE_FULL));
    assert_eq!(kernel.flows().len(), 16);
    // Room again: its next try succeeds.
    let (gone, _) = kernel.flows()[0];
    kernel.maps.flows.remove(&gone).unwrap();
    let (reply, _) = kernel
        .maps
        .replies
        .slices(256)
        .unwrap()
        .find(|(_, reply)| reply.port == gone.port)
        .unwrap();
    kernel.maps.replies.remove(&reply).unwrap();
    kernel.sent(&ack);
    assert_eq!(kernel.flows().len(), 16);
}

#[test]
fn no_port_is_used_twice_for_a_server() {
    let mut kernel = Kernel::with_room(4096, 4096);
    // Two services with the same server: their ports must not meet either.
    kernel.service(1, forward_mode::MODE_NAT, (VIP, UDP), NAT, &BACKENDS[..1]);
    kernel.service(2, forward_mode::MODE_NAT, ("10.77.0.100:81", UDP), NAT, &BACKENDS[..1]);
    // Same hash, same client: both services try the same port first.
    let mut ports = HashSet::new();
    let mut flows = Vec::new();
    for n in 0..1000 {
        for vip in [VIP, "10.77.0.100:81"] {
            let client = format!("10.79.{}.{}:4000", n >> 8, n & 0xff);
            let toward = kernel.sent(&Packet::udp(&client, vip));
            assert!(toward.from.port() >= 1024);
            assert!(ports.insert(toward.from.port()), "{} twice", toward.from);
            flows.push((client, vip, toward));
        }
    }
    // Each answer finds its way to that client and no other, half-open and established.
    for _ in 0..2 {
        for (client, vip, toward) in &flows {
            let back = kernel.sent(&toward.answer(Transport::Udp));
            assert_eq!((&back.to.to_string(), &*back.from.to_string()), (client, *vip));
        }
    }
    // Ports of established flows are taken too.
    for n in 0..1000 {
        let client = format!("10.80.{}.{}:4000", n >> 8, n & 0xff);
        let toward = kernel.sent(&Packet::udp(&client, VIP));
        assert!(ports.insert(toward.from.port()), "{} twice", toward.from);
    }
}

#[test]
fn when_all_ports_are_taken_it_is_said() {
    let mut kernel = Kernel::with_room(1 << 17, 256);
    kernel.service(1, forward_mode::MODE_NAT, (VIP, UDP), NAT, &BACKENDS[..1]);
    let toward = kernel.sent(&Packet::udp(CLIENT, VIP));
    kernel.sent(&toward.answer(Transport::Udp));
    let (mut key, reply) = kernel.maps.replies.slices(256).unwrap().next().unwrap();
    for port in 1024..=65535_u16 {
        key.port = port.to_be();
        kernel.maps.replies.set(&key, &reply).unwrap();
    }
    let late = Packet::udp("10.77.0.11:40000", VIP);
    assert_eq!(kernel.fate(&late), dropped(drop_reason::DROP_PORTS_EXHAUSTED));
    // One that is free again is found if it is among those that are tried.
    let free = (1024..=65535_u16).step_by(97);
    for port in free {
        key.port = port.to_be();
        kernel.maps.replies.remove(&key).unwrap();
    }
    assert_eq!(kernel.sent(&late).from.port() % 97, 1024 % 97);
}

#[test]
fn a_flow_keeps_its_backend_and_a_closed_one_makes_room() {
    let kernel = web(64, 64);
    let toward = establish(&kernel, CLIENT);
    let again = kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    assert_eq!((again.to, again.from), (toward.to, toward.from));
    // A SYN on a flow that lives is passed on to the backend, which knows what to make of it.
    let syn = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 9000, 0));
    assert_eq!(syn.from, toward.from);
    assert_eq!(kernel.flows().len(), 1);
    // After a reset the same client begins anew.
    kernel.sent(&Packet::tcp(CLIENT, VIP, RST, 1001, 0));
    kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 9000, 0));
    assert_eq!(kernel.flows().len(), 0);
    establish(&kernel, CLIENT);
    assert_eq!(kernel.flows()[0].1.flags, 0);
}

#[test]
fn udp_is_established_by_the_answer() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_NAT, (VIP, UDP), NAT, &BACKENDS);
    let datagram = Packet::udp(CLIENT, VIP);
    let toward = kernel.sent(&datagram);
    assert_eq!(kernel.sent(&datagram), toward);
    assert_eq!(kernel.flows().len(), 0);
    kernel.sent(&toward.answer(Transport::Udp));
    assert_eq!(kernel.flows().len(), 1);
    assert_eq!(kernel.sent(&datagram), toward);
}

#[test]
fn a_drained_backend_keeps_its_flows_and_gets_no_new_ones() {
    let mut kernel = Kernel::with_room(1024, 256);
    let ids = kernel.service(1, forward_mode::MODE_NAT, (VIP, TCP), NAT, &BACKENDS);
    let toward = establish(&kernel, CLIENT);
    let on = BACKENDS.iter().position(|address| *address == toward.to.to_string()).unwrap();
    kernel.set_state(ids[on], backend_state::BACKEND_DRAINED);
    assert_eq!(kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001)).to, toward.to);
    for port in 50000..50050 {
        let syn = Packet::tcp(&format!("10.77.0.10:{port}"), VIP, SYN, 1, 0);
        match kernel.fate(&syn) {
            Fate::Sent(sent) => assert_ne!(sent.to, toward.to),
            // The schedule still has it: a few slots are tried, and the next change of the
            // schedule, which is already on its way, ends this.
            Fate::Answered(reason, _) => assert_eq!(reason, drop_reason::DROP_NO_BACKEND),
            other => panic!("{other:?}"),
        }
    }
    kernel.set_state(ids[on], backend_state::BACKEND_DOWN);
    let packet = Packet::tcp(CLIENT, VIP, ACK, 1001, 5001);
    assert!(matches!(kernel.fate(&packet), Fate::Answered(drop_reason::DROP_BACKEND_DOWN, _)));
}

#[test]
fn a_service_without_backends_refuses() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_NAT, (VIP, TCP), NAT, &[]);
    let syn = Packet::tcp(CLIENT, VIP, SYN, 1, 0);
    assert_eq!(kernel.refused(&syn), drop_reason::DROP_NO_BACKEND);
}

#[test]
fn two_flows_that_replies_could_not_be_told_apart_of_do_not_meet() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_DNAT, (VIP, UDP), NAT, &BACKENDS[..1]);
    kernel.service(2, forward_mode::MODE_DNAT, ("10.77.0.100:81", UDP), NAT, &BACKENDS[..1]);
    let toward = kernel.sent(&Packet::udp(CLIENT, VIP));
    assert_eq!(toward.from.to_string(), CLIENT);
    kernel.sent(&toward.answer(Transport::Udp));
    let clash = Packet::udp(CLIENT, "10.77.0.100:81");
    assert_eq!(kernel.fate(&clash), dropped(drop_reason::DROP_PORTS_EXHAUSTED));
}

/// What was found a moment ago is kept (recent.h), but for no longer than it is so.
#[test]
fn what_is_taken_away_is_gone_with_the_next_packet() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_NAT, (VIP, UDP), NAT, &BACKENDS[..1]);
    let packet = Packet::udp(CLIENT, VIP);
    let answer = kernel.sent(&packet).answer(Transport::Udp);
    kernel.sent(&answer);
    let keys: Vec<_> = kernel.maps.servers.slices(256).unwrap().map(|(key, _)| key).collect();
    keys.iter().for_each(|key| kernel.maps.servers.remove(key).unwrap());
    assert_eq!(kernel.fate(&answer), Fate::Passed);
    let keys: Vec<_> = kernel.maps.services.slices(256).unwrap().map(|(key, _)| key).collect();
    keys.iter().for_each(|key| kernel.maps.services.remove(key).unwrap());
    assert_eq!(kernel.fate(&packet), Fate::Passed);
}
