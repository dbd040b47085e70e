//! The model: what becomes of a frame, as the documents have it. Plain, and slow.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;

use baton::datapath::skeleton::types::{backend_state, drop_reason, forward_mode, select_by};

use crate::flows::{self, Flow, Flows, Key, Moment, Numbers, ReplyKey};
use crate::lab::{self, Backend, Lab, Service, Side};
use crate::reading::{Fragment, Reading, View, read, u16_at};
use crate::wire::{
    ACK, ETHERNET, FIN, RST, SYN, TCP, UDP, checksum, checksum_at, octets, seal_ipv4, sum,
};

/// What becomes of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Up the stack, as it was.
    Pass,
    Drop(drop_reason),
    /// Dropped as its TTL ends, and its sender is told (but not too often).
    TimeExceeded,
    /// Dropped, since its flow is over or can't begin, and its sender is told: by a RST, of UDP
    /// that nobody listens.
    Refused(drop_reason),
    /// Sent on as these bytes (but for the Ethernet addresses), by way of that host, out of
    /// that side.
    Forward {
        bytes: Vec<u8>,
        next_hop: IpAddr,
        out: Side,
    },
}

/// Of a service or a backend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) packets_in: u64,
    pub(crate) bytes_in: u64,
    pub(crate) packets_out: u64,
    pub(crate) bytes_out: u64,
    pub(crate) flows_begun: u64,
    pub(crate) flows_established: u64,
}

#[derive(Debug)]
pub(crate) struct Model {
    lab: Rc<Lab>,
    pub(crate) gate_is_open: bool,
    pub(crate) states: HashMap<u16, backend_state>,
    pub(crate) schedules: HashMap<u32, Rc<Vec<u16>>>,
    pub(crate) flows: Flows,
    /// What became of first fragments: a plan, or up the stack.
    fragments: HashMap<Datagram, Option<Plan>>,
    pub(crate) services: HashMap<u32, Traffic>,
    pub(crate) backends: HashMap<u16, Traffic>,
    pub(crate) drops: HashMap<u32, u64>,
}

/// A rule's end.
type Result<T> = std::result::Result<T, Verdict>;

fn dropped<T>(reason: drop_reason) -> Result<T> {
    Err(Verdict::Drop(reason))
}

/// How a packet goes on.
#[derive(Debug, Clone)]
struct Plan {
    /// What it is to look like; `None`: as it is.
    ends: Option<Ends>,
    next_hop: IpAddr,
    out: Side,
    service: u32,
    backend: u16,
    inward: bool,
}

#[derive(Debug, Clone)]
struct Ends {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
}

/// What the fragments of a datagram share: ends, identification, of IPv4 the protocol.
type Datagram = (IpAddr, IpAddr, u32, u8);

impl Model {
    pub(crate) fn new(lab: Rc<Lab>) -> Self {
        let states = lab.backends.iter().map(|backend| (backend.id, backend_state::BACKEND_UP));
        Self {
            states: states.collect(),
            lab,
            gate_is_open: true,
            schedules: HashMap::new(),
            flows: Flows::default(),
            fragments: HashMap::new(),
            services: HashMap::new(),
            backends: HashMap::new(),
            drops: HashMap::new(),
        }
    }

    /// A frame that came by that side at that moment.
    pub(crate) fn frame(&mut self, frame: &[u8], side: Side, now: Moment) -> Verdict {
        let verdict = match self.judge(frame, side, now) {
            Ok(never) | Err(never) => never,
        };
        if let Verdict::Drop(reason) = verdict {
            *self.drops.entry(reason.0).or_default() += 1;
        }
        verdict
    }

