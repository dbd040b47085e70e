//! What a configuration means, for people and for programs: `baton check`.

use std::fmt::{self, Write};
use std::net::IpAddr;
use std::time::Duration;

use baton_ha::config::{ChecksumForm, Family, HaConfig, Transport};
use baton_ha::vrrp::{Preempt, router};
use serde_json::{Value, json};

use super::{Config, show_duration};
use crate::service::{Check, Probe, Service, SocksTarget};
use crate::table::Table;

/// The file in words and tables; every line ends in a newline.
pub fn describe(config: &Config) -> String {
    let mut text = String::new();
    header(&mut text, config).expect("writing to a String does not fail");
    for table in [vips(config), services(config), backends(config), checks(config)] {
        if !table.is_empty() {
            write!(text, "\n{table}").expect("writing to a String does not fail");
        }
    }
    text
}

/// How long after the last advert this node claims the VIPs, if every node has its interval.
pub fn active_down_interval(ha: &HaConfig) -> Duration {
    router::active_down_interval(ha.priority, ha.advert_interval)
}

fn header(out: &mut String, config: &Config) -> fmt::Result {
    let node = &config.node;
    let workers = match node.workers {
        0 => "one worker per core".to_owned(),
        1 => "1 worker".to_owned(),
        more => format!("{more} workers"),
    };
    writeln!(out, "node      {}: {workers}, control {}", node.name, node.control.display())?;
    let grace = show_duration(node.shutdown_grace);
    writeln!(
        out,
        "          after SIGTERM connections on own addresses have {grace} to end, those on VIPs none"
    )?;
    if config.services.iter().any(|service| service.mode.is_in_kernel()) {
        let super::Datapath { flows, half_open_flows, affinities, hook } = config.datapath;
        let hook = hook.word();
        writeln!(
            out,
            "kernel    room for {flows} flows, {half_open_flows} half-open ones, {affinities} clients \
             with affinity; hook {hook}"
        )?;
    }
    if config.ha.is_some() {
        let journal = crate::explain::path(&node.state_dir);
        writeln!(out, "          decisions are written down in {}", journal.display())?;
    }
    let Some(ha) = &config.ha else {
        return writeln!(out, "election  none: no VIPs, this node balances on its own addresses");
    };
    write!(out, "cluster   {}", config.cluster)?;
    match ha.peers.is_empty() {
        true => writeln!(out, ", no peers named")?,
        false => {
            let peers =
                ha.peers.iter().map(|peer| format!("{} ({})", peer.name, join(&peer.addresses)));
            writeln!(out, " with {}", peers.collect::<Vec<_>>().join(", "))?;
        }
    }
    let preempt = match ha.preempt {
        Preempt::Enabled => "takes over from a lower priority",
        Preempt::Disabled => "leaves a healthy Active alone",
    };
    writeln!(out, "election  VRID {}, priority {}: {preempt}", ha.vrid, ha.priority)?;
    for path in &ha.paths {
        let target = match &path.transport {
            Transport::Multicast => "multicast".to_owned(),
            Transport::Unicast(targets) => format!("unicast to {}", join(targets)),
        };
        let family = super::paths::family_name(path.family);
        let every = show_duration(ha.advert_interval.duration());
        writeln!(out, "          adverts every {every} on {}, {family}: {target}", path.interface)?;
    }
    if ha.paths.iter().any(|path| path.family == Family::V4) {
        writeln!(out, "          IPv4 checksum: {}", checksum(ha.checksum))?;
    }
    if ha.priority.value() == 255 {
        writeln!(out, "          address owner: claims the VIPs as soon as it starts")?;
    } else {
        writeln!(
            out,
            "          Active_Down_Interval {}: as Backup it claims this long after the last advert",
            tenths(active_down_interval(ha))
        )?;
    }
    let lifetime = show_duration(ha.valid_lft);
    writeln!(out, "          the kernel removes a VIP {lifetime} after its last refresh")?;
    let announce = &ha.announce;
    let delays: Vec<_> = announce.schedule.iter().copied().map(show_duration).collect();
    let refresh = match announce.refresh.is_zero() {
        true => "never again".to_owned(),
        false => format!("every {}", show_duration(announce.refresh)),
    };
    let rival = show_duration(announce.rival_interval);
    writeln!(out, "          VIPs are announced {} after the claim,", delays.join(", "))?;
    writeln!(out, "          then {refresh}, and at a rival, at most every {rival}")?;
    match config.sick_after {
        Some(after) if config.channel.is_some() => {
            let after = show_duration(after);
            writeln!(out, "          gives way to a peer that sees more backends up for {after}")?;
        }
        _ => {}
    }
    if !ha.realtime {
        writeln!(out, "          without real-time priority: detection is less sure under load")?;
    }
    Ok(())
}

