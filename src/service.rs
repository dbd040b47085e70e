//! The words: service, backend, mode, scheduler, check. Plain data, correct once it exists; it
//! comes from [`crate::config`] and is read by everyone else.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

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

/// How traffic gets to the backend. `passthrough` and `dsr` come with the kernel datapath.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Terminated here; bytes are spliced.
    Proxy,
}

/// How a backend is chosen for a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
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

impl Service {
    /// The address family of the service is that of its VIP.
    pub fn vip(&self) -> IpAddr {
        self.listen.ip()
    }
}
