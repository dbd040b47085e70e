//! Composition root of `baton run`: configuration → pools, proxies, checks, election, control
//! socket; and what happens between them.
//!
//! * The election leaves Active → sessions on the VIPs are reset; the HA thread has closed the gate
//!   of the datapath by then, which it holds open while this node is Active.
//! * A backend changes → so do the kernel's tables.
//! * A command on the control socket → election, pools, or a new configuration.
//! * SIGTERM, SIGINT → yield first, then the sessions end, then the process. SIGHUP → reload.
//!
//! It decides nothing about who is Active, which backend serves, or whether one is up.

use std::fmt;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use baton_ha::channel::key::ClusterKey;
use baton_ha::config::{ChannelConfig, HaConfig, Vip};
use baton_ha::driver::{self, Handle, Outcome, View};
use baton_ha::lease::Lease;
use baton_ha::record::Stamp;
use baton_ha::state::Value;
use baton_ha::vrrp::router::State;
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, watch};
use tokio::time::MissedTickBehavior;

use crate::cluster::{self, Cluster};
use crate::config::system::System;
use crate::config::{self, Config};
use crate::control::{Answer, Caller, Reply, Request, Socket};
use crate::datapath::gate::Gates;
use crate::datapath::sessions::{Ended, Sessions, Wanted};
use crate::datapath::{Datapath, load::Sizes};
use crate::explain::{Around, Backends, Journal, Seen};
use crate::guard;
use crate::health::Checks;
use crate::pool::{Health, Pool};
use crate::proxy::{self, Proxy};
use crate::replication::{self, Replication};
use crate::service::Service;
use crate::status::{
    DatapathStatus, Election, ReplicationStatus, ServiceStatus, SettingsStatus, Status,
};

mod backends;

/// How often the datapath is looked after.
const TEND: Duration = Duration::from_millis(100);
/// How long a node that ends may take to hand over.
const HAND_OVER: Duration = Duration::from_secs(2);

/// What a command came to, for people and as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// One sentence.
    pub summary: String,
    /// Each step with the milliseconds since the command.
    pub steps: Vec<Step>,
    /// Of a takeover or a yield: under which epoch the VIPs are held now, as far as it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// Where the nodes handed the VIPs over: flows that the new Active may lack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_lacking: Option<u64>,
}

/// One step of a command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Milliseconds since the command.
    pub t_ms: f64,
    /// The node that did it, where more than one took part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What was done.
    pub what: String,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.steps.iter().filter_map(|step| step.node.as_ref()).map(String::len).max();
        for Step { t_ms, node, what } in &self.steps {
            match width {
                Some(width) => {
                    let node = node.as_deref().unwrap_or_default();
                    writeln!(f, "{t_ms:9.3} ms  {node:<width$}  {what}")?;
                }
                None => writeln!(f, "{t_ms:9.3} ms  {what}")?,
            }
        }
        if let Some(lacking @ 1..) = self.flows_lacking {
            writeln!(f, "! {lacking} flows, or changes of flows, were not replicated")?;
        }
        writeln!(f, "{}", self.summary)
    }
}

/// Runs a node until it is told to stop.
///
/// # Errors
///
/// A wrong file ([`config::Errors`]), whatever can't be opened, or an HA thread that has ended.
pub fn run(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    start_log(&config.node.log)?;
    warn_of(&config);
    let control = config.node.control.clone();
    // Traffic has threads of its own: this runtime carries checks, commands and signals.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start the runtime")?
        .block_on(async {
            let (balancer, socket) = Balancer::start(config)?;
            let ended = balancer.run(socket).await;
            guard::dismiss(&control);
            ended
        })
}

