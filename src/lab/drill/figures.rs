//! Many reports as one Markdown table: Baton's modes and keepalived side by side, for
//! docs/failover.md and for a terminal.

use super::fault::Fault;
use super::report::{Report, Spread};
use crate::lab::Software;

/// Titles, and whether the column is of numbers.
const HEAD: [(&str, bool); 9] = [
    ("interval", true),
    ("fault", false),
    ("relays", false),
    ("runs", true),
    ("UDP", true),
    ("new TCP", true),
    ("kept TCP", true),
    ("long-lived lost", true),
    ("two answering", true),
];

/// The table: intervals ascending, faults in the order of the command line, the kernel's modes
/// first and keepalived last. Figures are milliseconds, `median (worst)`.
pub fn table(reports: &[Report]) -> String {
    let mut sorted: Vec<&Report> = reports.iter().collect();
    sorted.sort_by_key(|report| (report.advert_interval_ms, order(report.fault), rank(report)));
    let rows: Vec<[String; 9]> = sorted.into_iter().map(row).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([HEAD[column].0.len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let line = |cells: &[String; 9]| {
        let padded = cells.iter().zip(&widths).zip(&HEAD).map(|((cell, width), (_, number))| {
            if *number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().zip(&HEAD).map(|(width, (_, number))| {
        if *number { format!("{}:", "-".repeat(width - 1)) } else { "-".repeat(*width) }
    });
    let mut text = line(&HEAD.map(|(title, _)| title.to_owned()));
    text += &format!("| {} |\n", rule.collect::<Vec<_>>().join(" | "));
    rows.iter().for_each(|row| text += &line(row));
    text
}

fn row(report: &Report) -> [String; 9] {
    let summary = &report.summary;
    let relays = match (report.relays, report.mode.as_str()) {
        (Software::Baton, mode) => format!("**Baton** {mode}"),
        (other, _) => other.title().to_owned(),
    };
    let lost = summary.connections.lost.map_or(0.0, |lost| lost.median);
    let established = summary.connections.established.map_or(0.0, |all| all.median);
    [
        format!("{} ms", report.advert_interval_ms),
        format!("`{}`", report.fault.name()),
        relays,
        report.runs.len().to_string(),
        cell(summary.outage_ms.udp),
        cell(summary.outage_ms.tcp_new),
        cell(summary.outage_ms.tcp_established),
        format!("{lost:.0} of {established:.0}"),
        cell(summary.two_answering_ms),
    ]
}

/// Where a report stands among those of one fault.
fn rank(report: &Report) -> (usize, &str) {
    let modes = ["passthrough", "dsr", "proxy"];
    let place = modes.iter().position(|mode| *mode == report.mode).unwrap_or(modes.len());
    (place, report.relays.name())
}

fn order(fault: Fault) -> usize {
    let all = <Fault as clap::ValueEnum>::value_variants();
    all.iter().position(|other| *other == fault).unwrap_or(all.len())
}

fn cell(spread: Option<Spread>) -> String {
    match spread {
        None => "-".to_owned(),
        Some(Spread { median, worst }) => format!("{median:.0} ({worst:.0})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Mode::{self, Passthrough, Proxy};
    use crate::lab::Software::{Baton, Keepalived};
    use crate::lab::drill::DrillOptions;
    use crate::lab::drill::report::tests::options;
    use crate::lab::drill::report::{OutageMs, Run};

    #[test]
    fn baton_stands_above_keepalived_and_short_intervals_above_long_ones() {
        let report = |fault, relays, mode: Mode, ms, udp| {
            let outage_ms = OutageMs { udp: Some(udp), ..Default::default() };
            let runs = vec![Run { outage_ms, ..Default::default() }];
            Report::new(&DrillOptions { mode, ..options(fault, relays, ms) }, runs)
        };
        let table = table(&[
            report(Fault::Kill, Keepalived, Proxy, 100, 3.4),
            report(Fault::PowerOff, Baton, Proxy, 100, 2.0),
            report(Fault::Kill, Baton, Proxy, 100, 1.0),
            report(Fault::Kill, Baton, Passthrough, 100, 0.0),
            report(Fault::Kill, Keepalived, Proxy, 10, 14.0),
        ]);
        let rows: Vec<&str> = table.lines().collect();
        assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{table}");
        let squeezed = |row: &str| row.split_whitespace().collect::<Vec<_>>().join(" ");
        let rows: Vec<String> = rows.into_iter().skip(2).map(squeezed).collect();
        assert_eq!(
            rows,
            [
                "| 10 ms | `kill` | keepalived | 1 | 14 (14) | - | - | 0 of 0 | - |",
                "| 100 ms | `kill` | **Baton** passthrough | 1 | 0 (0) | - | - | 0 of 0 | - |",
                "| 100 ms | `kill` | **Baton** proxy | 1 | 1 (1) | - | - | 0 of 0 | - |",
                "| 100 ms | `kill` | keepalived | 1 | 3 (3) | - | - | 0 of 0 | - |",
                "| 100 ms | `power-off` | **Baton** proxy | 1 | 2 (2) | - | - | 0 of 0 | - |",
            ]
        );
    }
}
