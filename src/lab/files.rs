//! The configuration of every daemon of the lab, written from its [`Topology`]. Pure.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::many;
use super::process::{socket, state};
use super::topology::{
    ECHO_PORT, GATEWAY, HTTP_PORT, Node, Role, SOCKS_PORT, Segment, Topology, VIP_BACK, VIP_FRONT,
    VIP_FRONT6,
};
use super::{LabOptions, Mode, Software};

/// Of the peer channel.
pub(super) const CHANNEL_PORT: u16 = 8112;
/// Of conntrackd's own channel.
const CONNTRACKD_PORT: u16 = 3780;
/// Connections that services of proxy mode may have: each takes four descriptors.
const PROXIED: u32 = 8000;
/// Those that services of the kernel may have.
const FLOWS: u32 = 200_000;
/// Virtual router identifier of the lab's cluster.
const VRID: u8 = 77;
/// Of the relays, in order.
const PRIORITIES: [u8; 8] = [200, 150, 140, 130, 120, 110, 105, 100];

/// The priority of the relay with that index; the first has the highest.
pub(super) fn priority(relay: usize) -> u8 {
    PRIORITIES[relay.min(PRIORITIES.len() - 1)]
}

/// `danted.conf` of a backend (Debian's dante-server 1.4).
pub(super) fn danted(backend: &Node, mode: Mode) -> String {
    let address = backend.links[0].v4;
    let vip = match mode {
        Mode::Dsr => format!("internal: {VIP_FRONT} port = {SOCKS_PORT}\n"),
        Mode::Proxy | Mode::Passthrough => String::new(),
    };
    format!(
        "\
logoutput: stderr
internal: {address} port = {SOCKS_PORT}
{vip}external: {interface}
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks pass {{
    from: 0.0.0.0/0 to: 0.0.0.0/0
    command: bind connect udpassociate bindreply udpreply
}}
",
        interface = backend.links[0].segment.interface(),
    )
}

/// `nginx.conf` of a node: says which node answered, and whom it saw as client; what is put into
/// `files` of the lab's folder can be fetched from `/files/`.
pub(super) fn nginx(node: &Node, dir: &Path) -> String {
    let name = &node.name;
    let dir = dir.display();
    let mut temporary = String::new();
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        let _ = writeln!(temporary, "    {kind}_temp_path {dir}/{name}-nginx-{kind};");
    }
    format!(
        "\
daemon off;
master_process off;
user root;
pid {dir}/{name}-nginx.pid;
error_log stderr warn;
events {{ worker_connections 2048; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    default_type text/plain;
{temporary}    server {{
        listen {HTTP_PORT} backlog=4096;
        listen [::]:{HTTP_PORT} backlog=4096;
        location /files/ {{ alias {dir}/files/; }}
        location / {{ return 200 \"{name} client=$remote_addr\\n\"; }}
    }}
}}
"
    )
}

/// `keepalived.conf` of a relay: the same addresses, intervals and priorities as Baton's.
///
/// One instance carries the VIPs of both sides: at 10 ms that was faster than two in a
/// `vrrp_sync_group`. Without `vrrp_rlimit_rttime` the kernel kills keepalived's real-time
/// process for 10 ms of work without a pause, which happens here just when it takes over.
///
/// `notify` is run with what it has become, `primary` or `backup`.
pub(super) fn keepalived(
    relay: &Node,
    index: usize,
    interval: Duration,
    notify: Option<&str>,
) -> String {
    let (name, priority) = (&relay.name, priority(index));
    let seconds = interval.as_secs_f64();
    let mut scripts = String::new();
    if let Some(notify) = notify {
        for (event, argument) in [("master", "primary"), ("backup", "backup")] {
            let _ = writeln!(scripts, "    notify_{event} \"{notify} {argument}\"");
        }
    }
    format!(
        "\
global_defs {{
    router_id {name}
    vrrp_version 3
    vrrp_garp_master_refresh 1
    vrrp_rt_priority 50
    vrrp_rlimit_rttime 1000000
    script_user root
}}
vrrp_instance lab {{
    state BACKUP
    nopreempt
    interface front
    track_interface {{ back }}
    virtual_router_id {VRID}
    priority {priority}
    advert_int {seconds}
    virtual_ipaddress {{
        {VIP_FRONT}/24 dev front
        {VIP_BACK}/24 dev back
    }}
    virtual_ipaddress_excluded {{ {VIP_FRONT6}/64 dev front }}
{scripts}}}
"
    )
}

