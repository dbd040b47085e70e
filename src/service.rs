//! The words: service, backend, mode, scheduler, check. Plain data, correct once it exists; it
//! comes from [`crate::config`] and is read by everyone else.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use baton_ha::state::Target;
use serde::{Deserialize, Serialize};

/// A VIP, port and protocol with the backends behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Unique name.
    pub name: String,
    /// The VIP and port that clients use.
    pub listen: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// How traffic gets to the backend.
    pub mode: Mode,
    /// How a backend is chosen.
    pub scheduler: Scheduler,
    /// At least one.
    pub backends: Vec<Backend>,
    /// How backends are checked; `None`: they count as up.
    pub check: Option<Arc<Check>>,
    /// Bounds and times of its connections.
    pub limits: Limits,
    /// What holds for its flows in the kernel.
    pub flows: FlowPolicy,
    /// PROXY protocol header towards the backend.
    pub proxy_protocol: ProxyProtocol,
}

/// A server behind a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Unique name within the service.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Share of the traffic, 1–256.
    pub weight: u16,
    /// Most connections (or UDP sessions) at once.
    pub max_connections: u32,
}

/// Bounds and times of a service's connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most connections (or UDP sessions) of the service at once.
    pub max_connections: u32,
    /// Most connections (or UDP sessions) of one source at once: an IPv4 address or an IPv6 /64.
    pub max_connections_per_source: u32,
    /// How long one attempt to connect to a backend may take.
    pub connect_timeout: Duration,
    /// How many other backends are tried after the first.
    pub connect_retries: u32,
    /// A connection or session without a byte in either direction for this long is ended.
    pub idle_timeout: Duration,
    /// How long a connection that is closed in one direction may stay open in the other without
    /// a byte.
    pub half_close_timeout: Duration,
    /// How long after a connection of its has begun or ended a client keeps to that backend.
    pub affinity: Option<Duration>,
}

/// What holds for flows in the kernel, beside [`Limits`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowPolicy {
    /// How long a flow may take to be established, without a packet: TCP until the client has
    /// confirmed the backend's SYN+ACK, UDP until the backend answers.
    pub half_open_timeout: Duration,
    /// How long a flow that is closed from both ends, or reset, is kept for what is on its way.
    pub closed_timeout: Duration,
    /// What becomes of the flows of a backend that is down.
    pub on_down: OnDown,
}

impl FlowPolicy {
    /// The defaults.
    pub fn of(protocol: Protocol) -> Self {
        Self {
            half_open_timeout: Duration::from_secs(60),
            closed_timeout: Duration::from_secs(10),
            on_down: match protocol {
                Protocol::Tcp => OnDown::Reset,
                Protocol::Udp => OnDown::Remap,
            },
        }
    }
}

/// What becomes of the flows of a backend that is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// Their clients are told: a RST, an ICMP error.
    Reset,
    /// UDP: they go to another backend.
    Remap,
    /// They go on as long as the backend can. What the operator disables is reset all the same.
    Keep,
}

/// Transport protocol of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// How traffic gets to the backend. As text `proxy`, `passthrough/vip`, `dsr/l2` and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Mode {
    /// Terminated here; bytes are spliced.
    Proxy,
    /// Packets are rewritten in the kernel, in both directions.
    Passthrough {
        /// What the backend sees as their source.
        source: Source,
    },
    /// Packets go to the backend through the kernel; replies go straight to the client.
    Dsr {
        /// How the backend gets them.
        kind: Dsr,
    },
}

/// What the backend sees as the source of passed-through packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// The client: the backend must route its replies through the relay.
    Client,
    /// A VIP of the relay, with a port of the flow's own.
    Vip,
}

/// How packets get to a backend that answers the client directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dsr {
    /// To its hardware address, on the same network.
    L2,
    /// In IP, over any network.
    Ipip,
    /// With their destination rewritten; the backend rewrites the source of its replies.
    Nat,
}

