//! A datapath in the kernel that is attached to nothing: packets are handed to its TC program.

use std::net::{IpAddr, SocketAddr};

use baton::datapath::gate::{Deadline, Gate};
use baton::datapath::load::{Loaded, Sizes};
use baton::datapath::maps::Maps;
use baton::datapath::skeleton::types;
use baton::maglev;
use libbpf_rs::{ProgramInput, ProgramMut};

use crate::icmp::is_icmp;
use crate::packet::{Packet, carried};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// An hour and more: the gate is open for as long as any test takes.
const LONG: u64 = 1_000_000;

/// What became of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Up the stack, as it was.
    Passed,
    /// Dropped, and counted under this reason alone.
    Dropped(types::drop_reason),
    /// Sent on.
    Sent(Packet),
    /// Sent on, an ICMP message: these bytes, without what may be around it.
    Told(Vec<u8>),
    /// Counted under this reason, and this sent back to where it came from.
    Answered(types::drop_reason, Vec<u8>),
}

pub(crate) struct Kernel {
    loaded: Loaded,
    pub(crate) maps: Maps,
    pub(crate) gate: Gate,
    backends: u16,
}

/// `TC_ACT_*` of linux/pkt_cls.h.
const PASS: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

impl Kernel {
    /// A datapath with an open gate and no service.
    pub(crate) fn new() -> Self {
        Self::with_room(1024, 256)
    }

    pub(crate) fn with_room(flows: u32, half_open_flows: u32) -> Self {
        let loaded =
            Loaded::unpinned(Sizes { flows, half_open_flows, affinities: 64 }).expect("loaded");
        let (maps, gate) = (loaded.maps().expect("maps"), loaded.gate().expect("a gate"));
        let kernel = Self { loaded, maps, gate, backends: 0 };
        kernel.open_gate();
        kernel
    }

    /// For as long as a test takes.
    pub(crate) fn open_gate(&self) {
        let (jiffies, nanoseconds) = (self.jiffies() + LONG, u64::MAX / 4);
        self.gate.open_until(Deadline { jiffies, nanoseconds });
    }

    /// Runs the collector's program on what is in `sweep`.
    pub(crate) fn collect(&self) {
        self.loaded.collect().expect("collected");
    }

    /// VIPs without a service.
    pub(crate) fn vips(&self, addresses: &[&str]) {
        for address in addresses {
            let address: IpAddr = address.parse().unwrap();
            let vip = types::address_use::ADDRESS_VIP.0;
            self.maps.addresses.set(&address.into(), &vip).unwrap();
        }
    }

    pub(crate) fn jiffies(&self) -> u64 {
        self.loaded.jiffies().expect("jiffies")
    }

    /// A service with its backends; `nat` is what packets to them come from. Ids of services are
    /// the caller's, those of backends follow each other.
    pub(crate) fn service(
        &mut self,
        id: u32,
        mode: types::forward_mode,
        (listen, protocol): (&str, u8),
        nat: &str,
        backends: &[&str],
    ) -> Vec<u16> {
        let listen: SocketAddr = listen.parse().unwrap();
        let nat: IpAddr = nat.parse().unwrap();
        let ids: Vec<u16> =
            backends.iter().map(|address| self.backend(id, address, protocol, nat)).collect();
        let entry = |&backend: &u16| maglev::Entry { id: backend, key: backend.into(), weight: 1 };
        let entries: Vec<_> = ids.iter().map(entry).collect();
        self.maps.schedules.set(id, &maglev::table(&entries)).unwrap();
        let service = types::service {
            vip: listen.ip().into(),
            port: listen.port().to_be(),
            protocol,
            mode: mode.0 as u8,
            seed: 0xba70,
            ifindex: 1,
            half_open_timeout: 1000,
            idle_timeout: 1000,
            half_close_timeout: 500,
            closed_timeout: 100,
            ..Default::default()
        };
        self.maps.service_table.set(&id, &service).unwrap();
        let key = types::service_key {
            vip: listen.ip().into(),
            port: listen.port().to_be(),
            protocol,
            ..Default::default()
        };
        self.maps.services.set(&key, &id).unwrap();
        self.maps.addresses.set(&listen.ip().into(), &1).unwrap();
        self.maps.addresses.set(&nat.into(), &2).unwrap();
        ids
    }

    fn backend(&mut self, service: u32, address: &str, protocol: u8, nat: IpAddr) -> u16 {
        self.backends += 1;
        let address: SocketAddr = address.parse().unwrap();
        let key = types::server_key {
            address: address.ip().into(),
            port: address.port().to_be(),
            protocol,
            ..Default::default()
        };
        // The same server under one number, whatever service it is a backend of.
        let server = self.maps.servers.find(&key).unwrap().unwrap_or(u32::from(self.backends));
        self.maps.servers.set(&key, &server).unwrap();
        self.maps.addresses.set(&address.ip().into(), &4).unwrap();
        let record = types::backend {
            address: address.ip().into(),
            nat: nat.into(),
            port: address.port().to_be(),
            state: types::backend_state::BACKEND_UP.0 as u8,
            server,
            ifindex: 1,
            service,
            ..Default::default()
        };
        self.maps.backend_table.set(&u32::from(self.backends), &record).unwrap();
        self.backends
    }

