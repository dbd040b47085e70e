//! The one loop: sockets and clock ⇄ [`crate::node::Node`], on a thread of its own.
//!
//! It does what the node's outputs say, in their order, logs transitions, counts what it drops,
//! and publishes a [`View`]. It decides nothing.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};

use crate::channel::message::Message;
use crate::channel::session::Peer;
use crate::channel::wire;
use crate::config::{HaConfig, Vip};
use crate::lease::Lease;
use crate::record::{self, Record, Recorder};
use crate::state;
use crate::sync::{Frame, WINDOW};
use crate::vrrp::Priority;
use crate::vrrp::router::{Reason, State};

pub use counters::Counter;

mod channels;
mod commands;
mod counters;
mod journal;
mod neighbors;
mod ports;
pub(crate) mod realtime;
mod run;

use run::Driver;

/// Commands that may wait; who sends more waits.
const COMMANDS: usize = 16;

/// What this node is and knows of the others; published at every change.
#[derive(Debug, Clone)]
pub struct View {
    /// State of this node's virtual router.
    pub state: State,
    /// Why it is in that state.
    pub reason: Reason,
    /// Since when, by the monotonic clock.
    pub since: Instant,
    /// Since when, for people.
    pub since_wall: SystemTime,
    /// How often this node has become Active since it started.
    pub takeovers: u64,
    /// What this node advertises while Active: its configured priority, or more while a takeover
    /// is held.
    pub priority: Priority,
    /// The node last heard as Active, if it is not this one.
    pub active: Option<Heard>,
    /// Every other node heard since the start, in order of address.
    pub heard: Vec<Heard>,
    /// Every VIP and whether this node holds it.
    pub vips: Vec<VipView>,
    /// Every path and whether its interface is usable, with the reason where it is not.
    pub paths: Vec<PathView>,
    /// Every peer of the channel; none where there is no channel.
    pub peers: Vec<PeerView>,
    /// The highest epoch that was heard of: which time of being Active, over all nodes, this is.
    pub epoch: u64,
    /// Whether the driver's thread runs at real-time priority, with the reason where it does not.
    pub realtime: Result<(), String>,
    /// What this node waits for, if it is to preempt.
    pub waiting: Option<WaitingView>,
    /// Every counter by its name, in a fixed order; see [`Counter`].
    pub counters: Vec<(&'static str, u64)>,
}

/// A node of higher priority than the Active's, which does not take the VIPs yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingView {
    /// The Active.
    pub peer: String,
    /// Since when it waits.
    pub since: Instant,
    /// Until when; `None`: it has waited for long enough, and leaves the Active alone.
    pub until: Option<Instant>,
    /// Why it does not have the VIPs yet, in words.
    pub why: Option<String>,
    /// Flows that the Active knows to be here, and all that there are.
    pub flows: Option<(u64, u64)>,
}

/// Another node, as its adverts show it.
#[derive(Debug, Clone)]
pub struct Heard {
    /// Its name, where a peer of the configuration has that address.
    pub name: Option<String>,
    /// Source address of its last advert.
    pub address: IpAddr,
    /// Priority of its last advert; 0 if it yielded.
    pub priority: Priority,
    /// Its advertisement interval.
    pub interval: Duration,
    /// When its last advert came.
    pub at: Instant,
    /// How many adverts came.
    pub adverts: u64,
}

/// A VIP as it stands on this node.
#[derive(Debug, Clone)]
pub struct VipView {
    /// The VIP.
    pub vip: Vip,
    /// Whether the kernel has it on its interface now.
    pub held: bool,
    /// How often something else removed it and it was put back.
    pub restored: u64,
}

/// A path as it stands.
#[derive(Debug, Clone)]
pub struct PathView {
    /// Interface name.
    pub interface: String,
    /// This node's primary address on it, as adverts carry it.
    pub primary: Option<IpAddr>,
    /// `Err` says what is wrong: no such interface, no carrier, no address.
    pub usable: Result<(), String>,
    /// Adverts sent and received.
    pub sent: u64,
    /// Valid adverts received.
    pub received: u64,
}

/// A peer on the channel.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// Its name.
    pub name: String,
    /// Who answers there, or why nobody does.
    pub up: Result<Peer, String>,
    /// Since when there is a connection.
    pub since: Option<Instant>,
    /// Messages sent on the channel.
    pub sent: u64,
    /// Messages received.
    pub received: u64,
}

/// What happens on the peer channel, for whoever replicates. Peers are told apart by their place in
/// the configuration.
#[derive(Debug)]
pub enum PeerEvent {
    /// There is a connection, with nothing on it yet.
    Up {
        /// With whom.
        place: usize,
        /// Who that is.
        peer: Peer,
    },
    /// There is none any more.
    Down {
        /// With whom.
        place: usize,
    },
    /// A frame came.
    Frame {
        /// From whom.
        place: usize,
        /// What it says.
        frame: Frame,
    },
    /// Word of settings and views.
    State {
        /// From whom.
        place: usize,
        /// What it says.
        frame: state::Frame,
    },
    /// The VIPs are to go to this peer: it is to have every flow but those of this moment.
    /// Answered by [`Report::CaughtUp`] or [`Report::Behind`].
    CatchUp {
        /// Which peer.
        place: usize,
        /// To be handed back.
        run: u64,
    },
    /// No packet passes any more: it is to acknowledge the last delta. Answered by
    /// [`Report::Flushed`].
    Flush {
        /// Which peer.
        place: usize,
        /// To be handed back.
        run: u64,
    },
    /// Neither is wanted any more.
    FlushOver,
}

