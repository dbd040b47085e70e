//! Whether this machine can do what the file says: its interfaces carry the VIPs and the adverts,
//! its addresses are there to listen on, the scripts can be run.
//!
//! What the machine has is data ([`System`]): read here, or made up by a test.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use baton_ha::config::{Family, HaConfig, Vip};
use nix::ifaddrs::getifaddrs;
use nix::unistd::{AccessFlags, access};

use super::paths::family_name;
use super::problem::{Errors, Problem, Report};
use super::section::{At, nearest};
use super::vips::{network, same_network};
use super::{Config, Places};
use crate::service::Probe;

/// What a machine has, as far as a configuration asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct System {
    /// Its interfaces, those without an address too.
    pub interfaces: Vec<Interface>,
    /// The programs of the script checks; `Err` says why one can't be run.
    pub programs: BTreeMap<PathBuf, Result<(), String>>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its addresses, each with its prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
}

impl System {
    /// What this machine has, in the network namespace of this thread.
    pub fn read(config: &Config) -> io::Result<Self> {
        let mut interfaces: BTreeMap<String, Vec<(IpAddr, u8)>> = BTreeMap::new();
        for entry in getifaddrs().map_err(io::Error::from)? {
            let addresses = interfaces.entry(entry.interface_name).or_default();
            let ip = |storage: nix::sys::socket::SockaddrStorage| {
                let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
                v4.or_else(|| storage.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
            };
            if let Some(address) = entry.address.and_then(ip) {
                addresses.push((address, entry.netmask.and_then(ip).map_or(0, prefix)));
            }
        }
        let interfaces =
            interfaces.into_iter().map(|(name, addresses)| Interface { name, addresses }).collect();
        let programs = config
            .checks
            .iter()
            .filter_map(|check| match &check.probe {
                Probe::Script { command } => command.first().map(PathBuf::from),
                _ => None,
            })
            .map(|program| (program.clone(), runnable(&program)))
            .collect();
        Ok(Self { interfaces, programs })
    }

    fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }
}

/// Number of leading ones of a netmask.
fn prefix(mask: IpAddr) -> u8 {
    let ones = match mask {
        IpAddr::V4(v4) => u32::from(v4).leading_ones(),
        IpAddr::V6(v6) => u128::from(v6).leading_ones(),
    };
    u8::try_from(ones).expect("an address has at most 128 bits")
}

fn runnable(program: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(program).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "is not there".to_owned(),
        _ => format!("can't be read: {error}"),
    })?;
    if !metadata.is_file() {
        return Err("is no file".to_owned());
    }
    access(program, AccessFlags::X_OK).map_err(|_| "is not executable".to_owned())
}

impl Config {
    /// Whether a machine can do what the file says: the warnings, or the errors with them.
    pub fn check_system(&self, system: &System) -> Result<Vec<Problem>, Errors> {
        let report = Report::default();
        if let Some(ha) = &self.ha {
            for (vip, place) in ha.vips.iter().zip(&self.places.vips) {
                carried(vip, &place.address, &place.interface, ha, system, &report);
            }
            advertised(ha, &self.places, system, &report);
        }
        self.listens(system, &report);
        self.scripts(system, &report);
        Errors::among(&self.source, report.into_drafts())
    }

    /// Reports services on addresses that the machine has not.
    fn listens(&self, system: &System, report: &Report) {
        let vips = self.ha.as_ref().map_or(&[][..], |ha| &ha.vips);
        for (service, place) in self.services.iter().zip(&self.places.services) {
            let ip = service.listen.ip();
            let has = |interface: &Interface| {
                interface.addresses.iter().any(|(address, prefix)| {
                    // All of 127.0.0.0/8 is there once 127.0.0.1 is.
                    *address == ip || ip.is_loopback() && same_network(*address, ip, *prefix)
                })
            };
            let is_vip = vips.iter().any(|vip| vip.address == ip);
            if is_vip || ip.is_unspecified() || system.interfaces.iter().any(has) {
                continue;
            }
            let own: Vec<String> = system
                .interfaces
                .iter()
                .flat_map(|interface| &interface.addresses)
                .filter(|(address, _)| address.is_ipv4() == ip.is_ipv4())
                .take(8)
                .map(|(address, _)| address.to_string())
                .collect();
            let what = format!("no interface of this machine has {ip}");
            let hint = match own.is_empty() {
                true => "give the machine that address first".to_owned(),
                false => format!("write one that it has: {}", own.join(", ")),
            };
            report.error(place, what, hint);
        }
    }

