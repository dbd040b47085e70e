//! A report as a table for people.

use std::fmt::Write;

use super::report::{Report, Run, Spread, Takeovers};

/// Escape sequences, or nothing.
struct Style {
    bold: &'static str,
    red: &'static str,
    dim: &'static str,
    end: &'static str,
}

const COLOURED: Style = Style { bold: "\x1b[1m", red: "\x1b[31m", dim: "\x1b[2m", end: "\x1b[0m" };
const PLAIN: Style = Style { bold: "", red: "", dim: "", end: "" };

/// The report as text that explains its figures.
pub fn render(report: &Report, relays: &str, failures: &[String], colour: bool) -> String {
    let style = if colour { &COLOURED } else { &PLAIN };
    let mut text = String::new();
    let (fault, interval) = (report.fault.name(), report.advert_interval_ms);
    let runs = match report.runs.len() {
        1 => String::new(),
        count => format!(", {count} runs"),
    };
    line(
        &mut text,
        format_args!(
            "\n{}Drill: {fault}{} ({relays}, {} mode, adverts every {interval} ms{runs})",
            style.bold, style.end, report.mode
        ),
    );
    figures(&mut text, report, style);
    for takeovers in report.runs.iter().filter_map(|run| run.takeovers) {
        let Takeovers { times, took_ms, outage_ms } = takeovers;
        line(
            &mut text,
            format_args!(
                "\n  {times} takeovers: each took {} ms (worst {}), without an answer to UDP for \
                 {} ms (worst {})",
                show(Some(took_ms.median)),
                show(Some(took_ms.worst)),
                show(Some(outage_ms.median)),
                show(Some(outage_ms.worst)),
            ),
        );
    }
    if let Some(last) = report.runs.last() {
        steps(&mut text, last, report.runs.len(), style);
    }
    for failure in failures {
        line(&mut text, format_args!("{}FAILED{} {failure}", style.red, style.end));
    }
    text
}

fn line(text: &mut String, what: std::fmt::Arguments<'_>) {
    writeln!(text, "{what}").expect("writing to a string does not fail");
}

fn figures(text: &mut String, report: &Report, style: &Style) {
    let summary = &report.summary;
    let (outage, connections) = (&summary.outage_ms, &summary.connections);
    let churn = summary.churn;
    let rows = [
        ("outage, UDP", outage.udp, "ms", "no answer to a probe sent every millisecond"),
        ("outage, new TCP", outage.tcp_new, "ms", "no new connection that was begun got through"),
        (
            "outage, kept TCP",
            outage.tcp_established,
            "ms",
            "longest wait of a connection that lived on",
        ),
        ("connections kept", connections.kept, "", "long-lived ones, alive to the end"),
        ("connections lost", connections.lost, "", "long-lived ones, reset, closed or silent"),
        ("new, answered", connections.new_ok, "", "new connections since the fault"),
        ("new, failed", connections.new_failed, "", "refused, reset, or no answer in 0.9 s"),
        ("churn, survived", churn.map(|churn| churn.survived), "", "of those opened for --churn"),
        ("churn, lost", churn.map(|churn| churn.lost), "", "established, and no second echo"),
        ("wrong bytes", summary.wrong_bytes, "", "came back other than they were sent"),
        ("two answering", summary.two_answering_ms, "ms", "two nodes answered ARP or NS for a VIP"),
    ];
    let several = report.runs.len() > 1;
    if several {
        line(text, format_args!("  {:<18}{:>10}{:>12}", "", "median", "worst"));
    }
    let shown = |name: &str| churn.is_some() || !name.starts_with("churn");
    for (name, spread, unit, why) in rows.into_iter().filter(|(name, ..)| shown(name)) {
        let median = show(spread.map(|spread| spread.median));
        let worst = match several {
            true => format!("{:>12}", show(spread.map(|spread: Spread| spread.worst))),
            false => String::new(),
        };
        line(
            text,
            format_args!(
                "  {name:<18}{median:>10}{worst} {unit:<3} {}{why}{}",
                style.dim, style.end
            ),
        );
    }
}

fn show(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.fract() == 0.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.1}"),
    }
}

fn steps(text: &mut String, run: &Run, runs: usize, style: &Style) {
    let which = if runs > 1 { " of the last run" } else { "" };
    line(text, format_args!("\n  {}Steps{which}, in ms since the fault{}", style.bold, style.end));
    let width = run.steps.iter().map(|step| step.node.len()).max().unwrap_or_default();
    for step in &run.steps {
        line(text, format_args!("  {:>10.1}  {:<width$}  {}", step.t_ms, step.node, step.what));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Software;
    use crate::lab::drill::fault::Fault;
    use crate::lab::drill::report::tests::options;
    use crate::lab::drill::report::{OutageMs, Step};

    #[test]
    fn figures_stand_under_each_other_and_colours_only_where_wanted() {
        let run = |udp| Run {
            outage_ms: OutageMs { udp: Some(udp), ..Default::default() },
            steps: vec![Step { t_ms: 0.0, node: "relay1".into(), what: "killed".into() }],
            ..Default::default()
        };
        let report = |runs| Report::new(&options(Fault::Kill, Software::Baton, 100), runs);
        let one = render(&report(vec![run(331.2)]), "Baton", &[], false);
        assert!(one.contains("  outage, UDP            331.2 ms  no answer"), "{one}");
        assert!(one.contains("  outage, new TCP            - ms  "), "{one}");
        assert!(one.contains("         0.0  relay1  killed"), "{one}");
        let two = render(&report(vec![run(331.0), run(12.5)]), "Baton", &["x".into()], false);
        assert!(two.contains("                        median       worst\n"), "{two}");
        assert!(two.contains("  outage, UDP            171.8         331 ms  no answer"), "{two}");
        assert!(two.contains("FAILED x"), "{two}");
        assert!(!two.contains('\x1b'), "{two}");
        assert!(render(&report(vec![run(1.0)]), "Baton", &[], true).contains('\x1b'));
    }
}
