//! Backends that leave, and flows that are ended: what their clients, and they themselves, get.

use baton::datapath::skeleton::types::{
    self, backend_state, drop_reason, flow_count, flow_flag, forward_mode, on_down, sweep_done,
    sweep_how,
};
use baton::maglev;

use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, Packet, RST, SYN, Transport};

const CLIENT: &str = "10.77.0.10:40000";
const VIP: &str = "10.77.0.100:80";
const NAT: &str = "10.78.0.100";
const BACKENDS: [&str; 2] = ["10.78.0.11:80", "10.78.0.12:80"];
const LEFT: [backend_state; 2] = [backend_state::BACKEND_DOWN, backend_state::BACKEND_GONE];
const TRACKED: [forward_mode; 2] = [forward_mode::MODE_NAT, forward_mode::MODE_DNAT];

struct Pair {
    kernel: Kernel,
    ids: Vec<u16>,
}

impl Pair {
    fn new(mode: forward_mode, protocol: u8, policy: on_down) -> Self {
        let mut kernel = Kernel::new();
        let ids = kernel.service(1, mode, (VIP, protocol), NAT, &BACKENDS);
        let mut service = kernel.maps.service_table.find(&1).unwrap().unwrap();
        service.on_down = policy.0 as u8;
        kernel.maps.service_table.set(&1, &service).unwrap();
        Self { kernel, ids }
    }

    /// A TCP flow; what the backend saw of its SYN. In direct server return that is for the VIP.
    fn connect(&self) -> Packet {
        let toward = self.kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
        if toward.to.to_string() != VIP {
            let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1006 };
            self.kernel.sent(&Packet { payload: vec![], ..toward.answer(answer) });
        }
        self.kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1006, 5001));
        toward
    }

    /// Says it of the backend that the one flow has; which it is.
    fn set_its_backend(&self, state: backend_state) -> u16 {
        let flow = self.kernel.flows().first().map(|(_, flow)| *flow);
        let flow =
            flow.or_else(|| Some(self.kernel.maps.half_flows.slices(256).unwrap().next()?.1));
        let id = flow.expect("there is a flow").backend;
        assert!(self.ids.contains(&id));
        self.kernel.set_state(id, state);
        // As the daemon does: no new flows for it.
        if state != backend_state::BACKEND_UP {
            let entry = |&id: &u16| maglev::Entry { id, key: id.into(), weight: 1 };
            let others: Vec<_> = self.ids.iter().filter(|&&other| other != id).map(entry).collect();
            self.kernel.maps.schedules.set(1, &maglev::table(&others)).unwrap();
        }
        id
    }

    fn sweep(&self, how: u32, key: types::flow_key) -> types::swept {
        let mut sweep = types::sweep { count: 1, how, ..Default::default() };
        sweep.keys[0] = key;
        self.kernel.maps.sweep.set(&0, &sweep).unwrap();
        self.kernel.collect();
        self.kernel.maps.sweep.find(&0).unwrap().unwrap().swept[0]
    }

    fn count(&self, what: flow_count) -> u64 {
        self.kernel.maps.flow_counts.find_per_cpu(&what.0).unwrap().iter().sum()
    }
}

/// The RST that a packet is answered with: in whose name, and its number.
fn reset_for(kernel: &Kernel, packet: &Packet) -> (Packet, u32) {
    match kernel.fate(packet) {
        Fate::Answered(drop_reason::DROP_BACKEND_DOWN, bytes) => {
            let reset = Packet::read(&bytes);
            assert_eq!((reset.from, reset.to), (packet.to, packet.from));
            match reset.transport {
                Transport::Tcp { flags, sequence, .. } if flags & RST != 0 => (reset, sequence),
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{packet:?}: {other:?}"),
    }
}

fn done(swept: &types::swept) -> sweep_done {
    sweep_done(swept.done.into())
}

#[test]
fn the_client_of_a_backend_that_left_gets_a_reset_with_its_next_packet() {
    for mode in [TRACKED[0], TRACKED[1], forward_mode::MODE_DSR_L2] {
        for state in LEFT {
            let pair = Pair::new(mode, TCP, on_down::ON_DOWN_RESET);
            pair.connect();
            pair.set_its_backend(state);
            for _ in 0..2 {
                let (_, number) =
                    reset_for(&pair.kernel, &Packet::tcp(CLIENT, VIP, ACK, 1011, 5777));
                assert_eq!(number, 5777, "the client takes no other");
            }
            let rst = Packet::tcp(CLIENT, VIP, RST, 1011, 0);
            let fate = pair.kernel.fate(&rst);
            assert_eq!(fate, Fate::Dropped(drop_reason::DROP_BACKEND_DOWN), "never for a RST");
            assert_eq!(pair.count(flow_count::FLOWS_ENDED), 1);
        }
    }
}

#[test]
fn the_client_connects_anew_from_the_same_port() {
    for mode in TRACKED {
        let pair = Pair::new(mode, TCP, on_down::ON_DOWN_RESET);
        let toward = pair.connect();
        pair.set_its_backend(backend_state::BACKEND_DOWN);
        // Before the collector came by.
        let again = pair.kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 90_000, 0));
        assert_ne!(again.to, toward.to);
        assert_eq!(pair.kernel.flows().len(), 0, "the old flow has made room");
    }
}

