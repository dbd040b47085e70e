//! The backends of a service as they are now: health, what the operator said, how many
//! connections each has. The proxy asks it for a backend, health checks and commands write to it.
//!
//! It never probes and never connects. The choice among the eligible members is made by
//! [`crate::scheduler`].

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::service::{Backend, Service};

/// A service and its members.
#[derive(Debug)]
pub struct Pool {
    /// The service.
    pub service: Arc<Service>,
    /// Its backends, in the order of the file.
    pub members: Vec<Arc<Member>>,
    /// Connections (or UDP sessions) of the service now.
    pub connections: AtomicU32,
    /// What has happened since the start.
    pub counters: ServiceCounters,
}

/// What has happened to a service's clients since the start.
#[derive(Debug, Default)]
pub struct ServiceCounters {
    /// Connections or UDP sessions accepted.
    pub accepted: AtomicU64,
    /// Refused: the service's `max_connections`.
    pub refused_service_limit: AtomicU64,
    /// Refused: `max_connections_per_source`.
    pub refused_source_limit: AtomicU64,
    /// Refused: no backend is eligible (all down, disabled, drained or full).
    pub refused_no_backend: AtomicU64,
    /// Ended: no backend accepted within the retries.
    pub connect_failed: AtomicU64,
    /// Attempts that failed and were tried on another backend.
    pub connect_retried: AtomicU64,
    /// Ended by the idle or half-close timeout.
    pub idle_closed: AtomicU64,
    /// Reset because this node stopped being Active.
    pub reset_on_yield: AtomicU64,
    /// Bytes from clients to backends.
    pub bytes_in: AtomicU64,
    /// Bytes from backends to clients.
    pub bytes_out: AtomicU64,
}

/// A backend of a service, as it is now.
#[derive(Debug)]
pub struct Member {
    /// The backend.
    pub backend: Backend,
    health: AtomicU8,
    admin: AtomicU8,
    /// Connections (or UDP sessions) now.
    pub connections: AtomicU32,
    /// Connections (or UDP sessions) since the start.
    pub total: AtomicU64,
    /// Connection attempts that failed.
    pub failed: AtomicU64,
    report: Mutex<Report>,
}

/// What is known of a backend's health, for people.
#[derive(Debug, Clone)]
pub struct Report {
    /// Why: what the last deciding probe said.
    pub reason: String,
    /// Since when the health is what it is.
    pub since: SystemTime,
    /// When the last probe ended.
    pub checked: Option<SystemTime>,
    /// How long the last probe took.
    pub took: Option<Duration>,
}

/// What the checks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Not probed yet.
    Unknown,
    /// Answers.
    Up,
    /// Does not answer.
    Down,
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

/// What the operator says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Admin {
    /// In use.
    Enabled,
    /// No new connections; those that are there end by themselves.
    Drained,
    /// No new connections; those that are there are reset.
    Disabled,
}

impl Member {
    /// A member not probed yet; without a check it is up from the start.
    pub fn new(backend: Backend, checked: bool) -> Self {
        let (health, reason) =
            if checked { (Health::Unknown, "not probed yet") } else { (Health::Up, "not checked") };
        Self {
            backend,
            health: AtomicU8::new(health as u8),
            admin: AtomicU8::new(Admin::Enabled as u8),
            connections: AtomicU32::new(0),
            total: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            report: Mutex::new(Report {
                reason: reason.into(),
                since: SystemTime::now(),
                checked: None,
                took: None,
            }),
        }
    }

    /// What the checks say.
    pub fn health(&self) -> Health {
        match self.health.load(Ordering::Relaxed) {
            0 => Health::Unknown,
            1 => Health::Up,
            _ => Health::Down,
        }
    }

    /// Sets the health with its reason; returns what it was.
    pub fn set_health(&self, health: Health, reason: &str) -> Health {
        let mut report = self.report.lock().expect("no panic while it is held");
        let was = self.health();
        if was != health {
            report.since = SystemTime::now();
        }
        if report.reason != reason {
            report.reason = reason.to_owned();
        }
        self.health.store(health as u8, Ordering::Relaxed);
        was
    }

    /// Notes that a probe ended now and how long it took, whatever it said.
    pub fn note_probe(&self, took: Duration) {
        let mut report = self.report.lock().expect("no panic while it is held");
        report.checked = Some(SystemTime::now());
        report.took = Some(took);
    }

    /// What is known of its health, for people.
    pub fn report(&self) -> Report {
        self.report.lock().expect("no panic while it is held").clone()
    }

    /// What the operator says.
    pub fn admin(&self) -> Admin {
        match self.admin.load(Ordering::Relaxed) {
            0 => Admin::Enabled,
            1 => Admin::Drained,
            _ => Admin::Disabled,
        }
    }

    /// Sets what the operator says; returns what it was.
    pub fn set_admin(&self, admin: Admin) -> Admin {
        let was = self.admin();
        self.admin.store(admin as u8, Ordering::Relaxed);
        was
    }
}

/// One connection's place on a member; gives it back when dropped.
#[derive(Debug)]
pub struct Place {
    /// The member.
    pub member: Arc<Member>,
}

impl Pool {
    /// Chooses a member for a client at `source` and takes a place on it. `tried` are members
    /// that this connection has already tried in vain. `None`: no member is eligible.
    ///
    /// A member that is down, drained, disabled or full is never chosen; one not probed yet only
    /// where none is up.
    pub fn pick(&self, source: IpAddr, tried: &[Arc<Member>]) -> Option<Place> {
        let _ = (source, tried);
        todo!("the proxy helper writes this")
    }
}
