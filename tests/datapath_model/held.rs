//! The kernel held against the model: a story goes through both, and whatever differs is said.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use baton::datapath::skeleton::types::drop_reason;
use baton::lab::netns::Netns;

use crate::flows::{Flow, Key, Moment, ReplyKey};
use crate::kernel::{Fate, Hook, Kernel, Tables};
use crate::lab::{self, Lab, SERVICES_OF_A_FAMILY, STATES, Side, address};
use crate::reading::{Fragment, Reading, View, read};
use crate::rules::{Model, Traffic, Verdict};
use crate::story::{Acknowledges, Client, Frame, Odd, Step, Way};
use crate::wire::{
    ACK, ETHERNET, Layers, Parts, RST, TCP, UDP, comes_out, octets, pseudo, seal_ipv4, sum,
};

const PORTS: [u16; 8] = [40000, 40001, 40002, 53, 8080, 5353, 0, 65535];

/// Clients, and what pretends to be one: by number, of a family.
fn client_address(v6: bool, host: usize) -> (IpAddr, Side) {
    let front = |text4: &str, text6: &str| {
        let text = if v6 { text6 } else { text4 };
        (text.parse().unwrap(), Side::Front)
    };
    match host {
        0 => (address(v6, 77, 10), Side::Front),
        1 => (address(v6, 77, 11), Side::Front),
        2 => front("192.0.2.7", "2001:db8::7"),
        // A backend that is a client.
        3 => (address(v6, 78, 12), Side::Back),
        4 => (address(v6, 77, 0x100), Side::Front),
        5 => (address(v6, 78, 0x100), Side::Front),
        6 => front("0.0.0.0", "::"),
        7 => front("127.0.0.1", "::1"),
        8 => front("224.0.0.1", "ff02::1"),
        9 => front("255.255.255.255", "ff0e::77"),
        10 => front("240.0.0.1", "fe80::1"),
        _ => front("0.1.2.3", "::2"),
    }
}

/// Both kernels, in a namespace of their own.
pub(crate) struct Held {
    lab: Rc<Lab>,
    tc: Kernel,
    xdp: Kernel,
}

/// Runs `work` in the thread of a namespace with routes and neighbours.
pub(crate) fn in_a_relay(work: impl FnOnce(&mut Held) + Send) {
    let relay = Relay::new();
    relay.0.enter(|| work(&mut Held::new())).unwrap()
}

struct Relay(Netns);

impl Relay {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let relay = Self(Netns::create(&format!("bt-mod{}-{count}", std::process::id())).unwrap());
        for side in ["front", "back"] {
            relay.0.ip(&format!("link add {side} type veth peer name {side}-peer")).unwrap();
        }
        relay
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.remove();
    }
}

/// What was counted before a story began.
struct Before {
    services: BTreeMap<u32, Traffic>,
    backends: BTreeMap<u16, Traffic>,
}

impl Held {
    fn new() -> Self {
        let lab = Rc::new(Lab::new());
        let (tc, xdp) = (Kernel::new(Rc::clone(&lab)), Kernel::new(Rc::clone(&lab)));
        Self { lab, tc, xdp }
    }

    /// Whether both hooks do with a story what the model does; if not, what happened, and what
    /// differs.
    pub(crate) fn hold(&mut self, story: &[Step]) -> Result<(), String> {
        for hook in [Hook::Tc, Hook::Xdp] {
            let lab = Rc::clone(&self.lab);
            let kernel = if hook == Hook::Tc { &mut self.tc } else { &mut self.xdp };
            let mut run = Run::new(lab, hook, kernel);
            let began = std::time::Instant::now();
            let outcome = story.iter().try_for_each(|step| run.step(step)).and_then(|()| run.end());
            // Records of fragments last for 2 s: who was held up longer than that proves nothing.
            if began.elapsed().as_millis() > 1500 {
                continue;
            }
            outcome.map_err(|differs| format!("{hook:?}:\n{}{differs}", run.told))?;
        }
        Ok(())
    }

