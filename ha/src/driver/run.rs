//! The loop itself.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use super::channels::{Channels, PeerPlace};
use super::commands::Pending;
use super::counters::{Counter, Counters};
use super::journal::Journal;
use super::neighbors::Neighbors;
use super::ports::Ports;
use super::realtime;
use super::{Command, PathView, PeerEnds, PeerEvent, PeerView, Report, View, VipView};
use crate::channel::hello::BootId;
use crate::config::HaConfig;
use crate::fence::Fence;
use crate::handover;
use crate::heart::{self, Heart};
use crate::io::netlink::{Event, Netlink, Ticket, Watch};
use crate::io::timer::Timer;
use crate::lease::{self, Lease};
use crate::node::{Input, Node};
use crate::record::memory::Memory;
use crate::record::{Recorder, What};
use crate::vrrp::Priority;
use crate::vrrp::router::PreemptBy;

mod act;
mod hand;
mod hear;
mod note;
mod obey;
mod talk;

/// Packets that are read from one socket before the clock is looked at again: a flood must not
/// keep this node from advertising.
const BATCH: usize = 64;
/// What others' adverts change in the view is published no more often than this.
const VIEW_HEARD: Duration = Duration::from_millis(100);
/// And what only this node's own adverts and garbage change.
const VIEW_SENT: Duration = Duration::from_secs(1);
/// When a socket that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Heartbeats of a node that is to send quick ones and has no real-time priority.
const SLOW_HEARTBEAT: Duration = Duration::from_millis(100);
/// Beyond the Active_Down_Interval of the slowest Backup, how long a yield waits.
const YIELD_MARGIN: Duration = Duration::from_millis(500);

/// Everything that the loop owns.
pub(super) struct Driver {
    config: HaConfig,
    node: Node,
    heart: Heart,
    lease: Option<Lease>,
    netlink: Netlink,
    ports: Ports,
    channels: Option<Channels>,
    /// To whoever replicates.
    peer_events: Option<mpsc::Sender<PeerEvent>>,
    reports: Option<mpsc::Receiver<Report>>,
    /// Where there is a peer channel.
    handover: Option<handover::Machine>,
    /// What it was told last.
    election: Option<handover::Election>,
    preempt_by: PreemptBy,
    /// Whether VIPs were announced that it was not told of yet.
    announced: bool,
    heartbeat_at: Option<Instant>,
    /// Between two heartbeats.
    heartbeat: Duration,
    /// Whether the lease was last renewed for as long as quick heartbeats carry it.
    leased_quickly: bool,
    /// The peer that says that it is Active, and when its lease ends unless it is renewed.
    active_lease: Option<(PeerPlace, Instant)>,
    fence: Fence,
    timer: Timer,
    commands: mpsc::Receiver<Command>,
    handles_gone: bool,
    view: watch::Sender<View>,
    publish_at: Option<Instant>,
    /// When sockets that could not be opened are tried again.
    retry_at: Option<Instant>,
    /// Reports of the netlink thread that came while something else was waited for.
    deferred: VecDeque<Event>,
    counters: Counters,
    journal: Journal,
    neighbors: Neighbors,
    /// What is recorded of decisions, and where it goes.
    memory: Memory,
    recorder: Recorder,
    pending: Option<Pending>,
    /// Who waits for the end of the loop.
    goodbye: Option<oneshot::Sender<()>>,
    /// Requests to the kernel that are not answered yet.
    asked: VecDeque<(Ticket, Purpose)>,
    restored: Vec<u64>,
    since: (Instant, SystemTime),
    takeovers: u64,
    realtime: Result<(), String>,
    /// When the loop wanted to run: how late it is tells whether this node slept.
    wanted: Option<Instant>,
}

/// Why the kernel was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Claim,
    /// One VIP, by place.
    Restore(usize),
    Refresh,
}

/// Whether the loop goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Continue,
    End,
}

