//! Who answers ARP for the VIP, as seen on the client's wire.
//!
//! A probe goes out every few milliseconds, in the form of RFC 5227 §2.1.1: its sender protocol
//! address is 0.0.0.0, so it changes nobody's neighbour table. Its Ethernet source is not the
//! client's but one of a series of its own, so that the answer passes by the client's kernel and
//! says which probe it belongs to. Gratuitous announcements of the VIP are noted too.

use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::canary::{Stop, wait_readable};
use crate::lab::topology::Mac;

/// How often is asked.
pub(super) const INTERVAL: Duration = Duration::from_millis(5);
/// Probes are told apart by so many source addresses: an answer may take 64 × 5 ms.
const SERIES: usize = 64;
/// First five bytes of those: locally administered, none of the lab's own.
const SOURCE: [u8; 5] = [0x02, 0xba, 0x70, 0, 0];
/// Most announcements kept; a storm beyond that is cut off.
const MAX_ANNOUNCEMENTS: usize = 100_000;
/// How long answers may take after the last probe.
const GRACE: Duration = Duration::from_millis(50);

const ETHERNET: usize = 14;
const FRAME: usize = ETHERNET + 28;
/// Ethernet and IPv4, six and four bytes of address: the only kind of ARP that matters here.
const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// What was seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Sightings {
    /// Every probe, in order.
    pub(super) probes: Vec<Probe>,
    /// Gratuitous announcements of the VIP: when, and with which address.
    pub(super) announcements: Vec<(Instant, Mac)>,
}

/// A question and who answered it.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    /// When it was asked.
    pub(super) sent: Instant,
    /// The different addresses that were answered, in the order of their answers.
    pub(super) answers: Vec<Mac>,
}

impl Sightings {
    /// For how long two nodes or more answered, from `since` on.
    pub(super) fn two_answering(&self, since: Instant) -> Duration {
        self.probes
            .windows(2)
            .filter(|pair| pair[0].sent >= since && pair[0].answers.len() > 1)
            .map(|pair| pair[1].sent - pair[0].sent)
            .sum()
    }
}

/// A packet socket for ARP on an interface of the caller's namespace.
pub(super) fn socket(interface: &str) -> io::Result<Socket> {
    let ethertype = (libc::ETH_P_ARP as u16).to_be();
    let protocol = Protocol::from(i32::from(ethertype));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
    let index = nix::net::if_::if_nametoindex(interface)?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is the form of address of this family, fits into the storage, and any
    // bit pattern is a valid one.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype;
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the storage was initialised above with that many bytes of an address.
    socket.bind(&unsafe { SockAddr::new(storage, length) })?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Asks and listens until it is told to stop.
pub(super) fn run(socket: &Socket, vip: Ipv4Addr, stop: &Stop) -> Sightings {
    let mut seen = Sightings::default();
    let mut next = Instant::now();
    while !stop.asked() {
        let now = Instant::now();
        if now >= next {
            // A frame that could not be sent is a probe without an answer.
            let _ = socket.send(&question(seen.probes.len(), vip));
            seen.probes.push(Probe { sent: now, answers: Vec::new() });
            next = (next + INTERVAL).max(now);
        }
        wait_readable(socket, next.saturating_duration_since(Instant::now()));
        drain(socket, vip, &mut seen);
    }
    let end = Instant::now() + GRACE;
    while Instant::now() < end {
        wait_readable(socket, end.saturating_duration_since(Instant::now()));
        drain(socket, vip, &mut seen);
    }
    seen
}

fn source(number: usize) -> [u8; 6] {
    let [a, b, c, d, e] = SOURCE;
    [a, b, c, d, e, (number % SERIES) as u8]
}

fn question(number: usize, vip: Ipv4Addr) -> [u8; FRAME] {
    let nobody = ([0; 6], vip);
    frame(REQUEST, [0xff; 6], (source(number), Ipv4Addr::UNSPECIFIED), nobody)
}

/// RFC 826, behind an Ethernet header.
///
/// ```text
/// | destination 6 | source 6 | 08 06 |
/// | KIND 6 | operation 2 | sender 6 + 4 | target 6 + 4 |
/// ```
fn frame(
    operation: [u8; 2],
    destination: [u8; 6],
    sender: ([u8; 6], Ipv4Addr),
    target: ([u8; 6], Ipv4Addr),
) -> [u8; FRAME] {
    let ethertype = (libc::ETH_P_ARP as u16).to_be_bytes();
    let (sender_ip, target_ip) = (sender.1.octets(), target.1.octets());
    let parts: [&[u8]; 9] = [
        &destination,
        &sender.0,
        &ethertype,
        &KIND,
        &operation,
        &sender.0,
        &sender_ip,
        &target.0,
        &target_ip,
    ];
    let mut frame = [0; FRAME];
    frame.copy_from_slice(&parts.concat());
    frame
}

/// What matters of an ARP packet.
struct Arp {
    operation: [u8; 2],
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
}

/// `None`: too short, or ARP of another kind.
fn parse(frame: &[u8]) -> Option<Arp> {
    let arp: &[u8; FRAME - ETHERNET] = frame.get(ETHERNET..FRAME)?.try_into().ok()?;
    let mac = |at: usize| Mac(std::array::from_fn(|index| arp[at + index]));
    let ip = |at: usize| Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(|index| arp[at + index]));
    (arp[..6] == KIND).then(|| Arp {
        operation: [arp[6], arp[7]],
        sender: (mac(8), ip(14)),
        target: (mac(18), ip(24)),
    })
}