/// `conntrackd.conf` of a relay (Debian's conntrackd 1.4.7): FT-FW to the other relays over the
/// back network, straight into their kernels' tables, with the queues and the real-time priority
/// of a machine that is only a relay.
pub(super) fn conntrackd(topology: &Topology, relay: &Node, dir: &Path) -> String {
    let (name, dir) = (&relay.name, dir.display());
    let own = back(relay);
    let mut channels = String::new();
    let mut ignored = "            IPv4_address 127.0.0.1\n".to_owned();
    for node in topology.role(Role::Relay) {
        let other = back(node);
        let _ = writeln!(ignored, "            IPv4_address {other}");
        if node.name != *name {
            let _ = write!(
                channels,
                "\
    UDP {{
        IPv4_address {own}
        IPv4_Destination_Address {other}
        Port {CONNTRACKD_PORT}
        Interface back
        SndSocketBuffer 24985600
        RcvSocketBuffer 24985600
        Checksum on
    }}
"
            );
        }
    }
    format!(
        "\
Sync {{
    Mode FTFW {{
        ResendQueueSize 131072
        DisableExternalCache On
    }}
{channels}}}
General {{
    HashSize 131072
    HashLimit 524288
    LogFile off
    Syslog off
    LockFile {dir}/{name}-conntrackd.lock
    UNIX {{
        Path {dir}/{name}-conntrackd.ctl
    }}
    Scheduler {{
        Type FIFO
        Priority 60
    }}
    NetlinkBufferSize 16777216
    NetlinkBufferSizeMaxGrowth 67108864
    NetlinkOverrunResync On
    Filter From Userspace {{
        Protocol Accept {{
            TCP
            UDP
        }}
        Address Ignore {{
{ignored}        }}
    }}
}}
"
    )
}

/// What keepalived calls when its state changes.
pub(super) fn notify(relay: &Node, dir: &Path) -> String {
    format!("/bin/sh {}/{}-notify.sh", dir.display(), relay.name)
}

/// The calls of conntrackd's own `primary-backup.sh`.
pub(super) fn notify_script(relay: &Node, dir: &Path) -> String {
    let conf = format!("{}/{}-conntrackd.conf", dir.display(), relay.name);
    format!(
        "\
case $1 in
primary) for do in c f R B; do conntrackd -C {conf} -$do; done ;;
backup) for do in t n; do conntrackd -C {conf} -$do; done ;;
esac
"
    )
}

/// The nftables rules with which a keepalived relay forwards: full NAT to the backends in turn,
/// and nothing that the kernel could answer by itself (docs/failover.md says why).
///
/// Where connections are replicated they come from the shared address, so that another relay can
/// go on with them.
pub(super) fn nftables(topology: &Topology, software: Software) -> String {
    let source = match software {
        Software::Conntrackd => format!("snat to {VIP_BACK}"),
        Software::Baton | Software::Keepalived => "masquerade".to_owned(),
    };
    let backends: Vec<String> = topology
        .role(Role::Backend)
        .enumerate()
        .map(|(index, node)| format!("{index} : {}", node.links[0].v4))
        .collect();
    let (count, map) = (backends.len(), backends.join(", "));
    format!(
        "\
table ip lab {{
    chain prerouting {{
        type nat hook prerouting priority dstnat;
        ip daddr {VIP_FRONT} tcp dport {{ {ECHO_PORT}, {HTTP_PORT}, {SOCKS_PORT} }} dnat to numgen inc mod {count} map {{ {map} }}
        ip daddr {VIP_FRONT} udp dport {ECHO_PORT} dnat to numgen inc mod {count} map {{ {map} }}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        oifname back {source}
    }}
    chain input {{
        type filter hook input priority filter;
        ip daddr {VIP_FRONT} drop
    }}
    chain forward {{
        type filter hook forward priority filter;
        ct state invalid drop
    }}
}}
"
    )
}

