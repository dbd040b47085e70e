//! `[election]`: who is Active.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use baton_ha::config::{AnnounceConfig, ChecksumForm, HaConfig, Vip};
use baton_ha::vrrp::{AdverInterval, Preempt, Priority, Vrid};
use toml::Spanned;
use toml::de::DeValue;

use super::Node;
use super::cluster::Cluster;
use super::paths::{self, Kind};
use super::section::{ANNOUNCE, At, ELECTION, Section};
use super::value::{self, Read, complain};
use super::vips;

const INTERVAL: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_millis(40_950);
const VALID_LFT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
const STARTUP_HOLD: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);
const PREEMPT_WAIT: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(3600);
const MOST_SICK_AFTER: Duration = Duration::from_secs(3600);
/// Longer than the checks of two nodes are apart where a backend dies for both, by default.
const DEFAULT_SICK_AFTER: Duration = Duration::from_secs(10);
/// Most interfaces on which adverts travel.
const MOST_INTERFACES: usize = 64;
/// Most announcements after a claim.
const MOST_ANNOUNCEMENTS: usize = 32;

/// `[election]` with all that it decides on.
#[derive(Debug, Default)]
pub(super) struct Election {
    /// `None` without VIPs, and where something is wrong.
    pub(super) ha: Option<HaConfig>,
    /// `interfaces`, where the file has it.
    pub(super) listed: Vec<At<String>>,
    /// `sick_after`; `None`: never.
    pub(super) sick_after: Option<Duration>,
}

/// The election; what is wrong is reported.
pub(super) fn read(
    root: &Section<'_>,
    node: Option<&Node>,
    cluster: &Cluster,
    vips: &[vips::Named],
) -> Election {
    let report = root.report;
    let section = root.section("election", &ELECTION);
    let balances_alone = root.is_absent_or_empty("vips");
    if balances_alone {
        if let Some(election) = &section {
            let what = "there is an [election] and nothing to elect for: the file has no VIPs";
            let hint =
                "write [[vips]], or remove [election] to balance on this node's own addresses";
            report.error(&election.span, what, hint);
        } else if !cluster.peers.is_empty() {
            let span = root.key_span("cluster").unwrap_or(0..0);
            let what = "there are peers and no VIPs: this node takes part in no election";
            report.warning(&span, what, "write [[vips]] and [election], or remove the peers");
        }
    } else if section.is_none() && root.key_span("election").is_none() {
        let span = root.key_span("vips").unwrap_or(0..0);
        let hint = "write [election] with `vrid = 51` under it";
        report.error(&span, "there are VIPs and no [election] for them", hint);
    }
    let Some(section) = section else { return Election::default() };
    let settings = Settings::read(&section);
    let sick_after = Some(settings.sick_after).filter(|after| !after.is_zero());
    let vips: Vec<Vip> = vips.iter().map(|named| named.vip.clone()).collect();
    let carrying = carrying(&vips);
    let listed = listed(&section, &carrying);
    // What paths are complained of follows from all that is above: it means something only where
    // that is right.
    let (Some(node), Some(vrid), false) =
        (node, settings.vrid, balances_alone || report.any_error())
    else {
        return Election { ha: None, listed, sick_after };
    };
    let interfaces = match listed.is_empty() {
        true => carrying,
        false => listed.iter().map(|at| at.value.clone()).collect(),
    };
    let paths = paths::of(&section, settings.transport, &interfaces, &vips, &cluster.peers);
    let ha = HaConfig {
        node: node.name.clone(),
        vrid,
        priority: settings.priority,
        advert_interval: settings.advert_interval,
        preempt: settings.preempt,
        startup_hold: settings.startup_hold,
        preempt_wait: settings.preempt_wait,
        checksum: settings.checksum,
        paths,
        vips,
        peers: cluster.peers.clone(),
        announce: settings.announce,
        valid_lft: settings.valid_lft,
        realtime: settings.realtime,
        // The key is in a file of its own, read when the daemon starts.
        channel: None,
    };
    Election { ha: Some(ha), listed, sick_after }
}

