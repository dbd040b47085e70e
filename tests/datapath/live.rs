//! The counts of live flows: which flows are in them, from when on, until when.

use baton::datapath::live::flows;
use baton::datapath::skeleton::types::{self, backend_state, forward_mode};

use crate::kernel::{Kernel, TCP, UDP};
use crate::packet::{ACK, FIN, Packet, RST, SYN, Transport};

const CLIENT: &str = "10.77.0.10:40000";
const VIP: &str = "10.77.0.100:80";
const NAT: &str = "10.78.0.100";

impl Kernel {
    /// Live flows of service 1 and backend 1.
    fn live(&self) -> [u32; 2] {
        [&self.maps.service_live, &self.maps.backend_live]
            .map(|table| flows(&table.find(&1).unwrap().unwrap()))
    }

    /// A client's handshake; what the backend saw of it.
    pub(crate) fn open(&self, client: &str) -> Packet {
        let toward = self.sent(&Packet::tcp(client, VIP, SYN, 1000, 0));
        let answer = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
        self.sent(&toward.answer(answer));
        self.sent(&Packet::tcp(client, VIP, ACK, 1001, 5001));
        toward
    }

    /// Has the collector look at every flow.
    fn collect_all(&self) {
        let mut sweep = types::sweep::default();
        for (n, (key, _)) in self.flows().into_iter().enumerate() {
            sweep.keys[n] = key;
            sweep.count += 1;
        }
        self.maps.sweep.set(&0, &sweep).unwrap();
        self.collect();
    }
}

fn kernel(mode: forward_mode, protocol: u8) -> Kernel {
    let mut kernel = Kernel::new();
    kernel.service(1, mode, (VIP, protocol), NAT, &["10.78.0.11:8080"]);
    kernel
}

fn fin() -> Packet {
    Packet::tcp(CLIENT, VIP, FIN | ACK, 1001, 5001)
}

fn answer(toward: &Packet, flags: u8) -> Packet {
    toward.answer(Transport::Tcp { flags, sequence: 5001, acknowledgement: 1002 })
}

#[test]
fn a_flow_counts_from_its_establishment_until_both_ends_have_closed() {
    for mode in [forward_mode::MODE_NAT, forward_mode::MODE_DNAT] {
        for client_first in [true, false] {
            let kernel = kernel(mode, TCP);
            let toward = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
            assert_eq!(kernel.live(), [0, 0], "half-open");
            let synack = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
            kernel.sent(&toward.answer(synack));
            assert_eq!(kernel.live(), [0, 0], "half-open");
            for _ in 0..2 {
                kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
                assert_eq!(kernel.live(), [1, 1], "established");
            }
            let mut ends = [fin(), answer(&toward, FIN | ACK)];
            if !client_first {
                ends.reverse();
            }
            kernel.sent(&ends[0]);
            assert_eq!(kernel.live(), [1, 1], "closed in one direction");
            kernel.sent(&ends[1]);
            assert_eq!(kernel.live(), [0, 0], "closed");
            // What comes after it, and the collector, take it out no second time.
            kernel.sent(&ends[0]);
            kernel.sent(&ends[1]);
            kernel.set_state(1, backend_state::BACKEND_GONE);
            kernel.collect_all();
            assert_eq!(kernel.flows().len(), 0);
            assert_eq!(kernel.live(), [0, 0]);
            let live = kernel.maps.backend_live.find(&1).unwrap().unwrap();
            assert_eq!((live.begun, live.ended), (1, 1));
        }
    }
}

#[test]
fn a_reset_ends_it_from_either_end() {
    let kernel = kernel(forward_mode::MODE_NAT, TCP);
    kernel.open(CLIENT);
    kernel.sent(&Packet::tcp(CLIENT, VIP, RST, 1001, 0));
    assert_eq!(kernel.live(), [0, 0]);
    // Its client begins anew: it counts again.
    let toward = kernel.open(CLIENT);
    assert_eq!(kernel.live(), [1, 1]);
    kernel.sent(&answer(&toward, RST));
    assert_eq!(kernel.live(), [0, 0]);
}

#[test]
fn where_replies_do_not_come_by_the_clients_end_is_the_end() {
    let kernel = kernel(forward_mode::MODE_DSR_L2, TCP);
    kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    assert_eq!(kernel.live(), [0, 0]);
    kernel.sent(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    assert_eq!(kernel.live(), [1, 1]);
    kernel.sent(&fin());
    assert_eq!(kernel.live(), [0, 0]);
}

#[test]
fn udp_counts_from_the_answer_until_it_is_removed() {
    let kernel = kernel(forward_mode::MODE_NAT, UDP);
    let toward = kernel.sent(&Packet::udp(CLIENT, VIP));
    assert_eq!(kernel.live(), [0, 0]);
    for _ in 0..2 {
        kernel.sent(&toward.answer(Transport::Udp));
        assert_eq!(kernel.live(), [1, 1]);
    }
    kernel.collect_all();
    assert_eq!(kernel.live(), [1, 1], "nothing has ended");
    kernel.set_state(1, backend_state::BACKEND_GONE);
    kernel.collect_all();
    assert_eq!(kernel.live(), [0, 0]);
}

#[test]
fn what_finds_no_place_in_the_table_does_not_count() {
    let mut kernel = Kernel::with_room(16, 256);
    let mode = forward_mode::MODE_NAT;
    kernel.service(1, mode, (VIP, TCP), NAT, &["10.78.0.11:8080"]);
    for port in 20000..20016 {
        kernel.open(&format!("10.77.0.10:{port}"));
    }
    let toward = kernel.sent(&Packet::tcp(CLIENT, VIP, SYN, 1000, 0));
    let synack = Transport::Tcp { flags: SYN | ACK, sequence: 5000, acknowledgement: 1001 };
    kernel.sent(&toward.answer(synack));
    for _ in 0..3 {
        kernel.fate(&Packet::tcp(CLIENT, VIP, ACK, 1001, 5001));
    }
    assert_eq!(kernel.flows().len(), 16);
    assert_eq!(kernel.live(), [16, 16]);
    // The flows themselves end as ever.
    for port in 20000..20016 {
        kernel.sent(&Packet::tcp(&format!("10.77.0.10:{port}"), VIP, RST, 1001, 0));
    }
    assert_eq!(kernel.live(), [0, 0]);
}

#[test]
fn a_flood_of_beginnings_does_not_count() {
    let kernel = kernel(forward_mode::MODE_NAT, TCP);
    for n in 0..2000_u32 {
        let client = format!("10.79.{}.{}:{}", n >> 8, n & 0xff, 1024 + n);
        kernel.sent(&Packet::tcp(&client, VIP, SYN, n, 0));
    }
    assert_eq!(kernel.live(), [0, 0]);
}
