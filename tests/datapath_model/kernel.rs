//! The programs under test, loaded once and told the lab's configuration; between stories their
//! tables are emptied.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use baton::datapath::gate::{Deadline, Gate};
use baton::datapath::load::{Loaded, Sizes};
use baton::datapath::maps::{Maps, Table};
use baton::datapath::record::Record;
use baton::datapath::skeleton::types::{self, backend_state, drop_reason};
use baton::maglev;
use baton_ha::lease;
use libbpf_rs::ProgramInput;
use nix::net::if_::if_nametoindex;

use crate::flows::{Key, Numbers, ReplyKey};
use crate::lab::{self, Backend, Lab, Service, Side};
use crate::rules::Traffic;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    Tc,
    Xdp,
}

/// What a hook did with a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    Passed,
    Dropped,
    Forwarded,
    /// Out of the interface that it came by (XDP).
    Turned,
}

/// An entry of `flows` or `half_flows`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlowEntry {
    pub(crate) backend: u16,
    pub(crate) port: u16,
    pub(crate) flags: u8,
    pub(crate) seen: u32,
    pub(crate) began: u32,
    pub(crate) numbers: Numbers,
}

/// An entry of `replies` or `half_replies`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyEntry {
    pub(crate) key: Key,
    pub(crate) backend: u16,
    pub(crate) flags: u8,
    pub(crate) side: Option<Side>,
    pub(crate) seen: u32,
    pub(crate) isn: u32,
    pub(crate) numbers: Numbers,
}

#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) flows: BTreeMap<Key, FlowEntry>,
    pub(crate) half_flows: BTreeMap<Key, FlowEntry>,
    pub(crate) replies: BTreeMap<ReplyKey, ReplyEntry>,
    pub(crate) half_replies: BTreeMap<ReplyKey, ReplyEntry>,
}

pub(crate) struct Kernel {
    lab: Rc<Lab>,
    loaded: Loaded,
    maps: Maps,
    gate: Gate,
    front: u32,
    back: u32,
    /// Schedules by service and backends: building one takes a while.
    built: HashMap<(u32, u8), Rc<Vec<u16>>>,
    /// What the kernel has.
    schedules: HashMap<u32, u8>,
    states: HashMap<u16, backend_state>,
    identification: u16,
}

/// An hour and more.
const LONG: u64 = 1_000_000;

impl Kernel {
    /// In this thread's namespace, which has the interfaces `front` and `back`.
    pub(crate) fn new(lab: Rc<Lab>) -> Self {
        let sizes = Sizes { flows: lab::FLOWS, half_open_flows: lab::HALF_OPEN, affinities: 64 };
        let loaded = Loaded::unpinned(sizes).expect("loaded");
        let (maps, gate) = (loaded.maps().expect("maps"), loaded.gate().expect("a gate"));
        let front = if_nametoindex("front").unwrap();
        let back = if_nametoindex("back").unwrap();
        let (schedules, states) = (HashMap::new(), HashMap::new());
        let mut kernel = Self {
            lab,
            loaded,
            maps,
            gate,
            front,
            back,
            built: HashMap::new(),
            schedules,
            states,
            identification: 0,
        };
        kernel.configure();
        kernel
    }

    fn configure(&mut self) {
        let lab = Rc::clone(&self.lab);
        for backend in &lab.backends {
            self.configure_backend(backend);
        }
        for service in &lab.services {
            self.configure_service(service);
        }
        for address in lab.addresses() {
            self.maps.addresses.set(&address.into(), &lab.address_use(address)).unwrap();
        }
        for (side, ifindex) in [(Side::Front, self.front), (Side::Back, self.back)] {
            self.configure_ways(side, ifindex);
        }
    }

