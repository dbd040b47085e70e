//! The flow tables as replication sees them: what changes in them, all that is in them, and what
//! another node says belongs into them.
//!
//! Numbers of services and backends are this node's own in what is read here, and the source's in
//! what is applied; [`Names`](baton_ha::sync::frame::Name) tell what they mean.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_ha::sync::frame::{BucketSum, Name, Scope};
use baton_ha::sync::{Affinity, BATCH, BUCKETS, BucketSet, Change, Flow, FlowKey};
use libbpf_rs::Result as BpfResult;

use super::clock::Clock;
use super::load::{Error, Loaded};
use super::mapped::Mapped;
use super::maps::{Cursor, Maps};
use super::record::Record as _;
use super::registry::{BACKENDS, SERVICES, socket};
use super::skeleton::types;
use crate::scheduler::{backend_key, mix};

/// Entries of a table that one system call reads, where the whole of it is walked.
const SLICE: u32 = 4096;
/// How often a service's flows are refreshed, at most and at least.
const REFRESH_LEAST: Duration = Duration::from_secs(2);
const REFRESH_MOST: Duration = Duration::from_secs(60);

/// The tables, for replication. There is one at a time.
#[derive(Debug)]
pub struct Replica {
    loaded: Loaded,
    maps: Arc<Maps>,
    clock: Clock,
    reporting: Mapped<types::reporting>,
    /// Events lost when last looked at.
    lost: u64,
    local: Arc<Local>,
    /// What the source's numbers mean.
    theirs: HashMap<Kind, Name>,
    placed: HashMap<(u16, u16), Option<Place>>,
    /// When each service was refreshed, in jiffies.
    refreshed: HashMap<u16, u32>,
    /// Of the numbers, as they are and as they were last told.
    revision: Arc<AtomicU64>,
    named: u64,
    /// What could not be placed, since this node's file has no such service or backend.
    pub unplaced: u64,
}

/// Of whose numbers one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Service(u16),
    Backend(u16),
}

/// This node's own numbers.
#[derive(Debug, Default)]
struct Local {
    services: HashMap<(SocketAddr, u8), u16>,
    backends: HashMap<(u16, SocketAddr), u16>,
    records: HashMap<u16, types::backend>,
    modes: HashMap<u16, types::service>,
}

/// A service and a backend of it, by this node's numbers.
#[derive(Debug, Clone, Copy)]
struct Place {
    service: u16,
    backend: u16,
    record: types::backend,
    mode: types::forward_mode,
    /// For how long its clients keep to a backend, in jiffies; 0: they don't.
    affinity: u32,
}

/// Flows that are to be written together, no two changes of one.
#[derive(Debug)]
struct Puts {
    /// Of their keys.
    buckets: BucketSet,
    flow_keys: Vec<types::flow_key>,
    flows: Vec<types::flow>,
    reply_keys: Vec<types::reply_key>,
    replies: Vec<types::reply>,
}

impl Puts {
    fn new() -> Self {
        Self {
            buckets: BucketSet::empty(),
            flow_keys: Vec::with_capacity(BATCH),
            flows: Vec::with_capacity(BATCH),
            reply_keys: Vec::with_capacity(BATCH),
            replies: Vec::with_capacity(BATCH),
        }
    }

    fn clear(&mut self) {
        let Self { buckets, flow_keys, flows, reply_keys, replies } = self;
        buckets.clear();
        flow_keys.clear();
        flows.clear();
        reply_keys.clear();
        replies.clear();
    }
}

/// A walk of the flow table in slices, that others may interrupt.
#[derive(Debug, Default)]
pub struct Walk {
    cursor: Option<Cursor>,
    done: bool,
}