fn drain(socket: &Socket, vip: Ipv4Addr, seen: &mut Sightings) {
    let mut buffer = [0_u8; 128];
    loop {
        match io::Read::read(&mut &*socket, &mut buffer) {
            Ok(length) => take_in(&buffer[..length], Instant::now(), vip, seen),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Notes what a frame says of the VIP.
fn take_in(frame: &[u8], now: Instant, vip: Ipv4Addr, seen: &mut Sightings) {
    let Some(Arp { operation, sender, target }) = parse(frame) else { return };
    let (mac, address) = sender;
    if address != vip {
        return;
    }
    let asker = target.0.0;
    if operation == REPLY && asker[..5] == SOURCE {
        note_answer(usize::from(asker[5]), mac, seen);
    } else if target.1 == vip && seen.announcements.len() < MAX_ANNOUNCEMENTS {
        seen.announcements.push((now, mac));
    }
}

/// The latest probe with that number in the series is the one that was answered.
fn note_answer(series: usize, mac: Mac, seen: &mut Sightings) {
    let Some(last) = seen.probes.len().checked_sub(1) else { return };
    let back = (last + SERIES - series) % SERIES;
    if let Some(probe) = last.checked_sub(back).and_then(|index| seen.probes.get_mut(index))
        && !probe.answers.contains(&mac)
    {
        probe.answers.push(mac);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);

    fn answer(to: usize, from: u8) -> [u8; FRAME] {
        let relay = ([2, 0, 0, 0x77, 0, from], VIP);
        frame(REPLY, source(to), relay, (source(to), Ipv4Addr::UNSPECIFIED))
    }

    fn asked(count: u64) -> (Instant, Sightings) {
        let base = Instant::now();
        let probe = |n| Probe { sent: base + INTERVAL * n as u32, answers: Vec::new() };
        (base, Sightings { probes: (0..count).map(probe).collect(), announcements: Vec::new() })
    }

    #[test]
    fn two_answers_to_one_probe_count_until_the_next() {
        let (base, mut seen) = asked(200);
        for (to, from) in [(150, 2), (150, 3), (150, 3), (151, 3), (152, 2), (152, 3)] {
            take_in(&answer(to, from), base, VIP, &mut seen);
        }
        assert_eq!(seen.probes[150].answers.len(), 2);
        assert_eq!(seen.probes[151].answers.len(), 1);
        assert_eq!(seen.two_answering(base), INTERVAL * 2);
        assert_eq!(seen.two_answering(seen.probes[151].sent), INTERVAL);
        assert!(seen.announcements.is_empty());
    }

    #[test]
    fn an_announcement_is_no_answer_and_other_traffic_is_nothing() {
        let (base, mut seen) = asked(10);
        let relay = ([2, 0, 0, 0x77, 0, 2], VIP);
        let gratuitous = frame(REPLY, [0xff; 6], relay, ([0xff; 6], VIP));
        take_in(&gratuitous, base, VIP, &mut seen);
        take_in(&question(3, VIP), base, VIP, &mut seen);
        take_in(&gratuitous[..30], base, VIP, &mut seen);
        take_in(&[], base, VIP, &mut seen);
        assert_eq!(seen.announcements, [(base, Mac([2, 0, 0, 0x77, 0, 2]))]);
        assert!(seen.probes.iter().all(|probe| probe.answers.is_empty()));
    }
}