    /// The shortest story that differs still, of one that does: steps are left out, frames made
    /// plainer, one at a time.
    pub(crate) fn cut_down(&mut self, story: &[Step]) -> (Vec<Step>, String) {
        let mut story = story.to_vec();
        let mut differs = self.hold(&story).expect_err("a story that differs");
        loop {
            let smaller = (0..story.len()).rev().flat_map(|at| plainer(&story, at));
            let found = smaller
                .into_iter()
                .find_map(|story| self.hold(&story).err().map(|differs| (story, differs)));
            match found {
                Some((next, why)) => (story, differs) = (next, why),
                None => return (story, differs),
            }
        }
    }
}

/// The story without a step, or with that step's frame without one of its oddities.
fn plainer(story: &[Step], at: usize) -> Vec<Vec<Step>> {
    let mut without = story.to_vec();
    without.remove(at);
    let mut all = vec![without];
    if let Step::Frame(frame) = &story[at] {
        all.extend((0..frame.odd.len()).map(|odd| {
            let mut story = story.to_vec();
            let mut frame = frame.clone();
            frame.odd.remove(odd);
            story[at] = Step::Frame(frame);
            story
        }));
    }
    all
}

struct Run<'a> {
    lab: Rc<Lab>,
    hook: Hook,
    kernel: &'a mut Kernel,
    model: Model,
    before: Before,
    drops: Vec<u64>,
    /// Where flows were when the state of their backend changed last: it, and where it answers to.
    left: BTreeMap<Key, (u16, (IpAddr, u16))>,
    /// Of all datagrams of this story; the kernel may remember those of the one before.
    identification: u16,
    told: String,
}

impl<'a> Run<'a> {
    fn new(lab: Rc<Lab>, hook: Hook, kernel: &'a mut Kernel) -> Self {
        kernel.reset();
        let mut model = Model::new(Rc::clone(&lab));
        for service in &lab.services {
            model.schedules.insert(service.id, kernel.set_schedule(service, u8::MAX));
        }
        let services = lab.services.iter().map(|it| (it.id, kernel.service_traffic(it.id)));
        let backends = lab.backends.iter().map(|it| (it.id, kernel.backend_traffic(it.id)));
        let before = Before { services: services.collect(), backends: backends.collect() };
        let drops = kernel.drops();
        let (identification, told) = (kernel.next_identification(), String::new());
        Self {
            lab,
            hook,
            kernel,
            model,
            before,
            drops,
            left: BTreeMap::new(),
            identification,
            told,
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Frame(frame) => return self.frame(frame),
            Step::Gate { open } => {
                self.kernel.set_gate(*open);
                self.model.gate_is_open = *open;
            }
            Step::State { backend, state } => {
                let id = self.lab.backends[backend % self.lab.backends.len()].id;
                self.kernel.set_state(id, STATES[*state]);
                self.model.states.insert(id, STATES[*state]);
            }
            Step::StateOf { client, state } => {
                let (key, _) = self.key(*client);
                if let Some(flow) = self.model.flows.peek(&key) {
                    let id = flow.backend;
                    if let Some(reply) = flow.reply {
                        self.left.insert(key, (id, reply.to));
                    }
                    self.kernel.set_state(id, STATES[*state]);
                    self.model.states.insert(id, STATES[*state]);
                }
            }
            Step::Schedule { service, backends } => {
                let service = &self.lab.services[*service];
                let schedule = self.kernel.set_schedule(service, *backends);
                self.model.schedules.insert(service.id, schedule);
            }
            Step::Age(jiffies) => {
                self.kernel.age(*jiffies);
                self.model.age(*jiffies);
            }
            Step::Collect => {
                let before = self.kernel.jiffies() as u32;
                self.kernel.collect();
                self.model.collect((before, self.kernel.jiffies() as u32));
            }
        }
        writeln!(self.told, "  {step:?}").unwrap();
        Ok(())
    }

