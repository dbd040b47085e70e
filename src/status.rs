//! What this node is and knows of the others, as `baton status` shows it: [`Status`] is the JSON
//! (documented in docs/operations.md, stable), [`Status::render`] the text for people.
//!
//! It reads snapshots of [`crate::pool`] and [`baton_ha::driver::View`] and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use baton_ha::config::HaConfig;
use baton_ha::driver::{Heard, PeerView, View, WaitingView};
use baton_ha::state::settings::Kind;
use baton_ha::state::{Setting, Target, Value};
use baton_ha::vrrp::Priority;
use baton_ha::vrrp::router::{Reason, State};
use serde::{Deserialize, Serialize};

use crate::cluster::kept::Kept;
use crate::cluster::{Cluster, GaveWay, Sights};
use crate::datapath::Report;
use crate::datapath::counters::Traffic;
use crate::datapath::hooks::{Chosen, Hook};
use crate::explain::JournalStatus;
use crate::pool::{Admin, Health, Member, Pool};
use crate::service::{Mode, Protocol, Scheduler};

mod gauge;
mod render;

pub use gauge::{FromActive, ReplicaStatus, ReplicationStatus};
pub use render::ago;
pub(crate) use render::{state, why, word};

/// A node at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Name of this node.
    pub node: String,
    /// Name of the cluster.
    pub cluster: String,
    /// Version of the daemon.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// How long it has been running, in seconds.
    pub uptime_s: f64,
    /// The election; `None` for a node without VIPs.
    pub election: Option<Election>,
    /// The datapath in the kernel; `None` where no service has needed it.
    pub datapath: Option<DatapathStatus>,
    /// Flows between nodes; `None` without a peer channel, or without a datapath.
    pub replication: Option<ReplicationStatus>,
    /// The last time that this node gave the VIPs to one that saw more healthy backends.
    pub gave_way: Option<GaveWayStatus>,
    /// What operators have set, and whether the other nodes know.
    pub settings: SettingsStatus,
    /// The journal of decisions (`baton explain`); `None` for a node without VIPs.
    pub journal: Option<JournalStatus>,
    /// The services.
    pub services: Vec<ServiceStatus>,
}

/// A node that saw fewer healthy backends than another gave way to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GaveWayStatus {
    /// To whom.
    pub to: String,
    /// How many backends this node saw up.
    pub here: usize,
    /// How many of the same the other did.
    pub there: usize,
    /// How long ago, in seconds.
    pub ago_s: f64,
}

impl From<GaveWay> for GaveWayStatus {
    fn from(GaveWay { at, to, seen }: GaveWay) -> Self {
        Self { to, here: seen.here, there: seen.there, ago_s: at.elapsed().as_secs_f64() }
    }
}

/// What operators have set about backends. It belongs to the cluster.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SettingsStatus {
    /// Peers that know of all of it.
    pub known_to: Vec<String>,
    /// Peers that don't, or can't be asked.
    pub unknown_to: Vec<String>,
    /// Where this node keeps it.
    pub file: PathBuf,
    /// Why it is not kept there.
    pub trouble: Option<String>,
    /// What is set about backends that this node's file does not have.
    pub elsewhere: Vec<SettingStatus>,
}

/// A setting.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SettingStatus {
    /// The service's address.
    pub service: SocketAddr,
    /// The backend's.
    pub backend: SocketAddr,
    /// What is set, in words.
    pub set: String,
    /// The node that was told so.
    pub by: String,
}

/// The datapath.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatapathStatus {
    /// Where it is attached.
    pub hooks: Vec<HookStatus>,
    /// Whether packets for the VIPs may pass: it is held open while this node is Active.
    pub gate: Gate,
    /// The epoch under which it was opened last; 0: never.
    pub gate_epoch: u64,
    /// Established flows.
    pub flows: u32,
    /// The most there may be.
    pub max_flows: u32,
    /// Clients whose backend is remembered, of services with `affinity`.
    pub affinities: u32,
    /// The most there may be.
    pub max_affinities: u32,
    /// Half-open flows at the collector's last walk.
    pub half_open_flows: u32,
    /// The most there may be.
    pub max_half_open_flows: u32,
    /// Half-open flows that others have pushed out of their table, since it was made.
    pub half_open_pushed_out: u64,
    /// Flows that began on another node, were not replicated in time, and went on here after a
    /// takeover, since the tables were made.
    #[serde(default)]
    pub adopted: u64,
}

