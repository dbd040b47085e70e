//! `mode` of a service with what goes with it: `source`, `dsr`, `scheduler`, and the keys that mean
//! nothing in it.

use std::net::SocketAddr;

use super::section::Section;
use super::value;
use crate::service::{Backend, Dsr, Mode, Protocol, Scheduler, Source};

/// How a service's traffic travels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    pub(super) mode: Mode,
    pub(super) scheduler: Scheduler,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Proxy,
    Passthrough,
    Dsr,
}

const WORDS: &[(&str, Word)] =
    &[("proxy", Word::Proxy), ("passthrough", Word::Passthrough), ("dsr", Word::Dsr)];

/// Keys of connections that are made by us.
const PROXY_ONLY: &[&str] = &["connect_timeout", "connect_retries", "proxy_protocol"];

const SCHEDULERS: &[(&str, Scheduler)] = &[
    ("maglev", Scheduler::Maglev),
    ("round-robin", Scheduler::RoundRobin),
    ("source-hash", Scheduler::SourceHash),
    ("least-connections", Scheduler::LeastConnections),
    ("random", Scheduler::Random),
];

/// The mode, `proxy` where there is none, and the scheduler that goes with it.
pub(super) fn read(section: &Section<'_>, protocol: Protocol) -> Way {
    let word = section.take("mode", value::choice(WORDS)).map_or(Word::Proxy, |at| at.value);
    let source =
        section.take("source", value::choice(&[("client", Source::Client), ("vip", Source::Vip)]));
    let kind = section
        .take("dsr", value::choice(&[("l2", Dsr::L2), ("ipip", Dsr::Ipip), ("nat", Dsr::Nat)]));
    belongs(section, "source", word == Word::Passthrough, "mode = \"passthrough\"");
    belongs(section, "dsr", word == Word::Dsr, "mode = \"dsr\"");
    for key in PROXY_ONLY.iter().filter(|_| protocol == Protocol::Tcp) {
        belongs(section, key, word == Word::Proxy, "mode = \"proxy\"");
    }
    if section.key_span("affinity").is_some() && word == Word::Proxy {
        belongs(section, "affinity", false, "mode = \"passthrough\"");
    }
    let mode = match word {
        Word::Proxy => Mode::Proxy,
        Word::Passthrough => {
            Mode::Passthrough { source: source.map_or(Source::Vip, |at| at.value) }
        }
        Word::Dsr => Mode::Dsr { kind: kind.map_or(Dsr::L2, |at| at.value) },
    };
    needs_vip(section, mode);
    Way { mode, scheduler: scheduler(section, mode) }
}

/// Reports a key that is there without what it goes with.
fn belongs(section: &Section<'_>, key: &str, right: bool, with: &str) {
    if let (Some(span), false) = (section.key_span(key), right) {
        let what = format!("`{key}` goes with `{with}`");
        section.report.error(&span, what, format!("remove the line, or write `{with}`"));
    }
}

/// Reports backends on another port than their service where packets reach them as they are.
pub(super) fn fit_backends(
    section: &Section<'_>,
    mode: Mode,
    listen: Option<SocketAddr>,
    backends: &[Backend],
) {
    let (Mode::Dsr { kind: Dsr::L2 | Dsr::Ipip }, Some(listen)) = (mode, listen) else { return };
    for backend in backends.iter().filter(|backend| backend.address.port() != listen.port()) {
        let what = format!(
            "backend {:?} is on port {}, and in mode {} packets reach it on the service's port {}",
            backend.name,
            backend.address.port(),
            String::from(mode),
            listen.port()
        );
        let hint = format!("write `address = {:?}`", with_port(backend.address, listen.port()));
        section.report.error(&section.span, what, hint);
    }
}

fn with_port(mut address: SocketAddr, port: u16) -> String {
    address.set_port(port);
    address.to_string()
}

/// The kernel answers for VIPs alone: what it holds back while this node is not Active must not
/// be an address that the node has for itself.
fn needs_vip(section: &Section<'_>, mode: Mode) {
    if let (true, Some(span)) = (mode.is_in_kernel(), section.key_span("listen")) {
        let what = format!("`listen` does not go with mode {}", String::from(mode));
        let hint = "write `vip` and `port` (a lone node may have VIPs too: it is always Active)";
        section.report.error(&span, what, hint);
    }
}

fn scheduler(section: &Section<'_>, mode: Mode) -> Scheduler {
    let default = if mode.is_in_kernel() { Scheduler::Maglev } else { Scheduler::RoundRobin };
    let Some(scheduler) = section.take("scheduler", value::choice(SCHEDULERS)) else {
        return default;
    };
    let hint = match (mode.is_in_kernel(), scheduler.value) {
        (false, Scheduler::Maglev) => "write `scheduler = \"source-hash\"`",
        _ => return scheduler.value,
    };
    let what = format!("`scheduler` does not go with mode {}", String::from(mode));
    section.report.error(&scheduler.span, what, hint);
    scheduler.value
}