    fn judge(&mut self, frame: &[u8], side: Side, now: Moment) -> Result<Verdict> {
        let view = match read(frame) {
            Reading::Cut => return dropped(drop_reason::DROP_TRUNCATED),
            Reading::Other(destination) => {
                self.stack(destination)?;
                return Ok(Verdict::Pass);
            }
            // Other people's broken packets are none of our business.
            Reading::Broken(destination, _) if !self.is_ours(destination) => {
                return Ok(Verdict::Pass);
            }
            Reading::Broken(_, reason) => return dropped(reason),
            Reading::Good(view) => view,
        };
        let datagram = datagram_of(&view);
        if view.fragment == Fragment::Later {
            let plan = self.follow(&view, &datagram)?;
            return Ok(self.carry_out(frame, &view, plan));
        }
        let plan = self.plan(&view, side, now);
        if view.fragment == Fragment::First {
            let is_noted = self.is_ours(view.destination.0) || self.is_server(view.source.0);
            match &plan {
                Ok(Some(plan)) => drop(self.fragments.insert(datagram, Some(plan.clone()))),
                Ok(None) if is_noted => drop(self.fragments.insert(datagram, None)),
                Ok(None) => {}
                Err(_) => drop(self.fragments.remove(&datagram)),
            }
        }
        let plan = plan?;
        Ok(self.carry_out(frame, &view, plan))
    }

    /// Sends on what has a plan, and counts it.
    fn carry_out(&mut self, frame: &[u8], view: &View, plan: Option<Plan>) -> Verdict {
        let Some(plan) = plan else { return Verdict::Pass };
        for traffic in self.traffic(plan.service, plan.backend) {
            if plan.inward {
                traffic.packets_in += 1;
                traffic.bytes_in += view.length as u64;
            } else {
                traffic.packets_out += 1;
                traffic.bytes_out += view.length as u64;
            }
        }
        let bytes = plan.ends.map_or_else(|| frame.to_vec(), |ends| rewritten(frame, view, &ends));
        Verdict::Forward { bytes, next_hop: plan.next_hop, out: plan.out }
    }

    /// A later fragment goes the way of its first.
    fn follow(&self, view: &View, datagram: &Datagram) -> Result<Option<Plan>> {
        let is_ours = self.is_ours(view.destination.0);
        let first = self.fragments.get(datagram);
        if !self.gate_is_open {
            let of_a_flow = matches!(first, Some(Some(_)));
            return if is_ours || of_a_flow {
                dropped(drop_reason::DROP_GATE_CLOSED)
            } else {
                Ok(None)
            };
        }
        match first {
            // Nobody here holds it until its first comes.
            None if is_ours => dropped(drop_reason::DROP_EARLY_FRAGMENT),
            None | Some(None) => Ok(None),
            Some(Some(_)) if view.ttl <= 1 => dropped(drop_reason::DROP_TTL),
            Some(Some(plan)) => Ok(Some(plan.clone())),
        }
    }

    /// What is to become of a packet that has ports; `None`: up the stack.
    fn plan(&mut self, view: &View, side: Side, now: Moment) -> Result<Option<Plan>> {
        let lab = Rc::clone(&self.lab);
        let to = |service: &&Service| {
            (service.listen.ip(), service.listen.port()) == view.destination
                && service.protocol == view.protocol
        };
        if let Some(service) = lab.services.iter().find(to) {
            if service.mode == forward_mode::MODE_PROXY {
                return self.stack(Some(view.destination.0));
            }
            return self.for_service(view, service, side, now);
        }
        let from = |backend: &&Backend| {
            (backend.address.ip(), backend.address.port()) == view.source
                && backend.protocol == view.protocol
        };
        match lab.backends.iter().find(from) {
            Some(backend) => self.of_server(view, backend.server, now),
            None => self.stack(Some(view.destination.0)),
        }
    }

    fn is_ours(&self, address: IpAddr) -> bool {
        self.lab.address_use(address.to_canonical()) & 3 != 0
    }

    /// Up the stack, unless it is for an address of ours and the gate is closed.
    fn stack(&self, destination: Option<IpAddr>) -> Result<Option<Plan>> {
        if !self.gate_is_open && destination.is_some_and(|address| self.is_ours(address)) {
            return dropped(drop_reason::DROP_GATE_CLOSED);
        }
        Ok(None)
    }