/// Kernel parameters of a keepalived relay.
pub(super) const KEEPALIVED_SYSCTLS: &[(&str, &str)] = &[
    ("net.ipv4.ip_forward", "1"),
    ("net.netfilter.nf_conntrack_tcp_loose", "0"),
    ("net.netfilter.nf_conntrack_tcp_be_liberal", "1"),
];

/// Kernel parameters of a backend that has the VIP for itself: it is not to be heard of there.
pub(super) const DSR_SYSCTLS: &[(&str, &str)] =
    &[("net.ipv4.conf.all.arp_ignore", "1"), ("net.ipv4.conf.all.arp_announce", "2")];

/// The VIPs of such a backend.
pub(super) fn dsr_addresses() -> String {
    format!("addr add {VIP_FRONT}/32 dev lo\naddr add {VIP_FRONT6}/128 dev lo nodad\n")
}

/// Whether relays have flows that another could go on with.
pub(super) fn replicates(mode: Mode) -> bool {
    mode != Mode::Proxy
}

/// Where the cluster's key is.
pub(super) fn key(dir: &Path) -> PathBuf {
    dir.join("cluster.key")
}

fn back(node: &Node) -> Ipv4Addr {
    let link = node.links.iter().find(|link| link.segment == Segment::Back);
    link.expect("relays are on the back").v4
}

