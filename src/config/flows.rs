//! The keys of a service that are about its flows in the kernel: how long they are kept, and what
//! becomes of them when their backend leaves.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::section::Section;
use super::value;
use crate::service::{FlowPolicy, Mode, OnDown, Protocol};

/// From the shortest that the collector can keep to, which walks every two seconds at most, to the
/// longest of any timeout.
const TIMES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600);

/// Keys that mean something in the kernel alone.
const KERNEL_ONLY: &[&str] = &["half_open_timeout", "closed_timeout", "on_down"];

/// The bounds that a service's timeouts have in its mode.
pub(super) fn times(mode: Mode) -> RangeInclusive<Duration> {
    if mode.is_in_kernel() { TIMES } else { super::services::TIMES }
}

/// How long a flow is kept without a packet, where the file does not say: of TCP a day, as PF does,
/// since an idle SOCKS or ssh session is no less alive (RFC 5382 REQ-5: never below 2 h 4 min); of
/// UDP what RFC 4787 REQ-5 sets as the least.
pub(super) fn idle_timeout(mode: Mode, protocol: Protocol) -> Duration {
    Duration::from_secs(match (mode.is_in_kernel(), protocol) {
        (true, Protocol::Tcp) => 24 * 3600,
        (true, Protocol::Udp) => 120,
        (false, Protocol::Tcp) => 3600,
        (false, Protocol::Udp) => 60,
    })
}

/// The same of what is closed in one direction; PF's in the kernel, where a command may well be
/// silent for minutes after its input has ended.
pub(super) fn half_close_timeout(mode: Mode) -> Duration {
    Duration::from_secs(if mode.is_in_kernel() { 15 * 60 } else { 60 })
}

/// What is said of flows, and the defaults of what is not.
pub(super) fn read(section: &Section<'_>, mode: Mode, protocol: Protocol) -> FlowPolicy {
    let default = FlowPolicy::of(protocol);
    let time =
        |key, default| section.take(key, value::duration(TIMES)).map_or(default, |at| at.value);
    for key in KERNEL_ONLY.iter().filter(|_| !mode.is_in_kernel()) {
        if let Some(span) = section.key_span(key) {
            let what = format!("`{key}` goes with modes in the kernel");
            let hint = "remove the line, or write `mode = \"passthrough\"` or `mode = \"dsr\"`";
            section.report.error(&span, what, hint);
        }
    }
    let on_down = section.take(
        "on_down",
        value::choice(&[
            ("reset", OnDown::Reset),
            ("remap", OnDown::Remap),
            ("keep", OnDown::Keep),
        ]),
    );
    if let (Some(on_down), Protocol::Tcp) = (&on_down, protocol)
        && on_down.value == OnDown::Remap
    {
        let what = "`on_down` is \"remap\", and no other backend would know a TCP connection";
        section.report.error(&on_down.span, what, "write \"reset\": its client connects anew");
    }
    FlowPolicy {
        half_open_timeout: time("half_open_timeout", default.half_open_timeout),
        closed_timeout: time("closed_timeout", default.closed_timeout),
        on_down: on_down.map_or(default.on_down, |at| at.value),
    }
}
