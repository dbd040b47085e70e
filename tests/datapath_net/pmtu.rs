//! Links that are narrower than the rest: on the relay, behind a router on either side. TCP gets
//! through because whoever sends too much is told, and nothing else would tell it: every link is
//! wide where it begins.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use pnet_packet::icmp::{self, IcmpPacket, IcmpTypes};
use pnet_packet::{Packet as _, ipv4::Ipv4Packet};
use socket2::{Domain, Protocol, Socket, Type};

use crate::net::{HOOKS, Net, PATIENCE, service};
use crate::server::{connect, serve};

const SIZE: usize = 2_000_000;
const NARROW: u32 = 1300;
const VIPS: [&str; 2] = ["10.77.0.100:80", "[fd77::100]:80"];
const NAT: &str = "mode = \"passthrough\"";
const DNAT: &str = "mode = \"passthrough\"\nsource = \"client\"";

/// One TCP service for each family, to this host of that network.
fn services(how: &str, network: u32, host: u32, port: u16) -> String {
    let v4 = format!("10.{network}.0.{host}:{port}");
    let v6 = format!("[fd{network}::{host}]:{port}");
    service("web4", "front4", 80, how, &[("b4", &v4)])
        + &service("web6", "front6", 80, how, &[("b6", &v6)])
}

/// A leg of b2 in network 79, behind the switch, whose link there is narrow.
fn b2_behind_a_narrow_link(net: &Net) {
    let b2 = net.node("b2");
    net.node("switch")
        .ip_batch(&format!(
            "link add b2-far mtu {NARROW} type veth peer name far netns {}\n\
             addr add 10.79.0.1/24 dev b2-far\naddr add fd79::1/64 dev b2-far nodad\n\
             link set b2-far up\n",
            b2.name()
        ))
        .unwrap();
    b2.ip_batch(
        "addr add 10.79.0.11/24 dev far\naddr add fd79::11/64 dev far nodad\nlink set far up\n\
         route replace default via 10.79.0.1\nroute replace ::/0 via fd79::1\n\
         link set back down\n",
    )
    .unwrap();
}

fn relay_routes(net: &Net, through: &str) {
    let (v4, v6) = match through {
        "front" => ("10.77.0.1", "fd77::1"),
        _ => ("10.78.0.1", "fd78::1"),
    };
    net.node("relay")
        .ip_batch(&format!("route add 10.79.0.0/24 via {v4}\nroute add fd79::/64 via {v6}\n"))
        .unwrap();
}

fn carries(net: &Net, client: &str) {
    for vip in VIPS {
        connect(&net.node(client), vip, PATIENCE).expect(vip).echo(SIZE);
    }
}

/// The route of a node to an address has learnt this MTU.
fn has_learnt(net: &Net, node: &str, to: &str) {
    let route = net.node(node).ip(&format!("route get {to}")).unwrap().stdout;
    let route = String::from_utf8_lossy(&route).into_owned();
    assert!(route.contains(&format!("mtu {NARROW}")), "{node} to {to}: {route}");
}

fn through_the_relay(net: &Net, backend: &str) {
    let routes = "route replace default via 10.78.0.100\nroute replace ::/0 via fd78::100\n";
    net.node(backend).ip_batch(routes).unwrap();
}

/// Who is on the relay's narrow link keeps to it when it sends, as it would on a real one, but
/// says that it takes more, so that only the relay can tell the other end.
fn knows_its_link(net: &Net, node: &str, (dev, network): (&str, u32), gateway: u32) {
    let bounds = |advmss| format!("mtu lock {NARROW} advmss {advmss}");
    net.node(node)
        .ip_batch(&format!(
            "route replace 10.{network}.0.0/24 dev {dev} {}\n\
             route replace default via 10.{network}.0.{gateway} {}\n\
             route replace fd{network}::/64 dev {dev} metric 256 {}\n\
             route replace ::/0 via fd{network}::{gateway} {}\n",
            bounds(1460),
            bounds(1460),
            bounds(1440),
            bounds(1440)
        ))
        .unwrap();
}

#[test]
fn the_relays_own_links() {
    for (how, seen) in [(NAT, ["10.78.0.100", "fd78::100"]), (DNAT, ["10.77.0.10", "fd77::10"])] {
        for (narrow, hook) in [("front", "tc"), ("back", "tc"), ("front", "xdp"), ("back", "xdp")] {
            let mut net = Net::on(hook);
            serve(&net.node("b1"), "b1", "10.78.0.11:8080");
            serve(&net.node("b1"), "b1", "[fd78::11]:8080");
            let gateway = if how == DNAT { 100 } else { 1 };
            if how == DNAT {
                through_the_relay(&net, "b1");
            }
            match narrow {
                "front" => knows_its_link(&net, "client", ("front", 77), 1),
                _ => knows_its_link(&net, "b1", ("back", 78), gateway),
            }
            net.node("relay").ip(&format!("link set {narrow} mtu {NARROW}")).unwrap();
            net.start_relay(&services(how, 78, 11, 8080));
            carries(&net, "client");
            for (vip, seen) in ["10.77.0.100", "fd77::100"].iter().zip(seen) {
                match narrow {
                    "front" => has_learnt(&net, "b1", seen),
                    _ => has_learnt(&net, "client", vip),
                }
            }
        }
    }
}

