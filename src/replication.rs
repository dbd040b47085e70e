//! Flows between nodes: a thread of its own between the kernel's tables
//! ([`Replica`]), the two ends of replication
//! ([`baton_ha::sync`]) and the peer channel.
//!
//! It decides nothing: it feeds the two machines and does what they say, in their order. Nothing
//! that it does is in a packet's way, and nothing here can hold up the election.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use baton_ha::channel::hello::BootId;
use baton_ha::driver::{PeerEvent, PeerPort, Report, View};
use baton_ha::io::timer::Timer;
use baton_ha::state::shared;
use baton_ha::sync::frame::{BucketSum, Compared};
use baton_ha::sync::receiver::{self, Receiver};
use baton_ha::sync::source::{self, DIGEST_INTERVAL, Source};
use baton_ha::sync::{BATCH, Frame};
use baton_ha::vrrp::router::State;
use tokio::sync::{mpsc, watch};

use crate::cluster::Cluster;
use crate::datapath::Datapath;
use crate::datapath::load::Error;
use crate::datapath::replica::{Replica, Walk};
use crate::datapath::ring::Ring;

mod pace;

use pace::Pace;

/// Changes that the journal keeps: what a peer may lag behind, 16 bytes and a change each.
const JOURNAL: usize = 1 << 17;
/// How often the view is brought up to date.
const VIEW: Duration = Duration::from_millis(100);
/// How often this looks whether the datapath has started.
const LOOK: Duration = Duration::from_millis(100);
/// Frames that are taken in together, and acknowledged together: few enough for the other end to
/// have more on their way meanwhile.
const TOGETHER: usize = 8;
/// Between two passes that tell which flows were used.
const REFRESH: Duration = Duration::from_secs(2);
/// How long a peer may take to come as near as a frame, where the VIPs are to go to it.
const CATCH_UP: Duration = Duration::from_millis(1500);
/// How long its acknowledgement of the last delta may take; no packet passes meanwhile.
const FLUSH: Duration = Duration::from_millis(100);
/// A pass waits while a peer is that far behind.
const REFRESH_BACKLOG: u64 = 4096;

/// How replication stands; for status.
#[derive(Debug, Clone, Default)]
pub struct Replication {
    /// As the Active: each peer by its place in the configuration, where it takes part.
    pub peers: Vec<Option<source::Standing>>,
    /// As a Backup: what this node has of the Active's flows.
    pub receiver: Option<receiver::Standing>,
    /// What the last comparison with the Active's table came to, and when.
    pub compared: Option<(Instant, Compared)>,
    /// Flows that came and have no service or backend here: the files of the nodes differ.
    pub unplaced: u64,
}

impl Replication {
    /// Where the nodes have no channel: no node ever has another's flows.
    pub fn without_channel(state: State) -> Self {
        let receiver = (state != State::Active).then_some(receiver::Standing::Nothing);
        Self { receiver, ..Self::default() }
    }
}

/// Starts the thread. It works once the datapath has been started.
pub fn start(
    port: PeerPort,
    election: watch::Receiver<View>,
    datapath: Arc<OnceLock<Datapath>>,
    cluster: Arc<Cluster>,
) -> std::io::Result<watch::Receiver<Replication>> {
    let boot = BootId::draw()?;
    let (view, seen) = watch::channel(Replication::default());
    std::thread::Builder::new().name("baton-sync".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => {
                let worker = Worker::new(port, election, datapath, cluster, view, boot);
                runtime.block_on(worker.run());
            }
            Err(error) => tracing::error!(%error, "flows are not replicated"),
        }
    })?;
    Ok(seen)
}

/// What the thread works with.
struct Worker {
    port: PeerPort,
    election: watch::Receiver<View>,
    datapath: Arc<OnceLock<Datapath>>,
    /// What else nodes tell each other.
    cluster: Arc<Cluster>,
    tables: Option<Tables>,
    source: Source,
    receiver: Receiver,
    /// The last comparison with the Active's table, and when it was.
    compared: Option<(Instant, Compared)>,
    /// The peer that the receiver listens to.
    following: Option<usize>,
    up: Vec<bool>,
    active: bool,
    /// Sums that other threads are at.
    sums: mpsc::Receiver<(Side, u64, Box<[BucketSum]>)>,
    sums_in: mpsc::Sender<(Side, u64, Box<[BucketSum]>)>,
    view: watch::Sender<Replication>,
    view_at: Instant,
    look_at: Option<Instant>,
    refresh_at: Option<Instant>,
    refresh: Option<Refresh>,
    pace: Pace,
    flush: Option<Flush>,
}

