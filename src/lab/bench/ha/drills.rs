//! Drills as figures: the same fault for every contender, in turn, so that what else the machine
//! does falls on all of them.

use std::time::Duration;

use super::HaOptions;
use crate::lab::drill::fault::Fault;
use crate::lab::drill::report::Report;
use crate::lab::drill::{self, DrillOptions, check_signals};
use crate::lab::{HEARTBEAT, LabError, Mode, Software};

/// Of all relays.
const ADVERTS: Duration = Duration::from_millis(10);
/// Heartbeats that find out sooner.
const FAST: Duration = Duration::from_millis(2);
/// New connections a second of the canary, and long-lived ones.
const RATE: u32 = 100;
const CONNECTIONS: usize = 20;

/// Every fault for every contender that has it.
pub(super) fn outages(options: &HaOptions) -> Vec<DrillOptions> {
    let mut drills = Vec::new();
    for fault in &options.faults {
        drills.push(drill(options, *fault, Software::Baton, HEARTBEAT));
        if *fault == Fault::PowerOff {
            drills.push(drill(options, *fault, Software::Baton, FAST));
        }
        if !fault.is_command() {
            drills.push(drill(options, *fault, Software::Conntrackd, HEARTBEAT));
        }
    }
    drills
}

/// The power goes while so many connections a second are opened, for every contender.
pub(super) fn churns(options: &HaOptions) -> Vec<DrillOptions> {
    let both = [Software::Baton, Software::Conntrackd];
    let of = |rate: &u32| {
        let rate = *rate;
        both.map(|software| DrillOptions {
            churn: Some(rate),
            ..drill(options, Fault::PowerOff, software, HEARTBEAT)
        })
    };
    options.churn.iter().flat_map(of).collect()
}

fn drill(
    options: &HaOptions,
    fault: Fault,
    software: Software,
    heartbeat: Duration,
) -> DrillOptions {
    DrillOptions {
        fault,
        software,
        mode: if software.is_baton() { Mode::Passthrough } else { Mode::Proxy },
        advert_interval: ADVERTS,
        heartbeat,
        rate: RATE,
        connections: CONNECTIONS,
        churn: None,
        times: 1,
        runs: 1,
        binary: options.binary.clone(),
    }
}

/// Runs all of them so many times; the reports go to those of their kind, or behind.
pub(super) fn run(
    drills: &[DrillOptions],
    runs: usize,
    reports: &mut Vec<Report>,
    say: &mut dyn FnMut(&str),
) -> Result<(), LabError> {
    for number in 1..=runs {
        for drill in drills {
            check_signals()?;
            let outcome = match drill::run(drill, &mut |_| {}) {
                // keepalived does not always start on a busy machine: once more.
                Err(LabError::Daemon { .. }) => drill::run(drill, &mut |_| {})?,
                outcome => outcome?,
            };
            let report = outcome.report;
            say(&format!("  {number} of {runs}, {}", in_words(&report)));
            if drill.software.is_baton() {
                outcome.failures.iter().for_each(|failure| say(&format!("    FAILED {failure}")));
            }
            match reports.iter_mut().find(|other| other.is_of(&report)) {
                Some(known) => known.add(report),
                None => reports.push(report),
            }
        }
    }
    Ok(())
}

fn in_words(report: &Report) -> String {
    let Some(run) = report.runs.first() else { return String::new() };
    let outage = run.outage_ms.udp.unwrap_or(f64::INFINITY);
    let mut text = format!(
        "{} of {}, heartbeats every {} ms: {outage:.1} ms without UDP, {} of {} connections lost",
        report.fault.name(),
        report.relays.title(),
        report.heartbeat_ms,
        run.connections.lost,
        run.connections.established
    );
    if let Some(churn) = run.churn {
        text +=
            &format!("; of {} at {} a second {} lost", churn.established, churn.rate, churn.lost);
        if let Some(oldest) = churn.oldest_lost_ms {
            text += &format!(", the oldest of {oldest} ms");
        }
    }
    text
}