/// A hook of an interface.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HookStatus {
    /// Its name.
    pub interface: String,
    /// Which hook.
    pub hook: Hook,
    /// Why it is that one.
    pub why: String,
}

/// The gate of the datapath.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    /// Packets pass.
    Open,
    /// Packets are dropped.
    Closed,
}

/// The election as this node sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Election {
    /// State of the virtual router.
    pub state: State,
    /// Why.
    pub reason: Reason,
    /// Since when (RFC 3339, UTC).
    pub since: String,
    /// For how long, in seconds.
    pub since_s: f64,
    /// How often this node has become Active since it started.
    pub takeovers: u64,
    /// Virtual router identifier.
    pub vrid: u8,
    /// Configured priority.
    pub priority: u8,
    /// What it advertises as Active: more than `priority` while a takeover is held.
    pub advertised_priority: u8,
    /// Advertisement_Interval in milliseconds.
    pub advert_interval_ms: u64,
    /// Whether the HA thread runs at real-time priority; otherwise why not.
    pub realtime: Result<(), String>,
    /// The other nodes: those of the configuration, then strangers that were heard.
    pub peers: Vec<PeerStatus>,
    /// What this node waits for, if its priority is higher than the Active's.
    pub waiting: Option<WaitingStatus>,
    /// Which time of being Active this is, over all nodes, as far as this one has heard.
    pub epoch: u64,
    /// The VIPs.
    pub vips: Vec<VipStatus>,
    /// Where adverts travel.
    pub paths: Vec<PathStatus>,
    /// What was counted, by name.
    pub counters: BTreeMap<String, u64>,
}

/// A node of higher priority than the Active's, which does not have the VIPs yet.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WaitingStatus {
    /// The Active.
    pub active: String,
    /// For how long it has waited, in seconds.
    pub waited_s: f64,
    /// How long it goes on waiting, in seconds; `None`: it has given up, and leaves the Active alone.
    pub left_s: Option<f64>,
    /// Why it does not have the VIPs yet.
    pub why: Option<String>,
    /// Which share of the Active's flows is here, where that is what it waits for.
    pub share: Option<f64>,
}

/// Another node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name; `None` for a node that the configuration doesn't know.
    pub name: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// What its adverts say of it.
    pub state: PeerState,
    /// Seconds since its last advert.
    pub heard_s: Option<f64>,
    /// Priority of its last advert.
    pub priority: Option<u8>,
    /// Adverts heard since this node started.
    pub adverts: u64,
    /// Its peer channel, where this node has one to it.
    pub channel: Option<ChannelStatus>,
}

/// The peer channel to another node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChannelStatus {
    /// Since when it has been up, in seconds; `None`: it is not.
    pub up_s: Option<f64>,
    /// Why it is not.
    pub why: Option<String>,
    /// The version of the protocol that both speak.
    pub version: Option<u16>,
    /// The peer's life: another one after each start of its daemon.
    pub boot: Option<String>,
    /// Messages sent.
    pub sent: u64,
    /// Messages received.
    pub received: u64,
}

/// What adverts say of another node. A Backup is silent in VRRP: it can't be told from one that
/// is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    /// It advertises.
    Active,
    /// It said priority 0.
    Yielded,
    /// It has advertised, and no longer does.
    Silent,
    /// It has not been heard since this node started.
    NeverHeard,
}

/// A VIP.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VipStatus {
    /// Address and prefix length.
    pub address: String,
    /// Its interface.
    pub interface: String,
    /// Whether this node's kernel has it now.
    pub held: bool,
    /// How often something else removed it and it was put back.
    pub restored: u64,
}

/// A path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PathStatus {
    /// Its interface.
    pub interface: String,
    /// This node's address on it.
    pub primary: Option<IpAddr>,
    /// Whether it works; otherwise why not.
    pub usable: Result<(), String>,
    /// Adverts sent.
    pub sent: u64,
    /// Adverts received.
    pub received: u64,
}

