//! One backend's check: feeds the machine with time and results, runs the probe it asks for, and
//! tells the members what it says.

use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{info, warn};

use super::Job;
use super::machine::{Input, Machine, Output, ProbeId, Timing};
use super::probe::{self, ProbeError, Progress};
use crate::pool::{Health, Member};

/// A member that a check speaks for.
#[derive(Debug)]
pub(super) struct Subscriber {
    /// Name of the service that it is a backend of.
    pub(super) service: String,
    pub(super) member: Arc<Member>,
}

/// All of them, and what the check says.
#[derive(Debug, Default)]
pub(super) struct Subscribers(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    /// `None` before the first result.
    verdict: Option<(Health, String)>,
    members: Vec<Subscriber>,
}

impl Subscribers {
    /// Speaks for these members from now on, and tells them what is known.
    pub(super) fn replace(&self, members: Vec<Subscriber>) {
        let mut told = self.0.lock().expect("no panic while it is held");
        told.members = members;
        told.tell();
    }

    fn say(&self, health: Health, reason: String) {
        let mut told = self.0.lock().expect("no panic while it is held");
        told.verdict = Some((health, reason));
        told.tell();
    }

    fn note_result(&self) {
        let told = self.0.lock().expect("no panic while it is held");
        told.members.iter().for_each(|subscriber| subscriber.member.note_result());
    }

    fn note_probe(&self, took: Duration) {
        let told = self.0.lock().expect("no panic while it is held");
        told.members.iter().for_each(|subscriber| subscriber.member.note_probe(took));
    }
}

impl Told {
    fn tell(&self) {
        let Some((to, reason)) = &self.verdict else { return };
        for Subscriber { service, member } in &self.members {
            let from = member.set_health(*to, reason);
            if from == *to {
                continue;
            }
            let (backend, address) = (&member.backend.name, member.backend.address);
            match to {
                Health::Down => {
                    warn!(service, backend, %address, %from, %to, reason, "backend is down");
                }
                Health::Up | Health::Unknown => {
                    info!(service, backend, %address, %from, %to, reason, "backend is up");
                }
            }
        }
    }
}

/// A probe on its way, and the place it takes.
struct Flight {
    id: ProbeId,
    started: Instant,
    progress: Arc<Progress>,
    probe: Pin<Box<dyn Future<Output = Result<(), ProbeError>> + Send>>,
    _place: OwnedSemaphorePermit,
}

/// Checks for ever.
pub(super) async fn check(
    job: Job,
    seed: u64,
    subscribers: Arc<Subscribers>,
    places: Arc<Semaphore>,
) {
    let job = Arc::new(job);
    let mut machine = Machine::new(now(), Timing::new(&job.check), seed);
    let mut flight: Option<Flight> = None;
    let mut short = false;
    let mut results = 0;
    loop {
        let mut place = None;
        let due = machine.poll_timeout().expect("a backend is always checked again");
        tokio::select! {
            // The result first: one that is there when the time is up counts.
            biased;
            result = result_of(&mut flight) => {
                if let Some(Flight { id, started, .. }) = flight.take() {
                    subscribers.note_probe(now() - started);
                    machine.handle_input(now(), judged(&job, id, result, &mut short));
                }
            }
            // Unconstrained: a probe that always finds something to read must not keep the time
            // from being up.
            () = tokio::task::unconstrained(tokio::time::sleep_until(due.into())) => {
                match &flight {
                    Some(Flight { id, progress, .. }) => {
                        machine.handle_input(now(), Input::Reached(*id, progress.reached()));
                    }
                    None => place = Some(free_place(&job, &places).await),
                }
                machine.handle_timeout(now());
            }
        }
        while let Some(output) = machine.poll_output() {
            match output {
                Output::StartProbe(id) => {
                    let place = place.take().expect("taken above, where nothing was in flight");
                    flight = Some(take_off(&job, id, place));
                }
                Output::CancelProbe(_) => {
                    // Dropping it ends the probe and gives its place to whoever waits for one.
                    if let Some(cancelled) = flight.take() {
                        subscribers.note_probe(now() - cancelled.started);
                    }
                }
                Output::HealthChanged { from: _, to, reason } => subscribers.say(to, reason),
                Output::ReasonChanged(reason) => subscribers.say(machine.health(), reason),
            }
        }
        // Counted once its word is known.
        if std::mem::replace(&mut results, machine.results()) != results {
            subscribers.note_result();
        }
    }
}