impl Replica {
    pub(super) fn new(
        loaded: Loaded,
        maps: Arc<Maps>,
        clock: Clock,
        revision: Arc<AtomicU64>,
    ) -> Result<Self, Error> {
        let reporting = loaded.reporting()?;
        let mut replica = Self {
            lost: reporting.lost().load(Ordering::Relaxed),
            loaded,
            maps,
            clock,
            reporting,
            local: Arc::default(),
            theirs: HashMap::new(),
            placed: HashMap::new(),
            refreshed: HashMap::new(),
            named: 0,
            revision,
            unplaced: 0,
        };
        replica.report(false);
        replica.learn_local().map_err(Error::bpf("read the datapath's tables"))?;
        Ok(replica)
    }

    /// Has the kernel report changes from here on, or no longer.
    pub fn report(&mut self, on: bool) {
        self.reporting.on().store(u32::from(on), Ordering::Release);
        self.lost = self.reporting.lost().load(Ordering::Acquire);
    }

    /// Whether events were lost since this was last asked.
    pub fn has_lost(&mut self) -> bool {
        let lost = self.reporting.lost().load(Ordering::Acquire);
        std::mem::replace(&mut self.lost, lost) != lost
    }

    /// The change that an event of the kernel's stands for.
    pub fn change(&self, event: &[u8], now: u32) -> Option<Change> {
        let event = types::event::read(event)?;
        Some(match types::event_kind(event.kind) {
            types::event_kind::EVENT_ENDED => Change::End(key_of(&event.key)),
            _ => Change::Put(self.flow(&event.key, &event.flow, None, now)),
        })
    }

    /// Reads this node's numbers anew: to be called when they may have changed. What they mean.
    pub fn names(&mut self) -> Result<Vec<Name>, Error> {
        // Before they are read: what changes meanwhile is told again.
        self.named = self.revision.load(Ordering::Acquire);
        self.learn_local().map_err(Error::bpf("read the datapath's tables"))?;
        self.placed.clear();
        let services =
            self.local.services.iter().map(|((listen, protocol), number)| Name::Service {
                number: *number,
                vip: listen.ip(),
                port: listen.port(),
                protocol: *protocol,
            });
        let backends =
            self.local.backends.iter().map(|((service, address), number)| Name::Backend {
                number: *number,
                service: *service,
                address: address.ip(),
                port: address.port(),
            });
        let mut names: Vec<_> = services.chain(backends).collect();
        names.sort_unstable_by_key(|name| match name {
            Name::Service { number, .. } => (0, *number),
            Name::Backend { number, .. } => (1, *number),
        });
        Ok(names)
    }

    fn learn_local(&mut self) -> BpfResult<()> {
        let mut local = Local::default();
        for (key, id) in self.maps.services.slices(SERVICES)? {
            local.services.insert((socket(key.vip, key.port), key.protocol), id as u16);
        }
        for (id, service) in self.maps.service_table.slices(SERVICES)? {
            local.modes.insert(id as u16, service);
        }
        for (id, backend) in self.maps.backend_table.slices(BACKENDS)? {
            if backend.server == 0 {
                continue;
            }
            local.records.insert(id as u16, backend);
            if u32::from(backend.state) != types::backend_state::BACKEND_GONE.0 {
                let address = socket(backend.address, backend.port);
                local.backends.insert((backend.service as u16, address), id as u16);
            }
        }
        self.local = Arc::new(local);
        Ok(())
    }

    /// Some flows, [`BATCH`] at most, and whether they were the last.
    pub fn slice(&self, walk: &mut Walk) -> Result<(Vec<Flow>, bool), Error> {
        let read = || Error::bpf("read the flows");
        if walk.done {
            return Ok((Vec::new(), true));
        }
        let (entries, cursor) = self.maps.flows.batch(walk.cursor, BATCH as u32).map_err(read())?;
        walk.done = cursor.is_none();
        walk.cursor = cursor;
        let now = self.loaded.jiffies()? as u32;
        let mut flows = Vec::with_capacity(entries.len());
        for (key, flow) in &entries {
            let reply = match self.reply_key(key, flow) {
                Some(reply) => self.maps.replies.find(&reply).map_err(read())?,
                None => None,
            };
            flows.push(self.flow(key, flow, reply.as_ref(), now));
        }
        Ok((flows, walk.done))
    }

