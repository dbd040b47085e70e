//! What the datapath has counted, read from its pins: it does not need a daemon, since the maps
//! outlive it. docs/counters.md says what each number means. Nothing is written here.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::ops::AddAssign;
use std::path::Path;

use libbpf_rs::Result as BpfResult;
use serde::{Deserialize, Serialize};

use super::hooks;
use super::load::Error;
use super::maps::Table;
use super::registry::{BACKENDS, SERVICES, protocol, socket};
use super::skeleton::types;
use super::{bpffs, record::Record};
use crate::service::Protocol;
use crate::table::Table as Text;

/// The names of `enum drop_reason`, without `DROP_`, in its order.
const DROP_REASONS: [&str; types::drop_reason::DROP_REASONS.0 as usize] = [
    "GATE_CLOSED",
    "TRUNCATED",
    "BAD_LENGTH",
    "BAD_HEADER",
    "BAD_CHECKSUM",
    "BAD_SOURCE",
    "LAND",
    "FRAGMENT",
    "TTL",
    "NO_FLOW",
    "REPLY_NO_FLOW",
    "HANDSHAKE",
    "NO_BACKEND",
    "BACKEND_DOWN",
    "PORTS_EXHAUSTED",
    "TABLE_FULL",
    "STALE",
    "NO_ROUTE",
    "REWRITE",
    "TOO_BIG",
    "UNSUPPORTED",
    "TINY_FRAGMENT",
    "EARLY_FRAGMENT",
    "SERVICE_FULL",
    "BACKEND_FULL",
    "SOURCE_FULL",
    "ANSWER_LIMITED",
    "ICMP_FORGED",
    "ICMP_NO_FLOW",
    "ARP_NO_LEASE",
    "ND_NO_LEASE",
    "SENT_NO_LEASE",
];

/// Everything that is counted, since the maps were made.
#[derive(Debug, Clone, Serialize)]
pub struct Counters {
    /// Packets dropped, by reason; every reason is there.
    pub drops: BTreeMap<&'static str, u64>,
    /// The services in the kernel, in the order of their addresses.
    pub services: Vec<ServiceCounters>,
}

/// A service's.
#[derive(Debug, Clone, Serialize)]
pub struct ServiceCounters {
    /// Its VIP and port.
    pub listen: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Flows that it has now: established, and not closed.
    pub live: u32,
    /// Its traffic, also with backends that have gone.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Its backends, in the order of their addresses.
    pub backends: Vec<BackendCounters>,
}

/// A backend's, in one service.
#[derive(Debug, Clone, Serialize)]
pub struct BackendCounters {
    /// Where it is.
    pub address: SocketAddr,
    /// What it may get.
    pub state: BackendState,
    /// Flows that it has now.
    pub live: u32,
    /// Its traffic.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// What the kernel may give to a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// New flows too.
    Up,
    /// Packets of the flows it has.
    Drained,
    /// Nothing.
    Down,
}

/// Packets, bytes (as the IP headers say) and flows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets from clients.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Flows whose first packet was sent on.
    pub flows_begun: u64,
    /// And of them established.
    pub flows_established: u64,
}

impl AddAssign<types::traffic> for Traffic {
    fn add_assign(&mut self, of_cpu: types::traffic) {
        // Counters of the kernel wrap too.
        let add = |sum: &mut u64, n| *sum = sum.wrapping_add(n);
        add(&mut self.packets_in, of_cpu.packets_in);
        add(&mut self.bytes_in, of_cpu.bytes_in);
        add(&mut self.packets_out, of_cpu.packets_out);
        add(&mut self.bytes_out, of_cpu.bytes_out);
        add(&mut self.flows_begun, of_cpu.flows_begun);
        add(&mut self.flows_established, of_cpu.flows_established);
    }
}

impl Counters {
    /// Reads what is pinned in this network namespace; `None` where no datapath is loaded.
    pub fn read() -> Result<Option<Self>, Error> {
        let folder = bpffs::folder().map_err(Error::io("find the pins"))?;
        let pinned = folder.try_exists().map_err(Error::io("look for pins"))?;
        // Pins of a namespace where nothing is attached are another life's.
        if hooks::attached()?.is_empty() {
            return Ok(None);
        }
        if !pinned {
            let others = bpffs::other_layouts().map_err(Error::io("look for pins"))?;
            return match others.first() {
                Some(other) => Err(Error::OtherLayout(other.display().to_string())),
                None => Ok(None),
            };
        }
        let pins = Pins::open(&folder).map_err(Error::bpf("open the datapath's tables"))?;
        pins.read().map(Some).map_err(Error::bpf("read the datapath's tables"))
    }

    /// For people: the drops, then the traffic; `all` shows reasons that never came too.
    pub fn render(&self, all: bool) -> String {
        let mut drops = Text::new(&["DROPPED", "PACKETS"]);
        for (reason, count) in self.drops.iter().filter(|(_, count)| all || **count > 0) {
            drops.row([reason as &dyn Display, count]);
        }
        let mut text = if drops.is_empty() {
            "No packet was dropped.\n".to_owned()
        } else {
            drops.to_string()
        };
        let mut traffic = Text::new(&[
            "SERVICE",
            "BACKEND",
            "STATE",
            "LIVE",
            "FLOWS",
            "ESTABLISHED",
            "PACKETS IN",
            "BYTES IN",
            "PACKETS OUT",
            "BYTES OUT",
        ]);
        for service in &self.services {
            let name = service.to_string();
            add_row(&mut traffic, [&name, "(all)", ""], service.live, &service.traffic);
            for backend in &service.backends {
                let address = backend.address.to_string();
                let names = ["", &address, backend.state.word()];
                add_row(&mut traffic, names, backend.live, &backend.traffic);
            }
        }
        text.push('\n');
        text += &traffic.to_string();
        text
    }
}

