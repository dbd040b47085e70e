//! The status as text, for people: tables that line up, and words for what the JSON has as names.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use baton_ha::vrrp::router::{Reason, State};
use serde::Serialize;

use super::{
    BackendStatus, DatapathStatus, Election, GaveWayStatus, HookStatus, JournalStatus, PeerState,
    ReplicationStatus, ServiceStatus, SettingStatus, SettingsStatus, Status, WaitingStatus,
};
use crate::datapath::counters::Traffic;
use crate::pool::Admin;
use crate::table::Table;

impl Status {
    /// The status for people.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "{} of cluster {}   baton {}, pid {}, up {}",
            self.node,
            self.cluster,
            self.version,
            self.pid,
            ago(self.uptime_s)
        )?;
        match &self.election {
            Some(election) => election.write(text)?,
            None => writeln!(text, "No VIPs, so no election: this node stands alone.")?,
        }
        if self.election.is_some() && self.datapath.is_none() {
            writeln!(
                text,
                "! no gate in the kernel (see the log): if the daemon dies or freezes, the guard \
                 process alone silences this node"
            )?;
        }
        if let Some(datapath) = &self.datapath {
            datapath.write(text)?;
        }
        if let Some(replication) = &self.replication {
            replication.write(text)?;
        }
        if let Some(GaveWayStatus { to, here, there, ago_s }) = &self.gave_way {
            let (ago, there) = (ago(*ago_s), counted(*there as u64, "backend"));
            writeln!(text, "! gave way {ago} ago: {to} saw {there} up, this node {here} of them")?;
        }
        self.settings.write(text)?;
        if let Some(journal) = &self.journal {
            journal.write(text)?;
        }
        for service in &self.services {
            service.write(text)?;
        }
        Ok(())
    }
}

impl SettingsStatus {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        if let Some(why) = &self.trouble {
            let file = self.file.display();
            writeln!(text, "! what operators set is not kept: {file} {why}")?;
        }
        for SettingStatus { service, backend, set, by } in &self.elsewhere {
            writeln!(
                text,
                "! {backend} behind {service}: {set} (said on {by}), and not in this node's file"
            )?;
        }
        Ok(())
    }
}

impl ReplicationStatus {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        self.lines().iter().try_for_each(|line| match line.strip_prefix("! ") {
            Some(line) => writeln!(text, "! Flows: {line}"),
            None => writeln!(text, "Flows: {line}"),
        })
    }
}

impl JournalStatus {
    /// What an operator is to know of it: nothing, if all is well.
    fn write(&self, text: &mut String) -> std::fmt::Result {
        let file = self.file.display();
        if let Some(why) = &self.trouble {
            writeln!(text, "! the journal of decisions {file} can't be written: {why}")?;
        }
        if self.lost > 0 {
            let lost = counted(self.lost, "decision");
            writeln!(text, "! {lost} missing in the journal {file}")?;
        }
        Ok(())
    }
}

impl DatapathStatus {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        let gate = word(&self.gate);
        let Self { flows, max_flows, half_open_flows, max_half_open_flows, .. } = self;
        write!(
            text,
            "\nDatapath: gate {gate}; {flows} of {max_flows} flows, {half_open_flows} of \
             {max_half_open_flows} half-open"
        )?;
        if self.half_open_pushed_out > 0 {
            write!(text, " ({} pushed out)", self.half_open_pushed_out)?;
        }
        match self.adopted {
            0 => writeln!(text)?,
            adopted => writeln!(text, ", {adopted} adopted after takeovers")?,
        }
        if self.affinities > 0 {
            writeln!(
                text,
                "  {} of {} clients keep to a backend",
                self.affinities, self.max_affinities
            )?;
        }
        if self.hooks.is_empty() {
            writeln!(text, "  attached nowhere")?;
        }
        for HookStatus { interface, hook, why } in &self.hooks {
            writeln!(text, "  {interface}: {} ({why})", word(hook))?;
        }
        Ok(())
    }
}

