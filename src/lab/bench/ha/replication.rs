//! Replication between two daemons: how many new flows a second, how late they are on the other
//! side, how long a joiner takes for a full table, and what all that costs.
//!
//! Flows come about in the Active's kernel, by handshakes through its own program
//! ([`crate::lab::many`]), so all of the way is measured: ring buffer, journal, channel, the peer's table.
//! How late they are is not asked of the daemons: a thread establishes a flow now and then and looks
//! for it in the peer's table until it is there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::HaOptions;
use crate::lab::bench::{other, percentile, race};
use crate::lab::drill::check_signals;
use crate::lab::many::{BATCH, Copies, Source, Step};
use crate::lab::process::{Lifetime, socket};
use crate::lab::topology::Links;
use crate::lab::{
    Doing as _, HEARTBEAT, Lab, LabError, LabOptions, Mode, Servers, Software, state,
};
use crate::status::FromActive;

const ACTIVE: &str = "relay1";
const PEER: &str = "relay2";
/// Flows that are looked for have numbers from here on.
const SAMPLED: u64 = 1 << 24;
/// A flow that is not on the other side by then has not come.
const PATIENCE: Duration = Duration::from_secs(3);
/// How late the last one may be where a rate is said to be sustained.
const CAUGHT_UP: Duration = Duration::from_millis(100);
/// How long a joiner may take.
const JOIN_PATIENCE: Duration = Duration::from_secs(60);

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Replication {
    /// At rising rates.
    pub rates: Vec<Rate>,
    /// A joiner and a full table.
    pub join: Join,
}

/// New flows at a steady rate.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Rate {
    /// New flows a second that were asked for.
    pub wanted: u32,
    /// Those that were made.
    pub made: f64,
    /// From a flow's establishment here until it is in the peer's table, in milliseconds.
    pub lag_p50_ms: f64,
    /// The same; one in a hundred took longer.
    pub lag_p99_ms: f64,
    /// The longest.
    pub lag_worst_ms: f64,
    /// Flows that were looked for.
    pub samples: usize,
    /// Of these, those that did not come within three seconds.
    pub missed: usize,
    /// The lag that the Active's status told of meanwhile, median, in milliseconds.
    pub gauge_p50_ms: f64,
    /// The greatest.
    pub gauge_worst_ms: f64,
    /// When the last flow was in the peer's table, after it was made, in milliseconds; `None`: not
    /// within three seconds.
    pub behind_ms: Option<f64>,
    /// Snapshots that the peer needed because it could not follow.
    pub snapshots: u64,
    /// Flows that the peer lacked at the end.
    pub lacking: i64,
    /// Bytes on the wire for each, both ways, with all headers.
    pub wire_bytes: f64,
    /// Processor time of the Active's daemon for each, in microseconds.
    pub active_us: f64,
    /// The same of the peer's.
    pub peer_us: f64,
}

/// A joiner and a table that is full of flows.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Join {
    /// Flows.
    pub flows: u64,
    /// From the first flow in the joiner's table until it says that it is in sync, in seconds.
    pub snapshot_s: f64,
    /// The same from its `baton run` on.
    pub since_start_s: f64,
    /// Flows that it lacked then.
    pub lacking: i64,
    /// Bytes on the wire for each, both ways, with all headers.
    pub wire_bytes: f64,
    /// Resident memory that the Active's daemon has grown by, for each, in bytes.
    pub active_bytes: f64,
    /// The same of the joiner's, beside one that has joined an empty Active.
    pub peer_bytes: f64,
}

impl Rate {
    /// Whether the peer has followed.
    pub fn sustained(&self) -> bool {
        self.snapshots == 0
            && self.missed == 0
            && self.lacking == 0
            && self.made > 0.97 * f64::from(self.wanted)
            && self.behind_ms.is_some_and(|behind| behind < CAUGHT_UP.as_secs_f64() * 1e3)
    }
}

