//! After a takeover: segments in the middle of connections that this node was not told of.

use baton::datapath::skeleton::types::{backend_state, drop_reason, flow_flag, forward_mode};

use crate::kernel::{Fate, Kernel, TCP};
use crate::packet::{ACK, FIN, Packet, RST, SYN, Transport};

const VIP: &str = "10.77.0.100:80";
const NAT: &str = "10.78.0.100";
const BACKENDS: [&str; 3] = ["10.78.0.11:8080", "10.78.0.12:8080", "10.78.0.13:8080"];

fn web(mode: forward_mode) -> (Kernel, Vec<u16>) {
    let mut kernel = Kernel::with_room(64, 64);
    let backends = kernel.service(1, mode, (VIP, TCP), NAT, &BACKENDS);
    (kernel, backends)
}

/// A node just after its takeover.
fn after_a_takeover(mode: forward_mode) -> (Kernel, Vec<u16>) {
    let (kernel, backends) = web(mode);
    kernel.gate.adopt_until(kernel.jiffies() + 1_000_000);
    (kernel, backends)
}

fn client(n: u32) -> String {
    format!("10.77.0.{}:{}", 10 + n % 40, 40_000 + n)
}

fn data(client: &str) -> Packet {
    Packet::tcp(client, VIP, ACK, 70_001, 90_001)
}

fn no_flow() -> Fate {
    Fate::Dropped(drop_reason::DROP_NO_FLOW)
}

#[test]
fn it_goes_to_the_backend_and_port_of_the_node_before() {
    for mode in [forward_mode::MODE_NAT, forward_mode::MODE_DNAT] {
        let (before, _) = web(mode);
        let (kernel, _) = after_a_takeover(mode);
        for n in 0..40 {
            let client = client(n);
            let begun = before.sent(&Packet::tcp(&client, VIP, SYN, 70_000, 0));
            let went_on = kernel.sent(&data(&client));
            assert_eq!((went_on.from, went_on.to), (begun.from, begun.to));
            // The backend knows it: from here on it is a flow.
            assert_eq!(kernel.flows().len() as u32, n);
            let answer = Transport::Tcp { flags: ACK, sequence: 90_001, acknowledgement: 70_001 };
            let back = kernel.sent(&went_on.answer(answer));
            assert_eq!(back.to, data(&client).from);
            assert_eq!(kernel.flows().len() as u32, n + 1);
        }
        let adopted = flow_flag::FLOW_ADOPTED.0 as u8;
        assert!(kernel.flows().iter().all(|(_, flow)| flow.flags & adopted == 0));
    }
}

#[test]
fn where_answers_do_not_come_by_the_second_segment_makes_it_a_flow() {
    let (kernel, _) = after_a_takeover(forward_mode::MODE_DSR_L2);
    kernel.sent(&data(&client(0)));
    assert_eq!(kernel.flows().len(), 0);
    kernel.sent(&data(&client(0)));
    assert_eq!(kernel.flows().len(), 1);
}

#[test]
fn a_backend_that_does_not_know_it_says_so_and_there_is_no_flow() {
    let (kernel, _) = after_a_takeover(forward_mode::MODE_NAT);
    let went_on = kernel.sent(&data(&client(0)));
    let refusal = Transport::Tcp { flags: RST, sequence: 90_001, acknowledgement: 0 };
    kernel.sent(&went_on.answer(refusal));
    kernel.sent(&data(&client(0)));
    assert_eq!(kernel.flows().len(), 0);
}

#[test]
fn only_for_a_while_and_only_what_is_in_the_middle() {
    let (kernel, _) = web(forward_mode::MODE_NAT);
    assert_eq!(kernel.fate(&data(&client(0))), no_flow(), "no takeover");
    kernel.gate.adopt_until(kernel.jiffies());
    assert_eq!(kernel.fate(&data(&client(0))), no_flow(), "the time is over");
    kernel.gate.adopt_until(kernel.jiffies() + 1_000_000);
    for flags in [0, RST, RST | ACK, SYN | ACK, FIN] {
        let stray = Packet::tcp(&client(0), VIP, flags, 1, 1);
        assert_eq!(kernel.fate(&stray), no_flow(), "{flags:#x}");
    }
    kernel.sent(&Packet::tcp(&client(0), VIP, FIN | ACK, 1, 1));
}

/// The node before must have chosen another one then, and nobody knows which.
#[test]
fn nothing_is_guessed() {
    let (before, _) = web(forward_mode::MODE_NAT);
    let (kernel, backends) = after_a_takeover(forward_mode::MODE_NAT);
    let first = before.sent(&Packet::tcp(&client(0), VIP, SYN, 70_000, 0)).to;
    let at = BACKENDS.iter().position(|address| first == address.parse().unwrap()).unwrap();
    kernel.set_state(backends[at], backend_state::BACKEND_DOWN);
    assert_eq!(kernel.fate(&data(&client(0))), no_flow());
    kernel.set_state(backends[at], backend_state::BACKEND_UP);
    kernel.sent(&data(&client(0)));
}
