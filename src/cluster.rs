//! What all nodes know, beside the flows: settings of operators and what each node sees
//! ([`baton_ha::state`]), between the peer channel and the pools.
//!
//! [`Cluster`] is the exchange with the peers; [`Follower`] brings the pools in line with it, says
//! to the peers what they see, and notices when this node should give way. Neither decides
//! anything: the machines of `baton_ha::state` do. [`kept`] is the file that settings are in.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_ha::config::HaConfig;
use baton_ha::driver::{PeerPort, View as Standing};
use baton_ha::state::selection::{Own, Selection};
use baton_ha::state::settings::{Full, Kind};
use baton_ha::state::shared::{Input, Output};
use baton_ha::state::sick::{GiveWay, Seen, Sick};
use baton_ha::state::{Admin, Health, Setting, Shared, Target, Value, View};
use baton_ha::vrrp::router::State;
use tokio::sync::{mpsc, watch};

use crate::pool::{Member, Pool};

pub mod kept;

use kept::Kept;

/// What the Active said is held for at least so long after it has fallen silent.
const KEEP: Duration = Duration::from_secs(10);

/// The exchange with the peers.
#[derive(Debug)]
pub struct Cluster {
    shared: Mutex<Shared>,
    /// To each peer, by its place in the configuration.
    to: Vec<mpsc::Sender<Vec<u8>>>,
    names: Vec<String>,
    news: watch::Sender<()>,
    gave_way: Mutex<Option<GaveWay>>,
    kept: Mutex<Kept>,
}

/// The last time that this node gave way to one that sees more backends.
#[derive(Debug, Clone)]
pub struct GaveWay {
    /// When.
    pub at: Instant,
    /// To whom.
    pub to: String,
    /// What both saw.
    pub seen: Seen,
}

/// What the checks of each peer say, by its name.
pub type Sights = BTreeMap<String, BTreeMap<Target, Health>>;

impl Cluster {
    /// A node's part, which knows what it kept in that folder, and has no peers.
    pub fn new(node: &str, folder: &Path) -> Self {
        let (kept, remembered) = Kept::open(folder);
        let (shared, news) = (Mutex::new(Shared::new(node)), watch::Sender::new(()));
        let (gave_way, kept) = (Mutex::new(None), Mutex::new(kept));
        let cluster = Self { shared, to: Vec::new(), names: Vec::new(), news, gave_way, kept };
        cluster.handle(Input::Remembered(remembered));
        cluster
    }

    /// The same with these peers, in the order of the configuration.
    pub fn with_peers(mut self, names: Vec<String>, port: Option<&PeerPort>) -> Self {
        self.names = names;
        self.to = port.map_or_else(Vec::new, |port| port.to.clone());
        self
    }

    /// Takes in what happened, and sends what there is to be said.
    pub fn handle(&self, input: Input) {
        let now = Instant::now();
        self.act(|shared| shared.handle_input(now, input));
    }

    /// An operator sets something on this node.
    ///
    /// # Errors
    ///
    /// [`Full`].
    pub fn set(&self, target: Target, value: Value) -> Result<(), Full> {
        let now = Instant::now();
        self.act(|shared| shared.set(now, target, value))
    }

    /// Changes whenever settings do, or what a peer sees.
    pub fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// What operators have set.
    pub fn settings(&self) -> Vec<Setting> {
        self.read(|shared| shared.settings().each().collect())
    }

    /// Where they are kept, and how that goes.
    pub fn kept(&self) -> Kept {
        self.kept.lock().expect("no panic while it is held").clone()
    }

    /// Whether what is set now is on the disk.
    pub fn is_kept(&self) -> bool {
        self.kept().has(self.read(|shared| shared.settings().sum()))
    }

    /// Writes what is set to the disk, and waits for it, unless it is there. There is one caller.
    pub fn keep(&self) {
        if self.is_kept() {
            return;
        }
        let settings = self.settings();
        let written = kept::write(&self.kept().file, &settings);
        self.kept.lock().expect("no panic while it is held").note(&settings, written);
    }

    /// What the checks of each peer say that can be asked now.
    pub fn sights(&self) -> Sights {
        let now = Instant::now();
        let sees = |view: &View| (view.target, view.sees);
        self.read(|shared| {
            let fresh = |peer| Some((self.name(peer), shared.views_of(now, peer)?));
            let fresh = shared.peers().filter_map(fresh);
            fresh.map(|(name, views)| (name, views.values().map(sees).collect())).collect()
        })
    }

    /// Peers that have come to the same settings as this node, and those that have not.
    pub fn agreed(&self) -> (Vec<String>, Vec<String>) {
        self.read(|shared| {
            let places = 0..self.names.len();
            let (agreed, others): (Vec<_>, Vec<_>) = places.partition(|peer| shared.agrees(*peer));
            let name = |peer: usize| self.name(peer);
            (agreed.into_iter().map(name).collect(), others.into_iter().map(name).collect())
        })
    }

    /// The last time that this node gave way.
    pub fn gave_way(&self) -> Option<GaveWay> {
        self.gave_way.lock().expect("no panic while it is held").clone()
    }

    /// Notes that it does.
    pub fn note_gave_way(&self, gave_way: GaveWay) {
        *self.gave_way.lock().expect("no panic while it is held") = Some(gave_way);
    }

    /// A peer's name.
    pub fn name(&self, peer: usize) -> String {
        self.names.get(peer).cloned().unwrap_or_default()
    }

    fn read<T>(&self, ask: impl FnOnce(&Shared) -> T) -> T {
        ask(&self.shared.lock().expect("no panic while it is held"))
    }