    fn is_server(&self, address: IpAddr) -> bool {
        self.lab.backends.iter().any(|backend| backend.address.ip() == address)
    }

    /// From a client.
    fn for_service(
        &mut self,
        view: &View,
        service: &Service,
        side: Side,
        now: Moment,
    ) -> Result<Option<Plan>> {
        if !self.gate_is_open {
            return dropped(drop_reason::DROP_GATE_CLOSED);
        }
        if no_host_sends_from(view.source.0) {
            return dropped(drop_reason::DROP_BAD_SOURCE);
        }
        if view.source.0 == view.destination.0 {
            return dropped(drop_reason::DROP_LAND);
        }
        if view.ttl <= 1 {
            return Err(Verdict::TimeExceeded);
        }
        let key = Key { client: view.source, service: service.id };
        let (backend, port) = self.flow_of(&key, view, service, side, now)?;
        let is_ended =
            self.flows.peek(&key).is_some_and(|flow| flow.client_flags & flows::ENDED != 0);
        let (id, port) = match self.keeps_flows(backend) && !is_ended {
            true => (backend, port),
            false => self.leave(&key, view, service, side, now)?,
        };
        let backend = self.lab.backend(id);
        let to = (backend.address.ip(), backend.address.port());
        let ends = match service.mode {
            forward_mode::MODE_NAT => Some(Ends { source: (backend.nat, port), destination: to }),
            forward_mode::MODE_DNAT => Some(Ends { source: view.source, destination: to }),
            _ => None,
        };
        let (next_hop, out) = (to.0, Side::Back);
        Ok(Some(Plan { ends, next_hop, out, service: service.id, backend: id, inward: true }))
    }

    fn keeps_flows(&self, backend: u16) -> bool {
        let keep = [backend_state::BACKEND_UP, backend_state::BACKEND_DRAINED];
        keep.contains(&self.states[&backend])
    }

    /// The flow's backend has left: TCP is reset, but begins anew with a SYN; UDP's flow is
    /// forgotten, and its client is told.
    fn leave(
        &mut self,
        key: &Key,
        view: &View,
        service: &Service,
        side: Side,
        now: Moment,
    ) -> Result<(u16, u16)> {
        let flow = self.flows.find(key).expect("the flow whose backend has left");
        if view.protocol == TCP && !is_syn(view) {
            if flow.established && flow.client_flags & flows::ENDED == 0 {
                flow.end(now);
            }
            return match view.flags & RST != 0 {
                true => dropped(drop_reason::DROP_BACKEND_DOWN),
                false => Err(Verdict::Refused(drop_reason::DROP_BACKEND_DOWN)),
            };
        }
        self.flows.remove(key);
        match view.protocol {
            UDP => Err(Verdict::Refused(drop_reason::DROP_BACKEND_DOWN)),
            _ => self.begin(key, view, service, side, now),
        }
    }

    /// The backend of a client's packet and the port towards it: of its flow, or of a new one.
    fn flow_of(
        &mut self,
        key: &Key,
        view: &View,
        service: &Service,
        side: Side,
        now: Moment,
    ) -> Result<(u16, u16)> {
        let Some(flow) = self.flows.find(key) else {
            return self.begin(key, view, service, side, now);
        };
        let state = self.states[&flow.backend];
        let is_up = state == backend_state::BACKEND_UP;
        let is_drained = state == backend_state::BACKEND_DRAINED;
        if flow.established {
            if is_syn(view) && flow.is_closed() {
                self.flows.remove(key);
                return self.begin(key, view, service, side, now);
            }
            flow.client_seen = now;
            note(view, &mut flow.client, &mut flow.client_flags);
            if view.flags & RST != 0 {
                reset_by_client(view, flow);
            }
            return Ok((flow.backend, flow.port));
        }
        // A flow that came to nothing before its backend left begins anew with another.
        // What nobody answers is a flow all the same, which a drained one keeps.
        if !is_up && (is_syn(view) || view.protocol == UDP && !is_drained) {
            self.flows.remove(key);
            return self.begin(key, view, service, side, now);
        }
        let chosen = (flow.backend, flow.port);
        flow.client_seen = now;
        note(view, &mut flow.client, &mut flow.client_flags);
        if view.protocol == UDP {
            // With replies, the reply establishes it.
            return if flow.reply.is_some() {
                Ok(chosen)
            } else {
                self.establish(key).map(|()| chosen)
            };
        }
        if is_syn(view) {
            // Once more, or another try from the same port.
            flow.client_flags = 0;
            flow.client.end = view.sequence_end;
            return Ok(chosen);
        }
        if view.flags & RST != 0 {
            let expected = [Some(flow.client.end), flow.reply.map(|_| flow.server.acknowledged)];
            if expected.contains(&Some(view.sequence)) {
                flow.client_flags |= flows::RST;
            }
            return Ok(chosen);
        }
        if flow.client_flags & flows::RST != 0 {
            return Ok(chosen);
        }
        if flow.reply.is_some() && !flow.isn.is_some_and(|isn| confirms(view, isn)) {
            return dropped(drop_reason::DROP_HANDSHAKE);
        }
        self.establish(key)?;
        Ok(chosen)
    }

