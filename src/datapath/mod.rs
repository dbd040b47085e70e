//! The kernel datapath: passthrough and direct server return, in eBPF.
//!
//! The C is in `bpf/` (begin with `bpf/core.h`); docs/decisions/datapath.md says what the maps are
//! and who writes them. Here it is loaded, told what to do, and cleaned up after.
//!
//! * `load`: the object → programs and maps in the kernel, pinned in `bpffs`, attached.
//! * `skeleton`, `record`, `maps`: what libbpf-cargo generates, its types as bytes, the maps typed.
//! * `registry`: pools → services, backends, schedules, under lasting numbers; `routes`.
//! * `gate`, `clock`: the lease that the kernel enforces, and the jiffies that it is timed by.
//! * `collector`: flows that are over. `live`: how many there are of each, put right.
//! * `counters`: what was counted, read from the pins.
//! * `fragments`: those that came ahead of the first of their datagram.
//! * `sessions`: the flows there are, to be listed.
//!
//! Once it is attached, packets never pass through here.

pub mod bpffs;
pub mod clock;
pub mod collector;
pub mod counters;
mod fragments;
pub mod gate;
pub mod live;
pub mod load;
pub mod maps;
pub mod record;
mod registry;
pub mod routes;
pub mod sessions;
pub mod skeleton;
pub mod slices;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_ha::config::Vip;

use self::clock::Clock;
use self::collector::{Ages, Collector};
use self::counters::Counters;
use self::fragments::Fragments;
use self::gate::Gate;
use self::load::{Error, Loaded, Sizes};
use self::maps::Maps;
use self::registry::Registry;
use self::sessions::{Sessions, Wanted};
use crate::pool::Pool;

/// How long the gate stays open without being renewed.
pub const LEASE: Duration = Duration::from_secs(1);

/// The running datapath. Dropping it leaves what is in the kernel as it is: flows go on for as
/// long as the gate is open.
#[derive(Debug)]
pub struct Datapath {
    loaded: Loaded,
    maps: Arc<Maps>,
    gate: Gate,
    clock: Clock,
    collector: Collector,
    /// Works by itself.
    _fragments: Fragments,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    registry: Registry,
    /// Interfaces that this process has attached to: its program is the one that runs there.
    attached: HashSet<u32>,
}

impl Datapath {
    /// Loads the datapath, or takes over what an earlier daemon left, and serves the pools whose
    /// packets stay in the kernel.
    pub fn start(sizes: Sizes, pools: &[Arc<Pool>], vips: &[Vip]) -> Result<Self, Error> {
        let loaded = Loaded::pinned(sizes)?;
        let clock = loaded.clock()?;
        let maps = Arc::new(loaded.maps()?);
        let registry = Registry::read(Arc::clone(&maps), clock)
            .map_err(Error::bpf("read the datapath's tables"))?;
        let ages = Ages {
            usual: clock.timeout(registry::CLOSED),
            hurried: clock.timeout(registry::CLOSED_HURRIED),
        };
        let collector = Collector::start(loaded.clone(), Arc::clone(&maps), ages)
            .map_err(Error::io("start the collector"))?;
        let fragments = Fragments::start(loaded.clone())
            .map_err(Error::io("start the thread that holds fragments"))?;
        let datapath = Self {
            gate: loaded.gate()?,
            loaded,
            maps,
            clock,
            collector,
            _fragments: fragments,
            state: Mutex::new(State { registry, attached: HashSet::new() }),
        };
        datapath.apply(pools, vips)?;
        Ok(datapath)
    }

    /// Brings the kernel in line with the pools: services, backends and their states, schedules,
    /// routes, interfaces. Costs little where nothing has changed; may be called at any time.
    pub fn apply(&self, pools: &[Arc<Pool>], vips: &[Vip]) -> Result<(), Error> {
        let mut state = self.state.lock().expect("no panic while it is held");
        let applied = state.registry.apply(pools, vips)?;
        for ifindex in applied.interfaces {
            if !state.attached.contains(&ifindex) || !load::is_attached(ifindex) {
                self.loaded.attach_tc(ifindex)?;
                state.attached.insert(ifindex);
                tracing::info!(ifindex, hook = "tc", "datapath attached");
            }
        }
        if applied.gone {
            self.collector.look_at_all();
        }
        Ok(())
    }

    /// Opens the gate for [`LEASE`] from now on. To be called often enough while Active.
    pub fn renew_lease(&self) -> Result<(), Error> {
        self.gate.open_until(self.loaded.jiffies()? + self.clock.jiffies(LEASE));
        Ok(())
    }

    /// Closes the gate.
    pub fn end_lease(&self) {
        self.gate.close();
    }

    /// What it does at this moment. Tens of system calls and more: not for every packet.
    pub fn report(&self) -> Result<Report, Error> {
        let name = |ifindex| match nix::net::if_::if_indextoname(ifindex) {
            Ok(name) => name.to_string_lossy().into_owned(),
            // It has gone meanwhile.
            Err(_) => ifindex.to_string(),
        };
        Ok(Report {
            tc: load::attached_interfaces()?.into_iter().map(name).collect(),
            gate_open: self.loaded.jiffies()? < self.gate.deadline_jiffies(),
            flows: self.collector.counted(),
            most_flows: self.maps.flows.capacity(),
            counters: Counters::read()?,
        })
    }

    /// Flows that are wanted, under the names that they have in these pools.
    pub fn sessions(&self, wanted: &Wanted, pools: &[Arc<Pool>]) -> Result<Sessions, Error> {
        let now = self.loaded.jiffies()? as u32;
        let walk = sessions::Walk { maps: &self.maps, clock: self.clock, now, pools, wanted };
        walk.run().map_err(Error::bpf("read the flows"))
    }

    /// Jiffies now, as flows have them (their low 32 bits).
    pub fn jiffies(&self) -> Result<u64, Error> {
        self.loaded.jiffies()
    }

    /// The programs, to run them on packets of one's own.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// The maps, to read flows and counters.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }
}

/// The datapath at one moment.
#[derive(Debug)]
pub struct Report {
    /// Names of the interfaces that have our TC filter.
    pub tc: Vec<String>,
    /// Whether packets may pass.
    pub gate_open: bool,
    /// Entries of established flows, also of those that are closed and not yet removed.
    pub flows: u32,
    /// The most there may be.
    pub most_flows: u32,
    /// What was counted; `None` once it is unloaded.
    pub counters: Option<Counters>,
}

/// Takes the datapath off every interface of this network namespace and removes its pins, and so
/// its flows.
pub fn unload() -> Result<(), Error> {
    for ifindex in load::attached_interfaces()? {
        load::detach_tc(ifindex)?;
        tracing::info!(ifindex, "datapath detached");
    }
    bpffs::remove().map_err(Error::io("remove the pins"))
}