/// Measures it.
pub(super) fn run(options: &HaOptions, say: &mut dyn FnMut(&str)) -> Result<Replication, LabError> {
    let rates = rates(options, say)?;
    let join = join(options, say)?;
    Ok(Replication { rates, join })
}

fn rates(options: &HaOptions, say: &mut dyn FnMut(&str)) -> Result<Vec<Rate>, LabError> {
    let mut rates = Vec::new();
    for wanted in &options.rates {
        // A lab of its own, so that every rate begins with empty tables.
        let mut lab = build(options, u64::from(*wanted) * u64::from(options.seconds))?;
        lab.start_relays()?;
        let field = Field::open(&lab)?;
        let rate = field.rate(&lab, *wanted, Duration::from_secs(options.seconds.into()))?;
        say(&format!(
            "  {wanted} a second: made {:.0}, lag {:.2} ms median, {:.2} p99, {:.2} worst, the last \
             one {:.1?} ms behind; {:.0} bytes; {:.1} + {:.1} µs{}",
            rate.made,
            rate.lag_p50_ms,
            rate.lag_p99_ms,
            rate.lag_worst_ms,
            rate.behind_ms,
            rate.wire_bytes,
            rate.active_us,
            rate.peer_us,
            if rate.sustained() { "" } else { "; not sustained" }
        ));
        rates.push(rate);
    }
    Ok(rates)
}

fn build(options: &HaOptions, flows: u64) -> Result<Lab, LabError> {
    // Twice the room, so that no table is nearly full and collected in a hurry.
    let room = (2 * flows).max(1 << 18);
    let lab = Lab::build(
        LabOptions {
            name: format!("drill-ha-{}", std::process::id()),
            relays: 2,
            links: Links::Two,
            binary: options.binary.clone(),
            software: Software::Baton,
            mode: Mode::Passthrough,
            servers: Servers::Echo,
            advert_interval: Duration::from_millis(100),
            heartbeat: HEARTBEAT,
            many: Some(room as u32),
            lifetime: Lifetime::WithParent,
        },
        &mut |_| {},
    )?;
    Ok(lab)
}

/// Two relays that have started.
struct Field {
    source: Source,
    copies: Copies,
}

impl Field {
    fn open(lab: &Lab) -> Result<Self, LabError> {
        Ok(Self { source: Source::on(lab, ACTIVE)?, copies: Copies::on(lab, PEER)? })
    }

    /// New flows at a rate, for a while.
    fn rate(&self, lab: &Lab, wanted: u32, time: Duration) -> Result<Rate, LabError> {
        let idle = (wire_bytes(lab)?, Instant::now());
        thread::sleep(Duration::from_secs(1));
        let before = Reading::of(lab)?;
        let idle = (before.wire - idle.0) as f64 / idle.1.elapsed().as_secs_f64();
        let stop = AtomicBool::new(false);
        let netns = self.source.netns();
        let begun = Instant::now();
        let (made, took, behind, sampled, gauge) = thread::scope(|scope| {
            let sampler = scope.spawn(|| netns.enter(|| self.sample(&stop)).doing("sampling")?);
            let gauge = scope.spawn(|| watch_gauge(lab, &stop));
            let generated = netns.enter(|| self.generate(wanted, time)).doing("making flows");
            let outcome = generated.and_then(|made| made).and_then(|(made, took)| {
                let behind = self.await_flow(made - 1)?;
                Ok((made, took, behind))
            });
            stop.store(true, Ordering::Relaxed);
            let sampled = sampler.join().expect("the sampler does not panic")?;
            let gauge = gauge.join().expect("the watch does not panic");
            let (made, took, behind) = outcome?;
            Ok::<_, LabError>((made, took, behind, sampled, gauge))
        })?;
        let elapsed = begun.elapsed().as_secs_f64();
        let after = Reading::of(lab)?;
        let all = made + sampled.count;
        let each = |total: f64| total / all as f64;
        let mut lags = sampled.lags;
        let [lag_p50_ms, lag_p99_ms, lag_worst_ms] =
            [0.5, 0.99, 1.0].map(|share| percentile(&mut lags, share));
        let mut gauge = gauge;
        Ok(Rate {
            wanted,
            made: made as f64 / took.as_secs_f64(),
            lag_p50_ms,
            lag_p99_ms,
            lag_worst_ms,
            samples: lags.len(),
            missed: sampled.count as usize - lags.len(),
            gauge_p50_ms: percentile(&mut gauge, 0.5),
            gauge_worst_ms: percentile(&mut gauge, 1.0),
            behind_ms: behind.map(|behind| behind.as_secs_f64() * 1e3),
            snapshots: after.snapshots - before.snapshots,
            lacking: all as i64 - self.copies.count()? as i64,
            wire_bytes: each((after.wire - before.wire) as f64 - idle * elapsed),
            active_us: each((after.active_cpu - before.active_cpu) * 1e6),
            peer_us: each((after.peer_cpu - before.peer_cpu) * 1e6),
        })
    }

