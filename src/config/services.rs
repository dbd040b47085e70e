//! `[[services]]` and their backends.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;

use baton_ha::config::{Family, Vip};
use toml::Spanned;
use toml::de::DeValue;

use super::Datapath;
use super::checks;
use super::datapath::MOST_FLOWS;
use super::flows;
use super::modes::{self, Way};
use super::paths::family_name;
use super::section::{At, BACKEND, SERVICE, Section, nearest};
use super::value::{self, Read, complain};
use super::vips::Vips;
use crate::service::{Backend, Check, Dsr, Limits, Mode, Probe, Protocol, ProxyProtocol, Service};

const MOST_CONNECTIONS: u32 = 1_000_000;
const MOST_RETRIES: u32 = 16;
const MOST_WEIGHT: u16 = 256;
/// Most services of a node; each has listeners on every core.
const MOST_SERVICES: usize = 1024;
/// Most backends of a service.
const MOST_BACKENDS: usize = 1024;
pub(super) const TIMES: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(7 * 24 * 3600);

/// Options that mean something to a TCP connection only.
const TCP_ONLY: &[&str] = &[
    "connect_timeout",
    "connect_retries",
    "half_close_timeout",
    "closed_timeout",
    "proxy_protocol",
];

/// Where the file says where a service listens; the check against the machine points there.
#[derive(Debug, Clone)]
pub(super) struct Listening {
    pub(super) service: Service,
    pub(super) place: Range<usize>,
}

/// The services in the order of the file, as far as they are right; what is wrong is reported.
pub(super) fn read(
    root: &Section<'_>,
    vips: &Vips,
    checks: &[checks::Named],
    datapath: &Datapath,
) -> Vec<Listening> {
    let report = root.report;
    let sections = root.sections("services", &SERVICE);
    if root.key_span("services").is_none() {
        let hint = "write [[services]] with `name`, `vip` and `port` (or `listen`) and backends";
        report.error(&root.span, "the file has no [[services]]", hint);
    }
    if let Some(excess) = sections.get(MOST_SERVICES) {
        let what = format!("there are {} services", sections.len());
        report.error(&excess.span, what, format!("write at most {MOST_SERVICES}"));
    }
    let mut names: HashMap<String, ()> = HashMap::new();
    let mut services = Vec::new();
    for section in sections.iter().take(MOST_SERVICES) {
        let name = section.require("name", "\"socks\"", value::name);
        if let Some(name) = &name
            && names.insert(name.value.clone(), ()).is_some()
        {
            let what = format!("another service is called {:?} too", name.value);
            report.error(&name.span, what, "write a name of its own");
        }
        services.extend(service(section, name.map(|at| at.value), vips, checks, datapath));
    }
    overlaps(root, &services);
    shared_replies(root, &services);
    // Beside an error it would be noise: what is misspelt is unused.
    if !report.any_error() {
        unused(root, &services, vips, checks);
    }
    services
}

fn service(
    section: &Section<'_>,
    name: Option<String>,
    vips: &Vips,
    checks: &[checks::Named],
    datapath: &Datapath,
) -> Option<Listening> {
    let listen = listen(section, vips);
    let protocol =
        section.take("protocol", value::choice(&[("tcp", Protocol::Tcp), ("udp", Protocol::Udp)]));
    let protocol = protocol.map_or(Protocol::Tcp, |at| at.value);
    let Way { mode, scheduler } = modes::read(section, protocol);
    let check = section.take("check", |value| check(value, checks)).and_then(|at| at.value);
    let proxy_protocol = section.take(
        "proxy_protocol",
        value::choice(&[
            ("off", ProxyProtocol::Off),
            ("v1", ProxyProtocol::V1),
            ("v2", ProxyProtocol::V2),
        ]),
    );
    if protocol == Protocol::Udp {
        for key in TCP_ONLY {
            if let Some(span) = section.key_span(key) {
                let what = format!("`{key}` means nothing to a UDP service");
                section.report.error(&span, what, "remove the line, or write `protocol = \"tcp\"`");
            }
        }
        if let (Some(check), Some(span)) = (&check, section.value_span("check")) {
            warn_of_tcp(section, check, &span);
        }
    }
    let limits = limits(section, protocol, mode, datapath);
    let flows = flows::read(section, mode, protocol);
    let backends = backends(section, listen.as_ref(), mode, &limits, vips);
    modes::fit_backends(section, mode, listen.as_ref().map(|listen| listen.value), &backends);

    let listen = listen?;
    Some(Listening {
        service: Service {
            name: name?,
            listen: listen.value,
            protocol,
            mode,
            scheduler,
            backends,
            check,
            limits,
            flows,
            proxy_protocol: proxy_protocol.map_or(ProxyProtocol::Off, |at| at.value),
        },
        place: listen.span,
    })
}

