//! Decisions in words, for an operator: a row each, and under those that weighed something what
//! they knew.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use baton_ha::vrrp::router::Reason;

use super::{AdvertKnown, Before, ChannelKnown, Entry, HeartbeatKnown, Known, PeerKnown, What};
use crate::status::{ReplicationStatus, ago, state, why};

/// Two clocks may differ by so much between two entries before it is said: clocks are disciplined.
const JUMP: Duration = Duration::from_secs(2);

/// The entries as a table, in their order; every line ends in a newline.
pub fn render(entries: &[Entry]) -> String {
    let whats: Vec<String> = entries.iter().map(what).collect();
    let widest = whats.iter().map(|what| what.chars().count()).max().unwrap_or(0).max(4);
    let mut text = format!("{:24}  {:widest$}  WHY\n", "TIME (UTC)", "WHAT");
    let mut before: Option<&Entry> = None;
    for (entry, what) in entries.iter().zip(&whats) {
        if entry.missing > 0 {
            let _ = writeln!(text, "  -- {} missing here --", counted(entry.missing, "decision"));
        }
        if let Some(jump) = before.and_then(|before| jump(before, entry)) {
            let _ = writeln!(text, "  -- {jump} --");
        }
        let line = format!("{:24}  {what:widest$}  {}", entry.wall, because(entry));
        let _ = writeln!(text, "{}", clean(line.trim_end()));
        for input in inputs(entry) {
            let _ = writeln!(text, "    {}", clean(&input));
        }
        before = Some(entry);
    }
    text
}

/// Names and reasons come from other machines, and may hold anything.
fn clean(line: &str) -> String {
    line.replace(char::is_control, "\u{FFFD}")
}

/// Whether the clock on the wall was set between two entries of one boot, or the machine was booted.
fn jump(before: &Entry, after: &Entry) -> Option<String> {
    if before.boot != after.boot {
        return Some("the machine was booted".to_owned());
    }
    let wall = |entry: &Entry| humantime::parse_rfc3339(&entry.wall).ok();
    let (from, to) = (wall(before)?, wall(after)?);
    let passed = Duration::from_micros(after.mono_us.saturating_sub(before.mono_us));
    let expected = from.checked_add(passed)?;
    let set = |by: Duration, way: &str| {
        (by >= JUMP).then(|| format!("the clock was set {way} by {}", ago(by.as_secs_f64())))
    };
    match to.duration_since(expected) {
        Ok(by) => set(by, "forward"),
        Err(back) => set(back.duration(), "back"),
    }
}

fn what(entry: &Entry) -> String {
    match &entry.what {
        What::Started { .. } => "started".to_owned(),
        What::Stopping { .. } => "told to stop".to_owned(),
        What::Transition { from, to, .. } if from == to => format!("{} still", state(*to)),
        What::Transition { from, to, .. } => format!("{} to {}", state(*from), state(*to)),
        What::Follows { peer } => format!("follows {peer}"),
        What::Rival { .. } => "stays Active".to_owned(),
        What::Path { path, usable: true, .. } => format!("{path} works again"),
        What::Path { path, usable: false, .. } => format!("{path} works no more"),
        What::ChannelUp { peer } => format!("channel to {peer} up"),
        What::ChannelDown { peer } => format!("channel to {peer} down"),
        What::PeerRefused { peer, .. } => format!("{peer} refused"),
        What::Slept { .. } => "slept".to_owned(),
        What::Waits { .. } => "waits".to_owned(),
        What::Did { .. } => "decides".to_owned(),
        What::Asked { what, .. } => format!("asked: {what}"),
        What::Refused { what, .. } => format!("refused: {what}"),
        What::Unknown => "?".to_owned(),
    }
}

