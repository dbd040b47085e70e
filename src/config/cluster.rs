//! `[cluster]`: the other nodes.

use std::collections::HashMap;
use std::net::IpAddr;

use baton_ha::config::Peer;

use super::Node;
use super::section::{At, CLUSTER, PEER, Section};
use super::value;
use super::vips;

/// Most nodes of a cluster, this one not counted.
const MOST_PEERS: usize = 64;
/// Most addresses of a peer.
const MOST_ADDRESSES: usize = 16;

/// `[cluster]`.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    pub(super) name: String,
    pub(super) peers: Vec<Peer>,
}

/// `[cluster]` as far as it is right; what is wrong is reported.
pub(super) fn read(root: &Section<'_>, node: Option<&Node>, vips: &[vips::Named]) -> Cluster {
    let default = || "baton".to_owned();
    let Some(cluster) = root.section("cluster", &CLUSTER) else {
        return Cluster { name: default(), peers: Vec::new() };
    };
    let name = cluster.take("name", value::name).map_or_else(default, |at| at.value);
    let sections = cluster.sections("peers", &PEER);
    if let Some(excess) = sections.get(MOST_PEERS) {
        let what = format!("there are {} peers", sections.len());
        excess.report.error(&excess.span, what, format!("write at most {MOST_PEERS}"));
    }
    let mut peers: Vec<Peer> = Vec::new();
    let mut owners: HashMap<IpAddr, String> = HashMap::new();
    for section in sections.iter().take(MOST_PEERS) {
        peers.extend(peer(section, node, vips, &peers, &mut owners));
    }
    Cluster { name, peers }
}

fn peer(
    section: &Section<'_>,
    node: Option<&Node>,
    vips: &[vips::Named],
    others: &[Peer],
    owners: &mut HashMap<IpAddr, String>,
) -> Option<Peer> {
    let report = section.report;
    let name = section.require("name", "\"relay2\"", value::name);
    let list = value::list(MOST_ADDRESSES, value::address);
    let addresses = section.require("addresses", "[\"10.77.0.3\"]", list);
    if let Some(At { value: name, span }) = &name {
        if node.is_some_and(|node| node.name == *name) {
            let what = format!("{name:?} is this node's own name");
            report.error(span, what, "write the name of the other node, or remove this peer");
        }
        if others.iter().any(|other| other.name == *name) {
            let what = format!("another peer is called {name:?} too");
            report.error(span, what, "write a name of its own");
        }
    }
    let (name, addresses) = (name?.value, addresses?.value);
    for At { value: address, span } in &addresses {
        if let Some(vip) = vips.iter().find(|vip| vip.vip.address == *address) {
            let what = format!("{address} is the address of VIP {:?}", vip.name);
            report.error(span, what, "write the peer's own address");
        } else if address.is_loopback() {
            let what = format!("{address} is a loopback address");
            report.error(span, what, "write an address from which the peer's adverts come");
        }
        if let Some(other) = owners.insert(*address, name.clone()) {
            let what = format!("{address} is an address of peer {other:?} already");
            report.error(span, what, "write it at one peer only, once");
        }
    }
    Some(Peer { name, addresses: addresses.into_iter().map(|at| at.value).collect() })
}
