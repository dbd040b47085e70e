//! The collector: what it removes, and what it leaves.

use baton::datapath::skeleton::types::{self, backend_state, forward_mode};

use crate::kernel::{Kernel, TCP};
use crate::packet::{ACK, FIN, Packet, RST, SYN, Transport};

const CLIENT: &str = "10.77.0.10:40000";
const VIP: &str = "10.77.0.100:80";

/// A kernel with one established flow; its backend, and the packet that the backend got.
fn with_a_flow() -> (Kernel, u16, Packet) {
    let mut kernel = Kernel::new();
    let mode = forward_mode::MODE_NAT;
    let ids = kernel.service(1, mode, (VIP, TCP), "10.78.0.100", &["10.78.0.11:8080"]);
    let toward = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
    kernel.sent(&toward.answer(answer));
    kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    (kernel, ids[0], toward)
}

impl Kernel {
    /// Moves the last packets of the flow's two directions that many jiffies into the past.
    fn age(&self, flow_age: u32, reply_age: u32) {
        let now = self.jiffies() as u32;
        let (key, mut flow) = self.flows()[0];
        flow.seen = now.wrapping_sub(flow_age);
        self.maps.flows.set(&key, &flow).unwrap();
        let (key, mut reply) = self.maps.replies.slices(256).unwrap().next().unwrap();
        reply.seen = now.wrapping_sub(reply_age);
        self.maps.replies.set(&key, &reply).unwrap();
    }

    /// Has the collector look at the flow; whether it is there still, in both directions.
    fn survives(&self) -> bool {
        self.survives_hurry(0)
    }

    /// The same while the table is getting full.
    fn survives_hurry(&self, closed_timeout: u32) -> bool {
        let mut sweep = types::sweep { count: 1, closed_timeout, ..Default::default() };
        sweep.keys[0] = self.flows()[0].0;
        self.maps.sweep.set(&0, &sweep).unwrap();
        self.collect();
        let flows = self.flows().len();
        assert_eq!(self.maps.replies.slices(256).unwrap().count(), flows, "half a flow");
        let removed = self.maps.sweep.find(&0).unwrap().unwrap().removed;
        assert_eq!(removed as usize, 1 - flows);
        flows == 1
    }
}

// The services of these tests: idle 1000 jiffies, half closed 500, closed 100.

#[test]
fn an_idle_flow_is_removed_in_both_directions() {
    let (kernel, ..) = with_a_flow();
    kernel.age(900, 900);
    assert!(kernel.survives());
    kernel.age(2000, 2000);
    assert!(!kernel.survives());
}

#[test]
fn either_direction_keeps_a_flow() {
    let (kernel, ..) = with_a_flow();
    kernel.age(2000, 0);
    assert!(kernel.survives());
    kernel.age(0, 2000);
    assert!(kernel.survives());
}

#[test]
fn a_clock_that_is_behind_removes_nothing() {
    let (kernel, ..) = with_a_flow();
    kernel.age(0_u32.wrapping_sub(5000), 0_u32.wrapping_sub(5000));
    assert!(kernel.survives());
}

#[test]
fn what_is_closed_goes_sooner() {
    let (kernel, _, toward) = with_a_flow();
    kernel.sent(&Packet::tcp(CLIENT, VIP, FIN | ACK, 1001, 5001));
    kernel.age(400, 400);
    assert!(kernel.survives(), "closed in one direction");
    kernel.age(600, 600);
    let half_closed = kernel.flows()[0];
    assert!(!kernel.survives(), "closed in one direction, and idle");

    let (kernel, ..) = with_a_flow();
    kernel.sent(&Packet::tcp(CLIENT, VIP, FIN | ACK, 1001, 5001));
    let fin = Transport::Tcp { flags: FIN | ACK, sequence: 5001, acknowledgement: 1002 };
    kernel.sent(&toward.answer(fin));
    kernel.age(50, 50);
    assert!(kernel.survives(), "closed");
    kernel.age(150, 150);
    assert!(!kernel.survives(), "closed, and the rest of it has come");
    assert_eq!(half_closed.1.flags, types::flow_flag::FLOW_FIN.0 as u8);

    let (kernel, ..) = with_a_flow();
    kernel.sent(&Packet::tcp(CLIENT, VIP, RST, 1001, 0));
    kernel.age(150, 150);
    assert!(!kernel.survives(), "reset");
}