fn because(entry: &Entry) -> String {
    match &entry.what {
        What::Started { version, before } => {
            let before = before.as_ref().map_or_else(String::new, |before| {
                format!("; {}", last_words(before, &entry.wall))
            });
            format!("baton {version}, pid {}{before}", entry.pid)
        }
        What::Stopping { why }
        | What::PeerRefused { why, .. }
        | What::Waits { why }
        | What::Refused { why, .. } => why.clone(),
        What::Transition { reason, fault, .. } => {
            let known = entry.known.as_ref();
            let special = known.and_then(|known| special(*reason, known));
            let why = special.unwrap_or_else(|| why(*reason).to_owned());
            match fault {
                Some(fault) => format!("{why}: {fault}"),
                None => why,
            }
        }
        What::Follows { peer } => {
            let priority = entry.known.as_ref().and_then(|known| {
                let (_, priority) = last_heard(known, peer)?;
                Some(format!(" with priority {priority}"))
            });
            format!("it is heard as Active{}", priority.unwrap_or_default())
        }
        What::Rival { peer, priority } => {
            let own = entry.known.as_ref().map_or(0, |known| known.priority);
            format!("{peer} advertises too, with priority {priority}, and this node has {own}")
        }
        What::Path { why, .. } => why.clone().unwrap_or_default(),
        What::ChannelUp { .. } => "a connection that both proved the cluster's key on".to_owned(),
        What::ChannelDown { peer } => match channel(entry, peer) {
            Some(ChannelKnown::Down { why, by_peer: true, lease_ms, .. }) => {
                format!("{why}: its daemon has ended{}", lease_then(*lease_ms))
            }
            Some(ChannelKnown::Down { why, .. }) => why.clone(),
            _ => String::new(),
        },
        What::Slept { ms: late } => {
            format!("it ran {} later than it wanted to: what came meanwhile is void", ms(*late))
        }
        What::Did { what } => what.clone(),
        What::Asked { by, .. } => format!("by {by}"),
        What::Unknown => "written by a later version of baton".to_owned(),
    }
}

/// What a transition's reason means with the numbers of the moment.
fn special(reason: Reason, known: &Known) -> Option<String> {
    let active = known.active.as_deref();
    match reason {
        Reason::ActiveGone => {
            let active = active?;
            let ended = known.peers.iter().find(|peer| peer.peer == active).and_then(|peer| {
                let ChannelKnown::Down { ms: ago, lease_ms, .. } = &peer.channel else {
                    return None;
                };
                let lease = if *lease_ms > 0.0 {
                    format!("the {} that its lease had left then are over", ms(*lease_ms))
                } else {
                    "its lease was over by then".to_owned()
                };
                Some(format!(": its connection closed {} before, and {lease}", ms(*ago)))
            });
            let ended = ended.unwrap_or_else(|| ", and its lease".to_owned());
            Some(format!("{active}'s daemon ended{ended}"))
        }
        Reason::ActiveDown => match active {
            Some(active) => {
                let heard = last_heard(known, active);
                let heard = heard.map_or_else(String::new, |(ago, _)| format!(" for {}", ms(ago)));
                let wait = known.active_down_ms.map_or_else(String::new, |wait| {
                    format!("; this node waits {} (Active_Down_Interval)", ms(wait))
                });
                Some(format!("nothing was heard of {active}{heard}{wait}"))
            }
            None => Some("no node was heard as Active".to_owned()),
        },
        Reason::ActiveYielded => {
            let (peer, ago) = last_of(known, |priority| priority == 0)?;
            Some(format!("{peer} yielded: priority 0 came {} before", ms(ago)))
        }
        Reason::Preempted => {
            let active = active?;
            let (_, priority) = last_heard(known, active)?;
            Some(format!("{active} has priority {priority}, this node {}", known.priority))
        }
        Reason::Outranked => {
            let (peer, _) = last_of(known, |priority| priority > 0)?;
            let (_, priority) = last_heard(known, &peer)?;
            Some(format!("{peer} advertises priority {priority}"))
        }
        _ => None,
    }
}

