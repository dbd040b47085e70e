//! What the kernel knows of services, backends and servers, and under which numbers: brought in
//! line with the pools, step by step, so that no packet meets half of a change.
//!
//! Numbers stay what they are for as long as what they stand for does, across reloads and restarts:
//! flows refer to them. They are read back from the maps at the start.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_ha::config::Vip;
use libbpf_rs::Result as BpfResult;

use super::clock::Clock;
use super::load::Error;
use super::maps::Maps;
use super::narrow::Narrow;
use super::routes::{self, Way};
use super::skeleton::types;
use crate::pool::{Admin, Health, Member, Pool};
use crate::scheduler::{backend_key, mix};
use crate::service::{Backend, Dsr, Mode, OnDown, Protocol, Scheduler, Service, Source};
use crate::{maglev, turns};

/// How long a flow that is closed or reset is kept when the flow table is getting full.
pub(super) const CLOSED_HURRIED: Duration = Duration::from_secs(1);
/// As in bounds.h; id 0 is no backend.
pub(super) const BACKENDS: u32 = 16384;
pub(super) const SERVICES: u32 = 1024;

const IPIP: Mode = Mode::Dsr { kind: Dsr::Ipip };

/// A service by what makes it the same one.
type ServiceName = (SocketAddr, Protocol);

/// Numbers given out, and the next to try.
#[derive(Debug)]
struct Numbers {
    used: HashSet<u32>,
    next: u32,
    /// One past the last.
    end: u32,
}

/// The registry.
#[derive(Debug)]
pub(super) struct Registry {
    maps: Arc<Maps>,
    clock: Clock,
    services: HashMap<ServiceName, u32>,
    service_numbers: Numbers,
    backends: HashMap<(u32, SocketAddr), u32>,
    backend_numbers: Numbers,
    servers: HashMap<(SocketAddr, Protocol), u32>,
    server_numbers: Numbers,
    addresses: HashMap<IpAddr, u32>,
    /// What the schedule of each service was made from.
    schedules: HashMap<u32, (Table, Vec<maglev::Entry>)>,
    /// Backends that no route leads to, to say so once.
    unreachable: HashSet<IpAddr>,
    narrow: Narrow,
}

/// What came of a change.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// Interfaces that packets of ours come by.
    pub(super) interfaces: HashSet<u32>,
    /// Those among them that have VIPs.
    pub(super) of_vips: HashSet<u32>,
    /// Whether a backend has gone or is down, whose flows are to be ended.
    pub(super) left: bool,
    /// Whether a number was given out or taken back.
    pub(super) renumbered: bool,
}

impl Numbers {
    /// Goes on after the highest that was ever in use, so that one that has just become free is
    /// the last to be given out again.
    fn after(used: HashSet<u32>, highest: u32, end: u32) -> Self {
        Self { used, next: highest + 1, end }
    }

    fn take(&mut self, what: &'static str) -> Result<u32, Error> {
        for _ in 0..self.end {
            if self.next >= self.end {
                self.next = 1;
            }
            let number = self.next;
            self.next += 1;
            if self.used.insert(number) {
                return Ok(number);
            }
        }
        Err(Error::Full { what, most: self.end - 1 })
    }
}