/// Warns of a check that asks over TCP where only datagrams may be answered.
fn warn_of_tcp(udp: &Section<'_>, check: &Check, span: &Range<usize>) {
    let over_tcp = match check.probe {
        Probe::Tcp | Probe::Http { .. } | Probe::Socks5 { .. } | Probe::SendExpect { .. } => true,
        Probe::Icmp | Probe::Script { .. } => false,
    };
    if over_tcp && check.port.is_none() {
        let name = &check.name;
        let what = format!("check {name:?} asks the backends' UDP port over TCP");
        let hint = format!(
            "write the TCP port that answers as `port` in [checks.{name}], or a check of type \
             \"icmp\" or \"script\""
        );
        udp.report.warning(span, what, hint);
    }
}

/// `vip` and `port`, or `listen`.
fn listen(section: &Section<'_>, vips: &Vips) -> Option<At<SocketAddr>> {
    let report = section.report;
    let listen = section.take("listen", listen_address);
    let vip = section.take("vip", |value| vip(value, vips)).and_then(|at| at.value);
    let port = section.take("port", value::integer(1..=u16::MAX));
    if let Some(span) = section.key_span("listen") {
        for key in ["vip", "port"] {
            if section.key_span(key).is_some() {
                let what = format!("`listen` is there beside `{key}`");
                report.error(&span, what, "write `vip` and `port`, or `listen` alone");
                return None;
            }
        }
        let At { value: listen, span } = listen?;
        if let Some(vip) = vips.right.iter().find(|vip| vip.vip.address == listen.ip()) {
            let what = format!("`listen` is on the address of VIP {:?}", vip.name);
            let hint = format!("write `vip = {:?}` and `port = {}`", vip.name, listen.port());
            report.error(&span, what, hint);
        }
        return Some(At { value: listen, span });
    }
    match (section.key_span("vip"), section.key_span("port")) {
        (None, None) => {
            let what = format!("{} says nowhere where it listens", section.title);
            let hint = match vips.right.first() {
                Some(vip) => format!("write `vip = {:?}` and `port = 1080`", vip.name),
                None => "write `listen = \"ADDRESS:PORT\"`".to_owned(),
            };
            report.error(&section.span, what, hint);
        }
        (Some(_), None) => section.missing("port", "1080"),
        (None, Some(_)) => {
            let example = vips.right.first().map_or("socks", |vip| &vip.name);
            section.missing("vip", &format!("{example:?}"));
        }
        (Some(_), Some(_)) => {}
    }
    let (vip, port) = (vip?, port?);
    Some(At { value: SocketAddr::new(vip, port.value), span: port.span })
}

fn listen_address(value: &Spanned<DeValue<'_>>) -> Read<SocketAddr> {
    let listen = value::socket_address(value)?;
    if !listen.ip().is_unspecified() {
        value::usable(listen.ip())?;
    }
    if without_scope(listen) {
        return complain(
            format!("is {listen}, a link-local address without an interface"),
            "a global or unique local address",
        );
    }
    Ok(listen)
}

