//! What a drill found, in the form of docs/drills.md. The form is the same for every fault, and
//! stable: fields are added, never renamed.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::DrillOptions;
use super::fault::Fault;
use super::outage::{self, Attempt};
use crate::lab::Software;

/// A whole drill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was broken.
    pub fault: Fault,
    /// What ran on the relays.
    pub relays: Software,
    /// How the relays forward: `proxy`, `passthrough`, `dsr`; `nat` for keepalived with nftables.
    pub mode: String,
    /// Advertisement interval of the relays.
    pub advert_interval_ms: u64,
    /// Between two heartbeats on the peer channel, which there is in `passthrough` and `dsr`.
    pub heartbeat_ms: u64,
    /// Every run.
    pub runs: Vec<Run>,
    /// Median and worst of the runs.
    pub summary: Summary,
}

/// One run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Outage per kind of traffic.
    pub outage_ms: OutageMs,
    /// What became of connections.
    pub connections: Connections,
    /// What became of those that were opened one after the other and held, with `--churn`.
    pub churn: Option<Churned>,
    /// Bytes that came back different from what was sent.
    pub wrong_bytes: u64,
    /// For how long two nodes answered for the VIP: ARP or Neighbor Solicitations, whichever was
    /// longer.
    pub two_answering_ms: Option<f64>,
    /// Where the VIPs went back and forth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takeovers: Option<Takeovers>,
    /// What happened when, in order; `t_ms` counts from the fault.
    pub steps: Vec<Step>,
}

/// Planned takeovers, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Takeovers {
    /// How many.
    pub times: u64,
    /// How long the command took, in milliseconds.
    pub took_ms: Spread,
    /// The longest outage of UDP around each, in milliseconds, as [`OutageMs::udp`].
    pub outage_ms: Spread,
}

impl Takeovers {
    /// Of these, by when they were asked for and what they took; `None` where there are none.
    pub(super) fn of(takeovers: &[(Instant, Duration)], udp: &[Attempt]) -> Option<Self> {
        let outage = |place: usize, from: Instant| {
            // Until the next one begins.
            let to = takeovers.get(place + 1).map(|(at, _)| *at);
            let begin = udp.partition_point(|attempt| attempt.started < from);
            let end = to.map_or(udp.len(), |to| udp.partition_point(|a| a.started < to));
            let around = &udp[begin.saturating_sub(1)..end.max(begin)];
            outage::longest(around, from).map_or(0.0, |outage| ms(outage.length()))
        };
        let outages = takeovers.iter().enumerate().map(|(place, (at, _))| outage(place, *at));
        Some(Self {
            times: takeovers.len() as u64,
            took_ms: Spread::of(takeovers.iter().map(|(_, took)| ms(*took)), f64::max)?,
            outage_ms: Spread::of(outages, f64::max)?,
        })
    }
}

/// Outages in milliseconds; `null` where nothing could be measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct OutageMs {
    /// Longest time between two answered UDP probes with a lost one in between; 0: none lost.
    pub udp: Option<f64>,
    /// The same for new TCP connections, by the time at which they were begun.
    pub tcp_new: Option<f64>,
    /// Longest time that a connection that was kept waited for an answer; `null`: none was kept.
    pub tcp_established: Option<f64>,
}

/// Connections counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// Long-lived connections that there were when the fault came.
    pub established: u64,
    /// Those that lived to the end.
    pub kept: u64,
    /// Those that did not.
    pub lost: u64,
    /// New connections, from the fault to the end, that were answered.
    pub new_ok: u64,
    /// New connections, from the fault to the end, that were not.
    pub new_failed: u64,
}

/// Connections that were opened at a steady rate and held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Churned {
    /// New ones a second.
    pub rate: u32,
    /// Those whose first record had come back when the fault was done.
    pub established: u64,
    /// Those whose second record came back after it, byte for byte.
    pub survived: u64,
    /// Those whose second record did not.
    pub lost: u64,
    /// How old the oldest lost one was when the fault came, in milliseconds.
    pub oldest_lost_ms: Option<f64>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Milliseconds since the fault.
    pub t_ms: f64,
    /// The node.
    pub node: String,
    /// What.
    pub what: String,
}