    fn frame(&mut self, frame: &Frame) -> Result<(), String> {
        let (bytes, side) = self.bytes(frame);
        let before = self.kernel.jiffies() as u32;
        // Where the kernel does not take it, neither does the model.
        let Some((fate, out)) = self.kernel.run(self.hook, &bytes, side) else {
            writeln!(self.told, "  (not taken) {frame:?}").unwrap();
            return if matches!(read(&bytes), Reading::Cut) || bytes.len() < ETHERNET {
                Ok(())
            } else {
                Err(format!("the kernel does not take {}", hex(&bytes)))
            };
        };
        let now = (before, self.kernel.jiffies() as u32);
        let expected = self.model.frame(&bytes, side, now);
        writeln!(self.told, "  {frame:?}\n    {} by {side:?}", describe(&bytes)).unwrap();
        writeln!(self.told, "    in  {}\n    out {} {fate:?}", hex(&bytes), hex(&out)).unwrap();
        let counted = self.counted();
        writeln!(self.told, "    counted {counted:?}").unwrap();
        let wrong = |what: &str| Err(format!("{what}; expected {}\n", say(&expected)));
        match &expected {
            Verdict::TimeExceeded | Verdict::Refused(_) => {
                match told(&expected, &bytes, self.hook, &fate, &out, &counted) {
                    Some(what) => wrong(what),
                    None => Ok(()),
                }
            }
            Verdict::Pass if fate != Fate::Passed => wrong("another verdict"),
            Verdict::Pass if out != bytes => wrong("passed, and changed"),
            Verdict::Drop(_) if fate != Fate::Dropped => wrong("another verdict"),
            Verdict::Drop(reason) if counted != [*reason] => wrong("another reason"),
            Verdict::Forward { out: to, .. } if fate != self.forwarded(side, *to) => {
                wrong("another verdict")
            }
            Verdict::Forward { bytes: right, next_hop, out: to } => {
                if out[12..] != right[12..] {
                    return wrong("other bytes");
                }
                if out[..12] != self.ethernet(&bytes, *next_hop, *to) {
                    return wrong("other Ethernet addresses");
                }
                if is_right(&bytes) != is_right(&out) {
                    return wrong("the checksum was right and is wrong, or the other way round");
                }
                if counted.is_empty() { Ok(()) } else { wrong("counted as dropped") }
            }
            Verdict::Pass if !counted.is_empty() => wrong("counted as dropped"),
            _ => Ok(()),
        }
    }

    /// Drops since the last time that it was asked.
    fn counted(&mut self) -> Vec<drop_reason> {
        let now = self.kernel.drops();
        let before = std::mem::replace(&mut self.drops, now);
        let counts = self.drops.iter().zip(before).enumerate();
        counts
            .flat_map(|(reason, (now, before))| {
                (before..*now).map(move |_| drop_reason(reason as u32))
            })
            .collect()
    }

    /// What a hook says of a frame that goes on.
    fn forwarded(&self, from: Side, to: Side) -> Fate {
        if self.hook == Hook::Xdp && from == to { Fate::Turned } else { Fate::Forwarded }
    }

    /// The Ethernet addresses of a frame that goes on. The TC hook leaves them to the kernel.
    fn ethernet(&self, frame: &[u8], next_hop: IpAddr, out: Side) -> Vec<u8> {
        if self.hook == Hook::Tc {
            return frame[..12].to_vec();
        }
        let network = octets(address(next_hop.is_ipv6(), out.network(), 0));
        let shared = if next_hop.is_ipv6() { 8 } else { 3 };
        let is_neighbour = network[..shared] == octets(next_hop)[..shared];
        let host = if is_neighbour { lab::ethernet_host(next_hop) } else { 1 };
        [lab::ethernet(out, host), lab::ethernet(out, 2)].concat()
    }

    /// A frame's bytes, and the side that it comes by.
    fn bytes(&self, frame: &Frame) -> (Vec<u8>, Side) {
        let (mut parts, side, flow) = self.parts(frame);
        let isn = flow.and_then(|key| self.model.flows.peek(&key)?.isn).unwrap_or(0);
        let acknowledgement = match frame.acknowledges {
            Acknowledges::This(number) => number,
            Acknowledges::SynAck(more) => isn.wrapping_add(1).wrapping_add_signed(more),
        };
        parts.tcp = (frame.flags, frame.sequence, acknowledgement);
        for odd in &frame.odd {
            odd.apply_to_parts(&mut parts);
        }
        let (mut bytes, layers) = parts.build();
        for odd in &frame.odd {
            odd.apply_to_bytes(&mut bytes, layers, parts.protocol);
        }
        let side = match (side, frame.wrong_side) {
            (Side::Front, false) | (Side::Back, true) => Side::Front,
            _ => Side::Back,
        };
        (bytes, side)
    }

