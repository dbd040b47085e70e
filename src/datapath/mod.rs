//! The kernel datapath: passthrough and direct server return, in eBPF.
//!
//! The C is in `bpf/` (begin with `bpf/core.h`); docs/decisions/datapath.md says what the maps are
//! and who writes them. Here it is loaded, told what to do, and cleaned up after.
//!
//! * `load`: the object → programs and maps in the kernel, pinned in `bpffs`.
//! * `claim`: one daemon at a time. `drain`: the flows of an older version.
//! * `hooks`: which hook an interface gets, attaching and detaching; `nic`: what it can do.
//! * `skeleton`, `record`, `maps`: what libbpf-cargo generates, its types as bytes, the maps typed.
//! * `registry`: pools → services, backends, schedules, under lasting numbers; `routes`.
//! * `narrow`: what routers on the way to a tunnel's end take.
//! * `ways`, `mirror`: routes and neighbours as XDP needs them.
//! * `mapped`: variables of the kernel's programs as memory of ours.
//! * `gate`, `clock`: the lease that the kernel enforces, and the jiffies that it is timed by.
//! * `collector`: flows that are over. `live`: how many there are of each, put right.
//! * `counters`: what was counted, read from the pins.
//! * `fragments`: those that came ahead of the first of their datagram.
//! * `replica`, `ring`: the flow tables as replication sees them, and their changes.
//! * `sessions`: the flows there are, to be listed.
//!
//! Once it is attached, packets never pass through here.

pub mod bpffs;
mod claim;
pub mod clock;
pub mod collector;
pub mod counters;
mod drain;
mod fragments;
pub mod gate;
pub mod hooks;
pub mod lifetimes;
pub mod live;
pub mod load;
mod mapped;
pub mod maps;
mod mirror;
mod narrow;
mod nic;
pub mod record;
mod registry;
pub mod replica;
mod resets;
pub mod ring;
pub mod routes;
pub mod sessions;
pub mod skeleton;
pub mod slices;
mod sweep;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use baton_ha::config::Vip;

use self::claim::Claim;
use self::clock::{Clock, Tick};
use self::collector::{Collector, FlowCounts};
use self::counters::Counters;
use self::drain::Drain;
use self::fragments::Fragments;
use self::gate::{Gate, Gates};
use self::hooks::{Choice, Chosen, Hooks};
use self::load::{Error, Loaded, Sizes};
use self::maps::Maps;
use self::mirror::Mirror;
use self::registry::Registry;
use self::replica::Replica;
use self::sessions::{Ended, Sessions, Wanted};
use self::sweep::Sweeper;
use crate::pool::Pool;

/// The running datapath. Dropping it leaves what is in the kernel as it is: flows go on for as
/// long as the gate is open.
#[derive(Debug)]
pub struct Datapath {
    loaded: Loaded,
    maps: Arc<Maps>,
    gate: Arc<Gate>,
    clock: Clock,
    tick: Arc<Tick>,
    sweeper: Arc<Sweeper>,
    collector: Collector,
    /// Works by itself.
    _fragments: Fragments,
    state: Mutex<State>,
    /// Counts the changes of services' and backends' numbers.
    revision: Arc<AtomicU64>,
    /// Last, so that it is let go of when everything else has ended.
    _claim: Claim,
}

#[derive(Debug)]
struct State {
    registry: Registry,
    hooks: Hooks,
    /// The interfaces that packets of ours go by.
    interfaces: BTreeSet<u32>,
    /// While XDP is attached anywhere.
    mirror: Option<Mirror>,
    drain: Drain,
}

impl State {
    fn new(registry: Registry, hooks: Hooks, drain: Drain) -> Self {
        Self { registry, hooks, interfaces: BTreeSet::new(), mirror: None, drain }
    }

