//! Which RST and FIN is believed. Whoever knows the addresses and ports of a connection can send
//! one in another's name; the end hosts judge theirs by RFC 5961, and the flow table does too.

use baton::datapath::skeleton::types::{flow_count, flow_flag, forward_mode};

use crate::kernel::{Kernel, TCP};
use crate::packet::{ACK, FIN, Packet, RST, SYN, Transport};

const CLIENT: &str = "10.77.0.10:40000";
const VIP: &str = "10.77.0.100:80";
const BACKEND: &str = "10.78.0.11:80";

const FLAG_FIN: u8 = flow_flag::FLOW_FIN.0 as u8;
const FLAG_RST: u8 = flow_flag::FLOW_RST.0 as u8;
const FLAG_DOUBT: u8 = flow_flag::FLOW_DOUBT.0 as u8;

/// A service with a flow. The client has sent up to 2000, of which the backend has acknowledged
/// 1501; the backend has sent up to 8000, the client acknowledged 7000.
struct Talk {
    kernel: Kernel,
    toward: Packet,
}

fn segment(flags: u8, sequence: u32, acknowledgement: u32, length: usize) -> Packet {
    let packet = Packet::tcp(CLIENT, VIP, flags, sequence, acknowledgement);
    Packet { payload: vec![7; length], ..packet }
}

impl Talk {
    fn new(mode: forward_mode) -> Self {
        let mut kernel = Kernel::new();
        kernel.service(1, mode, (VIP, TCP), "10.78.0.100", &[BACKEND]);
        let toward = kernel.sent(&segment(SYN, 1000, 0, 0));
        let talk = Self { kernel, toward };
        if mode != forward_mode::MODE_DSR_L2 {
            talk.answer(SYN | ACK, 5000, 1001, 0);
        }
        talk.ask(ACK, 1001, 5001, 500);
        if mode != forward_mode::MODE_DSR_L2 {
            talk.answer(ACK, 5001, 1501, 2999);
        }
        talk.ask(ACK, 1501, 7000, 499);
        assert_eq!(talk.kernel.flows().len(), 1);
        assert_eq!(talk.flags(), (0, if mode == forward_mode::MODE_DSR_L2 { 0 } else { 4 }));
        talk
    }

    /// From the client; it is sent on, whatever it is.
    fn ask(&self, flags: u8, sequence: u32, acknowledgement: u32, length: usize) {
        self.kernel.sent(&segment(flags, sequence, acknowledgement, length));
    }

    /// From the backend, the same.
    fn answer(&self, flags: u8, sequence: u32, acknowledgement: u32, length: usize) {
        let answer = self.toward.answer(Transport::Tcp { flags, sequence, acknowledgement });
        self.kernel.sent(&Packet { payload: vec![8; length], ..answer });
    }

    /// What the flow and its reply show.
    fn flags(&self) -> (u8, u8) {
        let (_, flow) = self.kernel.flows()[0];
        let reply = self.kernel.maps.replies.slices(256).unwrap().next();
        (flow.flags, reply.map_or(0, |(_, reply)| reply.flags))
    }

    fn count(&self, what: flow_count) -> u64 {
        self.kernel.maps.flow_counts.find_per_cpu(&what.0).unwrap().iter().sum()
    }
}

const SYN_ACK: u8 = flow_flag::FLOW_SYN_ACK.0 as u8;
const BOTH_WAYS: [forward_mode; 2] = [forward_mode::MODE_NAT, forward_mode::MODE_DNAT];

#[test]
fn a_reset_with_the_exact_number_is_believed() {
    for mode in BOTH_WAYS {
        let talk = Talk::new(mode);
        talk.ask(RST, 1501, 0, 0);
        assert_eq!(talk.flags(), (FLAG_RST, SYN_ACK));
        let talk = Talk::new(mode);
        talk.answer(RST, 7000, 0, 0);
        assert_eq!(talk.flags(), (0, SYN_ACK | FLAG_RST));
    }
}

#[test]
fn a_guessed_reset_is_sent_on_and_not_believed() {
    for mode in BOTH_WAYS {
        let talk = Talk::new(mode);
        let guesses = [0, 1, 1000, 1500, 1502, 1999, 2001, 65535, 0x8000_0000, u32::MAX];
        for guess in guesses {
            talk.ask(RST, guess, 0, 0);
            talk.answer(RST, guess, 0, 0);
        }
        assert_eq!(talk.flags(), (0, SYN_ACK));
        assert_eq!(talk.count(flow_count::RESETS_DISBELIEVED), 2 * guesses.len() as u64);
    }
}

#[test]
fn nobody_can_shift_what_the_other_end_has_acknowledged() {
    let talk = Talk::new(forward_mode::MODE_NAT);
    // In the client's name: bytes somewhere, and a RST that follows on them.
    for sequence in [900_000_000, 0, 3_000_000_000] {
        talk.ask(ACK, sequence, 77, 100);
        talk.ask(RST, sequence + 100, 0, 0);
    }
    assert_eq!(talk.flags(), (0, SYN_ACK));
    // The flow's own numbers are still right.
    talk.ask(RST, 1501, 0, 0);
    assert_eq!(talk.flags(), (FLAG_RST, SYN_ACK));
}