    /// The ends, the side, and the flow that it is meant for.
    fn parts(&self, frame: &Frame) -> (Parts, Side, Option<Key>) {
        let ends = |source, destination, protocol| Parts {
            source,
            destination,
            protocol,
            tcp: (0, 0, 0),
            ttl: frame.ttl,
            identification: self.identification,
            payload: frame.payload,
            tags: vec![],
            option_words: 0,
            fragment: 0,
            extensions: vec![],
        };
        let endpoint = |address: std::net::SocketAddr| (address.ip(), address.port());
        match &frame.way {
            Way::In(client) => {
                let (key, side) = self.key(*client);
                let service = self.lab.service(key.service);
                (ends(key.client, endpoint(service.listen), service.protocol), side, Some(key))
            }
            Way::Late(client) => {
                let (key, side) = self.key(*client);
                match self.left.get(&key) {
                    Some(&(backend, to)) => {
                        let from = self.lab.backend(backend);
                        (ends(endpoint(from.address), to, from.protocol), Side::Back, None)
                    }
                    None => {
                        let service = self.lab.service(key.service);
                        (ends(key.client, endpoint(service.listen), service.protocol), side, None)
                    }
                }
            }
            Way::Out(client) => {
                let (key, _) = self.key(*client);
                let service = self.lab.service(key.service);
                let first = self.lab.backend(service.backends[0]);
                let flow = self.model.flows.peek(&key);
                let (from, to) = match flow.and_then(|flow| Some((flow.backend, flow.reply?.to))) {
                    Some((backend, to)) => (self.lab.backend(backend), to),
                    None => (first, (first.nat, key.client.1 | 1024)),
                };
                (ends(endpoint(from.address), to, from.protocol), Side::Back, None)
            }
            &Way::Forged { v6, backend, to, port } => {
                let of_a_family: Vec<_> =
                    self.lab.backends.iter().filter(|it| it.address.is_ipv6() == v6).collect();
                let from = of_a_family[backend % of_a_family.len()];
                let known = self.model.flows.iter().filter_map(|(_, flow)| flow.reply);
                let mut known = known.filter(|reply| reply.to.0.is_ipv6() == v6);
                let to = match to {
                    0 => (from.nat, port),
                    1 => (address(v6, 77, 0x100), port),
                    2 => (address(v6, 78, 2), port),
                    3 => (address(v6, 77, 10), 40000),
                    4 => (address(v6, 78, 13), port),
                    // Where another server sends to.
                    _ => known.next().map_or((from.nat, port), |reply| reply.to),
                };
                (ends(endpoint(from.address), to, from.protocol), Side::Back, None)
            }
            Way::Stray { client, to } => {
                let (key, side) = self.key(*client);
                let service = self.lab.service(key.service);
                let to = match to {
                    0 => (service.listen.ip(), 22),
                    1 => (address(client.v6, 77, 2), service.listen.port()),
                    2 => (address(client.v6, 78, 11), 8080),
                    _ => (address(client.v6, 78, 0x100), 40000),
                };
                (ends(key.client, to, service.protocol), side, None)
            }
            &Way::Mapped { service, source } => {
                let service = &self.lab.services[service];
                let mapped = |address| match address {
                    IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
                    v6 => v6,
                };
                let client = |v6| (client_address(v6, 0).0, 40000);
                if source {
                    let sixth = &self.lab.services[service.id as usize - 1 + SERVICES_OF_A_FAMILY];
                    let client = (mapped(client(false).0), 40000);
                    return (
                        ends(client, endpoint(sixth.listen), sixth.protocol),
                        Side::Front,
                        None,
                    );
                }
                let vip = (mapped(service.listen.ip()), service.listen.port());
                (ends(client(true), vip, service.protocol), Side::Front, None)
            }
        }
    }

    fn key(&self, client: Client) -> (Key, Side) {
        let service = client.service + if client.v6 { SERVICES_OF_A_FAMILY } else { 0 };
        let (address, side) = client_address(client.v6, client.host);
        let port = PORTS.get(client.port).copied().unwrap_or(41000 + client.port as u16);
        (Key { client: (address, port), service: service as u32 + 1 }, side)
    }

