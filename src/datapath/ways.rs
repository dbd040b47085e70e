//! What routes, rules, neighbours and links, as the kernel tells of them, mean for XDP: entries of
//! `ways`, `neighbours` and `legs`. Pure; `mirror` asks the kernel and writes the maps.
//!
//! What is not sure to be understood is left to the kernel: such a route is a [`Way::Kernel`], and
//! its packets go by TC.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

/// A route out of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Route {
    pub(super) ifindex: u32,
    pub(super) to: IpAddr,
    pub(super) prefix: u8,
}

/// Where it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// To neighbours.
    OnLink,
    /// To this neighbour.
    Gateway(IpAddr),
    /// Somewhere that only the kernel knows.
    Kernel,
}

/// A neighbour on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Host {
    pub(super) ifindex: u32,
    pub(super) address: IpAddr,
}

/// What is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Its Ethernet address; `stale` where the kernel would have it confirmed at the next packet.
    At { mac: [u8; 6], stale: bool },
    /// Nothing.
    Nothing,
}

/// The routes out of these interfaces, among all that there are. What the main table has of the
/// same prefix twice, the lower metric decides; two of the same metric are the kernel's business.
pub(super) fn of_routes(all: &[RouteMessage], interfaces: &BTreeSet<u32>) -> HashMap<Route, Way> {
    let mut ways: HashMap<Route, (u32, Way)> = HashMap::new();
    for message in all.iter().filter(|message| is_usable(message)) {
        let (out, way) = way_of(message);
        let Some(to) = destination_of(message) else { continue };
        let prefix = message.header.destination_prefix_length;
        let metric = metric_of(message);
        for &ifindex in interfaces.iter().filter(|&&ifindex| out.is_none_or(|out| out == ifindex)) {
            match ways.entry(Route { ifindex, to, prefix }) {
                Entry::Vacant(vacant) => drop(vacant.insert((metric, way))),
                Entry::Occupied(mut there) => match metric.cmp(&there.get().0) {
                    std::cmp::Ordering::Less => drop(there.insert((metric, way))),
                    std::cmp::Ordering::Equal if there.get().1 != way => {
                        there.insert((metric, Way::Kernel));
                    }
                    _ => {}
                },
            }
        }
    }
    ways.into_iter().map(|(route, (_, way))| (route, way)).collect()
}

/// Of the main table, and not out of order.
fn is_usable(message: &RouteMessage) -> bool {
    let header = &message.header;
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    let out_of_order = RouteFlags::Dead | RouteFlags::Linkdown | RouteFlags::Cloned;
    table.unwrap_or(header.table.into()) == main
        && !header.flags.intersects(out_of_order)
        && !matches!(header.kind, RouteType::Multicast | RouteType::Anycast | RouteType::Broadcast)
}

/// The interface that it leads out of (`None`: any) and where to.
fn way_of(message: &RouteMessage) -> (Option<u32>, Way) {
    let header = &message.header;
    let (mut out, mut way) = (None, Way::OnLink);
    let mut plain =
        header.kind == RouteType::Unicast && header.tos == 0 && header.source_prefix_length == 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => out = Some(*ifindex),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => {
                way = Way::Gateway((*address).into());
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => {
                way = Way::Gateway((*address).into());
            }
            RouteAttribute::Metrics(metrics) => {
                // A path narrower than its interface.
                plain &= !metrics.iter().any(|metric| matches!(metric, RouteMetric::Mtu(_)));
            }
            RouteAttribute::Destination(_)
            | RouteAttribute::Table(_)
            | RouteAttribute::Priority(_)
            | RouteAttribute::PrefSource(_)
            | RouteAttribute::CacheInfo(_)
            | RouteAttribute::Expires(_)
            | RouteAttribute::Preference(_) => {}
            // Several gateways, of another family, by number, in a tunnel: what there is.
            _ => plain = false,
        }
    }
    match (plain, out) {
        (true, Some(out)) => (Some(out), way),
        _ => (None, Way::Kernel),
    }
}

