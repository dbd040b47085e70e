//! Why a node did what it did: the journal of its decisions with their inputs, and `baton explain`,
//! which shows it.
//!
//! The HA driver makes [`baton_ha::record::Record`]s. [`Journal`], a plain thread, adds what the
//! rest of the daemon knew and writes each as an [`Entry`], one line of JSON, to a [`mod@file`] that is
//! bounded and outlives the daemon. [`read`] reads it with or without a daemon, [`text`] puts it in
//! words. Nothing here is waited for: a full disk costs records, which are counted, and no more.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use baton_ha::state::{Health, Target};
use baton_ha::vrrp::router::{Reason, State};
use serde::{Deserialize, Serialize};

use crate::status::ReplicationStatus;

pub mod cli;
mod entry;
pub mod file;
mod journal;
pub mod read;
pub mod text;

pub use journal::{Around, Journal, JournalStatus};

/// Where nodes keep what outlives them, each in a folder with its name.
pub const STATE: &str = "/var/lib/baton";
/// The journal's file, in that folder.
pub const FILE: &str = "journal.jsonl";

/// The journal of a node whose state is in `folder`.
pub fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// The state of a node of that name, unless its file says otherwise.
pub fn state_dir(node: &str) -> PathBuf {
    Path::new(STATE).join(node)
}

/// A decision, as the journal has it; docs/operations.md describes each field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When, by the clock on the wall (RFC 3339, UTC).
    pub wall: String,
    /// The boot of the machine (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// Microseconds since then: it never jumps.
    pub mono_us: u64,
    /// Process id of the daemon.
    pub pid: u32,
    /// The node's name.
    pub node: String,
    /// What was decided, or happened.
    pub what: What,
    /// Decisions before this one that are missing: there were too many at once, or they could not
    /// be written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub missing: u64,
    /// What the election knew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<Known>,
    /// Flows on the other nodes, as last looked at before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows: Option<ReplicationStatus>,
    /// Backends, as last looked at before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Backends>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// What was decided, or what happened that decisions follow from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum What {
    /// The daemon started.
    Started {
        /// Its version.
        version: String,
        /// What the journal says last of the daemon before.
        before: Option<Before>,
    },
    /// It was told to stop.
    Stopping {
        /// By what.
        why: String,
    },
    /// State, or reason, changed.
    Transition {
        /// The state left.
        from: State,
        /// The state entered.
        to: State,
        /// Why.
        reason: Reason,
        /// What keeps it from taking part.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<String>,
    },
    /// Another node is heard as Active.
    Follows {
        /// Which.
        peer: String,
    },
    /// Another node advertises while this one is Active and stays it.
    Rival {
        /// Which.
        peer: String,
        /// With this priority.
        priority: u8,
    },
    /// A path works again, or works no more.
    Path {
        /// Its interface, and family where that has two.
        path: String,
        /// Whether it works.
        usable: bool,
        /// Why not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// The peer channel is up.
    ChannelUp {
        /// To whom.
        peer: String,
    },
    /// It is down.
    ChannelDown {
        /// To whom.
        peer: String,
    },
    /// A peer was refused, or refused this node.
    PeerRefused {
        /// Which.
        peer: String,
        /// Why.
        why: String,
    },
    /// The node did not run when it wanted to.
    Slept {
        /// Milliseconds.
        ms: f64,
    },
    /// It could have acted and did not.
    Waits {
        /// Why.
        why: String,
    },
    /// Something was done in the way of a decision.
    Did {
        /// What.
        what: String,
    },
    /// An operator asked for something.
    Asked {
        /// What.
        what: String,
        /// Who.
        by: String,
    },
    /// And was refused.
    Refused {
        /// What was asked for.
        what: String,
        /// Why it was not done.
        why: String,
    },
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// What the journal says last of a daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Before {
    /// When.
    pub wall: String,
    /// Its process id.
    pub pid: u32,
    /// Its state then.
    pub state: Option<State>,
    /// Whether it said that it would stop.
    pub said_so: bool,
    /// Whether the machine has been booted since.
    pub rebooted: bool,
}

/// What the election knew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Its state, after the decision.
    pub state: State,
    /// The highest epoch heard of, or used.
    pub epoch: u64,
    /// What it advertises, or would as Active.
    pub priority: u8,
    /// What its lease has left, in milliseconds.
    pub lease_ms: Option<f64>,
    /// The node last heard as Active.
    pub active: Option<String>,
    /// How long it waits for an advert of that Active, in milliseconds.
    pub active_down_ms: Option<f64>,
    /// Whether each path works.
    pub paths: Vec<PathKnown>,
    /// Each peer.
    pub peers: Vec<PeerKnown>,
    /// The last node heard that is no peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stranger: Option<Stranger>,
}

/// A path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PathKnown {
    /// Its interface, and family where that has two.
    pub path: String,
    /// Whether it works.
    pub usable: bool,
}

/// What was known of a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerKnown {
    /// Its name.
    pub peer: String,
    /// Its last advert on each path where one came.
    pub adverts: Vec<AdvertKnown>,
    /// Its last heartbeat.
    pub heartbeat: Option<HeartbeatKnown>,
    /// The peer channel to it.
    pub channel: ChannelKnown,
}

/// An advert, as it was heard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdvertKnown {
    /// On this path.
    pub path: String,
    /// Milliseconds ago.
    pub ms: f64,
    /// With this priority.
    pub priority: u8,
}

/// A heartbeat, as it was heard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatKnown {
    /// Milliseconds ago.
    pub ms: f64,
    /// With this epoch.
    pub epoch: u64,
    /// What the sender's lease had left then, in milliseconds.
    pub lease_ms: f64,
    /// The sender's priority; `None` where it was not Active.
    pub priority: Option<u8>,
    /// For how many milliseconds the sender had heard nothing of this node.
    #[serde(default)]
    pub silence_ms: f64,
}

/// The peer channel to a peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum ChannelKnown {
    /// There never was a connection.
    Never,
    /// It is up.
    Up {
        /// For so many milliseconds.
        ms: f64,
    },
    /// It is down.
    Down {
        /// For so many milliseconds.
        ms: f64,
        /// Whether the other side closed it: its daemon has ended.
        by_peer: bool,
        /// What the peer's lease had left then, in milliseconds.
        lease_ms: f64,
        /// How it ended.
        why: String,
    },
}

/// A node that is no peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stranger {
    /// Its address.
    pub address: String,
    /// Its last advert, milliseconds ago.
    pub ms: f64,
    /// With this priority.
    pub priority: u8,
}

/// Backends of all services, as checks say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backends {
    /// Those that answer this node.
    pub up: u32,
    /// All of them.
    pub of: u32,
    /// What the other nodes say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<Seen>,
}

/// Backends as another node sees them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its name.
    pub peer: String,
    /// Those that answer it.
    pub up: u32,
    /// All that it knows.
    pub of: u32,
}

impl Seen {
    /// What a peer's checks say.
    pub fn of((peer, sights): (String, BTreeMap<Target, Health>)) -> Self {
        let up = sights.values().filter(|health| **health == Health::Up).count();
        Self { peer, up: up as u32, of: sights.len() as u32 }
    }
}

impl fmt::Display for Backends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} backends up here", self.up, self.of)?;
        for Seen { peer, up, of } in &self.peers {
            write!(f, ", {up} of {of} on {peer}")?;
        }
        Ok(())
    }
}