impl Registry {
    /// What the maps hold already.
    pub(super) fn read(maps: Arc<Maps>, clock: Clock) -> BpfResult<Self> {
        let services: HashMap<ServiceName, u32> = maps
            .services
            .slices(SERVICES)?
            .filter_map(|(key, id)| {
                Some(((socket(key.vip, key.port), protocol(key.protocol)?), id))
            })
            .collect();
        let used: HashSet<u32> = services.values().copied().collect();
        let highest = used.iter().copied().max().unwrap_or(0);
        let service_numbers = Numbers::after(used, highest, SERVICES);

        let mut backends = HashMap::new();
        let mut highest = 0;
        for (id, backend) in maps.backend_table.slices(BACKENDS)? {
            if backend.server != 0 {
                highest = highest.max(id);
            }
            if u32::from(backend.state) != types::backend_state::BACKEND_GONE.0 {
                backends.insert((backend.service, socket(backend.address, backend.port)), id);
            }
        }
        let backend_numbers =
            Numbers::after(backends.values().copied().collect(), highest, BACKENDS);

        let servers: HashMap<_, _> = maps
            .servers
            .slices(BACKENDS)?
            .filter_map(|(key, id)| {
                Some(((socket(key.address, key.port), protocol(key.protocol)?), id))
            })
            .collect();
        let used: HashSet<u32> = servers.values().copied().collect();
        let highest = used.iter().copied().max().unwrap_or(0);
        let server_numbers = Numbers::after(used, highest, u32::MAX);
        let addresses = maps
            .addresses
            .slices(SERVICES)?
            .map(|(address, uses)| (address.into(), uses))
            .collect();
        Ok(Self {
            maps,
            clock,
            services,
            service_numbers,
            backends,
            backend_numbers,
            servers,
            server_numbers,
            addresses,
            schedules: HashMap::new(),
            unreachable: HashSet::new(),
            narrow: Narrow::default(),
        })
    }

    /// Brings the kernel in line with the pools whose packets stay in it. What comes is written
    /// from the far end (servers, backends, schedule, service) to the near one (the VIP and port
    /// that clients use), what goes the other way round.
    pub(super) fn apply(&mut self, pools: &[Arc<Pool>], vips: &[Vip]) -> Result<Applied, Error> {
        let named = |vip: &Vip| routes::interface_named(&vip.interface).ok();
        let of_vips: HashSet<u32> = vips.iter().filter_map(named).collect();
        let mut applied = Applied { interfaces: of_vips.clone(), of_vips, ..Applied::default() };
        let pools: Vec<_> = pools.iter().filter(|pool| pool.service.mode.is_in_kernel()).collect();
        let write = || Error::bpf("write the datapath's tables");
        let tunnelled = pools.iter().filter(|pool| pool.service.mode == IPIP);
        let ends = tunnelled.flat_map(|pool| &pool.members).map(|one| one.backend.address.ip());
        self.narrow.hear(Instant::now(), &ends.collect());
        self.remove_services(&pools).map_err(write())?;
        self.set_addresses(&pools, vips).map_err(write())?;
        let mut backends = HashSet::new();
        let before = (self.service_numbers.next, self.backend_numbers.next);
        for pool in &pools {
            let service = &pool.service;
            let id = self.service_number(service)?;
            let interface = vips.iter().find(|vip| vip.address == service.vip());
            let interface = interface.and_then(|vip| routes::interface_named(&vip.interface).ok());
            let mut entries = Vec::new();
            let before = self.states_before(id, pool).map_err(write())?;
            let states = states(pool, &before);
            for ((member, state), was) in pool.members.iter().zip(states).zip(before) {
                let down = types::backend_state::BACKEND_DOWN;
                applied.left |= state == down && was != down;
                let address = member.backend.address;
                let way = self.way_to(address.ip());
                applied.interfaces.extend(way.map(|way| way.ifindex));
                let number = self.backend_number(id, address)?;
                backends.insert(number);
                let record = types::backend {
                    address: address.ip().into(),
                    nat: match (service.mode, way) {
                        (IPIP, Some(way)) => way.source.into(),
                        _ => nat_address(service, address.ip(), vips).into(),
                    },
                    port: address.port().to_be(),
                    state: state.0 as u8,
                    server: self.server_number(address, service.protocol)?,
                    ifindex: way.map_or(0, |way| way.ifindex),
                    service: id,
                    max_flows: member.backend.max_connections,
                    weight: member.weight().into(),
                    mtu: way.map_or(0, |way| self.narrow.least(address.ip(), way.mtu)),
                    ..Default::default()
                };
                self.maps.backend_table.set(&number, &record).map_err(write())?;
                if state == types::backend_state::BACKEND_UP {
                    let (key, weight) = (backend_key(address), member.weight());
                    entries.push(maglev::Entry { id: number as u16, key, weight });
                }
            }
            self.set_schedule(id, table_for(service.scheduler), entries).map_err(write())?;
            let record = self.service_record(service, interface.unwrap_or(0));
            self.maps.service_table.set(&id, &record).map_err(write())?;
            self.maps
                .services
                .set(&service_key(service.listen, service.protocol), &id)
                .map_err(write())?;
            self.services.insert((service.listen, service.protocol), id);
        }
        let gone = self.retire_backends(&backends).map_err(write())?;
        applied.left |= gone;
        let after = (self.service_numbers.next, self.backend_numbers.next);
        applied.renumbered = gone || before != after;
        self.remove_servers(&pools).map_err(write())?;
        Ok(applied)
    }