    /// Tables and counters, after the last step.
    fn end(&mut self) -> Result<(), String> {
        self.hold_flows()?;
        for service in &self.lab.services {
            let expected = self.model.services.get(&service.id).copied().unwrap_or_default();
            let counted =
                since(self.kernel.service_traffic(service.id), self.before.services[&service.id]);
            same(&format!("traffic of service {}", service.id), &counted, &expected)?;
        }
        for backend in &self.lab.backends {
            let expected = self.model.backends.get(&backend.id).copied().unwrap_or_default();
            let counted =
                since(self.kernel.backend_traffic(backend.id), self.before.backends[&backend.id]);
            same(&format!("traffic of backend {}", backend.id), &counted, &expected)?;
        }
        Ok(())
    }

    fn hold_flows(&self) -> Result<(), String> {
        let Tables { flows, mut half_flows, replies, mut half_replies } = self.kernel.tables();
        // Half of a half-open flow is none: the kernel forgets it when it comes by.
        let model = &self.model.flows;
        let whole = |key: &Key, reply: Option<ReplyKey>| {
            reply.is_none_or(|reply| half_replies.get(&reply).is_some_and(|it| it.key == *key))
        };
        let reply_of = |key: &Key, backend: u16, port: u16| self.reply_key(key, backend, port);
        half_flows.retain(|key, flow| whole(key, reply_of(key, flow.backend, flow.port)));
        half_replies.retain(|reply, half| {
            half_flows
                .get(&half.key)
                .is_some_and(|it| reply_of(&half.key, it.backend, it.port).as_ref() == Some(reply))
        });
        let keys = |established: bool| -> Vec<Key> {
            let of = model.iter().filter(|(_, flow)| flow.established == established);
            of.map(|(key, _)| *key).collect()
        };
        same("flows", &flows.keys().copied().collect(), &keys(true))?;
        same("half-open flows", &half_flows.keys().copied().collect(), &keys(false))?;
        let both: BTreeMap<_, _> = replies.iter().chain(&half_replies).collect();
        let expected = model.iter().filter(|(_, flow)| flow.reply.is_some()).count();
        same("replies", &both.len(), &expected)?;
        for (key, expected) in model.iter() {
            let entry = flows.get(key).or(half_flows.get(key)).expect("the keys are the same");
            let about = |what: &str| format!("{what} of the flow {key:?}");
            same(
                &about("backend, port"),
                &(entry.backend, entry.port),
                &(expected.backend, expected.port),
            )?;
            same(&about("flags"), &entry.flags, &expected.client_flags)?;
            within(&about("beginning"), entry.began, expected.began)?;
            same(&about("numbers"), &entry.numbers, &expected.client)?;
            within(&about("client's last"), entry.seen, expected.client_seen)?;
            let Some(reply_key) = expected.reply else { continue };
            let Some(reply) = both.get(&reply_key) else {
                return Err(format!("no reply {reply_key:?} of {key:?}\n"));
            };
            self.hold_reply(key, expected, reply)?;
        }
        Ok(())
    }

    fn hold_reply(
        &self,
        key: &Key,
        expected: &Flow,
        reply: &crate::kernel::ReplyEntry,
    ) -> Result<(), String> {
        let about = |what: &str| format!("{what} of the reply of {key:?}");
        same(&about("flow, backend"), &(reply.key, reply.backend), &(*key, expected.backend))?;
        same(&about("interface"), &reply.side, &Some(expected.side))?;
        same(&about("flags"), &reply.flags, &expected.backend_flags)?;
        same(&about("numbers"), &reply.numbers, &expected.server)?;
        if let (Some(isn), false) = (expected.isn, expected.established) {
            same(&about("number"), &reply.isn, &isn)?;
        }
        within(&about("backend's last"), reply.seen, expected.backend_seen)
    }

    /// Where the replies of a flow to that backend go; `None`: they do not come by.
    fn reply_key(&self, key: &Key, backend: u16, port: u16) -> Option<ReplyKey> {
        use baton::datapath::skeleton::types::forward_mode;
        let backend = self.lab.backend(backend);
        let to = match self.lab.service(key.service).mode {
            forward_mode::MODE_NAT => backend.nat,
            forward_mode::MODE_DNAT => key.client.0,
            _ => return None,
        };
        Some(ReplyKey { to: (to, port), server: backend.server })
    }
}

