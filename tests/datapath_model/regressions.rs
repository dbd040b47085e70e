//! Stories that failed once, each by the name of what was wrong.

use crate::held::in_a_relay;
use crate::story::{Acknowledges, Client, Frame, Odd, Step, Way};
use crate::wire::{ACK, Extension, RST, SYN};

/// NAT of TCP, DNAT of UDP, NAT of UDP: numbers of the lab's services.
const NAT_TCP: usize = 0;
const NAT_UDP: usize = 2;
const DNAT_UDP: usize = 4;

fn client(v6: bool, service: usize) -> Client {
    Client { v6, service, host: 0, port: 0 }
}

fn frame(way: Way, flags: u8, acknowledges: Acknowledges, odd: Vec<Odd>) -> Step {
    let (sequence, ttl, payload, wrong_side) = (5000, 64, 5, false);
    Step::Frame(Frame { way, flags, sequence, acknowledges, ttl, payload, wrong_side, odd })
}

fn plain(way: Way, flags: u8) -> Step {
    frame(way, flags, Acknowledges::SynAck(0), vec![])
}

fn holds(story: &[Step]) {
    in_a_relay(|held| held.hold(story).unwrap_or_else(|differs| panic!("{differs}")));
}

#[test]
fn mapped_addresses_matched_ipv4_entries() {
    let mapped = |source| plain(Way::Mapped { service: NAT_TCP, source }, SYN);
    holds(&[mapped(false), mapped(true)]);
}

#[test]
fn replies_to_the_clients_own_address_passed_a_closed_gate() {
    let client = client(false, DNAT_UDP);
    let (to, back) = (plain(Way::In(client), 0), plain(Way::Out(client), 0));
    holds(&[to, back.clone(), Step::Gate { open: false }, back]);
}

#[test]
fn what_was_cut_or_too_long_in_extension_headers_went_up_the_stack() {
    let options = Odd::Extension(Extension::Options(60, 0));
    let way = Way::In(client(true, NAT_TCP));
    let no_ack = Acknowledges::This(0);
    holds(&[
        frame(way.clone(), SYN, no_ack, vec![options.clone(); 6]),
        frame(way.clone(), SYN, no_ack, vec![options.clone(); 7]),
        frame(way.clone(), SYN, no_ack, vec![options, Odd::Cut(44)]),
        frame(way, SYN, no_ack, vec![Odd::Extension(Extension::Routing(1))]),
    ]);
}

#[test]
fn a_flow_begun_anew_was_joined_to_the_backend_before() {
    let client = client(false, NAT_UDP);
    let down = |backend| Step::State { backend, state: 2 };
    let (to, back) = (plain(Way::In(client), 0), plain(Way::Out(client), 0));
    // Its backends are the fifth and the sixth; one of them takes over from the other.
    for first in [4, 5] {
        let story = [to.clone(), down(first), to.clone(), back.clone(), to.clone(), back.clone()];
        holds(&story);
    }
}

#[test]
fn a_refusal_marked_the_next_try() {
    let client = client(false, NAT_TCP);
    let (to, back) = (Way::In(client), Way::Out(client));
    holds(&[
        plain(to.clone(), SYN),
        plain(back.clone(), RST | ACK),
        plain(to.clone(), RST),
        plain(to.clone(), SYN),
        plain(back, SYN | ACK),
        plain(to, ACK),
    ]);
}
