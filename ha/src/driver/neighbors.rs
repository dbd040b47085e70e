//! The other nodes, as their adverts show them.

use std::net::IpAddr;
use std::time::Instant;

use super::Heard;
use crate::config::Peer;
use crate::vrrp::Priority;
use crate::vrrp::router::Advert;

/// Nodes that are remembered. Whoever can send adverts can invent nodes; the one that has been
/// silent for longest makes room.
const NODES: usize = 64;

/// The addresses of a named peer are one node; any other address is a node of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Peer(String),
    Address(IpAddr),
}

pub(super) struct Neighbors {
    peers: Vec<Peer>,
    heard: Vec<(Node, Heard)>,
    /// The node last heard as Active.
    active: Option<Node>,
}

impl Neighbors {
    pub(super) fn new(peers: Vec<Peer>) -> Self {
        Self { peers, heard: Vec::new(), active: None }
    }

    /// Takes in an advert; whether its sender was unknown until now.
    pub(super) fn hear(&mut self, now: Instant, advert: &Advert) -> bool {
        let name = self.name(advert.source).map(str::to_owned);
        let node = name.clone().map_or(Node::Address(advert.source), Node::Peer);
        match (advert.priority, &self.active) {
            (Priority::YIELD, Some(active)) if *active == node => self.active = None,
            (Priority::YIELD, _) => {}
            (_, _) => self.active = Some(node.clone()),
        }
        let news = Heard {
            name,
            address: advert.source,
            priority: advert.priority,
            interval: advert.interval.duration(),
            at: now,
            adverts: 1,
        };
        if let Some((_, heard)) = self.heard.iter_mut().find(|(known, _)| *known == node) {
            *heard = Heard { adverts: heard.adverts + 1, ..news };
            return false;
        }
        if self.heard.len() >= NODES {
            // Whoever invents nodes can't push out one of the configuration.
            let strangers = (0..self.heard.len()).filter(|at| self.heard[*at].1.name.is_none());
            let Some(oldest) = strangers.min_by_key(|place| self.heard[*place].1.at) else {
                return false;
            };
            self.heard.swap_remove(oldest);
        }
        self.heard.push((node, news));
        true
    }

    /// This node is Active: nobody else is.
    pub(super) fn none_active(&mut self) {
        self.active = None;
    }

    /// The node last heard as Active.
    pub(super) fn active(&self) -> Option<&Heard> {
        let active = self.active.as_ref()?;
        self.heard.iter().find(|(node, _)| node == active).map(|(_, heard)| heard)
    }

    /// Everyone, in order of address.
    pub(super) fn list(&self) -> Vec<Heard> {
        let mut list: Vec<Heard> = self.heard.iter().map(|(_, heard)| heard.clone()).collect();
        list.sort_by_key(|heard| heard.address);
        list
    }

    /// Name and address, for logs.
    pub(super) fn label(&self, address: IpAddr) -> String {
        match self.name(address) {
            Some(name) => format!("{name} ({address})"),
            None => address.to_string(),
        }
    }

    /// The name of the peer that has this address.
    pub(super) fn name(&self, address: IpAddr) -> Option<&str> {
        let peer = self.peers.iter().find(|peer| peer.addresses.contains(&address))?;
        Some(&peer.name)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vrrp::AdverInterval;

    fn advert(source: &str, priority: u8) -> Advert {
        Advert {
            source: source.parse().unwrap(),
            local: "10.77.0.2".parse().unwrap(),
            priority: Priority::new(priority),
            interval: AdverInterval::from_centiseconds(10).unwrap(),
        }
    }

    fn neighbors() -> Neighbors {
        let addresses = ["10.77.0.3", "fe80::3"].map(|address| address.parse().unwrap()).to_vec();
        Neighbors::new(vec![Peer { name: "b".to_owned(), addresses }])
    }

    #[test]
    fn the_addresses_of_a_peer_are_one_node() {
        let mut neighbors = neighbors();
        let now = Instant::now();
        assert!(neighbors.hear(now, &advert("10.77.0.3", 100)));
        assert!(!neighbors.hear(now, &advert("fe80::3", 100)));
        assert!(neighbors.hear(now, &advert("10.77.0.4", 90)));
        let list = neighbors.list();
        assert_eq!(list.len(), 2);
        assert_eq!((list[1].name.as_deref(), list[1].adverts), (Some("b"), 2));
    }

    #[test]
    fn who_yields_is_no_longer_active() {
        let mut neighbors = neighbors();
        let now = Instant::now();
        neighbors.hear(now, &advert("10.77.0.3", 100));
        neighbors.hear(now, &advert("10.77.0.4", 0));
        assert_eq!(neighbors.active().unwrap().name.as_deref(), Some("b"), "another's yield");
        neighbors.hear(now, &advert("fe80::3", 0));
        assert!(neighbors.active().is_none());
    }

    #[test]
    fn invented_nodes_push_out_the_one_that_is_silent_for_longest_but_no_peer() {
        let mut neighbors = neighbors();
        let start = Instant::now();
        neighbors.hear(start, &advert("10.77.0.3", 100));
        for node in 0..=NODES as u64 {
            let now = start + Duration::from_millis(node);
            neighbors.hear(now, &advert(&format!("10.0.0.{node}"), 100));
        }
        let list = neighbors.list();
        assert_eq!(list.len(), NODES);
        assert!(!list.iter().any(|heard| heard.address == IpAddr::from([10, 0, 0, 0])));
        assert!(list.iter().any(|heard| heard.name.as_deref() == Some("b")));
    }
}