    /// How many were made, and in what time.
    fn generate(&self, rate: u32, time: Duration) -> Result<(u64, Duration), LabError> {
        let mut hands = self.source.handshakes()?;
        let begun = Instant::now();
        let mut made = 0;
        loop {
            check_signals()?;
            let elapsed = begun.elapsed();
            if elapsed >= time {
                return Ok((made, elapsed));
            }
            let due = (elapsed.as_secs_f64() * f64::from(rate)) as u64 - made;
            if due == 0 {
                thread::sleep(Duration::from_micros(500));
                continue;
            }
            let count = due.min(BATCH.into()) as u32;
            hands.make(made, count)?;
            made += u64::from(count);
        }
    }

    /// Makes a flow now and then, and takes the time until the peer has it.
    fn sample(&self, stop: &AtomicBool) -> Result<Sampled, LabError> {
        let mut hands = self.source.handshakes()?;
        let mut sampled = Sampled::default();
        while !stop.load(Ordering::Relaxed) {
            // Not in step with anything.
            thread::sleep(Duration::from_micros(1000 + sampled.count * 7919 % 3000));
            let flow = SAMPLED + sampled.count;
            hands.step(Step::Syn, flow, 1)?;
            hands.step(Step::SynAck, flow, 1)?;
            let begun = Instant::now();
            hands.step(Step::Ack, flow, 1)?;
            sampled.count += 1;
            if self.comes(flow)? {
                sampled.lags.push(begun.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(sampled)
    }

    /// Waits for a flow at the peer; `None`: it has not come.
    fn await_flow(&self, flow: u64) -> Result<Option<Duration>, LabError> {
        let begun = Instant::now();
        Ok(self.comes(flow)?.then(|| begun.elapsed()))
    }

    fn comes(&self, flow: u64) -> Result<bool, LabError> {
        let begun = Instant::now();
        while !self.copies.has(flow)? {
            if begun.elapsed() > PATIENCE {
                return Ok(false);
            }
            thread::sleep(Duration::from_micros(20));
        }
        Ok(true)
    }
}

/// What looking for flows came to.
#[derive(Debug, Default)]
struct Sampled {
    count: u64,
    /// Of those that came, in milliseconds.
    lags: Vec<f64>,
}

/// What the daemons and the wire say.
struct Reading {
    wire: u64,
    snapshots: u64,
    active_cpu: f64,
    peer_cpu: f64,
}

impl Reading {
    fn of(lab: &Lab) -> Result<Self, LabError> {
        let status = state::ask(&socket(&lab.dir, ACTIVE)).and_then(|status| status.replication);
        let to = status.and_then(|replication| replication.to.into_iter().next());
        Ok(Self {
            wire: wire_bytes(lab)?,
            snapshots: to.map_or(0, |peer| peer.snapshots),
            active_cpu: race::cpu_seconds(lab, ACTIVE)?,
            peer_cpu: race::cpu_seconds(lab, PEER)?,
        })
    }
}

/// The lag that the Active tells of, again and again, in milliseconds.
fn watch_gauge(lab: &Lab, stop: &AtomicBool) -> Vec<f64> {
    let mut told = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let status = state::ask(&socket(&lab.dir, ACTIVE)).and_then(|status| status.replication);
        told.extend(status.and_then(|replication| Some(replication.to.first()?.lag_ms)));
        thread::sleep(Duration::from_millis(100));
    }
    told
}

/// Bytes of frames that the Active has exchanged over the back network, where the channel is.
fn wire_bytes(lab: &Lab) -> Result<u64, LabError> {
    let output = lab.netns(ACTIVE).ip("-s -j link show dev back").doing("reading counters")?;
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(other).doing("reading counters")?;
    let bytes = |way: &str| json[0]["stats64"][way]["bytes"].as_u64().unwrap_or(0);
    Ok(bytes("tx") + bytes("rx"))
}

fn join(options: &HaOptions, say: &mut dyn FnMut(&str)) -> Result<Join, LabError> {
    let flows = options.flows;
    let mut lab = build(options, flows)?;
    lab.start_relays()?;
    let field = Field::open(&lab)?;
    let (active, peer) = (resident(&mut lab, ACTIVE)?, resident(&mut lab, PEER)?);
    let process = lab.process(PEER, "relay").expect("it was started");
    process.terminate(Duration::from_secs(10)).doing("ending a relay")?;
    field.source.fill(flows, Duration::ZERO)?;
    thread::sleep(Duration::from_secs(1));
    let wire = wire_bytes(&lab)?;
    let begun = Instant::now();
    lab.start_relay(PEER)?;
    let (first, last) = await_joined(&lab, &field, begun)?;
    let wire = wire_bytes(&lab)? - wire;
    let lacking = flows as i64 - field.copies.count()? as i64;
    let each = |after: u64, before: u64| (after as f64 - before as f64) / flows as f64;
    let join = Join {
        flows,
        snapshot_s: (last - first).as_secs_f64(),
        since_start_s: (last - begun).as_secs_f64(),
        lacking,
        wire_bytes: wire as f64 / flows as f64,
        active_bytes: each(resident(&mut lab, ACTIVE)?, active),
        peer_bytes: each(resident(&mut lab, PEER)?, peer),
    };
    say(&format!(
        "  a joiner has {flows} flows after {:.2} s ({:.2} s since its start), lacks {lacking}; {:.0} \
         bytes each on the wire, {:.1} and {:.1} in the daemons",
        join.snapshot_s, join.since_start_s, join.wire_bytes, join.active_bytes, join.peer_bytes
    ));
    Ok(join)
}

/// When its first flow was there, and when it said that it is in sync.
fn await_joined(lab: &Lab, field: &Field, begun: Instant) -> Result<(Instant, Instant), LabError> {
    let mut first = None;
    while begun.elapsed() < JOIN_PATIENCE {
        check_signals()?;
        if first.is_none() && field.copies.any()? {
            first = Some(Instant::now());
        }
        let status = state::ask(&socket(&lab.dir, PEER)).and_then(|status| status.replication);
        let from = status.and_then(|replication| replication.from);
        if let (Some(first), Some(FromActive::InSync)) = (first, from) {
            return Ok((first, Instant::now()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(other(format!("the joiner is not in sync after {JOIN_PATIENCE:?}"))).doing("joining")
}

/// Resident memory of a relay's daemon, in bytes.
fn resident(lab: &mut Lab, node: &str) -> Result<u64, LabError> {
    let pid = lab.process(node, "relay").expect("every relay was started").pid();
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"));
    let text = text.doing("reading a daemon's status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kilobytes.unwrap_or(0) * 1024)
}