impl Election {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "{} since {} ({} ago): {}",
            state(self.state),
            self.since,
            ago(self.since_s),
            why(self.reason)
        )?;
        write!(
            text,
            "VRID {}, priority {}, an advert every {} ms, {} so far",
            self.vrid,
            self.priority,
            self.advert_interval_ms,
            counted(self.takeovers, "takeover")
        )?;
        if self.advertised_priority != self.priority {
            write!(
                text,
                "; held by an operator's takeover (advertises {}; `baton yield` ends it)",
                self.advertised_priority
            )?;
        }
        writeln!(text)?;
        if let Some(waiting) = &self.waiting {
            waiting.write(text)?;
        }
        if let Err(why) = &self.realtime {
            writeln!(text, "! the HA thread has no real-time priority: {why}")?;
        }
        self.write_peers(text)?;
        self.write_vips(text)?;
        self.write_paths(text)?;
        self.write_drops(text)
    }

    fn write_peers(&self, text: &mut String) -> std::fmt::Result {
        let mut table =
            Table::new(&["PEER", "ADDRESSES", "STATE", "LAST ADVERT", "PRIORITY", "CHANNEL"]);
        for peer in &self.peers {
            let addresses: Vec<_> = peer.addresses.iter().map(ToString::to_string).collect();
            table.row([
                peer.name.clone().unwrap_or_else(|| "(stranger)".into()),
                addresses.join(" "),
                match peer.state {
                    PeerState::Active => "Active",
                    PeerState::Yielded => "yielded: Backup, or gone",
                    PeerState::Silent => "silent: Backup, or gone",
                    PeerState::NeverHeard => "never heard: Backup, or gone",
                }
                .into(),
                peer.heard_s.map_or("-".into(), |seconds| format!("{} ago", ago(seconds))),
                peer.priority.map_or("-".into(), |priority| priority.to_string()),
                match &peer.channel {
                    None => "-".into(),
                    Some(channel) => match channel.up_s {
                        Some(seconds) => format!("up {}", ago(seconds)),
                        None => "down".into(),
                    },
                },
            ]);
        }
        write!(text, "\n{table}")?;
        for peer in &self.peers {
            if let Some(why) = peer.channel.as_ref().and_then(|channel| channel.why.as_ref()) {
                let name = peer.name.as_deref().unwrap_or("?");
                writeln!(text, "! no peer channel to {name}: {why}")?;
            }
        }
        Ok(())
    }

    fn write_vips(&self, text: &mut String) -> std::fmt::Result {
        let mut table = Table::new(&["VIP", "INTERFACE", "HERE", "PUT BACK"]);
        for vip in &self.vips {
            table.row([
                vip.address.clone(),
                vip.interface.clone(),
                if vip.held { "yes" } else { "no" }.into(),
                vip.restored.to_string(),
            ]);
        }
        write!(text, "\n{table}")
    }

    fn write_paths(&self, text: &mut String) -> std::fmt::Result {
        let mut table = Table::new(&["PATH", "OUR ADDRESS", "SENT", "RECEIVED", "USABLE"]);
        for path in &self.paths {
            table.row([
                path.interface.clone(),
                path.primary.map_or("-".into(), |address| address.to_string()),
                path.sent.to_string(),
                path.received.to_string(),
                match &path.usable {
                    Ok(()) => "yes".into(),
                    Err(why) => format!("no: {why}"),
                },
            ]);
        }
        write!(text, "\n{table}")
    }

    fn write_drops(&self, text: &mut String) -> std::fmt::Result {
        write_counted(text, "counted", &self.counters)
    }
}

impl WaitingStatus {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        let Self { active, waited_s, left_s, why, share } = self;
        let why = why.as_deref().unwrap_or("it was just asked");
        let waited = ago(*waited_s);
        match (left_s, share) {
            (Some(_), Some(share)) => {
                let percent = (share * 100.0).floor();
                writeln!(text, "waits to preempt {active}: snapshot {percent} %, {waited}")
            }
            (Some(_), None) => writeln!(text, "waits to preempt {active}: {why}, {waited}"),
            (None, _) => writeln!(
                text,
                "! leaves {active} Active, though its priority is lower: {why}, after a wait of \
                 preempt_wait; `baton takeover --force` does not wait"
            ),
        }
    }
}

impl ServiceStatus {
    fn write(&self, text: &mut String) -> std::fmt::Result {
        write!(
            text,
            "\nService {}: {}/{}, {}, {}; ",
            self.name,
            self.listen,
            word(&self.protocol),
            word(&self.mode),
            word(&self.scheduler),
        )?;
        let kernel = self.mode.is_in_kernel();
        if kernel {
            let Traffic { bytes_in, bytes_out, .. } = self.traffic.unwrap_or_default();
            let (came, went) = (size(bytes_in), size(bytes_out));
            let flows = counted(self.connections.into(), "flow");
            writeln!(text, "{flows}, {came} in, {went} out")?;
        } else {
            writeln!(text, "{} of {} connections", self.connections, self.max_connections)?;
        }
        let middle =
            if kernel { ["FLOWS", "TOTAL", "IN/OUT"] } else { ["CONNS", "TOTAL", "FAILED"] };
        let headings = ["BACKEND", "ADDRESS", "WEIGHT", "HEALTH", "FOR"].into_iter().chain(middle);
        let mut table = Table::new(&headings.chain(["WHY"]).collect::<Vec<_>>());
        for backend in &self.backends {
            let health = match (backend.admin, &backend.admin_by) {
                (Admin::Enabled, _) => backend.health.to_string(),
                (admin, None) => format!("{}, {admin}", backend.health),
                (admin, Some(by)) => format!("{}, {admin} on {by}", backend.health),
            };
            table.row([
                backend.name.clone(),
                backend.address.to_string(),
                match backend.file_weight {
                    None => backend.weight.to_string(),
                    Some(file) => format!("{} (file: {file})", backend.weight),
                },
                health,
                ago(backend.since_s),
                backend.connections.to_string(),
                backend.total.to_string(),
                match backend.traffic {
                    Some(traffic) => {
                        format!("{} / {}", size(traffic.bytes_in), size(traffic.bytes_out))
                    }
                    None if kernel => "-".into(),
                    None => backend.failed.to_string(),
                },
                backend.reason.clone(),
            ]);
        }
        write!(text, "{table}")?;
        self.backends.iter().try_for_each(|backend| backend.write_views(text))?;
        write_counted(text, "  counted", &self.counters)
    }
}