    /// The low bits of jiffies.
    pub fn jiffies(&self) -> Result<u32, Error> {
        Ok(self.loaded.jiffies()? as u32)
    }

    /// What this node's numbers mean, if that has changed since it was last told.
    pub fn new_names(&mut self) -> Result<Option<Vec<Name>>, Error> {
        let revision = self.revision.load(Ordering::Acquire);
        if revision == self.named {
            return Ok(None);
        }
        self.names().map(Some)
    }

    /// Begins a pass that tells which flows were used: of which services, and since when (in
    /// jiffies). A service is due often enough for a peer to know the age of its flows to within
    /// an eighth of their timeout.
    pub fn begin_refresh(&mut self) -> Result<HashMap<u16, u32>, Error> {
        let now = self.jiffies()?;
        let (least, most) = (self.clock.timeout(REFRESH_LEAST), self.clock.timeout(REFRESH_MOST));
        let mut due = HashMap::new();
        for (id, service) in self.local.modes.iter().filter(|(_, service)| service.mode != 0) {
            let last = *self.refreshed.entry(*id).or_insert(now);
            if now.wrapping_sub(last) >= (service.idle_timeout / 8).clamp(least, most) {
                due.insert(*id, last);
                self.refreshed.insert(*id, now);
            }
        }
        Ok(due)
    }

    /// Some flows, of those that were used, and whether they were the last.
    pub fn used(
        &self,
        walk: &mut Walk,
        due: &HashMap<u16, u32>,
    ) -> Result<(Vec<Flow>, bool), Error> {
        let now = self.jiffies()?;
        let (mut flows, last) = self.slice(walk)?;
        flows.retain(|flow| {
            due.get(&flow.key.service).is_some_and(|since| {
                let age = self.clock.seconds(now.wrapping_sub(*since));
                f64::from(flow.idle_ms) <= age * 1e3
            })
        });
        Ok((flows, last))
    }