    /// The first packet of a flow.
    fn begin(
        &mut self,
        key: &Key,
        view: &View,
        service: &Service,
        side: Side,
        now: Moment,
    ) -> Result<(u16, u16)> {
        // Spoofed, or our own that has come back.
        if self.is_ours(view.source.0) {
            return dropped(drop_reason::DROP_BAD_SOURCE);
        }
        if view.protocol == TCP && !is_syn(view) {
            return dropped(drop_reason::DROP_NO_FLOW);
        }
        let Some(id) = self.chosen(service, view) else {
            return Err(Verdict::Refused(drop_reason::DROP_NO_BACKEND));
        };
        let backend = self.lab.backend(id).clone();
        let (port, reply) = match service.mode {
            forward_mode::MODE_NAT => {
                let port = self.free_port(service, &backend, view)?;
                (port, Some(ReplyKey { to: (backend.nat, port), server: backend.server }))
            }
            forward_mode::MODE_DNAT => {
                let reply = ReplyKey { to: view.source, server: backend.server };
                match self.flows.by_reply(&reply) {
                    Some((_, flow)) if flow.established => {
                        return dropped(drop_reason::DROP_PORTS_EXHAUSTED);
                    }
                    // Half-open: the newer takes the tuple.
                    Some((other, _)) => self.flows.remove(&other),
                    None => {}
                }
                (view.source.1, Some(reply))
            }
            _ => (view.source.1, None),
        };
        let flow = Flow {
            backend: id,
            port,
            reply,
            established: false,
            client_flags: 0,
            backend_flags: 0,
            client: Numbers { end: view.sequence_end, acknowledged: 0 },
            server: Numbers::default(),
            isn: None,
            side,
            began: now,
            client_seen: now,
            backend_seen: now,
        };
        self.flows.insert(*key, flow);
        for traffic in self.traffic(service.id, id) {
            traffic.flows_begun += 1;
        }
        Ok((id, port))
    }

    /// A slot of the schedule: a hash of the client's address and port, or its address alone; a
    /// few more where the backend there takes no new flows; then each backend of the schedule.
    fn chosen(&self, service: &Service, view: &View) -> Option<u16> {
        let schedule = self.schedules.get(&service.id)?;
        let is_up = |id: &u16| self.states.get(id) == Some(&backend_state::BACKEND_UP);
        let mut hash = match service.select {
            select_by::SELECT_SOURCE => hash_address(service.seed, view.source.0),
            _ => hash_flow(service.seed, view.source),
        };
        for nth in 0..6 {
            if nth > 0 {
                hash = mix(hash);
            }
            let id = schedule[(hash % schedule.len() as u64) as usize];
            if is_up(&id) {
                return Some(id);
            }
        }
        let ids: BTreeSet<u16> = schedule.iter().copied().filter(|id| *id != 0).collect();
        let first = (hash as u32).checked_rem(ids.len() as u32)?;
        ids.iter().cycle().skip(first as usize).take(ids.len()).copied().find(is_up)
    }

