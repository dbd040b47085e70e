//! What this node decided, with what it knew at that moment: the records that `baton explain`
//! shows.
//!
//! The driver makes them and hands them over through a bounded queue ([`queue`]); who writes them
//! down, and where, is the business of the crate that uses this one. A record has a fixed size and
//! holds no memory of its own, so that making one costs the real-time thread a copy. What does not
//! fit into the queue is lost and counted.
//!
//! [`memory`] keeps what was heard, and when. All of it is pure, but for [`Stamp::now`].

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

use crate::heart::Word;
use crate::vrrp::Priority;
use crate::vrrp::router::{State, Transition};

pub mod memory;
mod words;

pub use words::Words;

/// Peers that a record tells of, in the order of the configuration; those beyond are left out.
pub const PEERS: usize = 8;
/// Paths that a record tells of, in the order of the configuration.
pub const PATHS: usize = 8;
/// Records that may wait to be written. When there are more they are lost, and counted.
pub const QUEUE: usize = 256;

/// A decision.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// When.
    pub at: Stamp,
    /// What was decided, or what happened.
    pub what: What,
    /// What the driver knew; `None` where it was not its decision.
    pub known: Option<Known>,
}

/// A moment, for people and for order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Since the machine booted (`CLOCK_BOOTTIME`): it never jumps.
    pub boot: Duration,
    /// For people.
    pub wall: SystemTime,
}

impl Stamp {
    /// This moment.
    pub fn now() -> Self {
        // A kernel since 2.6.39 has this clock; without it, order is still that of the file.
        let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        Self { boot, wall: SystemTime::now() }
    }
}

/// What was decided, or what happened that decisions follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The daemon started.
    Started,
    /// The daemon was told to stop.
    Stopping(Words),
    /// The state, or the reason for it, changed.
    Transition {
        /// From, to, and why.
        transition: Transition,
        /// What keeps the node from taking part, where that is the reason.
        fault: Words,
    },
    /// Another node is heard as Active.
    Follows(Who),
    /// Another node advertises while this one is Active and stays it.
    Rival {
        /// Which.
        who: Who,
        /// Its priority.
        priority: Priority,
    },
    /// A path works again, or works no more.
    Path {
        /// Which, by its place.
        path: usize,
        /// Whether it works.
        usable: bool,
        /// Why not.
        why: Words,
    },
    /// The peer channel to a peer is up.
    ChannelUp(usize),
    /// It is down; [`PeerKnown::channel`] says how.
    ChannelDown(usize),
    /// A peer was refused, or refused this node.
    PeerRefused {
        /// Which.
        peer: usize,
        /// Why.
        why: Words,
    },
    /// This node did not run when it wanted to.
    Slept(Duration),
    /// It could have acted and does not, for now or for good.
    Waits(Words),
    /// Something was done in the way of a decision.
    Did(Words),
    /// An operator asked for something.
    Asked {
        /// What.
        what: Words,
        /// Who.
        by: Words,
    },
    /// And was refused.
    Refused {
        /// What was asked for.
        what: Words,
        /// Why it was not done.
        why: Words,
    },
}

/// Another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// A peer of the configuration, by its place.
    Peer(usize),
    /// Any other.
    Stranger(IpAddr),
}

/// What a node knew when it decided.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Its state, after the decision.
    pub state: State,
    /// The highest epoch that it had heard of, or used.
    pub epoch: u64,
    /// What it advertises, or would as Active.
    pub priority: Priority,
    /// What its own lease has left; `None` where it holds none.
    pub lease: Option<Duration>,
    /// The node last heard as Active, if it is not this one.
    pub active: Option<Who>,
    /// How long it waits for an advert of that Active before it claims (Active_Down_Interval).
    pub active_down: Option<Duration>,
    /// Whether each path works.
    pub paths: [Option<bool>; PATHS],
    /// Each peer.
    pub peers: [Option<PeerKnown>; PEERS],
    /// The last node heard that is no peer.
    pub stranger: Option<(IpAddr, Heard)>,
}

/// What was known of a peer.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeerKnown {
    /// Its last advert on each path.
    pub adverts: [Option<Heard>; PATHS],
    /// Its last heartbeat.
    pub beat: Option<BeatHeard>,
    /// The peer channel to it.
    pub channel: Channel,
}

/// An advert, as it was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// How long ago.
    pub ago: Duration,
    /// The priority that it carried.
    pub priority: Priority,
}

/// A heartbeat, as it was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeatHeard {
    /// How long ago.
    pub ago: Duration,
    /// Its epoch.
    pub epoch: u64,
    /// What the sender's lease had left when it came.
    pub lease: Duration,
    /// How the sender stood, and what it heard.
    pub word: Word,
    /// The priority that it carried; `None` where its sender was not Active.
    pub priority: Option<Priority>,
}

/// The peer channel to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Channel {
    /// There never was a connection.
    #[default]
    Never,
    /// There has been one for so long.
    Up(Duration),
    /// There was one.
    Down {
        /// How long ago it ended.
        ago: Duration,
        /// Whether the other side closed it, as the kernel of a daemon that has died does.
        by_peer: bool,
        /// What the peer's lease had left then.
        lease: Duration,
        /// How it ended.
        why: Words,
    },
}

/// Where records go. Sending never waits.
#[derive(Debug, Clone)]
pub struct Recorder {
    queue: SyncSender<Record>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    lost: AtomicU64,
}

/// A queue for [`QUEUE`] records; its memory is there from the start.
pub fn queue() -> (Recorder, Receiver<Record>) {
    let (queue, records) = sync_channel(QUEUE);
    (Recorder { queue, counts: Arc::default() }, records)
}

impl Recorder {
    /// Hands a record over; one that does not fit is lost.
    pub fn send(&self, record: Record) {
        match self.queue.try_send(record) {
            Ok(()) => drop(self.counts.sent.fetch_add(1, Ordering::Release)),
            Err(_) => self.lose(),
        }
    }

    /// Counts one that is not sent.
    pub fn lose(&self) {
        self.counts.lost.fetch_add(1, Ordering::Release);
    }

    /// How many were sent.
    pub fn sent(&self) -> u64 {
        self.counts.sent.load(Ordering::Acquire)
    }

    /// How many were lost.
    pub fn lost(&self) -> u64 {
        self.counts.lost.load(Ordering::Acquire)
    }
}

impl What {
    /// Whether this is what the journal is for: it is held back last.
    fn is_transition(&self) -> bool {
        matches!(self, Self::Transition { .. })
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(place) => write!(f, "peer {place}"),
            Self::Stranger(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let known = Known {
            state: State::Backup,
            epoch: 1,
            priority: Priority::new(1),
            lease: None,
            active: None,
            active_down: None,
            paths: [None; PATHS],
            peers: [None; PEERS],
            stranger: None,
        };
        Record { at: Stamp::now(), what: What::Started, known: Some(known) }
    }

    #[test]
    fn a_full_queue_loses_records_and_says_how_many_but_never_waits() {
        let (recorder, records) = queue();
        for _ in 0..QUEUE + 5 {
            recorder.send(record());
        }
        assert_eq!((recorder.sent(), recorder.lost()), (QUEUE as u64, 5));
        assert_eq!(records.try_iter().count(), QUEUE);
        recorder.send(record());
        assert_eq!(recorder.lost(), 5, "there is room again");
        drop(records);
        recorder.send(record());
        assert_eq!(recorder.lost(), 6, "nobody writes any more");
    }

    #[test]
    fn a_record_is_small_enough_to_be_copied() {
        assert!(size_of::<Record>() <= 8 << 10, "{}", size_of::<Record>());
    }
}