/// The keys of `[election]` that stand for themselves.
struct Settings {
    vrid: Option<Vrid>,
    priority: Priority,
    preempt: Preempt,
    preempt_wait: Duration,
    startup_hold: Duration,
    advert_interval: AdverInterval,
    transport: Kind,
    checksum: ChecksumForm,
    valid_lft: Duration,
    realtime: bool,
    sick_after: Duration,
    announce: AnnounceConfig,
}

impl Settings {
    fn read(section: &Section<'_>) -> Self {
        let vrid = section.require("vrid", "51", value::integer(1..=u8::MAX));
        let priority = section.take("priority", value::integer(1..=u8::MAX));
        let preempt = section.take("preempt", value::boolean);
        let preempt_wait = section.take("preempt_wait", value::duration(PREEMPT_WAIT));
        let startup_hold = section.take("startup_hold", value::duration(STARTUP_HOLD));
        let advert_interval = section.take("advert_interval", advert_interval);
        let sick_after =
            section.take("sick_after", value::duration(Duration::ZERO..=MOST_SICK_AFTER));
        let transport = section.take(
            "transport",
            value::choice(&[("multicast", Kind::Multicast), ("unicast", Kind::Unicast)]),
        );
        let checksum = section.take(
            "checksum",
            value::choice(&[
                ("plain", ChecksumForm::Plain),
                ("pseudo-header", ChecksumForm::PseudoHeader),
            ]),
        );
        let valid_lft = section.take("valid_lft", valid_lft);
        let realtime = section.take("realtime", value::boolean);

        if let Some(At { value: 254, span }) = &priority {
            section.report.warning(
                span,
                "priority 254 is what a node advertises after `baton takeover`, so none can be \
                 taken over from this one",
                "write a number from 1 to 253, or 255 on the node whose own address the VIP is",
            );
        }
        let advert_interval = advert_interval.map_or_else(default_interval, |at| at.value);
        Self {
            vrid: vrid.and_then(|at| Vrid::new(at.value)),
            priority: Priority::new(priority.map_or(100, |at| at.value)),
            preempt: match preempt.is_none_or(|at| at.value) {
                true => Preempt::Enabled,
                false => Preempt::Disabled,
            },
            preempt_wait: preempt_wait.map_or(DEFAULT_PREEMPT_WAIT, |at| at.value),
            startup_hold: startup_hold.map_or(DEFAULT_STARTUP_HOLD, |at| at.value),
            advert_interval,
            transport: transport.map_or(Kind::Multicast, |at| at.value),
            checksum: checksum.map_or(DEFAULT_CHECKSUM, |at| at.value),
            valid_lft: valid_lft.map_or_else(|| default_valid_lft(advert_interval), |at| at.value),
            realtime: realtime.is_none_or(|at| at.value),
            sick_after: sick_after.map_or(DEFAULT_SICK_AFTER, |at| at.value),
            announce: announce(section),
        }
    }
}

/// Ten times the RFC's pace, which every node can keep: a Backup claims after 0.3 to 0.4 s.
/// Nodes with other intervals learn it from the adverts.
fn default_interval() -> AdverInterval {
    AdverInterval::from_centiseconds(10).expect("10 is within 1 to 4095")
}

/// A million flows are there in seconds: who is not in sync after this has another trouble.
const DEFAULT_PREEMPT_WAIT: Duration = Duration::from_secs(60);

/// A switch that has just seen a link come up may not forward yet, and an Active that advertises
/// every 100 ms is heard ten times by then.
const DEFAULT_STARTUP_HOLD: Duration = Duration::from_secs(1);

/// keepalived's own form, and FRR's, for IPv4; this side accepts both.
const DEFAULT_CHECKSUM: ChecksumForm = ChecksumForm::PseudoHeader;

