//! The daemon comes and goes; flows stay, and the kernel's own stack never answers in between.

use std::io;
use std::time::Duration;

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
    // The lease is one second. From then on: no answer, least of all a refusal.
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