/// What whoever replicates tells the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// Flows are replicated from now on.
    Replicates,
    /// The peer has everything but for what is happening now.
    CaughtUp {
        /// As it was asked for.
        run: u64,
    },
    /// It has not, or not in time.
    Behind {
        /// As it was asked for.
        run: u64,
        /// Flows that it has not acknowledged.
        lacking: u64,
        /// Flows that there are.
        of: u64,
    },
    /// The last delta is acknowledged, but for so many changes.
    Flushed {
        /// As it was asked for.
        run: u64,
        /// Changes that are not acknowledged.
        lacking: u64,
    },
}

/// The replicating side of the peer channel.
#[derive(Debug)]
pub struct PeerPort {
    /// For each peer, messages to it, as [`PeerPort::encode`] makes them: bounded, and in their
    /// order. What waits when a connection ends is dropped.
    pub to: Vec<mpsc::Sender<Vec<u8>>>,
    /// What happens. It has to be read: who lets it fill up loses connections.
    pub events: mpsc::Receiver<PeerEvent>,
    /// Answers to the driver; a few.
    pub reports: mpsc::Sender<Report>,
}

/// The driver's ends of a [`PeerPort`].
pub(crate) struct PeerEnds {
    queues: Vec<mpsc::Receiver<Vec<u8>>>,
    events: mpsc::Sender<PeerEvent>,
    reports: mpsc::Receiver<Report>,
}

impl PeerPort {
    /// A frame as it is sent.
    pub fn encode(frame: impl Into<Message>) -> Vec<u8> {
        wire::encode(&frame.into())
    }
}

/// Commands to the driver.
#[derive(Debug)]
pub(crate) enum Command {
    /// Become Active now; whatever it costs, or not.
    Takeover(bool, oneshot::Sender<Result<Outcome, Refused>>),
    /// Stop being Active now; whatever it costs, or not.
    Yield(bool, oneshot::Sender<Result<Outcome, Refused>>),
    /// Yield and end the thread.
    Shutdown(oneshot::Sender<()>),
}

/// What a takeover or a yield came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Each step, in the order of time.
    pub steps: Vec<Step>,
    /// Where the VIPs were handed over: flows, or changes of flows, that the new Active may lack.
    pub lacking: Option<u64>,
    /// The epoch at the end.
    pub epoch: u64,
    /// The node that is Active now, if it is known: `None` names this node.
    pub active: Option<Heard>,
}

/// A step of a takeover or a yield.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Since the command.
    pub at: Duration,
    /// The peer that did it; `None`: this node.
    pub peer: Option<String>,
    /// What.
    pub what: String,
}

/// Why a takeover or a yield did not come about.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refused {
    /// The node is not taking part.
    #[error("this node can't be Active: {0}")]
    Fault(String),
    /// The other node advertises the owner's priority: nothing outranks it.
    #[error("{0} advertises priority 255 and can't be outranked: run `baton yield` there")]
    Outranked(IpAddr),
    /// `yield` on a node that isn't Active.
    #[error("this node is not Active, so it has nothing to yield")]
    NotActive,
    /// Nobody claimed the VIPs in time; this node has claimed them again.
    #[error(
        "no other node claimed the VIPs within {} ms, so this node has them again: is another \
         node running, and does it hear this one (`baton status` there)?",
        .0.as_millis()
    )]
    Unclaimed(Duration),
    /// The nodes did not come to an agreement; it can be done without.
    #[error(
        "nothing was changed: {0}. With --force it is done all the same: connections whose flows \
         the other node lacks are lost"
    )]
    Unready(String),
    /// It is not known what came of it, or not the time for it.
    #[error("{0}")]
    Left(String),
    /// Another command came before this one had come to its end.
    #[error("another command came in between")]
    Superseded,
    /// The driver has ended.
    #[error("the HA driver has ended")]
    Ended,
}

/// A running driver. Dropping it does not end the thread; [`Handle::shutdown`] does.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<View>,
    recorder: Recorder,
    records: Arc<Mutex<Option<Receiver<Record>>>>,
}