fn vip(value: &Spanned<DeValue<'_>>, vips: &Vips) -> Read<Option<IpAddr>> {
    let wanted = value::text(value)?;
    let address = wanted.parse::<IpAddr>().ok();
    let found =
        vips.right.iter().find(|vip| vip.name == wanted || Some(vip.vip.address) == address);
    match found {
        Some(vip) if without_scope(SocketAddr::new(vip.vip.address, 0)) => complain(
            format!("is {:?}, a link-local address, where a service can't listen", wanted),
            "a VIP with a global or unique local address",
        ),
        Some(vip) => Ok(Some(vip.vip.address)),
        None if vips.wrong.contains(&wanted) => Ok(None),
        None => {
            let names = || vips.right.iter().map(|vip| vip.name.as_str());
            complain(
                format!("is {:?}, which is no VIP of this file", super::section::shorten(&wanted)),
                alternatives(&wanted, names(), "[[vips]] with that name first"),
            )
        }
    }
}

fn check(value: &Spanned<DeValue<'_>>, checks: &[checks::Named]) -> Read<Option<Arc<Check>>> {
    let wanted = value::text(value)?;
    match checks.iter().find(|check| check.name.value == wanted) {
        Some(found) => Ok(found.check.clone()),
        None => {
            let names = || checks.iter().map(|check| check.name.value.as_str());
            complain(
                format!(
                    "is {:?}, which is no check of this file",
                    super::section::shorten(&wanted)
                ),
                alternatives(
                    &wanted,
                    names(),
                    &format!("[checks.{wanted}] with a `type` under it"),
                ),
            )
        }
    }
}

/// What could be written for a name that is not there.
fn alternatives<'n>(
    wanted: &str,
    names: impl Iterator<Item = &'n str> + Clone,
    otherwise: &str,
) -> String {
    let all: Vec<_> = names.clone().take(8).map(|name| format!("{name:?}")).collect();
    match nearest(wanted, names) {
        Some(near) => format!("{near:?}, or {otherwise}"),
        None if all.is_empty() => otherwise.to_owned(),
        None => format!("{}, or {otherwise}", all.join(", ")),
    }
}

/// In the kernel a connection costs a place in the flow table and nothing else, so that is what
/// bounds them unless the file says otherwise.
fn limits(section: &Section<'_>, protocol: Protocol, mode: Mode, datapath: &Datapath) -> Limits {
    let count = || value::integer(1..=most_connections(mode));
    let (usual, usual_per_source) =
        if mode.is_in_kernel() { (datapath.flows, datapath.flows) } else { (10_000, 1000) };
    let time = |key, bounds, default| {
        section.take(key, value::duration(bounds)).map_or(default, |at| at.value)
    };
    let times = || flows::times(mode);
    let most = section.take("max_connections", count()).map_or(usual, |at| at.value);
    let per_source = section.take("max_connections_per_source", count());
    if let Some(per_source) = per_source.as_ref().filter(|per_source| per_source.value > most) {
        let what = format!(
            "`max_connections_per_source` {} is more than the service's {most}",
            per_source.value
        );
        let hint = format!("write at most {most}, or a greater `max_connections`");
        section.report.error(&per_source.span, what, hint);
    }
    let retries = section.take("connect_retries", value::integer(0..=MOST_RETRIES));
    Limits {
        max_connections: most,
        max_connections_per_source: per_source.map_or(most.min(usual_per_source), |at| at.value),
        connect_timeout: time("connect_timeout", TIMES, Duration::from_secs(2)),
        connect_retries: retries.map_or(2, |at| at.value),
        idle_timeout: time("idle_timeout", times(), flows::idle_timeout(mode, protocol)),
        half_close_timeout: time("half_close_timeout", times(), flows::half_close_timeout(mode)),
        affinity: section.take("affinity", value::duration(TIMES)).map(|at| at.value),
    }
}

fn most_connections(mode: Mode) -> u32 {
    if mode.is_in_kernel() { MOST_FLOWS } else { MOST_CONNECTIONS }
}