    fn service_number(&mut self, service: &Service) -> Result<u32, Error> {
        match self.services.get(&(service.listen, service.protocol)) {
            Some(id) => Ok(*id),
            None => self.service_numbers.take("services"),
        }
    }

    fn backend_number(&mut self, service: u32, address: SocketAddr) -> Result<u32, Error> {
        if let Some(id) = self.backends.get(&(service, address)) {
            return Ok(*id);
        }
        let id = self.backend_numbers.take("backends")?;
        self.backends.insert((service, address), id);
        Ok(id)
    }

    /// What the kernel has of each member's state: of an earlier daemon, at the start.
    fn states_before(&self, service: u32, pool: &Pool) -> BpfResult<Vec<types::backend_state>> {
        let gone = types::backend_state::BACKEND_GONE;
        let state = |backend: &Backend| match self.backends.get(&(service, backend.address)) {
            Some(id) => {
                let record = self.maps.backend_table.find(id)?;
                Ok(record.map_or(gone, |record| types::backend_state(record.state.into())))
            }
            None => Ok(gone),
        };
        pool.service.backends.iter().map(state).collect()
    }

    /// The number of a server, in the kernel's map from then on.
    fn server_number(&mut self, address: SocketAddr, protocol: Protocol) -> Result<u32, Error> {
        if let Some(id) = self.servers.get(&(address, protocol)) {
            return Ok(*id);
        }
        let id = self.server_numbers.take("servers")?;
        let key = types::server_key {
            address: address.ip().into(),
            port: address.port().to_be(),
            protocol: protocol.number(),
            ..Default::default()
        };
        self.maps.servers.set(&key, &id).map_err(Error::bpf("write a server"))?;
        self.servers.insert((address, protocol), id);
        Ok(id)
    }

    /// The way to an address; whether there is one is said when it changes.
    fn way_to(&mut self, address: IpAddr) -> Option<Way> {
        match routes::way_to(address) {
            Ok(way) => {
                if self.unreachable.remove(&address) {
                    tracing::info!(%address, "there is a route to the backend again");
                }
                Some(way)
            }
            Err(error) => {
                if self.unreachable.insert(address) {
                    tracing::warn!(%address, %error, "no route to the backend: its packets are dropped");
                }
                None
            }
        }
    }

    fn service_record(&self, service: &Service, ifindex: u32) -> types::service {
        let limits = &service.limits;
        types::service {
            vip: service.vip().into(),
            port: service.listen.port().to_be(),
            protocol: service.protocol.number(),
            mode: forward_mode(service.mode).0 as u8,
            select: select_by(service.scheduler).0 as u8,
            seed: mix(backend_key(service.listen) ^ u64::from(service.protocol.number())),
            ifindex,
            on_down: on_down(service.flows.on_down).0 as u8,
            half_open_timeout: self.clock.timeout(service.flows.half_open_timeout),
            idle_timeout: self.clock.timeout(limits.idle_timeout),
            half_close_timeout: self.clock.timeout(limits.half_close_timeout),
            closed_timeout: self.clock.timeout(service.flows.closed_timeout),
            max_flows: limits.max_connections,
            // One that the service's own limit comes before need not be counted.
            max_per_source: if limits.max_connections_per_source < limits.max_connections {
                limits.max_connections_per_source
            } else {
                0
            },
            affinity: limits.affinity.map_or(0, |affinity| self.clock.timeout(affinity)),
            ..Default::default()
        }
    }

