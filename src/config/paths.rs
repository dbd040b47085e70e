//! The paths on which the nodes hear each other: an election's interfaces, by address family.

use std::net::IpAddr;

use baton_ha::config::{Family, Path, Peer, Transport, Vip};

use super::section::Section;
use super::vips;

/// Most addresses that an advert can list (RFC 9568 §5.2.5).
const MOST_ADDRESSES: usize = 255;

/// Where adverts go, as the file says it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// To the group.
    Multicast,
    /// To each peer.
    Unicast,
}

/// One path for each interface and each family that the VIPs have.
pub(super) fn of(
    section: &Section<'_>,
    transport: Kind,
    interfaces: &[String],
    vips: &[Vip],
    peers: &[Peer],
) -> Vec<Path> {
    let mut paths = Vec::new();
    for interface in interfaces {
        for family in [Family::V4, Family::V6] {
            let addresses = advertised(interface, family, vips);
            if addresses.is_empty() {
                continue;
            }
            if addresses.len() > MOST_ADDRESSES {
                let what = format!(
                    "an advert on {interface:?} would list {} {} addresses; it holds {MOST_ADDRESSES}",
                    addresses.len(),
                    family_name(family),
                );
                section.report.error(&section.span, what, "write fewer [[vips]]");
            }
            let target = match transport {
                Kind::Multicast => Transport::Multicast,
                Kind::Unicast => match unicast(interface, family, interfaces, vips, peers) {
                    targets if targets.is_empty() => continue,
                    targets => Transport::Unicast(targets),
                },
            };
            paths.push(Path { interface: interface.clone(), family, transport: target, addresses });
        }
    }
    if matches!(transport, Kind::Unicast) {
        let span = section.value_span("transport").unwrap_or(section.span.clone());
        unicast_complaints(section, &span, interfaces, &paths, peers);
    }
    paths
}

/// The addresses that an advert lists. For IPv6 link-local addresses come first (RFC 9568
/// §5.2.9); else they are in the order of the file.
fn advertised(interface: &str, family: Family, vips: &[Vip]) -> Vec<IpAddr> {
    let of_family = || vips.iter().filter(|vip| Family::of(vip.address) == family);
    let own: Vec<_> = of_family().filter(|vip| vip.interface == interface).collect();
    let listed = if own.is_empty() { of_family().collect() } else { own };
    let mut addresses: Vec<_> = listed.into_iter().map(|vip| vip.address).collect();
    addresses.sort_by_key(|address| !link_local(*address));
    addresses
}

/// The peers' addresses that a path reaches: those in the network of one of its interface's
/// VIPs; where there are none, those in the network of no VIP of another interface. A link-local
/// address is reached on every interface.
fn unicast(
    interface: &str,
    family: Family,
    interfaces: &[String],
    vips: &[Vip],
    peers: &[Peer],
) -> Vec<IpAddr> {
    let all: Vec<IpAddr> = peers
        .iter()
        .flat_map(|peer| peer.addresses.iter().copied())
        .filter(|address| Family::of(*address) == family)
        .collect();
    let in_network = |address: IpAddr, vip: &Vip| {
        !link_local(address) && vips::same_network(vip.address, address, vip.prefix)
    };
    let here = |address: IpAddr| {
        vips.iter().any(|vip| vip.interface == interface && in_network(address, vip))
    };
    let elsewhere = |address: IpAddr| {
        vips.iter().any(|vip| {
            vip.interface != interface
                && interfaces.contains(&vip.interface)
                && in_network(address, vip)
        })
    };
    let any_here = all.iter().any(|address| here(*address));
    all.into_iter()
        .filter(|address| {
            link_local(*address) || if any_here { here(*address) } else { !elsewhere(*address) }
        })
        .collect()
}

fn unicast_complaints(
    section: &Section<'_>,
    span: &std::ops::Range<usize>,
    interfaces: &[String],
    paths: &[Path],
    peers: &[Peer],
) {
    if peers.is_empty() {
        let what = "`transport` is \"unicast\" and there are no peers to send to";
        let hint = "write [[cluster.peers]] with their addresses, or `transport = \"multicast\"`";
        return section.report.error(span, what, hint);
    }
    for interface in interfaces {
        if !paths.iter().any(|path| path.interface == *interface) {
            let what = format!("no peer has an address that adverts on {interface:?} could go to");
            let hint = format!(
                "write the peers' addresses on {interface:?} under [[cluster.peers]], or leave it \
                 out of `interfaces`"
            );
            section.report.error(span, what, hint);
        }
    }
    let reached = |address: &IpAddr| {
        paths.iter().any(|path| match &path.transport {
            Transport::Unicast(targets) => targets.contains(address),
            Transport::Multicast => true,
        })
    };
    for peer in peers.iter().filter(|peer| !peer.addresses.iter().any(reached)) {
        let what =
            format!("no advert goes to peer {:?}: none of its addresses is on a path", peer.name);
        let hint = "write its address in a VIP's network under [[cluster.peers]]";
        section.report.error(span, what, hint);
    }
}