fn backends(
    service: &Section<'_>,
    listen: Option<&At<SocketAddr>>,
    mode: Mode,
    limits: &Limits,
    vips: &Vips,
) -> Vec<Backend> {
    let report = service.report;
    let sections = service.sections("backends", &BACKEND);
    if sections.is_empty() {
        let empty = service.value_span("backends").unwrap_or(service.span.clone());
        let hint = "write [[services.backends]] with `name` and `address` under it";
        report.error(&empty, format!("{} has no backends", service.title), hint);
    }
    if let Some(excess) = sections.get(MOST_BACKENDS) {
        let what = format!("there are {} backends", sections.len());
        report.error(&excess.span, what, format!("write at most {MOST_BACKENDS}"));
    }
    let mut names: HashMap<String, ()> = HashMap::new();
    let mut addresses: HashMap<SocketAddr, String> = HashMap::new();
    let mut backends = Vec::new();
    for section in sections.iter().take(MOST_BACKENDS) {
        let name = section.require("name", "\"dante1\"", value::name);
        let address = section.require("address", "\"10.78.0.11:1080\"", backend_address);
        let weight = section.take("weight", value::integer(1..=MOST_WEIGHT));
        let most = section.take("max_connections", value::integer(1..=most_connections(mode)));
        if let Some(At { value: name, span }) = &name
            && names.insert(name.clone(), ()).is_some()
        {
            let what = format!("another backend of this service is called {name:?} too");
            report.error(span, what, "write a name of its own");
        }
        if let (Some(name), Some(address)) = (&name, &address) {
            wrong_place(section, address, listen, mode, vips);
            if let Some(other) = addresses.insert(address.value, name.value.clone()) {
                let what = format!("backend {other:?} has the address {} already", address.value);
                let hint = "write another address, or give the one backend a greater `weight`";
                report.error(&address.span, what, hint);
            }
        }
        let (Some(name), Some(address)) = (name, address) else { continue };
        backends.push(Backend {
            name: name.value,
            address: address.value,
            weight: weight.map_or(1, |at| at.value),
            max_connections: most.map_or(limits.max_connections, |at| at.value),
        });
    }
    backends
}

fn backend_address(value: &Spanned<DeValue<'_>>) -> Read<SocketAddr> {
    let address = value::socket_address(value)?;
    value::usable(address.ip())?;
    if without_scope(address) {
        return complain(
            format!("is {address}, a link-local address"),
            "the backend's global or unique local address",
        );
    }
    Ok(address)
}

/// Whether it is a link-local address that doesn't say on which interface: no socket takes it.
fn without_scope(address: SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0)
}

/// Reports a backend of another family than its service, and one that is this node itself.
fn wrong_place(
    section: &Section<'_>,
    backend: &At<SocketAddr>,
    listen: Option<&At<SocketAddr>>,
    mode: Mode,
    vips: &Vips,
) {
    let At { value: address, span } = backend;
    if let Some(listen) = listen {
        let (own, service) = (Family::of(address.ip()), Family::of(listen.value.ip()));
        // A tunnel carries either family in either.
        if own != service && mode != (Mode::Dsr { kind: Dsr::Ipip }) {
            let what = format!(
                "backend {address} is {}, its service {} is {}",
                family_name(own),
                listen.value,
                family_name(service)
            );
            let hint = format!(
                "write the backend's {} address, or a service of its own on an {} address",
                family_name(service),
                family_name(own)
            );
            section.report.error(span, what, hint);
        }
        let hears = listen.value == *address
            || listen.value.port() == address.port()
                && listen.value.ip().is_unspecified()
                && address.ip().is_loopback();
        if hears {
            let what = format!("backend {address} is the service itself");
            section.report.error(span, what, "write the address of a server");
            return;
        }
    }
    if let Some(vip) = vips.right.iter().find(|vip| vip.vip.address == address.ip()) {
        let what = format!("backend {address} is on VIP {:?}, so on this node itself", vip.name);
        section.report.error(span, what, "write the server's own address");
    }
}

