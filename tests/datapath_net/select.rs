//! Real connections under limits, with least-connections and with affinity.

use std::io::Read as _;
use std::time::Duration;

use crate::net::{Net, PATIENCE, service};
use crate::server::{Session, connect, serve};

const VIP: &str = "10.77.0.100:80";
const BOTH: [(&str, &str); 2] = [("b1", "10.78.0.11:8080"), ("b2", "10.78.0.12:8080")];

fn web(how: &str) -> String {
    service("web", "front4", 80, &format!("mode = \"passthrough\"\n{how}"), &BOTH)
}

fn net(how: &str) -> Net {
    let mut net = Net::new();
    for (name, address) in BOTH {
        serve(&net.node(name), name, address);
    }
    net.start_relay(&web(how));
    net
}

fn open(net: &Net) -> Session {
    connect(&net.node("client"), VIP, PATIENCE).unwrap()
}

/// Whether a new connection is served; one that is not, is not answered.
fn served(net: &Net) -> bool {
    connect(&net.node("client"), VIP, Duration::from_millis(300)).is_ok()
}

/// Ends a connection from both ends, and waits until it is over.
fn end(session: Session) {
    session.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut left = Vec::new();
    (&session.stream).read_to_end(&mut left).unwrap();
}

#[test]
fn the_least_loaded_backend_gets_what_comes() {
    let net = net("scheduler = \"least-connections\"");
    let (b1, b2): (Vec<_>, Vec<_>) =
        (0..40).map(|_| open(&net)).partition(|session| session.backend == "b1");
    // Two draws that differ nearly always: in 1 of 32 the six are all the same.
    assert!(b1.len().abs_diff(b2.len()) <= 8, "{} and {}", b1.len(), b2.len());
    b1.into_iter().for_each(end);
    // Until they are level again b1 gets what comes, but for 1 of 64: 9 of 12 such are 1 in 10^14.
    let next: Vec<_> = (0..12).map(|_| open(&net)).collect();
    let to_b1 = next.iter().filter(|session| session.backend == "b1").count();
    assert!(to_b1 >= 4, "{to_b1} of 12, though b2 has {}", b2.len());
}

#[test]
fn a_client_keeps_to_its_backend_until_that_leaves() {
    let net = net("scheduler = \"round-robin\"\naffinity = \"1m\"");
    let first = open(&net).backend;
    assert!((0..8).all(|_| open(&net).backend == first));
    net.baton(&["drain", &first]);
    net.until("the client moves", || open(&net).backend != first);
    net.baton(&["enable", &first]);
    // It is back, and the client is not.
    std::thread::sleep(Duration::from_millis(200));
    assert!((0..8).all(|_| open(&net).backend != first));
    // Without affinity they take turns.
    net.reload(&web("scheduler = \"round-robin\""));
    net.until("turns", || {
        let backends: Vec<_> = (0..4).map(|_| open(&net).backend).collect();
        backends[0] != backends[1] && backends[0] == backends[2] && backends[1] == backends[3]
    });
}

#[test]
fn limits_hold_until_somebody_leaves() {
    let net = net("max_connections = 3");
    let mut sessions: Vec<_> = (0..3).map(|_| open(&net)).collect();
    // It is told at once, and need not wait for its own timeout.
    let fourth = connect(&net.node("client"), VIP, PATIENCE).unwrap_err();
    assert_eq!(fourth.kind(), std::io::ErrorKind::ConnectionRefused, "{fourth}");
    end(sessions.pop().unwrap());
    net.until("there is room again", || served(&net));

    // A greater limit takes effect at once, and each backend has its own.
    net.reload(&web("max_connections = 100").replace(
        "address = \"10.78.0.11:8080\"\n",
        "address = \"10.78.0.11:8080\"\nmax_connections = 4\n",
    ));
    let more: Vec<_> = (0..30).map(|_| open(&net)).collect();
    let on_b1 = sessions.iter().chain(&more).filter(|session| session.backend == "b1").count();
    assert!(on_b1 <= 4, "{on_b1}");
    sessions.iter_mut().for_each(|session| session.echo(100));
}

#[test]
fn a_source_has_its_share() {
    let net = net("max_connections_per_source = 2");
    let sessions = [open(&net), open(&net)];
    assert!(!served(&net), "a third");
    sessions.into_iter().for_each(end);
    net.until("there is room again", || served(&net));
}
