//! What a new file may change while the daemon runs.
//!
//! Services, backends and checks can. The node, its election and its VIPs can't yet: the sockets,
//! the real-time thread and the addresses are set up from them once.

use baton_ha::config::{HaConfig, Transport};

use super::{Config, show_duration};
use crate::explain;

/// Each key of which `new` says something else than `old` and which needs a restart:
/// `election.priority: 200 → 150`. Empty: the new file can be applied.
pub fn reload_blockers(old: &Config, new: &Config) -> Vec<String> {
    let (old, new) = (fixed(old), fixed(new));
    let mut blockers = Vec::new();
    for (key, was) in &old {
        match new.iter().find(|(other, _)| other == key) {
            Some((_, is)) if is == was => {}
            Some((_, is)) => blockers.push(format!("{key}: {was} → {is}")),
            None => blockers.push(format!("{key}: {was} → removed")),
        }
    }
    for (key, is) in &new {
        if !old.iter().any(|(other, _)| other == key) {
            blockers.push(format!("{key}: new, {is}"));
        }
    }
    blockers
}

/// What can't change, key by key, in words.
fn fixed(config: &Config) -> Vec<(String, String)> {
    let node = &config.node;
    let mut facts: Vec<(String, String)> = [
        ("node.name", node.name.clone()),
        ("node.control", node.control.display().to_string()),
        ("node.shutdown_grace", show_duration(node.shutdown_grace)),
        ("node.workers", node.workers.to_string()),
        ("node.log", node.log.clone()),
        ("cluster.name", config.cluster.clone()),
        ("datapath.flows", config.datapath.flows.to_string()),
        ("datapath.half_open_flows", config.datapath.half_open_flows.to_string()),
        ("datapath.affinities", config.datapath.affinities.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .to_vec();
    // By default it has the node's name.
    if node.state_dir != explain::state_dir(&node.name) {
        facts.push(("node.state_dir".to_owned(), node.state_dir.display().to_string()));
    }
    if let Some(channel) = &config.channel {
        facts.extend([
            ("cluster.channel".to_owned(), channel.address.to_string()),
            ("cluster.key_file".to_owned(), channel.key_file.display().to_string()),
            ("cluster.heartbeat".to_owned(), show_duration(channel.heartbeat)),
        ]);
        for peer in &channel.peers {
            facts.push((format!("cluster.peers.{}.channel", peer.name), peer.address.to_string()));
        }
    }
    if let Some(ha) = &config.ha {
        facts.extend(election(ha));
        let sick_after = config.sick_after.unwrap_or_default();
        facts.push(("election.sick_after".to_owned(), show_duration(sick_after)));
        for (vip, name) in ha.vips.iter().zip(&config.vip_names) {
            let what = format!("{}/{} on {}", vip.address, vip.prefix, vip.interface);
            facts.push((format!("vips.{name}"), what));
        }
        for peer in &ha.peers {
            let addresses: Vec<_> = peer.addresses.iter().map(ToString::to_string).collect();
            facts.push((format!("cluster.peers.{}", peer.name), addresses.join(", ")));
        }
    }
    facts
}

fn election(ha: &HaConfig) -> impl Iterator<Item = (String, String)> {
    // Destructured so that a new field is thought of here.
    let HaConfig {
        node: _,
        vrid,
        priority,
        advert_interval,
        preempt,
        preempt_wait,
        startup_hold,
        checksum,
        paths,
        vips: _,
        peers: _,
        announce,
        valid_lft,
        realtime,
        // Of the file's own part, which `fixed` compares.
        channel: _,
    } = ha;
    let paths: Vec<String> = paths
        .iter()
        .map(|path| {
            let transport = match &path.transport {
                Transport::Multicast => "multicast".to_owned(),
                Transport::Unicast(targets) => format!("unicast to {targets:?}"),
            };
            format!("{} {:?} {transport} {:?}", path.interface, path.family, path.addresses)
        })
        .collect();
    let schedule: Vec<_> = announce.schedule.iter().copied().map(show_duration).collect();
    [
        ("vrid", vrid.to_string()),
        ("priority", priority.to_string()),
        ("advert_interval", show_duration(advert_interval.duration())),
        ("preempt", format!("{preempt:?}").to_lowercase()),
        ("preempt_wait", show_duration(*preempt_wait)),
        ("startup_hold", show_duration(*startup_hold)),
        ("checksum", format!("{checksum:?}").to_lowercase()),
        ("paths", paths.join("; ")),
        ("announce.schedule", schedule.join(", ")),
        ("announce.refresh", show_duration(announce.refresh)),
        ("announce.rival_interval", show_duration(announce.rival_interval)),
        ("valid_lft", show_duration(*valid_lft)),
        ("realtime", realtime.to_string()),
    ]
    .map(|(key, value)| (format!("election.{key}"), value))
    .into_iter()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const OLD: &str = include_str!("../../config/relay1.toml");

    fn blockers(from: &str, to: &str) -> Vec<String> {
        assert!(OLD.contains(from), "{from}");
        let parse = |text: &str| Config::parse(Path::new("f.toml"), text).expect("correct");
        reload_blockers(&parse(OLD), &parse(&OLD.replacen(from, to, 1)))
    }

    #[test]
    fn services_backends_and_checks_can_change() {
        for (from, to) in [
            ("port = 1080", "port = 1081"),
            ("10.78.0.12:1080", "10.78.0.13:1080"),
            ("fall = 3", "fall = 5"),
            ("scheduler = \"source-hash\"", "scheduler = \"random\""),
            ("[[vips]]", "# a comment\n[[vips]]"),
        ] {
            assert_eq!(blockers(from, to), Vec::<String>::new(), "{from}");
        }
    }

    #[test]
    fn the_node_the_election_and_the_vips_need_a_restart() {
        for (from, to, expected) in [
            ("name = \"relay1\"", "name = \"r1\"", "node.name: relay1 → r1"),
            ("name = \"lab\"", "name = \"x\"", "cluster.name: lab → x"),
            ("[[vips]]", "[datapath]\nflows = 256\n[[vips]]", "datapath.flows: 131072 → 256"),
            ("priority = 200 ", "priority = 150 ", "election.priority: 200 → 150"),
            ("vrid = 51", "vrid = 52", "election.vrid: 51 → 52"),
            ("\"100ms\"", "\"1s\"", "election.advert_interval: 100ms → 1s"),
            (
                "10.77.0.100/24",
                "10.77.0.100/25",
                "vips.socks: 10.77.0.100/24 on front → 10.77.0.100/25 on front",
            ),
            (", \"10.78.0.3\"]", "]", "cluster.peers.relay2: 10.77.0.3, 10.78.0.3 → 10.77.0.3"),
            (
                "[[vips]]",
                "[election.announce]\nrefresh = \"1m\"\n[[vips]]",
                "election.announce.refresh: 30s → 1m",
            ),
        ] {
            assert_eq!(blockers(from, to), [expected]);
        }
    }

    #[test]
    fn what_comes_and_goes_is_named() {
        let vip =
            "[[vips]]\nname = \"two\"\naddress = \"10.77.0.101/24\"\ninterface = \"front\"\n\n";
        let blockers = blockers("[[vips]]", &format!("{vip}[[vips]]"));
        assert!(
            blockers.contains(&"vips.two: new, 10.77.0.101/24 on front".to_owned()),
            "{blockers:?}"
        );
    }
}