    /// Of XDP: everybody of the side's network is a neighbour, others are behind its first host.
    fn configure_ways(&self, side: Side, ifindex: u32) {
        let leg = types::leg {
            mac: lab::ethernet(side, 2),
            flags: types::leg_flag::LEG_REDIRECT.0 as u8,
            mtu: 9000,
            ..Default::default()
        };
        self.maps.legs.set(&ifindex, &leg).unwrap();
        for v6 in [false, true] {
            let network = side.network();
            let gateway = lab::address(v6, network, 1);
            let way = |kind: types::way_kind, bits: u32, to: IpAddr, gateway: types::address| {
                let key = types::way_key { prefix: 32 + bits, ifindex, to: to.into() };
                let way = types::way { gateway, kind: kind.0 };
                self.maps.ways.set(&key, &way).unwrap();
            };
            let (on_link, all) = if v6 { (64, 0) } else { (120, 96) };
            let (local, far) = (types::way_kind::WAY_ON_LINK, types::way_kind::WAY_GATEWAY);
            way(local, on_link, lab::address(v6, network, 0), Default::default());
            let any = if v6 { IpAddr::from([0_u8; 16]) } else { IpAddr::from([0_u8; 4]) };
            way(far, all, any, gateway.into());
            for host in [1, 10, 11, 12, 13] {
                let key = types::neighbour_key {
                    address: lab::address(v6, network, host).into(),
                    ifindex,
                };
                let neighbour =
                    types::neighbour { mac: lab::ethernet(side, host as u8), ..Default::default() };
                self.maps.neighbours.set(&key, &neighbour).unwrap();
            }
        }
    }

    fn configure_service(&self, service: &Service) {
        let record = types::service {
            vip: service.listen.ip().into(),
            port: service.listen.port().to_be(),
            protocol: service.protocol,
            mode: service.mode.0 as u8,
            select: service.select.0 as u8,
            seed: service.seed,
            ifindex: self.front,
            half_open_timeout: 1000,
            idle_timeout: lab::IDLE,
            half_close_timeout: lab::HALF_CLOSE,
            closed_timeout: lab::CLOSED,
            ..Default::default()
        };
        self.maps.service_table.set(&service.id, &record).unwrap();
        let key = types::service_key {
            vip: service.listen.ip().into(),
            port: service.listen.port().to_be(),
            protocol: service.protocol,
            ..Default::default()
        };
        self.maps.services.set(&key, &service.id).unwrap();
    }

    fn configure_backend(&self, backend: &Backend) {
        let record = types::backend {
            address: backend.address.ip().into(),
            nat: backend.nat.into(),
            port: backend.address.port().to_be(),
            state: backend_state::BACKEND_UP.0 as u8,
            server: backend.server,
            ifindex: self.back,
            service: backend.service,
            ..Default::default()
        };
        self.maps.backend_table.set(&u32::from(backend.id), &record).unwrap();
        let key = types::server_key {
            address: backend.address.ip().into(),
            port: backend.address.port().to_be(),
            protocol: backend.protocol,
            ..Default::default()
        };
        self.maps.servers.set(&key, &backend.server).unwrap();
    }

    /// As it was at the start: no flow, every backend up and in its schedule, the gate open.
    pub(crate) fn reset(&mut self) {
        let maps = &self.maps;
        clear(&maps.flows);
        clear(&maps.replies);
        clear(&maps.half_flows);
        clear(&maps.half_replies);
        let lab = Rc::clone(&self.lab);
        for backend in &lab.backends {
            if self.states.get(&backend.id) != Some(&backend_state::BACKEND_UP) {
                self.set_state(backend.id, backend_state::BACKEND_UP);
            }
        }
        for service in &lab.services {
            self.set_schedule(service, u8::MAX);
        }
        self.set_gate(true);
    }

    pub(crate) fn set_gate(&self, open: bool) {
        let now = lease::now();
        self.gate.open_until(if open {
            Deadline { jiffies: self.jiffies() + LONG, nanoseconds: u64::MAX / 4 }
        } else {
            // By itself: nobody renews it.
            Deadline { jiffies: self.jiffies(), nanoseconds: now }
        });
    }

