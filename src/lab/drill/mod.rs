//! Drills: a lab of its own, canary traffic, a fault, and a report of what clients saw.
//!
//! One run goes: build the lab → wait until one relay is Active and the service answers → start
//! the canaries → break something ([`fault`]) → watch → make it good again → watch → remove the
//! lab → judge. What is reported is seen from outside: by the client's sockets, on the client's
//! wire, and by the kernels' own word about addresses; the daemons are not asked. Only the time
//! at which a failure was detected is taken from the new Active's log.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod addresses;
mod canary;
pub mod fault;
pub mod figures;
mod interrupt;
mod logs;
mod outage;
mod peers;
mod render;
pub mod report;
mod steps;
mod wire;

use canary::churn::{Churn, Held};
use canary::{Ledger, Worker, fresh, read, steady, udp};
use fault::{Cast, Deed, Fault, Hand, Holder};
use outage::Attempt;
pub use render::render;
use report::{Churned, Connections, OutageMs, Report, Run, Takeovers, ms};

use super::process::Lifetime;
use super::topology::{ECHO_PORT, Links, Role, VIP_FRONT, VIP_FRONT6};
use super::{Doing, Lab, LabError, LabOptions, Mode, Servers, Software};

/// How long a service may take to answer for the first time.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to come back after the fault, beyond the usual observation.
const RETURN_PATIENCE: Duration = Duration::from_secs(20);
/// How long every attempt must have been answered for the service to count as steady.
const STEADY: Duration = Duration::from_millis(600);
/// Attempts younger than this may still be under way.
const UNDER_WAY: Duration = Duration::from_millis(150);
/// Everything runs for this long before the fault.
const CALM: Duration = Duration::from_millis(500);
/// For how long connections that are held are opened before the fault.
const RAMP: Duration = Duration::from_secs(5);
/// And after it.
const RAMP_ON: Duration = Duration::from_secs(1);
/// After a fault that leaves the VIP where it is, the kernel has removed it by then.
const VIP_EXPIRY: Duration = Duration::from_millis(3500);

/// What a drill is to do.
#[derive(Debug, Clone)]
pub struct DrillOptions {
    /// What is broken.
    pub fault: Fault,
    /// What runs on the relays.
    pub software: Software,
    /// How they forward, if that is Baton.
    pub mode: Mode,
    /// Advertisement interval of the relays.
    pub advert_interval: Duration,
    /// Between two heartbeats on the peer channel.
    pub heartbeat: Duration,
    /// New TCP connections a second, at least 1.
    pub rate: u32,
    /// Long-lived TCP connections.
    pub connections: usize,
    /// New TCP connections a second that are held, besides.
    pub churn: Option<u32>,
    /// How often the VIPs go back and forth, where the fault is a takeover.
    pub times: usize,
    /// How many runs, each in a lab of its own.
    pub runs: usize,
    /// The `baton` program.
    pub binary: PathBuf,
}

impl DrillOptions {
    /// Whether the VIPs go away and come back, so that they end where they were.
    fn is_there_and_back(&self) -> bool {
        self.fault == Fault::Takeover && self.times.is_multiple_of(2)
    }
}

/// What a drill came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was measured.
    pub report: Report,
    /// What was expected and did not happen; empty if all is well.
    pub failures: Vec<String>,
}

/// Runs a drill. `say` is told of every step; signals end it in order once
/// [`catch_signals`] was called.
///
/// # Errors
/// The lab could not be made, the service never answered, or a signal came. The lab is gone in
/// any case.
pub fn run(options: &DrillOptions, say: &mut dyn FnMut(&str)) -> Result<Outcome, LabError> {
    let mut runs = Vec::new();
    let mut failures = Vec::new();
    for number in 1..=options.runs.max(1) {
        if options.runs > 1 {
            say(&format!("run {number} of {}", options.runs));
        }
        let (run, failed) = run_once(options, say)?;
        failures.extend(failed.into_iter().map(|what| match options.runs {
            0 | 1 => what,
            _ => format!("run {number}: {what}"),
        }));
        runs.push(run);
    }
    Ok(Outcome { report: Report::new(options, runs), failures })
}

/// From now on SIGINT, SIGTERM and SIGHUP end a drill in order instead of the process.
///
/// # Errors
/// None that this program can cause.
pub fn catch_signals() -> Result<(), LabError> {
    interrupt::install()
}