/// `321.9ms`: the skew is not a whole number of milliseconds.
fn tenths(duration: Duration) -> String {
    let tenths = (duration.as_micros() + 50) / 100;
    match tenths % 10 {
        0 => show_duration(Duration::from_millis((tenths / 10) as u64)),
        part => format!("{}.{part}ms", tenths / 10),
    }
}

fn checksum(form: ChecksumForm) -> &'static str {
    match form {
        ChecksumForm::Plain => "plain",
        ChecksumForm::PseudoHeader => "pseudo-header",
    }
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
}

fn vips(config: &Config) -> Table {
    let mut table = Table::new(&["VIP", "ADDRESS", "INTERFACE", "SERVICES"]);
    let vips = config.ha.as_ref().map_or(&[][..], |ha| &ha.vips);
    for (vip, name) in vips.iter().zip(&config.vip_names) {
        let on_it = config.services.iter().filter(|service| service.vip() == vip.address);
        let services: Vec<&str> = on_it.map(|service| service.name.as_str()).collect();
        let address = format!("{}/{}", vip.address, vip.prefix);
        table.row([name, &address, &vip.interface, &or_dash(services.join(", "))]);
    }
    table
}

fn services(config: &Config) -> Table {
    let mut table = Table::new(&[
        "SERVICE",
        "LISTENS ON",
        "MODE",
        "SCHEDULER",
        "CHECK",
        "CONNECTIONS",
        "PER SOURCE",
        "IDLE",
        "AFFINITY",
        "PROXY HEADER",
    ]);
    for service in &config.services {
        let limits = &service.limits;
        table.row([
            service.name.clone(),
            format!("{}/{}", service.listen, word(&service.protocol)),
            word(&service.mode),
            word(&service.scheduler),
            or_dash(service.check.as_ref().map_or_else(String::new, |check| check.name.clone())),
            limits.max_connections.to_string(),
            limits.max_connections_per_source.to_string(),
            show_duration(limits.idle_timeout),
            limits.affinity.map_or("-".to_owned(), show_duration),
            word(&service.proxy_protocol),
        ]);
    }
    table
}

fn backends(config: &Config) -> Table {
    let mut table = Table::new(&["SERVICE", "BACKEND", "ADDRESS", "WEIGHT", "CONNECTIONS"]);
    for service in &config.services {
        for backend in &service.backends {
            table.row([
                service.name.clone(),
                backend.name.clone(),
                backend.address.to_string(),
                backend.weight.to_string(),
                backend.max_connections.to_string(),
            ]);
        }
    }
    table
}

fn checks(config: &Config) -> Table {
    let mut table = Table::new(&["CHECK", "EVERY", "TIMEOUT", "UP AFTER", "DOWN AFTER", "PROBE"]);
    for check in &config.checks {
        table.row([
            check.name.clone(),
            show_duration(check.interval),
            show_duration(check.timeout),
            check.rise.to_string(),
            check.fall.to_string(),
            probe(check),
        ]);
    }
    table
}

/// What a check does, in a few words; never a password.
fn probe(check: &Check) -> String {
    let mut words = match &check.probe {
        Probe::Tcp => "tcp connect".to_owned(),
        Probe::Http { method, path, host, status } => {
            let host = host.as_ref().map_or_else(String::new, |host| format!(" host {host}"));
            format!("http {method} {path}{host}, status {}-{}", status.start(), status.end())
        }
        Probe::Socks5 { target, credentials } => {
            let user =
                credentials.as_ref().map_or_else(String::new, |(name, _)| format!(" as {name}"));
            format!("socks5 CONNECT {}{user}", socks_target(target))
        }
        Probe::SendExpect { send, expect } if send.is_empty() => {
            format!("expect \"{}\"", expect.escape_ascii())
        }
        Probe::SendExpect { send, expect } => {
            format!("send \"{}\", expect \"{}\"", send.escape_ascii(), expect.escape_ascii())
        }
        Probe::Icmp => "icmp echo".to_owned(),
        Probe::Script { command } => format!("script {}", command.join(" ")),
    };
    if let Some(port) = check.port {
        write!(words, ", port {port}").expect("writing to a String does not fail");
    }
    words
}

fn socks_target(target: &SocksTarget) -> String {
    match target {
        SocksTarget::Address(address) => address.to_string(),
        SocksTarget::Name(name, port) => format!("{name}:{port}"),
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

/// A word of the file, as serde writes it.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => String::new(),
    }
}

