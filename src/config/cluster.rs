//! `[cluster]`: the other nodes.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use baton_ha::config::{ChannelPeer, Peer};

use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::Node;
use super::section::{At, CLUSTER, PEER, Section};
use super::value;
use super::vips;

/// Most nodes of a cluster, this one not counted.
const MOST_PEERS: usize = 64;
/// Most addresses of a peer.
const MOST_ADDRESSES: usize = 16;

/// How often a heartbeat is sent, where the file does not say.
const HEARTBEAT: Duration = Duration::from_millis(100);

/// `[cluster]`.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    pub(super) name: String,
    pub(super) peers: Vec<Peer>,
    pub(super) channel: Option<Channel>,
}

/// The peer channel, as the file has it: the key is read when the daemon starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    /// This node's address on it.
    pub address: SocketAddr,
    /// The file with the cluster's key.
    pub key_file: PathBuf,
    /// How often a heartbeat is sent.
    pub heartbeat: Duration,
    /// The others, in the order of the file.
    pub peers: Vec<ChannelPeer>,
}

/// `[cluster]` as far as it is right; what is wrong is reported.
pub(super) fn read(root: &Section<'_>, node: Option<&Node>, vips: &[vips::Named]) -> Cluster {
    let default = || "baton".to_owned();
    let Some(cluster) = root.section("cluster", &CLUSTER) else {
        return Cluster { name: default(), ..Cluster::default() };
    };
    let name = cluster.take("name", value::name).map_or_else(default, |at| at.value);
    let sections = cluster.sections("peers", &PEER);
    if let Some(excess) = sections.get(MOST_PEERS) {
        let what = format!("there are {} peers", sections.len());
        excess.report.error(&excess.span, what, format!("write at most {MOST_PEERS}"));
    }
    let mut peers: Vec<Peer> = Vec::new();
    let mut on_channel = Vec::new();
    let mut owners: HashMap<IpAddr, String> = HashMap::new();
    for section in sections.iter().take(MOST_PEERS) {
        let address = section.take("channel", channel_address);
        let Some(peer) = peer(section, node, vips, &peers, &mut owners) else { continue };
        on_channel.push((peer.name.clone(), address, section.span.clone()));
        peers.push(peer);
    }
    let channel = channel(&cluster, on_channel);
    Cluster { name, peers, channel }
}

fn channel_address(value: &Spanned<DeValue<'_>>) -> value::Read<SocketAddr> {
    let address = value::socket_address(value)?;
    if address.ip().is_unspecified() {
        let what = format!("is {address}, which stands for every address of the node");
        return value::complain(what, "the node's one address, as \"10.78.0.2:8112\"");
    }
    Ok(address)
}

/// The peer channel: all of it is there, or nothing.
fn channel(
    cluster: &Section<'_>,
    peers: Vec<(String, Option<At<SocketAddr>>, Range<usize>)>,
) -> Option<Channel> {
    let report = cluster.report;
    let own = cluster.take("channel", channel_address);
    let key_file = cluster.take("key_file", value::text);
    let beat = value::duration(Duration::from_millis(1)..=Duration::from_secs(1));
    let heartbeat = cluster.take("heartbeat", beat);
    let Some(own) = own else {
        let stray = peers.iter().find_map(|(_, address, _)| address.as_ref().map(|at| &at.span));
        let key = key_file.as_ref().map(|at| &at.span);
        let stray = stray.or(key).or(heartbeat.as_ref().map(|at| &at.span));
        if let Some(span) = stray.filter(|_| cluster.key_span("channel").is_none()) {
            let what = "the peer channel needs this node's own address on it";
            report.error(span, what, "write `channel = \"10.78.0.2:8112\"` under [cluster]");
        }
        return None;
    };
    if peers.is_empty() {
        let what = "there is a peer channel and no peer";
        report.error(&own.span, what, "write [[cluster.peers]], or remove `channel`");
    }
    let mut known: HashMap<SocketAddr, String> = HashMap::new();
    let mut others = Vec::new();
    for (name, address, span) in peers {
        let Some(At { value: address, span }) = address else {
            let what = format!("peer {name:?} has no address on the peer channel");
            report.error(
                &span,
                what,
                "write `channel = \"10.78.0.3:8112\"`, as it has under [cluster]",
            );
            continue;
        };
        if address.is_ipv4() != own.value.is_ipv4() {
            let what = format!("{address} and this node's {} are of two families", own.value);
            report.error(&span, what, "write addresses of one family");
        }
        if address == own.value {
            let what = format!("{address} is this node's own address on the channel");
            report.error(&span, what, "write the peer's");
        } else if let Some(other) = known.insert(address, name.clone()) {
            let what = format!("{address} is peer {other:?}'s already");
            report.error(&span, what, "write this peer's own");
        }
        others.push(ChannelPeer { name, address });
    }
    let Some(key_file) = key_file else {
        let what = "the peer channel needs the cluster's key";
        let hint = "write `key_file = \"/etc/baton/cluster.key\"`, and make it with `baton keygen`";
        report.error(&own.span, what, hint);
        return None;
    };
    if !key_file.value.starts_with('/') {
        let what = format!("{:?} is no absolute path", key_file.value);
        report.error(&key_file.span, what, "write it from / on, as \"/etc/baton/cluster.key\"");
    }
    Some(Channel {
        address: own.value,
        key_file: key_file.value.into(),
        heartbeat: heartbeat.map_or(HEARTBEAT, |at| at.value),
        peers: others,
    })
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
