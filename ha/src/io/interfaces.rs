//! What the kernel says of the interfaces that matter here: a snapshot, and the questions that
//! the driver asks of it. Pure; [`super::netlink`] fills it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use crate::config::{Family, Path, Transport, Vip};

/// Every watched interface by its name; one that does not exist is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interfaces(pub BTreeMap<String, Interface>);

/// One interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Kernel index; another one after it was made anew.
    pub index: u32,
    /// MAC address; zero where it has none.
    pub mac: [u8; 6],
    /// Administratively up.
    pub up: bool,
    /// The cable, or the other end of the veth, is there.
    pub carrier: bool,
    /// Its addresses, in the kernel's order.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// Whether packets may be sent from it: not while duplicate address detection runs or after
    /// it failed.
    pub ready: bool,
}

impl Interfaces {
    /// Whether an interface can carry VIPs, with the reason where it can't.
    pub fn usable(&self, name: &str) -> Result<&Interface, String> {
        let interface =
            self.0.get(name).ok_or_else(|| format!("no interface `{name}`: create it"))?;
        if !interface.up {
            return Err(format!("`{name}` is down: `ip link set {name} up`"));
        }
        if !interface.carrier {
            return Err(format!("`{name}` has no carrier"));
        }
        Ok(interface)
    }

    /// The primary address of a path (RFC 9568 §1.2), from which its multicast adverts come and
    /// by which ties are broken: the interface's first IPv4 address that is no VIP; for IPv6 its
    /// link-local address (§5.1.2.1), and where adverts are unicast to global addresses the
    /// address that is nearest to the first of them.
    pub fn primary(&self, path: &Path, vips: &[Vip]) -> Result<IpAddr, String> {
        let towards = match &path.transport {
            Transport::Multicast => None,
            Transport::Unicast(peers) => peers.first().copied(),
        };
        self.source(path, vips, towards)
    }

    /// The address from which adverts to `towards` (`None`: the multicast group) are sent.
    pub fn source(
        &self,
        path: &Path,
        vips: &[Vip],
        towards: Option<IpAddr>,
    ) -> Result<IpAddr, String> {
        let name = &path.interface;
        let interface = self.usable(name)?;
        let scope = match towards {
            Some(IpAddr::V6(peer)) if !peer.is_unicast_link_local() => Scope::Global,
            _ => Scope::of(path.family),
        };
        let candidates = interface.addresses.iter().filter(|candidate| {
            scope.contains(candidate.address)
                && !vips.iter().any(|vip| vip.address == candidate.address)
        });
        let ready = candidates.clone().filter(|candidate| candidate.ready);
        let chosen = match towards {
            // The longest match; the first of equals.
            Some(peer) => ready.rev().max_by_key(|candidate| {
                common_prefix(candidate.address, peer).min(u32::from(candidate.prefix))
            }),
            None => ready.clone().next(),
        };
        match chosen {
            Some(address) => Ok(address.address),
            None if candidates.clone().next().is_some() => {
                Err(format!("`{name}` has no usable {scope} yet: duplicate address detection runs"))
            }
            None => Err(format!("`{name}` has no {scope} besides the VIPs: give it one")),
        }
    }

    /// Whether the kernel has a VIP on its interface.
    pub fn has(&self, vip: &Vip) -> bool {
        self.0.get(&vip.interface).is_some_and(|interface| {
            interface.addresses.iter().any(|address| address.address == vip.address)
        })
    }
}

impl Interface {
    /// Whether an address besides the VIPs has the VIP's network already, so that its route is
    /// there.
    pub fn covers(&self, vip: &Vip, vips: &[Vip]) -> bool {
        self.addresses.iter().any(|own| {
            Family::of(own.address) == Family::of(vip.address)
                && !vips.iter().any(|vip| vip.address == own.address)
                && own.prefix <= vip.prefix
                && common_prefix(own.address, vip.address) >= u32::from(own.prefix)
        })
    }
}

/// Which addresses may be a path's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    V4,
    LinkLocal,
    Global,
}

impl Scope {
    fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self::V4,
            Family::V6 => Self::LinkLocal,
        }
    }

    fn contains(self, address: IpAddr) -> bool {
        match (self, address) {
            (Self::V4, IpAddr::V4(_)) => true,
            (Self::LinkLocal, IpAddr::V6(address)) => address.is_unicast_link_local(),
            (Self::Global, IpAddr::V6(address)) => {
                !address.is_unicast_link_local() && address != Ipv6Addr::LOCALHOST
            }
            (Self::V4, IpAddr::V6(_)) | (Self::LinkLocal | Self::Global, IpAddr::V4(_)) => false,
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4 address",
            Self::LinkLocal => "IPv6 link-local address",
            Self::Global => "global IPv6 address",
        })
    }
}

