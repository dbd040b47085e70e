//! The figures of failover, all in one run: what an outage takes, beside keepalived with conntrackd
//! and nftables; which connections survive while new ones come by the thousand; what replication
//! carries.
//!
//! * `drills`: outages and churn, each in labs of their own, the contenders in turn.
//! * `replication`: two daemons, flows made in the kernel, lag seen from outside.
//! * `report`: tables.

use std::path::PathBuf;

use clap::ValueEnum;

use super::report::{Machine, Progress};
use crate::lab::LabError;
use crate::lab::drill::fault::Fault;

mod drills;
mod replication;
mod report;

pub use report::{HaReport, render, write_into};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct HaOptions {
    /// What of it.
    pub suites: Vec<HaSuite>,
    /// Faults of the suite of outages.
    pub faults: Vec<Fault>,
    /// Runs of each drill.
    pub runs: usize,
    /// New connections a second that are held, one after the other.
    pub churn: Vec<u32>,
    /// New flows a second that are replicated, one after the other, in rising order.
    pub rates: Vec<u32>,
    /// How long each of these lasts, in seconds.
    pub seconds: u32,
    /// Flows that a joiner is sent.
    pub flows: u64,
    /// The `baton` program.
    pub binary: PathBuf,
}

/// A part of the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HaSuite {
    /// How long a fault lasts for clients.
    Outage,
    /// Connections that are opened while the power goes.
    Churn,
    /// Flows from one node to another.
    Replication,
}

impl HaSuite {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 3] = [Self::Outage, Self::Churn, Self::Replication];
}

/// Measures; what an earlier run has measured with the same options is added to where there is
/// one. `say` is told of every step; signals end it in order once
/// [`crate::lab::drill::catch_signals`] was called.
///
/// # Errors
/// What [`LabError`] says. The labs are gone in any case.
pub fn run(
    options: &HaOptions,
    earlier: Option<HaReport>,
    say: &mut dyn FnMut(&str),
) -> Result<HaReport, LabError> {
    let mut report = earlier.unwrap_or_else(|| HaReport::new(Machine::look(None)));
    let mut progress = Progress::new(say);
    for suite in HaSuite::ALL.into_iter().filter(|suite| options.suites.contains(suite)) {
        let say = &mut |step: &str| progress.say(step);
        match suite {
            HaSuite::Outage => {
                say("outages");
                drills::run(&drills::outages(options), options.runs, &mut report.outages, say)?;
            }
            HaSuite::Churn => {
                say("churn");
                drills::run(&drills::churns(options), options.runs, &mut report.churns, say)?;
            }
            HaSuite::Replication => {
                say("replication");
                report.replication = Some(replication::run(options, say)?);
            }
        }
    }
    Ok(report)
}
