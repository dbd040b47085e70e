//! Backends come and go under a running relay: new flows follow, known flows stay where they are.

use std::collections::HashSet;
use std::io::Read as _;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use baton::datapath::record::Record as _;
use baton::datapath::skeleton::types;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};

use crate::net::{Net, PATIENCE, service};
use crate::server::{Session, connect, serve};

const VIP: &str = "10.77.0.100:80";
const BOTH: [(&str, &str); 2] = [("b1", "10.78.0.11:8080"), ("b2", "10.78.0.12:8080")];

fn net() -> Net {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", BOTH[0].1);
    serve(&net.node("b2"), "b2", BOTH[1].1);
    net.start_relay(&web(&BOTH));
    net
}

fn web(backends: &[(&str, &str)]) -> String {
    service("web", "front4", 80, "mode = \"passthrough\"", backends)
}

/// A session on each backend.
fn on_both(net: &Net) -> [Session; 2] {
    let (mut b1, mut b2) = (None, None);
    while b1.is_none() || b2.is_none() {
        let session = connect(&net.node("client"), VIP, PATIENCE).unwrap();
        let place = if session.backend == "b1" { &mut b1 } else { &mut b2 };
        *place = Some(session);
    }
    [b1.unwrap(), b2.unwrap()]
}

/// Waits until new sessions come to these backends and no other. One that is begun just when its
/// backend leaves is reset.
fn await_backends(net: &Net, wanted: &[&str]) {
    net.until(&format!("new sessions come to {wanted:?}"), || {
        let session = |_| Some(connect(&net.node("client"), VIP, PATIENCE).ok()?.backend);
        let Some(mut seen) = (0..16).map(session).collect::<Option<Vec<String>>>() else {
            return false;
        };
        seen.sort();
        seen.dedup();
        seen == wanted
    });
}

/// The backends that flows go to, as the pinned maps have them.
fn flows_to(net: &Net) -> HashSet<String> {
    let map = |name| MapHandle::from_pinned_path(net.pins().join(name)).unwrap();
    let (flows, backends) = (map("flows"), map("backend_table"));
    flows
        .keys()
        .filter_map(|key| flows.lookup(&key, MapFlags::ANY).unwrap())
        .map(|flow| {
            let id = u32::from(types::flow::read(&flow).unwrap().backend);
            let backend = backends.lookup(id.bytes(), MapFlags::ANY).unwrap().unwrap();
            IpAddr::from(types::backend::read(&backend).unwrap().address).to_string()
        })
        .collect()
}

/// The client, which sends nothing and waits, is told that its connection is over.
fn assert_reset(session: &mut Session) {
    let error = session.stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn datagrams_go_to_another_backend_at_once() {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", BOTH[0].1);
    serve(&net.node("b2"), "b2", BOTH[1].1);
    let how = "mode = \"passthrough\"\nprotocol = \"udp\"\nidle_timeout = \"1h\"";
    net.start_relay(&service("echo", "front4", 80, how, &BOTH));
    let socket = net.node("client").enter(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    socket.connect(VIP).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    // One flow: always from the same port.
    let who = || {
        let mut buffer = [0; 256];
        socket.send(b"who").ok()?;
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).split(' ').next()?.to_owned())
    };
    net.until("it is served", || who().is_some());
    let (first, other) = if who().as_deref() == Some("b1") { ("b1", "b2") } else { ("b2", "b1") };
    net.baton(&["drain", first]);
    assert_eq!(who().as_deref(), Some(first), "drained, it keeps the flow");
    net.baton(&["disable", first]);
    net.until("the flow is with the other", || who().as_deref() == Some(other));
}

#[test]
fn a_drained_backend_keeps_its_sessions() {
    let net = net();
    let mut sessions = on_both(&net);
    net.baton(&["drain", "b1"]);
    await_backends(&net, &["b2"]);
    sessions.iter_mut().for_each(|session| session.echo(1000));
    net.baton(&["enable", "b1"]);
    await_backends(&net, &["b1", "b2"]);
    sessions.iter_mut().for_each(|session| session.echo(1000));
}

#[test]
fn a_disabled_backend_is_cut_off() {
    let net = net();
    let [mut b1, mut b2] = on_both(&net);
    net.baton(&["disable", "b1"]);
    await_backends(&net, &["b2"]);
    b2.echo(1000);
    assert_reset(&mut b1);
}

#[test]
fn a_reload_moves_nobody_who_need_not_move() {
    let net = net();
    let [mut b1, mut b2] = on_both(&net);
    net.reload(&web(&BOTH[1..]));
    await_backends(&net, &["b2"]);
    b2.echo(1000);
    // It is no backend any more.
    assert_reset(&mut b1);
    net.until("its flows are gone", || !flows_to(&net).contains("10.78.0.11"));
    assert!(flows_to(&net).contains("10.78.0.12"));
    net.reload(&web(&BOTH));
    await_backends(&net, &["b1", "b2"]);
    b2.echo(1000);
}

#[test]
fn a_service_can_move_into_the_kernel_and_out_again() {
    let net = net();
    let seen =
        || connect(&net.node("client"), VIP, PATIENCE).map(|session| session.seen.to_string());
    assert_eq!(seen().unwrap(), "10.78.0.100");
    net.reload(&service("web", "front4", 80, "mode = \"proxy\"", &BOTH));
    net.until("the proxy serves", || seen().is_ok_and(|seen| seen == "10.78.0.2"));
    net.reload(&web(&BOTH));
    net.until("the kernel serves", || seen().is_ok_and(|seen| seen == "10.78.0.100"));
}
