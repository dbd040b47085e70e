//! What is compared, and how each is told to do the same: two services on the relay's front
//! address, one by source address for iperf3, one in turn for the web servers.

use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::RELAY;
use super::load::IPERF_PORT;
use crate::lab::process::Daemon;
use crate::lab::topology::{HTTP_PORT, Role, Segment, Topology};
use crate::lab::{Lab, LabError};

/// A proxy that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contender {
    Baton,
    Haproxy,
    HaproxySplice,
    Nginx,
    /// No relay: the client talks to a backend, through the switch. What the load itself costs,
    /// and so what no relay can surpass here.
    Direct,
}

/// The services: name, port, and whether clients stay with a backend.
const SERVICES: [(&str, u16, bool); 2] = [("iperf", IPERF_PORT, true), ("web", HTTP_PORT, false)];

/// Most connections of each, as HAProxy's file limit allows.
const CONNECTIONS: u32 = 4000;
/// Threads or workers of each.
const THREADS: u32 = 2;

impl Contender {
    pub(super) const ALL: [Self; 5] =
        [Self::Baton, Self::Haproxy, Self::HaproxySplice, Self::Nginx, Self::Direct];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Baton => "baton",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::Nginx => "nginx-stream",
            Self::Direct => "no-relay",
        }
    }

    /// Its configuration: name in the lab's directory, and text.
    fn configuration(self, topology: &Topology, dir: &Path) -> (&'static str, String) {
        match self {
            Self::Baton => ("bench-baton.toml", baton(topology, dir)),
            Self::Haproxy => ("bench-haproxy.cfg", haproxy(topology, "")),
            Self::HaproxySplice => {
                ("bench-haproxy-splice.cfg", haproxy(topology, "  option splice-auto\n"))
            }
            Self::Nginx => ("bench-nginx.conf", nginx(topology, dir)),
            Self::Direct => ("bench-no-relay", String::new()),
        }
    }

    /// What runs on the relay, its configuration written; `None` where nothing does.
    pub(super) fn daemon(self, lab: &Lab) -> Result<Option<Daemon>, LabError> {
        let (name, text) = self.configuration(&lab.topology, &lab.dir);
        let file = lab.write(name, &text)?;
        let (program, args): (PathBuf, &[&str]) = match self {
            Self::Baton => (lab.options.binary.clone(), &["run", "-c", &file]),
            Self::Haproxy | Self::HaproxySplice => ("haproxy".into(), &["-db", "-f", &file]),
            Self::Nginx => ("nginx".into(), &["-e", "stderr", "-c", &file]),
            Self::Direct => return Ok(None),
        };
        Ok(Some(Daemon::new(self.name(), program, args.iter().copied())))
    }

    /// The address that the client talks to.
    pub(super) fn address(self, topology: &Topology) -> Ipv4Addr {
        match self {
            Self::Direct => backends(topology).next().expect("every lab has backends").1,
            _ => front(topology),
        }
    }
}

fn front(topology: &Topology) -> Ipv4Addr {
    topology
        .node(RELAY)
        .and_then(|relay| relay.link(Segment::Front))
        .expect("every lab has a first relay, with a link to the front")
        .v4
}

fn backends(topology: &Topology) -> impl Iterator<Item = (&str, Ipv4Addr)> {
    topology.role(Role::Backend).map(|node| (node.name.as_str(), node.links[0].v4))
}

fn baton(topology: &Topology, dir: &Path) -> String {
    let (front, dir) = (front(topology), dir.display());
    let mut text = format!(
        "[node]\nname = \"{RELAY}\"\ncontrol = \"{dir}/bench-baton.sock\"\nworkers = {THREADS}\n\
         log = \"warn\"\n"
    );
    for (name, port, sticky) in SERVICES {
        let scheduler = if sticky { "source-hash" } else { "round-robin" };
        push(
            &mut text,
            format_args!(
                "\n[[services]]\nname = \"{name}\"\nlisten = \"{front}:{port}\"\n\
                 scheduler = \"{scheduler}\"\nmax_connections = {CONNECTIONS}\n\
                 max_connections_per_source = {CONNECTIONS}"
            ),
        );
        for (backend, address) in backends(topology) {
            push(
                &mut text,
                format_args!(
                    "[[services.backends]]\nname = \"{backend}\"\naddress = \"{address}:{port}\""
                ),
            );
        }
    }
    text
}

fn haproxy(topology: &Topology, more: &str) -> String {
    let front = front(topology);
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

fn nginx(topology: &Topology, dir: &Path) -> String {
    let (front, dir) = (front(topology), dir.display());
    let mut text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\n\
         worker_processes {THREADS};\nuser root;\npid {dir}/bench-nginx.pid;\n\
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
