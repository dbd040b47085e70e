//! The hooks: XDP really carries what it can and hands over the rest, counted once; a hook changes
//! by reload; links outlive daemons; one daemon at a time; nothing stays behind.

use std::net::UdpSocket;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::net::{Net, PATIENCE, service};
use crate::server::{ask, connect, serve};

const VIP: &str = "10.77.0.100:80";
const BACKEND: (&str, &str) = ("b1", "10.78.0.11:8080");

/// A UDP and a TCP service on one backend.
fn services() -> String {
    let how = |protocol| format!("mode = \"passthrough\"\nprotocol = \"{protocol}\"");
    service("tcp", "front4", 80, &how("tcp"), &[BACKEND])
        + &service("udp", "front4", 80, &how("udp"), &[BACKEND])
}

/// A relay with this hook, which carries.
fn net(hook: &'static str) -> Net {
    let mut net = Net::on(hook);
    serve(&net.node("b1"), "b1", BACKEND.1);
    net.start_relay(&services());
    net.until("it carries", || ask(&net.node("client"), VIP).is_ok());
    net
}

fn relay(net: &Net, command: &str, args: &[&str]) -> String {
    let output = net.node("relay").command(command).args(args).output().unwrap();
    assert!(output.status.success(), "{command} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn status(net: &Net) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    let output = command.args(["status", "--json", "--socket"]).arg(net.socket()).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The hook of each interface, as the status has it.
fn hooks(net: &Net) -> Vec<(String, String)> {
    let status = status(net);
    let hooks = status["datapath"]["hooks"].as_array().unwrap().clone();
    let text = |hook: &Value, key: &str| hook[key].as_str().unwrap().to_owned();
    hooks.iter().map(|hook| (text(hook, "interface"), text(hook, "hook"))).collect()
}

/// Frames that XDP has redirected from an interface of the relay.
fn redirected(net: &Net, interface: &str) -> u64 {
    let statistics = relay(net, "ethtool", &["-S", interface]);
    let lines = statistics.lines().filter_map(|line| line.trim().split_once(": "));
    let redirects = lines.filter(|(name, _)| name.ends_with("_xdp_redirect"));
    redirects.map(|(_, count)| count.parse::<u64>().unwrap()).sum()
}

/// Whether the interface has an XDP program in driver mode.
fn has_xdp(net: &Net, interface: &str) -> bool {
    let link = relay(net, "ip", &["link", "show", "dev", interface]);
    assert!(!link.contains("xdpgeneric"), "{link}");
    link.contains("prog/xdp")
}

fn filters(net: &Net, interface: &str) -> String {
    relay(net, "tc", &["filter", "show", "dev", interface, "ingress"])
}

fn traffic(net: &Net, protocol: &str) -> Value {
    let counters = relay(net, env!("CARGO_BIN_EXE_baton"), &["counters", "--json"]);
    let counters: Value = serde_json::from_str(&counters).unwrap();
    let services = counters["services"].as_array().unwrap();
    services.iter().find(|service| service["protocol"] == protocol).unwrap().clone()
}

/// A socket of the client's that talks to the UDP service.
fn udp_client(net: &Net) -> UdpSocket {
    let socket = net.node("client").enter(|| UdpSocket::bind("10.77.0.10:0").unwrap()).unwrap();
    socket.connect(VIP).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn round_trip(socket: &UdpSocket) {
    socket.send(b"who").unwrap();
    socket.recv(&mut [0; 64]).unwrap();
}

#[test]
fn xdp_carries_what_it_knows_the_way_of_and_counts_it_once() {
    let net = net("xdp");
    assert_eq!(hooks(&net), [("back", "xdp"), ("front", "xdp")].map(|(a, b)| (a.into(), b.into())));
    assert!(has_xdp(&net, "front") && has_xdp(&net, "back"));
    let socket = udp_client(&net);
    // The neighbours are known by now, and to XDP soon.
    net.until("frames are redirected both ways", || {
        round_trip(&socket);
        redirected(&net, "front") > 0 && redirected(&net, "back") > 0
    });
    let (before, there, back) =
        (traffic(&net, "udp"), redirected(&net, "front"), redirected(&net, "back"));
    (0..100).for_each(|_| round_trip(&socket));
    let after = traffic(&net, "udp");
    for direction in ["packets_in", "packets_out"] {
        let count = |of: &Value| of[direction].as_u64().unwrap();
        assert_eq!(count(&after) - count(&before), 100, "{direction}");
    }
    assert_eq!(redirected(&net, "front") - there, 100, "some went by TC");
    assert_eq!(redirected(&net, "back") - back, 100, "some went by TC");
}

#[test]
fn what_xdp_can_not_send_goes_by_tc_and_counts_once() {
    let net = net("xdp");
    let socket = udp_client(&net);
    round_trip(&socket);
    // Ways that XDP leaves to the kernel. The rule changes nothing but that.
    relay(&net, "ip", &["rule", "add", "fwmark", "99", "lookup", "main"]);
    net.until("XDP sends no more", || {
        let before = redirected(&net, "front") + redirected(&net, "back");
        round_trip(&socket);
        redirected(&net, "front") + redirected(&net, "back") == before
    });
    let before = traffic(&net, "udp");
    (0..100).for_each(|_| round_trip(&socket));
    let after = traffic(&net, "udp");
    for direction in ["packets_in", "packets_out"] {
        let count = |of: &Value| of[direction].as_u64().unwrap();
        assert_eq!(count(&after) - count(&before), 100, "{direction}");
    }
    relay(&net, "ip", &["rule", "del", "fwmark", "99", "lookup", "main"]);
    let before = redirected(&net, "front");
    net.until("XDP sends again", || {
        round_trip(&socket);
        redirected(&net, "front") > before
    });
}

/// The mark of a handed-over packet: in DSR a flow is established at the client's second packet,
/// not when TC looks at the first one again.
#[test]
fn a_packet_that_both_hooks_see_is_one_packet_to_its_flow() {
    let mut net = Net::on("xdp");
    // Nobody answers there, so that XDP has no neighbour.
    let how = "mode = \"dsr\"\nprotocol = \"udp\"";
    net.start_relay(&service("udp", "front4", 80, how, &[("b1", "10.78.0.99:80")]));
    let socket = udp_client(&net);
    let counts = || {
        let traffic = traffic(&net, "udp");
        ["flows_begun", "flows_established"].map(|key| traffic[key].as_u64().unwrap())
    };
    net.until("the packet has come", || {
        socket.send(b"who").unwrap();
        let counts = counts();
        assert!(counts[0] <= 1);
        // Each packet on its own: what came before it was one, so it is the first.
        counts[0] == 1
    });
    let [begun, established] = counts();
    assert_eq!((begun, established), (1, 0), "established by one packet");
    socket.send(b"who").unwrap();
    net.until("the second one establishes it", || counts()[1] == 1);
}

#[test]
fn a_neighbour_that_changes_its_address_is_followed() {
    let net = net("xdp");
    let socket = udp_client(&net);
    net.until("frames are redirected", || {
        round_trip(&socket);
        redirected(&net, "front") > 0
    });
    // The kernel is told nothing of it: it finds out when XDP's traffic is missed.
    let b1 = net.node("b1");
    b1.ip_batch("link set back address 02:00:00:00:78:99\n").unwrap();
    relay(&net, "ip", &["neigh", "flush", "dev", "back"]);
    net.until("the new address is learnt", || {
        let before = redirected(&net, "front");
        let answered = ask(&net.node("client"), VIP).is_ok();
        answered && redirected(&net, "front") > before
    });
    let neighbours = relay(&net, "ip", &["neigh", "show", "10.78.0.11", "dev", "back"]);
    assert!(neighbours.contains("02:00:00:00:78:99"), "{neighbours}");
}

/// XDP's traffic is none to the kernel: what is in use is asked for before it is forgotten.
#[test]
fn a_neighbour_in_use_does_not_go_stale() {
    // Now and then the kernel goes on confirming it by itself; then there is nothing to see.
    assert!((0..3).any(|_| a_stale_neighbour_is_confirmed()), "it never was stale");
}

/// Whether the neighbour became stale at all; if so, traffic must change that.
fn a_stale_neighbour_is_confirmed() -> bool {
    let mut net = Net::on("xdp");
    let times = [
        ("net.ipv4.neigh.back.base_reachable_time_ms", "1000"),
        ("net.ipv4.neigh.back.delay_first_probe_time", "1"),
    ];
    net.node("relay").sysctl(&times).unwrap();
    serve(&net.node("b1"), "b1", BACKEND.1);
    net.start_relay(&services());
    let socket = udp_client(&net);
    net.until("frames are redirected", || {
        round_trip(&socket);
        redirected(&net, "front") > 0
    });
    let state = || {
        let shown = relay(&net, "ip", &["neigh", "show", "10.78.0.11", "dev", "back"]);
        shown.trim().rsplit(' ').next().unwrap().to_owned()
    };
    let stale = (0..150).any(|_| {
        thread::sleep(Duration::from_millis(100));
        state() == "STALE"
    });
    if stale {
        net.until("it is confirmed, by traffic of XDP's alone", || {
            round_trip(&socket);
            state() != "STALE"
        });
    }
    stale
}

#[test]
fn a_restart_under_load_loses_nothing_on_xdp() {
    let mut net = net("xdp");
    let client = net.node("client");
    let mut sessions: Vec<_> = (0..5).map(|_| connect(&client, VIP, PATIENCE).unwrap()).collect();
    let link = |net: &Net| {
        let pin = net.pins().parent().unwrap().join("links");
        let mut pins: Vec<_> =
            std::fs::read_dir(pin).unwrap().map(|pin| pin.unwrap().path()).collect();
        pins.sort();
        let id = |pin: &std::path::PathBuf| libbpf_rs::Link::open(pin).unwrap().info().unwrap().id;
        pins.iter().map(id).collect::<Vec<_>>()
    };
    let links = link(&net);
    assert_eq!(links.len(), 2);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                sessions.iter_mut().for_each(|session| session.echo(10_000));
            }
        });
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            net.end_relay(signal);
            net.start_relay(&services());
        }
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap();
    });
    assert_eq!(link(&net), links, "the links were made anew");
    sessions.iter_mut().for_each(|session| session.echo(10_000));
}