    /// The first candidate is a hash of the flow, then every 4099th of the ports from 1024 on.
    fn free_port(&mut self, service: &Service, backend: &Backend, view: &View) -> Result<u16> {
        let first = hash_flow(service.seed, view.source) % 64512;
        for nth in 0..128 {
            let port = 1024 + ((first + nth * 4099) % 64512) as u16;
            let key = ReplyKey { to: (backend.nat, port), server: backend.server };
            if self.flows.by_reply(&key).is_none() {
                return Ok(port);
            }
        }
        dropped(drop_reason::DROP_PORTS_EXHAUSTED)
    }

    /// Both ends have shown that they are there.
    fn establish(&mut self, key: &Key) -> Result<()> {
        let flow = self.flows.peek(key).expect("the flow that is being established");
        let (backend, full) = (
            flow.backend,
            self.flows.established() >= lab::FLOWS as usize
                || flow.reply.is_some()
                    && self.flows.established_with_replies() >= lab::FLOWS as usize,
        );
        if full {
            return dropped(drop_reason::DROP_TABLE_FULL);
        }
        let flow = self.flows.find(key).expect("the same");
        flow.established = true;
        for traffic in self.traffic(key.service, backend) {
            traffic.flows_established += 1;
        }
        Ok(())
    }

    /// From a server: a reply, or something of its own.
    fn of_server(&mut self, view: &View, server: u32, now: Moment) -> Result<Option<Plan>> {
        let reply = ReplyKey { to: view.destination, server };
        let gate_is_open = self.gate_is_open;
        let Some((key, flow)) = self.flows.by_reply(&reply) else {
            let passed = self.stack(Some(view.destination.0))?;
            // Servers send to addresses of ours as replies alone.
            return if self.is_ours(view.destination.0) {
                dropped(drop_reason::DROP_REPLY_NO_FLOW)
            } else {
                Ok(passed)
            };
        };
        if !gate_is_open {
            return dropped(drop_reason::DROP_GATE_CLOSED);
        }
        flow.backend_seen = now;
        note(view, &mut flow.server, &mut flow.backend_flags);
        match (flow.established, view.flags & SYN != 0, view.flags & RST != 0) {
            (true, false, false) | (false, false, false) => {}
            (true, ..) => turned_by_backend(view, flow),
            (false, true, _) => {
                flow.isn = Some(view.sequence);
                flow.backend_flags = flows::SYN_ACK;
                flow.server =
                    Numbers { end: view.sequence_end, acknowledged: view.acknowledgement };
            }
            (false, false, true) => flow.backend_flags |= flows::RST,
        }
        let (backend, out) = (flow.backend, flow.side);
        if flow.backend_flags & flows::ENDED != 0 {
            return match view.flags & RST != 0 {
                true => dropped(drop_reason::DROP_BACKEND_DOWN),
                false => Err(Verdict::Refused(drop_reason::DROP_BACKEND_DOWN)),
            };
        }
        if view.protocol == UDP && !flow.established {
            self.establish(&key)?;
        }
        if view.ttl <= 1 {
            return Err(Verdict::TimeExceeded);
        }
        let listen = self.lab.service(key.service).listen;
        Ok(Some(Plan {
            ends: Some(Ends { source: (listen.ip(), listen.port()), destination: key.client }),
            next_hop: key.client.0,
            out,
            service: key.service,
            backend,
            inward: false,
        }))
    }