/// The same facts for programs; docs/config.md describes the form. Passwords are left out.
pub fn describe_json(config: &Config) -> Value {
    let node = &config.node;
    json!({
        "file": config.path.display().to_string(),
        "node": {
            "name": node.name,
            "control": node.control.display().to_string(),
            "state_dir": node.state_dir,
            "shutdown_grace_ms": millis(node.shutdown_grace),
            "workers": node.workers,
            "log": node.log,
        },
        "cluster": {
            "name": config.cluster,
            "peers": config.ha.iter().flat_map(|ha| &ha.peers).map(|peer| json!({
                "name": peer.name,
                "addresses": peer.addresses,
            })).collect::<Vec<_>>(),
        },
        "election": config.ha.as_ref().map(|ha| election_json(config, ha)),
        "vips": config.ha.iter().flat_map(|ha| &ha.vips).zip(&config.vip_names)
            .map(|(vip, name)| json!({
                "name": name,
                "address": vip.address,
                "prefix": vip.prefix,
                "interface": vip.interface,
            })).collect::<Vec<_>>(),
        "datapath": {
            "flows": config.datapath.flows,
            "half_open_flows": config.datapath.half_open_flows,
            "hook": config.datapath.hook,
            "affinities": config.datapath.affinities,
        },
        "services": config.services.iter().map(|service| service_json(config, service))
            .collect::<Vec<_>>(),
        "checks": config.checks.iter().map(|check| check_json(check)).collect::<Vec<_>>(),
        "warnings": config.warnings.iter().map(super::Problem::json).collect::<Vec<_>>(),
    })
}

fn election_json(config: &Config, ha: &HaConfig) -> Value {
    let owner = ha.priority.value() == 255;
    json!({
        "vrid": ha.vrid.value(),
        "priority": ha.priority.value(),
        "preempt": ha.preempt == Preempt::Enabled,
        "preempt_wait_ms": millis(ha.preempt_wait),
        "startup_hold_ms": millis(ha.startup_hold),
        "advert_interval_ms": millis(ha.advert_interval.duration()),
        "active_down_interval_us":
            (!owner).then(|| u64::try_from(active_down_interval(ha).as_micros()).ok()),
        "checksum": checksum(ha.checksum),
        "valid_lft_ms": millis(ha.valid_lft),
        "realtime": ha.realtime,
        "sick_after_ms": config.sick_after.map_or(0, millis),
        "announce": {
            "schedule_ms": ha.announce.schedule.iter().copied().map(millis).collect::<Vec<_>>(),
            "refresh_ms": millis(ha.announce.refresh),
            "rival_interval_ms": millis(ha.announce.rival_interval),
        },
        "paths": ha.paths.iter().map(|path| {
            let (transport, to) = match &path.transport {
                Transport::Multicast => ("multicast", &[][..]),
                Transport::Unicast(targets) => ("unicast", &targets[..]),
            };
            json!({
                "interface": path.interface,
                "family": super::paths::family_name(path.family),
                "transport": transport,
                "to": to,
                "addresses": path.addresses,
            })
        }).collect::<Vec<_>>(),
    })
}

fn service_json(config: &Config, service: &Service) -> Value {
    let limits = &service.limits;
    let in_kernel = service.mode.is_in_kernel();
    json!({
        "name": service.name,
        "listen": service.listen,
        "vip": config.vip_name(service.vip()),
        "protocol": service.protocol,
        "mode": service.mode,
        "scheduler": service.scheduler,
        "check": service.check.as_ref().map(|check| &check.name),
        "proxy_protocol": service.proxy_protocol,
        "max_connections": limits.max_connections,
        "max_connections_per_source": limits.max_connections_per_source,
        "connect_timeout_ms": millis(limits.connect_timeout),
        "connect_retries": limits.connect_retries,
        "idle_timeout_ms": millis(limits.idle_timeout),
        "half_close_timeout_ms": millis(limits.half_close_timeout),
        "affinity_ms": limits.affinity.map(millis),
        "half_open_timeout_ms": in_kernel.then(|| millis(service.flows.half_open_timeout)),
        "closed_timeout_ms": in_kernel.then(|| millis(service.flows.closed_timeout)),
        "on_down": in_kernel.then_some(service.flows.on_down),
        "backends": service.backends.iter().map(|backend| json!({
            "name": backend.name,
            "address": backend.address,
            "weight": backend.weight,
            "max_connections": backend.max_connections,
        })).collect::<Vec<_>>(),
    })
}

fn check_json(check: &Check) -> Value {
    let probe = match &check.probe {
        Probe::Tcp => json!({"type": "tcp"}),
        Probe::Http { method, path, host, status } => json!({
            "type": "http",
            "method": method,
            "path": path,
            "host": host,
            "status": [status.start(), status.end()],
        }),
        Probe::Socks5 { target, credentials } => json!({
            "type": "socks5",
            "target": socks_target(target),
            "username": credentials.as_ref().map(|(name, _)| name),
        }),
        Probe::SendExpect { send, expect } => json!({
            "type": "send-expect",
            "send": send.escape_ascii().to_string(),
            "expect": expect.escape_ascii().to_string(),
        }),
        Probe::Icmp => json!({"type": "icmp"}),
        Probe::Script { command } => json!({"type": "script", "command": command}),
    };
    json!({
        "name": check.name,
        "interval_ms": millis(check.interval),
        "timeout_ms": millis(check.timeout),
        "rise": check.rise,
        "fall": check.fall,
        "port": check.port,
        "probe": probe,
    })
}

/// Whole milliseconds: no duration of the file is finer.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