#[test]
fn the_backend_of_a_flow_that_was_ended_gets_a_reset_too() {
    let pair = Pair::new(forward_mode::MODE_NAT, TCP, on_down::ON_DOWN_RESET);
    let toward = pair.connect();
    pair.set_its_backend(backend_state::BACKEND_DOWN);
    reset_for(&pair.kernel, &Packet::tcp(CLIENT, VIP, ACK, 1011, 5001));
    let data = Transport::Tcp { flags: ACK, sequence: 5001, acknowledgement: 1011 };
    assert_eq!(reset_for(&pair.kernel, &toward.answer(data)).1, 1011);
    let rst = Transport::Tcp { flags: RST, sequence: 5001, acknowledgement: 0 };
    let fate = pair.kernel.fate(&toward.answer(rst));
    assert_eq!(fate, Fate::Dropped(drop_reason::DROP_BACKEND_DOWN));
}

#[test]
fn a_backend_that_is_back_does_not_revive_what_was_ended() {
    let pair = Pair::new(forward_mode::MODE_NAT, TCP, on_down::ON_DOWN_RESET);
    pair.connect();
    let id = pair.set_its_backend(backend_state::BACKEND_DOWN);
    reset_for(&pair.kernel, &Packet::tcp(CLIENT, VIP, ACK, 1011, 5001));
    pair.kernel.set_state(id, backend_state::BACKEND_UP);
    reset_for(&pair.kernel, &Packet::tcp(CLIENT, VIP, ACK, 1011, 5001));
    pair.kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 90_000, 0));
}

#[test]
fn a_handshake_with_a_backend_that_left_goes_to_another() {
    for mode in TRACKED {
        let pair = Pair::new(mode, TCP, on_down::ON_DOWN_RESET);
        let syn = Packet::tcp(CLIENT, VIP, SYN, 1000, 0);
        let toward = pair.kernel.sent(&syn);
        pair.set_its_backend(backend_state::BACKEND_DOWN);
        assert_ne!(pair.kernel.sent(&syn).to, toward.to);
        assert_eq!(pair.kernel.maps.half_replies.slices(256).unwrap().count(), 1);
        assert_eq!(pair.count(flow_count::FLOWS_REPLACED), 1);
    }
}

#[test]
fn udp_moves_to_another_backend_at_once() {
    for mode in [TRACKED[0], TRACKED[1], forward_mode::MODE_DSR_NAT] {
        for state in LEFT {
            let pair = Pair::new(mode, UDP, on_down::ON_DOWN_REMAP);
            let datagram = Packet::udp(CLIENT, VIP);
            let toward = pair.kernel.sent(&datagram);
            if mode == forward_mode::MODE_DSR_NAT {
                pair.kernel.sent(&datagram);
            } else {
                pair.kernel.sent(&toward.answer(Transport::Udp));
            }
            assert_eq!(pair.kernel.flows().len(), 1);
            pair.set_its_backend(state);
            // Before the collector came by.
            let moved = pair.kernel.sent(&datagram);
            assert_ne!(moved.to, toward.to);
            assert_eq!(pair.count(flow_count::FLOWS_MOVED), 1);
            if mode != forward_mode::MODE_DSR_NAT {
                pair.kernel.sent(&moved.answer(Transport::Udp));
            }
            assert_eq!(pair.kernel.sent(&datagram).to, moved.to);
        }
    }
}

#[test]
fn udp_that_is_reset_is_told_once_and_begins_anew() {
    let pair = Pair::new(forward_mode::MODE_NAT, UDP, on_down::ON_DOWN_RESET);
    let datagram = Packet::udp(CLIENT, VIP);
    let toward = pair.kernel.sent(&datagram);
    pair.kernel.sent(&toward.answer(Transport::Udp));
    pair.set_its_backend(backend_state::BACKEND_DOWN);
    match pair.kernel.fate(&datagram) {
        Fate::Answered(drop_reason::DROP_BACKEND_DOWN, bytes) => {
            // ICMP destination unreachable, port unreachable.
            assert_eq!((bytes[23], bytes[34], bytes[35]), (1, 3, 3));
        }
        other => panic!("{other:?}"),
    }
    assert_ne!(pair.kernel.sent(&datagram).to, toward.to);
}