    /// The collector has looked at every established flow.
    pub(crate) fn collect(&mut self, now: Moment) {
        let (states, lab, gate_is_open) = (&self.states, &self.lab, self.gate_is_open);
        self.flows.retain(|key, flow| {
            let is_tcp = lab.service(key.service).protocol == TCP;
            let left = match states[&flow.backend] {
                backend_state::BACKEND_GONE => true,
                // Of UDP, the client is told when it sends.
                backend_state::BACKEND_DOWN => is_tcp,
                _ => false,
            };
            let is_ended = flow.client_flags & flows::ENDED != 0;
            if flow.established && gate_is_open && left && !is_ended {
                if !is_tcp || flow.is_closed() {
                    return false;
                }
                flow.end(now);
            }
            let fin_or_doubt = flows::FIN | flows::DOUBT;
            let fin = (flow.client_flags | flow.backend_flags) & fin_or_doubt != 0;
            let timeout = match (flow.is_closed(), fin) {
                (true, _) => lab::CLOSED,
                (_, true) => lab::HALF_CLOSE,
                _ => lab::IDLE,
            };
            let mut age = now.1.wrapping_sub(flow.client_seen.0) as i32;
            if flow.reply.is_some() {
                age = age.min(now.1.wrapping_sub(flow.backend_seen.0) as i32);
            }
            !flow.established || age < timeout as i32
        });
    }

    /// Time has passed.
    pub(crate) fn age(&mut self, jiffies: u32) {
        let earlier = |moment: &mut Moment| {
            *moment = (moment.0.wrapping_sub(jiffies), moment.1.wrapping_sub(jiffies));
        };
        self.flows.retain(|_, flow| {
            earlier(&mut flow.began);
            earlier(&mut flow.client_seen);
            earlier(&mut flow.backend_seen);
            true
        });
    }

    fn traffic(&mut self, service: u32, backend: u16) -> [&mut Traffic; 2] {
        [self.services.entry(service).or_default(), self.backends.entry(backend).or_default()]
    }
}

fn datagram_of(view: &View) -> Datagram {
    let (source, destination) = (view.source.0, view.destination.0);
    // RFC 791 §3.2, RFC 8200 §4.5.
    let protocol = if source.is_ipv4() { view.protocol } else { 0 };
    (source, destination, view.identification, protocol)
}

fn is_syn(view: &View) -> bool {
    view.protocol == TCP && view.flags & (SYN | ACK | RST) == SYN
}

/// Bytes that may be in flight in one direction.
const IN_FLIGHT: u32 = 4 << 20;

/// What a segment shows of its direction. SYN and RST are judged apart.
fn note(view: &View, numbers: &mut Numbers, flags: &mut u8) {
    if view.protocol != TCP || view.flags & (SYN | RST) != 0 {
        return;
    }
    let was_learnt = *flags & flows::LEARNT != 0;
    *flags &= !(flows::DOUBT | flows::LEARNT);
    if view.flags & ACK != 0 {
        numbers.acknowledged = view.acknowledgement;
    }
    if view.sequence_end.wrapping_sub(numbers.end) < IN_FLIGHT || was_learnt {
        numbers.end = view.sequence_end;
    }
    // Near what the direction has sent.
    let off = view.sequence_end.wrapping_sub(numbers.end) as i32;
    if view.flags & FIN != 0 && off.unsigned_abs() <= IN_FLIGHT {
        *flags |= flows::FIN;
    }
}

/// What a RST is worth: `Some(true)`: it is exactly what the other end has acknowledged (RFC 5961
/// §3.2); `Some(false)`: it may be right, and the other end will tell.
fn reset_is_right(view: &View, own: &Numbers, other: &Numbers, other_flags: u8) -> Option<bool> {
    let is_learnt = other_flags & flows::LEARNT != 0;
    let in_flight = view.sequence.wrapping_sub(other.acknowledged) < IN_FLIGHT;
    match view.sequence == other.acknowledged {
        true if !is_learnt => Some(true),
        _ if is_learnt || view.sequence == own.end && in_flight => Some(false),
        _ => None,
    }
}

/// The client's RST on an established flow.
fn reset_by_client(view: &View, flow: &mut Flow) {
    if flow.reply.is_none() {
        // What the client itself has sent is all that there is to go by.
        if flow.client_flags & flows::LEARNT != 0 {
            flow.client_flags |= flows::DOUBT;
        } else if view.sequence == flow.client.end {
            flow.client_flags |= flows::RST;
        }
        return;
    }
    match reset_is_right(view, &flow.client, &flow.server, flow.backend_flags) {
        Some(true) => flow.client_flags |= flows::RST,
        Some(false) => flow.backend_flags |= flows::DOUBT,
        None => {}
    }
}

