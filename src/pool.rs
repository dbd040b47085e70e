//! The backends of a service as they are now: health, what the operator said, how many
//! connections each has. The proxy asks it for admission and for a backend, health checks and
//! commands write to it, and everyone may wait for what they change ([`Pool::changes`]).
//!
//! It never probes and never connects. The choice among the eligible members is made by
//! [`crate::scheduler`], the limit per source is kept by [`crate::sources`].

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

pub use baton_ha::state::{Admin, Health};

use crate::scheduler::{self, Candidate, Turn};
use crate::service::{Backend, Service};
use crate::sources::Sources;

/// A service and its members.
#[derive(Debug)]
pub struct Pool {
    /// The service.
    pub service: Arc<Service>,
    /// Its backends, in the order of the file.
    pub members: Vec<Arc<Member>>,
    /// Connections (or UDP sessions) of the service now; at most its `max_connections`. One more
    /// is refused: accepted and reset at once (UDP: dropped), and counted.
    pub connections: Arc<AtomicU32>,
    /// What has happened since the start.
    pub counters: Arc<ServiceCounters>,
    sources: Arc<Sources>,
    changes: Arc<watch::Sender<u64>>,
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
    /// Reset because this node stopped being Active, or shut down.
    pub reset_on_yield: AtomicU64,
    /// Reset because their backend was disabled.
    pub reset_on_disable: AtomicU64,
    /// Accepts that failed for want of file descriptors or memory; accepting pauses a moment
    /// after each, and clients wait in the kernel's queue.
    pub accept_failed: AtomicU64,
    /// Datagrams dropped: no place for their session, or a full socket buffer.
    pub datagrams_dropped: AtomicU64,
    /// Bytes from clients to backends.
    pub bytes_in: AtomicU64,
    /// Bytes from backends to clients.
    pub bytes_out: AtomicU64,
}

/// A backend of a service, as it is now. What changes about it is its [`Standing`], to which it
/// dereferences.
#[derive(Debug)]
pub struct Member {
    /// The backend.
    pub backend: Backend,
    key: u64,
    turn: Turn,
    standing: Arc<Standing>,
}

/// What changes about a backend; it outlives a reload of the configuration.
#[derive(Debug)]
pub struct Standing {
    /// What this node's checks say.
    sees: AtomicU8,
    /// What selects instead, [`NOBODY`] if nothing does.
    lead: AtomicU8,
    admin: AtomicU8,
    /// What the operator says, 0 if nothing.
    weight: AtomicU16,
    /// Probes that have ended with a result.
    probes: AtomicU64,
    /// Connections (or UDP sessions) now; never more than the backend's `max_connections`.
    pub connections: AtomicU32,
    /// Connections (or UDP sessions) since the start.
    pub total: AtomicU64,
    /// Connection attempts that failed.
    pub failed: AtomicU64,
    report: Mutex<Report>,
    changes: Arc<watch::Sender<u64>>,
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

impl ServiceCounters {
    /// Every counter by its name, in the order of the fields.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("accepted", &self.accepted),
            ("refused_service_limit", &self.refused_service_limit),
            ("refused_source_limit", &self.refused_source_limit),
            ("refused_no_backend", &self.refused_no_backend),
            ("connect_failed", &self.connect_failed),
            ("connect_retried", &self.connect_retried),
            ("idle_closed", &self.idle_closed),
            ("reset_on_yield", &self.reset_on_yield),
            ("reset_on_disable", &self.reset_on_disable),
            ("accept_failed", &self.accept_failed),
            ("datagrams_dropped", &self.datagrams_dropped),
            ("bytes_in", &self.bytes_in),
            ("bytes_out", &self.bytes_out),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .into_iter()
    }
}

impl Member {
    /// A member not probed yet; without a check it is up from the start.
    pub fn new(backend: Backend, checked: bool) -> Self {
        Self::watched(backend, checked, Arc::default())
    }

    fn watched(backend: Backend, checked: bool, changes: Arc<watch::Sender<u64>>) -> Self {
        let (health, reason) =
            if checked { (Health::Unknown, "not probed yet") } else { (Health::Up, UNCHECKED) };
        let standing = Standing {
            sees: AtomicU8::new(health as u8),
            lead: AtomicU8::new(NOBODY),
            admin: AtomicU8::new(Admin::Enabled as u8),
            weight: AtomicU16::new(0),
            probes: AtomicU64::new(0),
            connections: AtomicU32::new(0),
            total: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            report: Mutex::new(Report {
                reason: reason.into(),
                since: SystemTime::now(),
                checked: None,
                took: None,
            }),
            changes,
        };
        Self::standing(backend, Arc::new(standing))
    }

    fn standing(backend: Backend, standing: Arc<Standing>) -> Self {
        let key = scheduler::backend_key(backend.address);
        Self { backend, key, turn: Turn::default(), standing }
    }