    /// The whole table summed up: a long walk, so a job for another thread.
    pub fn summing(&self) -> impl FnOnce() -> Result<Box<[BucketSum]>, Error> + Send + 'static {
        let (maps, local) = (Arc::clone(&self.maps), Arc::clone(&self.local));
        move || sums(&maps, &local).map_err(Error::bpf("read the flows"))
    }

    /// A mark that no flow in the table has, to begin with.
    pub fn unused_mark(&self) -> Result<u8, Error> {
        let mut used = [false; 256];
        for (_, flow) in self.maps.flows.slices(SLICE).map_err(Error::bpf("read the flows"))? {
            used[usize::from(flow.generation)] = true;
        }
        let free = |mark: &u8| !used[usize::from(*mark)];
        Ok((1..=u8::MAX).find(free).unwrap_or(1))
    }

    fn flow(
        &self,
        key: &types::flow_key,
        flow: &types::flow,
        reply: Option<&types::reply>,
        now: u32,
    ) -> Flow {
        let age = |then: u32| self.clock.seconds(now.wrapping_sub(then));
        let idle = reply.map_or(age(flow.seen), |reply| age(reply.seen).min(age(flow.seen)));
        Flow {
            key: key_of(key),
            backend: flow.backend,
            nat_port: u16::from_be(flow.nat_port),
            flags: flow.flags,
            reply_flags: reply.map_or(0, |reply| reply.flags),
            idle_ms: (idle * 1e3) as u32,
            age_s: age(flow.began) as u32,
        }
    }

    /// What the source's numbers mean from now on.
    pub fn learn(&mut self, names: Vec<Name>) {
        for name in names {
            let kind = match name {
                Name::Service { number, .. } => Kind::Service(number),
                Name::Backend { number, .. } => Kind::Backend(number),
            };
            self.theirs.insert(kind, name);
        }
        self.placed.clear();
    }

    /// Forgets what another source's numbers meant.
    pub fn forget_names(&mut self) {
        self.theirs.clear();
        self.placed.clear();
    }

    /// Brings the table in line with what the source says, in its order.
    pub fn apply(&mut self, changes: &[Change], generation: u8) -> Result<(), Error> {
        let now = self.loaded.jiffies()? as u32;
        let written = || Error::bpf("write a flow");
        let mut puts = Puts::new();
        for change in changes {
            // Changes of one flow, one after the other; now and then it is another of its bucket.
            if puts.buckets.contains(change.key().bucket()) {
                self.write(&mut puts).map_err(written())?;
            }
            match change {
                Change::Put(flow) => match self.place(flow.key.service, flow.backend)? {
                    Some(place) => {
                        self.put(flow, place, generation, now, &mut puts).map_err(written())?;
                    }
                    None => self.unplaced += 1,
                },
                Change::End(key) => {
                    let Some(service) = self.local_service(key.service) else { continue };
                    let key = record_of(key, service);
                    self.extend_affinity(&key, now).map_err(written())?;
                    self.end(&key).map_err(written())?;
                }
            }
        }
        self.write(&mut puts).map_err(written())
    }

    /// Writes what was put. First the direction that is not compared: where there is a flow, there
    /// is its reply.
    fn write(&self, puts: &mut Puts) -> BpfResult<()> {
        self.maps.replies.set_many(&puts.reply_keys, &puts.replies)?;
        self.maps.flows.set_many(&puts.flow_keys, &puts.flows)?;
        puts.clear();
        Ok(())
    }

    fn put(
        &self,
        flow: &Flow,
        place: Place,
        generation: u8,
        now: u32,
        puts: &mut Puts,
    ) -> BpfResult<()> {
        let learnt = types::flow_flag::FLOW_LEARNT.0 as u8;
        let key = record_of(&flow.key, place.service);
        let ago = |age: Duration| now.wrapping_sub(self.clock.timeout_or_none(age));
        let seen = ago(Duration::from_millis(flow.idle_ms.into()));
        let record = types::flow {
            backend: place.backend,
            nat_port: flow.nat_port.to_be(),
            flags: flow.flags | learnt,
            // The collector's census finds what it does to the counts.
            counted: types::counted::COUNTED.0 as u8,
            generation,
            seen,
            began: ago(Duration::from_secs(flow.age_s.into())),
            ..Default::default()
        };
        if let Some(before) = self.maps.flows.find(&key)?
            && (before.backend, before.nat_port) != (record.backend, record.nat_port)
        {
            self.end(&key)?;
        }
        if let Some(reply_key) = self.reply_key_at(&key, &record, place.mode, &place.record) {
            let reply = types::reply {
                client: key.client,
                port: key.port,
                service: place.service,
                backend: place.backend,
                flags: flow.reply_flags | learnt,
                seen,
                ..Default::default()
            };
            puts.reply_keys.push(reply_key);
            puts.replies.push(reply);
        }
        if place.affinity > 0 {
            self.keep_to(&key, place.backend, record.began, place.affinity, now)?;
        }
        puts.buckets.insert(flow.key.bucket());
        puts.flow_keys.push(key);
        puts.flows.push(record);
        Ok(())
    }

    /// As the kernel does when a flow begins: its client keeps to the backend from then on, unless
    /// a later one has said otherwise.
    fn keep_to(
        &self,
        client: &types::flow_key,
        backend: u16,
        since: u32,
        lasts: u32,
        now: u32,
    ) -> BpfResult<()> {
        let client = types::flow_key { port: 0, ..*client };
        let age = now.wrapping_sub(since);
        let newer = |there: types::affinity| now.wrapping_sub(there.since) <= age;
        if age >= lasts || self.maps.affinities.find(&client)?.is_some_and(newer) {
            return Ok(());
        }
        let affinity = types::affinity { backend, since, ..Default::default() };
        self.maps.affinities.set(&client, &affinity)
    }

    /// As the kernel does when a flow ends.
    fn extend_affinity(&self, key: &types::flow_key, now: u32) -> BpfResult<()> {
        if self.local.modes.get(&key.service).is_none_or(|service| service.affinity == 0) {
            return Ok(());
        }
        let client = types::flow_key { port: 0, ..*key };
        let (flow, there) = (self.maps.flows.find(key)?, self.maps.affinities.find(&client)?);
        match (flow, there) {
            (Some(flow), Some(there)) if there.backend == flow.backend => {
                self.maps.affinities.set(&client, &types::affinity { since: now, ..there })
            }
            _ => Ok(()),
        }
    }

    /// Some of the clients that keep to a backend, and whether they were the last.
    pub fn affinities(&self, walk: &mut Walk) -> Result<(Vec<Affinity>, bool), Error> {
        if walk.done {
            return Ok((Vec::new(), true));
        }
        let batch = self.maps.affinities.batch(walk.cursor, BATCH as u32);
        let (entries, cursor) = batch.map_err(Error::bpf("read the affinities"))?;
        walk.done = cursor.is_none();
        walk.cursor = cursor;
        let now = self.jiffies()?;
        let told = |(key, affinity): &(types::flow_key, types::affinity)| {
            let lasts = self.local.modes.get(&key.service)?.affinity;
            let age = now.wrapping_sub(affinity.since);
            (age < lasts).then(|| Affinity {
                service: key.service,
                client: key.client.into(),
                backend: affinity.backend,
                age_ms: (self.clock.seconds(age) * 1e3) as u32,
            })
        };
        Ok((entries.iter().filter_map(told).collect(), walk.done))
    }

    /// Has clients keep to the backends that the source says, unless this node knows of later.
    pub fn keep(&mut self, affinities: &[Affinity]) -> Result<(), Error> {
        let now = self.jiffies()?;
        for affinity in affinities {
            let Some(place) = self.place(affinity.service, affinity.backend)? else {
                self.unplaced += 1;
                continue;
            };
            let client = FlowKey { service: place.service, client: affinity.client, port: 0 };
            let client = record_of(&client, place.service);
            let age = self.clock.timeout_or_none(Duration::from_millis(affinity.age_ms.into()));
            self.keep_to(&client, place.backend, now.wrapping_sub(age), place.affinity, now)
                .map_err(Error::bpf("write an affinity"))?;
        }
        Ok(())
    }

    /// Removes both directions.
    fn end(&self, key: &types::flow_key) -> BpfResult<()> {
        let Some(flow) = self.maps.flows.find(key)? else { return Ok(()) };
        if let Some(reply) = self.reply_key(key, &flow) {
            self.maps.replies.remove(&reply)?;
        }
        self.maps.flows.remove(key)
    }

    /// Removes every flow of that scope that has another mark; how many.
    pub fn sweep(&self, generation: u8, scope: &Scope) -> Result<u64, Error> {
        let among = match scope {
            Scope::All => None,
            Scope::Buckets(buckets) => Some(BucketSet::of(buckets)),
        };
        let stale = |key: &types::flow_key, flow: &types::flow| {
            flow.generation != generation
                && among.as_ref().is_none_or(|among| among.contains(key_of(key).bucket()))
        };
        let failed = || Error::bpf("remove flows that the Active does not have");
        let flows = self.maps.flows.slices(SLICE).map_err(failed())?;
        let stale: Vec<_> =
            flows.filter(|(key, flow)| stale(key, flow)).map(|(key, _)| key).collect();
        for key in &stale {
            self.end(key).map_err(failed())?;
        }
        Ok(stale.len() as u64)
    }

    fn local_service(&self, theirs: u16) -> Option<u16> {
        let Some(Name::Service { vip, port, protocol, .. }) =
            self.theirs.get(&Kind::Service(theirs))
        else {
            return None;
        };
        self.local.services.get(&(SocketAddr::new(*vip, *port), *protocol)).copied()
    }

    /// Where a flow of the source's belongs here. This node's numbers are read anew for what is not
    /// known, once.
    fn place(&mut self, service: u16, backend: u16) -> Result<Option<Place>, Error> {
        if let Some(place) = self.placed.get(&(service, backend)) {
            return Ok(*place);
        }
        if self.find_place(service, backend).is_none() {
            self.learn_local().map_err(Error::bpf("read the datapath's tables"))?;
        }
        let place = self.find_place(service, backend);
        self.placed.insert((service, backend), place);
        Ok(place)
    }

    fn find_place(&self, service: u16, backend: u16) -> Option<Place> {
        let local = self.local_service(service)?;
        let Some(Name::Backend { address, port, .. }) = self.theirs.get(&Kind::Backend(backend))
        else {
            return None;
        };
        let number = *self.local.backends.get(&(local, SocketAddr::new(*address, *port)))?;
        let service = self.local.modes.get(&local)?;
        Some(Place {
            service: local,
            backend: number,
            record: *self.local.records.get(&number)?,
            mode: types::forward_mode(service.mode.into()),
            affinity: service.affinity,
        })
    }

    /// The key of a flow's other direction; `None` in DSR, where replies don't come by.
    fn reply_key(&self, key: &types::flow_key, flow: &types::flow) -> Option<types::reply_key> {
        let record = self.local.records.get(&flow.backend)?;
        let mode = types::forward_mode(self.local.modes.get(&key.service)?.mode.into());
        self.reply_key_at(key, flow, mode, record)
    }

    fn reply_key_at(
        &self,
        key: &types::flow_key,
        flow: &types::flow,
        mode: types::forward_mode,
        record: &types::backend,
    ) -> Option<types::reply_key> {
        let address = match mode {
            types::forward_mode::MODE_NAT => record.nat,
            types::forward_mode::MODE_DNAT => key.client,
            _ => return None,
        };
        let (server, port) = (record.server, flow.nat_port);
        Some(types::reply_key { address, server, port, ..Default::default() })
    }
}