    pub(crate) fn set_state(&mut self, id: u16, state: backend_state) {
        let key = u32::from(id);
        let mut record = self.maps.backend_table.find(&key).unwrap().unwrap();
        record.state = state.0 as u8;
        self.maps.backend_table.set(&key, &record).unwrap();
        self.states.insert(id, state);
    }

    /// Gives a service a schedule of some of its backends; returns it.
    pub(crate) fn set_schedule(&mut self, service: &Service, backends: u8) -> Rc<Vec<u16>> {
        let schedule = self.built.entry((service.id, backends)).or_insert_with(|| {
            let chosen = service.backends.iter().enumerate();
            let chosen = chosen.filter(|(nth, _)| backends & 1 << nth != 0);
            let entry = |(_, &id): (_, &u16)| maglev::Entry { id, key: id.into(), weight: 1 };
            Rc::new(maglev::table(&chosen.map(entry).collect::<Vec<_>>()))
        });
        if self.schedules.insert(service.id, backends) != Some(backends) {
            self.maps.schedules.set(service.id, schedule).unwrap();
        }
        Rc::clone(schedule)
    }

    /// One that no datagram had for a while.
    pub(crate) fn next_identification(&mut self) -> u16 {
        self.identification = self.identification.wrapping_add(1);
        self.identification
    }

    pub(crate) fn jiffies(&self) -> u64 {
        self.loaded.jiffies().expect("jiffies")
    }