pub(crate) fn start_log(default: &str) -> anyhow::Result<()> {
    use std::io::IsTerminal;

    let filter = std::env::var("BATON_LOG").unwrap_or_else(|_| default.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter)
        .with_context(|| format!("`{filter}` is no log filter (write `info` or `baton=debug`)"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// What the file hardly means, and what this machine can't do yet: an interface that comes later
/// (at boot) must not keep the node from starting, so here it is a warning.
fn warn_of(config: &Config) {
    let system = match System::read(config) {
        Ok(system) => system,
        Err(error) => return tracing::warn!(%error, "can't read this machine's interfaces"),
    };
    let here = match config.check_system(&system) {
        Ok(warnings) => warnings,
        Err(errors) => errors.problems().to_vec(),
    };
    for problem in config.warnings.iter().chain(&here) {
        tracing::warn!("{}: {}: {}", problem.location(), problem.what, problem.hint);
    }
}

/// A running node.
#[derive(Debug)]
struct Balancer {
    started: Instant,
    election: Option<(HaConfig, Handle)>,
    proxy: Proxy,
    /// Made when there are VIPs, or a service needs it.
    datapath: Arc<OnceLock<Datapath>>,
    /// Opened with the lease, once there is a datapath.
    gates: Arc<Gates>,
    /// What the other nodes are told, and tell.
    cluster: Arc<Cluster>,
    /// How flows get to the other nodes, where there is a peer channel.
    replication: Option<watch::Receiver<Replication>>,
    /// Where decisions are written down, where any are made.
    journal: Option<Journal>,
    live: Mutex<Live>,
}

/// What a reload replaces.
#[derive(Debug)]
struct Live {
    config: Config,
    pools: Vec<Arc<Pool>>,
    checks: Checks,
    phase: Phase,
}

/// Whether the configuration may still change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It may.
    Running,
    /// It may not: a new service would be opened behind the back of what closes them all.
    Stopping,
}

impl Balancer {
    /// Opens everything, the control socket first: it tells whether this node runs already.
    fn start(config: Config) -> anyhow::Result<(Arc<Self>, Socket)> {
        let started = Stamp::now();
        let socket = Socket::bind(&config.node.control)?;
        let new = |service: &Arc<Service>| Arc::new(Pool::new(Arc::clone(service)));
        let pools: Vec<_> = config.services.iter().map(new).collect();
        let cluster = Cluster::new(&config.node.name, &config.node.state_dir);
        // Before anything selects.
        cluster::apply_settings(&cluster, &pools);
        let proxy = Proxy::start(&proxied(&pools), config.node.workers)?;
        // Before the election: no packet for a VIP may come before somebody holds it back.
        let datapath = Arc::new(OnceLock::new());
        let gates = Arc::new(Gates::default());
        start_datapath(&datapath, &config, &pools, &gates)?;
        let checks = Checks::start(&pools);
        let mut replication = None;
        let mut journal = None;
        let (election, cluster) = match with_channel(&config)? {
            Some(ha) => {
                let lease = match guard::post(&ha, &config.node.control) {
                    Some(lease) => lease,
                    None => Lease::unguarded().context("can't make a lease")?,
                };
                let lease = lease.with_gate(Arc::<Gates>::clone(&gates));
                let (handle, port) = driver::start(ha.clone(), Some(lease))?;
                let peers = ha.channel.iter().flat_map(|channel| &channel.peers);
                let names = peers.map(|peer| peer.name.clone()).collect();
                let cluster = Arc::new(cluster.with_peers(names, port.as_ref()));
                journal = Journal::start(&config.node.state_dir, &ha, &handle, started)?;
                if let Some(port) = port {
                    let (datapath, cluster) = (Arc::clone(&datapath), Arc::clone(&cluster));
                    replication = Some(replication::start(port, handle.view(), datapath, cluster)?);
                }
                (Some((ha, handle)), cluster)
            }
            None => (None, Arc::new(cluster)),
        };
        tracing::info!(
            node = config.node.name,
            version = env!("CARGO_PKG_VERSION"),
            pid = std::process::id(),
            file = %config.path.display(),
            control = %config.node.control.display(),
            services = config.services.len(),
            "running"
        );
        let live = Mutex::new(Live { config, pools, checks, phase: Phase::Running });
        Ok((
            Arc::new(Self {
                started: Instant::now(),
                election,
                proxy,
                datapath,
                gates,
                cluster,
                replication,
                journal,
                live,
            }),
            socket,
        ))
    }

    /// Serves until a signal says stop, or the HA thread ends without being told to.
    async fn run(self: Arc<Self>, socket: Socket) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let hangup = signal(SignalKind::hangup())?;
        let control = tokio::spawn(socket.serve(Arc::clone(&self)));
        // On its own: neither SIGTERM nor the election waits for a reload.
        let reloads = tokio::spawn(Arc::clone(&self).follow_hangup(hangup));
        let datapath = tokio::spawn(Arc::clone(&self).drive_datapath());
        let cluster = tokio::spawn(Arc::clone(&self).follow_cluster());
        let keeps = tokio::spawn(Arc::clone(&self).keep_settings());
        let looks = tokio::spawn(Arc::clone(&self).look_around());
        let mut election = pin!(self.follow_election());
        notify(NotifyState::Ready);
        let outcome = tokio::select! {
            _ = terminate.recv() => Ok("SIGTERM"),
            _ = interrupt.recv() => Ok("SIGINT"),
            () = &mut election => Err(anyhow!("the HA thread has ended; see the log")),
        };
        if let Ok(signal) = outcome {
            tracing::info!(signal, "stopping");
            if let Some(journal) = &self.journal {
                journal.stopping(signal);
            }
        }
        notify(NotifyState::Stopping);
        tokio::select! {
            () = self.stop() => tracing::info!("stopped"),
            _ = terminate.recv() => tracing::warn!("second SIGTERM: ending at once"),
            _ = interrupt.recv() => tracing::warn!("second SIGINT: ending at once"),
        }
        control.abort();
        reloads.abort();
        datapath.abort();
        cluster.abort();
        keeps.abort();
        looks.abort();
        if let Some(journal) = &self.journal {
            journal.finish();
        }
        outcome.map(drop)
    }

    /// Resets the sessions on the VIPs whenever this node has stopped being Active. Returns only
    /// when the HA thread has ended.
    async fn follow_election(&self) {
        let Some((ha, handle)) = &self.election else { return std::future::pending().await };
        let mut view = handle.view();
        let mut before = active_since(&view.borrow_and_update());
        while view.changed().await.is_ok() {
            let after = active_since(&view.borrow_and_update());
            if before.is_some() && before != after {
                self.reset_sessions(ha, "this node is no longer Active").await;
            }
            before = after;
        }
    }

    /// Tells the datapath what has changed about the backends and the ways to them.
    async fn drive_datapath(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TEND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut followed = Followed::default();
        let mut before = None;
        loop {
            ticks.tick().await;
            let Some(datapath) = self.datapath.get() else { continue };
            let active = self.election.as_ref();
            let active = active.and_then(|(_, handle)| active_since(&handle.view().borrow()));
            if let Err(error) = datapath.tend(active.is_some() && active != before) {
                tracing::error!("can't read the datapath's clock: {error:#}");
            }
            before = active;
            let live = self.live.lock().await;
            if followed.is_due(&live.pools) {
                let vips = vips(&live.config);
                // System calls, and now and then a schedule to build.
                let applied = tokio::task::block_in_place(|| datapath.apply(&live.pools, vips));
                if let Err(error) = applied {
                    tracing::error!(
                        "the datapath could not be brought up to date: {:#}",
                        anyhow::Error::from(error)
                    );
                }
            }
        }
    }

    /// Tells the journal what the election does not know.
    async fn look_around(self: Arc<Self>) {
        const EVERY: Duration = Duration::from_millis(100);
        let Some(journal) = &self.journal else { return };
        loop {
            let pools = self.live.lock().await.pools.clone();
            let members = || pools.iter().flat_map(|pool| &pool.members);
            let health = Backends {
                up: members().filter(|member| member.sees() == Health::Up).count() as u32,
                of: members().count() as u32,
                peers: self.cluster.sights().into_iter().map(Seen::of).collect(),
            };
            let flows = self.replication_status(&pools);
            journal.look(Around { flows, health: Some(health) });
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn reset_sessions(&self, ha: &HaConfig, why: &str) {
        let sessions = self.proxy.reset(ha.vips.iter().map(|vip| vip.address)).await;
        if sessions > 0 {
            tracing::info!(sessions, why, "sessions reset");
        }
    }

    /// Yields first, and resets the sessions on VIPs, which this node has given away; those on
    /// its own addresses end by themselves within the grace.
    async fn stop(&self) {
        if let Some((ha, handle)) = &self.election {
            // Accepting goes on until the VIPs are gone: no client is refused in between.
            if ha.channel.is_some() && handle.view().borrow().state == State::Active {
                hand_over(handle).await;
            }
            handle.shutdown().await;
            self.reset_sessions(ha, "this node stops").await;
        }
        // A reload on its way is waited for, none comes after it.
        let grace = {
            let mut live = self.live.lock().await;
            live.phase = Phase::Stopping;
            live.config.node.shutdown_grace
        };
        self.proxy.stop_accepting().await;
        let left = self.proxy.wait_idle(grace).await;
        if left > 0 {
            tracing::warn!(sessions = left, ?grace, "sessions reset: the grace is over");
        }
    }

    async fn status(&self) -> Status {
        // Before anything is locked: it may take a while, and nobody is to wait for it.
        let report = self.datapath.get().and_then(|datapath| {
            let report = tokio::task::block_in_place(|| datapath.report());
            report.map_err(|error| tracing::warn!(%error, "can't read the datapath's state")).ok()
        });
        let live = self.live.lock().await;
        let election = self
            .election
            .as_ref()
            .map(|(ha, handle)| Election::of(ha, &handle.view().borrow(), Instant::now()));
        let now = SystemTime::now();
        let (sights, settings) = (self.cluster.sights(), self.cluster.settings());
        let service = |pool: &Arc<Pool>| {
            let mut service = ServiceStatus::of(pool, now);
            if let Some(report) = &report {
                service.add_kernel(report);
            }
            service.add_cluster(&sights, &settings);
            service
        };
        let services: Vec<_> = live.pools.iter().map(service).collect();
        Status {
            node: live.config.node.name.clone(),
            cluster: live.config.cluster.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            election,
            replication: self.replication_status(&live.pools),
            journal: self.journal.as_ref().map(Journal::status),
            datapath: report.as_ref().map(DatapathStatus::of),
            gave_way: self.cluster.gave_way().map(Into::into),
            settings: SettingsStatus::of(&self.cluster, &settings, &services),
            services,
        }
    }

    /// How the kernel's flows get to the other nodes, where there are both.
    fn replication_status(&self, pools: &[Arc<Pool>]) -> Option<ReplicationStatus> {
        let (datapath, (ha, handle)) = (self.datapath.get()?, self.election.as_ref()?);
        if ha.peers.is_empty() || !pools.iter().any(|pool| pool.service.mode.is_in_kernel()) {
            return None;
        }
        let (peers, state) = {
            let view = handle.view();
            let view = view.borrow();
            (view.peers.clone(), view.state)
        };
        let replication = match &self.replication {
            Some(replication) => replication.borrow().clone(),
            None => Replication::without_channel(state),
        };
        let flows = datapath.flows().all;
        Some(ReplicationStatus::of(&replication, &peers, flows, Instant::now()))
    }

    /// Flows in the kernel; none where no service needs it.
    async fn sessions(&self, wanted: &Wanted) -> anyhow::Result<Sessions> {
        let Some(datapath) = self.datapath.get() else { return Ok(Sessions::default()) };
        let pools = self.live.lock().await.pools.clone();
        Ok(tokio::task::block_in_place(|| datapath.sessions(wanted, &pools))?)
    }

    async fn end_sessions(&self, wanted: &Wanted) -> anyhow::Result<Ended> {
        let Some(datapath) = self.datapath.get() else { return Ok(Ended::default()) };
        let pools = self.live.lock().await.pools.clone();
        let ended = tokio::task::block_in_place(|| datapath.end_sessions(wanted, &pools))?;
        tracing::info!(?wanted, ?ended, "sessions ended by the operator");
        Ok(ended)
    }

    async fn takeover(&self, force: bool) -> anyhow::Result<Done> {
        let outcome = self.handle()?.takeover(force).await?;
        tracing::info!(force, "takeover by the operator");
        Ok(self.done(outcome, "this node is Active and holds the VIPs"))
    }

    async fn yield_now(&self, force: bool) -> anyhow::Result<Done> {
        let outcome = self.handle()?.yield_now(force).await?;
        tracing::info!(force, "yield by the operator");
        let now = match &outcome.active {
            Some(heard) => match &heard.name {
                Some(name) => format!("{name} ({}) is Active", heard.address),
                None => format!("{} is Active", heard.address),
            },
            None => "this node is no longer Active".into(),
        };
        Ok(self.done(outcome, &now))
    }

    fn done(&self, outcome: Outcome, summary: &str) -> Done {
        let own = self.election.as_ref().map(|(ha, _)| ha.node.clone());
        let step = |step: driver::Step| Step {
            t_ms: millis(step.at),
            node: step.peer.or_else(|| own.clone()),
            what: step.what,
        };
        Done {
            steps: outcome.steps.into_iter().map(step).collect(),
            epoch: Some(outcome.epoch),
            flows_lacking: outcome.lacking,
            ..Done::simple(summary, Vec::new())
        }
    }

    fn handle(&self) -> anyhow::Result<&Handle> {
        match &self.election {
            Some((_, handle)) => Ok(handle),
            None => bail!("this node has no VIPs, so it takes part in no election"),
        }
    }

    /// Applies the file as it is now, or leaves everything as it is.
    async fn reload(&self) -> anyhow::Result<Done> {
        let mut live = self.live.lock().await;
        if live.phase == Phase::Stopping {
            bail!("nothing was changed: this node is stopping");
        }
        let started = Instant::now();
        let new = Config::load(&live.config.path).context("nothing was changed")?;
        let blockers = config::reload_blockers(&live.config, &new);
        if !blockers.is_empty() {
            bail!("nothing was changed, since these need a restart: {}", blockers.join("; "));
        }
        warn_of(&new);
        let pools: Vec<_> =
            new.services.iter().map(|service| renewed(&live.pools, service)).collect();
        // A backend that comes back is drained still before it gets anything.
        cluster::apply_settings(&self.cluster, &pools);
        start_datapath(&self.datapath, &new, &pools, &self.gates).context("nothing was changed")?;
        if let Some(datapath) = self.datapath.get() {
            tokio::task::block_in_place(|| datapath.choose_hook(new.datapath.hook))
                .context("nothing was changed")?;
        }
        self.proxy.renew(&proxied(&pools)).await.context("nothing was changed")?;
        if let Some(datapath) = self.datapath.get() {
            tokio::task::block_in_place(|| datapath.apply(&pools, vips(&new)))?;
        }
        live.checks.apply(&pools);
        let changes = changes(&live.config.services, &new.services);
        live.pools = pools;
        live.config = new;
        drop(live);
        tracing::info!(?changes, "configuration reloaded");
        let t_ms = millis(started.elapsed());
        let steps: Vec<_> =
            changes.into_iter().map(|what| Step { t_ms, node: None, what }).collect();
        let summary = if steps.is_empty() { "the file says what it said" } else { "applied" };
        Ok(Done::simple(summary, steps))
    }

    /// Reloads at each SIGHUP; those that come while it does so are one.
    async fn follow_hangup(self: Arc<Self>, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            if let Err(error) = self.reload().await {
                tracing::error!("SIGHUP: {error:#}");
            }
        }
    }
}

/// Gives the VIPs to a Backup that has the flows, where there is one; else they go to whoever claims
/// them, which takes longer and may lack the last flows.
async fn hand_over(handle: &Handle) {
    match tokio::time::timeout(HAND_OVER, handle.yield_now(false)).await {
        Ok(Ok(_)) => tracing::info!("handed over before the end"),
        Ok(Err(why)) => tracing::warn!("ends without handing over: {why}"),
        Err(_) => {
            tracing::warn!(patience = ?HAND_OVER, "ends without handing over: it takes too long")
        }
    }
}

impl Answer for Balancer {
    async fn answer(&self, request: Request, caller: Caller) -> Reply {
        let name = format!("{request:?}");
        let asked = request.to_string();
        // What changes nothing is no decision.
        let journal = self.journal.as_ref().filter(|_| request.changes());
        if let Some(journal) = journal {
            journal.asked(&asked, &caller.to_string());
        }
        let done = match request {
            Request::Status => return Reply::ok(self.status().await),
            Request::Sessions(wanted) => match self.sessions(&wanted).await {
                Ok(sessions) => return Reply::ok(sessions),
                Err(error) => Err(error),
            },
            Request::EndSessions(wanted) => match self.end_sessions(&wanted).await {
                Ok(ended) => return Reply::ok(ended),
                Err(error) => Err(error),
            },
            Request::Takeover { force } => self.takeover(force).await,
            Request::Yield { force } => self.yield_now(force).await,
            Request::Reload => self.reload().await,
            Request::SetBackend { backend, admin } => {
                self.set_backend(&backend, Value::Admin(admin)).await
            }
            Request::SetWeight { backend, weight } => {
                self.set_backend(&backend, Value::Weight(weight)).await
            }
        };
        match done {
            Ok(done) => Reply::ok(done),
            Err(error) => {
                tracing::warn!("{name}: {error:#}");
                if let Some(journal) = journal {
                    journal.refused(&asked, &format!("{error:#}"));
                }
                match error.downcast_ref() {
                    Some(driver::Refused::Unready(_)) => Reply::Unready(format!("{error:#}")),
                    _ => Reply::Error(format!("{error:#}")),
                }
            }
        }
    }
}

/// The pools whose sessions end here.
fn proxied(pools: &[Arc<Pool>]) -> Vec<Arc<Pool>> {
    pools.iter().filter(|pool| !pool.service.mode.is_in_kernel()).cloned().collect()
}

/// What the HA side must know: the file's part, and the cluster's key.
fn with_channel(config: &Config) -> anyhow::Result<Option<HaConfig>> {
    let Some(ha) = &config.ha else { return Ok(None) };
    let channel = match &config.channel {
        None => None,
        Some(channel) => {
            let path = &channel.key_file;
            let key = ClusterKey::load(path)
                .with_context(|| format!("the cluster key {}", path.display()))?;
            Some(ChannelConfig {
                cluster: config.cluster.clone(),
                key,
                address: channel.address,
                peers: channel.peers.clone(),
                heartbeat: channel.heartbeat,
                replicates: config.services.iter().any(|service| service.mode.is_in_kernel()),
            })
        }
    };
    Ok(Some(HaConfig { channel, ..ha.clone() }))
}

fn vips(config: &Config) -> &[Vip] {
    config.ha.as_ref().map_or(&[], |ha| &ha.vips)
}

/// Starts the datapath if it does not run yet, and there are VIPs, which its gate holds back without
/// a lease, or services of its own. Where it can't run and only the gate is wanted, that is a
/// warning: the guard enforces the lease too.
fn start_datapath(
    datapath: &OnceLock<Datapath>,
    config: &Config,
    pools: &[Arc<Pool>],
    gates: &Gates,
) -> anyhow::Result<()> {
    let needed = pools.iter().any(|pool| pool.service.mode.is_in_kernel());
    if datapath.get().is_some() || !needed && vips(config).is_empty() {
        return Ok(());
    }
    let config::Datapath { flows, half_open_flows, affinities, hook } = config.datapath;
    let sizes = Sizes { flows, half_open_flows, affinities };
    match Datapath::start(sizes, hook, pools, vips(config), gates) {
        Ok(started) => {
            tracing::info!(flows, half_open_flows, affinities, "datapath started");
            // Only this function sets it, and its callers hold the configuration.
            let _ = datapath.set(started);
            Ok(())
        }
        Err(error) if needed => Err(error).context("the kernel datapath can't start"),
        Err(error) => {
            tracing::warn!(
                "no gate in the kernel, so the guard alone silences a node whose daemon is dead or \
                 frozen: {:#}",
                anyhow::Error::from(error)
            );
            Ok(())
        }
    }
}

/// When the datapath was last told of the pools, to tell it again.
#[derive(Debug, Default)]
struct Followed {
    changes: Vec<watch::Receiver<u64>>,
    pools: Vec<Weak<Pool>>,
    at: Option<Instant>,
}

impl Followed {
    /// Whether a pool has changed, or it is time to look after the routes and interfaces, of whose
    /// changes nobody tells.
    fn is_due(&mut self, pools: &[Arc<Pool>]) -> bool {
        const EVERY: Duration = Duration::from_secs(2);
        let renewed = !pools.iter().map(Arc::as_ptr).eq(self.pools.iter().map(Weak::as_ptr));
        if renewed {
            self.pools = pools.iter().map(Arc::downgrade).collect();
            self.changes = pools.iter().map(|pool| pool.changes()).collect();
        }
        let changed = |changes: &mut watch::Receiver<u64>| {
            let changed = changes.has_changed().unwrap_or(false);
            changes.mark_unchanged();
            changed
        };
        // All of them: each is to be marked.
        let changed = self.changes.iter_mut().map(changed).fold(false, |any, one| any | one);
        let late = self.at.is_none_or(|at| at.elapsed() >= EVERY);
        let due = renewed || changed || late;
        if due {
            self.at = Some(Instant::now());
        }
        due
    }
}

/// Since when this node has been Active, if it is: a change means that it stopped being so in
/// between, even if it is again.
fn active_since(view: &View) -> Option<Instant> {
    (view.state == State::Active).then_some(view.since)
}

/// The pool of a service after a reload; it is the same service where the proxy goes on with its
/// socket and sessions, whatever its name is now.
fn renewed(old: &[Arc<Pool>], service: &Arc<Service>) -> Arc<Pool> {
    let same = |pool: &&Arc<Pool>| proxy::key(&pool.service) == proxy::key(service);
    Arc::new(match old.iter().find(same) {
        Some(pool) => Pool::renewed(pool, Arc::clone(service)),
        None => Pool::new(Arc::clone(service)),
    })
}

/// What became of the services, by name.
fn changes(old: &[Arc<Service>], new: &[Arc<Service>]) -> Vec<String> {
    let find = |among: &[Arc<Service>], name: &str| {
        among.iter().find(|service| service.name == name).cloned()
    };
    let gone = old.iter().filter(|service| find(new, &service.name).is_none());
    let mut changes: Vec<_> = gone.map(|service| format!("{}: removed", service.name)).collect();
    for service in new {
        match find(old, &service.name) {
            None => changes.push(format!("{}: new", service.name)),
            Some(before) if before != *service => {
                changes.push(format!("{}: changed", service.name));
            }
            Some(_) => {}
        }
    }
    changes
}

impl Done {
    /// What was done on this node alone.
    pub(crate) fn simple(summary: &str, steps: Vec<Step>) -> Self {
        Self { summary: summary.into(), steps, epoch: None, flows_lacking: None }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Tells systemd, where it listens; that it doesn't is no error.
fn notify(state: NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "systemd was not told");
    }
}