/// [`LabError::Interrupted`] once a signal came; see [`catch_signals`].
pub(super) fn check_signals() -> Result<(), LabError> {
    interrupt::check()
}

fn run_once(
    options: &DrillOptions,
    say: &mut dyn FnMut(&str),
) -> Result<(Run, Vec<String>), LabError> {
    let mut lab = Lab::build(lab_options(options), say)?;
    say("starting the relays");
    let active = lab.start_relays()?;
    let cast = cast(&lab, active);
    say(&format!("{} is Active; starting canary traffic", cast.active));
    let hand = Hand::new(&lab, cast)?;
    let watch = Watch::start(&lab, options)?;
    let churn = options.churn.map(|rate| start_churn(&lab, rate)).transpose()?;
    interrupt::sleep(if churn.is_some() { RAMP } else { CALM })?;

    say(&format!("fault: {} on {}", options.fault.name(), hand.cast().active));
    let deed = hand.inject(&mut lab, options.fault, options.times)?;
    let (hold, after) = observation(options);
    if let Some(churn) = &churn {
        interrupt::sleep((deed.at + RAMP_ON).saturating_duration_since(Instant::now()))?;
        churn.hold();
    }
    let last = deed.takeovers.last().map_or(deed.at, |(at, _)| *at);
    interrupt::sleep((last + hold).saturating_duration_since(Instant::now()))?;
    let returned = watch.await_steady(RETURN_PATIENCE)?;
    let mut failures = judge_fault(&lab, options, hand.cast(), returned)?;
    let held = churn.map(Churn::ask).transpose().doing("holding connections")?;

    failures.extend(peers::judge_meanwhile(&lab, hand.cast(), options.fault));

    let healed = hand.heal(&mut lab, options.fault)?;
    if let Some(healed) = &healed {
        say(&format!("{}: {}", healed.node, healed.what));
    }
    let proof = if options.fault.is_of_replication() {
        failures.extend(peers::judge_healed(&mut lab, hand.cast(), options.fault)?);
        Some(hand.prove(&lab)?)
    } else {
        None
    };
    interrupt::sleep(after)?;
    failures.extend(judge_end(&lab, watch.await_steady(RETURN_PATIENCE)?)?);
    say("collecting what was seen");
    let seen = watch.finish();
    let logs = logs::read(&lab);
    drop(lab);
    let done = deed.done;
    let mut run = seen.run(&hand, deed, healed.into_iter().chain(proof).collect(), &logs);
    if let Some((rate, held)) = options.churn.zip(held) {
        run.wrong_bytes += held.iter().map(|held| held.wrong).sum::<u64>();
        run.churn = Some(churned(rate, &held, done));
    }
    failures.extend(judge_run(&run));
    Ok((run, failures))
}

fn start_churn(lab: &Lab, rate: u32) -> Result<Churn, LabError> {
    let target = SocketAddr::from((VIP_FRONT, ECHO_PORT));
    Churn::start(&lab.netns("client"), target, rate).doing("starting a thread")
}

/// Of those that were established when the fault was done: what came later is no survivor of it.
fn churned(rate: u32, held: &[Held], done: Instant) -> Churned {
    let before = || held.iter().filter(|held| held.established <= done);
    let lost = before().filter(|held| !held.survived);
    let oldest = lost.clone().map(|held| done - held.established).max();
    Churned {
        rate,
        established: before().count() as u64,
        survived: before().filter(|held| held.survived).count() as u64,
        lost: lost.count() as u64,
        oldest_lost_ms: oldest.map(ms),
    }
}

fn lab_options(options: &DrillOptions) -> LabOptions {
    LabOptions {
        name: format!("drill-{}", std::process::id()),
        relays: 2,
        links: Links::Two,
        binary: options.binary.clone(),
        software: options.software,
        mode: options.mode,
        servers: Servers::Echo,
        advert_interval: options.advert_interval,
        heartbeat: options.heartbeat,
        many: options.fault.needs_many().then_some(peers::ROOM),
        lifetime: Lifetime::WithParent,
    }
}

fn cast(lab: &Lab, active: String) -> Cast {
    let others = lab.topology.role(Role::Relay).map(|node| &node.name);
    let backup = others.into_iter().find(|name| **name != active);
    let backend = lab.topology.role(Role::Backend).next();
    Cast {
        backup: backup.expect("a drill's lab has two relays").clone(),
        backend: backend.expect("a lab has backends").name.clone(),
        active,
    }
}