    /// Hands a frame to a hook: what it did, and the bytes after it. `None`: the kernel does not
    /// take it (a socket buffer has its network header).
    pub(crate) fn run(&self, hook: Hook, frame: &[u8], side: Side) -> Option<(Fate, Vec<u8>)> {
        let ifindex = if side == Side::Front { self.front } else { self.back };
        let (verdict, out) = match hook {
            Hook::Tc => {
                // struct __sk_buff: `ifindex` is its eleventh word.
                let mut context = vec![0; 192];
                context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
                self.hand(self.loaded.tc(), frame, &mut context)?
            }
            Hook::Xdp => {
                // struct xdp_md: data, data_end, data_meta, ingress_ifindex, …
                let mut context = vec![0; 24];
                context[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
                context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
                self.hand(self.loaded.xdp(), frame, &mut context)?
            }
        };
        // TC_ACT_UNSPEC, _SHOT, _REDIRECT; XDP_PASS, _DROP, _TX, _REDIRECT.
        let fate = match (hook, verdict) {
            (Hook::Tc, u32::MAX) | (Hook::Xdp, 2) => Fate::Passed,
            (Hook::Tc, 2) | (Hook::Xdp, 1) => Fate::Dropped,
            (Hook::Tc, 7) | (Hook::Xdp, 4) => Fate::Forwarded,
            (Hook::Xdp, 3) => Fate::Turned,
            (_, other) => panic!("{hook:?} says {other}"),
        };
        Some((fate, out))
    }

    fn hand(
        &self,
        program: &libbpf_rs::ProgramMut<'static>,
        frame: &[u8],
        context: &mut [u8],
    ) -> Option<(u32, Vec<u8>)> {
        let mut out = vec![0; frame.len() + 256];
        let input = ProgramInput {
            context_in: Some(context),
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..Default::default()
        };
        let output = program.test_run(input).ok()?;
        let data = output.data.map(|data| data.to_vec()).unwrap_or_default();
        Some((output.return_value, data))
    }

    /// Time passes for every flow.
    pub(crate) fn age(&self, jiffies: u32) {
        let maps = &self.maps;
        change(&maps.flows, |flow| older_flow(flow, jiffies));
        change(&maps.half_flows, |flow| older_flow(flow, jiffies));
        change(&maps.replies, |reply| reply.seen = reply.seen.wrapping_sub(jiffies));
        change(&maps.half_replies, |half| half.reply.seen = half.reply.seen.wrapping_sub(jiffies));
    }

    /// The collector looks at every flow.
    pub(crate) fn collect(&self) {
        let keys: Vec<_> = entries(&self.maps.flows).into_iter().map(|(key, _)| key).collect();
        let mut sweep = types::sweep { count: keys.len() as u32, ..Default::default() };
        sweep.keys[..keys.len()].copy_from_slice(&keys);
        self.maps.sweep.set(&0, &sweep).unwrap();
        self.loaded.collect().unwrap();
    }

    pub(crate) fn drops(&self) -> Vec<u64> {
        let count = |reason| self.maps.drops.find_per_cpu(&reason).unwrap().iter().sum();
        (0..drop_reason::DROP_REASONS.0).map(count).collect()
    }

    pub(crate) fn service_traffic(&self, id: u32) -> Traffic {
        total(&self.maps.service_traffic.find_per_cpu(&id).unwrap())
    }

    pub(crate) fn backend_traffic(&self, id: u16) -> Traffic {
        total(&self.maps.backend_traffic.find_per_cpu(&id.into()).unwrap())
    }

    pub(crate) fn tables(&self) -> Tables {
        let flow = |(key, flow): (types::flow_key, types::flow)| {
            let entry = FlowEntry {
                backend: flow.backend,
                port: u16::from_be(flow.nat_port),
                flags: flow.flags,
                seen: flow.seen,
                began: flow.began,
                numbers: numbers(&flow.numbers),
            };
            (
                Key {
                    client: (key.client.into(), u16::from_be(key.port)),
                    service: key.service.into(),
                },
                entry,
            )
        };
        let reply = |key: types::reply_key, reply: types::reply, isn| {
            let to = (IpAddr::from(key.address), u16::from_be(key.port));
            let client = (reply.client.into(), u16::from_be(reply.port));
            let entry = ReplyEntry {
                key: Key { client, service: reply.service.into() },
                backend: reply.backend,
                flags: reply.flags,
                side: [(self.front, Side::Front), (self.back, Side::Back)]
                    .into_iter()
                    .find_map(|(ifindex, side)| (ifindex == reply.ifindex).then_some(side)),
                seen: reply.seen,
                isn,
                numbers: numbers(&reply.numbers),
            };
            (ReplyKey { to, server: key.server }, entry)
        };
        let maps = &self.maps;
        Tables {
            flows: entries(&maps.flows).into_iter().map(flow).collect(),
            half_flows: entries(&maps.half_flows).into_iter().map(flow).collect(),
            replies: entries(&maps.replies)
                .into_iter()
                .map(|(key, it)| reply(key, it, 0))
                .collect(),
            half_replies: entries(&maps.half_replies)
                .into_iter()
                .map(|(key, half)| reply(key, half.reply, half.isn))
                .collect(),
        }
    }
}

fn numbers(numbers: &types::numbers) -> Numbers {
    Numbers { end: numbers.end, acknowledged: numbers.acknowledged }
}

fn older_flow(flow: &mut types::flow, jiffies: u32) {
    flow.seen = flow.seen.wrapping_sub(jiffies);
    flow.began = flow.began.wrapping_sub(jiffies);
}

fn entries<K: Record, V: Record>(table: &Table<K, V>) -> Vec<(K, V)> {
    table.slices(256).unwrap().collect()
}

fn clear<K: Record, V: Record>(table: &Table<K, V>) {
    for (key, _) in entries(table) {
        table.remove(&key).unwrap();
    }
}

fn change<K: Record, V: Record>(table: &Table<K, V>, change: impl Fn(&mut V)) {
    for (key, mut value) in entries(table) {
        change(&mut value);
        table.set(&key, &value).unwrap();
    }
}

fn total(traffic: &[types::traffic]) -> Traffic {
    let sum = |field: fn(&types::traffic) -> u64| traffic.iter().map(field).sum();
    Traffic {
        packets_in: sum(|t| t.packets_in),
        bytes_in: sum(|t| t.bytes_in),
        packets_out: sum(|t| t.packets_out),
        bytes_out: sum(|t| t.bytes_out),
        flows_begun: sum(|t| t.flows_begun),
        flows_established: sum(|t| t.flows_established),
    }
}