    fn set_schedule(
        &mut self,
        service: u32,
        table: Table,
        entries: Vec<maglev::Entry>,
    ) -> BpfResult<()> {
        let wanted = (table, entries);
        if self.schedules.get(&service) == Some(&wanted) {
            return Ok(());
        }
        match &wanted {
            (_, entries) if entries.is_empty() => self.maps.schedules.remove(service)?,
            (Table::Maglev, entries) => {
                self.maps.schedules.set(service, &maglev::table(entries))?
            }
            (Table::Turns, entries) => self.maps.schedules.set(service, &turns::round(entries))?,
        }
        self.schedules.insert(service, wanted);
        Ok(())
    }

    fn set_addresses(&mut self, pools: &[&Arc<Pool>], vips: &[Vip]) -> BpfResult<()> {
        let mut wanted: HashMap<IpAddr, u32> = HashMap::new();
        for vip in vips {
            *wanted.entry(vip.address).or_default() |= types::address_use::ADDRESS_VIP.0;
        }
        // In dsr no packet for us comes from a backend.
        let rewritten =
            pools.iter().filter(|pool| matches!(pool.service.mode, Mode::Passthrough { .. }));
        for pool in rewritten {
            for backend in &pool.service.backends {
                let nat = nat_address(&pool.service, backend.address.ip(), vips);
                *wanted.entry(nat).or_default() |= types::address_use::ADDRESS_NAT.0;
                let server = wanted.entry(backend.address.ip()).or_default();
                *server |= types::address_use::ADDRESS_SERVER.0;
            }
        }
        for (address, uses) in &wanted {
            if self.addresses.get(address) != Some(uses) {
                self.maps.addresses.set(&(*address).into(), uses)?;
            }
        }
        for gone in self.addresses.keys().filter(|address| !wanted.contains_key(address)) {
            self.maps.addresses.remove(&(*gone).into())?;
        }
        self.addresses = wanted;
        Ok(())
    }

    fn remove_services(&mut self, pools: &[&Arc<Pool>]) -> BpfResult<()> {
        let wanted: HashSet<ServiceName> =
            pools.iter().map(|pool| (pool.service.listen, pool.service.protocol)).collect();
        for (name, id) in self.services.extract_if(|name, _| !wanted.contains(name)) {
            self.maps.services.remove(&service_key(name.0, name.1))?;
            self.maps.schedules.remove(id)?;
            self.schedules.remove(&id);
            self.service_numbers.used.remove(&id);
        }
        Ok(())
    }

    /// Marks the backends that are none any more; their records stay for as long as the collector
    /// needs them to find the other direction of their flows.
    fn retire_backends(&mut self, wanted: &HashSet<u32>) -> BpfResult<bool> {
        let mut gone = false;
        for (_, id) in self.backends.extract_if(|_, id| !wanted.contains(id)) {
            if let Some(mut record) = self.maps.backend_table.find(&id)? {
                record.state = types::backend_state::BACKEND_GONE.0 as u8;
                self.maps.backend_table.set(&id, &record)?;
            }
            self.backend_numbers.used.remove(&id);
            gone = true;
        }
        Ok(gone)
    }

    fn remove_servers(&mut self, pools: &[&Arc<Pool>]) -> BpfResult<()> {
        let wanted: HashSet<(SocketAddr, Protocol)> = pools
            .iter()
            .flat_map(|pool| {
                let protocol = pool.service.protocol;
                pool.service.backends.iter().map(move |backend| (backend.address, protocol))
            })
            .collect();
        for ((address, protocol), id) in self.servers.extract_if(|name, _| !wanted.contains(name)) {
            let key = types::server_key {
                address: address.ip().into(),
                port: address.port().to_be(),
                protocol: protocol.number(),
                ..Default::default()
            };
            self.maps.servers.remove(&key)?;
            self.server_numbers.used.remove(&id);
        }
        Ok(())
    }
}

