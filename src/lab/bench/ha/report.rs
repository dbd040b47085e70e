//! The figures of failover as tables, on the terminal and in docs/failover.md.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::replication::{Join, Rate, Replication};
use crate::lab::bench::report::{Machine, Section, place};
use crate::lab::drill::report::{Connections, Report, Spread};
use crate::table::Table;

/// What was measured; stable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HaReport {
    /// Where.
    pub machine: Machine,
    /// Drills, by fault, relays and heartbeat.
    pub outages: Vec<Report>,
    /// Drills in which connections were opened and held.
    pub churns: Vec<Report>,
    /// What replication carries.
    pub replication: Option<Replication>,
}

impl HaReport {
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine, outages: Vec::new(), churns: Vec::new(), replication: None }
    }
}

/// The report as text.
pub fn render(report: &HaReport) -> String {
    let Machine { cores, kernel, load_before, .. } = &report.machine;
    let mut text =
        format!("\n{cores} cores, kernel {kernel}, load average {load_before} before.\n");
    for section in sections(report) {
        text += &format!("\n{}", section.text);
    }
    text
}

/// `document` with the report's sections in the places that it marks for them.
///
/// # Errors
/// The name of a section that the document has no place for.
pub fn write_into(report: &HaReport, document: &str) -> Result<String, &'static str> {
    place(sections(report), document)
}

fn sections(report: &HaReport) -> Vec<Section> {
    let mut sections = Vec::new();
    if !report.outages.is_empty() {
        sections.push(Section { name: "outage", text: outages(&report.outages) });
    }
    if !report.churns.is_empty() {
        sections.push(Section { name: "churn", text: churns(&report.churns) });
    }
    if let Some(replication) = &report.replication {
        sections.push(Section { name: "replication", text: self::replication(replication) });
    }
    sections
}

fn outages(reports: &[Report]) -> String {
    let mut table = Table::new(&[
        "fault",
        "relays",
        "heartbeat",
        "runs",
        "UDP",
        "new TCP",
        "kept TCP",
        "lost",
        "of",
        "two",
    ]);
    for report in reports {
        let outage = &report.summary.outage_ms;
        let sum = |figure: fn(&Connections) -> u64| {
            report.runs.iter().map(|run| figure(&run.connections)).sum::<u64>().to_string()
        };
        table.row([
            report.fault.name().to_owned(),
            report.relays.title().to_owned(),
            heartbeat(report),
            report.runs.len().to_string(),
            cell(outage.udp),
            cell(outage.tcp_new),
            cell(outage.tcp_established),
            sum(|connections| connections.lost),
            sum(|connections| connections.established),
            cell(report.summary.two_answering_ms),
        ]);
    }
    format!(
        "Adverts every 10 ms; milliseconds, median (worst):\nUDP: no answer to a probe sent every \
         millisecond. new TCP: none that was begun got through.\nkept TCP: longest wait of a \
         connection that lived on. lost: long-lived connections, of all runs.\ntwo: two nodes \
         answered for the VIP.\n\n{table}"
    )
}

fn heartbeat(report: &Report) -> String {
    if report.relays.is_baton() { format!("{} ms", report.heartbeat_ms) } else { "-".to_owned() }
}

fn churns(reports: &[Report]) -> String {
    let mut table = Table::new(&[
        "new a second",
        "relays",
        "runs",
        "established",
        "lost",
        "survived %",
        "oldest lost ms",
        "UDP",
    ]);
    for report in reports {
        let churned = || report.runs.iter().filter_map(|run| run.churn);
        let oldest = churned().filter_map(|churn| churn.oldest_lost_ms).reduce(f64::max);
        let share = report.summary.churn.map_or(0.0, |churn| churn.share);
        table.row([
            churned().next().map_or(0, |churn| churn.rate).to_string(),
            report.relays.title().to_owned(),
            report.runs.len().to_string(),
            churned().map(|churn| churn.established).sum::<u64>().to_string(),
            churned().map(|churn| churn.lost).sum::<u64>().to_string(),
            format!("{:.3}", share * 100.0),
            oldest.map_or("-".to_owned(), |oldest| format!("{oldest:.1}")),
            cell(report.summary.outage_ms.udp),
        ]);
    }
    format!(
        "Connections opened for 5 s before the power goes, and held. established: their first record \
         had come\nback by then. lost: their second one, after the takeover, did not. oldest lost: its \
         age when the power went.\n\n{table}"
    )
}

fn replication(replication: &Replication) -> String {
    let mut table = Table::new(&[
        "new a second",
        "made",
        "sustained",
        "lag p50",
        "p99",
        "worst",
        "gauge p50",
        "worst",
        "behind",
        "bytes",
        "µs Active",
        "µs peer",
    ]);
    for rate in &replication.rates {
        let Rate { wanted, made, wire_bytes, active_us, peer_us, behind_ms, .. } = rate;
        let mut row = vec![wanted.to_string(), format!("{made:.0}")];
        row.push(if rate.sustained() { "yes" } else { "no" }.to_owned());
        row.extend(
            [rate.lag_p50_ms, rate.lag_p99_ms, rate.lag_worst_ms, rate.gauge_p50_ms]
                .map(|value| format!("{value:.2}")),
        );
        row.push(format!("{:.1}", rate.gauge_worst_ms));
        row.push(behind_ms.map_or("-".to_owned(), |behind| format!("{behind:.1}")));
        row.push(format!("{wire_bytes:.0}"));
        row.extend([active_us, peer_us].map(|value| format!("{value:.1}")));
        table.row(row);
    }
    let mut text = format!(
        "New flows a second, established in the Active's kernel. lag: milliseconds until a flow is in \
         the peer's\ntable, of flows that were looked for there; gauge: what `baton status` said \
         meanwhile. behind: the last\nof all, ms. bytes: on the wire for a flow, both ways, with all \
         headers. µs: processor time of a daemon\nfor a flow.\n\n{table}"
    );
    let Join { flows, snapshot_s, since_start_s, lacking, wire_bytes, active_bytes, peer_bytes } =
        replication.join;
    let _ = writeln!(
        text,
        "\nA joiner of {flows} flows: in sync {snapshot_s:.2} s after its first flow, {since_start_s:.2} \
         s after `baton run`; {lacking} lacking.\n{wire_bytes:.0} bytes on the wire for a flow; the \
         daemons' resident memory grew by {active_bytes:.1} bytes for a flow (Active)\nand \
         {peer_bytes:.1} (joiner)."
    );
    text
}

fn cell(spread: Option<Spread>) -> String {
    match spread {
        None => "-".to_owned(),
        Some(Spread { median, worst }) => format!("{median:.1} ({worst:.1})"),
    }
}
