//! Where packets are measured: a relay of a lab with a veth of its own for it, and a datapath with
//! one service and as many flows as are asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_ha::lease::{self, Gate as _};
use nix::net::if_::if_nametoindex;

use super::track::{Hook, Runs, Segment, Track, end_of};
use super::{Case, Cost, FRAMES, Nanoseconds};
use crate::config::Config;
use crate::datapath::gate::Gates;
use crate::datapath::hooks::{self, Choice};
use crate::datapath::load::Sizes;
use crate::datapath::skeleton::types;
use crate::datapath::{self, Datapath};
use crate::lab::bench::{other, quartiles};
use crate::lab::drill::check_signals;
use crate::lab::netns::Netns;
use crate::lab::{Doing as _, LabError};
use crate::pool::Pool;

/// For how long the gate is opened for a round, in nanoseconds.
const LEASE: u64 = 60_000_000_000;
/// Flows that a table has room for at least.
const FEWEST: u32 = 1024;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 100);
const PORT: u16 = 80;
const SERVER_PORT: u16 = 8080;
/// The router that clients are behind, and the first of them.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 10);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);
/// Servers, so that each has at most as many flows as one address has ports here.
const SERVERS: u32 = 64;
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 79, 1, 0);
/// The interface that frames come by and leave by, and its far end.
const INTERFACE: &str = "bench";
const FAR_END: &str = "bench-end";

/// The network of a relay is ready for packets of all cases.
pub(super) fn wire(netns: &Netns) -> Result<(), LabError> {
    let mut lines = format!(
        "link add {INTERFACE} type veth peer name {FAR_END}\nlink set {INTERFACE} up\n\
         link set {FAR_END} up\naddr add 10.79.0.1/16 dev {INTERFACE}\n\
         neigh add {ROUTER} lladdr 02:00:00:01:00:00 dev {INTERFACE}\n\
         route add {CLIENT}/9 via {ROUTER}\n"
    );
    for server in 0..SERVERS {
        let address = nth(SERVER, server);
        lines +=
            &format!("neigh add {address} lladdr 02:00:00:02:00:{server:02x} dev {INTERFACE}\n");
    }
    netns.ip_batch(&lines).doing("wiring the bench's interface")?;
    // `bpf_fib_lookup` answers only where packets are forwarded.
    netns.sysctl(&[("net.ipv4.ip_forward", "1")]).doing("setting kernel parameters")
}

fn nth(first: Ipv4Addr, n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(first.to_bits() + n)
}

/// What things are called in the kernel.
struct Numbers {
    service: u32,
    /// Number and server number of each backend, in the order of their addresses.
    backends: Vec<(u16, u32)>,
    /// What packets to them come from.
    nat: types::address,
}

/// One kind of packet, in this thread's network namespace. Unloads the datapath when dropped.
pub(super) struct Field {
    case: Case,
    datapath: Datapath,
    gates: Gates,
    track: Track,
    numbers: Numbers,
    /// Flows in the table.
    filled: u32,
}

impl Drop for Field {
    fn drop(&mut self) {
        if let Err(error) = datapath::unload() {
            eprintln!("baton: {error}");
        }
    }
}

impl Field {
    pub(super) fn new(case: Case, most: u32) -> Result<Self, LabError> {
        let doing = "setting the datapath up";
        let most = most.max(FEWEST);
        let text = configuration(case, most);
        let config = Config::parse(Path::new("bench"), &text).map_err(other).doing(doing)?;
        let pools: Vec<_> =
            config.services.iter().map(|s| Arc::new(Pool::new(s.clone()))).collect();
        pools.iter().for_each(|pool| pool.stand_unchecked());
        let vips = config.ha.as_ref().map_or(&[][..], |ha| &ha.vips);
        let sizes = Sizes { flows: most, half_open_flows: 256, affinities: 256 };
        let gates = Gates::default();
        let datapath =
            Datapath::start(sizes, Choice::Tc, &pools, vips, &gates).map_err(other).doing(doing)?;
        let index = |name| if_nametoindex(name).map_err(std::io::Error::from).doing(doing);
        let ifindex = index(INTERFACE)?;
        let track = Track::new(ifindex, index(FAR_END)?, datapath.maps().flows.as_fd())?;
        set_ways(&datapath, ifindex).map_err(other).doing(doing)?;
        // What the XDP hook hands over instead of sending it on itself must be missed.
        hooks::detach_tc(ifindex).map_err(other).doing(doing)?;
        let numbers = Numbers::read(&datapath).map_err(other).doing(doing)?;
        Ok(Self { case, datapath, gates, track, numbers, filled: 0 })
    }