#[test]
fn a_reset_after_bytes_on_their_way_is_doubted_until_the_other_end_speaks() {
    for mode in BOTH_WAYS {
        let talk = Talk::new(mode);
        talk.ask(RST, 2000, 0, 0);
        assert_eq!(talk.flags(), (0, SYN_ACK | FLAG_DOUBT));
        // The backend's challenge ACK, or anything else but a RST.
        talk.answer(ACK, 8000, 2000, 0);
        assert_eq!(talk.flags(), (0, SYN_ACK));
        // The real client had to answer with the exact number.
        talk.ask(RST, 2000, 0, 0);
        assert_eq!(talk.flags(), (FLAG_RST, SYN_ACK));

        let talk = Talk::new(mode);
        talk.answer(RST, 8000, 0, 0);
        assert_eq!(talk.flags(), (FLAG_DOUBT, SYN_ACK));
        talk.ask(ACK, 2000, 8000, 0);
        assert_eq!(talk.flags(), (0, SYN_ACK));
        assert_eq!(talk.count(flow_count::RESETS_DOUBTED), 1);
    }
}

#[test]
fn in_dsr_a_reset_must_follow_on_what_the_client_sent() {
    let talk = Talk::new(forward_mode::MODE_DSR_L2);
    for guess in [0, 1501, 1999, 2001, 7000] {
        talk.ask(RST, guess, 0, 0);
    }
    assert_eq!(talk.flags().0, 0);
    talk.ask(RST, 2000, 0, 0);
    assert_eq!(talk.flags().0, FLAG_RST);
}

#[test]
fn a_fin_far_away_is_not_believed() {
    let talk = Talk::new(forward_mode::MODE_NAT);
    talk.ask(FIN | ACK, 900_000_000, 7000, 0);
    assert_eq!(talk.flags().0, 0);
    assert_eq!(talk.count(flow_count::FINS_DISBELIEVED), 1);
    // With bytes before it lost on their way here, and sent again later.
    talk.ask(FIN | ACK, 3000, 7000, 0);
    assert_eq!(talk.flags().0, FLAG_FIN);
    talk.ask(FIN | ACK, 2000, 7000, 1000);
    talk.answer(FIN | ACK, 8000, 3001, 0);
    assert_eq!(talk.flags(), (FLAG_FIN, SYN_ACK | FLAG_FIN));
}

#[test]
fn a_rebooted_client_gets_the_backends_challenge_and_begins_anew() {
    let talk = Talk::new(forward_mode::MODE_NAT);
    // From the same port, of a connection that it knows nothing of.
    talk.ask(SYN, 777_000, 0, 0);
    talk.answer(ACK, 8000, 2000, 0);
    assert_eq!(talk.flags(), (0, SYN_ACK), "a SYN alone ends nothing");
    talk.ask(RST, 2000, 0, 0);
    assert_eq!(talk.flags(), (FLAG_RST, SYN_ACK));
    talk.ask(SYN, 777_000, 0, 0);
    assert_eq!(talk.kernel.flows().len(), 0, "half-open");
    talk.answer(SYN | ACK, 9000, 777_001, 0);
    talk.ask(ACK, 777_001, 9001, 0);
    assert_eq!(talk.flags(), (0, SYN_ACK));
}

#[test]
fn where_both_ends_begin_anew_their_new_numbers_count() {
    let talk = Talk::new(forward_mode::MODE_NAT);
    talk.ask(SYN, 777_000_000, 0, 0);
    // The backend has forgotten the connection too.
    talk.answer(SYN | ACK, 3_000_000_000, 777_000_001, 0);
    talk.ask(ACK, 777_000_001, 3_000_000_001, 10);
    talk.answer(ACK, 3_000_000_001, 777_000_011, 0);
    assert_eq!(talk.flags(), (0, SYN_ACK));
    talk.ask(RST, 2000, 0, 0);
    assert_eq!(talk.flags(), (0, SYN_ACK), "of the old connection");
    talk.ask(FIN | ACK, 777_000_011, 3_000_000_001, 0);
    talk.ask(RST, 777_000_011, 0, 0);
    assert_eq!(talk.flags(), (FLAG_FIN | FLAG_RST, SYN_ACK));
}

#[test]
fn numbers_wrap() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_NAT, (VIP, TCP), "10.78.0.100", &[BACKEND]);
    let toward = kernel.sent(&segment(SYN, u32::MAX - 5, 0, 0));
    let talk = Talk { kernel, toward };
    talk.answer(SYN | ACK, u32::MAX, u32::MAX - 4, 0);
    talk.ask(ACK, u32::MAX - 4, 0, 100);
    talk.answer(ACK, 0, 95, 0);
    talk.ask(RST, 90, 0, 0);
    assert_eq!(talk.flags(), (0, SYN_ACK));
    talk.ask(FIN | ACK, 95, 0, 0);
    talk.ask(RST, 95, 0, 0);
    assert_eq!(talk.flags(), (FLAG_FIN | FLAG_RST, SYN_ACK));
}

#[test]
fn both_ends_may_open_at_the_same_time() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_DNAT, (VIP, TCP), "10.78.0.100", &[BACKEND]);
    let toward = kernel.sent(&segment(SYN, 1000, 0, 0));
    let talk = Talk { kernel, toward };
    talk.answer(SYN, 5000, 0, 0);
    talk.ask(SYN | ACK, 1000, 5001, 0);
    talk.answer(SYN | ACK, 5000, 1001, 0);
    assert_eq!(talk.kernel.flows().len(), 1);
    talk.ask(RST, 1001, 0, 0);
    assert_eq!(talk.flags().0, FLAG_RST);
}

#[test]
fn a_false_reset_does_not_hinder_a_handshake() {
    let mut kernel = Kernel::new();
    kernel.service(1, forward_mode::MODE_NAT, (VIP, TCP), "10.78.0.100", &[BACKEND]);
    let toward = kernel.sent(&segment(SYN, 1000, 0, 0));
    let talk = Talk { kernel, toward };
    talk.ask(RST, 4711, 0, 0);
    talk.answer(SYN | ACK, 5000, 1001, 0);
    talk.ask(RST, 4711, 0, 0);
    talk.ask(ACK, 1001, 5001, 0);
    assert_eq!(talk.flags(), (0, SYN_ACK));
}