/// A service.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// The address and port that clients use.
    pub listen: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Mode.
    pub mode: Mode,
    /// Scheduler.
    pub scheduler: Scheduler,
    /// Connections or UDP sessions now; in the kernel established flows.
    pub connections: u32,
    /// The most it may have.
    pub max_connections: u32,
    /// What was counted, by name.
    pub counters: BTreeMap<String, u64>,
    /// Its traffic in the kernel; `None` for a service in proxy mode.
    pub traffic: Option<Traffic>,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// A backend.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its weight.
    pub weight: u16,
    /// Its weight in the file, where an operator has set another.
    pub file_weight: Option<u16>,
    /// What it is selected by: what this node sees, unless `leads` says otherwise.
    pub health: Health,
    /// What this node's checks say.
    pub sees: Health,
    /// Whether what the Active says (on a Backup), or said before the takeover, selects instead of
    /// this node's checks.
    pub led: bool,
    /// What the checks of the other nodes say, of those that can be asked now.
    pub seen_by: BTreeMap<String, Health>,
    /// Why this node sees it so.
    pub reason: String,
    /// For how long, in seconds.
    pub since_s: f64,
    /// What the operator says.
    pub admin: Admin,
    /// The node that was told so, where an operator has said anything.
    pub admin_by: Option<String>,
    /// Connections or UDP sessions now.
    pub connections: u32,
    /// Since the start.
    pub total: u64,
    /// Connection attempts that failed.
    pub failed: u64,
    /// Its traffic in the kernel, in this service; `None` in proxy mode.
    pub traffic: Option<Traffic>,
    /// Seconds since the last probe.
    pub checked_s: Option<f64>,
    /// How long the last probe took, in milliseconds.
    pub check_ms: Option<f64>,
}

impl Election {
    /// The election of a node from its driver's view.
    pub fn of(ha: &HaConfig, view: &View, now: Instant) -> Self {
        Self {
            state: view.state,
            reason: view.reason,
            since: humantime::format_rfc3339_millis(view.since_wall).to_string(),
            since_s: now.saturating_duration_since(view.since).as_secs_f64(),
            takeovers: view.takeovers,
            vrid: ha.vrid.value(),
            priority: ha.priority.value(),
            advertised_priority: view.priority.value(),
            advert_interval_ms: millis(ha.advert_interval.duration()),
            realtime: view.realtime.clone(),
            peers: peers(ha, view, now),
            waiting: view.waiting.as_ref().map(|waiting| WaitingStatus::of(waiting, now)),
            epoch: view.epoch,
            vips: view.vips.iter().map(VipStatus::of).collect(),
            paths: view.paths.iter().map(PathStatus::of).collect(),
            counters: view.counters.iter().map(|&(name, n)| (name.to_owned(), n)).collect(),
        }
    }
}

impl WaitingStatus {
    fn of(view: &WaitingView, now: Instant) -> Self {
        let seconds = |span: Duration| span.as_secs_f64();
        Self {
            active: view.peer.clone(),
            waited_s: seconds(now.saturating_duration_since(view.since)),
            left_s: view.until.map(|until| seconds(until.saturating_duration_since(now))),
            why: view.why.clone(),
            share: view.flows.map(|(here, of)| here as f64 / of.max(1) as f64),
        }
    }
}

/// The peers of the configuration with the latest advert from any of their addresses, then
/// strangers.
fn peers(ha: &HaConfig, view: &View, now: Instant) -> Vec<PeerStatus> {
    let known = ha.peers.iter().map(|peer| {
        let heard = view.heard.iter().filter(|heard| peer.addresses.contains(&heard.address));
        let channel = view.peers.iter().find(|channel| channel.name == peer.name);
        let channel = channel.map(|channel| ChannelStatus::of(channel, now));
        PeerStatus {
            channel,
            ..PeerStatus::of(Some(&peer.name), peer.addresses.clone(), heard, now)
        }
    });
    let strangers = view
        .heard
        .iter()
        .filter(|heard| heard.name.is_none())
        .map(|heard| PeerStatus::of(None, vec![heard.address], std::iter::once(heard), now));
    known.chain(strangers).collect()
}