impl Driver {
    /// Opens everything; VIPs that are there without this node owning them are gone after.
    pub(super) fn open(
        config: HaConfig,
        lease: Option<Lease>,
        commands: mpsc::Receiver<Command>,
        view: watch::Sender<View>,
        peers: Option<PeerEnds>,
        recorder: Recorder,
    ) -> Result<Self, (String, io::Error)> {
        let doing = |what: &'static str| move |error| (what.to_owned(), error);
        let realtime = if config.realtime {
            realtime::acquire()
        } else {
            Err("switched off in the configuration".to_owned())
        };
        let on_netlink_thread = match (config.realtime, &realtime) {
            (true, Ok(())) => realtime::follow,
            (true, Err(_)) | (false, _) => || (),
        };
        let interfaces = config.paths.iter().map(|path| path.interface.clone());
        let watch = Watch {
            interfaces: interfaces
                .chain(config.vips.iter().map(|vip| vip.interface.clone()))
                .collect(),
            vips: config.vips.clone(),
            valid_lft: config.valid_lft,
            owner: config.priority == Priority::OWNER,
        };
        let netlink = Netlink::start(watch, on_netlink_thread)
            .map_err(doing("ask the kernel over netlink"))?;
        let now = Instant::now();
        let boot = BootId::draw().map_err(doing("draw a boot id"))?;
        let (channels, peer_events, reports) = match (&config.channel, peers) {
            (Some(channel), Some(ends)) => (
                Some(Channels::new(channel, &config.node, boot, ends.queues)),
                Some(ends.events),
                Some(ends.reports),
            ),
            (_, _) => (None, None, None),
        };
        let fence = Fence::new(config.channel.as_ref().map_or(0, |channel| channel.peers.len()));
        let peers = config.channel.iter().flat_map(|channel| &channel.peers);
        let peers = peers.map(|peer| peer.name.clone());
        let configured =
            config.channel.as_ref().map_or(SLOW_HEARTBEAT, |channel| channel.heartbeat);
        let heartbeat = match &realtime {
            Err(_) if configured <= heart::QUICK => SLOW_HEARTBEAT,
            Ok(()) | Err(_) => configured,
        };
        let handover = config.channel.as_ref().map(|channel| {
            handover::Machine::new(handover::Config {
                peers: channel.peers.len(),
                advert_interval: config.advert_interval.duration(),
                preempt_wait: config.preempt_wait,
                replicates: channel.replicates,
            })
        });
        let mut driver = Self {
            heart: Heart::new(
                now,
                config.advert_interval.duration(),
                (heartbeat <= heart::QUICK).then_some(heartbeat),
                peers,
            ),
            heartbeat,
            leased_quickly: false,
            heartbeat_at: channels.as_ref().map(|_| now),
            channels,
            peer_events,
            reports,
            handover,
            election: None,
            preempt_by: PreemptBy::default(),
            announced: false,
            active_lease: None,
            fence,
            node: Node::new(&config),
            lease,
            netlink,
            ports: Ports::new(&config),
            timer: Timer::new().map_err(doing("make a timer"))?,
            commands,
            handles_gone: false,
            view,
            publish_at: None,
            retry_at: None,
            deferred: VecDeque::new(),
            counters: Counters::new(),
            journal: Journal::start().map_err(doing("start the log thread"))?,
            neighbors: Neighbors::new(config.peers.clone()),
            memory: Memory::new(&config),
            recorder,
            pending: None,
            goodbye: None,
            asked: VecDeque::new(),
            restored: vec![0; config.vips.len()],
            since: (now, SystemTime::now()),
            takeovers: 0,
            realtime,
            wanted: None,
            config,
        };
        driver.introduce();
        driver.follow_interfaces();
        Ok(driver)
    }

    /// Takes part from here on: the view shows the first state that comes of it.
    pub(super) async fn begin(&mut self) {
        self.feed(Input::Startup).await;
        self.publish();
    }

