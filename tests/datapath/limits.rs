//! Limits of services, backends and sources: exact where flows are established, soft before.

use baton::datapath::skeleton::types::{drop_reason, forward_mode};

use crate::kernel::{Fate, Kernel, TCP};
use crate::packet::{ACK, Packet, RST, SYN, Transport};

const VIP: &str = "10.77.0.100:80";

fn kernel(backends: usize) -> Kernel {
    let mut kernel = Kernel::new();
    let addresses = ["10.78.0.11:80", "10.78.0.12:80", "10.78.0.13:80"];
    let mode = forward_mode::MODE_NAT;
    kernel.service(1, mode, (VIP, TCP), "10.78.0.100", &addresses[..backends]);
    kernel
}

fn client(n: u16) -> String {
    format!("10.77.1.{n}:{}", 20000 + n)
}

fn syn(client: &str) -> Packet {
    Packet::tcp(client, VIP, SYN, 1000, 0)
}

fn reset(kernel: &Kernel, client: &str) {
    kernel.sent(&Packet::tcp(client, VIP, RST, 1001, 0));
}

/// SYN and SYN+ACK; what is left is the client's acknowledgement.
fn shake(kernel: &Kernel, client: &str) -> Packet {
    let toward = kernel.sent(&syn(client));
    let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
    kernel.sent(&toward.answer(answer));
    Packet::tcp(client, VIP, ACK, 1001, 5001)
}

#[test]
fn a_service_has_so_many_flows_and_no_more() {
    let kernel = kernel(2);
    kernel.edit_service(1, |service| service.max_flows = 3);
    for n in 0..3 {
        kernel.open(&client(n));
    }
    let full = drop_reason::DROP_SERVICE_FULL;
    assert_eq!(kernel.refused(&syn(&client(3))), full);
    // Those that are there go on, and one that ends makes room for one.
    kernel.sent(&Packet::tcp(&client(1), VIP, ACK, 1001, 5001));
    reset(&kernel, &client(0));
    kernel.open(&client(3));
    assert_eq!(kernel.refused(&syn(&client(4))), full);
}

#[test]
fn a_burst_does_not_get_past_a_limit() {
    let kernel = kernel(1);
    kernel.edit_service(1, |service| service.max_flows = 3);
    let acks: Vec<_> = (0..10).map(|n| shake(&kernel, &client(n))).collect();
    for ack in &acks[..3] {
        kernel.sent(ack);
    }
    for ack in &acks[3..] {
        assert_eq!(kernel.fate(ack), Fate::Dropped(drop_reason::DROP_SERVICE_FULL));
    }
    assert_eq!((kernel.flows().len(), kernel.maps.replies.slices(64).unwrap().count()), (3, 3));
    // It tries again when there is room.
    reset(&kernel, &client(1));
    kernel.sent(&acks[5]);
}

#[test]
fn a_backend_has_so_many_and_the_rest_go_to_others() {
    let kernel = kernel(3);
    for id in 1..=3 {
        kernel.edit_backend(id, |backend| backend.max_flows = 4);
    }
    for n in 0..12 {
        kernel.open(&client(n));
    }
    for id in 1..=3 {
        let flows = kernel.flows().iter().filter(|(_, flow)| flow.backend == id).count();
        assert_eq!(flows, 4);
    }
    assert_eq!(kernel.refused(&syn(&client(12))), drop_reason::DROP_BACKEND_FULL);
}

#[test]
fn a_burst_does_not_overfill_a_backend() {
    let kernel = kernel(1);
    kernel.edit_backend(1, |backend| backend.max_flows = 2);
    let acks: Vec<_> = (0..5).map(|n| shake(&kernel, &client(n))).collect();
    let sent = acks.iter().filter(|ack| matches!(kernel.fate(ack), Fate::Sent(_))).count();
    assert_eq!((sent, kernel.drops(drop_reason::DROP_BACKEND_FULL)), (2, 3));
    // What was refused is in no count: the service is not full of it.
    kernel.edit_backend(1, |backend| backend.max_flows = 0);
    kernel.edit_service(1, |service| service.max_flows = 3);
    kernel.sent(&acks[2]);
    assert_eq!(kernel.fate(&acks[3]), Fate::Dropped(drop_reason::DROP_SERVICE_FULL));
}

#[test]
fn a_source_has_so_many_whatever_its_ports() {
    let kernel = kernel(2);
    kernel.edit_service(1, |service| service.max_per_source = 2);
    let of = |host: u16, port: u16| format!("10.77.1.{host}:{port}");
    let late = shake(&kernel, &of(1, 4002));
    kernel.open(&of(1, 4000));
    kernel.open(&of(1, 4001));
    let full = drop_reason::DROP_SOURCE_FULL;
    assert_eq!(kernel.refused(&syn(&of(1, 4003))), full);
    assert_eq!(kernel.fate(&late), Fate::Dropped(full));
    // Others are not held to it.
    kernel.open(&of(2, 4000));
    reset(&kernel, &of(1, 4000));
    kernel.sent(&late);
    assert_eq!(kernel.refused(&syn(&of(1, 4004))), full);
    // When all have ended, nothing is left of it.
    for (host, port) in [(1, 4001), (1, 4002), (2, 4000)] {
        reset(&kernel, &of(host, port));
    }
    assert_eq!(kernel.maps.sources.slices(64).unwrap().count(), 0);
}

#[test]
fn an_ipv6_source_is_its_64() {
    let mut kernel = Kernel::new();
    let mode = forward_mode::MODE_DSR_L2;
    let vip = "[fd77::100]:80";
    kernel.service(1, mode, (vip, crate::kernel::UDP), "fd78::100", &["[fd78::11]:80"]);
    kernel.edit_service(1, |service| service.max_per_source = 2);
    let packet = |client: &str| Packet::udp(&format!("[{client}]:4000"), vip);
    for client in ["fd79::1", "fd79::2:0:0:1"] {
        kernel.sent(&packet(client));
        kernel.sent(&packet(client));
    }
    let full = drop_reason::DROP_SOURCE_FULL;
    assert_eq!(kernel.refused(&packet("fd79::3")), full);
    kernel.sent(&packet("fd79:0:0:1::1"));
}
