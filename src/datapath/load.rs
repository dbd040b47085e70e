//! From the object in this program to programs and maps in the kernel: opened, sized, joined to
//! maps that an earlier daemon left pinned, loaded, pinned. `hooks` attaches it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;

use baton_ha::lease;
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapHandle, ProgramInput};

use super::bpffs;
use super::clock::{Clock, Sighting, Tick};
use super::gate::Gate;
use super::hooks;
use super::mapped::Mapped;
use super::maps::Maps;
use super::record::Record as _;
use super::skeleton::{DatapathSkel, DatapathSkelBuilder, OpenDatapathSkel, types};

/// How big the tables are that the configuration sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Established flows.
    pub flows: u32,
    /// Half-open flows.
    pub half_open_flows: u32,
    /// Clients that keep to a backend.
    pub affinities: u32,
}

/// Why the datapath could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libbpf or the kernel refused.
    #[error("{doing}")]
    Bpf {
        /// What was being done.
        doing: String,
        /// The error.
        #[source]
        source: libbpf_rs::Error,
    },
    /// A system call failed.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// Pinned maps have other sizes than the configuration asks for.
    #[error(
        "the flow tables in the kernel have room for {pinned} in `{map}`, the configuration says \
         {wanted}: run `baton unload` (which ends their flows) and start again, or write the old \
         size under [datapath]"
    )]
    Resized {
        /// The map.
        map: &'static str,
        /// Its size.
        pinned: u32,
        /// What is wanted.
        wanted: u32,
    },
    /// Another version's maps are there.
    #[error(
        "the kernel holds the datapath of another version of baton ({0}), whose tables this one \
         can't read: run `baton unload` (which ends its flows) and start again"
    )]
    OtherLayout(String),
    /// Something is to be sent in the name of a VIP that this node does not hold.
    #[error("this node is not Active, and does not speak for its VIPs: ask the node that is")]
    GateClosed,
    /// A table is full.
    #[error("there are more {what} than the datapath has room for ({most}): remove some")]
    Full {
        /// Of what.
        what: &'static str,
        /// Most of them.
        most: u32,
    },
    /// Another process serves this network namespace.
    #[error(
        "the datapath of this network namespace is in the hands of {}: stop it first",
        holder.map_or("another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Taken {
        /// Its number.
        holder: Option<u32>,
    },
    /// A driver does not do what `hook = "xdp"` asks for.
    #[error(
        "XDP can't be attached to {name} (driver {driver}): {why}; write `hook = \"auto\"` or \
         `hook = \"tc\"` under [datapath], or let the driver do it"
    )]
    Refused {
        /// The interface.
        name: String,
        /// Its driver.
        driver: String,
        /// What the refusal means.
        why: String,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// There is no way to an address.
    #[error("there is no route to {0}: give this node an address in its network, or a route")]
    NoRoute(std::net::IpAddr),
}

impl Error {
    pub(super) fn bpf(doing: impl Into<String>) -> impl FnOnce(libbpf_rs::Error) -> Self {
        |source| Self::Bpf { doing: doing.into(), source }
    }

    pub(super) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Io { doing: doing.into(), source }
    }
}

/// Programs and maps in the kernel. Dropping it closes our descriptors; what is pinned or attached
/// stays.
#[derive(Clone)]
pub struct Loaded {
    skeleton: Arc<DatapathSkel<'static>>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").finish_non_exhaustive()
    }
}

impl Loaded {
    /// Loads the datapath into the kernel, joined to what is pinned in this network namespace, and
    /// pins it.
    pub fn pinned(sizes: Sizes) -> Result<Self, Error> {
        bpffs::mount_bpffs().map_err(Error::io(format!("mount {}", bpffs::ROOT)))?;
        // Nothing is attached: the interfaces, and maybe the namespace, are not those that the
        // pins were made for (a number of a namespace is given to another one once it is gone).
        if hooks::attached()?.is_empty() {
            bpffs::remove().map_err(Error::io("remove pins that nothing uses"))?;
        }
        let folder = bpffs::prepare().map_err(Error::io("make a folder for the pins"))?;
        let mut open = open(sizes)?;
        for (name, size) in [
            ("flows", Some(sizes.flows)),
            ("replies", Some(sizes.flows)),
            ("sources", Some(sizes.flows)),
            ("affinities", Some(sizes.affinities)),
            ("half_affinities", Some(sizes.half_open_flows)),
            ("half_flows", Some(sizes.half_open_flows)),
            ("half_replies", Some(sizes.half_open_flows)),
        ] {
            check_size(&folder, name, size)?;
        }
        pin_maps(&mut open, &folder)?;
        load(open)
    }