impl Handle {
    /// The view, and a way to wait for its changes.
    pub fn view(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// Every decision with what was known, from the start, for whoever writes them down: to the
    /// first who asks. Where nobody does they are lost, and counted.
    pub fn records(&self) -> Option<Receiver<Record>> {
        self.records.lock().ok()?.take()
    }

    /// A way to add to them.
    pub fn recorder(&self) -> Recorder {
        self.recorder.clone()
    }

    /// This node becomes Active now, whoever is; returns when it is. With `force` it does so
    /// without the Active's consent where it must.
    pub async fn takeover(&self, force: bool) -> Result<Outcome, Refused> {
        self.ask(|answer| Command::Takeover(force, answer)).await?
    }

    /// This node stops being Active; returns when another has claimed the VIPs. With `force` it does
    /// so though no other has this node's flows.
    pub async fn yield_now(&self, force: bool) -> Result<Outcome, Refused> {
        self.ask(|answer| Command::Yield(force, answer)).await?
    }

    /// Yields, drops the VIPs and ends the thread.
    pub async fn shutdown(&self) {
        let _ = self.ask(Command::Shutdown).await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Refused> {
        let (answer, wait) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| Refused::Ended)?;
        wait.await.map_err(|_| Refused::Ended)
    }
}

/// Why the driver could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A system call failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// The error.
        #[source]
        source: std::io::Error,
    },
}

/// Opens the sockets, removes VIPs that are there without this node owning them, and starts the
/// loop on its own thread, in the network namespace of the calling thread.
///
/// An interface that is missing or down is no error: the node waits for it in Initialize.
///
/// `lease` is renewed for as long as this node is Active, for the guard that holds its other end.
/// The port is the peer channel's, where there is one.
pub fn start(
    config: HaConfig,
    lease: Option<Lease>,
) -> Result<(Handle, Option<PeerPort>), StartError> {
    let failed = |doing: &str, source| StartError::Io { doing: doing.to_owned(), source };
    check_capabilities()?;
    let (commands, commands_in) = mpsc::channel(COMMANDS);
    let (view_out, view) = watch::channel(View::blank());
    let (recorder, records) = record::queue();
    let driver_recorder = recorder.clone();
    let (started, wait) = sync_channel(1);
    let (port, peers) = match &config.channel {
        Some(channel) => {
            let queues = channel.peers.iter().map(|_| mpsc::channel(channels::QUEUE));
            let (to, queues) = queues.unzip();
            // Each peer's window in both directions, bursts of its state, its comings and goings.
            let room = channel.peers.len().max(1) * (2 * WINDOW as usize + 48);
            let (events_in, events) = mpsc::channel(room);
            let (reports, reports_out) = mpsc::channel(COMMANDS);
            let ends = PeerEnds { queues, events: events_in, reports: reports_out };
            (Some(PeerPort { to, events, reports }), Some(ends))
        }
        None => (None, None),
    };
    thread::Builder::new()
        .name("baton-ha".to_owned())
        .spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = started.send(Err(("make a runtime".to_owned(), error)));
                    return;
                }
            };
            runtime.block_on(async move {
                match Driver::open(config, lease, commands_in, view_out, peers, driver_recorder) {
                    Ok(mut driver) => {
                        driver.begin().await;
                        let _ = started.send(Ok(()));
                        driver.run().await;
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            });
        })
        .map_err(|error| failed("start the HA thread", error))?;
    match wait.recv() {
        Ok(Ok(())) => {
            let records = Arc::new(Mutex::new(Some(records)));
            Ok((Handle { commands, view, recorder, records }, port))
        }
        Ok(Err((doing, source))) => Err(StartError::Io { doing, source }),
        Err(_) => Err(failed("start the HA thread", io::Error::other("it ended"))),
    }
}

/// Raw sockets need CAP_NET_RAW, addresses CAP_NET_ADMIN; to find that out at a takeover is late.
fn check_capabilities() -> Result<(), StartError> {
    // Without /proc it shows later.
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    match missing_capability(&status) {
        None => Ok(()),
        Some(name) => Err(StartError::Io {
            doing: format!(
                "take part in the election, which needs {name}: run as root, or give the \
                 service AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW"
            ),
            source: io::ErrorKind::PermissionDenied.into(),
        }),
    }
}

fn missing_capability(status: &str) -> Option<&'static str> {
    const NEEDED: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW")];
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(mask.trim(), 16).ok()?;
    NEEDED.iter().find(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name)
}

impl View {
    /// Before anything is known.
    fn blank() -> Self {
        Self {
            state: State::Initialize,
            reason: Reason::Startup,
            since: Instant::now(),
            since_wall: SystemTime::now(),
            takeovers: 0,
            priority: Priority::YIELD,
            active: None,
            heard: Vec::new(),
            vips: Vec::new(),
            paths: Vec::new(),
            peers: Vec::new(),
            epoch: 0,
            waiting: None,
            realtime: Err("not started yet".to_owned()),
            counters: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_capability_is_found() {
        let status = |mask: &str| format!("Name:\tbaton\nCapPrm:\t0\nCapEff:\t{mask}\n");
        assert_eq!(missing_capability(&status("000001ffffffffff")), None);
        assert_eq!(missing_capability(&status("0000000000003000")), None);
        assert_eq!(missing_capability(&status("0000000000002000")), Some("CAP_NET_ADMIN"));
        assert_eq!(missing_capability(&status("0000000000001000")), Some("CAP_NET_RAW"));
        assert_eq!(missing_capability(&status("0000000000000000")), Some("CAP_NET_ADMIN"));
        assert_eq!(missing_capability(""), None, "not known");
    }
}
