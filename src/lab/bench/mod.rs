//! The bench: the datapath and proxy mode beside nftables, plain routing, HAProxy and nginx stream,
//! each on a relay of its own in the same lab, under the same load; what a packet costs; what a
//! flow takes of memory, and a start of time.
//!
//! * `race`, with `contender` and `load`: who is compared, doing what.
//! * `packets`: nanoseconds for a packet, in the datapath's programs alone.
//! * `footprint`: bytes for a flow, and from `baton run` to the first packet.
//! * [`ha`]: the figures of failover, which `make bench-ha` takes.
//! * `report`: medians, ratios, tables.
//!
//! Client, relays and backends share this machine's cores, so figures compare within one run only.
//! Each round takes all that is compared in turn, so that what else the machine does falls on all
//! of it; medians of the rounds are reported.

use std::path::PathBuf;
use std::time::Duration;

mod contender;
mod footprint;
pub mod ha;
mod load;
mod packets;
mod race;
mod report;

use clap::ValueEnum;
use report::{Machine, Progress};
pub use report::{Report, render, write_into};

use super::process::Lifetime;
use super::topology::Links;
use super::{HEARTBEAT, Lab, LabError, LabOptions, Mode, Servers, Software};

/// What a bench is to do.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// What of it.
    pub suites: Vec<Suite>,
    /// How long each load lasts, in seconds.
    pub seconds: u32,
    /// Rounds; medians are of so many.
    pub runs: usize,
    /// Sizes of the flow table that packets are measured with, in rising order.
    pub flows: Vec<u32>,
    /// TCP congestion control in every namespace; `None`: this machine's.
    pub congestion: Option<String>,
    /// The `baton` program.
    pub binary: PathBuf,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// What a packet costs in the datapath's programs.
    Packets,
    /// Memory for a flow, and time from `baton run` to the first packet.
    Footprint,
    /// Passthrough beside nftables, plain routing, HAProxy and nginx stream.
    Datapath,
    /// Proxy mode beside HAProxy and nginx stream.
    Proxy,
}

impl Suite {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 4] = [Self::Packets, Self::Footprint, Self::Datapath, Self::Proxy];
}

/// Runs the bench. `say` is told of every step; signals end it in order once
/// [`super::drill::catch_signals`] was called.
///
/// # Errors
/// The lab could not be made, a contender or a load failed, or a signal came. The lab is gone in
/// any case.
pub fn run(options: &BenchOptions, say: &mut dyn FnMut(&str)) -> Result<Report, LabError> {
    let machine = Machine::look(options.congestion.as_deref());
    let mut report = Report::new(machine, options);
    let mut progress = Progress::new(say);
    for suite in Suite::ALL.into_iter().filter(|suite| options.suites.contains(suite)) {
        let say = &mut |step: &str| progress.say(step);
        match suite {
            Suite::Packets => {
                say("what a packet costs");
                let lab = lab(options, 1, Links::Two, Servers::Echo, say)?;
                report.packets = packets::run(&lab, options, say)?;
            }
            Suite::Footprint => {
                say("memory and start");
                let mut lab = lab(options, 1, Links::Two, Servers::Echo, say)?;
                report.footprint = Some(footprint::run(&mut lab, options, say)?);
            }
            Suite::Datapath => {
                report.races.push(race::run(&race::TWO_LINKS, options, say)?);
                report.races.push(race::run(&race::ONE_LINK, options, say)?);
            }
            Suite::Proxy => report.races.push(race::run(&race::PROXY, options, say)?),
        }
    }
    Ok(report)
}

/// A lab for a part of the bench; it is gone when it is dropped.
fn lab(
    options: &BenchOptions,
    relays: usize,
    links: Links,
    servers: Servers,
    say: &mut dyn FnMut(&str),
) -> Result<Lab, LabError> {
    let options = LabOptions {
        name: format!("drill-bench-{}", std::process::id()),
        relays,
        links,
        binary: options.binary.clone(),
        software: Software::Baton,
        mode: Mode::Proxy,
        servers,
        advert_interval: Duration::from_millis(100),
        heartbeat: HEARTBEAT,
        many: None,
        lifetime: Lifetime::WithParent,
    };
    Lab::build(options, say)
}

/// An error of the datapath's or of libbpf's as one of the lab's.
fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> std::io::Error {
    std::io::Error::other(error)
}

/// The quartiles of some figures: a quarter is at most the first, half at most the second, three
/// quarters at most the third. Zeros of none.
fn quartiles(figures: &mut [f64]) -> [f64; 3] {
    figures.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| figures.get(figures.len() * quarter / 4).copied().unwrap_or(0.0))
}

/// The figure that such a share of all is at most; zero of none.
fn percentile(figures: &mut [f64], share: f64) -> f64 {
    figures.sort_by(f64::total_cmp);
    let last = figures.len().saturating_sub(1);
    figures.get((last as f64 * share).ceil() as usize).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_of_the_sorted_figures() {
        assert_eq!(quartiles(&mut [9.0, 1.0, 5.0]), [1.0, 5.0, 9.0]);
        assert_eq!(quartiles(&mut [4.0, 3.0, 2.0, 1.0, 0.0]), [1.0, 2.0, 3.0]);
        assert_eq!(quartiles(&mut [7.0]), [7.0; 3]);
        assert_eq!(quartiles(&mut []), [0.0; 3]);
    }
}