#[test]
fn datagrams_that_nobody_answers_keep_their_backend() {
    for state in [backend_state::BACKEND_UP, backend_state::BACKEND_DRAINED] {
        let pair = Pair::new(forward_mode::MODE_NAT, UDP, on_down::ON_DOWN_REMAP);
        let datagram = Packet::udp(CLIENT, VIP);
        let toward = pair.kernel.sent(&datagram);
        pair.set_its_backend(state);
        // Pushed out by others, in either direction or both: backend and port are the same again.
        for push in 0..4 {
            if state == backend_state::BACKEND_UP {
                if push & 1 != 0 {
                    let (key, _) = pair.kernel.maps.half_flows.slices(256).unwrap().next().unwrap();
                    pair.kernel.maps.half_flows.remove(&key).unwrap();
                }
                if push & 2 != 0 {
                    let (key, _) =
                        pair.kernel.maps.half_replies.slices(256).unwrap().next().unwrap();
                    pair.kernel.maps.half_replies.remove(&key).unwrap();
                }
            }
            let again = pair.kernel.sent(&datagram);
            assert_eq!((again.to, again.from), (toward.to, toward.from), "{push}");
        }
    }
}

#[test]
fn the_collector_ends_what_has_lost_its_backend_and_says_whom_to_tell() {
    for mode in TRACKED {
        for state in LEFT {
            let pair = Pair::new(mode, TCP, on_down::ON_DOWN_RESET);
            let toward = pair.connect();
            let id = pair.set_its_backend(state);
            let key = pair.kernel.flows()[0].0;
            let swept = pair.sweep(0, key);
            assert_eq!(done(&swept), sweep_done::SWEPT_ENDED);
            assert_eq!((swept.backend, swept.nat_port), (id, toward.from.port().to_be()));
            let numbers = |of: types::numbers| (of.acknowledged, of.end);
            assert_eq!(numbers(swept.client), (5001, 1011));
            assert_eq!(numbers(swept.server), (1006, 5001));
            // Once, unless it is asked for again.
            assert_eq!(done(&pair.sweep(0, key)), sweep_done::SWEPT_NOTHING);
            let again = pair.sweep(sweep_how::SWEEP_AGAIN.0, key);
            assert_eq!(done(&again), sweep_done::SWEPT_ENDED);
            // It stays for a while, for whoever did not hear the RST.
            reset_for(&pair.kernel, &Packet::tcp(CLIENT, VIP, ACK, 1011, 5001));
            let ended = (flow_flag::FLOW_ENDED.0 | flow_flag::FLOW_RST.0) as u8;
            let reply = pair.kernel.maps.replies.slices(256).unwrap().next().unwrap().1;
            assert_eq!(
                (pair.kernel.flows()[0].1.flags & ended, reply.flags & ended),
                (ended, ended)
            );
        }
    }
}

#[test]
fn behind_a_closed_gate_nobody_is_told() {
    let pair = Pair::new(forward_mode::MODE_NAT, TCP, on_down::ON_DOWN_RESET);
    pair.connect();
    pair.set_its_backend(backend_state::BACKEND_DOWN);
    let key = pair.kernel.flows()[0].0;
    pair.kernel.gate.close();
    assert_eq!(done(&pair.sweep(0, key)), sweep_done::SWEPT_NOTHING);
    pair.kernel.open_gate();
    assert_eq!(done(&pair.sweep(0, key)), sweep_done::SWEPT_ENDED);
}

#[test]
fn the_collector_forgets_udp_of_backends_that_left() {
    for (policy, state, goes) in [
        (on_down::ON_DOWN_REMAP, backend_state::BACKEND_DOWN, true),
        (on_down::ON_DOWN_REMAP, backend_state::BACKEND_GONE, true),
        (on_down::ON_DOWN_RESET, backend_state::BACKEND_GONE, true),
        // Its client is told when it sends.
        (on_down::ON_DOWN_RESET, backend_state::BACKEND_DOWN, false),
        (on_down::ON_DOWN_REMAP, backend_state::BACKEND_DRAINED, false),
    ] {
        let pair = Pair::new(forward_mode::MODE_NAT, UDP, policy);
        let toward = pair.kernel.sent(&Packet::udp(CLIENT, VIP));
        pair.kernel.sent(&toward.answer(Transport::Udp));
        pair.set_its_backend(state);
        pair.sweep(0, pair.kernel.flows()[0].0);
        let left = pair.kernel.maps.replies.slices(256).unwrap().count();
        assert_eq!(
            (pair.kernel.flows().is_empty(), left == 0),
            (goes, goes),
            "{policy:?} {state:?}"
        );
    }
}