fn link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// `IPv4` or `IPv6`.
pub(super) fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path as File;

    use super::*;
    use crate::config::Config;
    use crate::config::election::tests::ha;

    fn ips(addresses: &[&str]) -> Vec<IpAddr> {
        addresses.iter().map(|address| address.parse().expect("an address")).collect()
    }

    #[test]
    fn adverts_travel_where_the_vips_are_one_path_a_family() {
        let vips = [
            ("10.77.0.100/24", "front"),
            ("10.78.0.100/24", "back"),
            ("fd77::100/64", "front"),
            ("10.77.0.101/24", "front"),
        ];
        let ha = ha(&[], "", &vips);
        let path = |interface: &str, family, addresses: &[&str]| Path {
            interface: interface.into(),
            family,
            transport: Transport::Multicast,
            addresses: ips(addresses),
        };
        let expected = [
            path("front", Family::V4, &["10.77.0.100", "10.77.0.101"]),
            path("front", Family::V6, &["fd77::100"]),
            path("back", Family::V4, &["10.78.0.100"]),
            path("back", Family::V6, &["fd77::100"]),
        ];
        assert_eq!(ha.paths, expected);
    }

    #[test]
    fn an_interface_without_vips_advertises_all_of_the_family() {
        let vips = [("10.77.0.100/24", "front"), ("10.79.0.100/24", "side")];
        let ha = ha(&[], "interfaces = [\"back\", \"front\", \"side\"]", &vips);
        let listed: Vec<_> = ha.paths.iter().map(|path| path.addresses.clone()).collect();
        let expected =
            [ips(&["10.77.0.100", "10.79.0.100"]), ips(&["10.77.0.100"]), ips(&["10.79.0.100"])];
        assert_eq!(listed, expected);
    }

    #[test]
    fn a_link_local_vip_comes_first_in_the_advert() {
        let vips = [("10.1.0.1/24", "a"), ("fd77::100/64", "a"), ("fe80::100/64", "a")];
        let ha = ha(&[], "", &vips);
        assert_eq!(ha.paths[1].addresses, ips(&["fe80::100", "fd77::100"]));
    }

    #[test]
    fn unicast_goes_to_the_peers_on_that_side() {
        let peers = ["10.77.0.3", "10.78.0.3", "fd77::3", "fe80::3"];
        let vips = [("10.77.0.100/24", "front"), ("fd77::100/64", "front")];
        let election = "transport = \"unicast\"\ninterfaces = [\"front\", \"back\"]";
        let ha = ha(&peers, election, &vips);
        let targets: Vec<_> = ha
            .paths
            .iter()
            .map(|path| (path.interface.as_str(), path.family, path.transport.clone()))
            .collect();
        let to = |addresses: &[&str]| Transport::Unicast(ips(addresses));
        let expected = [
            ("front", Family::V4, to(&["10.77.0.3"])),
            ("front", Family::V6, to(&["fd77::3", "fe80::3"])),
            ("back", Family::V4, to(&["10.78.0.3"])),
            ("back", Family::V6, to(&["fe80::3"])),
        ];
        assert_eq!(targets, expected);
    }

    #[test]
    fn unicast_with_host_routes_goes_to_every_peer() {
        let election = "transport = \"unicast\"";
        let ha = ha(&["192.0.2.3", "198.51.100.3"], election, &[("10.77.0.100/32", "front")]);
        assert_eq!(ha.paths[0].transport, Transport::Unicast(ips(&["192.0.2.3", "198.51.100.3"])));
    }

    #[test]
    fn an_advert_holds_255_addresses_and_no_more() {
        let text = |count: usize| {
            let vips: String = (0..count)
                .map(|number| {
                    format!(
                        "[[vips]]\nname = \"v{number}\"\naddress = \"10.1.{}.{}/16\"\n\
                         interface = \"a\"\n",
                        1 + number / 200,
                        1 + number % 200
                    )
                })
                .collect();
            format!(
                "[node]\nname = \"n\"\n[election]\nvrid = 1\n{vips}[[services]]\nname = \"s\"\n\
                 vip = \"v0\"\nport = 1\n[[services.backends]]\nname = \"b\"\n\
                 address = \"10.2.0.1:1\"\n"
            )
        };
        let parse = |count| Config::parse(File::new("f.toml"), &text(count));
        assert!(parse(255).is_ok());
        let errors = parse(256).expect_err("too many").to_string();
        assert!(errors.contains("would list 256 IPv4 addresses; it holds 255"), "{errors}");
    }
}
