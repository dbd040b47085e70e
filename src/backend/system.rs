//! This machine: its addresses, interfaces and kernel parameters, read and changed.

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use anyhow::Context as _;
use nix::ifaddrs::getifaddrs;

use crate::datapath::routes;
use crate::lab::netns::run;

/// The interface that has an address; `None`: it is not this machine's.
pub(super) fn interface_of(address: IpAddr) -> anyhow::Result<Option<String>> {
    let found = getifaddrs()
        .context("list the addresses")?
        .find(|at| at.address.as_ref().and_then(routes::ip_of) == Some(address));
    Ok(found.map(|at| at.interface_name))
}

/// Interfaces of the default routes of both families, where most replies leave.
pub(super) fn default_interfaces() -> Vec<String> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    // Interface, destination, …, mask (the eighth field): none of it is a default route's.
    let v4 = read("/proc/thread-self/net/route");
    let v4 = v4.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000"))
            .then(|| fields[0].to_owned())
    });
    // Destination, its prefix length, …, interface. Loopback has one that refuses.
    let v6 = read("/proc/thread-self/net/ipv6_route");
    let v6 = v6.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_default =
            fields.first() == Some(&"0".repeat(32).as_str()) && fields.get(1) == Some(&"00");
        fields.last().filter(|name| is_default && **name != "lo").map(|name| (*name).to_owned())
    });
    let mut all: Vec<String> = v4.chain(v6).collect();
    all.sort();
    all.dedup();
    all
}

/// An interface's MTU, in bytes.
pub(super) fn mtu(interface: &str) -> anyhow::Result<u32> {
    let path = format!("/sys/class/net/{interface}/mtu");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.trim().parse().with_context(|| format!("read {path}"))
}

/// A kernel parameter (`net.ipv4.conf.all.arp_ignore`).
pub(super) fn sysctl(name: &str) -> anyhow::Result<i64> {
    let path = path_of(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.trim().parse().with_context(|| format!("read {path}"))
}

/// Sets it.
pub(super) fn set_sysctl(name: &str, value: i64) -> anyhow::Result<()> {
    let path = path_of(name);
    fs::write(&path, value.to_string()).with_context(|| format!("write {path}"))
}

/// An interface's name may have dots of its own.
fn path_of(name: &str) -> String {
    for family in ["net.ipv4.conf.", "net.ipv6.conf."] {
        let split = name.strip_prefix(family).and_then(|rest| rest.rsplit_once('.'));
        if let Some((interface, parameter)) = split {
            let family = family.replace('.', "/");
            return format!("/proc/sys/{family}{interface}/{parameter}");
        }
    }
    format!("/proc/sys/{}", name.replace('.', "/"))
}

/// The `ip` command that puts a VIP on the loopback: nothing is to be sent from it unasked, so it
/// is of host scope, or deprecated.
pub(super) fn add_address(vip: IpAddr) -> String {
    match vip {
        IpAddr::V4(_) => format!("ip addr add {vip}/32 dev lo scope host"),
        IpAddr::V6(_) => format!("ip -6 addr add {vip}/128 dev lo preferred_lft 0 nodad"),
    }
}

/// The one that takes it away.
pub(super) fn remove_address(vip: IpAddr) -> String {
    match vip {
        IpAddr::V4(_) => format!("ip addr del {vip}/32 dev lo"),
        IpAddr::V6(_) => format!("ip -6 addr del {vip}/128 dev lo"),
    }
}

/// Runs a command of words without blanks in them.
pub(super) fn command(words: &str) -> anyhow::Result<String> {
    let mut words = words.split(' ');
    let output = run(Command::new(words.next().unwrap_or_default()).args(words))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether an interface has a clsact qdisc, which the program's filters hang on.
pub(super) fn has_clsact(interface: &str) -> bool {
    command(&format!("tc qdisc show dev {interface}")).is_ok_and(|text| text.contains("clsact"))
}

/// Removes it if no filter is left in it.
pub(super) fn remove_clsact(interface: &str) -> anyhow::Result<()> {
    for side in ["ingress", "egress"] {
        let filters = command(&format!("tc filter show dev {interface} {side}"));
        if !filters.is_ok_and(|text| text.trim().is_empty()) {
            return Ok(());
        }
    }
    command(&format!("tc qdisc del dev {interface} clsact")).map(drop)
}