/// Reports services that would take each other's clients.
fn overlaps(root: &Section<'_>, services: &[Listening]) {
    let mut exact: HashMap<(Protocol, SocketAddr), &str> = HashMap::new();
    // By port and family: any service, and the one on all addresses.
    let mut any: HashMap<(Protocol, u16, Family), &str> = HashMap::new();
    let mut wildcard: HashMap<(Protocol, u16, Family), &str> = HashMap::new();
    for Listening { service, place } in services {
        let Service { name, listen, protocol, .. } = service;
        let port = (*protocol, listen.port(), Family::of(listen.ip()));
        let other = exact
            .get(&(*protocol, *listen))
            .or_else(|| wildcard.get(&port))
            .or_else(|| any.get(&port).filter(|_| listen.ip().is_unspecified()));
        if let Some(other) = other {
            let protocol = protocol_name(*protocol);
            let what =
                format!("service {name:?} overlaps {other:?}: both are on {listen}/{protocol}");
            let what = match exact.contains_key(&(service.protocol, *listen)) {
                true => what,
                false => format!(
                    "service {name:?} overlaps {other:?}: one of them is on all addresses, both on \
                     port {}/{protocol}",
                    listen.port()
                ),
            };
            root.report.error(place, what, "write another port or address");
        }
        exact.entry((*protocol, *listen)).or_insert(name);
        any.entry(port).or_insert(name);
        if listen.ip().is_unspecified() {
            wildcard.entry(port).or_insert(name);
        }
    }
}

/// Reports `dsr = "nat"` services with the same backend: it could not tell which VIP a reply is from.
fn shared_replies(root: &Section<'_>, services: &[Listening]) {
    let mut first: HashMap<(Protocol, SocketAddr), &str> = HashMap::new();
    let nat = |service: &Service| service.mode == Mode::Dsr { kind: Dsr::Nat };
    for Listening { service, place } in services.iter().filter(|at| nat(&at.service)) {
        for backend in &service.backends {
            let other = *first.entry((service.protocol, backend.address)).or_insert(&service.name);
            if other != service.name {
                let what = format!(
                    "services {other:?} and {:?} are both dsr/nat to {}/{}, which could not tell \
                     their replies apart",
                    service.name,
                    backend.address,
                    protocol_name(service.protocol)
                );
                let hint = "let the server listen on another port for one of them";
                root.report.error(place, what, hint);
            }
        }
    }
}

/// `tcp` or `udp`.
pub(super) fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    }
}

/// Warns of checks and VIPs that no service uses.
fn unused(root: &Section<'_>, services: &[Listening], vips: &Vips, checks: &[checks::Named]) {
    for At { value: name, span } in checks.iter().map(|check| &check.name) {
        let uses = |check: &Arc<Check>| check.name == *name;
        if !services.iter().any(|listening| listening.service.check.as_ref().is_some_and(uses)) {
            let hint = format!("write `check = {name:?}` in a service, or remove it");
            root.report.warning(span, format!("no service uses the check {name:?}"), hint);
        }
    }
    for vip in &vips.right {
        let used = |listening: &Listening| {
            listening.service.vip() == vip.vip.address || sends_from(&listening.service, &vip.vip)
        };
        if !services.iter().any(used) {
            let what = format!("no service uses the VIP {:?}", vip.name);
            let hint =
                format!("write `vip = {:?}` in a service; the VIP moves all the same", vip.name);
            root.report.warning(&vip.places.address, what, hint);
        }
    }
}

/// Whether packets to a backend of the service come from this VIP, or replies come to it.
fn sends_from(service: &Service, vip: &Vip) -> bool {
    matches!(service.mode, Mode::Passthrough { .. })
        && service.backends.iter().any(|backend| vip.is_near(backend.address.ip()))
}
