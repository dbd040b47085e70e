//! What routers say of packets that are too long for the way to a tunnel's end (`dsr = "ipip"`). The
//! outer header is this node's own, so they say it to this node; its kernel heeds it only where it has
//! the tunnel itself, and Baton needs no tunnel. What is learnt here goes to the backend's entry, and
//! from there the datapath tells clients (bpf/mtu.h).
//!
//! Whoever can send ICMP can lie, here as everywhere: no less than the kernel's own floor is believed,
//! and only for backends.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

/// How long it is believed: as long as the kernel does (`mtu_expires`).
const BELIEVED: Duration = Duration::from_secs(600);

/// Least MTU that is believed: the kernel's `min_pmtu`, and RFC 8200 §5.
const LEAST: [u32; 2] = [552, 1280];

/// Most messages that are read at a time; the rest can wait.
const AT_ONCE: usize = 1000;

/// Listens for it.
#[derive(Debug, Default)]
pub(super) struct Narrow {
    /// Of IPv4 and of IPv6, as far as they could be opened; none before there is a tunnel.
    sockets: Option<[Option<Socket>; 2]>,
    learnt: HashMap<IpAddr, (u32, Instant)>,
}

impl Narrow {
    /// Reads what has come since, of the ways to these ends of tunnels.
    pub(super) fn hear(&mut self, now: Instant, ends: &HashSet<IpAddr>) {
        self.learnt.retain(|end, (_, since)| ends.contains(end) && now - *since < BELIEVED);
        if ends.is_empty() {
            self.sockets = None;
            return;
        }
        let sockets = self.sockets.get_or_insert_with(|| {
            [(Domain::IPV4, Protocol::ICMPV4), (Domain::IPV6, Protocol::ICMPV6)].map(
                |(domain, protocol)| {
                    open(domain, protocol)
                        .inspect_err(|error| {
                            tracing::warn!(
                                %error, ?domain,
                                "can't hear of narrow links on the way to tunnels' ends"
                            );
                        })
                        .ok()
                },
            )
        });
        for (socket, read) in sockets.iter().zip([read_v4 as fn(&[u8]) -> _, read_v6]) {
            let Some(socket) = socket else { continue };
            let mut buffer = [0; 2048];
            for _ in 0..AT_ONCE {
                let mut socket: &Socket = socket;
                let Ok(length) = socket.read(&mut buffer) else { break };
                let said = read(&buffer[..length]).filter(|(end, _)| ends.contains(end));
                if let Some((end, mtu)) = said {
                    tracing::debug!(%end, mtu, "a router on the way to a tunnel's end takes no more");
                    self.learnt.insert(end, (mtu, now));
                }
            }
        }
    }

    /// Longest packet that the way to there takes, where the kernel knows of `mtu`.
    pub(super) fn least(&self, end: IpAddr, mtu: u32) -> u32 {
        self.learnt.get(&end).map_or(mtu, |(learnt, _)| mtu.min(*learnt))
    }
}

/// A raw socket that gets nothing but these messages.
fn open(domain: Domain, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(protocol))?;
    // A bit that is set keeps a type out (linux/icmp.h, linux/icmpv6.h).
    let mut filter = [u32::MAX; 8];
    let (level, option, words) = match domain {
        Domain::IPV4 => {
            filter[0] &= !(1 << TOO_LONG_V4.0);
            (libc::SOL_RAW, ICMP_FILTER, 1)
        }
        _ => {
            filter[0] &= !(1 << TOO_BIG_V6);
            (libc::IPPROTO_ICMPV6, ICMPV6_FILTER, 8)
        }
    };
    // SAFETY: the pointer is to a local of at least that size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            filter.as_ptr().cast(),
            (words * size_of::<u32>()) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// `ICMP_FILTER` of linux/icmp.h and `ICMPV6_FILTER` of linux/icmpv6.h.
const ICMP_FILTER: libc::c_int = 1;
const ICMPV6_FILTER: libc::c_int = 1;

/// Type and code of "fragmentation needed" (RFC 792, RFC 1191 §4).
const TOO_LONG_V4: (u8, u8) = (3, 4);
/// Type of "packet too big" (RFC 4443 §3.2).
const TOO_BIG_V6: u8 = 2;
/// IP in IP (RFC 2003), IPv6 in IP (RFC 2473).
const TUNNELS: [u8; 2] = [4, 41];