impl Odd {
    fn apply_to_parts(&self, parts: &mut Parts) {
        match self {
            Self::Options(words) => parts.option_words = *words,
            Self::Extension(extension) => parts.extensions.push(extension.clone()),
            Self::Fragment(fragment) => parts.fragment = *fragment,
            Self::Tag(kind, tag) => parts.tags.push((*kind, *tag)),
            Self::OtherProtocol => parts.protocol = TCP + UDP - parts.protocol,
            _ => {}
        }
    }

    fn apply_to_bytes(&self, bytes: &mut Vec<u8>, layers: Layers, protocol: u8) {
        let Layers { network, transport } = layers;
        let is_ipv4 = bytes.get(network - 2) == Some(&8);
        // What has been cut off can't be changed.
        let reaches = |end: usize| bytes.len() >= end;
        let seal = |bytes: &mut Vec<u8>| {
            if is_ipv4 && bytes.len() >= network + 20 {
                seal_ipv4(&mut bytes[network..]);
            }
        };
        match *self {
            Self::Cut(to) => bytes.truncate(ETHERNET + to),
            Self::Short(to) => {
                bytes.truncate(ETHERNET + to);
                if bytes.len() >= network + 20 {
                    let (at, less) = if is_ipv4 { (2, 0) } else { (4, 40) };
                    let length = (bytes.len() - network).saturating_sub(less) as u16;
                    bytes[network + at..][..2].copy_from_slice(&length.to_be_bytes());
                    seal(bytes);
                }
            }
            Self::Pad(count) => bytes.resize(bytes.len() + count, 0xaa),
            Self::Version(version) if reaches(network + 20) => {
                bytes[network] = bytes[network] & 15 | version << 4;
                seal(bytes);
            }
            Self::HeaderWords(words) if is_ipv4 && reaches(network + 20) => {
                bytes[network] = 0x40 | words;
                seal(bytes);
            }
            Self::Length(more) if reaches(network + 20) => {
                let at = network + if is_ipv4 { 2 } else { 4 };
                add(&mut bytes[at..], more);
                seal(bytes);
            }
            Self::IpChecksum(bits) if is_ipv4 && reaches(network + 20) => {
                flip(&mut bytes[network + 10..], bits);
            }
            Self::Checksum(bits) if reaches(transport + 20) => {
                flip(&mut bytes[transport + crate::wire::checksum_at(protocol)..], bits);
            }
            Self::NoChecksum if protocol == UDP && reaches(transport + 8) => {
                bytes[transport + 6..transport + 8].fill(0);
            }
            Self::UdpLength(more) if protocol == UDP && reaches(transport + 8) => {
                add(&mut bytes[transport + 4..], more);
            }
            Self::UdpLengthIs(length) if protocol == UDP && reaches(transport + 8) => {
                bytes[transport + 4..transport + 6].copy_from_slice(&length.to_be_bytes());
            }
            Self::DataOffset(words) if protocol == TCP && reaches(transport + 20) => {
                bytes[transport + 12] = words << 4;
            }
            Self::Protocol(protocol) if reaches(network + 20) => {
                bytes[network + if is_ipv4 { 9 } else { 6 }] = protocol;
                seal(bytes);
            }
            Self::Flip(at, bits) if reaches(network + at + 1) => bytes[network + at] ^= bits,
            _ => {}
        }
    }
}

fn add(field: &mut [u8], more: i16) {
    let value = u16::from_be_bytes([field[0], field[1]]).wrapping_add_signed(more);
    field[..2].copy_from_slice(&value.to_be_bytes());
}

fn flip(field: &mut [u8], bits: u16) {
    for (byte, bits) in field.iter_mut().zip(bits.to_be_bytes()) {
        *byte ^= bits;
    }
}

