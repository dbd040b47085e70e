//! The daemon comes and goes; flows stay, and the kernel's own stack never answers in between.

use std::io;
use std::time::Duration;

use baton::datapath::bpffs::LAYOUT;
use libbpf_rs::{MapCore as _, MapHandle};
use nix::sys::signal::Signal;

use crate::net::{Net, PATIENCE, service};
use crate::server::{connect, serve};

const VIP: &str = "10.77.0.100:80";

fn web() -> String {
    let backends = [("b1", "10.78.0.11:8080"), ("b2", "10.78.0.12:8080")];
    service("web", "front4", 80, "mode = \"passthrough\"", &backends)
}

fn net() -> Net {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", "10.78.0.11:8080");
    serve(&net.node("b2"), "b2", "10.78.0.12:8080");
    net.start_relay(&web());
    net
}

#[test]
fn connections_outlive_a_daemon_that_was_killed() {
    let mut net = net();
    let client = net.node("client");
    let mut sessions: Vec<_> = (0..10).map(|_| connect(&client, VIP, PATIENCE).unwrap()).collect();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        net.end_relay(signal);
        net.start_relay(&web());
        for session in &mut sessions {
            session.echo(1000);
        }
    }
    connect(&client, VIP, PATIENCE).unwrap().echo(10);
}

/// As on a node that takes over and was not told of them: what the kernel knew is gone.
#[test]
fn connections_go_on_where_nothing_is_known_of_them() {
    let mut net = net();
    let session = |_| connect(&net.node("client"), "10.77.0.100:80", PATIENCE).unwrap();
    let mut sessions: Vec<_> = (0..20).map(session).collect();
    net.end_relay(Signal::SIGKILL);
    net.unload();
    net.start_relay(&web());
    sessions.iter_mut().for_each(|session| session.echo(1000));
    net.until("status says so", || net.status()["datapath"]["adopted"] == 20);
}

#[test]
fn after_a_kill_there_is_silence() {
    let mut net = net();
    let client = net.node("client");
    connect(&client, VIP, PATIENCE).unwrap();
    // Neither the loss of the address nor of its hardware address may be what keeps it silent.
    let relay = net.node("relay");
    let link = relay.ip("-br link show dev front").unwrap().stdout;
    let link = String::from_utf8_lossy(&link).into_owned();
    let mac = link.split_whitespace().nth(2).unwrap();
    client.ip(&format!("neigh replace 10.77.0.100 lladdr {mac} dev front nud permanent")).unwrap();
    relay.ip("addr add 10.77.0.100/32 dev lo").unwrap();
    net.end_relay(Signal::SIGKILL);
    // The lease is 550 ms. From then on: no answer, least of all a refusal.
    std::thread::sleep(Duration::from_millis(1500));
    let error = connect(&client, VIP, Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
}

#[test]
fn unload_leaves_nothing() {
    let mut net = net();
    assert!(net.pins().exists());
    net.end_relay(Signal::SIGTERM);
    assert!(net.pins().exists(), "a stop keeps the flows for the next start");
    net.unload();
    assert!(!net.pins().exists());
    let relay = net.node("relay");
    for interface in ["front", "back"] {
        let mut filters = relay.command("tc");
        let output =
            filters.args(["filter", "show", "dev", interface, "ingress"]).output().unwrap();
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn pins_that_nothing_uses_are_not_taken_over() {
    let mut net = net();
    let client = net.node("client");
    let session = connect(&client, VIP, PATIENCE).unwrap();
    let flows = |net: &Net| {
        let map = MapHandle::from_pinned_path(net.pins().join("flows")).unwrap();
        map.keys().count()
    };
    assert_eq!(flows(&net), 1);
    net.end_relay(Signal::SIGKILL);
    // As if the interfaces, or all of the namespace, were new.
    for interface in ["front", "back"] {
        let mut tc = net.node("relay").command("tc");
        assert!(tc.args(["qdisc", "del", "dev", interface, "clsact"]).status().unwrap().success());
    }
    net.start_relay(&web());
    assert_eq!(flows(&net), 0);
    connect(&client, VIP, PATIENCE).unwrap().echo(10);
    drop(session);
}

/// What the daemon left, made into an older layout's: its pins, and its filters at their place.
fn age(net: &Net) {
    let relay = net.node("relay");
    let pins = net.pins();
    std::fs::rename(&pins, pins.with_file_name(format!("layout-{}", LAYOUT - 1))).unwrap();
    let tc = |args: &str| {
        let output = relay.command("tc").args(args.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "{args}: {output:?}");
        output.stdout
    };
    for interface in ["front", "back"] {
        let shown = tc(&format!("-j filter show dev {interface} ingress"));
        let shown: serde_json::Value = serde_json::from_slice(&shown).unwrap();
        let filters = shown.as_array().unwrap();
        let program = filters.iter().find_map(|filter| filter["options"]["prog"]["id"].as_u64());
        let pin = pins.with_file_name(format!("test-{interface}"));
        let pinned = std::process::Command::new("bpftool")
            .args(["prog", "pin", "id", &program.unwrap().to_string()])
            .arg(&pin)
            .output()
            .unwrap();
        assert!(pinned.status.success(), "{pinned:?}");
        let (old, new) = (0xba70 - LAYOUT + 1, 0xba70 - LAYOUT);
        tc(&format!(
            "filter add dev {interface} ingress pref {old} handle 0xba70 bpf da pinned {}",
            pin.display()
        ));
        tc(&format!("filter del dev {interface} ingress pref {new}"));
        std::fs::remove_file(pin).unwrap();
    }
}

#[test]
fn an_upgrade_leaves_old_flows_to_the_old_programs() {
    let mut net = net();
    let client = net.node("client");
    let mut old: Vec<_> = (0..3).map(|_| connect(&client, VIP, PATIENCE).unwrap()).collect();
    net.end_relay(Signal::SIGKILL);
    age(&net);
    net.start_relay(&web());
    assert!(net.log().contains("flows of an older version"), "{}", net.log());
    let mut new = connect(&client, VIP, PATIENCE).unwrap();
    let flows = MapHandle::from_pinned_path(net.pins().join("flows")).unwrap();
    assert_eq!(flows.keys().count(), 1, "the new one alone is in the new table");
    // Longer than any gate stays open by itself.
    std::thread::sleep(Duration::from_millis(1500));
    for session in old.iter_mut().chain([&mut new]) {
        session.echo(100_000);
    }

    net.end_relay(Signal::SIGTERM);
    net.unload();
    assert!(!net.pins().parent().unwrap().exists());
    for interface in ["front", "back"] {
        let mut tc = net.node("relay").command("tc");
        let output = tc.args(["filter", "show", "dev", interface, "ingress"]).output().unwrap();
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn a_newer_versions_tables_are_not_touched() {
    let mut net = net();
    net.end_relay(Signal::SIGKILL);
    let pins = net.pins();
    let newer = pins.with_file_name(format!("layout-{}", LAYOUT + 1));
    std::fs::rename(&pins, &newer).unwrap();
    let output = net.second_relay(&web());
    assert!(!output.status.success());
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(why.contains("another version of baton") && why.contains("`baton unload`"), "{why}");
    assert!(newer.join("flows").exists());
}
