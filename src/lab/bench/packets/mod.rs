//! What a packet costs: the datapath's programs on frames of ours (BPF_PROG_TEST_RUN), beside a
//! program that does nothing.
//!
//! At the XDP hook with live frames, which go out of a veth and are dropped at its far end by
//! another program; at the TC hook without the kernel's route and neighbour lookup that follows.
//! `bpf/packets.bpf.c` says how each frame gets to be one of the next flow. A round takes a bare
//! batch, one of frames that are only written, and one of frames that the datapath handles, so
//! that what else the machine does falls on all of them.

mod field;
mod skeleton;
mod track;

use serde::Serialize;

use self::field::Field;
use super::BenchOptions;
use crate::lab::{Doing as _, Lab, LabError};

/// The node that packets are measured on.
const RELAY: &str = "relay1";
/// Frames of a batch, which takes milliseconds.
const FRAMES: u32 = 16_384;
/// Flows that fit into the processor's caches.
const BUSY: u32 = 1000;
/// Rounds of batches for each round that was asked for.
const BATCHES: usize = 5;

/// A kind of packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    /// As docs/performance.md calls it.
    name: &'static str,
    /// Its service's keys.
    mode: &'static str,
    /// Whether it comes from a client.
    from_client: bool,
    /// Whether it can be measured at the TC hook.
    tc: bool,
}

const fn case(name: &'static str, mode: &'static str) -> Case {
    Case { name, mode, from_client: true, tc: true }
}

const CASES: [Case; 6] = [
    case("dsr l2", "mode = \"dsr\""),
    case("passthrough, source vip", "mode = \"passthrough\""),
    Case { from_client: false, ..case("passthrough, source vip, reply", "mode = \"passthrough\"") },
    case("passthrough, source client", "mode = \"passthrough\"\nsource = \"client\""),
    case("dsr nat", "mode = \"dsr\"\ndsr = \"nat\""),
    // A socket buffer would grow with every run.
    Case { tc: false, ..case("dsr ipip", "mode = \"dsr\"\ndsr = \"ipip\"") },
];

/// What a kind of packet costs with so many flows in the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// The kind of packet.
    pub packet: &'static str,
    /// Flows in the table.
    pub flows: u32,
    /// Flows that frames are of, in turn.
    pub busy: u32,
    /// At the XDP hook.
    pub xdp: Nanoseconds,
    /// XDP: nanoseconds that a bare look into the flow table adds, of packets from clients. No
    /// balancer with such a table is faster.
    pub found: Option<f64>,
    /// At the TC hook, where it can be measured.
    pub tc: Option<Nanoseconds>,
    /// XDP: what bare XDP_TX takes, by what this takes; 1 is as fast as bare.
    pub speed: f64,
}

/// Nanoseconds for a frame, medians of the rounds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Nanoseconds {
    /// The program that does nothing (XDP_TX, or an empty TC program).
    pub bare: f64,
    /// What the datapath's program adds to it.
    pub added: f64,
    /// The quarter of rounds with the least have at most this.
    pub low: f64,
    /// The quarter of rounds with the most have at least this.
    pub high: f64,
}

/// Measures every kind of packet with each size of the table, on the first relay of a lab.
///
/// # Errors
/// What [`LabError`] says; a frame that the datapath does not send on, above all.
pub(super) fn run(
    lab: &Lab,
    options: &BenchOptions,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Cost>, LabError> {
    let netns = lab.netns(RELAY);
    field::wire(&netns)?;
    let mut costs = Vec::new();
    for case in CASES {
        let measured = netns.enter(|| measure(case, options)).doing("entering the relay")??;
        measured.iter().for_each(|cost| say(&format!("  {cost}")));
        costs.extend(measured);
    }
    Ok(costs)
}

/// In the relay's namespace.
fn measure(case: Case, options: &BenchOptions) -> Result<Vec<Cost>, LabError> {
    let most = options.flows.last().copied().unwrap_or(1);
    let mut field = Field::new(case, most)?;
    let mut costs = Vec::new();
    for flows in &options.flows {
        field.fill(*flows)?;
        // What a look into a large table costs, and then what it costs where no cache holds it.
        let mut each = vec![BUSY.min(*flows), *flows];
        each.dedup();
        for busy in each {
            costs.push(field.measure(busy, rounds(options.runs))?);
        }
    }
    Ok(costs)
}

/// Rounds of batches for so many rounds that were asked for.
pub(super) fn rounds(runs: usize) -> usize {
    runs * BATCHES
}

impl Nanoseconds {
    /// Half of what lies between the quartiles.
    pub(super) fn spread(&self) -> f64 {
        (self.high - self.low) / 2.0
    }
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { packet, flows, busy, xdp, found, tc, speed } = self;
        let (bare, added) = (xdp.bare, xdp.added);
        write!(
            f,
            "{packet}, {busy} of {flows} flows: XDP {bare:.0} + {added:.0} ns (speed {speed:.2})"
        )?;
        if let Some(found) = found {
            write!(f, ", a bare look into the table {found:.0} of them")?;
        }
        match tc {
            Some(tc) => write!(f, ", TC {:.0} + {:.0} ns", tc.bare, tc.added),
            None => Ok(()),
        }
    }
}