/// Median and worst of each figure of the runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Of [`Run::outage_ms`].
    pub outage_ms: OutageSummary,
    /// Of [`Run::connections`].
    pub connections: ConnectionsSummary,
    /// Of [`Run::churn`], where there was any.
    pub churn: Option<ChurnedSummary>,
    /// Of [`Run::wrong_bytes`].
    pub wrong_bytes: Option<Spread>,
    /// Of [`Run::two_answering_ms`].
    pub two_answering_ms: Option<Spread>,
}

/// Of [`OutageMs`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct OutageSummary {
    /// Of [`OutageMs::udp`].
    pub udp: Option<Spread>,
    /// Of [`OutageMs::tcp_new`].
    pub tcp_new: Option<Spread>,
    /// Of [`OutageMs::tcp_established`].
    pub tcp_established: Option<Spread>,
}

/// Of [`Connections`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsSummary {
    /// Of [`Connections::established`]; the worst is the fewest.
    pub established: Option<Spread>,
    /// Of [`Connections::kept`]; the worst is the fewest.
    pub kept: Option<Spread>,
    /// Of [`Connections::lost`].
    pub lost: Option<Spread>,
    /// Of [`Connections::new_ok`]; the worst is the fewest.
    pub new_ok: Option<Spread>,
    /// Of [`Connections::new_failed`].
    pub new_failed: Option<Spread>,
}

/// Of [`Churned`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ChurnedSummary {
    /// Of [`Churned::survived`]; the worst is the fewest.
    pub survived: Spread,
    /// Of [`Churned::lost`].
    pub lost: Spread,
    /// Of all runs together, the share of the established ones that survived.
    pub share: f64,
}

/// A figure over several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The worst one.
    pub worst: f64,
}

/// Milliseconds with one decimal: the instruments are no better than that.
pub(super) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

impl Report {
    /// A report of these runs.
    pub(super) fn new(options: &DrillOptions, runs: Vec<Run>) -> Self {
        let mode = match options.software {
            Software::Baton => options.mode.name(),
            Software::Keepalived | Software::Conntrackd => "nat",
        };
        Self {
            fault: options.fault,
            relays: options.software,
            mode: mode.to_owned(),
            advert_interval_ms: options.advert_interval.as_millis() as u64,
            heartbeat_ms: options.heartbeat.as_millis() as u64,
            summary: Summary::of(&runs),
            runs,
        }
    }
}

impl Report {
    /// Whether another is of the same drill.
    pub(crate) fn is_of(&self, other: &Self) -> bool {
        let what = |report: &Self| {
            let churn = report.runs.first().and_then(|run| run.churn).map(|churn| churn.rate);
            let intervals = (report.advert_interval_ms, report.heartbeat_ms);
            (report.fault, report.relays, report.mode.clone(), intervals, churn)
        };
        what(self) == what(other)
    }

    /// Adds its runs.
    pub(crate) fn add(&mut self, other: Self) {
        self.runs.extend(other.runs);
        self.summary = Summary::of(&self.runs);
    }
}

impl Summary {
    /// Of all runs.
    pub fn of(runs: &[Run]) -> Self {
        let high = |figure: &dyn Fn(&Run) -> Option<f64>| {
            Spread::of(runs.iter().filter_map(figure), f64::max)
        };
        let churned = || runs.iter().filter_map(|run| run.churn);
        let low = |figure: &dyn Fn(&Run) -> u64| {
            Spread::of(runs.iter().map(|run| figure(run) as f64), f64::min)
        };
        Self {
            outage_ms: OutageSummary {
                udp: high(&|run| run.outage_ms.udp),
                tcp_new: high(&|run| run.outage_ms.tcp_new),
                tcp_established: high(&|run| run.outage_ms.tcp_established),
            },
            connections: ConnectionsSummary {
                established: low(&|run| run.connections.established),
                kept: low(&|run| run.connections.kept),
                lost: high(&|run| Some(run.connections.lost as f64)),
                new_ok: low(&|run| run.connections.new_ok),
                new_failed: high(&|run| Some(run.connections.new_failed as f64)),
            },
            churn: ChurnedSummary::of(&churned().collect::<Vec<_>>()),
            wrong_bytes: high(&|run| Some(run.wrong_bytes as f64)),
            two_answering_ms: high(&|run| run.two_answering_ms),
        }
    }
}

