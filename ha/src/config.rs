//! What the HA side must know of the configuration, already correct: the crate that reads the
//! file has checked every value, so nothing here can be out of range.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::channel::key::ClusterKey;
use crate::vrrp::{AdverInterval, Preempt, Priority, Vrid};

/// The election and the addresses of one node.
#[derive(Debug, Clone)]
pub struct HaConfig {
    /// This node's name, for logs.
    pub node: String,
    /// Virtual router identifier, the same on every node and path.
    pub vrid: Vrid,
    /// This node's configured priority.
    pub priority: Priority,
    /// How often the Active advertises.
    pub advert_interval: AdverInterval,
    /// Whether a Backup of higher priority takes over from a healthy Active.
    pub preempt: Preempt,
    /// How long a node that has begun to listen claims nothing while it hears nothing.
    pub startup_hold: Duration,
    /// How long a node of higher priority waits for being in sync before it leaves the Active alone.
    pub preempt_wait: Duration,
    /// The form of the IPv4 checksum that is sent; both are accepted.
    pub checksum: ChecksumForm,
    /// Where adverts are sent and heard. An advert on any of them keeps a Backup quiet.
    pub paths: Vec<Path>,
    /// The shared addresses. All of them move together.
    pub vips: Vec<Vip>,
    /// The other nodes, to give names to what is heard.
    pub peers: Vec<Peer>,
    /// How the addresses are announced.
    pub announce: AnnounceConfig,
    /// `valid_lft` that the kernel is given for a VIP, in whole seconds, at least 1. Refreshed
    /// well before it ends for as long as this node is Active.
    pub valid_lft: Duration,
    /// Whether the driver asks for SCHED_FIFO and locked memory.
    pub realtime: bool,
    /// The peer channel, where there is one.
    pub channel: Option<ChannelConfig>,
}

/// The peer channel of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelConfig {
    /// The cluster's name: a node of another one is refused.
    pub cluster: String,
    /// Its key.
    pub key: ClusterKey,
    /// This node's address on the channel.
    pub address: SocketAddr,
    /// The other nodes, each with its address on the channel.
    pub peers: Vec<ChannelPeer>,
    /// How often a heartbeat is sent.
    pub heartbeat: Duration,
    /// Whether flows are replicated on it: then they are awaited before the VIPs move.
    pub replicates: bool,
}

/// Another node on the peer channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelPeer {
    /// Its name.
    pub name: String,
    /// Where it listens, and from where it connects.
    pub address: SocketAddr,
}

/// One interface and address family on which adverts travel: a virtual router in the words of
/// RFC 9568. All paths of a node share one election.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Interface name.
    pub interface: String,
    /// Address family of the adverts.
    pub family: Family,
    /// Where adverts go.
    pub transport: Transport,
    /// The addresses that the advert lists: the VIPs of this interface and family, or, where it
    /// has none, all VIPs of the family. Never empty, at most 255. In the order of the file.
    pub addresses: Vec<IpAddr>,
}

/// Address family of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

/// Where adverts go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// 224.0.0.18 or ff02::12.
    Multicast,
    /// To each of these addresses.
    Unicast(Vec<IpAddr>),
}

/// Form of the checksum in IPv4 adverts: RFC 9568 §5.2.8 has no pseudo-header for IPv4, RFC 5798
/// was read both ways, and keepalived includes it unless told otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChecksumForm {
    /// Computed over the VRRP message alone.
    #[default]
    Plain,
    /// Computed over a pseudo-header and the VRRP message.
    PseudoHeader,
}

/// A shared address and the interface that carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vip {
    /// The address.
    pub address: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// The interface that carries it while this node is Active.
    pub interface: String,
}

impl Vip {
    /// Whether an address is in the VIP's own network.
    pub fn is_near(&self, address: IpAddr) -> bool {
        let bits = |address| match address {
            IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let different = bits(self.address) ^ bits(address);
        self.address.is_ipv4() == address.is_ipv4()
            && different.leading_zeros() >= u32::from(self.prefix)
    }
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// The addresses from which its adverts come.
    pub addresses: Vec<IpAddr>,
}

/// How the VIPs are announced (gratuitous ARP, unsolicited NA).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnounceConfig {
    /// Delays after the claim at which the announcement is sent; the first is zero.
    pub schedule: Vec<Duration>,
    /// How often it is repeated for as long as this node is Active; zero: never.
    pub refresh: Duration,
    /// The shortest time between two announcements that a rival provokes.
    pub rival_interval: Duration,
}

impl Default for AnnounceConfig {
    fn default() -> Self {
        Self {
            schedule: [0, 20, 100, 300, 1000, 3000].map(Duration::from_millis).to_vec(),
            refresh: Duration::from_secs(30),
            rival_interval: Duration::from_millis(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_is_what_the_prefix_says() {
        let vip = |text: &str, prefix| Vip {
            address: text.parse().unwrap(),
            prefix,
            interface: "front".into(),
        };
        for (address, prefix, other, near) in [
            ("10.78.0.100", 24, "10.78.0.11", true),
            ("10.78.0.100", 24, "10.78.1.11", false),
            ("10.78.0.100", 32, "10.78.0.100", true),
            ("10.78.0.100", 32, "10.78.0.101", false),
            ("10.78.0.100", 0, "1.2.3.4", true),
            ("fd78::100", 64, "fd78::11", true),
            ("fd78::100", 64, "fd78:0:0:1::11", false),
            ("fd78::100", 0, "10.78.0.11", false),
        ] {
            assert_eq!(vip(address, prefix).is_near(other.parse().unwrap()), near, "{other}");
        }
    }
}