fn destination_of(message: &RouteMessage) -> Option<IpAddr> {
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    let any = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    Some(destination.unwrap_or(any))
}

fn metric_of(message: &RouteMessage) -> u32 {
    let metric = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    metric.unwrap_or(0)
}

/// Whether these rules lead every packet to the main table, so that its routes are the ways.
pub(super) fn are_plain(rules: &[RuleMessage]) -> bool {
    rules.iter().all(|rule| {
        let header = &rule.header;
        header.action == RuleAction::ToTable
            && (header.src_len, header.dst_len, header.tos) == (0, 0, 0)
            && matches!(header.table, 253..=255)
            && rule.attributes.iter().all(|attribute| match attribute {
                RuleAttribute::Table(table) => matches!(table, 253..=255),
                RuleAttribute::SuppressPrefixLen(length) => *length == u32::MAX,
                RuleAttribute::Priority(_) | RuleAttribute::Protocol(_) => true,
                _ => false,
            })
    })
}

/// A neighbour, and what is known of it; `None` where the message is of something else.
pub(super) fn of_neighbour(message: &NeighbourMessage) -> Option<(Host, Known)> {
    let header = &message.header;
    let is_ip = matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6);
    if !is_ip || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(of)) => {
                address = Some(IpAddr::V4(*of));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(of)) => {
                address = Some(IpAddr::V6(*of));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    let address = address.filter(|address| !address.is_multicast())?;
    let known = match (header.state, mac) {
        (NeighbourState::Stale, Some(mac)) => Known::At { mac, stale: true },
        (
            NeighbourState::Reachable
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp,
            Some(mac),
        ) => Known::At { mac, stale: false },
        _ => Known::Nothing,
    };
    Some((Host { ifindex: header.ifindex, address }, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A route of the main table.
    fn route(to: &str, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let (to, prefix) = to.split_once('/').unwrap();
        let to: IpAddr = to.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.address_family =
            if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.header.destination_prefix_length = prefix.parse().unwrap();
        message.attributes = attributes;
        if prefix != "0" {
            message.attributes.push(RouteAttribute::Destination(to.into()));
        }
        message
    }

    fn via(gateway: &str) -> RouteAttribute {
        RouteAttribute::Gateway(gateway.parse::<IpAddr>().unwrap().into())
    }

    const FRONT: RouteAttribute = RouteAttribute::Oif(2);
    const BACK: RouteAttribute = RouteAttribute::Oif(3);

    fn ways(all: &[RouteMessage]) -> Vec<(u32, String, Way)> {
        let ways = of_routes(all, &BTreeSet::from([2, 3]));
        let mut ways: Vec<_> = ways
            .into_iter()
            .map(|(route, way)| (route.ifindex, format!("{}/{}", route.to, route.prefix), way))
            .collect();
        ways.sort_by_key(|(ifindex, to, _)| (*ifindex, to.clone()));
        ways
    }

    #[test]
    fn plain_routes_lead_where_they_say() {
        let gateway = |text: &str| Way::Gateway(text.parse().unwrap());
        let all = [
            route("0.0.0.0/0", vec![FRONT, via("10.77.0.1")]),
            route("10.77.0.0/24", vec![FRONT]),
            route("::/0", vec![BACK, via("fe80::1")]),
            // Of an interface that is not ours.
            route("10.79.0.0/24", vec![RouteAttribute::Oif(4)]),
        ];
        assert_eq!(
            ways(&all),
            [
                (2, "0.0.0.0/0".into(), gateway("10.77.0.1")),
                (2, "10.77.0.0/24".into(), Way::OnLink),
                (3, "::/0".into(), gateway("fe80::1")),
            ]
        );
    }

    #[test]
    fn the_lower_metric_wins_and_of_two_equal_ones_the_kernel_decides() {
        let metric = RouteAttribute::Priority;
        let cheap = route("0.0.0.0/0", vec![FRONT, via("10.77.0.1"), metric(10)]);
        let dear = route("0.0.0.0/0", vec![FRONT, via("10.77.0.9"), metric(20)]);
        let other = route("0.0.0.0/0", vec![FRONT, via("10.77.0.9"), metric(10)]);
        let first = Way::Gateway("10.77.0.1".parse().unwrap());
        for (all, expected) in [
            ([cheap.clone(), dear.clone()], first),
            ([dear, cheap.clone()], first),
            ([cheap, other], Way::Kernel),
        ] {
            assert_eq!(ways(&all), [(2, "0.0.0.0/0".into(), expected)]);
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_the_kernel() {
        let blackhole = |mut message: RouteMessage| {
            message.header.kind = RouteType::BlackHole;
            message
        };
        let by_source = |mut message: RouteMessage| {
            message.header.source_prefix_length = 64;
            message
        };
        for message in [
            blackhole(route("10.9.0.0/16", vec![])),
            route("10.9.0.0/16", vec![RouteAttribute::MultiPath(vec![])]),
            route("10.9.0.0/16", vec![FRONT, RouteAttribute::Encap(vec![])]),
            route(
                "10.9.0.0/16",
                vec![FRONT, RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)])],
            ),
            by_source(route("10.9.0.0/16", vec![FRONT, via("10.77.0.1")])),
        ] {
            let to = || "10.9.0.0/16".to_owned();
            assert_eq!(
                ways(std::slice::from_ref(&message)),
                [(2, to(), Way::Kernel), (3, to(), Way::Kernel)],
                "{message:?}"
            );
        }
        let mut dead = route("10.9.0.0/16", vec![FRONT]);
        dead.header.flags = RouteFlags::Dead;
        let mut elsewhere = route("10.9.0.0/16", vec![FRONT]);
        elsewhere.header.table = 100;
        assert_eq!(ways(&[dead, elsewhere]), []);
    }

    #[test]
    fn rules_that_look_at_packets_are_not_plain() {
        let rule = |table: u8, attributes: Vec<RuleAttribute>| {
            let mut rule = RuleMessage::default();
            rule.header.table = table;
            rule.header.action = RuleAction::ToTable;
            rule.attributes = attributes;
            rule
        };
        let usual = [
            rule(255, vec![RuleAttribute::Table(255), RuleAttribute::SuppressPrefixLen(u32::MAX)]),
            rule(254, vec![RuleAttribute::Table(254), RuleAttribute::Priority(32766)]),
        ];
        assert!(are_plain(&usual));
        for odd in [
            rule(100, vec![RuleAttribute::Table(100)]),
            rule(254, vec![RuleAttribute::Table(254), RuleAttribute::FwMark(1)]),
            rule(254, vec![RuleAttribute::SuppressPrefixLen(0)]),
        ] {
            assert!(!are_plain(&[usual[0].clone(), odd]));
        }
    }

    #[test]
    fn neighbours_are_known_by_their_state() {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = 2;
        let address = Ipv4Addr::new(10, 77, 0, 1);
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 1]),
        ];
        let host = Host { ifindex: 2, address: address.into() };
        let at = |stale| Known::At { mac: [2, 0, 0, 0, 0, 1], stale };
        for (state, known) in [
            (NeighbourState::Reachable, at(false)),
            (NeighbourState::Probe, at(false)),
            (NeighbourState::Permanent, at(false)),
            (NeighbourState::Stale, at(true)),
            (NeighbourState::Failed, Known::Nothing),
            (NeighbourState::Incomplete, Known::Nothing),
        ] {
            message.header.state = state;
            assert_eq!(of_neighbour(&message), Some((host, known)), "{state:?}");
        }
        message.header.flags = NeighbourFlags::Proxy;
        assert_eq!(of_neighbour(&message), None);
    }
}
