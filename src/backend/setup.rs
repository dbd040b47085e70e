//! From a service of the configuration to what its backends need, and the script that says it.

use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde_json::json;

use super::program::Entry;
use super::state::Need;
use super::system;
use crate::config::Config;
use crate::service::{Backend, Dsr, Mode, Protocol, Service};

/// What the command line says beside the service.
#[derive(Debug, Default)]
pub struct Options {
    /// This backend alone.
    pub backend: Option<String>,
    /// Interfaces instead of those that are found.
    pub interfaces: Vec<String>,
    /// The eBPF program, and nothing else.
    pub program_only: bool,
    /// `dsr = "nat"`: all flows count as having come through a relay.
    pub all_flows: bool,
}

/// An IPv4 kernel parameter that keeps a VIP quiet: name, value, why.
const QUIET: [(&str, i64); 2] =
    [("net.ipv4.conf.all.arp_ignore", 1), ("net.ipv4.conf.all.arp_announce", 2)];

/// A service with the backends that are asked for.
struct Chosen<'c> {
    service: &'c Service,
    kind: Dsr,
    backends: Vec<&'c Backend>,
}

impl<'c> Chosen<'c> {
    fn of(config: &'c Config, name: &str, options: &Options) -> anyhow::Result<Self> {
        let services = &config.services;
        let Some(service) = services.iter().find(|service| service.name == name) else {
            let dsr = services.iter().filter(|service| matches!(service.mode, Mode::Dsr { .. }));
            let names: Vec<_> = dsr.map(|service| service.name.as_str()).collect();
            anyhow::bail!("there is no service {name:?}; dsr services are: {}", names.join(", "));
        };
        let Mode::Dsr { kind } = service.mode else {
            anyhow::bail!(
                "service {name:?} is {}: its backends need no program or address; with \
                 passthrough/client, let their default route be the VIP in their network",
                String::from(service.mode)
            );
        };
        let wanted = |backend: &&Backend| {
            options.backend.as_ref().is_none_or(|wanted| *wanted == backend.name)
        };
        let backends: Vec<_> = service.backends.iter().filter(wanted).collect();
        if backends.is_empty() {
            let names: Vec<_> = service.backends.iter().map(|at| at.name.as_str()).collect();
            anyhow::bail!("service {name:?} has no such backend; it has: {}", names.join(", "));
        }
        Ok(Self { service, kind, backends })
    }

    /// Clients reach the server under the VIP itself.
    fn has_vip(&self) -> bool {
        self.kind != Dsr::Nat
    }
}

/// What this machine needs, which has one or more of the service's backends.
pub(super) fn need(config: &Config, name: &str, options: &Options) -> anyhow::Result<Need> {
    let chosen = Chosen::of(config, name, options)?;
    let mut here = Vec::new();
    for backend in &chosen.backends {
        if let Some(interface) = system::interface_of(backend.address.ip())? {
            here.push((*backend, interface));
        }
    }
    if here.is_empty() {
        let addresses: Vec<_> =
            chosen.backends.iter().map(|at| at.address.ip().to_string()).collect();
        anyhow::bail!(
            "this machine has no address of a backend of {name:?} ({}): run it on the backend",
            addresses.join(", ")
        );
    }
    let mut interfaces = options.interfaces.clone();
    if interfaces.is_empty() {
        interfaces.extend(here.iter().map(|(_, interface)| interface.clone()));
        interfaces.extend(system::default_interfaces());
    }
    interfaces.sort();
    interfaces.dedup();
    let mut need = Need::default();
    if chosen.kind != Dsr::L2 {
        need.entries = entries(&chosen, &here, options)?;
        need.interfaces = interfaces.clone();
    }
    if options.program_only {
        return Ok(need);
    }
    need.vip = chosen.has_vip().then(|| chosen.service.vip());
    if chosen.service.vip().is_ipv4() {
        if chosen.has_vip() {
            need.sysctls.extend(QUIET.map(|(name, value)| (name.to_owned(), value)));
        }
        let filters = interfaces.iter().filter(|interface| *interface != "lo");
        need.sysctls.extend(filters.map(|interface| (rp_filter(interface), 2)));
    }
    Ok(need)
}

fn rp_filter(interface: &str) -> String {
    format!("net.ipv4.conf.{interface}.rp_filter")
}