impl PeerStatus {
    fn of<'a>(
        name: Option<&str>,
        addresses: Vec<IpAddr>,
        heard: impl Iterator<Item = &'a Heard> + Clone,
        now: Instant,
    ) -> Self {
        let adverts = heard.clone().map(|heard| heard.adverts).sum();
        let last = heard.max_by_key(|heard| heard.at);
        Self {
            name: name.map(str::to_owned),
            addresses,
            state: last.map_or(PeerState::NeverHeard, |heard| peer_state(heard, now)),
            heard_s: last.map(|heard| now.saturating_duration_since(heard.at).as_secs_f64()),
            priority: last.map(|heard| heard.priority.value()),
            adverts,
            channel: None,
        }
    }
}

impl ChannelStatus {
    fn of(view: &PeerView, now: Instant) -> Self {
        let peer = view.up.as_ref().ok();
        Self {
            up_s: view.since.map(|since| now.saturating_duration_since(since).as_secs_f64()),
            why: view.up.as_ref().err().cloned(),
            version: peer.map(|peer| peer.version),
            boot: peer.map(|peer| peer.boot.to_string()),
            sent: view.sent,
            received: view.received,
        }
    }
}

/// A node that has not advertised for three of its intervals and the longest Skew_Time (one
/// more) is no longer Active (RFC 9568 §6.1).
fn peer_state(heard: &Heard, now: Instant) -> PeerState {
    if heard.priority == Priority::YIELD {
        PeerState::Yielded
    } else if now.saturating_duration_since(heard.at) <= heard.interval * 4 {
        PeerState::Active
    } else {
        PeerState::Silent
    }
}

impl VipStatus {
    fn of(view: &baton_ha::driver::VipView) -> Self {
        Self {
            address: format!("{}/{}", view.vip.address, view.vip.prefix),
            interface: view.vip.interface.clone(),
            held: view.held,
            restored: view.restored,
        }
    }
}

impl PathStatus {
    fn of(view: &baton_ha::driver::PathView) -> Self {
        Self {
            interface: view.interface.clone(),
            primary: view.primary,
            usable: view.usable.clone(),
            sent: view.sent,
            received: view.received,
        }
    }
}

impl ServiceStatus {
    /// A service from its pool.
    pub fn of(pool: &Pool, now: SystemTime) -> Self {
        let service = &pool.service;
        Self {
            name: service.name.clone(),
            listen: service.listen,
            protocol: service.protocol,
            mode: service.mode,
            scheduler: service.scheduler,
            connections: pool.connections.load(Relaxed),
            max_connections: service.limits.max_connections,
            counters: pool.counters.named().map(|(name, n)| (name.to_owned(), n)).collect(),
            traffic: None,
            backends: pool.members.iter().map(|member| BackendStatus::of(member, now)).collect(),
        }
    }

    /// Adds what the kernel knows of it, if its packets stay there.
    pub fn add_kernel(&mut self, report: &Report) {
        if !self.mode.is_in_kernel() {
            return;
        }
        let services = report.counters.iter().flat_map(|counters| &counters.services);
        let this = (self.listen, self.protocol);
        let mut same = services.filter(|service| (service.listen, service.protocol) == this);
        let Some(service) = same.next() else { return };
        self.connections = service.live;
        self.traffic = Some(service.traffic);
        for backend in &mut self.backends {
            let mut counted = service.backends.iter();
            if let Some(counted) = counted.find(|counted| counted.address == backend.address) {
                backend.connections = counted.live;
                backend.total = counted.traffic.flows_established;
                backend.traffic = Some(counted.traffic);
            }
        }
    }
}

impl ServiceStatus {
    fn target(&self, backend: &BackendStatus) -> Target {
        Target::new(self.listen, self.protocol.number(), backend.address)
    }

