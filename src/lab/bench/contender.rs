//! Who is compared, and how each is told to do the same: two services, one by source address for
//! iperf3, one in turn for the web servers.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::load::IPERF_PORT;
use crate::lab::netns::run;
use crate::lab::process::Daemon;
use crate::lab::topology::{HTTP_PORT, Node, Role, Segment, Topology, VIP_BACK, VIP_FRONT};
use crate::lab::{Doing as _, Lab, LabError};

/// What a relay does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contender {
    /// Baton's kernel datapath, full NAT.
    Passthrough,
    /// DNAT and masquerade.
    Nftables,
    /// The kernel's forwarding, nothing rewritten but the TTL.
    Routing,
    /// Baton's proxy mode.
    Proxy,
    Haproxy,
    HaproxySplice,
    Nginx,
    /// No relay: the client talks to a backend, through the switch. What the load itself costs,
    /// and so what no relay can surpass here.
    Direct,
}

/// The services: name, port, and whether clients stay with a backend.
const SERVICES: [(&str, u16, bool); 2] = [("iperf", IPERF_PORT, true), ("web", HTTP_PORT, false)];

/// Most connections of each proxy, as HAProxy's file limit allows.
const CONNECTIONS: u32 = 4000;
/// Threads or workers of each proxy.
const THREADS: u32 = 2;
/// Flows that Baton's table holds, and nearly as many as conntrack's by default.
const FLOWS: u32 = 262_144;

/// Packets are forwarded; those that go back by the way they came lead to no redirect.
const FORWARDING: &[(&str, &str)] = &[
    ("net.ipv4.ip_forward", "1"),
    ("net.ipv4.conf.all.send_redirects", "0"),
    ("net.ipv4.conf.default.send_redirects", "0"),
    ("net.ipv4.conf.front.send_redirects", "0"),
];

/// Closed connections are forgotten as soon as Baton forgets them, so that ports come free.
const CONNTRACK: &[(&str, &str)] = &[
    ("net.netfilter.nf_conntrack_tcp_timeout_time_wait", "10"),
    ("net.netfilter.nf_conntrack_tcp_timeout_close", "10"),
];

impl Contender {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Passthrough | Self::Proxy => "baton",
            Self::Nftables => "nftables",
            Self::Routing => "plain-routing",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::Nginx => "nginx-stream",
            Self::Direct => "no-relay",
        }
    }

    /// What it needs besides a daemon.
    pub(super) fn prepare(
        self,
        lab: &Lab,
        relay: &str,
        congestion: Option<&str>,
    ) -> Result<(), LabError> {
        let netns = lab.netns(relay);
        match self {
            Self::Nftables => {
                let rules = lab.write("bench.nft", &nftables(&lab.topology, relay))?;
                run(netns.command("nft").args(["-f", &rules])).doing("loading nftables rules")?;
                netns.sysctl(FORWARDING).doing("setting kernel parameters")?;
                netns.sysctl(CONNTRACK).doing("setting kernel parameters")
            }
            Self::Routing => {
                netns.sysctl(FORWARDING).doing("setting kernel parameters")?;
                route(lab, relay, congestion).doing("setting routes")
            }
            _ => Ok(()),
        }
    }

    /// What runs on the relay, its configuration written; `None` where nothing does.
    pub(super) fn daemon(self, lab: &Lab, relay: &str) -> Result<Option<Daemon>, LabError> {
        let (topology, dir) = (&lab.topology, &lab.dir);
        let text = match self {
            Self::Passthrough => passthrough(topology, relay, dir),
            Self::Proxy => proxy(topology, relay, dir),
            Self::Haproxy => haproxy(topology, relay, ""),
            Self::HaproxySplice => haproxy(topology, relay, "  option splice-auto\n"),
            Self::Nginx => nginx(topology, relay, dir),
            Self::Nftables | Self::Routing | Self::Direct => return Ok(None),
        };
        let file = lab.write(&format!("bench-{relay}.conf"), &text)?;
        let (program, args): (PathBuf, &[&str]) = match self {
            Self::Haproxy | Self::HaproxySplice => ("haproxy".into(), &["-db", "-f", &file]),
            Self::Nginx => ("nginx".into(), &["-e", "stderr", "-c", &file]),
            _ => (lab.options.binary.clone(), &["run", "-c", &file]),
        };
        Ok(Some(Daemon::new(self.name(), program, args.iter().copied())))
    }

    /// The address that the client talks to.
    pub(super) fn address(self, topology: &Topology, relay: &str) -> Ipv4Addr {
        match self {
            Self::Direct | Self::Routing => first_backend(topology),
            Self::Passthrough => VIP_FRONT,
            _ => front(topology, relay),
        }
    }
}

fn node<'a>(topology: &'a Topology, name: &str) -> &'a Node {
    topology.node(name).expect("a relay of this lab")
}

fn front(topology: &Topology, relay: &str) -> Ipv4Addr {
    let front = node(topology, relay).link(Segment::Front);
    front.expect("every relay has a link to the front").v4
}

fn first_backend(topology: &Topology) -> Ipv4Addr {
    backends(topology).next().expect("every lab has backends").1
}

/// Between client and first backend through the relay, instead of the switch.
fn route(lab: &Lab, relay: &str, congestion: Option<&str>) -> std::io::Result<()> {
    let topology = &lab.topology;
    let relay = node(topology, relay);
    let there = relay.link(Segment::Front).expect("every relay has one").v4;
    let back = relay.link(Segment::Back).map_or(there, |link| link.v4);
    let client = topology.node("client").expect("every lab has a client").links[0].v4;
    let backend = first_backend(topology);
    let congestion = congestion.map_or(String::new(), |name| format!("congctl {name}"));
    let route = |to: Ipv4Addr, via: Ipv4Addr| format!("route add {to}/32 via {via} {congestion}");
    lab.netns("client").ip(&route(backend, there))?;
    lab.netns("backend1").ip(&route(client, back)).map(drop)
}

