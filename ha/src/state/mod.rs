//! What all nodes are to know beside the flows: what operators set, and what each node sees.
//!
//! * [`settings`]: what operators set about backends. It belongs to the cluster: each setting has a
//!   version, and wherever two meet, the later one stays.
//! * [`frame`]: what nodes tell each other.
//! * [`shared`]: the exchange of both with the peers.
//! * [`selection`]: which view selects: a node's own, or that of the Active before it.
//! * [`sick`]: when an Active that sees fewer healthy backends than a peer gives way to it.
//!
//! All of it pure. What a backend is, and what becomes of a setting, is the business of the crate
//! that uses this one; here it is an address behind an address.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use wincode::{SchemaRead, SchemaWrite};

pub mod frame;
pub mod selection;
pub mod settings;
pub mod shared;
pub mod sick;

#[cfg(test)]
mod simulation;

pub use frame::Frame;
pub use settings::{Setting, Value};
pub use shared::Shared;

/// A backend of a service, by their addresses: the same on every node, whatever the files call
/// them.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    SchemaRead,
    SchemaWrite,
)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The service's VIP.
    pub vip: IpAddr,
    /// Its port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// The backend's address.
    pub backend: IpAddr,
    /// Its port.
    pub backend_port: u16,
}

/// What checks say of a backend.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    SchemaRead,
    SchemaWrite,
)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Not probed yet.
    Unknown,
    /// Answers.
    Up,
    /// Does not answer.
    Down,
}

/// What the operator says of a backend.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    SchemaRead,
    SchemaWrite,
)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
#[serde(rename_all = "lowercase")]
pub enum Admin {
    /// In use.
    Enabled,
    /// No new connections; those that are there end by themselves.
    Drained,
    /// No new connections; those that are there are reset.
    Disabled,
}

/// A node's word on a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct View {
    /// Which.
    pub target: Target,
    /// What its own checks say.
    pub sees: Health,
    /// What it selects by.
    pub selects: Health,
}

impl Target {
    /// A backend at an address, behind a service's.
    pub fn new(service: SocketAddr, protocol: u8, backend: SocketAddr) -> Self {
        Self {
            vip: service.ip(),
            port: service.port(),
            protocol,
            backend: backend.ip(),
            backend_port: backend.port(),
        }
    }

    /// The backend's address and port.
    pub fn backend(&self) -> SocketAddr {
        SocketAddr::new(self.backend, self.backend_port)
    }

    /// The service's.
    pub fn service(&self) -> SocketAddr {
        SocketAddr::new(self.vip, self.port)
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

impl fmt::Display for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "enabled",
            Self::Drained => "drained",
            Self::Disabled => "disabled",
        })
    }
}