#[test]
fn a_narrow_link_on_the_clients_side() {
    let ways = [(NAT, ["10.78.0.100", "fd78::100"]), (DNAT, ["10.79.0.11", "fd79::11"])];
    for ((how, seen), hook) in ways.into_iter().flat_map(|way| HOOKS.map(|hook| (way, hook))) {
        let mut net = Net::on(hook);
        serve(&net.node("b1"), "b1", "10.78.0.11:8080");
        serve(&net.node("b1"), "b1", "[fd78::11]:8080");
        if how == DNAT {
            through_the_relay(&net, "b1");
        }
        b2_behind_a_narrow_link(&net);
        relay_routes(&net, "front");
        net.start_relay(&services(how, 78, 11, 8080));
        carries(&net, "b2");
        for seen in seen {
            has_learnt(&net, "b1", seen);
        }
    }
}

/// The backend's answers do not come by the relay, but what a router has to say of them does.
#[test]
fn a_narrow_link_on_the_clients_side_of_direct_server_return() {
    HOOKS.into_iter().for_each(narrow_for_direct_server_return);
}

fn narrow_for_direct_server_return(hook: &'static str) {
    let mut net = Net::on(hook);
    let b1 = net.node("b1");
    b1.sysctl(&[("net.ipv4.conf.all.arp_ignore", "1"), ("net.ipv4.conf.all.arp_announce", "2")])
        .unwrap();
    b1.ip_batch("addr add 10.77.0.100/32 dev lo\naddr add fd77::100/128 dev lo nodad\n").unwrap();
    serve(&b1, "b1", VIPS[0]);
    serve(&b1, "b1", VIPS[1]);
    b2_behind_a_narrow_link(&net);
    relay_routes(&net, "front");
    net.start_relay(&services("mode = \"dsr\"", 78, 11, 80));
    carries(&net, "b2");
    has_learnt(&net, "b1", "10.79.0.11 from 10.77.0.100");
    has_learnt(&net, "b1", "fd79::11 from fd77::100");
}

#[test]
fn a_narrow_link_on_the_backends_side() {
    for hook in HOOKS {
        let mut net = Net::on(hook);
        b2_behind_a_narrow_link(&net);
        serve(&net.node("b2"), "b2", "10.79.0.11:8080");
        serve(&net.node("b2"), "b2", "[fd79::11]:8080");
        relay_routes(&net, "back");
        net.start_relay(&services(NAT, 79, 11, 8080));
        carries(&net, "client");
        has_learnt(&net, "client", "10.77.0.100");
        has_learnt(&net, "client", "fd77::100");
    }
}

/// As traceroute does it. The relay's device fills in no checksum, so what comes is what a NIC
/// would have sent: the sum must be right although the buffer's own was left to a device.
#[test]
fn the_relay_shows_where_the_ttl_ends() {
    let mut net = Net::on("tc");
    net.ethtool("relay", "front", &["tx", "off"]);
    serve(&net.node("b1"), "b1", "10.78.0.11:8080");
    let how = format!("{NAT}\nprotocol = \"udp\"");
    net.start_relay(&service("dns", "front4", 80, &how, &[("b1", "10.78.0.11:8080")]));
    let (probe, raw) = net
        .node("client")
        .enter(|| {
            let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).unwrap();
            (UdpSocket::bind("0.0.0.0:0").unwrap(), raw)
        })
        .unwrap();
    raw.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    probe.set_ttl(1).unwrap();
    let vip: SocketAddr = VIPS[0].parse().unwrap();
    net.until("time exceeded comes from the VIP", || {
        probe.send_to(b"probe, and an odd number of bytes", vip).unwrap();
        let mut buffer = [0; 2048];
        let Ok(length) = std::io::Read::read(&mut &raw, &mut buffer) else { return false };
        let ip = Ipv4Packet::new(&buffer[..length]).unwrap();
        let icmp = IcmpPacket::new(ip.payload()).unwrap();
        assert_eq!(icmp.get_checksum(), icmp::checksum(&icmp));
        assert_eq!(icmp.get_icmp_type(), IcmpTypes::TimeExceeded);
        SocketAddr::new(ip.get_source().into(), 80) == vip
    });
}

#[test]
fn an_echo_to_the_vip_is_answered_while_the_gate_is_open() {
    HOOKS.into_iter().for_each(echo_follows_the_gate);
}

fn echo_follows_the_gate(hook: &'static str) {
    let mut net = Net::on(hook);
    net.start_relay(&services(NAT, 78, 11, 8080));
    let ping = |vip: &str| {
        let mut ping = net.node("client").command("ping");
        ping.args(["-c", "1", "-W", "1", vip]).output().unwrap().status.success()
    };
    for vip in ["10.77.0.100", "fd77::100"] {
        net.until(&format!("{vip} answers"), || ping(vip));
    }
    net.end_relay(nix::sys::signal::Signal::SIGKILL);
    // The addresses go with the daemon: give them back, so that only the gate is left.
    let relay = net.node("relay");
    relay
        .ip_batch("addr replace 10.77.0.100/32 dev lo\naddr replace fd77::100/128 dev lo nodad\n")
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let ping = |vip: &str| {
        let mut ping = net.node("client").command("ping");
        ping.args(["-c", "1", "-W", "1", vip]).output().unwrap().status.success()
    };
    for vip in ["10.77.0.100", "fd77::100"] {
        assert!(!ping(vip), "{vip} answers while the gate is closed");
    }
}
