//! What happened when: everything that was seen, as one list in the order of time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::fault::{Deed, Hand};
use super::logs::LogLine;
use super::report::{Step, ms};
use super::wire::Sightings;
use super::{Seen, outage};
use crate::lab::topology::{Mac, Role, Topology};

/// Steps since the fault, in order.
pub(super) fn steps(
    seen: &Seen,
    hand: &Hand,
    deed: &Deed,
    later: &[Deed],
    logs: &[LogLine],
) -> Vec<Step> {
    let mut list = List { since: deed.at, steps: Vec::new() };
    list.push(deed.at, &deed.node, &deed.what);
    for deed in later {
        list.push(deed.at, &deed.node, &deed.what);
    }
    for line in logs {
        list.push(line.at, &line.node, &line.what);
    }
    for change in &seen.addresses {
        let what = if change.held { "VIP claimed: its kernel has it" } else { "VIP gone" };
        list.push(change.at, &change.node, what);
    }
    for (sightings, names) in seen.wire.iter().zip(&FAMILIES) {
        list.announcements(sightings, names, &hand.cast().active);
        list.answers(sightings, names);
    }
    list.traffic(seen);
    list.losses(seen);
    list.done()
}

/// How the two families of [`Seen::wire`] call things.
struct Names {
    vip: &'static str,
    announcement: &'static str,
    question: &'static str,
}

const FAMILIES: [Names; 2] = [
    Names { vip: "VIP", announcement: "gratuitous ARP", question: "ARP" },
    Names { vip: "IPv6 VIP", announcement: "unsolicited NA", question: "Neighbor Solicitations" },
];

struct List {
    since: Instant,
    steps: Vec<(Instant, Step)>,
}

impl List {
    /// Notes a step; what was before the fault is left out.
    fn push(&mut self, at: Instant, node: &str, what: &str) {
        if at >= self.since {
            let t_ms = ms(at - self.since);
            let step = Step { t_ms, node: node.to_owned(), what: what.to_owned() };
            self.steps.push((at, step));
        }
    }

    /// The first announcement of every node that was not the last to announce.
    fn announcements(&mut self, seen: &Sightings, names: &Names, active: &str) {
        let mut last = active.to_owned();
        for (at, mac) in &seen.announcements {
            let node = owner(*mac);
            if node != last && *at >= self.since {
                let Names { vip, announcement, .. } = names;
                self.push(*at, &node, &format!("{vip} announced ({announcement}, client's wire)"));
                last = node;
            }
        }
    }

    /// When another node, or two at once, began to answer for the VIP.
    fn answers(&mut self, seen: &Sightings, names: &Names) {
        let Names { vip, question, .. } = names;
        let mut before = seen.probes.iter().filter(|probe| probe.sent < self.since);
        let mut last = before.next_back().map(|probe| probe.answers.clone()).unwrap_or_default();
        let mut steps = Vec::new();
        for probe in seen.probes.iter().filter(|probe| probe.sent >= self.since) {
            let mut answers = probe.answers.clone();
            answers.sort();
            // A single probe without an answer may be a matter of timing.
            if answers.is_empty() || answers == last {
                continue;
            }
            let nodes: Vec<String> = answers.iter().map(|mac| owner(*mac)).collect();
            steps.push((probe.sent, nodes));
            last = answers;
        }
        for (at, nodes) in steps {
            let who = if nodes.len() == 1 { "alone answers" } else { "both answer" };
            self.push(at, &nodes.join("+"), &format!("{who} {question} for the {vip}"));
        }
    }

    /// Beginning and end of the outages.
    fn traffic(&mut self, seen: &Seen) {
        for (name, attempts) in [("UDP probe", &seen.udp), ("new TCP connection", &seen.fresh)] {
            let Some(outage) = outage::longest(attempts, self.since) else { continue };
            self.push(
                outage.from.max(self.since),
                "client",
                &format!("last {name} before the outage"),
            );
            if let Some(answer) = outage.answer {
                self.push(answer, "client", &format!("first {name} through again"));
            }
        }
    }

    /// How and when long-lived connections were lost.
    fn losses(&mut self, seen: &Seen) {
        let mut losses: BTreeMap<_, Vec<Instant>> = BTreeMap::new();
        for (at, loss) in seen.steady.iter().filter_map(|fate| fate.lost) {
            losses.entry(loss).or_default().push(at);
        }
        for (loss, times) in losses {
            let (Some(first), Some(last)) = (times.iter().min(), times.iter().max()) else {
                continue;
            };
            let count = times.len();
            let until = match *last - *first {
                Duration::ZERO => String::new(),
                spread => format!(", the last {} ms later", ms(spread)),
            };
            let what = format!("{count} long-lived connections {}{until}", loss.words());
            // A connection can be lost only by what came before: the fault.
            self.push((*first).max(self.since), "client", &what);
        }
    }

    fn done(mut self) -> Vec<Step> {
        self.steps.sort_by_key(|(at, _)| *at);
        self.steps.into_iter().map(|(_, step)| step).collect()
    }
}

/// The relay with that address; the address itself, if it is none of the lab's.
fn owner(mac: Mac) -> String {
    // Addresses are the same in every lab.
    let topology = Topology::new("", crate::lab::topology::MAX_RELAYS);
    match topology.owner_of(mac) {
        Some(node) if node.role == Role::Relay => node.name.clone(),
        _ => mac.to_string(),
    }
}