/// The relay's file for `baton run`.
pub(super) fn baton(topology: &Topology, index: usize, options: &LabOptions, dir: &Path) -> String {
    let mode = options.mode;
    let relay = topology.role(Role::Relay).nth(index).expect("the caller counts the relays");
    let (name, control) = (&relay.name, socket(dir, &relay.name));
    let mut peers = String::new();
    for peer in topology.role(Role::Relay).filter(|peer| peer.name != *name) {
        let link_local = peer.links.iter().map(|link| IpAddr::V6(link.link_local()));
        let addresses: Vec<String> =
            peer.addresses().chain(link_local).map(|address| format!("\"{address}\"")).collect();
        let addresses = addresses.join(", ");
        peers +=
            &format!("\n[[cluster.peers]]\nname = \"{}\"\naddresses = [{addresses}]\n", peer.name);
        if replicates(mode) {
            let _ = writeln!(peers, "channel = \"{}:{CHANNEL_PORT}\"", back(peer));
        }
    }
    let mut channel = String::new();
    if replicates(mode) {
        let _ = writeln!(channel, "channel = \"{}:{CHANNEL_PORT}\"", back(relay));
        let _ = writeln!(channel, "key_file = \"{}\"", key(dir).display());
        let _ = writeln!(channel, "heartbeat = \"{}ms\"", options.heartbeat.as_millis());
    }
    let mut text = format!(
        "\
# Written by `baton lab`.

[node]
name = \"{name}\"
control = \"{control}\"
state_dir = \"{state}\"
shutdown_grace = \"2s\"

[cluster]
name = \"{lab}\"
{channel}{peers}
[election]
vrid = {VRID}
priority = {priority}
preempt = false                  # who is Active stays Active
advert_interval = \"{interval}ms\"
interfaces = [\"front\", \"back\"]   # an advert on either keeps the Backup quiet

[[vips]]
name = \"front\"
address = \"{VIP_FRONT}/24\"
interface = \"front\"

[[vips]]
name = \"front6\"
address = \"{VIP_FRONT6}/64\"
interface = \"front\"

[[vips]]
name = \"back\"
address = \"{VIP_BACK}/24\"
interface = \"back\"

# CONNECT through the server: a Dante that listens but no longer forwards is found.
[checks.socks]
type = \"socks5\"
target = \"{target}:{HTTP_PORT}\"
interval = \"1s\"
timeout = \"500ms\"
rise = 2
fall = 2

[checks.web]
type = \"http\"
status = 200
interval = \"1s\"
timeout = \"500ms\"
rise = 2
fall = 2

[checks.echo]
type = \"send-expect\"
port = {ECHO_PORT}
send = \"baton?\"
expect = \"baton?\"
interval = \"250ms\"
timeout = \"200ms\"
rise = 2
fall = 2
",
        control = control.display(),
        state = state(dir, name).display(),
        lab = topology.name,
        priority = priority(index),
        interval = options.advert_interval.as_millis(),
        target = Segment::Back.v4(GATEWAY),
    );
    for service in SERVICES {
        text += &service.describe(topology, mode);
    }
    if let Some(flows) = options.many {
        text += &many::service(topology, flows);
    }
    text
}

struct LabService {
    name: &'static str,
    vip: &'static str,
    protocol: &'static str,
    port: u16,
    scheduler: &'static str,
    check: &'static str,
}

const SERVICES: &[LabService] = &[
    LabService::new("socks", "front", "tcp", SOCKS_PORT, "source-hash", "socks"),
    LabService::new("web", "front", "tcp", HTTP_PORT, "round-robin", "web"),
    LabService::new("echo", "front", "tcp", ECHO_PORT, "round-robin", "echo"),
    LabService::new("echo-udp", "front", "udp", ECHO_PORT, "round-robin", "echo"),
    LabService::new("web6", "front6", "tcp", HTTP_PORT, "round-robin", "web"),
    LabService::new("echo6", "front6", "tcp", ECHO_PORT, "round-robin", "echo"),
];

impl LabService {
    const fn new(
        name: &'static str,
        vip: &'static str,
        protocol: &'static str,
        port: u16,
        scheduler: &'static str,
        check: &'static str,
    ) -> Self {
        Self { name, vip, protocol, port, scheduler, check }
    }

    fn describe(&self, topology: &Topology, mode: Mode) -> String {
        let Self { name, vip, protocol, port, scheduler, check } = self;
        // In turn, or what comes near it in the kernel on every node alike.
        let scheduler = match (mode, *scheduler) {
            (Mode::Passthrough | Mode::Dsr, "round-robin") => "maglev",
            (_, scheduler) => scheduler,
        };
        let most = if replicates(mode) { FLOWS } else { PROXIED };
        let mode = mode.name();
        // One client makes all of the lab's connections.
        let mut text = format!(
            "
[[services]]
name = \"{name}\"
vip = \"{vip}\"
protocol = \"{protocol}\"
port = {port}
mode = \"{mode}\"
scheduler = \"{scheduler}\"
check = \"{check}\"
max_connections = {most}
max_connections_per_source = {most}
"
        );
        for backend in topology.role(Role::Backend) {
            let link = &backend.links[0];
            let address: SocketAddr = match *vip {
                "front6" => (link.v6, *port).into(),
                _ => (link.v4, *port).into(),
            };
            text += &format!(
                "\n[[services.backends]]\nname = \"{}\"\naddress = \"{address}\"\n",
                backend.name
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::lab::process::Lifetime;
    use crate::lab::topology::{Links, MAX_RELAYS};
    use crate::lab::{HEARTBEAT, Servers};

    #[test]
    fn baton_understands_every_file_that_the_lab_writes_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let topology = Topology::new("lab", MAX_RELAYS);
        for (index, mode) in
            (0..MAX_RELAYS).zip([Mode::Proxy, Mode::Passthrough, Mode::Dsr].into_iter().cycle())
        {
            let path = dir.path().join(format!("{index}.toml"));
            let options = LabOptions {
                name: "lab".into(),
                relays: MAX_RELAYS,
                links: Links::Two,
                binary: "baton".into(),
                software: Software::Baton,
                mode,
                servers: Servers::All,
                advert_interval: Duration::from_millis(10),
                heartbeat: HEARTBEAT,
                many: Some(1 << 18),
                lifetime: Lifetime::WithParent,
            };
            let text = baton(&topology, index, &options, dir.path());
            std::fs::write(&path, text).unwrap();
            let config = Config::load(&path).unwrap_or_else(|errors| panic!("{errors}"));
            assert_eq!(config.services.len(), SERVICES.len() + 1);
            // The back VIP is there for backends to route through, not for a service.
            let back =
                |warning: &_| format!("{warning}").contains("no service uses the VIP \"back\"");
            assert!(config.warnings.iter().all(back), "{:?}", config.warnings);
        }
    }
}
