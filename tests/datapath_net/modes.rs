//! Each mode, family and protocol carries traffic, and the backend sees the client that it should.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::net::{HOOKS, Net, PATIENCE, service};
use crate::server::{ask, connect, serve};

const LARGE: usize = 20_000_000;

/// TCP and UDP services on port 80 of both VIPs, to both backends.
fn services(mode: &str, port: u16) -> String {
    let mut text = String::new();
    for (family, vip, addresses) in [
        ("4", "front4", [format!("10.78.0.11:{port}"), format!("10.78.0.12:{port}")]),
        ("6", "front6", [format!("[fd78::11]:{port}"), format!("[fd78::12]:{port}")]),
    ] {
        for protocol in ["tcp", "udp"] {
            let how = format!("{mode}\nprotocol = \"{protocol}\"");
            let backends = [("b1", addresses[0].as_str()), ("b2", addresses[1].as_str())];
            text += &service(&format!("{protocol}{family}"), vip, 80, &how, &backends);
        }
    }
    text
}

/// Connections and datagrams to both VIPs come to both backends, which see the client as `seen`.
pub(crate) fn carries(net: &Net, seen: [&str; 2]) {
    let client = net.node("client");
    for (vip, seen) in ["10.77.0.100:80", "[fd77::100]:80"].into_iter().zip(seen) {
        let seen: IpAddr = seen.parse().unwrap();
        let mut backends = HashSet::new();
        for _ in 0..20 {
            let mut session = connect(&client, vip, PATIENCE).expect(vip);
            session.echo(10);
            assert_eq!(session.seen, seen, "{vip}");
            backends.insert(session.backend);
        }
        assert_eq!(backends.len(), 2, "{vip}: {backends:?}");
        let mut backends = HashSet::new();
        for _ in 0..20 {
            let (backend, address) = ask(&client, vip).expect(vip);
            assert_eq!(address, seen, "{vip}");
            backends.insert(backend);
        }
        assert_eq!(backends.len(), 2, "{vip}: {backends:?}");
        connect(&client, vip, PATIENCE).unwrap().echo(LARGE);
    }
}

fn serve_everywhere(net: &Net) {
    for (node, host) in [("b1", 11), ("b2", 12)] {
        serve(&net.node(node), node, &format!("10.78.0.{host}:8080"));
        serve(&net.node(node), node, &format!("[fd78::{host}]:8080"));
    }
}

#[test]
fn passthrough_from_the_vip() {
    for hook in HOOKS {
        let mut net = Net::on(hook);
        serve_everywhere(&net);
        net.start_relay(&services("mode = \"passthrough\"", 8080));
        carries(&net, ["10.78.0.100", "fd78::100"]);
    }
}

#[test]
fn passthrough_from_the_client() {
    for hook in HOOKS {
        let mut net = Net::on(hook);
        serve_everywhere(&net);
        // Replies go through the relay.
        for backend in ["b1", "b2"] {
            let routes =
                "route replace default via 10.78.0.100\nroute replace ::/0 via fd78::100\n";
            net.node(backend).ip_batch(routes).unwrap();
        }
        net.start_relay(&services("mode = \"passthrough\"\nsource = \"client\"", 8080));
        carries(&net, ["10.77.0.10", "fd77::10"]);
    }
}

#[test]
fn direct_server_return_on_the_same_network() {
    for hook in HOOKS {
        let mut net = Net::on(hook);
        for node in ["b1", "b2"] {
            let netns = net.node(node);
            // The VIP, on an interface that nobody asks: neither ARP nor ND may show it.
            netns
                .sysctl(&[
                    ("net.ipv4.conf.all.arp_ignore", "1"),
                    ("net.ipv4.conf.all.arp_announce", "2"),
                ])
                .unwrap();
            netns
                .ip_batch("addr add 10.77.0.100/32 dev lo\naddr add fd77::100/128 dev lo nodad\n")
                .unwrap();
            serve(&netns, node, "10.77.0.100:80");
            serve(&netns, node, "[fd77::100]:80");
        }
        net.start_relay(&services("mode = \"dsr\"", 80));
        carries(&net, ["10.77.0.10", "fd77::10"]);
    }
}

#[test]
fn proxy_and_passthrough_share_a_vip() {
    let mut net = Net::new();
    serve_everywhere(&net);
    let backends = [("b1", "10.78.0.11:8080")];
    let text = service("kernel", "front4", 80, "mode = \"passthrough\"", &backends)
        + &service("proxy", "front4", 81, "mode = \"proxy\"", &backends);
    net.start_relay(&text);
    let client = net.node("client");
    let kernel = connect(&client, "10.77.0.100:80", PATIENCE).unwrap();
    assert_eq!(kernel.seen.to_string(), "10.78.0.100");
    let mut proxy = connect(&client, "10.77.0.100:81", PATIENCE).unwrap();
    proxy.echo(100_000);
    assert_eq!(proxy.seen.to_string(), "10.78.0.2");
}