#[test]
fn the_hook_changes_by_reload_and_by_restart() {
    let mut net = net("xdp");
    let mut session = connect(&net.node("client"), VIP, PATIENCE).unwrap();
    net.set_hook("tc");
    net.reload(&services());
    assert!(hooks(&net).iter().all(|(_, hook)| hook == "tc"), "{:?}", hooks(&net));
    assert!(!has_xdp(&net, "front") && !has_xdp(&net, "back"));
    session.echo(10_000);
    net.end_relay(Signal::SIGKILL);
    net.set_hook("xdp");
    net.start_relay(&services());
    assert!(has_xdp(&net, "front") && has_xdp(&net, "back"));
    session.echo(10_000);
    net.end_relay(Signal::SIGTERM);
    net.set_hook("auto");
    net.start_relay(&services());
    assert!(!has_xdp(&net, "front") && !has_xdp(&net, "back"), "it is veth");
    session.echo(10_000);
}

#[test]
fn a_driver_that_refuses_is_told_of_and_nothing_changes() {
    let mut net = net("tc");
    let mut session = connect(&net.node("client"), VIP, PATIENCE).unwrap();
    // An interface whose driver has no XDP.
    net.node("relay")
        .ip_batch(
            "link add mv link back type macvlan\naddr add 10.99.0.2/24 dev mv\nlink set mv up\n",
        )
        .unwrap();
    let how = "mode = \"passthrough\"";
    let text = services() + &service("other", "front4", 90, how, &[("m", "10.99.0.11:8080")]);
    net.reload(&text);
    assert_eq!(hooks(&net).len(), 3);
    net.set_hook("xdp");
    let refused = net.try_reload(&text);
    assert!(!refused.status.success());
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("nothing was changed"), "{why}");
    assert!(why.contains("XDP can't be attached to mv (driver macvlan)"), "{why}");
    assert!(why.contains("write `hook = \"auto\"`"), "{why}");
    assert!(hooks(&net).iter().all(|(_, hook)| hook == "tc"), "{:?}", hooks(&net));
    assert!(!has_xdp(&net, "front") && !has_xdp(&net, "mv"));
    session.echo(10_000);
}