    /// Has routes and neighbours followed as long as XDP needs them.
    fn follow_ways(&mut self, maps: &Arc<Maps>) -> Result<(), Error> {
        match (&self.mirror, self.hooks.need_ways()) {
            (Some(mirror), true) => mirror.follow(self.interfaces.clone()),
            (None, true) => {
                let mirror = Mirror::start(Arc::clone(maps), self.interfaces.clone());
                self.mirror = Some(mirror.map_err(Error::io("follow routes and neighbours"))?);
            }
            (Some(_), false) => {
                self.mirror = None;
                mirror::clear(maps).map_err(Error::bpf("forget routes and neighbours"))?;
            }
            (None, false) => {}
        }
        Ok(())
    }
}

impl Datapath {
    /// Loads the datapath, or takes over what an earlier daemon left, and serves the pools whose
    /// packets stay in the kernel. Nobody is answered for the VIPs from here on but while the lease
    /// holds that opens the gates.
    pub fn start(
        sizes: Sizes,
        hook: Choice,
        pools: &[Arc<Pool>],
        vips: &[Vip],
        gates: &Gates,
    ) -> Result<Self, Error> {
        let claim = Claim::take()?;
        let loaded = Loaded::pinned(sizes)?;
        let drain = Drain::find()?;
        let clock = loaded.clock()?;
        let maps = Arc::new(loaded.maps()?);
        let registry = Registry::read(Arc::clone(&maps), clock)
            .map_err(Error::bpf("read the datapath's tables"))?;
        let sweeper = Arc::new(Sweeper::new(loaded.clone(), Arc::clone(&maps))?);
        let hurried = clock.timeout(registry::CLOSED_HURRIED);
        let collector = Collector::start(Arc::clone(&sweeper), hurried)
            .map_err(Error::io("start the collector"))?;
        let fragments = Fragments::start(loaded.clone())
            .map_err(Error::io("start the thread that holds fragments"))?;
        let (gate, tick) = (Arc::new(loaded.gate()?), Arc::new(loaded.tick(clock)?));
        let of_old = drain.gates().into_iter();
        gates.hang(of_old.chain([Arc::clone(&gate)]).collect(), Arc::clone(&tick));
        let datapath = Self {
            gate,
            loaded,
            maps,
            clock,
            tick,
            sweeper,
            collector,
            _fragments: fragments,
            state: Mutex::new(State::new(registry, Hooks::new(hook), drain)),
            revision: Arc::new(AtomicU64::new(1)),
            _claim: claim,
        };
        datapath.apply(pools, vips)?;
        Ok(datapath)
    }

    /// Brings the kernel in line with the pools: services, backends and their states, schedules,
    /// routes, interfaces. Costs little where nothing has changed; may be called at any time.
    pub fn apply(&self, pools: &[Arc<Pool>], vips: &[Vip]) -> Result<(), Error> {
        let mut state = self.state.lock().expect("no panic while it is held");
        let applied = state.registry.apply(pools, vips)?;
        if applied.renumbered {
            self.revision.fetch_add(1, Ordering::Release);
        }
        state.interfaces = applied.interfaces.into_iter().collect();
        // First: what is asked here is answered there.
        for ifindex in applied.of_vips {
            state.hooks.attach_egress(&self.loaded, ifindex)?;
        }
        for ifindex in state.interfaces.clone() {
            state.hooks.attach(&self.loaded, ifindex)?;
        }
        state.follow_ways(&self.maps)?;
        state.drain.apply(&self.maps)?;
        if applied.left {
            self.collector.look_at_all();
        }
        Ok(())
    }

    /// Follows what the configuration says of hooks; where a driver refuses, everything is as it
    /// was.
    pub fn choose_hook(&self, hook: Choice) -> Result<(), Error> {
        let mut state = self.state.lock().expect("no panic while it is held");
        state.hooks.choose(&self.loaded, hook)?;
        state.follow_ways(&self.maps)
    }

    /// Looks at the kernel's clock, by which the lease is timed, and at what the flows have become:
    /// to be called now and then, with whether this node has just become Active.
    pub fn tend(&self, opened: bool) -> Result<(), Error> {
        self.tick.note(self.loaded.sighting()?);
        // Of the flows that it has by now, some may have backends that left before.
        if opened {
            self.collector.look_at_all();
        }
        Ok(())
    }

