//! What happens to a relay while it carries traffic: no connection that need not break does, and
//! not one byte is wrong.

use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::load::Load;
use crate::net::{Net, PATIENCE, service};
use crate::server::{ask, connect, serve};

const VIP: &str = "10.77.0.100:80";
const BOTH: [(&str, &str); 2] = [("b1", "10.78.0.11:8080"), ("b2", "10.78.0.12:8080")];
const SESSIONS: usize = 30;

fn net(how: &str) -> Net {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", BOTH[0].1);
    serve(&net.node("b2"), "b2", BOTH[1].1);
    net.start_relay(&web(how));
    net
}

const CHECKED: &str = "mode = \"passthrough\"\ncheck = \"alive\"";

fn web(how: &str) -> String {
    let check = "[checks.alive]\ntype = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"90ms\"\n";
    format!("{check}{}", service("web", "front4", 80, how, &BOTH))
}

/// Waits until new sessions come to these backends and no other.
fn await_backends(net: &Net, wanted: &[&str]) {
    net.until(&format!("new sessions come to {wanted:?}"), || {
        let mut seen: Vec<String> =
            (0..16).map(|_| connect(&net.node("client"), VIP, PATIENCE).unwrap().backend).collect();
        seen.sort();
        seen.dedup();
        seen == wanted
    });
}

/// No session was lost, or none on a backend; no newcomer failed unless one was cut off.
fn assert_none_lost(load: Load, backend: Option<&str>) {
    let (sessions, failed) = load.end();
    assert!(backend.is_some() || failed == 0, "{failed} newcomers failed");
    for (to, ended) in sessions {
        if backend.is_none_or(|backend| to == backend) {
            assert!(ended.is_ok(), "a session to {to}: {ended:?}");
        }
    }
}

#[test]
fn a_backend_drained_and_back_costs_no_connection() {
    let net = net("mode = \"passthrough\"");
    let load = Load::start(&net, VIP, SESSIONS);
    assert!(load.sessions_on("b1") > 0 && load.sessions_on("b2") > 0);
    for _ in 0..2 {
        net.baton(&["drain", "b1"]);
        await_backends(&net, &["b2"]);
        load.goes_on(&net, None);
        net.baton(&["enable", "b1"]);
        await_backends(&net, &["b1", "b2"]);
        load.goes_on(&net, None);
    }
    assert_none_lost(load, None);
}

#[test]
fn a_backend_down_and_back_costs_no_connection_of_the_other() {
    let net = net(CHECKED);
    await_backends(&net, &["b1", "b2"]);
    let load = Load::start(&net, VIP, SESSIONS);
    assert!(load.sessions_on("b1") > 0 && load.sessions_on("b2") > 0);
    // Its link is cut: the check finds out.
    net.node("b1").ip("link set back down").unwrap();
    await_backends(&net, &["b2"]);
    load.goes_on(&net, Some("b2"));
    net.node("b1").ip("link set back up").unwrap();
    net.node("b1").ip("route replace default via 10.78.0.1").unwrap();
    await_backends(&net, &["b1", "b2"]);
    load.goes_on(&net, Some("b2"));
    // And by hand, which cuts its sessions off at once.
    net.baton(&["disable", "b1"]);
    await_backends(&net, &["b2"]);
    load.goes_on(&net, Some("b2"));
    net.baton(&["enable", "b1"]);
    await_backends(&net, &["b1", "b2"]);
    load.goes_on(&net, Some("b2"));
    assert_none_lost(load, Some("b2"));
}

/// Within the lease, when it is quick; past it packets are held back and sent again.
#[test]
fn a_daemon_that_comes_and_goes_costs_no_connection() {
    let how = "mode = \"passthrough\"";
    let mut net = net(how);
    let load = Load::start(&net, VIP, SESSIONS);
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
        net.end_relay(signal);
        net.start_relay(&web(how));
        load.goes_on(&net, None);
    }
    // Longer than the lease: for a while nothing goes through at all.
    net.end_relay(Signal::SIGKILL);
    thread::sleep(Duration::from_millis(1500));
    net.start_relay(&web(how));
    load.goes_on(&net, None);
    assert_none_lost(load, None);
}

#[test]
fn every_mode_on_one_vip_at_once() {
    let mut net = Net::new();
    for (node, host) in [("b1", 11), ("b2", 12)] {
        let netns = net.node(node);
        netns
            .sysctl(&[
                ("net.ipv4.conf.all.arp_ignore", "1"),
                ("net.ipv4.conf.all.arp_announce", "2"),
            ])
            .unwrap();
        netns.ip_batch("addr add 10.77.0.100/32 dev lo\n").unwrap();
        // What replies of the one service go by, and no other's.
        netns.ip("route add default via 10.78.0.100 table 82").unwrap();
        netns.ip("rule add ipproto tcp sport 8082 lookup 82").unwrap();
        serve(&netns, node, &format!("10.78.0.{host}:8080"));
        serve(&netns, node, &format!("10.78.0.{host}:8082"));
        serve(&netns, node, "10.77.0.100:83");
    }
    let backends =
        |port: u16| [("b1", format!("10.78.0.11:{port}")), ("b2", format!("10.78.0.12:{port}"))];
    let mut text = String::new();
    for (name, port, to, how) in [
        ("vip", 80, 8080, "mode = \"passthrough\""),
        ("proxy", 81, 8080, "mode = \"proxy\""),
        ("client", 82, 8082, "mode = \"passthrough\"\nsource = \"client\""),
        ("dsr", 83, 83, "mode = \"dsr\""),
        ("vip-udp", 80, 8080, "mode = \"passthrough\"\nprotocol = \"udp\""),
        ("dsr-udp", 83, 83, "mode = \"dsr\"\nprotocol = \"udp\""),
    ] {
        let backends = backends(to);
        let backends: Vec<_> = backends.iter().map(|(name, at)| (*name, at.as_str())).collect();
        text += &service(name, "front4", port, how, &backends);
    }
    net.start_relay(&text);
    let client = net.node("client");
    let vips = ["10.77.0.100:80", "10.77.0.100:81", "10.77.0.100:82", "10.77.0.100:83"];
    for (vip, seen) in vips.iter().zip(["10.78.0.100", "10.78.0.2", "10.77.0.10", "10.77.0.10"]) {
        assert_eq!(connect(&client, vip, PATIENCE).unwrap().seen.to_string(), seen, "{vip}");
    }
    let loads: Vec<Load> = vips.into_iter().map(|vip| Load::start(&net, vip, 8)).collect();
    for _ in 0..20 {
        assert_eq!(ask(&client, vips[0]).unwrap().1.to_string(), "10.78.0.100");
        assert_eq!(ask(&client, vips[3]).unwrap().1.to_string(), "10.77.0.10");
    }
    loads.iter().for_each(|load| load.goes_on(&net, None));
    loads.into_iter().for_each(|load| assert_none_lost(load, None));
}