/// The backend's RST on an established flow, or its SYN+ACK, when both ends begin anew.
fn turned_by_backend(view: &View, flow: &mut Flow) {
    if flow.backend_flags & flows::ENDED != 0 {
        return;
    }
    if view.flags & SYN != 0 {
        flow.server.acknowledged = view.acknowledgement;
        if view.sequence_end != flow.server.end {
            flow.server.end = view.sequence_end;
            flow.backend_flags = flows::SYN_ACK;
            flow.client_flags = flows::LEARNT;
        }
        return;
    }
    match reset_is_right(view, &flow.server, &flow.client, flow.client_flags) {
        Some(true) => flow.backend_flags |= flows::RST,
        Some(false) => flow.client_flags |= flows::DOUBT,
        None => {}
    }
}

/// The first segment after the SYN+ACK confirms its number, or one a little further on.
fn confirms(view: &View, isn: u32) -> bool {
    view.flags & ACK != 0 && view.acknowledgement.wrapping_sub(isn.wrapping_add(1)) < 65536
}

/// RFC 1122 §3.2.1.3, RFC 6890: "this network", loopback, multicast, reserved, broadcast; RFC 4291.
fn no_host_sends_from(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_loopback() || v4.octets()[0] >= 224,
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_loopback() || v6.is_unspecified(),
    }
}

/// SplitMix64's finalizer.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

fn hash_address(seed: u64, address: IpAddr) -> u64 {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    mix(mix(seed ^ (bits >> 64) as u64) ^ bits as u64)
}

fn hash_flow(seed: u64, (client, port): (IpAddr, u16)) -> u64 {
    mix(hash_address(seed, client) ^ u64::from(port))
}

/// A frame with other ends and one hop less. Checksums are not adjusted but taken anew: the
/// network header's over all of it; the transport's so that what the sum over the whole segment
/// was off by (0 if it was right), it is off by still.
fn rewritten(frame: &[u8], view: &View, ends: &Ends) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    let (source, destination) = (octets(ends.source.0), octets(ends.destination.0));
    if source.len() == 4 {
        bytes[ETHERNET + 8] -= 1;
        bytes[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&source);
        bytes[ETHERNET + 16..ETHERNET + 20].copy_from_slice(&destination);
        seal_ipv4(&mut bytes[ETHERNET..]);
    } else {
        bytes[ETHERNET + 7] -= 1;
        bytes[ETHERNET + 8..ETHERNET + 24].copy_from_slice(&source);
        bytes[ETHERNET + 24..ETHERNET + 40].copy_from_slice(&destination);
    }
    if view.fragment == Fragment::Later {
        return bytes;
    }
    let segment = view.transport..ETHERNET + view.length;
    let at = view.transport + checksum_at(view.protocol);
    bytes[view.transport..][..2].copy_from_slice(&ends.source.1.to_be_bytes());
    bytes[view.transport + 2..][..2].copy_from_slice(&ends.destination.1.to_be_bytes());
    // RFC 768: 0 means that there is none.
    if view.protocol == UDP && u16_at(frame, at) == 0 {
        return bytes;
    }
    let before = sum(&octets(view.source.0)) + sum(&octets(view.destination.0));
    let off_by = (before + sum(&frame[segment.clone()])) % 65535;
    bytes[at..at + 2].fill(0);
    let rest = sum(&source) + sum(&destination) + sum(&bytes[segment]);
    // What would make it right is ~rest; off by as much as before is that, more.
    let field = ((u64::from(checksum(rest)) + off_by) % 65535) as u16;
    // The pseudo-header's protocol and length are in neither sum.
    let field = if view.protocol == UDP && field == 0 { 0xffff } else { field };
    bytes[at..at + 2].copy_from_slice(&field.to_be_bytes());
    bytes
}