    /// Adds flows until there are so many.
    pub(super) fn fill(&mut self, flows: u32) -> Result<(), LabError> {
        let now = self.datapath.jiffies().map_err(other).doing("reading the clock")? as u32;
        for n in self.filled..flows {
            self.add_flow(n, now).map_err(other).doing("filling the flow table")?;
        }
        self.filled = flows;
        Ok(())
    }

    fn add_flow(&self, n: u32, now: u32) -> libbpf_rs::Result<()> {
        let (address, port) = end_of(n);
        let client: types::address = IpAddr::from(nth(CLIENT, address)).into();
        let Numbers { service, ref backends, nat } = self.numbers;
        let service = service as u16;
        let (backend, server) = backends[(address % SERVERS) as usize];
        let maps = self.datapath.maps();
        let key = types::flow_key { client, port: port.to_be(), service };
        let flow = types::flow {
            backend,
            nat_port: port.to_be(),
            seen: now,
            began: now,
            ..Default::default()
        };
        maps.flows.set(&key, &flow)?;
        if self.case.mode.contains("dsr") {
            return Ok(());
        }
        let address = if self.case.mode.contains("client") { client } else { nat };
        let key = types::reply_key { address, server, port: port.to_be(), ..Default::default() };
        let reply = types::reply {
            client,
            port: port.to_be(),
            service,
            backend,
            ifindex: 0,
            seen: now,
            ..Default::default()
        };
        maps.replies.set(&key, &reply)
    }

    fn segment(&self) -> Segment {
        if self.case.from_client {
            Segment { source: CLIENT, destination: VIP, port: PORT, from_client: true }
        } else {
            Segment { source: SERVER, destination: VIP, port: SERVER_PORT, from_client: false }
        }
    }

    /// The cost with as many flows as there are, when packets are of so many of them.
    pub(super) fn measure(&mut self, busy: u32, rounds: usize) -> Result<Cost, LabError> {
        let segment = self.segment();
        self.track.set(&segment, busy, self.numbers.service);
        let (xdp, found) = self.hook(Hook::Xdp, rounds)?;
        let tc = self.case.tc.then(|| self.hook(Hook::Tc, rounds)).transpose()?;
        let tc = tc.map(|(tc, _)| tc);
        let speed = xdp.bare / (xdp.bare + xdp.added);
        Ok(Cost { packet: self.case.name, flows: self.filled, busy, xdp, found, tc, speed })
    }