/// How long the kernel keeps a VIP that nobody refreshes.
///
/// At least 2 s: several refreshes fit in, so that a daemon held up for a second does not lose
/// its addresses. With slow adverts longer, since a Backup waits for three intervals anyway and a
/// node held up for less than that is still Active; but a second less than that, because the
/// kernel removes an address up to 0.8 s late, and it should be gone when a Backup claims.
pub(super) fn default_valid_lft(interval: AdverInterval) -> Duration {
    let backups_wait = interval.duration() * 3;
    Duration::from_secs(backups_wait.as_secs().saturating_sub(1).max(2))
}

fn advert_interval(value: &Spanned<DeValue<'_>>) -> Read<AdverInterval> {
    let duration = value::duration(INTERVAL)(value)?;
    match AdverInterval::from_duration(duration) {
        Some(interval) => Ok(interval),
        None => {
            let near = duration.as_millis() / 10 * 10;
            complain(
                format!("is {}, not a multiple of 10 ms", super::show_duration(duration)),
                format!(
                    "\"{near}ms\" or \"{}ms\": adverts carry hundredths of a second",
                    near + 10
                ),
            )
        }
    }
}

fn valid_lft(value: &Spanned<DeValue<'_>>) -> Read<Duration> {
    let duration = value::duration(VALID_LFT)(value)?;
    match duration.subsec_nanos() {
        0 => Ok(duration),
        _ => complain(
            format!("is {}, not whole seconds", super::show_duration(duration)),
            format!(
                "\"{}s\": the kernel counts address lifetimes in seconds",
                duration.as_secs() + 1
            ),
        ),
    }
}

fn announce(election: &Section<'_>) -> AnnounceConfig {
    let default = AnnounceConfig::default();
    let Some(section) = election.section("announce", &ANNOUNCE) else { return default };
    let delay = value::duration(Duration::ZERO..=Duration::from_secs(60));
    let schedule = section.take("schedule", value::list(MOST_ANNOUNCEMENTS, delay));
    let refresh = section.take("refresh", |value| {
        let refresh = value::duration(Duration::ZERO..=Duration::from_secs(24 * 3600))(value)?;
        match refresh {
            short if !short.is_zero() && short < Duration::from_secs(1) => complain(
                format!("is {}, which floods the network", super::show_duration(short)),
                "at least \"1s\", or \"0s\" for never",
            ),
            refresh => Ok(refresh),
        }
    });
    let rival = section.take(
        "rival_interval",
        value::duration(Duration::from_millis(10)..=Duration::from_secs(60)),
    );
    let schedule = schedule.map_or(default.schedule, |list| ascending(&section, &list.value));
    AnnounceConfig {
        schedule,
        refresh: refresh.map_or(default.refresh, |at| at.value),
        rival_interval: rival.map_or(default.rival_interval, |at| at.value),
    }
}

fn ascending(section: &Section<'_>, delays: &[At<Duration>]) -> Vec<Duration> {
    if let Some(first) = delays.first().filter(|first| !first.value.is_zero()) {
        let what = "`schedule` does not begin with \"0s\": the claim itself would not be announced";
        section.report.error(&first.span, what, "write \"0s\" before it");
    }
    for pair in delays.windows(2).filter(|pair| pair[0].value >= pair[1].value) {
        let what = format!(
            "`schedule` has {} after {}",
            super::show_duration(pair[1].value),
            super::show_duration(pair[0].value)
        );
        section.report.error(&pair[1].span, what, "write the delays after the claim in order");
    }
    delays.iter().map(|delay| delay.value).collect()
}

/// The interfaces that carry VIPs, in the order of the file.
fn carrying(vips: &[Vip]) -> Vec<String> {
    let mut seen = HashSet::new();
    let first = |vip: &&Vip| seen.insert(vip.interface.clone());
    vips.iter().filter(first).map(|vip| vip.interface.clone()).collect()
}