/// What each member of a pool may get. One that is down loses its flows, unless the service keeps
/// them, since it may be up for them; what the operator disables always does. One not probed yet
/// goes on as it was `before`, in an earlier daemon's time; where none is up, all of those get
/// flows.
fn states(pool: &Pool, before: &[types::backend_state]) -> Vec<types::backend_state> {
    let up = types::backend_state::BACKEND_UP;
    let drained = types::backend_state::BACKEND_DRAINED;
    let down = types::backend_state::BACKEND_DOWN;
    let keeps = pool.service.flows.on_down == OnDown::Keep;
    let state = |member: &Member, before| match (member.admin(), member.health()) {
        (Admin::Disabled, _) => down,
        (Admin::Enabled | Admin::Drained, Health::Down) if !keeps => down,
        (Admin::Enabled, Health::Up) => up,
        (Admin::Enabled, Health::Unknown) if before == up => up,
        (Admin::Enabled | Admin::Drained, _) => drained,
    };
    let mut states: Vec<_> =
        pool.members.iter().zip(before).map(|(member, before)| state(member, *before)).collect();
    if !states.contains(&up) {
        for (state, member) in states.iter_mut().zip(&pool.members) {
            if member.admin() == Admin::Enabled && member.health() == Health::Unknown {
                *state = up;
            }
        }
    }
    states
}

/// The address that packets to a backend come from: the VIP in the backend's own network, or the
/// service's.
fn nat_address(service: &Service, backend: IpAddr, vips: &[Vip]) -> IpAddr {
    let near = vips.iter().find(|vip| vip.is_near(backend));
    near.map_or(service.vip(), |vip| vip.address)
}

fn forward_mode(mode: Mode) -> types::forward_mode {
    match mode {
        Mode::Proxy => types::forward_mode::MODE_PROXY,
        Mode::Passthrough { source: Source::Vip } => types::forward_mode::MODE_NAT,
        Mode::Passthrough { source: Source::Client } => types::forward_mode::MODE_DNAT,
        Mode::Dsr { kind: Dsr::L2 } => types::forward_mode::MODE_DSR_L2,
        Mode::Dsr { kind: Dsr::Ipip } => types::forward_mode::MODE_DSR_IPIP,
        Mode::Dsr { kind: Dsr::Nat } => types::forward_mode::MODE_DSR_NAT,
    }
}

/// What a schedule is made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    /// Slots by hash, or at random.
    Maglev,
    /// A round of turns.
    Turns,
}

fn table_for(scheduler: Scheduler) -> Table {
    match scheduler {
        Scheduler::RoundRobin => Table::Turns,
        Scheduler::Maglev
        | Scheduler::SourceHash
        | Scheduler::LeastConnections
        | Scheduler::Random => Table::Maglev,
    }
}

/// One that keeps its flows has none that are down, but those that the operator disables.
fn on_down(on_down: OnDown) -> types::on_down {
    match on_down {
        OnDown::Reset | OnDown::Keep => types::on_down::ON_DOWN_RESET,
        OnDown::Remap => types::on_down::ON_DOWN_REMAP,
    }
}

fn select_by(scheduler: Scheduler) -> types::select_by {
    match scheduler {
        Scheduler::SourceHash => types::select_by::SELECT_SOURCE,
        Scheduler::Random => types::select_by::SELECT_RANDOM,
        Scheduler::RoundRobin => types::select_by::SELECT_TURN,
        Scheduler::LeastConnections => types::select_by::SELECT_LEAST,
        Scheduler::Maglev => types::select_by::SELECT_FLOW,
    }
}

fn service_key(listen: SocketAddr, protocol: Protocol) -> types::service_key {
    types::service_key {
        vip: listen.ip().into(),
        port: listen.port().to_be(),
        protocol: protocol.number(),
        ..Default::default()
    }
}