fn last_words(before: &Before, now: &str) -> String {
    let time = |text: &str| humantime::parse_rfc3339(text).ok();
    let span = |from: SystemTime, to: SystemTime| to.duration_since(from).ok();
    let ago = match (time(&before.wall), time(now)) {
        (Some(from), Some(to)) => span(from, to).map(|span| ago(span.as_secs_f64())),
        (_, _) => None,
    };
    let last = ago.map_or_else(String::new, |ago| format!(", its last word {ago} before"));
    let state = before.state.map_or_else(String::new, |was| format!(", {}", state(was)));
    match (before.said_so, before.rebooted) {
        (true, false) => format!("the one before (pid {}) was stopped{last}", before.pid),
        (true, true) => format!("the one before was stopped, and the machine booted{last}"),
        (false, false) => format!(
            "the one before (pid {}{state}) ended without a word, killed or crashed{last}",
            before.pid
        ),
        (false, true) => {
            format!("the machine was booted without the one before being stopped{state}{last}")
        }
    }
}

/// What a decision knew, a line for each thing.
fn inputs(entry: &Entry) -> Vec<String> {
    let weighs = matches!(
        entry.what,
        What::Transition { .. }
            | What::Rival { .. }
            | What::Slept { .. }
            | What::Waits { .. }
            | What::ChannelDown { .. }
    ) && !matches!(entry.what, What::Transition { reason: Reason::Startup, .. });
    let Some(known) = entry.known.as_ref().filter(|_| weighs) else { return Vec::new() };
    let mut inputs: Vec<(String, String)> =
        known.peers.iter().map(|peer| (peer.peer.clone(), peer_words(peer))).collect();
    if let Some(stranger) = &known.stranger {
        let (ago, priority) = (ms(stranger.ms), stranger.priority);
        let words = format!("no peer; advert {ago} before (priority {priority})");
        inputs.push((stranger.address.clone(), words));
    }
    if let Some(flows) = &entry.flows {
        inputs.push(("flows".to_owned(), flow_words(flows)));
    }
    if let Some(health) = &entry.health {
        inputs.push(("health".to_owned(), health.to_string()));
    }
    inputs.push(("here".to_owned(), own_words(known)));
    let widest = inputs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    inputs.into_iter().map(|(name, words)| format!("{name:widest$}  {words}")).collect()
}

fn peer_words(peer: &PeerKnown) -> String {
    let mut parts = Vec::new();
    if peer.adverts.is_empty() {
        parts.push("no advert ever heard".to_owned());
    } else {
        parts.push(format!("last advert {}", advert_words(&peer.adverts)));
    }
    if let Some(beat) = &peer.heartbeat {
        let HeartbeatKnown { ms: ago, epoch, lease_ms, priority, silence_ms } = beat;
        let role = match priority {
            Some(priority) => {
                format!("Active with priority {priority}, lease left {}", ms(*lease_ms))
            }
            None => "not Active".to_owned(),
        };
        let heard = format!("it had heard this node {} before that", ms(*silence_ms));
        parts.push(format!("heartbeat {} before (epoch {epoch}, {role}; {heard})", ms(*ago)));
    }
    match &peer.channel {
        ChannelKnown::Never => {}
        ChannelKnown::Up { ms: since } => parts.push(format!("channel up for {}", ms(*since))),
        ChannelKnown::Down { ms: ago, by_peer: true, .. } => {
            parts.push(format!("channel closed by it {} before", ms(*ago)));
        }
        ChannelKnown::Down { ms: ago, why, .. } => {
            parts.push(format!("channel down for {}: {why}", ms(*ago)));
        }
    }
    parts.join("; ")
}