impl Display for ServiceCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}/{protocol}", self.listen)
    }
}

impl BackendState {
    /// `None` for one that is not in use.
    fn of(record: &types::backend) -> Option<Self> {
        match types::backend_state(record.state.into()) {
            types::backend_state::BACKEND_UP => Some(Self::Up),
            types::backend_state::BACKEND_DRAINED => Some(Self::Drained),
            types::backend_state::BACKEND_DOWN => Some(Self::Down),
            _ => None,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Drained => "drained",
            Self::Down => "down",
        }
    }
}

fn add_row(table: &mut Text, names: [&str; 3], live: u32, traffic: &Traffic) {
    let numbers = [
        live.into(),
        traffic.flows_begun,
        traffic.flows_established,
        traffic.packets_in,
        traffic.bytes_in,
        traffic.packets_out,
        traffic.bytes_out,
    ];
    table.row(names.map(str::to_owned).into_iter().chain(numbers.map(|n| n.to_string())));
}

/// The maps that this needs.
struct Pins {
    services: Table<types::service_key, u32>,
    backend_table: Table<u32, types::backend>,
    drops: Table<u32, u64>,
    service_traffic: Table<u32, types::traffic>,
    backend_traffic: Table<u32, types::traffic>,
    service_live: Table<u32, types::live>,
    backend_live: Table<u32, types::live>,
}

impl Pins {
    fn open(folder: &Path) -> BpfResult<Self> {
        fn table<K: Record, V: Record>(folder: &Path, name: &str) -> BpfResult<Table<K, V>> {
            Table::pinned(&folder.join(name))
        }
        Ok(Self {
            services: table(folder, "services")?,
            backend_table: table(folder, "backend_table")?,
            drops: table(folder, "drops")?,
            service_traffic: table(folder, "service_traffic")?,
            backend_traffic: table(folder, "backend_traffic")?,
            service_live: table(folder, "service_live")?,
            backend_live: table(folder, "backend_live")?,
        })
    }

    fn read(&self) -> BpfResult<Counters> {
        let mut backends = self.backends()?;
        let mut services = Vec::new();
        for (key, id) in self.services.slices(SERVICES)? {
            let Some(protocol) = protocol(key.protocol) else { continue };
            let mut backends = backends.remove(&id).unwrap_or_default();
            backends.sort_unstable_by_key(|backend| backend.address);
            let traffic = sum(&self.service_traffic, id)?;
            let live = live(&self.service_live, id)?;
            let listen = socket(key.vip, key.port);
            services.push(ServiceCounters { listen, protocol, live, traffic, backends });
        }
        services.sort_unstable_by_key(|service| (service.listen, service.protocol as u8));
        Ok(Counters { drops: self.drops()?, services })
    }

    fn drops(&self) -> BpfResult<BTreeMap<&'static str, u64>> {
        let count = |(reason, name)| {
            let counts = self.drops.find_per_cpu(&reason)?;
            Ok((name, counts.into_iter().fold(0, u64::wrapping_add)))
        };
        (0..).zip(DROP_REASONS).map(count).collect()
    }

    /// Those in use, by service.
    fn backends(&self) -> BpfResult<HashMap<u32, Vec<BackendCounters>>> {
        let mut backends: HashMap<u32, Vec<_>> = HashMap::new();
        for (id, record) in self.backend_table.slices(BACKENDS)? {
            let Some(state) = BackendState::of(&record) else { continue };
            let address = socket(record.address, record.port);
            let traffic = sum(&self.backend_traffic, id)?;
            let live = live(&self.backend_live, id)?;
            let of_service = backends.entry(record.service).or_default();
            of_service.push(BackendCounters { address, state, live, traffic });
        }
        Ok(backends)
    }
}

/// Flows now.
fn live(table: &Table<u32, types::live>, id: u32) -> BpfResult<u32> {
    Ok(table.find(&id)?.as_ref().map_or(0, super::live::flows))
}

/// Over all CPUs.
fn sum(table: &Table<u32, types::traffic>, id: u32) -> BpfResult<Traffic> {
    let mut sum = Traffic::default();
    for of_cpu in table.find_per_cpu(&id)? {
        sum += of_cpu;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reasons_are_those_of_the_kernel_and_explained() {
        let header = include_str!("bpf/counters.h");
        let (_, from) = header.split_once("enum drop_reason {").unwrap();
        let (reasons, _) = from.split_once("\tDROP_REASONS").unwrap();
        let reasons = reasons.lines().filter_map(|line| {
            let (name, _) = line.trim().strip_prefix("DROP_")?.split_once([' ', ','])?;
            Some(name)
        });
        assert!(reasons.eq(DROP_REASONS));
        let page = include_str!("../../docs/counters.md");
        for reason in DROP_REASONS {
            assert!(page.contains(&format!("\n| `{reason}` |")), "{reason}");
        }
    }

    #[test]
    fn what_is_zero_shows_on_demand_alone() {
        let mut drops: BTreeMap<_, _> = DROP_REASONS.map(|reason| (reason, 0)).into();
        let counters = |drops| Counters { drops, services: Vec::new() };
        assert!(counters(drops.clone()).render(false).starts_with("No packet was dropped.\n"));
        drops.insert("NO_FLOW", 7);
        let some = counters(drops.clone()).render(false);
        assert!(some.starts_with("DROPPED  PACKETS\nNO_FLOW        7\n\nSERVICE"), "{some}");
        let all = counters(drops).render(true);
        assert!(DROP_REASONS.iter().all(|reason| all.contains(reason)), "{all}");
    }
}