impl BackendStatus {
    /// What nodes see, where they do not see the same.
    fn write_views(&self, text: &mut String) -> std::fmt::Result {
        let others = self.seen_by.iter().filter(|(_, sees)| **sees != self.sees);
        let others: Vec<_> = others.map(|(peer, sees)| format!("{sees} for {peer}")).collect();
        if self.sees == self.health && others.is_empty() {
            return Ok(());
        }
        write!(text, "  ! {}: this node sees it {}", self.name, self.sees)?;
        if self.sees != self.health {
            write!(text, ", and selects by the Active's word: {}", self.health)?;
        }
        if !others.is_empty() {
            write!(text, "; it is {}", others.join(", "))?;
        }
        writeln!(text)
    }
}

/// What is not zero, on one line.
fn write_counted(
    text: &mut String,
    title: &str,
    counters: &BTreeMap<String, u64>,
) -> std::fmt::Result {
    let some: Vec<_> =
        counters.iter().filter(|(_, n)| **n > 0).map(|(name, n)| format!("{name} {n}")).collect();
    if some.is_empty() { Ok(()) } else { writeln!(text, "{title}: {}", some.join(", ")) }
}

pub(crate) fn state(state: State) -> &'static str {
    match state {
        State::Initialize => "Initialize",
        State::Backup => "Backup",
        State::Active => "Active",
    }
}

/// The reason in words.
pub(crate) fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::Startup => "it started",
        Reason::AddressOwner => "it started as the address owner (priority 255)",
        Reason::ActiveDown => "no advert came within Active_Down_Interval",
        Reason::ActiveGone => "the Active's daemon ended, and its lease",
        Reason::ActiveSilent => "the Active's lease ended, and nothing of it was heard since",
        Reason::ActiveYielded => "the Active yielded",
        Reason::Preempted => "the Active had a lower priority",
        Reason::Outranked => "another node outranks it",
        Reason::Unheard => "another node claims and does not hear it",
        Reason::Takeover => "the operator said takeover",
        Reason::Yield => "the operator said yield",
        Reason::Fault => "it can't carry its VIPs",
        Reason::Recovered => "it can carry its VIPs again",
        Reason::Stalled => "it was frozen for longer than a Backup waits",
        Reason::HandedOver => "it gave the VIPs to a node that asked for them",
        Reason::Shutdown => "it stops",
        Reason::Deposed => "another node has become Active since",
    }
}

/// The word that serde writes for a unit variant.
pub(crate) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "?".into(),
    }
}

pub(super) fn counted(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// Bytes: `999 B`, `1.2 kB`, `340.0 MB`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut size = bytes as f64 / 1e3;
    let mut units = UNITS.into_iter();
    let mut unit = units.next().unwrap_or_default();
    // 999.95 would be shown as 1000.0.
    while size >= 999.95
        && let Some(larger) = units.next()
    {
        size /= 1e3;
        unit = larger;
    }
    format!("{size:.1} {unit}")
}

/// A time span in at most two units: `420 ms`, `3.2 s`, `4m 10s`, `3h 2m`, `2d 4h`.
pub fn ago(seconds: f64) -> String {
    // Saturating, and an operator's clock does not run for 10^19 seconds.
    let whole = seconds as u64;
    match whole {
        0 => format!("{:.0} ms", seconds * 1e3),
        1..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{}m {}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h {}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d {}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_at_most_two_units() {
        for (seconds, expected) in [
            (0.0, "0 ms"),
            (0.42, "420 ms"),
            (3.21, "3.2 s"),
            (250.0, "4m 10s"),
            (10_920.0, "3h 2m"),
            (187_200.0, "2d 4h"),
        ] {
            assert_eq!(ago(seconds), expected);
        }
    }

    #[test]
    fn a_size_has_at_most_three_digits_before_the_point() {
        for (bytes, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_950, "1.0 MB"),
            (340_000_000, "340.0 MB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }
}