#[test]
fn a_flow_that_was_ended_is_closed() {
    let (kernel, backend, _) = with_a_flow();
    kernel.set_state(backend, backend_state::BACKEND_DRAINED);
    kernel.age(900, 900);
    assert!(kernel.survives());
    kernel.set_state(backend, backend_state::BACKEND_GONE);
    let mut sweep = types::sweep { count: 1, ..Default::default() };
    sweep.keys[0] = kernel.flows()[0].0;
    kernel.maps.sweep.set(&0, &sweep).unwrap();
    kernel.collect();
    kernel.age(50, 50);
    assert!(kernel.survives(), "for whoever has not heard of it yet");
    kernel.age(150, 150);
    assert!(!kernel.survives());
}

#[test]
fn a_doubted_reset_shortens_the_wait() {
    let (kernel, _, toward) = with_a_flow();
    // The backend has not acknowledged these bytes.
    kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1006, 5001));
    kernel.sent(&Packet { payload: vec![], ..Packet::tcp(CLIENT, VIP, RST, 1011, 0) });
    kernel.age(400, 400);
    assert!(kernel.survives());
    kernel.age(600, 600);
    let challenge = Transport::Tcp { flags: ACK, sequence: 5001, acknowledgement: 1001 };
    kernel.sent(&toward.answer(challenge));
    kernel.age(600, 600);
    assert!(kernel.survives(), "the backend has spoken");
    kernel.sent(&Packet { payload: vec![], ..Packet::tcp(CLIENT, VIP, RST, 1011, 0) });
    kernel.age(600, 600);
    assert!(!kernel.survives());
}

#[test]
fn when_the_table_is_getting_full_closed_flows_make_room_and_no_other() {
    let (kernel, ..) = with_a_flow();
    kernel.age(50, 50);
    assert!(kernel.survives_hurry(20), "established");
    kernel.sent(&Packet::tcp(CLIENT, VIP, FIN | ACK, 1001, 5001));
    kernel.age(50, 50);
    assert!(kernel.survives_hurry(20), "closed in one direction");
    kernel.sent(&Packet::tcp(CLIENT, VIP, RST, 1001, 0));
    kernel.age(50, 50);
    assert!(kernel.survives_hurry(60));
    assert!(kernel.survives_hurry(0));
    assert!(!kernel.survives_hurry(20));
}

/// The kernel gives whole buckets, so nearly every slice lacks a few entries of what was asked for.
#[test]
fn a_walk_comes_by_every_entry_once_however_many_there_are() {
    let kernel = Kernel::with_room(8192, 64);
    for n in 0..5000_u32 {
        let key = types::flow_key {
            client: std::net::IpAddr::from([10, 80, (n >> 8) as u8, n as u8]).into(),
            service: 1,
            ..Default::default()
        };
        let flow = types::flow { began: n, ..Default::default() };
        kernel.maps.flows.set(&key, &flow).unwrap();
    }
    // The smallest is less than many a bucket has.
    for slice in [1, 100, 4096, 5000, 100_000] {
        let mut seen: Vec<_> =
            kernel.maps.flows.slices(slice).unwrap().map(|(_, flow)| flow.began).collect();
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..5000), "slices of {slice}");
        let services: Vec<_> = kernel.maps.service_table.slices(slice).unwrap().collect();
        assert_eq!(services.len(), kernel.maps.service_table.capacity() as usize);
    }
    assert_eq!(kernel.maps.half_flows.slices(100).unwrap().count(), 0);
}
