//! `[[vips]]`: the shared addresses.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Range;

use baton_ha::config::Vip;
use toml::Spanned;
use toml::de::DeValue;

use super::section::{At, Section, VIP, shorten};
use super::value::{self, Read, complain};

/// A VIP under its name.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) vip: Vip,
    pub(super) places: Places,
}

/// Where the file says what of a VIP; the check against the machine points there.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub(super) address: Range<usize>,
    pub(super) interface: Range<usize>,
}

/// The VIPs of the file.
#[derive(Debug, Default)]
pub(super) struct Vips {
    /// Those that are right, in the order of the file.
    pub(super) right: Vec<Named>,
    /// Names of those that are wrong: who refers to them is not to blame.
    pub(super) wrong: Vec<String>,
}

/// The VIPs; what is wrong is reported.
pub(super) fn read(root: &Section<'_>) -> Vips {
    let mut names: HashMap<String, ()> = HashMap::new();
    let mut addresses: HashMap<IpAddr, String> = HashMap::new();
    let mut vips = Vips::default();
    for section in root.sections("vips", &VIP) {
        let name = section.require("name", "\"socks\"", value::name);
        let address = section.require("address", "\"10.77.0.100/24\"", network_address);
        let interface = section.require("interface", "\"eth0\"", value::interface);

        if let Some(name) = &name
            && names.insert(name.value.clone(), ()).is_some()
        {
            let what = format!("another VIP is called {:?} too", name.value);
            section.report.error(&name.span, what, "write a name of its own");
        }
        if let Some(At { value: (address, _), span }) = &address {
            let called =
                name.as_ref().map_or_else(String::new, |name| format!(" {:?}", name.value));
            if let Some(other) = addresses.insert(*address, called) {
                let what = format!("{address} is the address of VIP{other} already");
                section.report.error(span, what, "write another address, or remove this VIP");
            }
        }
        let (Some(name), Some(address), Some(interface)) = (name, address, interface) else {
            vips.wrong.extend(section.peek("name").map(str::to_owned));
            continue;
        };
        vips.right.push(Named {
            name: name.value,
            vip: Vip {
                address: address.value.0,
                prefix: address.value.1,
                interface: interface.value,
            },
            places: Places { address: address.span, interface: interface.span },
        });
    }
    vips
}

/// Whether two addresses are in one network of this prefix length.
pub(super) fn same_network(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    network(a, prefix).is_some_and(|network_of_a| Some(network_of_a) == network(b, prefix))
}

/// The first address of the network; `None` where the family has no such prefix length.
pub(super) fn network(address: IpAddr, prefix: u8) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => {
            let host_bits = 32_u32.checked_sub(prefix.into())?;
            let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
            Some(IpAddr::V4((u32::from(v4) & mask).into()))
        }
        IpAddr::V6(v6) => {
            let host_bits = 128_u32.checked_sub(prefix.into())?;
            let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
            Some(IpAddr::V6((u128::from(v6) & mask).into()))
        }
    }
}

/// `ADDRESS/PREFIX`: a host's address in its network.
fn network_address(value: &Spanned<DeValue<'_>>) -> Read<(IpAddr, u8)> {
    let text = value::text(value)?;
    let example = "an address with the prefix length of its network, such as \"10.77.0.100/24\"";
    let Some((address, prefix)) = text.split_once('/') else {
        return match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(v4)) => complain(
                "has no prefix length",
                format!("\"{v4}/24\", with the prefix length of its network"),
            ),
            Ok(IpAddr::V6(v6)) => complain(
                "has no prefix length",
                format!("\"{v6}/64\", with the prefix length of its network"),
            ),
            Err(_) => complain(format!("is {:?}, which is no address", shorten(&text)), example),
        };
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return complain(format!("is {:?}, which is no address", shorten(&text)), example);
    };
    let bits: u8 = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix.parse::<u8>() {
        Ok(prefix) if (1..=bits).contains(&prefix) => prefix,
        _ => {
            let what = format!("has the prefix length {:?}", shorten(prefix));
            return complain(what, format!("a prefix length from 1 to {bits}"));
        }
    };
    value::usable(address)?;
    let of_host = "the address of one host in that network";
    if address.is_loopback() {
        return complain(
            format!("is {address}, a loopback address"),
            "an address that clients reach",
        );
    }
    // A network of two addresses or one has neither a network nor a broadcast address (RFC 3021).
    if bits - prefix >= 2 {
        if network(address, prefix) == Some(address) {
            return complain(format!("is {text}, the network's own address"), of_host);
        }
        if let IpAddr::V4(v4) = address
            && u32::from(v4) | (u32::MAX >> prefix) == u32::from(v4)
        {
            return complain(format!("is {text}, the network's broadcast address"), of_host);
        }
    }
    Ok((address, prefix))
}
