//! ICMP echo (RFC 792) and ICMPv6 echo (RFC 4443 §4): one request, and the reply that carries the
//! same identifier, sequence number and data.
//!
//! A ping socket (`SOCK_DGRAM`) where `net.ipv4.ping_group_range` lets us, a raw one otherwise
//! (CAP_NET_RAW). The kernel chooses the identifier of the former.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use pnet_packet::util::checksum;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::UdpSocket;

use super::{ProbeError, Progress};

/// Header of an echo (RFC 792 page 14) and our data behind it.
const HEADER: usize = 8;
const DATA: usize = 32;

/// Longest IPv4 header, which a raw socket delivers in front of the reply.
const IPV4_HEADER: usize = 60;

/// One number for each echo of this process, so that two probes of one address tell their
/// replies apart.
static SEQUENCE: AtomicU16 = AtomicU16::new(0);

/// Sends one echo request and waits for its reply; whatever else comes is ignored.
pub(super) async fn echo(mut address: SocketAddr, progress: &Progress) -> Result<(), ProbeError> {
    address.set_port(0);
    let (socket, kind) = open(address.ip()).map_err(|source| ProbeError::Start {
        what: "socket for echo (needs CAP_NET_RAW or net.ipv4.ping_group_range)",
        source,
    })?;
    let echo = Echo::new(address.ip());
    // Connected, so that the kernel passes on this address's packets and errors only.
    let failed = |source| ProbeError::Start { what: "echo", source };
    socket.connect(&SockAddr::from(address)).map_err(failed)?;
    // Not of UDP, but send and receive are those of any datagram socket.
    let socket = UdpSocket::from_std(socket.into()).map_err(failed)?;
    socket.send(&echo.request()).await.map_err(failed)?;
    progress.reach("echo sent");
    loop {
        let mut packet = [0; IPV4_HEADER + HEADER + DATA];
        let length = socket
            .recv(&mut packet)
            .await
            .map_err(|source| ProbeError::Broken { reached: progress.reached(), source })?;
        if echo.answered_by(&packet[..length], kind) {
            return Ok(());
        }
    }
}

/// What delivers replies, and so what is in front of them and who chose the identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ping,
    Raw,
}

fn open(address: IpAddr) -> io::Result<(Socket, Kind)> {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let (socket, kind) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(socket) => (socket, Kind::Ping),
        Err(_) => (Socket::new(domain, Type::RAW, Some(protocol))?, Kind::Raw),
    };
    socket.set_nonblocking(true)?;
    Ok((socket, kind))
}

/// One echo: what makes it ours.
struct Echo {
    family: Family,
    identifier: u16,
    sequence: u16,
    data: [u8; DATA],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn request(self) -> u8 {
        match self {
            Self::V4 => 8,
            Self::V6 => 128,
        }
    }

    fn reply(self) -> u8 {
        match self {
            Self::V4 => 0,
            Self::V6 => 129,
        }
    }
}

impl Echo {
    fn new(address: IpAddr) -> Self {
        // Not to be guessed, so that nobody else can answer for the backend.
        let random = RandomState::new();
        let mut data = [0; DATA];
        for (index, eight) in data.chunks_mut(8).enumerate() {
            eight.copy_from_slice(&random.hash_one(index).to_be_bytes());
        }
        Self {
            family: if address.is_ipv4() { Family::V4 } else { Family::V6 },
            identifier: random.hash_one(address) as u16,
            sequence: SEQUENCE.fetch_add(1, Ordering::Relaxed),
            data,
        }
    }

    /// ```text
    ///  0                   1                   2                   3
    ///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    /// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    /// |     Type      |     Code      |          Checksum             |
    /// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    /// |           Identifier          |        Sequence Number        |
    /// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    /// |     Data ...
    /// ```
    fn request(&self) -> [u8; HEADER + DATA] {
        let mut packet = [0; HEADER + DATA];
        packet[0] = self.family.request();
        packet[4..6].copy_from_slice(&self.identifier.to_be_bytes());
        packet[6..8].copy_from_slice(&self.sequence.to_be_bytes());
        packet[HEADER..].copy_from_slice(&self.data);
        // That of ICMPv6 covers addresses too; the kernel fills it in.
        if self.family == Family::V4 {
            let sum = checksum(&packet, 1);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    }

    /// Whether a received packet is the reply to this request.
    fn answered_by(&self, packet: &[u8], kind: Kind) -> bool {
        let message = match (self.family, kind) {
            (Family::V4, Kind::Raw) => {
                let words = packet.first().map_or(0, |first| usize::from(first & 0xf));
                packet.get(words * 4..).unwrap_or_default()
            }
            (Family::V4, Kind::Ping) | (Family::V6, Kind::Ping | Kind::Raw) => packet,
        };
        let Some((header, data)) = message.split_first_chunk::<HEADER>() else { return false };
        let ours = kind == Kind::Ping || header[4..6] == self.identifier.to_be_bytes();
        header[..2] == [self.family.reply(), 0]
            && ours
            && header[6..8] == self.sequence.to_be_bytes()
            && data == self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(echo: &Echo) -> Vec<u8> {
        let mut packet = echo.request().to_vec();
        packet[0] = echo.family.reply();
        packet
    }

    #[test]
    fn only_the_same_identifier_sequence_and_data_are_the_reply() {
        for (address, kind) in [
            ("192.0.2.1", Kind::Ping),
            ("192.0.2.1", Kind::Raw),
            ("2001:db8::1", Kind::Ping),
            ("2001:db8::1", Kind::Raw),
        ] {
            let echo = Echo::new(address.parse().expect("an address"));
            let front = match (echo.family, kind) {
                (Family::V4, Kind::Raw) => [&[0x46][..], &[0; 23]].concat(),
                _ => Vec::new(),
            };
            let good = reply(&echo);
            let judge = |message: &[u8]| echo.answered_by(&[&front, message].concat(), kind);
            assert!(judge(&good), "{address} {kind:?}");
            assert!(!judge(&echo.request()), "a request is no reply");
            for byte in (0..good.len()).filter(|byte| !(2..4).contains(byte)) {
                let mut bad = good.clone();
                bad[byte] ^= 1;
                // A ping socket's identifier is the kernel's.
                let free = kind == Kind::Ping && (4..6).contains(&byte);
                assert_eq!(judge(&bad), free, "{address} {kind:?} byte {byte}");
            }
            assert!(!judge(&good[..good.len() - 1]));
            assert!(!judge(&[]));
        }
    }

    #[test]
    fn the_checksum_of_a_request_verifies() {
        let packet = Echo::new("192.0.2.1".parse().expect("an address")).request();
        assert_eq!(checksum(&packet, usize::MAX), 0);
        assert_ne!(packet[2..4], [0, 0]);
    }

    proptest! {
        #[test]
        fn no_packet_is_too_strange(packet in prop::collection::vec(any::<u8>(), 0..200)) {
            for address in ["192.0.2.1", "2001:db8::1"] {
                let echo = Echo::new(address.parse().expect("an address"));
                for kind in [Kind::Ping, Kind::Raw] {
                    prop_assert!(!echo.answered_by(&packet, kind));
                }
            }
        }
    }
}