/// `interfaces`; empty where it isn't there.
fn listed(section: &Section<'_>, carrying: &[String]) -> Vec<At<String>> {
    let list = value::list(MOST_INTERFACES, value::interface);
    let Some(At { value: listed, span }) = section.take("interfaces", list) else {
        if carrying.len() > MOST_INTERFACES {
            let what = format!("VIPs are on {} interfaces", carrying.len());
            let hint = format!("write `interfaces`, at most {MOST_INTERFACES}, for the adverts");
            section.report.error(&section.span, what, hint);
        }
        return Vec::new();
    };
    for (index, At { value: name, span }) in listed.iter().enumerate() {
        if listed[..index].iter().any(|other| other.value == *name) {
            let what = format!("`interfaces` names {name:?} twice");
            section.report.error(span, what, "write it once");
        }
    }
    if let Some(silent) = carrying.iter().find(|name| !listed.iter().any(|at| at.value == **name)) {
        let what = format!("VIPs are on {silent:?}, where no adverts travel");
        let hint = format!("write {silent:?} in `interfaces`, or nodes cut off there go unnoticed");
        section.report.warning(&span, what, hint);
    }
    listed
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path as File;

    use super::*;
    use crate::config::Config;

    /// The election of a file with these peers' addresses, election keys and VIPs (address, interface).
    pub(in crate::config) fn ha(peers: &[&str], election: &str, vips: &[(&str, &str)]) -> HaConfig {
        let mut text = String::from("[node]\nname = \"relay1\"\n");
        for (number, address) in peers.iter().enumerate() {
            text += &format!(
                "[[cluster.peers]]\nname = \"peer{number}\"\naddresses = [\"{address}\"]\n"
            );
        }
        text += &format!("[election]\nvrid = 51\n{election}\n");
        for (number, (address, interface)) in vips.iter().enumerate() {
            text += &format!(
                "[[vips]]\nname = \"vip{number}\"\naddress = \"{address}\"\n\
                 interface = \"{interface}\"\n"
            );
        }
        text += "[[services]]\nname = \"s\"\nvip = \"vip0\"\nport = 80\n\
                 [[services.backends]]\nname = \"b\"\naddress = \"192.0.2.1:80\"\n";
        match Config::parse(File::new("f.toml"), &text) {
            Ok(config) => config.ha.expect("there are VIPs"),
            Err(errors) => panic!("{errors}"),
        }
    }

    #[test]
    fn what_is_not_written_has_its_default() {
        let ha = ha(&[], "", &[("10.77.0.100/24", "front")]);
        assert_eq!(ha.priority, Priority::new(100));
        assert_eq!(ha.preempt, Preempt::Enabled);
        assert_eq!(ha.preempt_wait, Duration::from_secs(60));
        assert_eq!(ha.startup_hold, Duration::from_secs(1));
        assert_eq!(ha.advert_interval.centiseconds(), 10);
        assert_eq!(ha.checksum, ChecksumForm::PseudoHeader);
        assert_eq!(ha.valid_lft, Duration::from_secs(2));
        assert!(ha.realtime);
        assert_eq!(ha.announce, AnnounceConfig::default());
    }

    #[test]
    fn an_address_outlives_no_claim_and_outlasts_several_refreshes() {
        for (interval, seconds) in [
            ("10ms", 2),
            ("100ms", 2),
            ("1s", 2),
            ("1.5s", 3),
            ("2s", 5),
            ("10s", 29),
            ("40.95s", 121),
        ] {
            let ha =
                ha(&[], &format!("advert_interval = \"{interval}\""), &[("10.77.0.100/24", "f")]);
            assert_eq!(ha.valid_lft.as_secs(), seconds, "{interval}");
            let late = ha.valid_lft + Duration::from_millis(800);
            let backups_wait = ha.advert_interval.duration() * 3;
            assert!(late <= backups_wait || seconds == 2, "{interval}");
        }
    }
}