    /// What the datapath's program takes, and of it a bare look into its table, where that can be
    /// measured.
    fn hook(&mut self, hook: Hook, rounds: usize) -> Result<(Nanoseconds, Option<f64>), LabError> {
        let loaded = self.datapath.loaded().clone();
        let program = match hook {
            Hook::Xdp => loaded.xdp().as_fd(),
            Hook::Tc => loaded.tc().as_fd(),
        };
        // One of each to warm up, and to see the packets counted.
        let (before, handed) = (self.packets()?, self.track.handed());
        let finds = hook == Hook::Xdp && self.case.from_client;
        let (mut bare, mut added, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=rounds {
            check_signals()?;
            self.gates.open(lease::now() + LEASE, 1);
            let mut batch = |runs| self.track.batch(hook, runs, FRAMES).map(nanoseconds);
            let nothing = batch(Runs::Bare)?;
            let written = batch(Runs::Written)?;
            let handled = batch(Runs::Program(program))?;
            let looked_up = finds.then(|| batch(Runs::Found)).transpose()?;
            if round > 0 {
                found.extend(looked_up.map(|looked_up| looked_up - written));
                bare.push(nothing);
                added.push(handled - written);
            }
        }
        let (counted, due) = (self.packets()? - before, self.track.handed() - handed);
        if counted != due {
            let wrong = format!("the datapath has sent on {counted} packets of {due}");
            return Err(other(wrong)).doing("counting packets");
        }
        let [_, bare, _] = quartiles(&mut bare);
        let [low, added, high] = quartiles(&mut added);
        let found = finds.then(|| quartiles(&mut found)[1]);
        Ok((Nanoseconds { bare, added, low, high }, found))
    }

    /// Packets that the datapath has sent on.
    fn packets(&self) -> Result<u64, LabError> {
        let counted = self.datapath.maps().service_traffic.find_per_cpu(&self.numbers.service);
        let counted = counted.map_err(other).doing("reading the counters")?;
        Ok(counted.iter().map(|traffic| traffic.packets_in + traffic.packets_out).sum())
    }
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_nanos() as f64
}

/// The ways of frames at the XDP hook, as the network is wired.
fn set_ways(datapath: &Datapath, ifindex: u32) -> libbpf_rs::Result<()> {
    let maps = datapath.maps();
    let leg = types::leg { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, ..Default::default() };
    maps.legs.set(&ifindex, &leg)?;
    let mapped = |address: Ipv4Addr| types::address::from(IpAddr::from(address));
    let way = |to: Ipv4Addr, bits: u32, kind: types::way_kind| {
        // Of the interface's number and of ::ffff:0:0/96, then of the address itself.
        let key = types::way_key { prefix: 32 + 96 + bits, ifindex, to: mapped(to) };
        let way = types::way { gateway: mapped(ROUTER), kind: kind.0 };
        maps.ways.set(&key, &way)
    };
    way(Ipv4Addr::new(10, 79, 0, 0), 16, types::way_kind::WAY_ON_LINK)?;
    way(CLIENT, 9, types::way_kind::WAY_GATEWAY)?;
    for address in (0..SERVERS).map(|n| nth(SERVER, n)).chain([ROUTER]) {
        let key = types::neighbour_key { address: mapped(address), ifindex };
        let neighbour = types::neighbour { mac: [2, 0, 0, 0, 0, 2], ..Default::default() };
        maps.neighbours.set(&key, &neighbour)?;
    }
    Ok(())
}

impl Numbers {
    fn read(datapath: &Datapath) -> libbpf_rs::Result<Self> {
        let maps = datapath.maps();
        let service = maps.services.slices(SERVERS)?.map(|(_, id)| id).next().unwrap_or(0);
        let records = maps.backend_table.slices(maps.backend_table.capacity())?;
        let mut backends: Vec<_> = records
            .filter(|(_, record)| record.server != 0 && record.service == service)
            .map(|(id, record)| (IpAddr::from(record.address), id as u16, record))
            .collect();
        backends.sort_by_key(|(address, ..)| *address);
        let nat = backends.first().map(|(.., record)| record.nat).unwrap_or_default();
        let backends = backends.into_iter().map(|(_, id, record)| (id, record.server)).collect();
        Ok(Self { service, backends, nat })
    }
}

fn configuration(case: Case, most: u32) -> String {
    let port = if case.mode.contains("dsr") { PORT } else { SERVER_PORT };
    let mut text = format!(
        "[node]\nname = \"bench\"\n[election]\nvrid = 1\n[datapath]\nflows = {most}\n\
         half_open_flows = 256\n\
         [[vips]]\nname = \"vip\"\naddress = \"{VIP}/16\"\ninterface = \"{INTERFACE}\"\n\
         [[services]]\nname = \"web\"\nvip = \"vip\"\nport = {PORT}\n{}\n",
        case.mode
    );
    for server in 0..SERVERS {
        let address = SocketAddr::from((nth(SERVER, server), port));
        text += &format!("[[services.backends]]\nname = \"b{server}\"\naddress = \"{address}\"\n");
    }
    text
}