    /// Loads the datapath without pinning: it is gone when this is dropped, if nothing is
    /// attached. For tests.
    pub fn unpinned(sizes: Sizes) -> Result<Self, Error> {
        load(open(sizes)?)
    }

    /// The maps.
    pub fn maps(&self) -> Result<Maps, Error> {
        Maps::of(&self.skeleton.maps).map_err(Error::bpf("open the maps"))
    }

    /// The gate.
    pub fn gate(&self) -> Result<Gate, Error> {
        Gate::map(self.skeleton.maps.data_gate.as_fd()).map_err(Error::io("map the gate"))
    }

    /// Whether events are reported, and how many were lost.
    pub(super) fn reporting(&self) -> Result<Mapped<types::reporting>, Error> {
        let section = self.skeleton.maps.data_events.as_fd();
        Mapped::map(section).map_err(Error::io("map the switch of events"))
    }

    /// The ring of events.
    pub fn events(&self) -> Result<MapHandle, Error> {
        MapHandle::try_from(&self.skeleton.maps.events).map_err(Error::bpf("open the events"))
    }

    /// How long a jiffy is. Waits 100 ms where it does not show at once.
    pub fn clock(&self) -> Result<Clock, Error> {
        let first = self.reading()?;
        if let Some(clock) = Clock::at(first) {
            return Ok(clock);
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        Ok(Clock::between(first, self.reading()?))
    }

    /// How the kernel's clocks follow from this process's.
    pub(super) fn tick(&self, clock: Clock) -> Result<Tick, Error> {
        /// A jiffy of the slowest clock, and some time to spare.
        const LONGEST: u64 = 15_000_000;
        let first = self.sighting()?;
        let tick = Tick::new(clock, first);
        // Until the next jiffy begins, whose beginning is then known.
        loop {
            let sighting = self.sighting()?;
            tick.note(sighting);
            let began = sighting.kernel.jiffies != first.kernel.jiffies;
            if began || sighting.after.saturating_sub(first.after) > LONGEST {
                return Ok(tick);
            }
        }
    }

    pub(super) fn sighting(&self) -> Result<Sighting, Error> {
        let before = lease::now();
        let kernel = self.reading()?;
        Ok(Sighting { before, kernel, after: lease::now() })
    }

    /// The jiffies now.
    pub fn jiffies(&self) -> Result<u64, Error> {
        Ok(self.reading()?.jiffies)
    }

    fn reading(&self) -> Result<types::clock, Error> {
        let mut bytes = [0; size_of::<types::clock>()];
        let input = ProgramInput { context_in: Some(&mut bytes), ..Default::default() };
        let failed = || Error::bpf("read the kernel's clock");
        self.skeleton.progs.baton_clock.test_run(input).map_err(failed())?;
        Ok(types::clock::read(&bytes).expect("the buffer has its size"))
    }

    /// Has the collector look at what is in `sweep`.
    pub fn collect(&self) -> Result<(), Error> {
        let run = self.skeleton.progs.baton_collect.test_run(ProgramInput::default());
        run.map(drop).map_err(Error::bpf("run the collector"))
    }

    /// Takes flows out of a count of live ones.
    pub fn repair(&self, repair: types::repair) -> Result<(), Error> {
        let mut bytes = repair.bytes().to_vec();
        let input = ProgramInput { context_in: Some(&mut bytes), ..Default::default() };
        let run = self.skeleton.progs.baton_repair.test_run(input);
        run.map(drop).map_err(Error::bpf("put a count of flows right"))
    }

    /// Where fragments are handed over that came ahead of their first.
    pub(super) fn held_fragments(&self) -> libbpf_rs::Result<MapHandle> {
        MapHandle::try_from(&self.skeleton.maps.held_fragments)
    }

    /// Puts a frame that was handed over back into the interface that it came by, as if it came
    /// now, if the first of its datagram has come or this is its last chance. `false`: not yet.
    pub fn reinject(&self, ifindex: u32, frame: &[u8], last: bool) -> Result<bool, Error> {
        // struct __sk_buff up to `cb`: twelve words that are not asked for here.
        let mut context = [0; 14 * size_of::<u32>()];
        for (at, word) in [(12, ifindex), (13, u32::from(last))] {
            context[at * 4..][..4].copy_from_slice(&word.to_ne_bytes());
        }
        let input = ProgramInput {
            context_in: Some(&mut context),
            data_in: Some(frame),
            ..Default::default()
        };
        let run = self.skeleton.progs.baton_reinject.test_run(input);
        let not_yet = types::reinject::REINJECT_NOT_YET.0;
        Ok(run.map_err(Error::bpf("put a fragment back"))?.return_value != not_yet)
    }

    /// The TC program, for tests that run it on packets of theirs.
    pub fn tc(&self) -> &libbpf_rs::ProgramMut<'static> {
        &self.skeleton.progs.baton_tc
    }

