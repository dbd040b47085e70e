//! Health checks: the sans-IO rise/fall machine ([`machine`]), the probes ([`probe`]), and the
//! tasks that run them (`task`).
//!
//! [`Checks`] knows which backends are to be checked and keeps one task for each; what a task
//! finds goes to [`Standing::set_health`](crate::pool::Standing::set_health), where the proxy's
//! next choice sees it.
//!
//! A backend that several services check in the same way (same address, same check) is probed
//! once for all of them; a script is run per service, as it is told for which it runs.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::pool::{Member, Pool};
use crate::service::{Check, Probe, ProxyProtocol, Service};
use probe::Target;
use task::{Subscriber, Subscribers};

pub mod machine;
pub mod probe;
mod task;

/// Probes in flight at once, over all backends: what they may take of sockets and processes.
/// Where it is full, further probes start later; none is left out.
pub(crate) const PROBES_AT_ONCE: usize = 256;

/// The running checks. Dropping it ends them.
#[derive(Debug)]
pub struct Checks {
    running: Vec<Running>,
    places: Arc<Semaphore>,
    seed: RandomState,
}

#[derive(Debug)]
struct Running {
    job: Job,
    subscribers: Arc<Subscribers>,
    task: JoinHandle<()>,
}

/// What a task does. Two members with equal jobs share one task.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Job {
    target: Target,
    check: Arc<Check>,
}

impl Checks {
    /// Starts the checks of these pools; to be called within a tokio runtime.
    pub fn start(pools: &[Arc<Pool>]) -> Self {
        let mut checks = Self {
            running: Vec::new(),
            places: Arc::new(Semaphore::new(PROBES_AT_ONCE)),
            seed: RandomState::new(),
        };
        checks.apply(pools);
        checks
    }

    /// Changes over to these pools: checks that stay go on undisturbed and tell new members what
    /// they know at once, those of backends that are gone end, new ones start. What nothing
    /// checks any more is up.
    pub fn apply(&mut self, pools: &[Arc<Pool>]) {
        let mut before = std::mem::take(&mut self.running);
        for (job, members) in jobs(pools) {
            let running = match before.iter().position(|running| running.job == job) {
                Some(index) => before.swap_remove(index),
                None => self.spawn(job),
            };
            running.subscribers.replace(members);
            self.running.push(running);
        }
        // What is left is gone from the pools; dropping it ends it, and only then has the check
        // said its last.
        drop(before);
        pools.iter().for_each(|pool| pool.stand_unchecked());
    }

    fn spawn(&self, job: Job) -> Running {
        let subscribers = Arc::new(Subscribers::default());
        let seed = self.seed.hash_one((job.target.address, &job.check.name));
        let task = tokio::spawn(task::check(
            job.clone(),
            seed,
            Arc::clone(&subscribers),
            Arc::clone(&self.places),
        ));
        Running { job, subscribers, task }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The task may be running at this moment: what it says from here on, nobody hears.
        self.subscribers.replace(Vec::new());
        self.task.abort();
    }
}

/// What there is to check, each with the service and member it is for. A service without a
/// check has none.
fn jobs(pools: &[Arc<Pool>]) -> Vec<(Job, Vec<Subscriber>)> {
    let mut jobs: Vec<(Job, Vec<Subscriber>)> = Vec::new();
    for pool in pools {
        let service = &pool.service;
        let Some(check) = &service.check else { continue };
        for member in &pool.members {
            let job = job(check, service, member);
            let subscriber =
                Subscriber { service: service.name.clone(), member: Arc::clone(member) };
            match jobs.iter_mut().find(|(known, _)| *known == job) {
                Some((_, subscribers)) => subscribers.push(subscriber),
                None => jobs.push((job, vec![subscriber])),
            }
        }
    }
    jobs
}

fn job(check: &Arc<Check>, service: &Service, member: &Member) -> Job {
    let mut address = member.backend.address;
    match check.probe {
        Probe::Icmp => address.set_port(0),
        _ => address.set_port(check.port.unwrap_or(address.port())),
    }
    let service_header = service.proxy_protocol;
    // Names are told to scripts only; elsewhere they must not keep two jobs apart.
    let (backend, service) = match check.probe {
        Probe::Script { .. } => (member.backend.name.clone(), service.name.clone()),
        Probe::Tcp
        | Probe::Http { .. }
        | Probe::Socks5 { .. }
        | Probe::SendExpect { .. }
        | Probe::Icmp => (String::new(), String::new()),
    };
    // A port of the check's own is hardly one where clients' headers are expected.
    let proxy_protocol = match check.probe {
        Probe::Icmp | Probe::Script { .. } => ProxyProtocol::Off,
        _ if check.port.is_some() => ProxyProtocol::Off,
        Probe::Tcp | Probe::Http { .. } | Probe::Socks5 { .. } | Probe::SendExpect { .. } => {
            service_header
        }
    };
    Job { target: Target { address, proxy_protocol, backend, service }, check: Arc::clone(check) }
}