    fn act<T>(&self, act: impl FnOnce(&mut Shared) -> T) -> T {
        let mut shared = self.shared.lock().expect("no panic while it is held");
        let done = act(&mut shared);
        let mut news = false;
        while let Some(output) = shared.poll_output() {
            match output {
                // What a full queue drops is told again when the sums differ.
                Output::Send(peer, frame) => {
                    if let Some(Err(error)) =
                        self.to.get(peer).map(|to| to.try_send(PeerPort::encode(frame)))
                    {
                        tracing::debug!(%error, peer, "word of settings and views was dropped");
                    }
                }
                Output::Settings | Output::Views(_) => news = true,
            }
        }
        drop(shared);
        if news {
            self.news.send_replace(());
        }
        done
    }
}

/// What brings the pools in line.
#[derive(Debug)]
pub struct Follower {
    cluster: Arc<Cluster>,
    selection: Selection,
    sick: Sick,
    active: bool,
    /// Services on these move with them; the others are each node's own business.
    vips: Vec<IpAddr>,
}

impl Follower {
    /// For a node of this election, which gives way when a peer has seen more for `sick_after`.
    pub fn new(cluster: Arc<Cluster>, ha: &HaConfig, sick_after: Option<Duration>) -> Self {
        let keep = KEEP.max(ha.advert_interval.duration() * 4);
        Self {
            cluster,
            selection: Selection::new(keep),
            sick: Sick::new(sick_after),
            active: false,
            vips: ha.vips.iter().map(|vip| vip.address).collect(),
        }
    }

    /// Brings these pools in line with what the cluster knows, and tells it what they see. `Some`:
    /// this node should give way.
    pub fn follow(&mut self, pools: &[Arc<Pool>], view: &Standing) -> Option<GiveWay> {
        let now = Instant::now();
        apply_settings(&self.cluster, pools);
        let moves = |pool: &&Arc<Pool>| self.vips.contains(&pool.service.vip());
        let shared: Vec<_> = pools
            .iter()
            .filter(moves)
            .flat_map(|pool| pool.members.iter().map(|member| known(pool, member)))
            .collect();
        self.follow_election(now, &shared, view);
        let mut views = Vec::with_capacity(shared.len());
        for (target, member, own) in &shared {
            member.follow(self.selection.lead(now, target, *own));
            views.push(View { target: *target, sees: own.sees, selects: member.health() });
        }
        let stands_by = view.state == State::Backup;
        self.cluster.act(|cluster| {
            cluster.handle_input(now, Input::StandsBy(stands_by));
            cluster.handle_input(now, Input::Views(views));
            cluster.handle_timeout(now);
        });
        self.look(now, &shared)
    }

    /// How many backends are selected by what the Active before this one said.
    pub fn inherited(&self) -> usize {
        self.selection.inherited()
    }

    fn follow_election(&mut self, now: Instant, shared: &[Known<'_>], view: &Standing) {
        let active = view.state == State::Active;
        match (self.active, active) {
            (false, true) => {
                let own = shared.iter().map(|(target, _, own)| (*target, *own));
                self.selection.activate(now, own);
                let inherited = self.selection.inherited();
                tracing::info!(inherited, "backends are selected as the Active before did");
            }
            (true, false) => self.selection.resign(),
            (true, true) | (false, false) => {}
        }
        self.active = active;
        let name = view.active.as_ref().and_then(|heard| heard.name.as_ref());
        let Some(place) = view.peers.iter().position(|peer| Some(&peer.name) == name) else {
            return;
        };
        let selection = &mut self.selection;
        self.cluster.read(|cluster| {
            if let Some(views) = cluster.views_of(now, place) {
                selection.hold(now, views);
            }
        });
    }

    fn look(&mut self, now: Instant, shared: &[Known<'_>]) -> Option<GiveWay> {
        let used = |member: &Member| member.admin() == Admin::Enabled;
        let here = || {
            let used = shared.iter().filter(|(_, member, _)| used(member));
            used.map(|(target, _, own)| (*target, own.sees))
        };
        let (sick, active) = (&mut self.sick, self.active);
        self.cluster.read(|cluster| {
            let able = cluster.peers().filter(|peer| active && cluster.stands_by(*peer));
            let seen = able.filter_map(|peer| {
                Some((peer, Seen::compare(here(), cluster.views_of(now, peer)?)))
            });
            sick.look(now, seen)
        })
    }
}

/// A backend that all nodes know of.
type Known<'a> = (Target, &'a Arc<Member>, Own);

fn known<'a>(pool: &Pool, member: &'a Arc<Member>) -> Known<'a> {
    let say = pool.service.check.as_ref().map_or(0, |check| check.rise.max(check.fall).max(1));
    let own = Own { sees: member.sees(), probes: member.probes(), say };
    (pool.service.target(&member.backend), member, own)
}

/// Has the pools do what operators have set, here or elsewhere. A setting of a backend that no pool
/// has stays what it is: the backend may come back, and other nodes may have it.
pub fn apply_settings(cluster: &Cluster, pools: &[Arc<Pool>]) {
    for pool in pools {
        for member in &pool.members {
            let target = pool.service.target(&member.backend);
            let (admin, weight) = cluster.read(|shared| {
                let find = |kind| shared.settings().find(&(target, kind));
                let admin = match find(Kind::Admin) {
                    Some((Value::Admin(admin), _)) => admin,
                    _ => Admin::Enabled,
                };
                let weight = match find(Kind::Weight) {
                    Some((Value::Weight(weight), _)) => weight,
                    _ => None,
                };
                (admin, weight)
            });
            let was = (member.set_admin(admin), member.weight());
            member.weigh(weight);
            if was != (admin, member.weight()) {
                tracing::info!(
                    service = pool.service.name,
                    backend = member.backend.name,
                    from = %was.0,
                    to = %admin,
                    weight = member.weight(),
                    "set by the operator"
                );
            }
        }
    }
}