/// Whose way takes no more than how much, from a whole IPv4 packet.
fn read_v4(packet: &[u8]) -> Option<(IpAddr, u32)> {
    let icmp = packet.get(usize::from(packet.first()? & 15) * 4..)?;
    let quote = icmp.get(8..28)?;
    let mtu = u32::from(u16::from_be_bytes([icmp[6], icmp[7]]));
    if (icmp[0], icmp[1]) != TOO_LONG_V4 || !TUNNELS.contains(&quote[9]) || mtu == 0 {
        return None;
    }
    let end = Ipv4Addr::from(<[u8; 4]>::try_from(&quote[16..20]).ok()?);
    Some((end.into(), mtu.max(LEAST[0])))
}

/// The same, from an ICMPv6 message.
fn read_v6(icmp: &[u8]) -> Option<(IpAddr, u32)> {
    let quote = icmp.get(8..48)?;
    let mtu = u32::from_be_bytes(icmp[4..8].try_into().ok()?);
    if icmp[0] != TOO_BIG_V6 || !TUNNELS.contains(&quote[6]) {
        return None;
    }
    let end = Ipv6Addr::from(<[u8; 16]>::try_from(&quote[24..40]).ok()?);
    Some((end.into(), mtu.max(LEAST[1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(kind: (u8, u8), mtu: u16, protocol: u8) -> Vec<u8> {
        let mut packet = vec![0; 20 + 8 + 20];
        packet[0] = 0x45;
        (packet[20], packet[21]) = kind;
        packet[26..28].copy_from_slice(&mtu.to_be_bytes());
        packet[28 + 9] = protocol;
        packet[28 + 16..].copy_from_slice(&[10, 79, 0, 12]);
        packet
    }

    fn v6(kind: u8, mtu: u32, next: u8) -> Vec<u8> {
        let mut message = vec![0; 8 + 40];
        message[0] = kind;
        message[4..8].copy_from_slice(&mtu.to_be_bytes());
        message[8 + 6] = next;
        message[8 + 24..].copy_from_slice(&"fd79::12".parse::<Ipv6Addr>().unwrap().octets());
        message
    }

    #[test]
    fn what_is_about_a_tunnel_is_believed_down_to_a_floor() {
        let end: IpAddr = "10.79.0.12".parse().unwrap();
        assert_eq!(read_v4(&v4((3, 4), 1400, 4)), Some((end, 1400)));
        assert_eq!(read_v4(&v4((3, 4), 68, 41)), Some((end, 552)));
        for other in [v4((3, 3), 1400, 4), v4((3, 4), 0, 4), v4((3, 4), 1400, 6)] {
            assert_eq!(read_v4(&other), None);
        }
        let end: IpAddr = "fd79::12".parse().unwrap();
        assert_eq!(read_v6(&v6(2, 1400, 41)), Some((end, 1400)));
        assert_eq!(read_v6(&v6(2, 0, 4)), Some((end, 1280)));
        assert_eq!(read_v6(&v6(1, 1400, 4)), None);
        assert_eq!(read_v6(&v6(2, 1400, 17)), None);
    }

    #[test]
    fn nothing_that_is_cut_off_is_read() {
        let (whole4, whole6) = (v4((3, 4), 1400, 4), v6(2, 1400, 4));
        for length in 0..whole4.len() {
            assert_eq!(read_v4(&whole4[..length]), None);
        }
        for length in 0..whole6.len() {
            assert_eq!(read_v6(&whole6[..length]), None);
        }
        let mut long_header = whole4;
        long_header[0] = 0x4f;
        assert_eq!(read_v4(&long_header), None);
    }

    #[test]
    fn it_is_forgotten_in_time_and_with_the_backend() {
        let (end, now) = ("10.79.0.12".parse().unwrap(), Instant::now());
        let ends = HashSet::from([end]);
        let learnt = || Narrow { sockets: None, learnt: [(end, (1400, now))].into() };
        let mut narrow = learnt();
        narrow.hear(now + BELIEVED / 2, &ends);
        assert_eq!((narrow.least(end, 1500), narrow.least(end, 1300)), (1400, 1300));
        narrow.hear(now + BELIEVED, &ends);
        assert_eq!(narrow.least(end, 1500), 1500);
        let mut narrow = learnt();
        narrow.hear(now, &HashSet::new());
        assert_eq!(narrow.least(end, 1500), 1500);
    }
}