fn sums(maps: &Maps, local: &Local) -> BpfResult<Box<[BucketSum]>> {
    let mut sums = vec![BucketSum::default(); BUCKETS].into_boxed_slice();
    let mut seeds: HashMap<(u16, u16), u64> = HashMap::new();
    for (key, flow) in maps.flows.slices(SLICE)? {
        let ids = (key.service, flow.backend);
        let seed = *seeds.entry(ids).or_insert_with(|| local.seed(ids));
        let key = key_of(&key);
        let port = u64::from(u16::from_be(flow.nat_port));
        let client = address_hash(key.client) ^ u64::from(key.port) << 16;
        let sum = &mut sums[usize::from(key.bucket())];
        sum.flows += 1;
        sum.sum = sum.sum.wrapping_add(mix(seed ^ mix(client ^ port)));
    }
    Ok(sums)
}

impl Local {
    /// What is the same on every node of a service and a backend.
    fn seed(&self, (service, backend): (u16, u16)) -> u64 {
        let of_service = self.modes.get(&service).map_or(0, |service| {
            backend_key(socket(service.vip, service.port)) ^ u64::from(service.protocol)
        });
        let of_backend = self
            .records
            .get(&backend)
            .map_or(0, |backend| backend_key(socket(backend.address, backend.port)));
        mix(of_service) ^ mix(of_backend).rotate_left(32)
    }
}

fn key_of(key: &types::flow_key) -> FlowKey {
    FlowKey { service: key.service, client: key.client.into(), port: u16::from_be(key.port) }
}

fn record_of(key: &FlowKey, service: u16) -> types::flow_key {
    types::flow_key { client: key.client.into(), port: key.port.to_be(), service }
}

fn address_hash(address: IpAddr) -> u64 {
    let bits = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    mix((bits >> 64) as u64).wrapping_add(bits as u64)
}