    /// Changes a service's record.
    pub(crate) fn edit_service(&self, id: u32, edit: impl FnOnce(&mut types::service)) {
        let mut record = self.maps.service_table.find(&id).unwrap().unwrap();
        edit(&mut record);
        self.maps.service_table.set(&id, &record).unwrap();
    }

    /// Changes a backend's record.
    pub(crate) fn edit_backend(&self, id: u16, edit: impl FnOnce(&mut types::backend)) {
        let id = u32::from(id);
        let mut record = self.maps.backend_table.find(&id).unwrap().unwrap();
        edit(&mut record);
        self.maps.backend_table.set(&id, &record).unwrap();
    }

    pub(crate) fn set_state(&self, backend: u16, state: types::backend_state) {
        let id = u32::from(backend);
        let mut record = self.maps.backend_table.find(&id).unwrap().unwrap();
        record.state = state.0 as u8;
        self.maps.backend_table.set(&id, &record).unwrap();
    }

    /// How long a packet the way to a backend takes.
    pub(crate) fn set_mtu(&self, backend: u16, mtu: u32) {
        let id = u32::from(backend);
        let mut record = self.maps.backend_table.find(&id).unwrap().unwrap();
        record.mtu = mtu;
        self.maps.backend_table.set(&id, &record).unwrap();
    }

    /// How often a reason was counted, over all CPUs.
    pub(crate) fn drops(&self, reason: types::drop_reason) -> u64 {
        self.maps.drops.find_per_cpu(&reason.0).unwrap().iter().sum()
    }

    fn all_drops(&self) -> Vec<u64> {
        (0..types::drop_reason::DROP_REASONS.0)
            .map(|reason| self.drops(types::drop_reason(reason)))
            .collect()
    }

    /// What the TC hook does with bytes: its verdict and the bytes after it.
    pub(crate) fn run(&self, bytes: &[u8]) -> (u32, Vec<u8>) {
        run(self.loaded.tc(), bytes)
    }

    /// What the XDP hook does with bytes that come by an interface of this thread's namespace: its
    /// verdict and the bytes after it.
    pub(crate) fn run_xdp(&self, bytes: &[u8], ifindex: u32) -> (u32, Vec<u8>) {
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let context = [0, bytes.len() as u32, 0, ifindex, 0, 0];
        let mut context: Vec<u8> = context.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = vec![0; bytes.len() + 256];
        let input = ProgramInput {
            context_in: Some(&mut context),
            data_in: Some(bytes),
            data_out: Some(&mut out),
            ..Default::default()
        };
        let output = self.loaded.xdp().test_run(input).expect("the kernel takes the frame");
        let data = output.data.map(|data| data.to_vec()).unwrap_or_default();
        (output.return_value, data)
    }

    /// The same for bytes that may be no packet.
    pub(crate) fn fate_of_bytes(&self, bytes: &[u8]) -> Fate {
        self.fate_by(bytes, self.loaded.tc())
    }

    /// What becomes of what the stack sends.
    pub(crate) fn sends(&self, bytes: &[u8]) -> Fate {
        self.fate_by(bytes, self.loaded.egress())
    }

    fn fate_by(&self, bytes: &[u8], program: &ProgramMut<'_>) -> Fate {
        let before = self.all_drops();
        let (verdict, out) = run(program, bytes);
        let after = self.all_drops();
        let counted: Vec<u32> = (0..after.len())
            .flat_map(|at| (before[at]..after[at]).map(move |_| at as u32))
            .collect();
        match verdict {
            PASS => {
                assert_eq!(out, bytes, "passed, and changed");
                assert_eq!(counted, [] as [u32; 0], "passed, and counted as dropped");
                Fate::Passed
            }
            SHOT => {
                assert_eq!(counted.len(), 1, "dropped under {counted:?}");
                Fate::Dropped(types::drop_reason(counted[0]))
            }
            REDIRECT => match counted[..] {
                [] => match carried(&out).unwrap_or_else(|| out.clone()) {
                    message if is_icmp(&message) => Fate::Told(message),
                    _ => Fate::Sent(Packet::read(&out)),
                },
                [reason] => Fate::Answered(types::drop_reason(reason), out),
                _ => panic!("sent, and counted as dropped under {counted:?}"),
            },
            other => panic!("verdict {other}"),
        }
    }

    pub(crate) fn fate(&self, packet: &Packet) -> Fate {
        self.fate_of_bytes(&packet.bytes())
    }

    /// A packet that must be sent on.
    pub(crate) fn sent(&self, packet: &Packet) -> Packet {
        match self.fate(packet) {
            Fate::Sent(sent) => sent,
            other => panic!("{packet:?}: {other:?}"),
        }
    }

    /// Why a packet was refused, of which its sender is told.
    pub(crate) fn refused(&self, packet: &Packet) -> types::drop_reason {
        match self.fate(packet) {
            Fate::Answered(reason, _) => reason,
            other => panic!("{packet:?}: {other:?}"),
        }
    }

    pub(crate) fn flows(&self) -> Vec<(types::flow_key, types::flow)> {
        self.maps.flows.slices(256).unwrap().collect()
    }
}

/// What a TC program does with bytes.
fn run(program: &ProgramMut<'_>, bytes: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; bytes.len() + 256];
    let input =
        ProgramInput { data_in: Some(bytes), data_out: Some(&mut out), ..Default::default() };
    let output = program.test_run(input).expect("the kernel takes the packet");
    let data = output.data.map(|data| data.to_vec()).unwrap_or_default();
    (output.return_value, data)
}
