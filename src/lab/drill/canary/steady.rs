//! Long-lived TCP connections, each sending a small piece of a known pattern every few
//! milliseconds. Every byte that comes back is held against it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFd;

use super::{Stop, readable, wait};

const RECORD: usize = 32;
/// Most records without an answer on one connection; while there are as many, it waits.
const MAX_OUTSTANDING: usize = 512;
/// How often a connection sends, at the least distance.
const INTERVAL: Duration = Duration::from_millis(10);
/// Most records a second of all connections: the machine is shared with what is measured.
const MAX_RATE: u32 = 2000;
/// A connection with a record unanswered for this long at the end is lost, without anyone having
/// told the client.
const SILENCE: Duration = Duration::from_secs(1);

/// What became of one connection.
#[derive(Debug, Clone, Default)]
pub(in crate::lab::drill) struct Fate {
    /// When each record was answered, and how long the client waited for that.
    pub(in crate::lab::drill) waits: Vec<(Instant, Duration)>,
    /// When and how it was lost.
    pub(in crate::lab::drill) lost: Option<(Instant, Loss)>,
    /// Bytes that came back different.
    pub(in crate::lab::drill) wrong: u64,
}

/// How a connection was lost, as the client learns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::lab::drill) enum Loss {
    /// Reset by the other side.
    Reset,
    /// Closed by the other side.
    Closed,
    /// Another error.
    Failed,
    /// Nothing: no answer any more.
    Silent,
}

impl Loss {
    /// For people.
    pub(in crate::lab::drill) fn words(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Closed => "closed",
            Self::Failed => "ended by an error",
            Self::Silent => "silent, without a reset",
        }
    }
}

struct Connection {
    stream: TcpStream,
    seed: u64,
    sent: u64,
    received: u64,
    /// The offset at which each record ends and when it was sent.
    outstanding: VecDeque<(u64, Instant)>,
    /// Bytes of a record that did not fit into the socket's buffer.
    unsent: VecDeque<u8>,
    fate: Fate,
}

/// Connects from the namespace of the caller.
///
/// # Errors
/// One of the connections failed.
pub(in crate::lab::drill) fn connect(
    target: SocketAddr,
    count: usize,
) -> io::Result<Vec<TcpStream>> {
    (0..count)
        .map(|_| {
            let stream = TcpStream::connect_timeout(&target, Duration::from_secs(3))?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        })
        .collect()
}

/// Exchanges records until it is told to stop.
pub(in crate::lab::drill) fn run(streams: Vec<TcpStream>, stop: &Stop) -> Vec<Fate> {
    let interval = INTERVAL.max(Duration::from_secs(1) * streams.len() as u32 / MAX_RATE);
    let mut connections: Vec<Connection> = streams
        .into_iter()
        .zip(1..)
        .map(|(stream, seed)| Connection {
            stream,
            seed,
            sent: 0,
            received: 0,
            outstanding: VecDeque::new(),
            unsent: VecDeque::new(),
            fate: Fate::default(),
        })
        .collect();
    let mut next = Instant::now();
    while !stop.asked() {
        let now = Instant::now();
        if now >= next {
            connections.iter_mut().for_each(|connection| connection.send(now));
            next = (next + interval).max(now);
        }
        poll(&mut connections, next.saturating_duration_since(Instant::now()));
    }
    let now = Instant::now();
    connections.into_iter().map(|connection| connection.end(now)).collect()
}

fn poll(connections: &mut [Connection], timeout: Duration) {
    let mut sockets: Vec<PollFd<'_>> = connections
        .iter()
        .filter(|connection| connection.alive())
        .map(|connection| readable(connection.stream.as_fd()))
        .collect();
    wait(&mut sockets, timeout);
    let ready: Vec<bool> = sockets.iter().map(|socket| socket.any().unwrap_or(true)).collect();
    let alive = connections.iter_mut().filter(|connection| connection.alive());
    for (connection, ready) in alive.zip(ready) {
        if ready {
            connection.receive();
        }
    }
}

/// The byte of a connection's pattern at an offset: neighbours, connections and records differ.
fn pattern(seed: u64, offset: u64) -> u8 {
    let mixed = (offset ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

impl Connection {
    fn alive(&self) -> bool {
        self.fate.lost.is_none()
    }

    fn lose(&mut self, loss: Loss) {
        self.fate.lost = Some((Instant::now(), loss));
    }

    fn send(&mut self, now: Instant) {
        if !self.alive() || self.outstanding.len() >= MAX_OUTSTANDING {
            return;
        }
        let end = self.sent + RECORD as u64;
        self.unsent.extend((self.sent..end).map(|offset| pattern(self.seed, offset)));
        self.sent = end;
        self.outstanding.push_back((end, now));
        match self.stream.write(self.unsent.make_contiguous()) {
            Ok(written) => drop(self.unsent.drain(..written)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.lose(loss_of(&error)),
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return self.lose(Loss::Closed),
                Ok(length) => self.check(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.lose(loss_of(&error)),
            }
        }
    }

    fn check(&mut self, bytes: &[u8]) {
        let expected = (self.received..).map(|offset| pattern(self.seed, offset));
        let differ = bytes.iter().zip(expected).filter(|(got, expected)| *got != expected).count();
        self.received += bytes.len() as u64;
        // Bytes that were never sent are wrong too, whatever they are.
        let surplus = self.received.saturating_sub(self.sent).min(bytes.len() as u64);
        self.fate.wrong += differ as u64 + surplus;
        let now = Instant::now();
        while let Some(&(end, sent)) = self.outstanding.front()
            && end <= self.received
        {
            self.outstanding.pop_front();
            self.fate.waits.push((now, now - sent));
        }
    }

    fn end(mut self, now: Instant) -> Fate {
        if let (true, Some(&(_, sent))) = (self.alive(), self.outstanding.front())
            && now - sent > SILENCE
        {
            self.fate.lost = Some((sent, Loss::Silent));
        }
        self.fate
    }
}

fn loss_of(error: &io::Error) -> Loss {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Loss::Reset,
        _ => Loss::Failed,
    }
}