/// How many leading bits two addresses share; none across families.
fn common_prefix(a: IpAddr, b: IpAddr) -> u32 {
    match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str, ready: bool) -> Address {
        let (address, prefix) = text.split_once('/').unwrap();
        Address { address: address.parse().unwrap(), prefix: prefix.parse().unwrap(), ready }
    }

    fn front(addresses: Vec<Address>) -> Interfaces {
        let interface = Interface { index: 2, mac: [2; 6], up: true, carrier: true, addresses };
        Interfaces(BTreeMap::from([("front".to_owned(), interface)]))
    }

    fn vip(address: &str, prefix: u8) -> Vip {
        Vip { address: address.parse().unwrap(), prefix, interface: "front".to_owned() }
    }

    fn path(family: Family, transport: Transport) -> Path {
        let addresses = vec!["10.77.0.100".parse().unwrap()];
        Path { interface: "front".to_owned(), family, transport, addresses }
    }

    fn unicast(peer: &str) -> Transport {
        Transport::Unicast(vec![peer.parse().unwrap()])
    }

    #[test]
    fn the_primary_address_is_the_first_that_is_no_vip() {
        let interfaces = front(vec![
            address("10.77.0.100/24", true),
            address("10.77.0.3/24", true),
            address("10.77.0.2/24", true),
            address("fd77::2/64", true),
            address("fe80::5/64", true),
        ]);
        let vips = [vip("10.77.0.100", 24)];
        for (family, transport, expected) in [
            (Family::V4, Transport::Multicast, "10.77.0.3"),
            (Family::V4, unicast("10.77.0.9"), "10.77.0.3"),
            (Family::V6, Transport::Multicast, "fe80::5"),
            (Family::V6, unicast("fe80::9"), "fe80::5"),
            (Family::V6, unicast("fd77::3"), "fd77::2"),
        ] {
            let path = path(family, transport);
            let primary = interfaces.primary(&path, &vips).unwrap();
            assert_eq!(primary, expected.parse::<IpAddr>().unwrap(), "{path:?}");
        }
    }

    #[test]
    fn a_unicast_source_is_the_nearest_to_the_peer() {
        let interfaces = front(vec![address("192.0.2.1/24", true), address("10.77.0.2/24", true)]);
        let primary = interfaces.primary(&path(Family::V4, unicast("10.77.0.9")), &[]).unwrap();
        assert_eq!(primary, "10.77.0.2".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn what_is_wrong_with_a_path_is_said() {
        let v6 = path(Family::V6, Transport::Multicast);
        let says = |interfaces: &Interfaces| interfaces.primary(&v6, &[]).unwrap_err();
        assert!(says(&Interfaces::default()).contains("no interface `front`"));
        assert!(says(&front(vec![])).contains("no IPv6 link-local address"));
        assert!(says(&front(vec![address("fe80::1/64", false)])).contains("duplicate address"));
        let mut down = front(vec![]);
        down.0.get_mut("front").unwrap().carrier = false;
        assert!(says(&down).contains("no carrier"));
        down.0.get_mut("front").unwrap().up = false;
        assert!(says(&down).contains("ip link set front up"));
    }

    #[test]
    fn a_vip_is_covered_by_another_address_of_its_network_only() {
        let vips = [vip("10.77.0.100", 24), vip("10.77.0.101", 24), vip("fd77::100", 64)];
        let covers = |own: Vec<Address>, vip: &Vip| front(own).0["front"].covers(vip, &vips);
        assert!(covers(vec![address("10.77.0.2/24", true)], &vips[0]));
        assert!(covers(vec![address("10.77.0.2/16", true)], &vips[0]));
        assert!(covers(vec![address("fd77::2/64", true)], &vips[2]));
        assert!(!covers(vec![address("10.77.0.2/30", true)], &vips[0]));
        assert!(!covers(vec![address("10.77.0.101/24", true)], &vips[0]));
        assert!(!covers(vec![address("fe80::1/64", true)], &vips[2]));
        assert!(!covers(vec![], &vips[0]));
    }
}