    /// The program on egress, the same.
    pub fn egress(&self) -> &libbpf_rs::ProgramMut<'static> {
        &self.skeleton.progs.baton_egress
    }

    /// The XDP program, the same.
    pub fn xdp(&self) -> &libbpf_rs::ProgramMut<'static> {
        &self.skeleton.progs.baton_xdp
    }
}

fn open(sizes: Sizes) -> Result<OpenDatapathSkel<'static>, Error> {
    quiet();
    // The skeleton borrows the place of its object. One word for each time that a datapath is
    // loaded, which is once in the life of a daemon.
    let place = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = DatapathSkelBuilder::default()
        .open(place)
        .map_err(Error::bpf("read the datapath in this program"))?;
    let failed = || Error::bpf("size the flow tables");
    for map in [&mut open.maps.flows, &mut open.maps.replies, &mut open.maps.sources] {
        map.set_max_entries(sizes.flows).map_err(failed())?;
    }
    for map in
        [&mut open.maps.half_flows, &mut open.maps.half_replies, &mut open.maps.half_affinities]
    {
        map.set_max_entries(sizes.half_open_flows).map_err(failed())?;
    }
    open.maps.affinities.set_max_entries(sizes.affinities).map_err(failed())?;
    Ok(open)
}

/// Says it with the way out, before libbpf says that something does not fit.
fn check_size(folder: &Path, map: &'static str, wanted: Option<u32>) -> Result<(), Error> {
    let path = folder.join(map);
    let (Some(wanted), true) = (wanted, path.exists()) else { return Ok(()) };
    let pinned = MapHandle::from_pinned_path(&path)
        .map_err(Error::bpf(format!("open {}", path.display())))?
        .max_entries();
    if pinned == wanted { Ok(()) } else { Err(Error::Resized { map, pinned, wanted }) }
}

/// Has every map that must outlive us pinned when it is loaded, or taken from where it is pinned.
fn pin_maps(open: &mut OpenDatapathSkel<'static>, folder: &Path) -> Result<(), Error> {
    let maps = &mut open.maps;
    for (name, map) in [
        ("services", &mut maps.services),
        ("service_table", &mut maps.service_table),
        ("backend_table", &mut maps.backend_table),
        ("servers", &mut maps.servers),
        ("addresses", &mut maps.addresses),
        ("schedules", &mut maps.schedules),
        ("flows", &mut maps.flows),
        ("replies", &mut maps.replies),
        ("half_flows", &mut maps.half_flows),
        ("half_replies", &mut maps.half_replies),
        ("fragments", &mut maps.fragments),
        ("flow_counts", &mut maps.flow_counts),
        ("drops", &mut maps.drops),
        ("service_traffic", &mut maps.service_traffic),
        ("backend_traffic", &mut maps.backend_traffic),
        ("service_live", &mut maps.service_live),
        ("backend_live", &mut maps.backend_live),
        ("sources", &mut maps.sources),
        ("affinities", &mut maps.affinities),
        ("half_affinities", &mut maps.half_affinities),
        ("events", &mut maps.events),
        ("gate", &mut maps.data_gate),
        ("changes", &mut maps.data_changes),
        ("legs", &mut maps.legs),
        ("ways", &mut maps.ways),
        ("neighbours", &mut maps.neighbours),
    ] {
        map.set_pin_path(folder.join(name)).map_err(Error::bpf(format!("pin {name}")))?;
    }
    Ok(())
}

fn load(open: OpenDatapathSkel<'static>) -> Result<Loaded, Error> {
    let skeleton = open.load().map_err(Error::bpf(
        "load the datapath into the kernel, which needs CAP_BPF and CAP_NET_ADMIN",
    ))?;
    Ok(Loaded { skeleton: Arc::new(skeleton) })
}

/// libbpf writes to standard error by itself; here it goes the way of every log line. Its warnings
/// are of things that we ask for and bear (a hook that is there already), and errors come back as
/// errors too.
pub(crate) fn quiet() {
    libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Info, |_, text| {
        tracing::debug!(target: "libbpf", "{}", text.trim_end());
    })));
}