/// The VIPs are to go to a peer: what it is to acknowledge before.
#[derive(Debug, Clone, Copy)]
struct Flush {
    place: usize,
    run: u64,
    /// Whether packets have ceased to pass: then nothing comes after the last delta.
    is_last: bool,
    until: Instant,
}

/// The kernel's side, once there is one.
struct Tables {
    replica: Replica,
    ring: Ring,
    /// Of each peer's snapshot.
    walks: HashMap<usize, Walk>,
    affinity_walks: HashMap<usize, Walk>,
}

/// Who asked for sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Receiver,
}

/// A pass that tells which flows were used since the last one.
struct Refresh {
    walk: Walk,
    /// Services, and since when, in jiffies.
    due: HashMap<u16, u32>,
}

impl Worker {
    fn new(
        port: PeerPort,
        election: watch::Receiver<View>,
        datapath: Arc<OnceLock<Datapath>>,
        cluster: Arc<Cluster>,
        view: watch::Sender<Replication>,
        boot: BootId,
    ) -> Self {
        let (sums_in, sums) = mpsc::channel(4);
        let now = Instant::now();
        Self {
            up: vec![false; port.to.len()],
            port,
            election,
            datapath,
            cluster,
            tables: None,
            source: Source::new(boot, JOURNAL, DIGEST_INTERVAL),
            receiver: Receiver::new(0),
            compared: None,
            following: None,
            active: false,
            sums,
            sums_in,
            view,
            view_at: now,
            look_at: Some(now),
            refresh_at: None,
            refresh: None,
            pace: Pace::new(now),
            flush: None,
        }
    }