#[test]
fn unload_removes_all_of_it_even_if_half_is_there() {
    for missing in ["nothing", "filter", "links", "maps"] {
        let mut net = net("xdp");
        let refused = try_unload(&net);
        assert!(!refused.status.success(), "unloaded under a running daemon");
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(why.contains(&format!("process {}: stop it first", net.pid())), "{why}");
        net.end_relay(Signal::SIGKILL);
        let folder = net.pins().parent().unwrap().to_owned();
        match missing {
            "filter" => drop(relay(&net, "tc", &["qdisc", "del", "dev", "front", "clsact"])),
            "links" => std::fs::remove_dir_all(folder.join("links")).unwrap(),
            "maps" => std::fs::remove_dir_all(net.pins()).unwrap(),
            _ => {}
        }
        net.unload();
        assert!(!folder.exists(), "{missing}");
        for interface in ["front", "back"] {
            assert!(!has_xdp(&net, interface), "{missing}");
            if missing != "filter" || interface == "back" {
                assert_eq!(filters(&net, interface), "", "{missing}");
            }
        }
    }
}

fn try_unload(net: &Net) -> Output {
    net.node("relay").command(env!("CARGO_BIN_EXE_baton")).arg("unload").output().unwrap()
}

#[test]
fn a_second_daemon_is_kept_out_and_says_who_is_in() {
    let net = net("tc");
    let output = net.second_relay(&services());
    assert!(!output.status.success());
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    let pid = net.pid();
    assert!(why.contains(&format!("in the hands of process {pid}: stop it first")), "{why}");
    connect(&net.node("client"), VIP, PATIENCE).unwrap().echo(10_000);
}