/// `83 ms before on front, back (priority 200)`: those that came together are told together.
fn advert_words(adverts: &[AdvertKnown]) -> String {
    let mut groups: Vec<(String, u8, Vec<&str>)> = Vec::new();
    for AdvertKnown { path, ms: ago, priority } in adverts {
        let ago = ms(*ago);
        match groups.iter_mut().find(|(known, p, _)| *known == ago && p == priority) {
            Some((.., paths)) => paths.push(path),
            None => groups.push((ago, *priority, vec![path])),
        }
    }
    let group = |(ago, priority, paths): &(String, u8, Vec<&str>)| {
        format!("{ago} before on {} (priority {priority})", paths.join(", "))
    };
    groups.iter().map(group).collect::<Vec<_>>().join(", ")
}

/// As `status` has it, in one line.
fn flow_words(flows: &ReplicationStatus) -> String {
    let lines = flows.lines();
    let plain = lines.iter().map(|line| line.trim_start_matches("! "));
    plain.collect::<Vec<_>>().join("; ")
}

fn own_words(known: &Known) -> String {
    let mut parts = vec![format!("epoch {}, priority {}", known.epoch, known.priority)];
    if let Some(lease) = known.lease_ms {
        parts.push(format!("own lease left {}", ms(lease)));
    }
    let (works, broken): (Vec<_>, Vec<_>) = known.paths.iter().partition(|path| path.usable);
    let names = |paths: Vec<&super::PathKnown>| {
        paths.iter().map(|path| path.path.as_str()).collect::<Vec<_>>().join(", ")
    };
    if !works.is_empty() {
        parts.push(format!("paths that work: {}", names(works)));
    }
    if !broken.is_empty() {
        parts.push(format!("that do not: {}", names(broken)));
    }
    parts.join("; ")
}

fn channel<'a>(entry: &'a Entry, peer: &str) -> Option<&'a ChannelKnown> {
    let known = entry.known.as_ref()?;
    Some(&known.peers.iter().find(|known| known.peer == peer)?.channel)
}

fn lease_then(lease_ms: f64) -> String {
    if lease_ms > 0.0 {
        format!(", its lease had {} left then", ms(lease_ms))
    } else {
        String::new()
    }
}

/// How long ago a node was last heard by any way, and its priority then.
fn last_heard(known: &Known, node: &str) -> Option<(f64, u8)> {
    heard(known)
        .filter(|(name, ..)| *name == node)
        .map(|(_, ago, priority)| (ago, priority))
        .min_by(|(a, _), (b, _)| a.total_cmp(b))
}

/// Who was heard last with a priority like that, and how long ago.
fn last_of(known: &Known, wanted: impl Fn(u8) -> bool) -> Option<(String, f64)> {
    let heard = heard(known).filter(|(.., priority)| wanted(*priority));
    let last = heard.min_by(|(_, a, _), (_, b, _)| a.total_cmp(b));
    last.map(|(name, ago, _)| (name.to_owned(), ago))
}

/// Every advert, and every heartbeat that says as much.
fn heard(known: &Known) -> impl Iterator<Item = (&str, f64, u8)> {
    let peers = known.peers.iter().flat_map(|peer| {
        let adverts = peer.adverts.iter().map(|advert| (advert.ms, advert.priority));
        let beats = peer.heartbeat.iter().filter_map(|beat| Some((beat.ms, beat.priority?)));
        adverts.chain(beats).map(|(ago, priority)| (peer.peer.as_str(), ago, priority))
    });
    let stranger = known.stranger.iter();
    peers.chain(stranger.map(|node| (node.address.as_str(), node.ms, node.priority)))
}

/// Milliseconds for people: `7.4 ms`, `83 ms`, `1.2 s`.
fn ms(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.1} ms") } else { ago(ms / 1e3) }
}

