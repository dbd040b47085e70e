//! Backends that the check finds down: what becomes of their sessions, by the service's policy.

use std::io::{ErrorKind, Read as _};

use crate::net::{HOOKS, Net, PATIENCE, service};
use crate::server::{Session, connect, serve};

const VIPS: [&str; 2] = ["10.77.0.100:80", "[fd77::100]:80"];

/// Two backends of either family, checked ten times a second.
fn net(hook: &'static str, how: &str) -> Net {
    let mut net = Net::on(hook);
    let mut text =
        "[checks.alive]\ntype = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"90ms\"\n".to_owned();
    let how = format!("mode = \"passthrough\"\ncheck = \"alive\"\n{how}");
    for (vip, addresses) in
        [("front4", ["10.78.0.11:8080", "10.78.0.12:8080"]), ("front6", FAMILY6)]
    {
        serve(&net.node("b1"), "b1", addresses[0]);
        serve(&net.node("b2"), "b2", addresses[1]);
        let backends = [("b1", addresses[0]), ("b2", addresses[1])];
        text += &service(&format!("web-{vip}"), vip, 80, &how, &backends);
    }
    net.start_relay(&text);
    for vip in VIPS {
        await_backends(&net, vip, &["b1", "b2"]);
    }
    net
}

const FAMILY6: [&str; 2] = ["[fd78::11]:8080", "[fd78::12]:8080"];

/// Waits until new sessions come to these backends and no other. One that is begun just when its
/// backend leaves is reset.
fn await_backends(net: &Net, vip: &str, wanted: &[&str]) {
    net.until(&format!("new sessions to {vip} come to {wanted:?}"), || {
        let session = |_| Some(connect(&net.node("client"), vip, PATIENCE).ok()?.backend);
        let Some(mut seen) = (0..16).map(session).collect::<Option<Vec<String>>>() else {
            return false;
        };
        seen.sort();
        seen.dedup();
        seen == wanted
    });
}

fn session_on(net: &Net, vip: &str, backend: &str) -> Session {
    loop {
        let session = connect(&net.node("client"), vip, PATIENCE).unwrap();
        if session.backend == backend {
            return session;
        }
    }
}

/// Its link is cut, so that the check finds it down.
fn cut_b1_off(net: &Net) {
    net.node("b1").ip("link set back down").unwrap();
    VIPS.iter().for_each(|vip| await_backends(net, vip, &["b2"]));
}

fn bring_b1_back(net: &Net) {
    net.node("b1")
        .ip_batch(
            "link set back up\naddr replace fd78::11/64 dev back nodad\n\
             route replace default via 10.78.0.1\nroute replace ::/0 via fd78::1\n",
        )
        .unwrap();
    VIPS.iter().for_each(|vip| await_backends(net, vip, &["b1", "b2"]));
}

#[test]
fn its_clients_are_told_at_once() {
    for hook in HOOKS {
        let net = net(hook, "");
        let mut sessions = VIPS.map(|vip| session_on(&net, vip, "b1"));
        let mut others = VIPS.map(|vip| session_on(&net, vip, "b2"));
        cut_b1_off(&net);
        for session in &mut sessions {
            // The client sends nothing: it hears of it all the same.
            let error = session.stream.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
        others.iter_mut().for_each(|session| session.echo(1000));
    }
}

#[test]
fn its_sessions_wait_for_it_where_they_are_kept() {
    for hook in HOOKS {
        let net = net(hook, "on_down = \"keep\"");
        let mut sessions = VIPS.map(|vip| session_on(&net, vip, "b1"));
        cut_b1_off(&net);
        bring_b1_back(&net);
        sessions.iter_mut().for_each(|session| session.echo(100_000));
    }
}
