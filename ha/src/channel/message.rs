//! What travels on an established session: heartbeats, replication, state, handovers, one message
//! each.

use std::net::IpAddr;

use wincode::{SchemaRead, SchemaWrite};

use crate::handover::Handover;
use crate::heart::Word;
use crate::{state, sync};

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Message {
    /// The sender is alive.
    Heartbeat(Heartbeat),
    /// Replication of flows.
    Sync(sync::Frame),
    /// What operators set, and what nodes see.
    State(state::Frame),
    /// The VIPs are to move.
    Handover(Handover),
}

impl From<sync::Frame> for Message {
    fn from(frame: sync::Frame) -> Self {
        Self::Sync(frame)
    }
}

impl From<state::Frame> for Message {
    fn from(frame: state::Frame) -> Self {
        Self::State(frame)
    }
}

/// The second path of the election: what an advert says, and what it has no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Heartbeat {
    /// Which time of being Active this is, over all nodes; grows with each.
    pub epoch: u64,
    /// What the sender's lease has left, in microseconds: when it has ended, the sender answers
    /// for no VIP any more, whatever has become of it.
    pub lease_us: u32,
    /// How the sender stands, and what it hears.
    pub word: Word,
    /// What its adverts say; `None` where it is not Active and has not just stopped being so.
    pub advert: Option<HeartbeatAdvert>,
}

/// An advert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct HeartbeatAdvert {
    /// The sender's primary address, which decides ties.
    pub source: IpAddr,
    /// Its priority; 0: it yields.
    pub priority: u8,
    /// Its interval, in hundredths of a second.
    pub interval_cs: u16,
}
