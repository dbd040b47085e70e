//! What the lab consists of, as data: nodes, their links and addresses. `wiring` makes
//! it real, `files` writes the daemons' configuration from it.
//!
//! ```text
//!  client ─front─┐             ┌─front─ relay1 ─back─┐             ┌─back─ backend1
//!                ├─ br-front ──┤                     ├── br-back ──┤
//!                │   (switch)  └─front─ relay2 ─back─┘  (switch)   └─back─ backend2
//!                └── the switch also routes between front and back ──┘
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The shared address that clients use.
pub const VIP_FRONT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
/// Its IPv6 counterpart.
pub const VIP_FRONT6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100);
/// The shared address on the backends' side.
pub const VIP_BACK: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 100);

/// The port of the echo servers, TCP and UDP, and of the services in front of them.
pub const ECHO_PORT: u16 = 7;
/// The port of the SOCKS servers.
pub const SOCKS_PORT: u16 = 1080;
/// The port of the web servers.
pub const HTTP_PORT: u16 = 80;

/// Most relays that a lab can have: their addresses lie between the switch's and the client's.
pub const MAX_RELAYS: usize = 8;

/// A whole lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Its name; namespaces are called `NAME-NODE`.
    pub name: String,
    /// The switch first, then client, relays, backends.
    pub nodes: Vec<Node>,
}

/// A namespace of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name within the lab.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its interfaces. The switch has none of its own: it has a port for each of the others'.
    pub links: Vec<Link>,
}

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Bridges, and the router between them.
    Switch,
    /// Where the canary traffic comes from.
    Client,
    /// A node of the cluster.
    Relay,
    /// A server.
    Backend,
}

/// An interface of a node and the switch's port that it is plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The side it is on; the interface has its name.
    pub segment: Segment,
    /// Name of the port in the switch.
    pub port: String,
    /// Hardware address of the interface.
    pub mac: Mac,
    /// IPv4 address.
    pub v4: Ipv4Addr,
    /// IPv6 address.
    pub v6: Ipv6Addr,
}

/// One of the two networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Segment {
    /// Client and relays: 10.77.0.0/24, fd77::/64.
    Front,
    /// Relays and backends: 10.78.0.0/24, fd78::/64.
    Back,
}

impl Segment {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Front, Self::Back];

    /// The name of the interfaces on it.
    pub fn interface(self) -> &'static str {
        match self {
            Self::Front => "front",
            Self::Back => "back",
        }
    }

    /// The switch's bridge for it.
    pub fn bridge(self) -> &'static str {
        match self {
            Self::Front => "br-front",
            Self::Back => "br-back",
        }
    }

    /// The IPv4 address of a host on it; the prefix is 24 bits.
    pub fn v4(self, host: u8) -> Ipv4Addr {
        match self {
            Self::Front => Ipv4Addr::new(10, 77, 0, host),
            Self::Back => Ipv4Addr::new(10, 78, 0, host),
        }
    }

    /// The IPv6 address of a host on it; the prefix is 64 bits. The host's number reads the same
    /// in both families.
    pub fn v6(self, host: u8) -> Ipv6Addr {
        let digits = u16::from_str_radix(&host.to_string(), 16)
            .expect("at most three decimal digits are hexadecimal digits too");
        let network = match self {
            Self::Front => 0xfd77,
            Self::Back => 0xfd78,
        };
        Ipv6Addr::new(network, 0, 0, 0, 0, 0, 0, digits)
    }

    fn link(self, node: &str, host: u8) -> Link {
        let (suffix, network) = match self {
            Self::Front => ('f', 0x77),
            Self::Back => ('b', 0x78),
        };
        Link {
            segment: self,
            port: format!("{node}-{suffix}"),
            mac: Mac([0x02, 0, 0, network, 0, host]),
            v4: self.v4(host),
            v6: self.v6(host),
        }
    }
}

/// Host number of the switch, the default gateway of both networks.
pub const GATEWAY: u8 = 1;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Link {
    /// The link-local address that the kernel makes from the hardware address (RFC 4291, appendix
    /// A): IPv6 adverts come from it.
    pub fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac.0.map(u16::from);
        Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
    }
}