fn counted(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

#[cfg(test)]
mod tests {
    use baton_ha::vrrp::router::State;

    use super::*;
    use crate::explain::read::tests::entry;
    use crate::explain::{Backends, PathKnown, Seen};

    fn taken(reason: Reason) -> Entry {
        let advert = |path: &str, ms| AdvertKnown { path: path.into(), ms, priority: 200 };
        let heartbeat = HeartbeatKnown {
            ms: 12.4,
            epoch: 4,
            lease_ms: 192.0,
            priority: Some(200),
            silence_ms: 9.0,
        };
        let closed = "it has closed the connection".to_owned();
        let known = Known {
            state: State::Active,
            epoch: 5,
            priority: 150,
            lease_ms: Some(27.5),
            active: Some("relay1".into()),
            active_down_ms: Some(321.9),
            paths: vec![
                PathKnown { path: "front".into(), usable: true },
                PathKnown { path: "back".into(), usable: false },
            ],
            peers: vec![PeerKnown {
                peer: "relay1".into(),
                adverts: vec![advert("front", 83.2), advert("back", 83.4)],
                heartbeat: Some(heartbeat),
                channel: ChannelKnown::Down { ms: 12.0, by_peer: true, lease_ms: 7.5, why: closed },
            }],
            stranger: None,
        };
        let seen = Seen { peer: "relay1".into(), up: 5, of: 6 };
        Entry {
            what: What::Transition { from: State::Backup, to: State::Active, reason, fault: None },
            known: Some(known),
            health: Some(Backends { up: 6, of: 6, peers: vec![seen] }),
            ..entry("this", 1, "2026-11-23T03:12:07.123Z")
        }
    }

    #[test]
    fn a_takeover_is_told_with_what_was_known() {
        let expected = "\
TIME (UTC)                WHAT              WHY
2026-11-23T03:12:07.123Z  Backup to Active  relay1's daemon ended: its connection closed 12 ms before, and the 7.5 ms that its lease had left then are over
    relay1  last advert 83 ms before on front, back (priority 200); heartbeat 12 ms before (epoch 4, Active with priority 200, lease left 192 ms; it had heard this node 9.0 ms before that); channel closed by it 12 ms before
    health  6 of 6 backends up here, 5 of 6 on relay1
    here    epoch 5, priority 150; own lease left 28 ms; paths that work: front; that do not: back
";
        assert_eq!(render(&[taken(Reason::ActiveGone)]), expected);
        for (reason, expected) in [
            (
                Reason::ActiveDown,
                "nothing was heard of relay1 for 12 ms; this node waits 322 ms \
                 (Active_Down_Interval)",
            ),
            (Reason::Preempted, "relay1 has priority 200, this node 150"),
            (Reason::Outranked, "relay1 advertises priority 200"),
            (Reason::Takeover, "the operator said takeover"),
        ] {
            let text = render(&[taken(reason)]);
            let row = text.lines().nth(1).unwrap_or_default();
            assert!(row.ends_with(expected), "{row}");
        }
    }

    #[test]
    fn a_clock_that_was_set_a_boot_and_gaps_are_told_between_the_rows() {
        let rows = [
            entry("this", 100, "2026-11-23T03:12:00.000Z"),
            entry("this", 101, "2026-11-23T03:12:02.500Z"),
            entry("this", 102, "2026-11-23T02:12:03.500Z"),
            Entry { missing: 3, ..entry("this", 103, "2026-11-23T03:12:04.500Z") },
            entry("that", 5, "2026-11-23T03:13:00.000Z"),
        ];
        let text = render(&rows);
        let between: Vec<_> = text.lines().filter(|line| line.contains("--")).collect();
        assert_eq!(
            between,
            [
                "  -- the clock was set back by 1h 0m --",
                "  -- 3 decisions missing here --",
                "  -- the clock was set forward by 1h 0m --",
                "  -- the machine was booted --",
            ]
        );
        assert_eq!(text.lines().count(), 1 + rows.len() + between.len(), "in the file's order");
    }

    #[test]
    fn what_others_sent_can_not_touch_the_terminal() {
        let what = What::Waits { why: "\u{1b}[2Jnothing\nnew".into() };
        let text = render(&[Entry { what, ..entry("this", 1, "2026-11-23T03:12:07.123Z") }]);
        assert!(!text.contains('\u{1b}') && text.lines().count() == 2, "{text:?}");
    }
}