/// Every mode and what it is called.
const MODES: [(Mode, &str); 6] = [
    (Mode::Proxy, "proxy"),
    (Mode::Passthrough { source: Source::Client }, "passthrough/client"),
    (Mode::Passthrough { source: Source::Vip }, "passthrough/vip"),
    (Mode::Dsr { kind: Dsr::L2 }, "dsr/l2"),
    (Mode::Dsr { kind: Dsr::Ipip }, "dsr/ipip"),
    (Mode::Dsr { kind: Dsr::Nat }, "dsr/nat"),
];

impl Mode {
    /// Whether packets stay in the kernel.
    pub fn is_in_kernel(self) -> bool {
        self != Self::Proxy
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> Self {
        let found = MODES.iter().find(|(known, _)| *known == mode);
        found.expect("every mode is in the table").1.to_owned()
    }
}

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let found = MODES.iter().find(|(_, name)| *name == text);
        found.map(|(mode, _)| *mode).ok_or_else(|| format!("{text:?} is no mode"))
    }
}

/// How a backend is chosen for a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// By the client's address and port, from a table that is the same on every node; for
    /// services whose packets stay in the kernel.
    Maglev,
    /// In turn, by weight (smooth weighted round robin).
    RoundRobin,
    /// By source address: weighted rendezvous hashing, so that only the clients of a backend
    /// that leaves move.
    SourceHash,
    /// Fewest connections for its weight.
    LeastConnections,
    /// At random, by weight.
    Random,
}

/// PROXY protocol header towards the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// None.
    Off,
    /// Version 1, text.
    V1,
    /// Version 2, binary.
    V2,
}

/// A health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Unique name.
    pub name: String,
    /// What is probed.
    pub probe: Probe,
    /// Time from the start of one probe to the start of the next.
    pub interval: Duration,
    /// A probe without an answer by then has failed; at most the interval.
    pub timeout: Duration,
    /// Successes in a row until a down backend is up.
    pub rise: u32,
    /// Failures in a row until an up backend is down.
    pub fall: u32,
    /// Port to probe instead of the backend's own.
    pub port: Option<u16>,
}

/// What a health check does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// The TCP connection is accepted.
    Tcp,
    /// HTTP/1.1 request; the status is one of `status`.
    Http {
        /// Request method.
        method: String,
        /// Request target.
        path: String,
        /// Host header; the backend's address where `None`.
        host: Option<String>,
        /// Accepted status codes, inclusive range.
        status: std::ops::RangeInclusive<u16>,
    },
    /// SOCKS5 (RFC 1928): greeting, method, CONNECT through the server to `target`.
    Socks5 {
        /// `host:port` or `address:port` that the server is asked to connect to.
        target: SocksTarget,
        /// Username and password (RFC 1929), where the server asks for them.
        credentials: Option<(String, String)>,
    },
    /// Sends bytes (may be none) and waits until the answer contains others.
    SendExpect {
        /// What is sent.
        send: Vec<u8>,
        /// What the answer must contain.
        expect: Vec<u8>,
    },
    /// ICMP or ICMPv6 echo.
    Icmp,
    /// An external program: exit status 0 is success. It gets `BATON_BACKEND`, `BATON_ADDRESS`,
    /// `BATON_PORT` and `BATON_SERVICE` in its environment.
    Script {
        /// Program and arguments.
        command: Vec<String>,
    },
}

/// What a SOCKS5 probe asks the server to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocksTarget {
    /// An address.
    Address(SocketAddr),
    /// A name that the server resolves, at most 255 bytes, and a port.
    Name(String, u16),
}

impl Protocol {
    /// The number that IP has for it.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => libc::IPPROTO_TCP as u8,
            Self::Udp => libc::IPPROTO_UDP as u8,
        }
    }
}

impl Service {
    /// A backend of it, as all nodes know it.
    pub fn target(&self, backend: &Backend) -> Target {
        Target::new(self.listen, self.protocol.number(), backend.address)
    }

    /// The address family of the service is that of its VIP.
    pub fn vip(&self) -> IpAddr {
        self.listen.ip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_go_to_text_and_back() {
        for (mode, name) in MODES {
            assert_eq!(String::from(mode), name);
            assert_eq!(Mode::try_from(name.to_owned()), Ok(mode));
        }
        assert!(Mode::try_from("passthrough".to_owned()).is_err());
    }
}