/// What is wrong with what a sender is told whose packet goes no further: ICMP time exceeded or
/// port unreachable (RFC 792, RFC 4443 §3), or a RST, back to where the packet came from. Not
/// everybody is told, nor often.
fn told(
    verdict: &Verdict,
    frame: &[u8],
    hook: Hook,
    fate: &Fate,
    out: &[u8],
    counted: &[drop_reason],
) -> Option<&'static str> {
    let (refused, reason) = match verdict {
        Verdict::Refused(reason) => (true, *reason),
        _ => (false, drop_reason::DROP_TTL),
    };
    if *fate == Fate::Dropped {
        let reasons = [reason, drop_reason::DROP_ANSWER_LIMITED];
        return (counted.len() != 1 || !reasons.contains(&counted[0])).then_some("another reason");
    }
    let back = if hook == Hook::Xdp { Fate::Turned } else { Fate::Forwarded };
    if *fate != back || counted != [reason] {
        return Some("not told");
    }
    if out[..6] != frame[6..12] || out[6..14] != [&frame[..6], &frame[12..14]].concat()[..] {
        return Some("told somebody else");
    }
    let is_ipv4 = out[12..14] == [8, 0];
    let (ip, sender, icmp) =
        if is_ipv4 { (&out[14..], 12..16, 34) } else { (&out[14..], 8..24, 54) };
    let receiver = if is_ipv4 { 16..20 } else { 24..40 };
    if ip[receiver] != frame[14..][sender.clone()] {
        return Some("told somebody else");
    }
    if let (true, Reading::Good(asked)) = (refused, read(frame))
        && asked.protocol == TCP
    {
        let Reading::Good(reset) = read(out) else { return Some("no RST") };
        let ends = (reset.source, reset.destination) == (asked.destination, asked.source);
        let number = asked.flags & ACK == 0 || reset.sequence == asked.acknowledgement;
        let right = ends && number && reset.flags & RST != 0 && is_right(out) == Some(true);
        return (!right).then_some("another RST");
    }
    let kind = match (is_ipv4, refused) {
        (true, false) => [11, 0],
        (false, false) => [3, 0],
        (true, true) => [3, 3],
        (false, true) => [1, 4],
    };
    let message = &out[icmp..];
    let over = if is_ipv4 { 0 } else { sum(&ip[8..40]) + 58 + message.len() as u64 };
    let quote = &message[8..];
    if message[..2] != kind || !comes_out(sum(message) + over) {
        return Some("another message");
    }
    if is_ipv4 && !comes_out(sum(&ip[..20])) {
        return Some("a wrong IPv4 checksum");
    }
    (quote.len() < 28 || !frame[14..].starts_with(quote)).then_some("another quote")
}

/// Whether a whole packet's transport checksum is right, from all of its bytes.
fn is_right(frame: &[u8]) -> Option<bool> {
    let Reading::Good(view) = read(frame) else { return None };
    let View { source, destination, protocol, transport, length, fragment, .. } = view;
    let segment = &frame[transport..ETHERNET + length];
    let over = pseudo(source.0, destination.0, protocol, segment.len()) + sum(segment);
    (fragment == Fragment::Whole).then_some(comes_out(over))
}

fn since(now: Traffic, before: Traffic) -> Traffic {
    Traffic {
        packets_in: now.packets_in - before.packets_in,
        bytes_in: now.bytes_in - before.bytes_in,
        packets_out: now.packets_out - before.packets_out,
        bytes_out: now.bytes_out - before.bytes_out,
        flows_begun: now.flows_begun - before.flows_begun,
        flows_established: now.flows_established - before.flows_established,
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, there: &T, expected: &T) -> Result<(), String> {
    if there == expected {
        return Ok(());
    }
    Err(format!("{what}:\n    kernel {there:?}\n    model  {expected:?}\n"))
}

fn within(what: &str, there: u32, (from, to): Moment) -> Result<(), String> {
    if there.wrapping_sub(from) <= to.wrapping_sub(from) {
        return Ok(());
    }
    Err(format!("{what}: {there} is not in {from}..={to}\n"))
}

fn describe(frame: &[u8]) -> String {
    if frame.len() < ETHERNET {
        return "a runt".to_owned();
    }
    match read(frame) {
        Reading::Good(view) => {
            let (from, to) = (view.source, view.destination);
            format!(
                "{}:{} > {}:{} protocol {} flags {:#04x} ttl {} length {} {:?}",
                from.0,
                from.1,
                to.0,
                to.1,
                view.protocol,
                view.flags,
                view.ttl,
                view.length,
                view.fragment
            )
        }
        other => format!("{other:?}"),
    }
}

fn say(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Forward { bytes, next_hop, out } => {
            format!("to {next_hop} by {out:?}\n        {}", hex(bytes))
        }
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
