//! Many reports as one Markdown table: Baton and keepalived side by side, for docs/failover.md.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::fault::Fault;
use super::report::{Report, Spread};

const HEAD: &str = "\
| interval | fault | relays | runs | UDP | new TCP | kept TCP | long-lived lost | two answering |
| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
";

/// The table: intervals ascending, faults in the order of the command line, Baton first. Figures
/// are milliseconds, `median (worst)`.
pub fn table(reports: &[Report]) -> String {
    let sorted: BTreeMap<_, _> = reports
        .iter()
        .map(|report| {
            let baton = report.mode != "nat";
            ((report.advert_interval_ms, order(report.fault), !baton), report)
        })
        .collect();
    let mut text = HEAD.to_owned();
    for ((interval, _, keepalived), report) in sorted {
        let summary = &report.summary;
        let relays = if keepalived { "keepalived" } else { "**Baton**" };
        let lost = summary.connections.lost.map_or(0.0, |lost| lost.median);
        let established = summary.connections.established.map_or(0.0, |all| all.median);
        writeln!(
            text,
            "| {interval} ms | `{}` | {relays} | {} | {} | {} | {} | {lost:.0} of {established:.0} | {} |",
            report.fault.name(),
            report.runs.len(),
            cell(summary.outage_ms.udp),
            cell(summary.outage_ms.tcp_new),
            cell(summary.outage_ms.tcp_established),
            cell(summary.two_answering_ms),
        )
        .expect("writing to a string does not fail");
    }
    text
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
    use crate::lab::drill::report::{OutageMs, Run};
    use std::time::Duration;

    #[test]
    fn baton_stands_above_keepalived_and_short_intervals_above_long_ones() {
        let report = |fault, mode: &str, ms, udp| {
            let outage_ms = OutageMs { udp: Some(udp), ..Default::default() };
            let runs = vec![Run { outage_ms, ..Default::default() }];
            Report::new(fault, mode, Duration::from_millis(ms), runs)
        };
        let table = table(&[
            report(Fault::Kill, "nat", 100, 3.4),
            report(Fault::PowerOff, "proxy", 100, 2.0),
            report(Fault::Kill, "proxy", 100, 1.0),
            report(Fault::Kill, "nat", 10, 4.0),
        ]);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| 10 ms | `kill` | keepalived | 1 | 4 (4) | - | - | 0 of 0 | - |",
                "| 100 ms | `kill` | **Baton** | 1 | 1 (1) | - | - | 0 of 0 | - |",
                "| 100 ms | `kill` | keepalived | 1 | 3 (3) | - | - | 0 of 0 | - |",
                "| 100 ms | `power-off` | **Baton** | 1 | 2 (2) | - | - | 0 of 0 | - |",
            ]
        );
    }
}