    /// What it does at this moment. Tens of system calls and more: not for every packet.
    pub fn report(&self) -> Result<Report, Error> {
        let hooks = self.state.lock().expect("no panic while it is held").hooks.read()?;
        Ok(Report {
            hooks: hooks.into_iter().map(|(ifindex, hook)| (nic::name(ifindex), hook)).collect(),
            gate_open: self.loaded.jiffies()? < self.gate.deadline_jiffies(),
            gate_epoch: self.gate.epoch(),
            affinities: self.maps.affinities.count().map_err(Error::bpf("count the affinities"))?,
            most_affinities: self.maps.affinities.capacity(),
            flows: self.collector.counted(),
            most_flows: self.maps.flows.capacity(),
            most_half_open_flows: self.maps.half_flows.capacity(),
            counters: Counters::read()?,
        })
    }

    /// How many flows there are, as of a few seconds ago.
    pub fn flows(&self) -> FlowCounts {
        self.collector.counted()
    }

    /// Flows that are wanted, under the names that they have in these pools.
    pub fn sessions(&self, wanted: &Wanted, pools: &[Arc<Pool>]) -> Result<Sessions, Error> {
        let now = self.loaded.jiffies()? as u32;
        let walk = sessions::Walk { maps: &self.maps, clock: self.clock, now, pools, wanted };
        walk.run().map_err(Error::bpf("read the flows"))
    }

    /// Whether flows end by their timeouts here; not where they are copies of another node's.
    pub fn end_flows(&self, here: bool) {
        self.collector.pause(!here);
    }

    /// The tables for replication. To be asked for once.
    pub fn replica(&self) -> Result<Replica, Error> {
        let revision = Arc::clone(&self.revision);
        Replica::new(self.loaded.clone(), Arc::clone(&self.maps), self.clock, revision)
    }

    /// Jiffies now, as flows have them (their low 32 bits).
    pub fn jiffies(&self) -> Result<u64, Error> {
        self.loaded.jiffies()
    }

    /// The programs, to run them on packets of one's own.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Ends the flows that are wanted, and tells their ends; how many there were. Only while the
    /// gate is open: nobody else speaks for a VIP.
    pub fn end_sessions(&self, wanted: &Wanted, pools: &[Arc<Pool>]) -> Result<Ended, Error> {
        let now = self.loaded.jiffies()?;
        if now >= self.gate.deadline_jiffies() {
            return Err(Error::GateClosed);
        }
        let now = now as u32;
        let walk = sessions::Walk { maps: &self.maps, clock: self.clock, now, pools, wanted };
        walk.end(&self.sweeper)
    }

    /// The maps, to read flows and counters.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }
}

/// The datapath at one moment.
#[derive(Debug)]
pub struct Report {
    /// The interfaces that have our programs, by name.
    pub hooks: BTreeMap<String, Chosen>,
    /// Whether packets may pass.
    pub gate_open: bool,
    /// Under which fencing number they passed last.
    pub gate_epoch: u64,
    /// Clients that keep to a backend, and those whose time is over and whose place nobody wants.
    pub affinities: u32,
    /// The most there may be.
    pub most_affinities: u32,
    /// How many flows there are.
    pub flows: FlowCounts,
    /// The most established ones there may be.
    pub most_flows: u32,
    /// The most half-open ones there may be.
    pub most_half_open_flows: u32,
    /// What was counted; `None` once it is unloaded.
    pub counters: Option<Counters>,
}

/// Takes the datapath off every interface of this network namespace and removes its pins, and so
/// its flows.
pub fn unload() -> Result<(), Error> {
    let _claim = Claim::take_or_own()?;
    let detached = hooks::detach_all();
    // Whatever could not be detached: what can go goes.
    bpffs::remove().map_err(Error::io("remove the pins"))?;
    detached
}