pub(super) fn socket(address: types::address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), u16::from_be(port))
}

pub(super) fn protocol(number: u8) -> Option<Protocol> {
    match i32::from(number) {
        libc::IPPROTO_TCP => Some(Protocol::Tcp),
        libc::IPPROTO_UDP => Some(Protocol::Udp),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{FlowPolicy, Limits, ProxyProtocol};

    const UP: types::backend_state = types::backend_state::BACKEND_UP;
    const DRAINED: types::backend_state = types::backend_state::BACKEND_DRAINED;
    const DOWN: types::backend_state = types::backend_state::BACKEND_DOWN;
    const GONE: types::backend_state = types::backend_state::BACKEND_GONE;

    fn pool(members: &[(Admin, Health)]) -> Pool {
        let backend = |n: usize| Backend {
            name: format!("b{n}"),
            address: SocketAddr::from(([10, 78, 0, n as u8], 80)),
            weight: 1,
            max_connections: 1,
        };
        let service = Service {
            name: "web".into(),
            listen: "10.77.0.100:80".parse().unwrap(),
            protocol: Protocol::Tcp,
            mode: Mode::Passthrough { source: Source::Vip },
            scheduler: Scheduler::Maglev,
            backends: (0..members.len()).map(backend).collect(),
            check: None,
            limits: Limits {
                max_connections: 1,
                max_connections_per_source: 1,
                connect_timeout: Duration::ZERO,
                connect_retries: 0,
                idle_timeout: Duration::ZERO,
                half_close_timeout: Duration::ZERO,
                affinity: None,
            },
            flows: FlowPolicy::of(Protocol::Tcp),
            proxy_protocol: ProxyProtocol::Off,
        };
        let pool = Pool::new(Arc::new(service));
        for (member, (admin, health)) in pool.members.iter().zip(members) {
            member.set_admin(*admin);
            member.set_health(*health, "test");
        }
        pool
    }

    #[test]
    fn the_state_follows_the_operator_and_the_checks() {
        use {Admin::*, Health::*};
        let members = [
            (Enabled, Up),
            (Enabled, Down),
            (Enabled, Unknown),
            (Enabled, Unknown),
            (Drained, Up),
            (Disabled, Up),
        ];
        let before = [GONE, UP, UP, DRAINED, UP, UP];
        let states = states(&pool(&members), &before);
        assert_eq!(states, [UP, DOWN, UP, DRAINED, DRAINED, DOWN]);
    }

    #[test]
    fn a_service_may_keep_the_flows_of_what_is_down() {
        use {Admin::*, Health::*};
        let mut pool = pool(&[(Enabled, Up), (Enabled, Down), (Drained, Down), (Disabled, Down)]);
        let mut service = (*pool.service).clone();
        service.flows.on_down = OnDown::Keep;
        pool.service = Arc::new(service);
        assert_eq!(states(&pool, &[UP; 4]), [UP, DRAINED, DRAINED, DOWN]);
    }

    #[test]
    fn where_none_is_up_those_not_probed_yet_are_tried() {
        use {Admin::*, Health::*};
        let members =
            [(Enabled, Down), (Enabled, Unknown), (Drained, Unknown), (Disabled, Unknown)];
        let states = states(&pool(&members), &[GONE; 4]);
        assert_eq!(states, [DOWN, UP, DRAINED, DOWN]);
    }

    #[test]
    fn numbers_come_round_and_run_out() {
        let mut numbers = Numbers::after(HashSet::from([2]), 2, 5);
        let taken: Vec<_> = (0..3).map(|_| numbers.take("things").unwrap()).collect();
        assert_eq!(taken, [3, 4, 1]);
        assert!(matches!(numbers.take("things"), Err(Error::Full { what: "things", most: 4 })));
        numbers.used.remove(&3);
        assert_eq!(numbers.take("things").unwrap(), 3);
    }
}