impl ChurnedSummary {
    fn of(runs: &[Churned]) -> Option<Self> {
        let of = |figure: fn(&Churned) -> u64| runs.iter().map(move |run| figure(run) as f64);
        let established: f64 = of(|run| run.established).sum();
        Some(Self {
            survived: Spread::of(of(|run| run.survived), f64::min)?,
            lost: Spread::of(of(|run| run.lost), f64::max)?,
            share: of(|run| run.survived).sum::<f64>() / established.max(1.0),
        })
    }
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>, worse: fn(f64, f64) -> f64) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        let worst = values.iter().copied().reduce(worse)?;
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, worst })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::lab::{HEARTBEAT, Mode};

    pub(in crate::lab::drill) fn options(
        fault: Fault,
        software: Software,
        ms: u64,
    ) -> DrillOptions {
        DrillOptions {
            fault,
            software,
            mode: Mode::Proxy,
            advert_interval: Duration::from_millis(ms),
            heartbeat: HEARTBEAT,
            rate: 1,
            connections: 0,
            churn: None,
            times: 1,
            runs: 1,
            binary: "baton".into(),
        }
    }

    fn run(udp: Option<f64>, kept: u64) -> Run {
        Run {
            outage_ms: OutageMs { udp, tcp_new: Some(1.0), tcp_established: None },
            connections: Connections { established: 20, kept, ..Default::default() },
            ..Default::default()
        }
    }

    #[test]
    fn median_and_worst_of_each() {
        let runs = [run(Some(30.0), 20), run(Some(10.0), 18), run(None, 19), run(Some(20.0), 20)];
        let summary = Summary::of(&runs);
        assert_eq!(summary.outage_ms.udp, Some(Spread { median: 20.0, worst: 30.0 }));
        assert_eq!(summary.outage_ms.tcp_established, None);
        assert_eq!(summary.connections.kept, Some(Spread { median: 19.5, worst: 18.0 }));
        assert_eq!(summary.two_answering_ms, None);
        assert_eq!(Summary::of(&[]), Summary::default());
    }

    /// The names are a contract: docs/drills.md, scripts, and drills on VMs.
    #[test]
    fn the_json_has_these_fields_and_no_others() {
        let mut report =
            Report::new(&options(Fault::PowerOff, Software::Baton, 100), vec![run(None, 3)]);
        report.runs[0].steps.push(Step { t_ms: 0.5, node: "relay1".into(), what: "x".into() });
        let spread = serde_json::json!({"median": 3.0, "worst": 3.0});
        let count = |value: f64| serde_json::json!({"median": value, "worst": value});
        let expected = serde_json::json!({
            "fault": "power-off",
            "relays": "baton",
            "mode": "proxy",
            "advert_interval_ms": 100,
            "heartbeat_ms": 10,
            "runs": [{
                "outage_ms": {"udp": null, "tcp_new": 1.0, "tcp_established": null},
                "connections":
                    {"established": 20, "kept": 3, "lost": 0, "new_ok": 0, "new_failed": 0},
                "churn": null,
                "wrong_bytes": 0,
                "two_answering_ms": null,
                "steps": [{"t_ms": 0.5, "node": "relay1", "what": "x"}],
            }],
            "summary": {
                "outage_ms": {"udp": null, "tcp_new": count(1.0), "tcp_established": null},
                "connections": {
                    "established": count(20.0), "kept": spread, "lost": count(0.0),
                    "new_ok": count(0.0), "new_failed": count(0.0),
                },
                "churn": null,
                "wrong_bytes": count(0.0),
                "two_answering_ms": null,
            },
        });
        assert_eq!(serde_json::to_value(&report).unwrap(), expected);
    }

    #[test]
    fn each_takeover_has_its_own_outage() {
        let base = Instant::now();
        let at = |ms| base + Duration::from_millis(ms);
        // Lost: 10 to 12, and 51.
        let udp: Vec<Attempt> = (0..100)
            .map(|ms| Attempt {
                started: at(ms),
                answered: (!(10..=12).contains(&ms) && ms != 51).then(|| at(ms)),
            })
            .collect();
        let takeovers = [(at(9), 4), (at(30), 5), (at(50), 7)];
        let takeovers = takeovers.map(|(at, took)| (at, Duration::from_millis(took)));
        let found = Takeovers::of(&takeovers, &udp).unwrap();
        assert_eq!(found.times, 3);
        assert_eq!(found.took_ms, Spread { median: 5.0, worst: 7.0 });
        assert_eq!(found.outage_ms, Spread { median: 2.0, worst: 4.0 });
        assert_eq!(Takeovers::of(&[], &udp), None);
    }

    #[test]
    fn milliseconds_have_one_decimal() {
        assert_eq!(ms(Duration::from_micros(12_345)), 12.3);
    }
}