    async fn run(mut self) {
        // The runtime's own timers have a grain of a millisecond.
        let mut timer = match Timer::new() {
            Ok(timer) => timer,
            Err(error) => return tracing::error!(%error, "flows are not replicated"),
        };
        loop {
            let deadline = self.next_deadline();
            let now = Instant::now();
            let held = self.pace.held(now);
            if let Err(error) = timer.set(now, held) {
                tracing::error!(%error, "the timer of replication");
            }
            let wake = {
                let ring = self.tables.as_ref().map(|tables| &tables.ring);
                let ring = ring.filter(|_| held.is_none());
                let readable = async {
                    match ring {
                        Some(ring) => ring.readable().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    event = self.port.events.recv() => match event {
                        Some(event) => Wake::Peer(event),
                        // The driver has ended: there is nobody to replicate to.
                        None => return,
                    },
                    changed = self.election.changed() => match changed {
                        Ok(()) => Wake::Election,
                        Err(_) => return,
                    },
                    Some((side, run, sums)) = self.sums.recv() => Wake::Sums(side, run, sums),
                    () = readable => Wake::Ring,
                    _ = poll_fn(|context| timer.poll_expired(context)) => Wake::Time,
                    () = tokio::time::sleep_until(deadline.into()) => Wake::Time,
                }
            };
            if let Err(error) = self.turn(wake) {
                tracing::error!(error = %anyhow::Error::from(error), "replication failed");
            }
        }
    }

    fn next_deadline(&self) -> Instant {
        let timers = [
            self.source.poll_timeout(),
            self.receiver.poll_timeout(),
            self.look_at,
            self.refresh_at,
            self.flush.map(|flush| flush.until),
            self.refresh.as_ref().map(|_| Instant::now() + Duration::from_millis(5)),
        ];
        timers.into_iter().flatten().fold(self.view_at, Instant::min)
    }

    fn turn(&mut self, wake: Wake) -> Result<(), Error> {
        let now = Instant::now();
        self.look(now)?;
        match wake {
            Wake::Peer(event) => {
                self.peer(now, event)?;
                for _ in 1..TOGETHER {
                    let Ok(event) = self.port.events.try_recv() else { break };
                    self.peer(now, event)?;
                }
            }
            Wake::Sums(Side::Source, run, sums) => {
                // What changed before the end of the walk is known before its result.
                self.drain(now)?;
                self.source.handle_input(now, source::Input::Summed { run, sums });
            }
            Wake::Sums(Side::Receiver, run, sums) => {
                self.receiver.handle_input(now, receiver::Input::Summed { run, sums });
            }
            Wake::Election | Wake::Ring | Wake::Time => {}
        }
        self.follow_election(now)?;
        // A handover's last delta does not wait: no packet passes meanwhile.
        let is_urgent = self.flush.is_some_and(|flush| flush.is_last);
        if is_urgent || self.pace.held(now).is_none() {
            self.drain(now)?;
        }
        self.refresh(now)?;
        self.source.handle_timeout(now);
        self.receiver.handle_timeout(now);
        self.perform(now)?;
        self.flush(now);
        if self.view_at <= now {
            self.view_at = now + VIEW;
            self.publish(now);
        }
        Ok(())
    }

    /// Begins to work when the datapath has been started.
    fn look(&mut self, now: Instant) -> Result<(), Error> {
        if self.look_at.is_none_or(|at| at > now) {
            return Ok(());
        }
        self.look_at = Some(now + LOOK);
        if let Some(datapath) = self.datapath.get() {
            let replica = datapath.replica()?;
            let ring = Ring::open(datapath.loaded())?;
            self.receiver = Receiver::new(replica.unused_mark()?);
            self.tables = Some(Tables {
                replica,
                ring,
                walks: HashMap::new(),
                affinity_walks: HashMap::new(),
            });
            datapath.end_flows(false);
            self.look_at = None;
            self.report(Report::Replicates);
        }
        Ok(())
    }

    fn peer(&mut self, now: Instant, event: PeerEvent) -> Result<(), Error> {
        match event {
            PeerEvent::State { place, frame } => {
                self.cluster.handle(shared::Input::Frame(place, frame));
            }
            PeerEvent::CatchUp { place, run } => {
                self.flush = Some(Flush { place, run, is_last: false, until: now + CATCH_UP });
            }
            PeerEvent::Flush { place, run } => {
                self.flush = Some(Flush { place, run, is_last: true, until: now + FLUSH });
            }
            PeerEvent::FlushOver => self.flush = None,
            PeerEvent::Up { place, .. } => {
                self.cluster.handle(shared::Input::Connected(place));
                self.up[place] = true;
                self.source.handle_input(now, source::Input::Connected(place));
            }
            PeerEvent::Down { place } => {
                self.cluster.handle(shared::Input::Disconnected(place));
                self.up[place] = false;
                self.source.handle_input(now, source::Input::Disconnected(place));
                self.unfollow(now, place);
            }
            PeerEvent::Frame { place, frame } => match frame {
                Frame::Subscribe { .. }
                | Frame::Repair(_)
                | Frame::Compared(_)
                | Frame::Ack { .. } => {
                    self.drain(now)?;
                    self.source.handle_input(now, source::Input::Frame(place, frame));
                }
                _ if self.following == Some(place) => {
                    self.receiver.handle_input(now, receiver::Input::Frame(frame));
                }
                // Of a node that was Active a moment ago.
                _ => {}
            },
        }
        Ok(())
    }

    fn unfollow(&mut self, now: Instant, place: usize) {
        if self.following == Some(place) {
            self.following = None;
            self.receiver.handle_input(now, receiver::Input::Disconnected);
        }
    }

    /// Who is Active: this node sends, or follows whoever is.
    fn follow_election(&mut self, now: Instant) -> Result<(), Error> {
        let Some(tables) = &mut self.tables else { return Ok(()) };
        let (active, epoch, other) = {
            let view = self.election.borrow_and_update();
            let name = view.active.as_ref().and_then(|heard| heard.name.as_ref());
            let other = view.peers.iter().position(|peer| Some(&peer.name) == name);
            (view.state == State::Active, view.epoch, other)
        };
        if active != self.active {
            self.active = active;
            if active {
                tables.replica.report(true);
                let names = tables.replica.names()?;
                self.source.handle_input(now, source::Input::Active(epoch));
                self.source.handle_input(now, source::Input::Names(names));
                self.refresh_at = Some(now + REFRESH);
            } else {
                self.source.handle_input(now, source::Input::Passive);
                tables.replica.report(false);
                // This node has changed its table by itself.
                self.receiver.forget();
                self.refresh_at = None;
                self.refresh = None;
            }
            if let Some(datapath) = self.datapath.get() {
                datapath.end_flows(active);
            }
        }
        let wanted = other.filter(|place| !active && self.up[*place]);
        if wanted != self.following {
            if let Some(place) = self.following {
                self.unfollow(now, place);
            }
            if let (Some(place), Some(tables)) = (wanted, &mut self.tables) {
                tables.replica.forget_names();
                self.following = Some(place);
                self.receiver.handle_input(now, receiver::Input::Connected);
            }
        }
        Ok(())
    }

    /// Takes in every change that the kernel has reported.
    fn drain(&mut self, now: Instant) -> Result<(), Error> {
        let Some(tables) = self.tables.as_mut().filter(|_| self.active) else { return Ok(()) };
        // New numbers are named before they are used.
        if let Some(names) = tables.replica.new_names()? {
            self.source.handle_input(now, source::Input::Names(names));
        }
        let jiffies = tables.replica.jiffies()?;
        let mut changes = 0;
        tables.ring.drain(|event| {
            changes += 1;
            if let Some(change) = tables.replica.change(event, jiffies) {
                self.source.handle_input(now, source::Input::Changed(change));
            }
        })?;
        self.pace.read(now, changes);
        if tables.replica.has_lost() {
            tracing::warn!("changes of flows came faster than they were read: peers begin anew");
            self.source.handle_input(now, source::Input::Lost);
        }
        Ok(())
    }

    /// Tells the driver when the peer that the VIPs are to go to has what it is to have.
    fn flush(&mut self, now: Instant) {
        let Some(Flush { place, run, is_last, until }) = self.flush else { return };
        let of = self.datapath.get().map_or(0, |datapath| u64::from(datapath.flows().all));
        let standing = self.source.standing(now, place);
        let in_sync = standing.is_some_and(|standing| standing.in_sync);
        let lacking = match standing {
            Some(standing) if standing.in_sync => standing.lag_changes,
            Some(standing) => of.saturating_sub(standing.snapshot_flows.unwrap_or(0)),
            None => of,
        };
        let (near, late) = (lacking <= BATCH as u64, until <= now || !in_sync);
        let report = match is_last {
            true if self.source.is_flushed(place) => Report::Flushed { run, lacking: 0 },
            true if late => Report::Flushed { run, lacking: lacking.max(1) },
            false if in_sync && near => Report::CaughtUp { run },
            false if late => Report::Behind { run, lacking, of },
            true | false => return,
        };
        self.flush = None;
        self.report(report);
    }

    fn report(&self, report: Report) {
        // It has room for all that the driver asks at a time; who gets no answer gives up.
        if let Err(error) = self.port.reports.try_send(report) {
            tracing::debug!(%error, "a report was dropped");
        }
    }

    /// Tells peers which flows were used, so that they know how old each is.
    fn refresh(&mut self, now: Instant) -> Result<(), Error> {
        // Not while a peer is to come to the end of the journal.
        let wanted = self.active && self.flush.is_none();
        let Some(tables) = self.tables.as_mut().filter(|_| wanted) else { return Ok(()) };
        if self.refresh.is_none() && self.refresh_at.is_some_and(|at| at <= now) {
            let due = tables.replica.begin_refresh()?;
            self.refresh_at = Some(now + REFRESH);
            if !due.is_empty() {
                self.refresh = Some(Refresh { walk: Walk::default(), due });
            }
        }
        let Some(refresh) = &mut self.refresh else { return Ok(()) };
        let mut last = !self.source.has_peers();
        while !last && self.source.backlog() < REFRESH_BACKLOG {
            let (used, done) = tables.replica.used(&mut refresh.walk, &refresh.due)?;
            for flow in used {
                let put = baton_ha::sync::Change::Put(flow);
                self.source.handle_input(now, source::Input::Changed(put));
            }
            last = done;
        }
        if last {
            self.refresh = None;
        }
        Ok(())
    }

    /// Does what the two machines want.
    fn perform(&mut self, now: Instant) -> Result<(), Error> {
        loop {
            if let Some(output) = self.source.poll_output() {
                self.source_wants(now, output)?;
            } else if let Some(output) = self.receiver.poll_output() {
                self.receiver_wants(output)?;
            } else {
                return Ok(());
            }
        }
    }

    fn source_wants(&mut self, now: Instant, output: source::Output) -> Result<(), Error> {
        match output {
            source::Output::Send(peer, frame) => self.send(peer, frame),
            source::Output::Walk { peer, run, anew } => {
                let Some(tables) = &mut self.tables else { return Ok(()) };
                let walk = tables.walks.entry(peer).or_default();
                if anew {
                    *walk = Walk::default();
                }
                let (flows, last) = tables.replica.slice(walk)?;
                let slice = source::Input::Slice { peer, run, flows, last };
                self.source.handle_input(now, slice);
            }
            source::Output::WalkAffinities { peer, run, anew } => {
                let Some(tables) = &mut self.tables else { return Ok(()) };
                let walk = tables.affinity_walks.entry(peer).or_default();
                if anew {
                    *walk = Walk::default();
                }
                let (affinities, last) = tables.replica.affinities(walk)?;
                let answer = source::Input::Affinities { peer, run, affinities, last };
                self.source.handle_input(now, answer);
            }
            source::Output::Sum { run } => self.sum(Side::Source, run),
        }
        Ok(())
    }

    fn receiver_wants(&mut self, output: receiver::Output) -> Result<(), Error> {
        if let receiver::Output::Send(frame) = output {
            if let Frame::Compared(compared) = &frame {
                self.compared = Some((Instant::now(), *compared));
            }
            if let Some(place) = self.following {
                self.send(place, frame);
            }
            return Ok(());
        }
        let Some(tables) = &mut self.tables else { return Ok(()) };
        match output {
            receiver::Output::Send(_) => {}
            receiver::Output::Names(names) => tables.replica.learn(names),
            receiver::Output::Apply { changes, generation } => {
                tables.replica.apply(&changes, generation)?;
            }
            receiver::Output::Keep(affinities) => tables.replica.keep(&affinities)?,
            receiver::Output::Sweep { generation, scope } => {
                let removed = tables.replica.sweep(generation, &scope)?;
                tracing::info!(removed, "in sync with the Active's flows");
            }
            receiver::Output::Sum { run } => self.sum(Side::Receiver, run),
            receiver::Output::Abort(why) => {
                tracing::warn!(why, "the Active's replication makes no sense: beginning anew");
                self.receiver.handle_input(Instant::now(), receiver::Input::Connected);
            }
        }
        Ok(())
    }

    fn send(&mut self, peer: usize, frame: Frame) {
        // Windows keep a queue from being full; where there is no session it is emptied.
        if let Err(error) = self.port.to[peer].try_send(PeerPort::encode(frame)) {
            tracing::debug!(%error, peer, "a frame was dropped");
        }
    }

    /// On another thread: it may take a while.
    fn sum(&mut self, side: Side, run: u64) {
        let Some(tables) = &self.tables else { return };
        let (job, done) = (tables.replica.summing(), self.sums_in.clone());
        tokio::task::spawn_blocking(move || match job() {
            Ok(sums) => drop(done.blocking_send((side, run, sums))),
            Err(error) => tracing::warn!(%error, "the flows could not be summed up"),
        });
    }

    fn publish(&mut self, now: Instant) {
        let peers = (0..self.up.len()).map(|peer| self.source.standing(now, peer));
        let receiver = (!self.active && self.tables.is_some()).then(|| self.receiver.standing());
        if let Some(receiver::Standing::Nothing | receiver::Standing::Snapshot { .. }) = receiver {
            // Of flows that are no more.
            self.compared = None;
        }
        self.view.send_replace(Replication {
            peers: peers.collect(),
            receiver,
            compared: self.compared,
            unplaced: self.tables.as_ref().map_or(0, |tables| tables.replica.unplaced),
        });
    }
}

/// Why the loop woke up.
enum Wake {
    Peer(PeerEvent),
    Election,
    Sums(Side, u64, Box<[BucketSum]>),
    Ring,
    Time,
}