/// How long is watched between fault and healing, and after healing: time for a takeover (less
/// than four intervals), for the kernel to remove a VIP that was left, and for a node to return.
fn observation(options: &DrillOptions) -> (Duration, Duration) {
    let takeover = options.advert_interval * 4;
    let hold = takeover + Duration::from_secs(1);
    let hold = if options.fault.leaves_vip() { hold.max(VIP_EXPIRY) } else { hold };
    (hold, takeover + Duration::from_millis(1500))
}

fn judge_fault(
    lab: &Lab,
    options: &DrillOptions,
    cast: &Cast,
    returned: bool,
) -> Result<Vec<String>, LabError> {
    let mut failures = Vec::new();
    if !returned {
        failures.push(format!("the service did not come back within {RETURN_PATIENCE:?}"));
    }
    let holders = lab.holders()?;
    let expected = match options.fault.holder() {
        Holder::Backup if options.is_there_and_back() => &cast.active,
        Holder::Active => &cast.active,
        Holder::Backup => &cast.backup,
        Holder::Both if holders.len() == 2 => return Ok(failures),
        Holder::Both | Holder::One => holders.first().unwrap_or(&cast.active),
    };
    let [holder] = &holders[..] else {
        failures.push(format!(
            "after the fault {} hold the VIP: {}",
            holders.len(),
            holders.join(", ")
        ));
        return Ok(failures);
    };
    if holder != expected {
        failures.push(format!("after the fault {holder} holds the VIP, not {expected}"));
    }
    Ok(failures)
}

fn judge_end(lab: &Lab, returned: bool) -> Result<Vec<String>, LabError> {
    let mut failures = Vec::new();
    if !returned {
        failures.push("the service was not steady after all was made good".to_owned());
    }
    let holders = lab.holders()?;
    if holders.len() != 1 {
        failures.push(format!(
            "at the end {} relays hold the VIP: {}",
            holders.len(),
            holders.join(", ")
        ));
    }
    Ok(failures)
}

fn judge_run(run: &Run) -> Vec<String> {
    if run.wrong_bytes > 0 {
        return vec![format!("{} bytes came back wrong", run.wrong_bytes)];
    }
    Vec::new()
}

/// Everything that watches during a run.
struct Watch {
    udp: (Ledger, Worker<u64>),
    fresh: (Ledger, Worker<Result<u64, LabError>>),
    steady: Worker<Vec<steady::Fate>>,
    /// Of the IPv4 VIP, then of the IPv6 VIP.
    wire: Vec<Worker<wire::Sightings>>,
    addresses: Worker<Vec<addresses::Change>>,
}

/// Everything that was seen during a run.
struct Seen {
    udp: Vec<Attempt>,
    fresh: Vec<Attempt>,
    steady: Vec<steady::Fate>,
    /// Of the IPv4 VIP, then of the IPv6 VIP.
    wire: Vec<wire::Sightings>,
    addresses: Vec<addresses::Change>,
    wrong: u64,
}

impl Watch {
    /// Starts every canary; returns once the service has been steady for a while.
    fn start(lab: &Lab, options: &DrillOptions) -> Result<Self, LabError> {
        let client = lab.netns("client");
        let target = SocketAddr::from((VIP_FRONT, ECHO_PORT));
        let inside = "making a socket in the client's namespace";

        let mut sources = Vec::new();
        for relay in lab.topology.role(Role::Relay) {
            let source = addresses::Source::open(&relay.name, &lab.netns(&relay.name));
            sources.push(source.doing("listening to a relay's addresses")?);
        }
        let holders = lab.holders()?;
        let addresses = Worker::spawn("addresses", move |stop| {
            addresses::run(&sources, VIP_FRONT.into(), holders, &stop)
        });
        let mut wire = Vec::new();
        for vip in [VIP_FRONT.into(), VIP_FRONT6.into()] {
            let socket = client.enter(|| wire::socket("front", vip));
            let socket = socket.and_then(|made| made).doing(inside)?;
            let worker = Worker::spawn("wire", move |stop| wire::run(&socket, vip, &stop));
            wire.push(worker.doing("starting a thread")?);
        }

        let ledger = Ledger::default();
        let socket = client.enter(|| udp::socket(target)).and_then(|made| made).doing(inside)?;
        let mine = Arc::clone(&ledger);
        let worker = Worker::spawn("udp", move |stop| udp::run(&socket, &mine, &stop));
        let udp = (ledger, worker.doing("starting a thread")?);

        let ledger = Ledger::default();
        let interval = Duration::from_secs(1) / options.rate.max(1);
        let canary = fresh::Fresh { target, interval, ledger: Arc::clone(&ledger) };
        let netns = client.clone();
        let worker = Worker::spawn("fresh", move |stop| canary.run(&netns, &stop));
        let fresh = (ledger, worker.doing("starting a thread")?);

        if !await_steady(&[&udp.0, &fresh.0], options.rate, START_PATIENCE)? {
            return Err(LabError::Silent(START_PATIENCE, lab.dir.display().to_string()));
        }
        let streams = client.enter(|| steady::connect(target, options.connections));
        let streams = streams.and_then(|made| made).doing("opening the long-lived connections")?;
        let steady = Worker::spawn("steady", move |stop| steady::run(streams, &stop));
        Ok(Self {
            udp,
            fresh,
            steady: steady.doing("starting a thread")?,
            wire,
            addresses: addresses.doing("starting a thread")?,
        })
    }