fn entries(
    chosen: &Chosen<'_>,
    here: &[(&Backend, String)],
    options: &Options,
) -> anyhow::Result<Vec<Entry>> {
    let Service { listen, protocol, .. } = chosen.service;
    let mut entries = Vec::new();
    let mut most = u32::MAX;
    for (backend, interface) in here {
        if chosen.kind == Dsr::Nat {
            entries.push(Entry::face(backend.address, *listen, *protocol, options.all_flows));
        } else {
            entries.push(Entry::tunnel(backend.address.ip(), listen.ip()));
            most = most.min(mss(system::mtu(interface)?, backend.address, *listen));
        }
    }
    if chosen.kind == Dsr::Ipip && *protocol == Protocol::Tcp {
        entries.push(Entry::clamp(*listen, most));
    }
    Ok(entries)
}

/// The longest TCP segment that fits into the tunnel to a backend: less outer header, inner header
/// and TCP's.
fn mss(mtu: u32, backend: SocketAddr, listen: SocketAddr) -> u32 {
    let header = |address: SocketAddr| if address.is_ipv4() { 20 } else { 40 };
    mtu.saturating_sub(header(backend) + header(listen) + 20)
}

/// Scripts, one for each backend. `Display` is the text to be run.
#[derive(Debug)]
pub struct Scripts {
    service: String,
    mode: String,
    scripts: Vec<(Backend, String)>,
}

/// The scripts for the backends of a service; `file` is where its configuration is.
///
/// # Errors
/// The service is no dsr one, or has no such backend.
pub fn scripts(
    config: &Config,
    file: &Path,
    name: &str,
    options: &Options,
) -> anyhow::Result<Scripts> {
    let chosen = Chosen::of(config, name, options)?;
    let scripts = chosen.backends.iter().map(|backend| {
        let mut text = String::new();
        script(&mut text, &chosen, backend, file, options).expect("a String takes everything");
        ((*backend).clone(), text)
    });
    Ok(Scripts {
        service: name.to_owned(),
        mode: String::from(chosen.service.mode),
        scripts: scripts.collect(),
    })
}

impl Scripts {
    /// The same for programs: `service`, `mode`, `backends[]` with `name`, `address`, `script`.
    pub fn json(&self) -> String {
        let backends: Vec<_> = self
            .scripts
            .iter()
            .map(|(backend, script)| {
                json!({ "name": backend.name, "address": backend.address, "script": script })
            })
            .collect();
        let all = json!({ "service": self.service, "mode": self.mode, "backends": backends });
        format!("{all:#}\n")
    }
}

impl fmt::Display for Scripts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (_, script)) in self.scripts.iter().enumerate() {
            if nth > 0 {
                f.write_char('\n')?;
            }
            f.write_str(script)?;
        }
        Ok(())
    }
}

fn script(
    out: &mut String,
    chosen: &Chosen<'_>,
    backend: &Backend,
    file: &Path,
    options: &Options,
) -> fmt::Result {
    let Service { name, listen, protocol, mode, .. } = chosen.service;
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let (mode, address) = (String::from(*mode), backend.address.ip());
    writeln!(out, "#!/bin/sh")?;
    writeln!(
        out,
        "# Service {name} ({listen}/{protocol}, {mode}) on backend {} ({}).",
        backend.name, backend.address
    )?;
    writeln!(
        out,
        "# Run it as root there, after each boot; or `baton backend-setup {name} --apply`, which"
    )?;
    writeln!(out, "# does the same, and remembers what it changed for `--remove`.")?;
    writeln!(out, "set -e")?;
    match options.interfaces.first() {
        Some(interface) => writeln!(out, "IF={interface}")?,
        None => writeln!(out, "IF=$(ip -o addr show to {address} | awk '{{print $2; exit}}')")?,
    }
    if listen.is_ipv4() {
        writeln!(
            out,
            "\n# Packets of clients come from the relay, not from where their replies go."
        )?;
        writeln!(
            out,
            "if [ $(($(sysctl -n net.ipv4.conf.all.rp_filter) | $(sysctl -n net.ipv4.conf.$IF.rp_filter))) = 1 ]; then"
        )?;
        writeln!(out, "  sysctl -w net.ipv4.conf.$IF.rp_filter=2\nfi")?;
    }
    if chosen.has_vip() {
        vip_script(out, listen.ip())?;
    }
    if chosen.kind != Dsr::L2 {
        program_script(out, chosen, backend, file, options)?;
    }
    writeln!(
        out,
        "\n# The server must listen on {}, or on all addresses.",
        match chosen.has_vip() {
            true => *listen,
            false => backend.address,
        }
    )
}