fn backends(topology: &Topology) -> impl Iterator<Item = (&str, Ipv4Addr)> {
    topology.role(Role::Backend).map(|node| (node.name.as_str(), node.links[0].v4))
}

/// `[[services]]` of a file for `baton run`; `more` are keys of each.
fn services(text: &mut String, topology: &Topology, more: impl Fn(u16, bool) -> String) {
    for (name, port, sticky) in SERVICES {
        let more = more(port, sticky);
        push(text, format_args!("\n[[services]]\nname = \"{name}\"\n{more}"));
        for (backend, address) in backends(topology) {
            push(
                text,
                format_args!(
                    "[[services.backends]]\nname = \"{backend}\"\naddress = \"{address}:{port}\""
                ),
            );
        }
    }
}

fn passthrough(topology: &Topology, relay: &str, dir: &Path) -> String {
    let dir = dir.display();
    let mut text = format!(
        "[node]\nname = \"{relay}\"\ncontrol = \"{dir}/bench-{relay}.sock\"\n\
         state_dir = \"{dir}/bench-{relay}.state\"\nlog = \"warn\"\n\
         [election]\nvrid = 77\npriority = 255\n\
         [datapath]\nflows = {FLOWS}\n"
    );
    for link in &node(topology, relay).links {
        let (interface, vip) = match link.segment {
            Segment::Front => ("front", VIP_FRONT),
            Segment::Back => ("back", VIP_BACK),
        };
        push(
            &mut text,
            format_args!(
                "[[vips]]\nname = \"{interface}\"\naddress = \"{vip}/24\"\n\
                 interface = \"{interface}\""
            ),
        );
    }
    services(&mut text, topology, |port, sticky| {
        let scheduler = if sticky { "source-hash" } else { "maglev" };
        format!(
            "vip = \"front\"\nport = {port}\nmode = \"passthrough\"\n\
             scheduler = \"{scheduler}\"\nmax_connections = {FLOWS}\n\
             max_connections_per_source = {FLOWS}"
        )
    });
    text
}

fn proxy(topology: &Topology, relay: &str, dir: &Path) -> String {
    let (front, dir) = (front(topology, relay), dir.display());
    let mut text = format!(
        "[node]\nname = \"{relay}\"\ncontrol = \"{dir}/bench-{relay}.sock\"\n\
         workers = {THREADS}\nlog = \"warn\"\n"
    );
    services(&mut text, topology, |port, sticky| {
        let scheduler = if sticky { "source-hash" } else { "round-robin" };
        format!(
            "listen = \"{front}:{port}\"\nscheduler = \"{scheduler}\"\n\
             max_connections = {CONNECTIONS}\nmax_connections_per_source = {CONNECTIONS}"
        )
    });
    text
}

fn nftables(topology: &Topology, relay: &str) -> String {
    let front = front(topology, relay);
    let mut rules = String::new();
    for (_, port, sticky) in SERVICES {
        let choice = if sticky { "jhash ip saddr" } else { "numgen inc" };
        let (count, map) = (backends(topology).count(), backends(topology).enumerate());
        let map: Vec<_> = map.map(|(n, (_, address))| format!("{n} : {address}")).collect();
        let map = map.join(", ");
        push(
            &mut rules,
            format_args!(
                "    ip daddr {front} tcp dport {port} dnat to {choice} mod {count} map {{ {map} }}"
            ),
        );
    }
    format!(
        "table ip bench {{\n  chain prerouting {{\n    \
         type nat hook prerouting priority dstnat;\n{rules}  }}\n  chain postrouting {{\n    \
         type nat hook postrouting priority srcnat;\n    ct status dnat masquerade\n  }}\n}}\n"
    )
}

fn haproxy(topology: &Topology, relay: &str, more: &str) -> String {
    let front = front(topology, relay);
    let mut text = format!(
        "global\n  nbthread {THREADS}\n  maxconn {CONNECTIONS}\ndefaults\n  mode tcp\n{more}  \
         timeout connect 2s\n  timeout client 1h\n  timeout server 1h\n"
    );
    for (name, port, sticky) in SERVICES {
        let balance = if sticky { "source" } else { "roundrobin" };
        push(&mut text, format_args!("listen {name}\n  bind {front}:{port}\n  balance {balance}"));
        for (backend, address) in backends(topology) {
            push(&mut text, format_args!("  server {backend} {address}:{port}"));
        }
    }
    text
}

fn nginx(topology: &Topology, relay: &str, dir: &Path) -> String {
    let (front, dir) = (front(topology, relay), dir.display());
    let mut text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\n\
         worker_processes {THREADS};\nuser root;\npid {dir}/bench-{relay}-nginx.pid;\n\
         error_log stderr warn;\nevents {{ worker_connections {CONNECTIONS}; }}\nstream {{\n"
    );
    for (name, port, sticky) in SERVICES {
        let hash = if sticky { "    hash $remote_addr consistent;\n" } else { "" };
        push(&mut text, format_args!("  upstream {name} {{\n{hash}"));
        for (_, address) in backends(topology) {
            push(&mut text, format_args!("    server {address}:{port};"));
        }
        push(
            &mut text,
            format_args!(
                "  }}\n  server {{ listen {front}:{port} reuseport backlog=4096; \
                 proxy_timeout 1h; proxy_pass {name}; }}"
            ),
        );
    }
    text + "}\n"
}

fn push(text: &mut String, lines: std::fmt::Arguments<'_>) {
    writeln!(text, "{lines}").expect("writing to a string does not fail");
}