    /// Reports script checks whose program can't be run.
    fn scripts(&self, system: &System, report: &Report) {
        for (check, place) in self.checks.iter().zip(&self.places.checks) {
            let Probe::Script { command } = &check.probe else { continue };
            let Some(program) = command.first() else { continue };
            if let Some(Err(why)) = system.programs.get(Path::new(program)) {
                let what = format!("the program {program} of check {:?} {why}", check.name);
                let hint = "make it executable (chmod +x), or write another `command`";
                report.error(place, what, hint);
            }
        }
    }
}

type Span = std::ops::Range<usize>;

/// Reports a VIP that its interface can't carry.
fn carried(
    vip: &Vip,
    address_place: &Span,
    interface_place: &Span,
    ha: &HaConfig,
    system: &System,
    report: &Report,
) {
    let Some(interface) = system.interface(&vip.interface) else {
        return no_interface(&vip.interface, interface_place, system, report);
    };
    let Vip { address, prefix, interface: name } = vip;
    // The interface's own addresses; while this node is Active, VIPs are there beside them.
    let own = |interface: &'_ Interface| -> Vec<(IpAddr, u8)> {
        let is_own = |(address, _): &&(IpAddr, u8)| {
            address.is_ipv4() == vip.address.is_ipv4()
                && !ha.vips.iter().any(|vip| vip.address == *address)
        };
        interface.addresses.iter().filter(is_own).copied().collect()
    };
    let holds = |interface: &Interface| {
        own(interface).iter().any(|(own, prefix)| same_network(*own, *address, *prefix))
    };
    let family = family_name(Family::of(*address));
    if own(interface).is_empty() {
        let what =
            format!("{name:?} has no {family} address of its own, so it can't carry {address}");
        let hint = format!("give {name:?} one first: adverts are sent from it");
        return report.error(interface_place, what, hint);
    }
    let host_route = *prefix == if address.is_ipv4() { 32 } else { 128 };
    if holds(interface) {
        let other = own(interface)
            .into_iter()
            .find(|(own, prefix)| same_network(*own, *address, *prefix))
            .filter(|(_, theirs)| theirs != prefix && !host_route);
        if let Some((own, theirs)) = other {
            let what =
                format!("{address}/{prefix} is in a network that {name:?} knows as {own}/{theirs}");
            report.warning(address_place, what, format!("write \"{address}/{theirs}\""));
        }
        return;
    }
    if let Some(better) = system.interfaces.iter().find(|interface| holds(interface)) {
        let what = format!("{address} is in a network of {:?}, not of {name:?}", better.name);
        return report.error(
            interface_place,
            what,
            format!("write `interface = {:?}`", better.name),
        );
    }
    if !host_route && !vip_link_local(*address) {
        let networks: Vec<String> = own(interface)
            .iter()
            .filter_map(|(own, prefix)| Some(format!("{}/{prefix}", network(*own, *prefix)?)))
            .collect();
        let what = format!(
            "{address}/{prefix} is in no network of {name:?}, which has {}",
            networks.join(", ")
        );
        let host = if address.is_ipv4() { 32 } else { 128 };
        let hint = format!(
            "write an address in one of these, or \"{address}/{host}\" where routers send it here"
        );
        report.error(address_place, what, hint);
    }
}

fn vip_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Reports interfaces that should carry adverts and can't.
fn advertised(ha: &HaConfig, places: &Places, system: &System, report: &Report) {
    for At { value: name, span: place } in &places.interfaces {
        // Where a VIP is on it, the VIP has been complained of.
        let carries = |family: Option<Family>| {
            let is_family =
                |vip: &Vip| family.is_none_or(|family| Family::of(vip.address) == family);
            ha.vips.iter().any(|vip| vip.interface == *name && is_family(vip))
        };
        let Some(interface) = system.interface(name) else {
            if !carries(None) {
                no_interface(name, place, system, report);
            }
            continue;
        };
        let own = |family: Family| {
            interface.addresses.iter().any(|(address, _)| Family::of(*address) == family)
        };
        let of_paths = ha.paths.iter().filter(|path| path.interface == *name);
        let (here, silent): (Vec<Family>, Vec<Family>) =
            of_paths.map(|path| path.family).partition(|family| own(*family));
        let unsaid: Vec<_> =
            silent.into_iter().filter(|family| !carries(Some(*family))).map(family_name).collect();
        if unsaid.is_empty() {
            continue;
        }
        let what = format!("{name:?} has no {} address to send adverts from", unsaid.join(" or "));
        if here.is_empty() {
            report.error(place, what, format!("give {name:?} one first, or leave it out"));
        } else {
            report.warning(
                place,
                what,
                format!("give {name:?} one; until then that path is silent"),
            );
        }
    }
}

