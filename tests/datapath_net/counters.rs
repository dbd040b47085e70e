//! What was counted shows, with a daemon and without.

use std::process::{Command, Output};

use baton::datapath::record::Record as _;
use baton::datapath::skeleton::types;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::net::{Net, PATIENCE, service};
use crate::server::{connect, serve};

const VIP: &str = "10.77.0.100:80";

fn counters(net: &Net, args: &[&str]) -> Output {
    let mut command = net.node("relay").command(env!("CARGO_BIN_EXE_baton"));
    command.arg("counters").args(args).output().unwrap()
}

fn text(net: &Net, args: &[&str]) -> String {
    let output = counters(net, args);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(net: &Net) -> Value {
    serde_json::from_str(&text(net, &["--json"])).unwrap()
}

#[test]
fn counters_show_traffic_and_drops_with_a_daemon_and_without() {
    let mut net = Net::new();
    let none = counters(&net, &[]);
    assert_eq!(none.status.code(), Some(1));
    let why = String::from_utf8_lossy(&none.stderr);
    assert!(why.contains("no datapath is loaded in this network namespace"), "{why}");

    let b1 = net.node("b1");
    serve(&b1, "b1", "10.78.0.11:8080");
    let how = "mode = \"passthrough\"";
    net.start_relay(&service("web", "front4", 80, how, &[("b1", "10.78.0.11:8080")]));
    let client = net.node("client");
    let mut session = connect(&client, VIP, PATIENCE).unwrap();
    session.echo(100_000);
    // Something from the backend's port that belongs to no flow.
    let stray = b1.enter(|| std::net::UdpSocket::bind("10.78.0.11:9999").unwrap()).unwrap();
    let udp = service(
        "dns",
        "front4",
        53,
        &format!("{how}\nprotocol = \"udp\""),
        &[("b1", "10.78.0.11:9999")],
    );
    net.reload(&(service("web", "front4", 80, how, &[("b1", "10.78.0.11:8080")]) + &udp));
    net.until("a packet of no flow is counted", || {
        stray.send_to(b"stray", "10.78.0.100:4000").unwrap();
        json(&net)["drops"]["REPLY_NO_FLOW"].as_u64().unwrap() > 0
    });

    let before = json(&net);
    let web = before["services"].as_array().unwrap().iter();
    let web = web.clone().find(|service| service["listen"] == VIP).unwrap();
    let b1 = &web["backends"][0];
    assert_eq!(b1["address"], "10.78.0.11:8080");
    for of in [web, b1] {
        assert_eq!(of["live"], 1, "{before:#}");
        assert_eq!(of["flows_begun"], 1, "{before:#}");
        assert_eq!(of["flows_established"], 1, "{before:#}");
        for direction in ["bytes_in", "bytes_out"] {
            assert!(of[direction].as_u64().unwrap() > 100_000, "{before:#}");
        }
        assert!(of["packets_in"].as_u64().unwrap() > 1, "{before:#}");
    }
    assert_eq!(before["drops"]["NO_BACKEND"], 0);

    let shown = text(&net, &[]);
    assert!(shown.contains("REPLY_NO_FLOW") && !shown.contains("BAD_CHECKSUM"), "{shown}");
    assert!(
        shown.contains("10.77.0.100:80/tcp") && shown.contains("10.77.0.100:53/udp"),
        "{shown}"
    );
    assert!(text(&net, &["--all"]).contains("BAD_CHECKSUM"));

    net.end_relay(Signal::SIGKILL);
    let after = json(&net);
    assert!(after["drops"]["REPLY_NO_FLOW"].as_u64() >= before["drops"]["REPLY_NO_FLOW"].as_u64());
    assert!(text(&net, &[]).contains("10.78.0.11:8080"));
    net.unload();
    assert_eq!(counters(&net, &["--json"]).status.code(), Some(1));
}

fn status(net: &Net, args: &[&str]) -> String {
    ask(net, "status", args)
}

fn ask(net: &Net, what: &str, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    let output = command.arg(what).args(args).arg("--socket").arg(net.socket()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn status_shows_flows_traffic_hooks_and_gate() {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", "10.78.0.11:8080");
    let backends = [("b1", "10.78.0.11:8080")];
    net.start_relay(
        &(service("web", "front4", 80, "mode = \"passthrough\"", &backends)
            + &service("proxy", "front4", 81, "mode = \"proxy\"", &backends)),
    );
    let client = net.node("client");
    let mut sessions: Vec<_> = (0..3).map(|_| connect(&client, VIP, PATIENCE).unwrap()).collect();
    sessions[0].echo(100_000);
    let json = || serde_json::from_str::<Value>(&status(&net, &["--json"])).unwrap();
    // Entries are counted every two seconds.
    net.until("the flows show", || json()["datapath"]["flows"] == 3);
    let now = json();
    let datapath = &now["datapath"];
    assert_eq!((&datapath["gate"], &datapath["max_flows"]), (&"open".into(), &4096.into()));
    let why = "driver veth: XDP breaks partial checksums and large segments there";
    let tc = |interface| serde_json::json!({"interface": interface, "hook": "tc", "why": why});
    assert_eq!(datapath["hooks"], serde_json::json!([tc("back"), tc("front")]));
    let named = |name: &str| {
        let services = now["services"].as_array().unwrap();
        services.iter().find(|service| service["name"] == name).unwrap()
    };
    let (web, proxy) = (named("web"), named("proxy"));
    for of in [web, &web["backends"][0]] {
        assert_eq!(of["connections"], 3, "{now:#}");
        assert_eq!(of["traffic"]["flows_established"], 3, "{now:#}");
        assert!(of["traffic"]["bytes_out"].as_u64().unwrap() > 100_000, "{now:#}");
    }
    assert_eq!(web["backends"][0]["total"], 3);
    assert_eq!(proxy["connections"], 0);
    assert_eq!(proxy["traffic"], Value::Null);

    let text = status(&net, &[]);
    assert!(text.contains("Datapath: gate open; 3 of 4096 flows, 0 of 1024 half-open\n"), "{text}");
    assert!(text.contains(&format!("\n  front: tc ({why})\n")), "{text}");
    assert!(text.contains("; 3 flows, "), "{text}");
}

#[test]
fn sessions_lists_the_flows_that_are_wanted() {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", "10.78.0.11:8080");
    serve(&net.node("b2"), "b2", "10.78.0.12:8080");
    let how = "mode = \"passthrough\"";
    let client_source = "mode = \"passthrough\"\nsource = \"client\"";
    net.node("b2").ip_batch("route replace default via 10.78.0.100\n").unwrap();
    net.start_relay(
        &(service("web", "front4", 80, how, &[("b1", "10.78.0.11:8080")])
            + &service("plain", "front4", 81, client_source, &[("b2", "10.78.0.12:8080")])),
    );
    let client = net.node("client");
    let open: Vec<_> = (0..3).map(|_| connect(&client, VIP, PATIENCE).unwrap()).collect();
    let plain = connect(&client, "10.77.0.100:81", PATIENCE).unwrap();
    let list = |args: &[&str]| -> Vec<Value> {
        let answer = ask(&net, "sessions", &[args, &["--json"]].concat());
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["more"], args.contains(&"--limit"), "{answer:#}");
        answer["sessions"].as_array().unwrap().clone()
    };
    assert_eq!(list(&[]).len(), 4);
    assert_eq!(list(&["--limit", "2"]).len(), 2);
    assert_eq!(list(&["--client", "10.77.0.10"]).len(), 4);
    assert_eq!(list(&["--client", "10.77.0.11"]).len(), 0);
    assert_eq!(list(&["--backend", "b2"]).len(), 1);
    let web = list(&["--service", "web"]);
    assert_eq!(web.len(), 3);
    for session in &open {
        let local = session.stream.local_addr().unwrap().to_string();
        let found = web.iter().find(|found| found["client"] == local.as_str()).unwrap();
        assert_eq!(found["state"], "established");
        assert_eq!(
            (&found["backend"], &found["backend_address"]),
            (&"b1".into(), &"10.78.0.11:8080".into())
        );
        assert!(found["nat"].as_str().unwrap().starts_with("10.78.0.100:"), "{found}");
        let age = |of: &str| found[of].as_f64().unwrap();
        assert!(age("idle_s") <= age("age_s") && age("age_s") < 60.0, "{found}");
    }
    assert_eq!(list(&["--service", "plain"])[0]["nat"], Value::Null);
    assert!(ask(&net, "sessions", &["--limit", "1"]).contains("There are more"));
    let kill = |args: &[&str]| -> Value {
        let args = [&["kill"], args, &["--json"]].concat();
        serde_json::from_str(&ask(&net, "sessions", &args)).unwrap()
    };
    let none = kill(&["--client", "10.77.0.11"]);
    assert_eq!((&none["established"], &none["told"]), (&0.into(), &0.into()));
    assert_eq!(list(&["--service", "web"]).len(), 3);
    let killed = kill(&["--service", "web"]);
    assert_eq!((&killed["established"], &killed["told"]), (&3.into(), &3.into()), "{killed}");
    for session in &open {
        // It waits for nothing but bytes of the backend's.
        let error = std::io::Read::read(&mut &session.stream, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let mut all = Command::new(env!("CARGO_BIN_EXE_baton"));
    let all = all.args(["sessions", "kill"]).output().unwrap();
    assert_eq!(all.status.code(), Some(2), "it wants to know which");
    // The backend closes its direction in turn.
    drop(plain);
    net.until("it is closed", || {
        let left = list(&["--service", "plain"]);
        left.iter().all(|session| session["state"] == "closed")
    });
}

#[test]
fn live_flows_are_right_after_a_restart_and_put_right_if_not() {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", "10.78.0.11:8080");
    let web = service("web", "front4", 80, "mode = \"passthrough\"", &[("b1", "10.78.0.11:8080")]);
    net.start_relay(&web);
    let client = net.node("client");
    let mut sessions: Vec<_> = (0..3).map(|_| connect(&client, VIP, PATIENCE).unwrap()).collect();
    let live = |net: &Net| {
        let service = &json(net)["services"][0];
        [&service["live"], &service["backends"][0]["live"]].map(|live| live.as_u64().unwrap())
    };
    assert_eq!(live(&net), [3, 3]);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        net.end_relay(signal);
        net.start_relay(&web);
        assert_eq!(live(&net), [3, 3]);
    }
    sessions.pop();
    net.until("what is closed is gone", || live(&net) == [2, 2]);

    // Somebody has miscounted.
    for (map, off) in [("service_live", 5), ("backend_live", -1)] {
        let map = MapHandle::from_pinned_path(net.pins().join(map)).unwrap();
        let ids = map.keys().filter(|id| {
            let bytes = map.lookup(id, MapFlags::ANY).unwrap().unwrap();
            types::live::read(&bytes).unwrap().begun > 0
        });
        let ids: Vec<_> = ids.collect();
        assert_eq!(ids.len(), 1);
        let mut live = types::live::read(&map.lookup(&ids[0], MapFlags::ANY).unwrap().unwrap());
        let record = live.as_mut().unwrap();
        record.ended = record.ended.wrapping_sub(off as u32);
        map.update(&ids[0], record.bytes(), MapFlags::ANY).unwrap();
    }
    assert_eq!(live(&net), [7, 1]);
    net.until("the collector has put it right", || live(&net) == [2, 2]);
    sessions.iter_mut().for_each(|session| session.echo(10));
}
