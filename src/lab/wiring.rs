//! Makes a [`Topology`] real: namespaces, bridges, veths, addresses, routes. Starts nothing.

use std::fmt::Write;
use std::io;

use super::netns::Netns;
use super::topology::{GATEWAY, Node, Role, Segment, Topology};

/// Kernel parameters of every namespace: replies may come on another interface than they would
/// leave by, IPv6 addresses are usable at once, and nothing configures itself.
const COMMON: &[(&str, &str)] = &[
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.all.accept_ra", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
];

/// The switch routes between its bridges.
const SWITCH: &[(&str, &str)] =
    &[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")];

/// The client opens many short connections to one address.
const CLIENT: &[(&str, &str)] =
    &[("net.ipv4.ip_local_port_range", "1024 65000"), ("net.ipv4.tcp_tw_reuse", "1")];

/// Builds everything. What was made before an error stays; the caller removes it.
pub(super) fn build(topology: &Topology) -> io::Result<()> {
    for node in &topology.nodes {
        let netns = Netns::create(&topology.namespace(&node.name))?;
        netns.sysctl(COMMON)?;
        match node.role {
            Role::Switch => netns.sysctl(SWITCH)?,
            Role::Client => netns.sysctl(CLIENT)?,
            Role::Relay | Role::Backend => {}
        }
    }
    let switch = topology.role(Role::Switch).next().expect("every topology has a switch");
    Netns::existing(&topology.namespace(&switch.name)).ip_batch(&switch_lines(topology))?;
    for node in &topology.nodes {
        if !node.links.is_empty() {
            Netns::existing(&topology.namespace(&node.name)).ip_batch(&node_lines(node))?;
        }
    }
    Ok(())
}

fn switch_lines(topology: &Topology) -> String {
    let mut lines = String::new();
    for segment in Segment::ALL {
        let (bridge, v4, v6) = (segment.bridge(), segment.v4(GATEWAY), segment.v6(GATEWAY));
        // Neither spanning tree nor multicast snooping: a port forwards as soon as it is up, and
        // adverts reach everyone.
        let kind = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
        push(&mut lines, format_args!("link add {bridge} {kind}"));
        push(&mut lines, format_args!("addr add {v4}/24 dev {bridge}"));
        push(&mut lines, format_args!("addr add {v6}/64 dev {bridge} nodad"));
        push(&mut lines, format_args!("link set {bridge} up"));
    }
    for node in &topology.nodes {
        let netns = topology.namespace(&node.name);
        for link in &node.links {
            let (port, mac) = (&link.port, link.mac);
            let (interface, bridge) = (link.segment.interface(), link.segment.bridge());
            push(
                &mut lines,
                format_args!(
                    "link add {port} type veth peer name {interface} address {mac} netns {netns}"
                ),
            );
            push(&mut lines, format_args!("link set {port} master {bridge} up"));
        }
    }
    lines
}

fn node_lines(node: &Node) -> String {
    let mut lines = String::new();
    for link in &node.links {
        let interface = link.segment.interface();
        push(&mut lines, format_args!("addr add {}/24 dev {interface}", link.v4));
        push(&mut lines, format_args!("addr add {}/64 dev {interface} nodad", link.v6));
        push(&mut lines, format_args!("link set {interface} up"));
    }
    if let Some(link) = node.links.first() {
        let (v4, v6) = (link.segment.v4(GATEWAY), link.segment.v6(GATEWAY));
        push(&mut lines, format_args!("route add default via {v4}"));
        push(&mut lines, format_args!("route add ::/0 via {v6}"));
    }
    lines
}

fn push(lines: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(lines, "{line}").expect("writing to a string does not fail");
}