fn take_off(job: &Arc<Job>, id: ProbeId, place: OwnedSemaphorePermit) -> Flight {
    let progress = Arc::new(Progress::default());
    let probe = {
        let (job, progress) = (Arc::clone(job), Arc::clone(&progress));
        async move { probe::run(&job.check.probe, &job.target, &progress).await }
    };
    Flight { id, started: now(), progress, probe: Box::pin(probe), _place: place }
}

/// What a result says of the backend. Where it says nothing, it is logged once while it lasts:
/// `short` remembers.
fn judged(job: &Job, id: ProbeId, result: Result<(), ProbeError>, short: &mut bool) -> Input {
    let Some(error) = result.as_ref().err().filter(|error| error.is_of_this_node()) else {
        *short = false;
        return Input::Finished(id, result.map_err(|error| error.to_string()));
    };
    if !std::mem::replace(short, true) {
        let (check, address) = (&job.check.name, job.target.address);
        warn!(check, %address, %error, "can't probe: this node is short of something; the verdict stands");
    }
    Input::Void(id)
}

/// Never, without a probe.
async fn result_of(flight: &mut Option<Flight>) -> Result<(), ProbeError> {
    match flight {
        Some(flight) => flight.probe.as_mut().await,
        None => pending().await,
    }
}

/// Waits for its turn, before the time of the probe begins to count.
async fn free_place(job: &Job, places: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    let asked = now();
    let place = Arc::clone(places).acquire_owned().await.expect("nobody closes the semaphore");
    let waited = now() - asked;
    if waited > job.check.interval {
        warn!(
            check = job.check.name,
            address = %job.target.address,
            ?waited,
            "a probe started late: too many are in flight; lengthen intervals or shorten timeouts"
        );
    }
    place
}

/// The runtime's clock, which tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::probe::Target;
    use crate::service::{Backend, Check, Probe, ProxyProtocol};
    use std::net::TcpListener;

    /// A probe that waits for its place is late, not failed, even behind one that always runs
    /// out of time.
    #[tokio::test]
    async fn waiting_for_a_place_is_no_failure() {
        let places = Arc::new(Semaphore::new(1));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let start = |probe, name: &str, milliseconds| {
            let interval = Duration::from_millis(milliseconds);
            let address = listener.local_addr().expect("an address");
            let target = Target {
                address,
                proxy_protocol: ProxyProtocol::Off,
                backend: String::new(),
                service: String::new(),
            };
            let name = name.to_owned();
            let check =
                Check { name, probe, interval, timeout: interval, rise: 1, fall: 1, port: None };
            let backend = Backend { name: "b".into(), address, weight: 1, max_connections: 1 };
            let member = Arc::new(Member::new(backend, true));
            let subscribers = Arc::new(Subscribers::default());
            let subscriber = Subscriber { service: "s".into(), member: Arc::clone(&member) };
            subscribers.replace(vec![subscriber]);
            let job = Job { target, check: Arc::new(check) };
            let task = tokio::spawn(super::check(job, 1, subscribers, Arc::clone(&places)));
            (member, task)
        };
        let held = Arc::clone(&places).acquire_owned().await.expect("nobody closes it");
        let hanging = Probe::SendExpect { send: Vec::new(), expect: b"never".to_vec() };
        let (hangs, one) = start(hanging, "hangs", 300);
        let (good, two) = start(Probe::Tcp, "good", 100);
        tokio::time::sleep(Duration::from_millis(700)).await;
        for member in [&hangs, &good] {
            assert!(member.report().checked.is_none(), "probed without a place");
        }
        drop(held);
        let mut verdicts = Vec::new();
        for _ in 0..200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            verdicts.push(good.health());
        }
        assert_eq!(hangs.health(), Health::Down);
        assert_eq!(good.health(), Health::Up, "nobody keeps a place for the next probe");
        assert!(!verdicts.contains(&Health::Down), "{}", good.report().reason);
        one.abort();
        two.abort();
    }
}