/// How the relays are plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Front only, where the backends are too: packets leave by the link that they came by.
    One,
    /// Front and back.
    Two,
}

impl Topology {
    /// The lab of that name with so many relays (clamped to 1–[`MAX_RELAYS`]) between two networks,
    /// a client, two backends and a switch.
    pub fn new(name: &str, relays: usize) -> Self {
        Self::with_links(name, relays, Links::Two)
    }

    /// The same with relays and backends plugged in like that.
    pub fn with_links(name: &str, relays: usize, links: Links) -> Self {
        let (relays_on, backends_on): (&[Segment], _) = match links {
            Links::One => (&[Segment::Front], Segment::Front),
            Links::Two => (&Segment::ALL, Segment::Back),
        };
        let relays = relays.clamp(1, MAX_RELAYS) as u8;
        let mut nodes = vec![
            Node { name: "switch".into(), role: Role::Switch, links: Vec::new() },
            node("client", Role::Client, &[Segment::Front], 10),
        ];
        nodes.extend(
            (1..=relays)
                .map(|number| node(&format!("relay{number}"), Role::Relay, relays_on, number + 1)),
        );
        nodes.extend((1..=2).map(|number| {
            node(&format!("backend{number}"), Role::Backend, &[backends_on], number + 10)
        }));
        Self { name: name.to_owned(), nodes }
    }

    /// The nodes of a role, in order.
    pub fn role(&self, role: Role) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.role == role)
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The name of a node's namespace.
    pub fn namespace(&self, node: &str) -> String {
        format!("{}-{node}", self.name)
    }

    /// The node that has an interface with that hardware address.
    pub fn owner_of(&self, mac: Mac) -> Option<&Node> {
        self.nodes.iter().find(|node| node.links.iter().any(|link| link.mac == mac))
    }
}

impl Node {
    /// Its interface on a segment.
    pub fn link(&self, segment: Segment) -> Option<&Link> {
        self.links.iter().find(|link| link.segment == segment)
    }

    /// Its addresses, IPv4 before IPv6 on each link.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.links.iter().flat_map(|link| [IpAddr::V4(link.v4), IpAddr::V6(link.v6)])
    }
}

fn node(name: &str, role: Role, segments: &[Segment], host: u8) -> Node {
    let links = segments.iter().map(|segment| segment.link(name, host)).collect();
    Node { name: name.to_owned(), role, links }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn nobody_shares_an_address_a_port_or_a_name() {
        let topology = Topology::new("x", MAX_RELAYS);
        let links = || topology.nodes.iter().flat_map(|node| &node.links);
        assert_eq!(links().map(|link| link.mac).collect::<HashSet<_>>().len(), links().count());
        assert_eq!(links().map(|link| &link.port).collect::<HashSet<_>>().len(), links().count());
        let addresses: HashSet<_> = topology.nodes.iter().flat_map(Node::addresses).collect();
        assert_eq!(addresses.len(), 2 * links().count());
        for taken in [VIP_FRONT.into(), VIP_FRONT6.into(), VIP_BACK.into()] {
            assert!(!addresses.contains(&taken), "{taken}");
        }
        // Interface names have at most 15 bytes.
        assert!(links().all(|link| link.port.len() <= 15));
    }

    #[test]
    fn addresses_are_those_of_the_documentation() {
        let topology = Topology::new("baton", 2);
        let relay2 = topology.node("relay2").unwrap();
        let text: Vec<String> = relay2.addresses().map(|address| address.to_string()).collect();
        assert_eq!(text, ["10.77.0.3", "fd77::3", "10.78.0.3", "fd78::3"]);
        let client = topology.node("client").unwrap();
        assert_eq!(client.links[0].v6.to_string(), "fd77::10");
        assert_eq!(topology.namespace("relay2"), "baton-relay2");
        assert_eq!(topology.owner_of(relay2.links[0].mac), Some(relay2));
        assert_eq!(relay2.links[0].link_local().to_string(), "fe80::ff:fe77:3");
    }
}