    fn open(&self, tried: &[Arc<Member>]) -> bool {
        self.admin() == Admin::Enabled
            && self.connections.load(Ordering::Relaxed) < self.backend.max_connections
            && !tried.iter().any(|member| member.is(self))
    }

    /// Whether it is the same backend, be it before or after a reload.
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.standing, &other.standing)
    }

    /// Its weight: what the operator says, else the file.
    pub fn weight(&self) -> u16 {
        self.weight_set().unwrap_or(self.backend.weight)
    }

    fn candidate(&self) -> Candidate<'_> {
        Candidate {
            weight: self.weight(),
            connections: self.connections.load(Ordering::Relaxed),
            key: self.key,
            turn: &self.turn,
        }
    }
}

impl Deref for Member {
    type Target = Standing;

    fn deref(&self) -> &Standing {
        &self.standing
    }
}

/// The reason for the health of a backend that nothing checks.
const UNCHECKED: &str = "not checked";

/// [`Standing::lead`] of nobody.
const NOBODY: u8 = u8::MAX;

fn health_of(byte: u8) -> Health {
    match byte {
        0 => Health::Unknown,
        1 => Health::Up,
        _ => Health::Down,
    }
}

impl Standing {
    /// What it is selected by: this node's checks, unless another view leads.
    pub fn health(&self) -> Health {
        self.lead().unwrap_or(self.sees())
    }

    /// What this node's checks say.
    pub fn sees(&self) -> Health {
        health_of(self.sees.load(Ordering::Relaxed))
    }

    /// What selects instead of this node's checks, if anything does.
    pub fn lead(&self) -> Option<Health> {
        let lead = self.lead.load(Ordering::Relaxed);
        (lead != NOBODY).then(|| health_of(lead))
    }