    /// Adds what the other nodes say of its backends, and who has set what about them.
    pub fn add_cluster(&mut self, sights: &Sights, settings: &[Setting]) {
        let targets: Vec<_> = self.backends.iter().map(|backend| self.target(backend)).collect();
        for (backend, target) in self.backends.iter_mut().zip(targets) {
            let seen = |(peer, sights): (&String, &BTreeMap<Target, Health>)| {
                Some((peer.clone(), *sights.get(&target)?))
            };
            backend.seen_by = sights.iter().filter_map(seen).collect();
            let admin = |setting: &&Setting| setting.key() == (target, Kind::Admin);
            let by = |setting: &Setting| setting.version.node.clone();
            backend.admin_by = settings.iter().find(admin).map(by);
        }
    }
}

impl SettingsStatus {
    /// Of the settings of a cluster, beside these services.
    pub fn of(cluster: &Cluster, settings: &[Setting], services: &[ServiceStatus]) -> Self {
        let here: BTreeSet<_> = services
            .iter()
            .flat_map(|service| service.backends.iter().map(|backend| service.target(backend)))
            .collect();
        let elsewhere = settings
            .iter()
            .filter(|setting| !here.contains(&setting.target) && !setting.value.is_default());
        let (known_to, unknown_to) = cluster.agreed();
        let Kept { file, trouble, .. } = cluster.kept();
        let elsewhere = elsewhere.map(SettingStatus::of).collect();
        Self { known_to, unknown_to, file, trouble, elsewhere }
    }
}

impl SettingStatus {
    fn of(setting: &Setting) -> Self {
        Self {
            service: setting.target.service(),
            backend: setting.target.backend(),
            set: match setting.value {
                Value::Admin(admin) => admin.to_string(),
                Value::Weight(Some(weight)) => format!("weight {weight}"),
                Value::Weight(None) => "the file's weight".into(),
            },
            by: setting.version.node.clone(),
        }
    }
}

impl BackendStatus {
    fn of(member: &Arc<Member>, now: SystemTime) -> Self {
        let report = member.report();
        Self {
            name: member.backend.name.clone(),
            address: member.backend.address,
            weight: member.weight(),
            file_weight: member.weight_set().map(|_| member.backend.weight),
            health: member.health(),
            sees: member.sees(),
            led: member.lead().is_some(),
            seen_by: BTreeMap::new(),
            reason: report.reason,
            since_s: age(now, report.since),
            admin: member.admin(),
            admin_by: None,
            connections: member.connections.load(Relaxed),
            total: member.total.load(Relaxed),
            failed: member.failed.load(Relaxed),
            traffic: None,
            checked_s: report.checked.map(|at| age(now, at)),
            check_ms: report.took.map(|took| took.as_secs_f64() * 1e3),
        }
    }
}

/// A wall clock that was set back makes an age of zero, not an error.
fn age(now: SystemTime, then: SystemTime) -> f64 {
    now.duration_since(then).unwrap_or_default().as_secs_f64()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl DatapathStatus {
    /// The datapath from its report.
    pub fn of(report: &Report) -> Self {
        let hook = |(interface, chosen): (&String, &Chosen)| HookStatus {
            interface: interface.clone(),
            hook: chosen.hook,
            why: chosen.why.clone(),
        };
        Self {
            hooks: report.hooks.iter().map(hook).collect(),
            gate: if report.gate_open { Gate::Open } else { Gate::Closed },
            gate_epoch: report.gate_epoch,
            flows: report.flows.all,
            max_flows: report.most_flows,
            affinities: report.affinities,
            max_affinities: report.most_affinities,
            half_open_flows: report.flows.half_open,
            max_half_open_flows: report.most_half_open_flows,
            half_open_pushed_out: report.flows.pushed_out,
            adopted: report.flows.adopted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_active_until_the_slowest_backup_would_claim() {
        let at = Instant::now();
        let heard = |priority| Heard {
            name: None,
            address: "10.77.0.3".parse().expect("an address"),
            priority: Priority::new(priority),
            interval: Duration::from_millis(100),
            at,
            adverts: 1,
        };
        let after = |ms| at + Duration::from_millis(ms);
        assert_eq!(peer_state(&heard(100), after(400)), PeerState::Active);
        assert_eq!(peer_state(&heard(100), after(401)), PeerState::Silent);
        assert_eq!(peer_state(&heard(0), after(1)), PeerState::Yielded);
    }
}