#[test]
fn the_operator_ends_flows_of_any_kind() {
    let end = sweep_how::SWEEP_END.0;
    let half = sweep_how::SWEEP_HALF_OPEN.0;
    // Established.
    let pair = Pair::new(forward_mode::MODE_NAT, TCP, on_down::ON_DOWN_RESET);
    let toward = pair.connect();
    let swept = pair.sweep(end, pair.kernel.flows()[0].0);
    assert_eq!(done(&swept), sweep_done::SWEPT_ENDED);
    reset_for(&pair.kernel, &Packet::tcp(CLIENT, VIP, ACK, 1011, 5001));
    let data = Transport::Tcp { flags: ACK, sequence: 5001, acknowledgement: 1011 };
    reset_for(&pair.kernel, &toward.answer(data));
    assert_eq!(
        pair.kernel
            .maps
            .backend_live
            .slices(256)
            .map(|all| { all.map(|(_, live)| live.begun.wrapping_sub(live.ended)).sum::<u32>() })
            .unwrap(),
        0,
        "no load any more"
    );
    // Half-open: the client waits for its SYN to be acknowledged.
    let pair = Pair::new(forward_mode::MODE_NAT, TCP, on_down::ON_DOWN_RESET);
    pair.kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    let (key, _) = pair.kernel.maps.half_flows.slices(256).unwrap().next().unwrap();
    let swept = pair.sweep(end | half, key);
    assert_eq!((done(&swept), swept.client.end), (sweep_done::SWEPT_ENDED, 1006));
    assert_eq!(pair.kernel.maps.half_flows.slices(256).unwrap().count(), 0);
    assert_eq!(pair.kernel.maps.half_replies.slices(256).unwrap().count(), 0);
    // UDP has nobody to tell.
    let pair = Pair::new(forward_mode::MODE_NAT, UDP, on_down::ON_DOWN_REMAP);
    let toward = pair.kernel.sent(&Packet::udp(CLIENT, VIP));
    pair.kernel.sent(&toward.answer(Transport::Udp));
    let swept = pair.sweep(end, pair.kernel.flows()[0].0);
    assert_eq!(done(&swept), sweep_done::SWEPT_REMOVED);
    assert_eq!(pair.kernel.flows().len(), 0);
}

#[test]
fn half_open_flows_time_out_and_are_counted() {
    for protocol in [TCP, UDP] {
        let pair = Pair::new(forward_mode::MODE_NAT, protocol, on_down::ON_DOWN_RESET);
        let first = match protocol {
            TCP => Packet::tcp(CLIENT, VIP, SYN, 1000, 0),
            _ => Packet::udp(CLIENT, VIP),
        };
        pair.kernel.sent(&first);
        let half = |pair: &Pair| pair.kernel.maps.half_flows.slices(256).unwrap().next();
        let sweep = || {
            let (key, _) = half(&pair).unwrap();
            done(&pair.sweep(sweep_how::SWEEP_HALF_OPEN.0, key))
        };
        let age = |by: u32| {
            let then = (pair.kernel.jiffies() as u32).wrapping_sub(by);
            let (key, mut flow) = half(&pair).unwrap();
            flow.seen = then;
            pair.kernel.maps.half_flows.set(&key, &flow).unwrap();
            let (key, mut reply) =
                pair.kernel.maps.half_replies.slices(256).unwrap().next().unwrap();
            reply.reply.seen = then;
            pair.kernel.maps.half_replies.set(&key, &reply).unwrap();
        };
        age(900);
        assert_eq!(sweep(), sweep_done::SWEPT_NOTHING);
        age(1100);
        // Another packet of the client's keeps it.
        pair.kernel.sent(&first);
        assert_eq!(sweep(), sweep_done::SWEPT_NOTHING);
        age(1100);
        assert_eq!(sweep(), sweep_done::SWEPT_REMOVED);
        assert!(half(&pair).is_none());
        assert_eq!(pair.kernel.maps.half_replies.slices(256).unwrap().count(), 0);
        assert_eq!(pair.count(flow_count::FLOWS_HALF_EXPIRED), 1);
        assert_eq!(pair.count(flow_count::FLOWS_BEGUN), 1);
    }
}