fn vip_script(out: &mut String, vip: IpAddr) -> fmt::Result {
    writeln!(out, "\n# This machine has the VIP, and nobody is to hear of it.")?;
    if vip.is_ipv4() {
        for (name, value) in QUIET {
            writeln!(out, "[ \"$(sysctl -n {name})\" -ge {value} ] || sysctl -w {name}={value}")?;
        }
    } else {
        writeln!(out, "# (Neighbour discovery answers for addresses of its own interface alone.)")?;
    }
    writeln!(out, "ip addr show dev lo to {vip} | grep -q . || {}", system::add_address(vip))
}

fn program_script(
    out: &mut String,
    chosen: &Chosen<'_>,
    backend: &Backend,
    file: &Path,
    options: &Options,
) -> fmt::Result {
    let all = if options.all_flows { " --all-flows" } else { "" };
    let (service, file) = (chosen.service, file.display());
    match chosen.kind {
        Dsr::Nat => writeln!(
            out,
            "\n# An eBPF program gives replies of flows from relays the VIP as source."
        )?,
        _ => writeln!(
            out,
            "\n# An eBPF program takes packets out of the tunnel and limits the MSS to what fits."
        )?,
    }
    writeln!(
        out,
        "baton backend-setup {} -c {file} --backend {} --apply --program-only{all}",
        service.name, backend.name
    )?;
    let (vip, port) = (service.vip(), service.listen.port());
    let server = backend.address;
    match chosen.kind {
        Dsr::Nat => {
            let ip = if vip.is_ipv4() { "ip" } else { "ip6" };
            let protocol = if service.protocol == Protocol::Tcp { "tcp" } else { "udp" };
            writeln!(
                out,
                "# Where eBPF is not to be had, nftables can do it (with its connection tracking):"
            )?;
            writeln!(out, "#   nft -f - <<'END'")?;
            // Of nft's names.
            let table = service.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
            writeln!(out, "#   table {ip} baton_{table} {{")?;
            writeln!(out, "#     chain arriving {{ type filter hook prerouting priority mangle;")?;
            writeln!(
                out,
                "#       {ip} daddr {} {protocol} dport {} {ip} dscp 3 ct mark set 0xba70; }}",
                server.ip(),
                server.port()
            )?;
            writeln!(out, "#     chain leaving {{ type filter hook postrouting priority 300;")?;
            writeln!(
                out,
                "#       ct mark 0xba70 {ip} saddr {} {protocol} sport {} {ip} saddr set {vip} {protocol} sport set {port}; }}",
                server.ip(),
                server.port()
            )?;
            writeln!(out, "#   }}\n#   END")?;
        }
        _ if vip.is_ipv4() == server.is_ipv4() => {
            let (module, device, least) = match vip {
                IpAddr::V4(_) => ("ipip", "tunl0", 60),
                IpAddr::V6(_) => ("ip6_tunnel", "ip6tnl0", 100),
            };
            writeln!(
                out,
                "# Where eBPF is not to be had, the kernel's tunnel can do it, with a lower MSS on the way"
            )?;
            writeln!(out, "# to clients (here for an MTU of 1500):")?;
            writeln!(
                out,
                "#   modprobe {module}; ip link set {device} up; sysctl -w net.ipv4.conf.{device}.rp_filter=0"
            )?;
            writeln!(out, "#   ip route change default via GATEWAY advmss {}", 1500 - least)?;
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_leave_room_for_all_headers() {
        let (v4, v6) = ("10.0.0.1:80".parse().unwrap(), "[fd00::1]:80".parse().unwrap());
        assert_eq!(mss(1500, v4, v4), 1440);
        assert_eq!(mss(1500, v6, v4), 1420);
        assert_eq!(mss(1500, v4, v6), 1420);
        assert_eq!(mss(1500, v6, v6), 1400);
    }
}
