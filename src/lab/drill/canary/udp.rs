//! A UDP probe every millisecond from one socket, each with its number.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::{Ledger, Stop, read, wait_readable};
use crate::lab::drill::outage::Attempt;

/// How often a probe is sent.
pub(in crate::lab::drill) const INTERVAL: Duration = Duration::from_millis(1);
/// An answer that comes later than this is none: a probe that waited in a neighbour queue is no
/// sign of service when it was sent.
const TIMEOUT: Duration = Duration::from_millis(100);

const MAGIC: [u8; 8] = *b"baton-up";

/// A socket in the namespace of the caller.
pub(in crate::lab::drill) fn socket(target: SocketAddr) -> io::Result<UdpSocket> {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Probes until it is told to stop; says how many bytes of answers were wrong.
pub(in crate::lab::drill) fn run(socket: &UdpSocket, ledger: &Ledger, stop: &Stop) -> u64 {
    let mut wrong = 0;
    let mut next = Instant::now();
    let mut emptied = next;
    while !stop.asked() {
        let now = Instant::now();
        if now >= next {
            send(socket, ledger, now);
            next = (next + INTERVAL).max(now);
        }
        wait_readable(socket, next.saturating_duration_since(Instant::now()));
        wrong += drain(socket, ledger, &mut emptied);
    }
    let end = Instant::now() + TIMEOUT;
    while Instant::now() < end {
        wait_readable(socket, end.saturating_duration_since(Instant::now()));
        wrong += drain(socket, ledger, &mut emptied);
    }
    wrong
}

fn send(socket: &UdpSocket, ledger: &Ledger, now: Instant) {
    let number = {
        let mut attempts = read(ledger);
        attempts.push(Attempt { started: now, answered: None });
        attempts.len() as u64 - 1
    };
    // An error is that of an earlier probe (port unreachable), or there is no way to the VIP
    // now: both count as a probe without an answer.
    let _ = socket.send(&[MAGIC, number.to_be_bytes()].concat());
}

/// Takes in the answers that are there. They came after the socket was last `emptied`.
fn drain(socket: &UdpSocket, ledger: &Ledger, emptied: &mut Instant) -> u64 {
    let mut wrong = 0;
    let mut buffer = [0; 64];
    loop {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                *emptied = Instant::now();
                return wrong;
            }
            Err(_) => continue,
        };
        let now = Instant::now();
        let number = buffer[..length].strip_prefix(&MAGIC).and_then(|rest| rest.try_into().ok());
        let mut attempts = read(ledger);
        match number.and_then(|bytes| attempts.get_mut(u64::from_be_bytes(bytes) as usize)) {
            Some(attempt) if in_time(attempt, *emptied) => attempt.answered = Some(now),
            Some(_) => {}
            None => wrong += length as u64,
        }
    }
}

/// Whether an answer that is read now may have come in time. If this thread was held up, the
/// answer waited for it, and nobody was without service.
fn in_time(attempt: &Attempt, emptied: Instant) -> bool {
    emptied.saturating_duration_since(attempt.started) <= TIMEOUT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_that_was_held_up_does_not_blame_the_service() {
        let attempt = Attempt { started: Instant::now(), answered: None };
        assert!(in_time(&attempt, attempt.started));
        assert!(in_time(&attempt, attempt.started + TIMEOUT));
        assert!(!in_time(&attempt, attempt.started + TIMEOUT + INTERVAL));
    }
}
