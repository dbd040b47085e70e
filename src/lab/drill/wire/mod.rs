//! Who answers for a VIP, as seen on the client's wire.
//!
//! A probe (ARP or Neighbor Solicitation) goes out every few milliseconds. Its Ethernet source is
//! not the client's but one of a series of its own, so that the answer passes by the client's
//! kernel and says which probe it belongs to. Unasked announcements of the VIP are noted too.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use super::canary::{Stop, wait_readable};
use crate::lab::topology::Mac;

mod arp;
mod ndp;

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

/// What a frame says of the VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// The probe with that number in the series was answered.
    Answer(usize, Mac),
    /// The VIP was announced unasked.
    Announcement(Mac),
}

/// A packet socket for what concerns the VIP, on an interface of the caller's namespace.
pub(super) fn socket(interface: &str, vip: IpAddr) -> io::Result<Socket> {
    let ethertype = match vip {
        IpAddr::V4(_) => libc::ETH_P_ARP as u16,
        IpAddr::V6(_) => libc::ETH_P_IPV6 as u16,
    };
    let ethertype = ethertype.to_be();
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
pub(super) fn run(socket: &Socket, vip: IpAddr, stop: &Stop) -> Sightings {
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

fn source(number: usize) -> Mac {
    let [a, b, c, d, e] = SOURCE;
    Mac([a, b, c, d, e, (number % SERIES) as u8])
}

/// The number in the series of a probe's address.
fn source_number(mac: Mac) -> Option<usize> {
    let [head @ .., number] = mac.0;
    (head == SOURCE && usize::from(number) < SERIES).then_some(usize::from(number))
}

fn question(number: usize, vip: IpAddr) -> Vec<u8> {
    match vip {
        IpAddr::V4(vip) => arp::question(number, vip),
        IpAddr::V6(vip) => ndp::question(number, vip),
    }
}

fn drain(socket: &Socket, vip: IpAddr, seen: &mut Sightings) {
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
fn take_in(frame: &[u8], now: Instant, vip: IpAddr, seen: &mut Sightings) {
    let heard = match vip {
        IpAddr::V4(vip) => arp::hear(frame, vip),
        IpAddr::V6(vip) => ndp::hear(frame, vip),
    };
    match heard {
        Some(Heard::Answer(number, mac)) => note_answer(number, mac, seen),
        Some(Heard::Announcement(mac)) if seen.announcements.len() < MAX_ANNOUNCEMENTS => {
            seen.announcements.push((now, mac));
        }
        Some(Heard::Announcement(_)) | None => {}
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

    const RELAYS: [Mac; 2] = [Mac([2, 0, 0, 0x77, 0, 2]), Mac([2, 0, 0, 0x77, 0, 3])];

    #[test]
    fn two_answers_to_one_probe_count_until_the_next() {
        let base = Instant::now();
        let probe = |n| Probe { sent: base + INTERVAL * n, answers: Vec::new() };
        let mut seen =
            Sightings { probes: (0..200).map(probe).collect(), announcements: Vec::new() };
        for (number, relay) in [(150, 0), (150, 1), (150, 1), (151, 1), (152, 0), (152, 1)] {
            note_answer(number % SERIES, RELAYS[relay], &mut seen);
        }
        assert_eq!(seen.probes[150].answers, RELAYS);
        assert_eq!(seen.probes[151].answers, RELAYS[1..]);
        assert_eq!(seen.two_answering(base), INTERVAL * 2);
        assert_eq!(seen.two_answering(seen.probes[151].sent), INTERVAL);
    }

    #[test]
    fn an_answer_to_no_probe_is_dropped() {
        let mut seen = Sightings::default();
        note_answer(3, RELAYS[0], &mut seen);
        assert!(seen.probes.is_empty());
        assert_eq!(source_number(source(70)), Some(6));
        assert_eq!(source_number(RELAYS[0]), None);
    }
}
