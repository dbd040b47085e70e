//! What goes into a virtual router and what comes out: the words that the machine shares with the
//! node, the driver and whoever shows its state.

use std::net::IpAddr;
use std::time::Duration;

use crate::config::Family;
use crate::vrrp::{AdverInterval, Preempt, Priority};

/// What a virtual router must know; correct by construction.
#[derive(Debug, Clone)]
pub struct RouterConfig {
    /// Configured priority, 1–255.
    pub priority: Priority,
    /// Advertisement_Interval of this node.
    pub advert_interval: AdverInterval,
    /// Preempt_Mode.
    pub preempt: Preempt,
    /// The family whose adverts decide ties at once; those of the other do after an interval.
    /// Addresses may have one order on an IPv4 path and another on an IPv6 path, and then two
    /// nodes of the same priority would both give way. IPv4 wherever a path of it exists.
    pub decides_ties: Family,
    /// How long after it begins to listen this node claims at the earliest, unless it hears that
    /// the Active has gone: who has just plugged itself in may not hear yet.
    pub startup_hold: Duration,
}

/// What happens to a virtual router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The daemon is up and every path is open.
    Startup,
    /// The daemon stops (SIGTERM).
    Shutdown,
    /// A valid advert of another node for this VRID.
    Advert(Advert),
    /// The operator wants this node Active now. Nothing happens in Initialize.
    Takeover,
    /// The operator wants this node not to be Active. Nothing happens unless it is.
    Yield,
    /// This node can't carry its VIPs: an interface of theirs is down.
    Fault,
    /// The fault is over.
    Recovered,
    /// The Active's daemon has ended, by the word of its kernel: the peer channel was closed. It may
    /// answer for the VIPs until its lease has ended, which is at most so long from now; then this
    /// node may claim them.
    ActiveGone(Duration),
    /// Another node has become Active since this one did ([`crate::fence`]), with that interval.
    /// Nothing happens unless this one is Active.
    Deposed(AdverInterval),
    /// A Backup has said that it hears nothing of this node, and so is about to claim: only this
    /// node can give way. Nothing happens unless it is Active.
    Unheard,
    /// The Active has told of its lease, which it renews with every one of its quick heartbeats: so
    /// long from now at most it answers for the VIPs, unless something else of it is heard. `None`:
    /// from now on there are no quick heartbeats.
    ActiveLease(Option<Duration>),
    /// A Backup that relies on quick heartbeats may not hear them: advertise now.
    Repeat,
    /// This node's lease has ended before it could renew it. Nothing happens unless it is Active.
    LeaseOver,
    /// This node gives the VIPs to another one, which has agreed to take them and is told when they
    /// are free. Nothing happens unless it is Active.
    Give(Wish),
    /// The node that was Active has given the VIPs to this one, and no longer has them.
    Take(Wish),
    /// From now on, how this node preempts.
    PreemptBy(PreemptBy),
}

/// On whose wish the VIPs go from one node to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, wincode::SchemaRead, wincode::SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Wish {
    /// The operator wants the one that takes: it holds them, whatever the priorities.
    Takeover,
    /// The operator wants the one that gives to be rid of them.
    Yield,
    /// The one that takes has the higher priority.
    Preempt,
}

/// How a node of higher priority becomes Active while another one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreemptBy {
    /// As RFC 9568 has it: it claims.
    #[default]
    Claiming,
    /// It asks the Active for the VIPs ([`crate::handover`]), and stays Backup until it gets them.
    Asking,
}

/// What matters of a received advert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advert {
    /// Source address of the packet.
    pub source: IpAddr,
    /// This node's primary address on the path on which it came; ties are broken by it.
    pub local: IpAddr,
    /// The priority it carries.
    pub priority: Priority,
    /// The Max Advertise Interval it carries.
    pub interval: AdverInterval,
}

/// What the machine wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send an advert with this priority on every path.
    SendAdvert(Priority),
    /// Configure every VIP, then announce it.
    Claim,
    /// Remove every VIP. Comes before anything else is sent.
    Release,
    /// Announce again: a rival was heard.
    Announce,
    /// The state or its reason changed; to be logged and shown.
    Transition(Transition),
}

/// State of RFC 9568 §6.3, without its timers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Not taking part: starting, stopping, or unable to carry the VIPs.
    Initialize,
    /// Watching the Active.
    Backup,
    /// Owning the VIPs.
    Active,
}

/// A change of state, or of the reason for it: then `from` and `to` are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// The state left.
    pub from: State,
    /// The state entered.
    pub to: State,
    /// Why.
    pub reason: Reason,
}

/// Why a state was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The daemon started.
    Startup,
    /// The daemon starts as the address owner (priority 255).
    AddressOwner,
    /// No advert within Active_Down_Interval.
    ActiveDown,
    /// The Active's daemon has ended, and its lease as well.
    ActiveGone,
    /// The Active's lease has ended, by its last heartbeat, and nothing of it was heard since.
    ActiveSilent,
    /// The Active yielded (priority 0).
    ActiveYielded,
    /// The Active had a lower priority and Preempt_Mode is on.
    Preempted,
    /// Another node advertises a higher priority, or the same and a greater address.
    Outranked,
    /// Another node claims, or is about to, and does not hear this one.
    Unheard,
    /// The operator said `takeover` here.
    Takeover,
    /// The operator said `yield` here.
    Yield,
    /// An interface that carries a VIP is down.
    Fault,
    /// The fault is over.
    Recovered,
    /// The node gave the VIPs to another that was to have them.
    HandedOver,
    /// This node slept for longer than its Backups wait: somebody else may own the VIPs.
    Stalled,
    /// The daemon stops.
    Shutdown,
    /// Another node has become Active since this one did.
    Deposed,
}