    /// Runs until [`Command::Shutdown`].
    pub(super) async fn run(mut self) {
        loop {
            let now = Instant::now();
            self.wanted = self.next_deadline();
            if let Err(error) = self.timer.set(now, self.wanted) {
                self.trouble(Counter::SocketTrouble, format!("set the timer: {error}"));
            }
            let wake = self.wake().await;
            if let Flow::End = self.turn(wake).await {
                break;
            }
        }
        let goodbye = self.goodbye.take();
        // The sockets are closed and the last lines written when the caller goes on.
        drop(self);
        if let Some(goodbye) = goodbye {
            let _ = goodbye.send(());
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let pending = self.pending.as_ref().map(|pending| pending.deadline);
        let channels = self.channels.as_ref().and_then(Channels::next_deadline);
        let machines = [self.node.poll_timeout(), self.heart.poll_timeout()];
        let handover = self.handover.as_ref().and_then(handover::Machine::poll_timeout);
        let own = machines.into_iter().chain([self.publish_at, self.retry_at, pending]);
        own.chain([channels, self.heartbeat_at, handover]).flatten().min()
    }

    /// Waits until there is something to do; what, is looked at after, in a fixed order.
    async fn wake(&mut self) -> Wake {
        let (ports, timer, channels) = (&self.ports, &mut self.timer, &mut self.channels);
        let readable = poll_fn(|context| {
            let timer = timer.poll_expired(context).is_ready();
            let channels =
                channels.as_mut().is_some_and(|channels| channels.poll_ready(context).is_ready());
            if ports.poll_readable(context).is_ready() || timer || channels {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        let Netlink { events, snapshots, .. } = &mut self.netlink;
        let reports = &mut self.reports;
        let report = async {
            match reports {
                Some(reports) => reports.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = readable => Wake::Look,
            report = report => match report {
                Some(report) => Wake::Report(report),
                // Nobody replicates any more.
                None => {
                    self.reports = None;
                    Wake::Look
                }
            },
            event = events.recv() => event.map_or(Wake::KernelGone, Wake::Kernel),
            Ok(()) = snapshots.changed() => {
                snapshots.mark_changed();
                Wake::Look
            }
            command = self.commands.recv(), if !self.handles_gone => match command {
                Some(command) => Wake::Command(command),
                None => {
                    self.handles_gone = true;
                    Wake::Look
                }
            },
        }
    }

    /// Everything that is there: packets first, so that an advert that came in time is not
    /// overtaken by the timer that it restarts; unless this node slept. Then the machine must
    /// know that before it hears or says anything, and what was queued meanwhile is history.
    async fn turn(&mut self, wake: Wake) -> Flow {
        if let Wake::KernelGone = wake {
            self.trouble(Counter::NetlinkTrouble, "the netlink thread has ended".to_owned());
            return Flow::End;
        }
        let now = Instant::now();
        self.notice_end_of_lease().await;
        let slept = self.slept(now);
        if slept {
            self.awake(now).await;
        } else {
            self.read_adverts().await;
            self.read_frames().await;
        }
        self.talk(now, slept).await;
        let mut command = None;
        match wake {
            Wake::Look | Wake::KernelGone => {}
            Wake::Report(report) => self.report(report).await,
            Wake::Kernel(event) => self.deferred.push_back(event),
            Wake::Command(received) => command = Some(received),
        }
        while let Some(event) = self.next_event() {
            self.kernel(event).await;
        }
        let news = self.netlink.snapshots.has_changed().unwrap_or(false);
        if news || self.retry_at.is_some_and(|at| at <= now) {
            self.follow_interfaces();
            self.perform().await;
        }
        // A flood of packets keeps `wake` from getting to the commands.
        let flow = match command.or_else(|| self.commands.try_recv().ok()) {
            Some(command) => self.command(command).await,
            None => Flow::Continue,
        };
        let now = Instant::now();
        self.heart.handle_timeout(now);
        self.heed().await;
        let now = Instant::now();
        self.node.handle_timeout(now);
        self.perform().await;
        self.heed().await;
        self.hand_over(now).await;
        self.give_up(now);
        self.record_news(now);
        if flow == Flow::End || self.publish_at.is_some_and(|at| at <= Instant::now()) {
            self.publish();
        }
        flow
    }

    /// A quick lease that ended before this node could renew it: a Backup may have claimed.
    async fn notice_end_of_lease(&mut self) {
        let ended = self.lease.as_ref().is_some_and(|lease| lease.left().is_zero());
        if self.leased_quickly && ended && self.fence.holding().is_some() {
            let now = Instant::now();
            if let Some(suppressed) = self.note(Counter::Stalled, now) {
                let late = self.wanted.map(|wanted| now.saturating_duration_since(wanted));
                self.journal
                    .say(move || warn!(?late, suppressed, "the lease ended before it was renewed"));
            }
            self.feed(Input::LeaseOver).await;
        }
    }

    fn slept(&self, now: Instant) -> bool {
        let bound = 3 * self.config.advert_interval.duration();
        self.wanted.is_some_and(|wanted| now.saturating_duration_since(wanted) >= bound)
    }

    async fn awake(&mut self, now: Instant) {
        let late = self.wanted.map(|wanted| now.saturating_duration_since(wanted));
        self.record(now, What::Slept(late.unwrap_or_default()));
        if let Some(suppressed) = self.note(Counter::Stalled, now) {
            self.journal.say(move || {
                warn!(?late, suppressed, "this node slept; what was queued meanwhile is discarded");
            });
        }
        self.node.handle_timeout(now);
        self.perform().await;
        if let Some((_, until)) = &mut self.active_lease {
            // Renewed while this node slept: by how much is in what is discarded.
            let interval = self.neighbors.active().map(|heard| heard.interval);
            let interval = interval.unwrap_or(self.config.advert_interval.duration());
            *until = (*until).max(now + lease::length(interval));
        }
        let discarded = self.ports.discard();
        self.counters.count(Counter::Stale, discarded);
    }

    fn next_event(&mut self) -> Option<Event> {
        self.deferred.pop_front().or_else(|| self.netlink.events.try_recv().ok())
    }

    /// What the netlink thread reports.
    async fn kernel(&mut self, event: Event) {
        match event {
            Event::Done(ticket, result) => {
                let place = self.asked.iter().position(|(asked, _)| *asked == ticket);
                let Some((_, purpose)) = place.and_then(|place| self.asked.remove(place)) else {
                    return; // Void: the VIPs were removed since.
                };
                if let Err(why) = &result {
                    self.trouble(Counter::ConfigureFailed, why.clone());
                }
                match (purpose, result) {
                    (Purpose::Refresh, _) => {}
                    (Purpose::Claim, Ok(())) => self.configured(None).await,
                    (Purpose::Restore(vip), Ok(())) => self.configured(Some(vip)).await,
                    (Purpose::Claim | Purpose::Restore(_), Err(why)) => {
                        self.feed(Input::ConfigureFailed(why)).await;
                    }
                }
            }
            Event::Stray { address, index, removed } => {
                let now = Instant::now();
                let note = self.note(Counter::StrayVip, now);
                self.publish_by(now);
                let Some(suppressed) = note else { return };
                self.journal.say(move || match removed {
                    Ok(()) => {
                        warn!(%address, index, suppressed, "VIP stood here without being ours: removed");
                    }
                    Err(why) => {
                        warn!(%address, index, suppressed, "VIP stands here, can't be removed: {why}");
                    }
                });
            }
            Event::Trouble(why) => self.trouble(Counter::NetlinkTrouble, why),
        }
    }

    async fn configured(&mut self, restored: Option<usize>) {
        let now = Instant::now();
        if let Some(place) = restored {
            self.restored[place] += 1;
            let address = self.config.vips[place].address;
            if let Some(suppressed) = self.note(Counter::VipRestored, now) {
                self.journal.say(move || {
                    warn!(%address, suppressed, "something else removed this VIP: put back");
                });
            }
        } else if let Some(pending) = &mut self.pending {
            pending.step(now, "VIPs configured");
        }
        self.publish_by(now);
        self.feed(Input::Configured).await;
    }

    /// Brings sockets and node in step with the latest snapshot. Its outputs are to be performed.
    fn follow_interfaces(&mut self) {
        let now = Instant::now();
        let snapshot = self.netlink.snapshots.borrow_and_update().clone();
        let interfaces = &snapshot.interfaces;
        let follow = self.ports.follow(interfaces);
        self.retry_at = (!follow.trouble.is_empty()).then(|| now + RETRY);
        if follow.mac_changed {
            self.node.handle_input(now, Input::Moved);
        }
        for what in follow.trouble {
            self.trouble(Counter::SocketTrouble, what);
        }
        for vip in &self.config.vips {
            let (interface, usable) = (vip.interface.clone(), interfaces.usable(&vip.interface));
            let usable = usable.map(drop);
            self.node.handle_input(now, Input::Link { interface, usable });
        }
        self.node.handle_input(now, Input::Paths(self.ports.fit(interfaces)));
        // An older snapshot may lack a VIP that was asked for after it.
        if snapshot.after >= self.netlink.last() {
            for (place, vip) in self.config.vips.iter().enumerate() {
                if !interfaces.has(vip) {
                    self.node.handle_input(now, Input::VipMissing(place));
                }
            }
        }
        self.publish_by(now);
    }

    async fn feed(&mut self, input: Input) {
        self.node.handle_input(Instant::now(), input);
        self.perform().await;
    }

    /// Counts one; `Some` if it is to be logged now, see [`Counters::note`].
    fn note(&mut self, counter: Counter, now: Instant) -> Option<u64> {
        self.publish_by(now + VIEW_SENT);
        self.counters.note(counter, now)
    }

    /// Counts something that went wrong, and logs it at a bounded rate.
    fn trouble(&mut self, counter: Counter, what: String) {
        if let Some(suppressed) = self.note(counter, Instant::now()) {
            self.journal.say(move || warn!(kind = counter.name(), suppressed, "{what}"));
        }
    }

    fn introduce(&mut self) {
        let config = self.config.clone();
        let realtime = self.realtime.clone();
        let quick =
            config.channel.as_ref().is_some_and(|channel| channel.heartbeat <= heart::QUICK);
        self.journal.say(move || {
            info!(
                node = config.node, vrid = %config.vrid, priority = %config.priority,
                interval = ?config.advert_interval.duration(), paths = config.paths.len(),
                vips = config.vips.len(), valid_lft = ?config.valid_lft, "HA driver starts"
            );
            if let Err(why) = realtime {
                warn!("no real-time priority: {why}");
                if quick {
                    warn!(heartbeat = ?SLOW_HEARTBEAT, "heartbeats are slower than configured");
                }
            }
        });
    }

    fn publish_by(&mut self, at: Instant) {
        // Changes of others come in a stream, which is thinned out; this node's own do not wait.
        if self.publish_at.is_none_or(|planned| at < planned) {
            self.publish_at = Some(at);
        }
    }

    fn publish(&mut self) {
        self.publish_at = None;
        let snapshot = self.netlink.snapshots.borrow().clone();
        let vips = self.config.vips.iter().zip(&self.restored).map(|(vip, restored)| VipView {
            vip: vip.clone(),
            held: snapshot.interfaces.has(vip),
            restored: *restored,
        });
        let paths = self.ports.paths.iter().map(|port| PathView {
            interface: port.path.interface.clone(),
            primary: port.primary.as_ref().ok().copied(),
            usable: port.primary.clone().map(drop),
            sent: port.sent,
            received: port.received,
        });
        let channels = self.channels.iter().flat_map(|channels| &channels.peers);
        let peers = channels.map(|peer| PeerView {
            name: peer.name.clone(),
            up: peer.peer.clone().ok_or_else(|| {
                peer.why.clone().unwrap_or_else(|| "it has not connected yet".to_owned())
            }),
            since: peer.since,
            sent: peer.sent,
            received: peer.received,
        });
        self.view.send_replace(View {
            peers: peers.collect(),
            epoch: self.fence.epoch(),
            waiting: self.waiting(),
            state: self.node.state(),
            reason: self.node.reason(),
            since: self.since.0,
            since_wall: self.since.1,
            takeovers: self.takeovers,
            priority: self.node.advertised_priority(),
            active: self.neighbors.active().cloned(),
            heard: self.neighbors.list(),
            vips: vips.collect(),
            paths: paths.collect(),
            realtime: self.realtime.clone(),
            counters: self.counters.list(),
        });
    }
}

/// Why the loop woke up.
enum Wake {
    /// Something is there; or time has passed.
    Look,
    Kernel(Event),
    Report(Report),
    /// The netlink thread has ended: without it the VIPs can't be held.
    KernelGone,
    Command(Command),
}