    fn await_steady(&self, patience: Duration) -> Result<bool, LabError> {
        await_steady(&[&self.udp.0, &self.fresh.0], 1, patience)
    }

    fn finish(self) -> Seen {
        self.udp.1.stop();
        self.fresh.1.stop();
        self.steady.stop();
        let mut wrong = self.udp.1.finish();
        // The namespace was there when it started, and is there until the canaries have ended.
        wrong += self.fresh.1.finish().unwrap_or_default();
        Seen {
            steady: self.steady.finish(),
            udp: std::mem::take(&mut read(&self.udp.0)),
            fresh: std::mem::take(&mut read(&self.fresh.0)),
            wire: self.wire.into_iter().map(Worker::finish).collect(),
            addresses: self.addresses.finish(),
            wrong,
        }
    }
}

/// Waits until every attempt of all ledgers was answered for a while; a while holds at least two
/// attempts at this rate. `false`: they were not, by then.
fn await_steady(ledgers: &[&Ledger], rate: u32, patience: Duration) -> Result<bool, LabError> {
    let stretch = STEADY.max(Duration::from_secs(2) / rate.max(1));
    interrupt::wait_until(patience + stretch, || {
        let to = Instant::now().checked_sub(UNDER_WAY).unwrap_or_else(Instant::now);
        let from = to.checked_sub(stretch).unwrap_or(to);
        Ok(ledgers.iter().all(|ledger| {
            let attempts = read(ledger);
            attempts.first().is_some_and(|first| first.started <= from)
                && outage::all_answered(&attempts, from, to)
        }))
    })
}

impl Seen {
    fn run(self, hand: &Hand, deed: Deed, later: Vec<Deed>, logs: &[logs::LogLine]) -> Run {
        let since = deed.at;
        let length = |attempts: &[Attempt]| {
            attempts.last()?;
            Some(ms(outage::longest(attempts, since).map_or(Duration::ZERO, |o| o.length())))
        };
        let kept = self.steady.iter().filter(|fate| fate.lost.is_none());
        let waits = kept.clone().flat_map(|fate| &fate.waits);
        let worst_wait = waits.filter(|(at, _)| *at >= since).map(|(_, wait)| *wait).max();
        let new = self.fresh.iter().filter(|attempt| attempt.started >= since);
        let new_ok = new.clone().filter(|attempt| attempt.answered.is_some()).count() as u64;
        let two_answering = self.wire.iter().map(|seen| seen.two_answering(since));
        Run {
            outage_ms: OutageMs {
                udp: length(&self.udp),
                tcp_new: length(&self.fresh),
                tcp_established: worst_wait.map(ms),
            },
            connections: Connections {
                established: self.steady.len() as u64,
                kept: kept.count() as u64,
                lost: self.steady.iter().filter(|fate| fate.lost.is_some()).count() as u64,
                new_ok,
                new_failed: new.count() as u64 - new_ok,
            },
            churn: None,
            wrong_bytes: self.wrong + self.steady.iter().map(|fate| fate.wrong).sum::<u64>(),
            two_answering_ms: two_answering.max().map(ms),
            takeovers: Takeovers::of(&deed.takeovers, &self.udp),
            steps: steps::steps(&self, hand, &deed, &later, logs),
        }
    }
}
