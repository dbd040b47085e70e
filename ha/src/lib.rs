//! Who is Active: the election, the claim of the shared addresses, and their announcement.
//!
//! The event's way, and the modules in reading order:
//!
//! socket or timer → [`driver`] → [`node`] → [`vrrp`] → [`node::Output`] → [`driver`] → [`io`]:
//! address, announcement, advert.
//!
//! * [`vrrp`]: RFC 9568 on the wire (`packet`) and as a state machine (`router`). Pure.
//! * [`announce`]: the bytes of gratuitous ARP and unsolicited Neighbor Advertisements. Pure.
//! * [`node`]: the virtual router of this node together with its announcement and refresh
//!   schedules. Pure: it never reads the clock, touches a socket or logs.
//! * [`heart`]: what nodes tell each other in heartbeats besides adverts, and what follows. Pure.
//! * [`gateway`]: whether this node reaches its gateway. Pure.
//! * [`driver`]: the one loop on a real-time thread: sockets and clock ⇄ [`node::Node`]; it
//!   logs and counts.
//! * [`handover`]: the VIPs go from one node to another as a transaction. Pure.
//! * [`channel`]: the authenticated, encrypted connection to each other node. Pure but for the
//!   key's file.
//! * [`sync`]: flows, and [`state`]: what operators set and nodes see, on all nodes. Pure.
//! * [`lease`]: a guard process that removes the VIPs of a daemon that is dead or frozen.
//! * [`record`]: what was decided, and what was known then, for a journal.
//! * [`io`]: raw sockets, AF_PACKET, netlink. Thin; decides nothing.
//!
//! This crate does not know what is behind the addresses: services, backends and traffic are the
//! business of the crate that uses it.

pub mod announce;
pub mod channel;
pub mod config;
pub mod driver;
pub mod fence;
pub mod gateway;
pub mod handover;
pub mod heart;
pub mod io;
pub mod lease;
pub mod node;
pub mod record;
pub mod state;
pub mod sync;
pub mod vrrp;