fn no_interface(name: &str, place: &Span, system: &System, report: &Report) {
    let names = || system.interfaces.iter().map(|interface| interface.name.as_str());
    let hint = match nearest(name, names()) {
        Some(near) => format!("did you mean {near:?}? write {near:?}"),
        None => format!("write one of: {}", names().take(16).collect::<Vec<_>>().join(", ")),
    };
    report.error(place, format!("this machine has no interface {name:?}"), hint);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, addresses: &[&str]) -> Interface {
        let parse = |text: &&str| {
            let (address, prefix) = text.split_once('/').expect("a prefix");
            (address.parse().expect("an address"), prefix.parse().expect("a number"))
        };
        Interface { name: name.into(), addresses: addresses.iter().map(parse).collect() }
    }

    /// The lab's first relay.
    fn relay1() -> System {
        let interfaces = vec![
            interface("back", &["10.78.0.2/24", "fd78::2/64", "fe80::2/64"]),
            interface("front", &["10.77.0.2/24", "fd77::2/64", "fe80::1/64"]),
            interface("lo", &["127.0.0.1/8", "::1/128"]),
            interface("plain", &[]),
        ];
        System { interfaces, programs: BTreeMap::new() }
    }

    /// What is said of config/relay1.toml with a change.
    fn told(from: &str, to: &str, system: &System) -> String {
        let text = include_str!("../../config/relay1.toml");
        assert!(text.contains(from), "{from}");
        let config = Config::parse(Path::new("f.toml"), &text.replacen(from, to, 1));
        let config = config.unwrap_or_else(|errors| panic!("{errors}"));
        match config.check_system(system) {
            Ok(warnings) => warnings.iter().map(|warning| format!("{warning}\n")).collect(),
            Err(errors) => format!("{errors}\n"),
        }
    }

    /// Without the place and the line, which have tests of their own.
    fn brief(told: &str) -> Vec<&str> {
        told.lines()
            .filter(|line| !line.contains(" | "))
            .map(|line| {
                line.trim_start().split_once(": ").map_or(line.trim_start(), |(place, rest)| {
                    if place.starts_with("f.toml") { rest } else { line.trim_start() }
                })
            })
            .collect()
    }

    #[test]
    fn the_labs_relay_can_do_it() {
        assert_eq!(told("", "", &relay1()), "");
    }

    #[test]
    fn an_active_node_is_no_different() {
        let mut system = relay1();
        system.interfaces[1].addresses.push(("10.77.0.100".parse().expect("an address"), 24));
        assert_eq!(told("", "", &system), "");
    }

    #[test]
    fn an_interface_that_is_not_there() {
        let expected = "f.toml:23:13: error: this machine has no interface \"fornt\"\n  \
                        23 | interface = \"fornt\"\n     \
                        |             ^^^^^^^\n  \
                        did you mean \"front\"? write \"front\"\n";
        let told = told("interface = \"front\"", "interface = \"fornt\"", &relay1());
        assert!(told.contains(expected), "{told}");
    }

    #[test]
    fn an_interface_of_the_adverts_that_is_not_there() {
        let told = told("\"back\"", "\"wlan0\"", &relay1());
        let expected = [
            "error: this machine has no interface \"wlan0\"",
            "write one of: back, front, lo, plain",
        ];
        assert_eq!(brief(&told), expected);
    }

    #[test]
    fn an_interface_without_an_address_carries_nothing() {
        let mut system = relay1();
        system.interfaces[1].addresses.retain(|(address, _)| address.is_ipv6());
        let expected = [
            "error: \"front\" has no IPv4 address of its own, so it can't carry 10.77.0.100",
            "give \"front\" one first: adverts are sent from it",
        ];
        assert_eq!(brief(&told("", "", &system)), expected);

        // The VIP itself is not an address of its own.
        system.interfaces[1].addresses.push(("10.77.0.100".parse().expect("an address"), 24));
        assert_eq!(brief(&told("", "", &system)), expected);
    }

    #[test]
    fn an_interface_of_the_adverts_without_an_address() {
        let told = told("\"back\"", "\"plain\"", &relay1());
        let expected = [
            "error: \"plain\" has no IPv4 address to send adverts from",
            "give \"plain\" one first, or leave it out",
        ];
        assert_eq!(brief(&told), expected);
    }

    #[test]
    fn a_silent_path_beside_another_is_a_warning() {
        let mut system = relay1();
        system.interfaces[0].addresses.retain(|(address, _)| address.is_ipv4());
        let vip6 = "[[vips]]\nname = \"six\"\naddress = \"fd77::100/64\"\ninterface = \"front\"\n\n\
                    [[services]]\nname = \"six\"\nvip = \"six\"\nport = 1\n\
                    [[services.backends]]\nname = \"b\"\naddress = \"[fd78::11]:1\"\n\n[[vips]]";
        let expected = [
            "warning: \"back\" has no IPv6 address to send adverts from",
            "give \"back\" one; until then that path is silent",
        ];
        assert_eq!(brief(&told("[[vips]]", vip6, &system)), expected);
    }

    #[test]
    fn a_vip_of_another_interfaces_network() {
        let told = told("10.77.0.100/24", "10.78.0.100/24", &relay1());
        let expected = [
            "error: 10.78.0.100 is in a network of \"back\", not of \"front\"",
            "write `interface = \"back\"`",
        ];
        assert_eq!(brief(&told), expected);
    }

    #[test]
    fn a_vip_of_no_network_needs_a_host_route() {
        let strange = told("10.77.0.100/24", "192.0.2.1/24", &relay1());
        let expected = [
            "error: 192.0.2.1/24 is in no network of \"front\", which has 10.77.0.0/24",
            "write an address in one of these, or \"192.0.2.1/32\" where routers send it here",
        ];
        assert_eq!(brief(&strange), expected);
        assert_eq!(told("10.77.0.100/24", "192.0.2.1/32", &relay1()), "");
    }

    #[test]
    fn a_vip_with_another_prefix_is_a_warning() {
        let told = told("10.77.0.100/24", "10.77.0.100/16", &relay1());
        let expected = [
            "warning: 10.77.0.100/16 is in a network that \"front\" knows as 10.77.0.2/24",
            "write \"10.77.0.100/24\"",
        ];
        assert_eq!(brief(&told), expected);
    }

    #[test]
    fn an_address_to_listen_on_that_nobody_has() {
        let listen = "listen = \"10.77.0.9:1080\"";
        let told_of = told("vip = \"socks\"\nport = 1080", listen, &relay1());
        let expected = [
            "error: no interface of this machine has 10.77.0.9",
            "write one that it has: 10.78.0.2, 10.77.0.2, 127.0.0.1",
        ];
        assert_eq!(brief(&told_of), expected);
        for there in ["10.77.0.2:1080", "0.0.0.0:1080", "127.0.0.53:1080"] {
            let listen = format!("listen = \"{there}\"");
            assert_eq!(told("vip = \"socks\"\nport = 1080", &listen, &relay1()), "", "{there}");
        }
    }

    #[test]
    fn a_script_that_cannot_be_run() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("check");
        let text = format!(
            "[node]\nname = \"n\"\n[[services]]\nname = \"s\"\nlisten = \"0.0.0.0:1\"\n\
             check = \"own\"\n[[services.backends]]\nname = \"b\"\naddress = \"10.0.0.1:1\"\n\
             [checks.own]\ntype = \"script\"\ncommand = [\"{}\"]\n",
            program.display()
        );
        let config = Config::parse(Path::new("f.toml"), &text).expect("correct");
        let told = || {
            let system = System::read(&config).expect("this machine");
            config.check_system(&system).err().map(|errors| errors.problems()[0].what.clone())
        };
        let named =
            |why: &str| Some(format!("the program {} of check \"own\" {why}", program.display()));
        assert_eq!(told(), named("is not there"));
        std::fs::write(&program, "#!/bin/sh\n").expect("written");
        assert_eq!(told(), named("is not executable"));
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("set");
        assert_eq!(told(), None);
        std::fs::remove_file(&program).expect("removed");
        std::fs::create_dir(&program).expect("made");
        assert_eq!(told(), named("is no file"));
    }

    #[test]
    fn this_machine_has_a_loopback_interface() {
        let config = Config::parse(
            Path::new("f.toml"),
            "[node]\nname = \"n\"\n[[services]]\nname = \"s\"\nlisten = \"127.0.0.1:1\"\n\
             [[services.backends]]\nname = \"b\"\naddress = \"10.0.0.1:1\"\n",
        );
        let config = config.expect("correct");
        let system = System::read(&config).expect("this machine");
        let lo = system.interface("lo").expect("a loopback interface");
        assert!(lo.addresses.contains(&("127.0.0.1".parse().expect("an address"), 8)), "{lo:?}");
        assert_eq!(config.check_system(&system), Ok(Vec::new()));
    }
}