    /// Has another view select ([`baton_ha::state::selection`]), or this node's checks again.
    pub fn follow(&self, lead: Option<Health>) {
        let was = self.health();
        self.lead.store(lead.map_or(NOBODY, |health| health as u8), Ordering::Relaxed);
        if was != self.health() {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Sets what the checks say with its reason; returns what they said before.
    pub fn set_health(&self, health: Health, reason: &str) -> Health {
        let mut report = self.report.lock().expect("no panic while it is held");
        let was = self.sees();
        if was != health {
            report.since = SystemTime::now();
        }
        if report.reason != reason {
            report.reason = reason.to_owned();
        }
        self.sees.store(health as u8, Ordering::Relaxed);
        drop(report);
        if was != health {
            self.changes.send_modify(|count| *count += 1);
        }
        was
    }

    /// Probes that have ended with a result, of whatever checks.
    pub fn probes(&self) -> u64 {
        self.probes.load(Ordering::Relaxed)
    }

    /// Notes that a probe has ended with a result.
    pub fn note_result(&self) {
        self.probes.fetch_add(1, Ordering::Relaxed);
    }

    /// The weight that the operator has set, if any.
    pub fn weight_set(&self) -> Option<u16> {
        Some(self.weight.load(Ordering::Relaxed)).filter(|weight| *weight > 0)
    }

    /// Has the operator's weight count, 1–256, or the file's again.
    pub fn weigh(&self, weight: Option<u16>) {
        if self.weight.swap(weight.unwrap_or(0), Ordering::Relaxed) != weight.unwrap_or(0) {
            self.changes.send_modify(|count| *count += 1);
        }
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
        if was != admin {
            self.changes.send_modify(|count| *count += 1);
        }
        was
    }

    /// Whether a connection may be handed to it now: in use and not known to be down. Asked again
    /// between the choice and the handing over.
    pub fn usable(&self) -> bool {
        self.admin() == Admin::Enabled && self.health() != Health::Down
    }
}

/// One connection's place on a member; gives it back when dropped.
#[derive(Debug)]
pub struct Place {
    /// The member.
    pub member: Arc<Member>,
}

impl Place {
    fn take(member: &Arc<Member>) -> Option<Self> {
        let most = member.backend.max_connections;
        take_one(&member.connections, most).then(|| {
            member.total.fetch_add(1, Ordering::Relaxed);
            Self { member: member.clone() }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.member.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One connection's admission to a service: counted against the limits of the service and of its
/// source until it is dropped.
#[derive(Debug)]
pub struct Admission {
    connections: Arc<AtomicU32>,
    /// `None` where the service has no limit per source that could be reached.
    source: Option<(Arc<Sources>, IpAddr)>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        if let Some((sources, source)) = &self.source {
            sources.leave(*source);
        }
    }
}

/// Why a client is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The service has `max_connections`.
    Service,
    /// Its source has `max_connections_per_source`.
    Source,
}

impl Pool {
    /// A pool of members that are not probed yet.
    pub fn new(service: Arc<Service>) -> Self {
        let changes = Arc::default();
        let member = |backend: &Backend| {
            let changes = Arc::clone(&changes);
            Arc::new(Member::watched(backend.clone(), service.check.is_some(), changes))
        };
        let members = service.backends.iter().map(member).collect();
        let (connections, counters, sources) = Default::default();
        Self { service, members, connections, counters, sources, changes }
    }

    /// The pool of the same service after a reload. Counters and limits go on; members of the
    /// same name and address keep health, what the operator said, and their connections.
    ///
    /// Changes nothing about them, so that the old pool can go on instead;
    /// [`Pool::stand_unchecked`] is for when the new one does.
    pub fn renewed(old: &Self, service: Arc<Service>) -> Self {
        let checked = service.check.is_some();
        let member = |backend: &Backend| {
            let same = |member: &&Arc<Member>| {
                member.backend.name == backend.name && member.backend.address == backend.address
            };
            let Some(kept) = old.members.iter().find(same) else {
                let changes = Arc::clone(&old.changes);
                return Arc::new(Member::watched(backend.clone(), checked, changes));
            };
            Arc::new(Member::standing(backend.clone(), Arc::clone(&kept.standing)))
        };
        let members = service.backends.iter().map(member).collect();
        Self {
            members,
            connections: Arc::clone(&old.connections),
            counters: Arc::clone(&old.counters),
            sources: Arc::clone(&old.sources),
            changes: Arc::clone(&old.changes),
            service,
        }
    }

    /// Of a service without a check every member is up; for when no check speaks for them any
    /// more.
    pub fn stand_unchecked(&self) {
        if self.service.check.is_none() {
            for member in &self.members {
                member.set_health(Health::Up, UNCHECKED);
            }
        }
    }

    /// Whether a member of this pool, or of one that it was renewed from, is a member still.
    pub fn has(&self, member: &Member) -> bool {
        self.members.iter().any(|own| own.is(member))
    }

    /// Changes whenever the health or administrative state of a member does, here and in every
    /// renewed pool.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Admits a client at `source` within the limits of the service and of the source, or says
    /// and counts why not.
    pub fn admit(&self, source: IpAddr) -> Result<Admission, Refusal> {
        let limits = &self.service.limits;
        if !take_one(&self.connections, limits.max_connections) {
            self.counters.refused_service_limit.fetch_add(1, Ordering::Relaxed);
            return Err(Refusal::Service);
        }
        // From here on dropping the admission gives back what was taken.
        let mut admission = Admission { connections: Arc::clone(&self.connections), source: None };
        if limits.max_connections_per_source < limits.max_connections {
            if !self.sources.enter(source, limits.max_connections_per_source) {
                self.counters.refused_source_limit.fetch_add(1, Ordering::Relaxed);
                return Err(Refusal::Source);
            }
            admission.source = Some((Arc::clone(&self.sources), source));
        }
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        Ok(admission)
    }

    /// Chooses a member for a client at `source` and takes a place on it. `tried` are members
    /// that this connection has already tried in vain. `None`: no member is eligible.
    ///
    /// A member that is down, drained, disabled or full is never chosen; one not probed yet only
    /// where none that is up can be.
    pub fn pick(&self, source: IpAddr, tried: &[Arc<Member>]) -> Option<Place> {
        [Health::Up, Health::Unknown]
            .into_iter()
            .find_map(|health| self.pick_among(health, source, tried))
    }

    fn pick_among(&self, health: Health, source: IpAddr, tried: &[Arc<Member>]) -> Option<Place> {
        let scheduler = self.service.scheduler;
        // A member may fill up between choice and taking; each such round leaves one fewer open.
        for _ in 0..=self.members.len() {
            let open = || {
                let fits = |member: &&Arc<Member>| member.health() == health && member.open(tried);
                self.members.iter().filter(fits)
            };
            // What is open may change between the two passes: an index that is gone by then is
            // one more reason to look again.
            let candidates = open().map(|member| member.candidate());
            let index = scheduler::choose(scheduler, source, draw(), candidates)?;
            if let Some(place) = open().nth(index).and_then(Place::take) {
                return Some(place);
            }
        }
        None
    }
}

/// Adds one where that keeps it at or below `most`.
fn take_one(count: &AtomicU32, most: u32) -> bool {
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| (now < most).then(|| now + 1))
        .is_ok()
}

/// A random number from this thread's own generator.
fn draw() -> u64 {
    thread_local! {
        static STATE: Cell<u64> = Cell::new(RandomState::new().hash_one(()));
    }
    STATE.with(|state| {
        let next = state.get().wrapping_add(1);
        state.set(next);
        scheduler::mix(next)
    })
}

#[cfg(test)]
mod tests;
