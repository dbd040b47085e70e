//! New TCP connections at a steady rate, each started on time whatever became of those before:
//! connect, one round trip, close.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Ledger, Stop, read, wait};
use crate::lab::LabError;
use crate::lab::drill::outage::Attempt;
use crate::lab::netns::Netns;

/// An attempt without an answer by then has failed. Linux sends the second SYN after one second:
/// this way an attempt stands or falls with its first, and shows the network as it was when it
/// began.
pub(in crate::lab::drill) const TIMEOUT: Duration = Duration::from_millis(900);

/// Opens sockets in the client's namespace; runs on the thread that entered it.
pub(in crate::lab::drill) struct Fresh {
    /// The service.
    pub(in crate::lab::drill) target: SocketAddr,
    /// Time from one attempt to the next.
    pub(in crate::lab::drill) interval: Duration,
    /// What became of the attempts.
    pub(in crate::lab::drill) ledger: Ledger,
}

struct Connection {
    socket: Socket,
    number: usize,
    deadline: Instant,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    /// So many bytes of the answer are here.
    Answering(usize),
}

enum Verdict {
    Pending,
    Answered,
    Failed,
}

const LENGTH: usize = 16;

impl Fresh {
    /// Connects until it is told to stop; says how many bytes of answers were wrong.
    pub(in crate::lab::drill) fn run(self, client: &Netns, stop: &Stop) -> Result<u64, LabError> {
        client.enter(|| self.attempts(stop)).map_err(|source| LabError::Io {
            doing: "entering the client's namespace".into(),
            source,
        })
    }

    fn attempts(&self, stop: &Stop) -> u64 {
        let mut wrong = 0;
        let mut open: Vec<Connection> = Vec::new();
        let mut next = Instant::now();
        while !stop.asked() || !open.is_empty() {
            let now = Instant::now();
            if now >= next && !stop.asked() {
                open.extend(self.begin(now));
                next = (next + self.interval).max(now);
            }
            let until = if stop.asked() { now + Duration::from_millis(10) } else { next };
            let ready = poll(&open, until.saturating_duration_since(Instant::now()));
            let now = Instant::now();
            let mut index = 0;
            open.retain_mut(|connection| {
                let event = ready[index];
                index += 1;
                let verdict = match event {
                    true => connection.progress(&mut wrong),
                    false if now > connection.deadline => Verdict::Failed,
                    false => Verdict::Pending,
                };
                if let Verdict::Answered = verdict {
                    read(&self.ledger)[connection.number].answered = Some(now);
                }
                matches!(verdict, Verdict::Pending)
            });
        }
        wrong
    }

    /// `None`: it failed at once, for want of a route or a port.
    fn begin(&self, now: Instant) -> Option<Connection> {
        let number = {
            let mut attempts = read(&self.ledger);
            attempts.push(Attempt { started: now, answered: None });
            attempts.len() - 1
        };
        let socket = connect(self.target).ok()?;
        Some(Connection { socket, number, deadline: now + TIMEOUT, stage: Stage::Connecting })
    }
}

/// A connection that is being made.
pub(super) fn connect(target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Which of the connections have something to do.
fn poll(open: &[Connection], timeout: Duration) -> Vec<bool> {
    let wanted = |connection: &Connection| match connection.stage {
        Stage::Connecting => PollFlags::POLLOUT,
        Stage::Answering(_) => PollFlags::POLLIN,
    };
    let mut sockets: Vec<PollFd<'_>> = open
        .iter()
        .map(|connection| PollFd::new(connection.socket.as_fd(), wanted(connection)))
        .collect();
    wait(&mut sockets, timeout);
    sockets.iter().map(|socket| socket.any().unwrap_or(true)).collect()
}

impl Connection {
    fn request(&self) -> [u8; LENGTH] {
        let mut request = *b"baton-new.......";
        request[8..].copy_from_slice(&(self.number as u64).to_be_bytes());
        request
    }

    fn progress(&mut self, wrong: &mut u64) -> Verdict {
        match self.stage {
            Stage::Connecting => {
                let request = self.request();
                let sound = matches!(self.socket.take_error(), Ok(None));
                if !sound || !matches!(self.socket.write(&request), Ok(LENGTH)) {
                    return Verdict::Failed;
                }
                self.stage = Stage::Answering(0);
                Verdict::Pending
            }
            Stage::Answering(have) => self.take_answer(have, wrong),
        }
    }

    fn take_answer(&mut self, have: usize, wrong: &mut u64) -> Verdict {
        let mut buffer = [0; LENGTH];
        let length = match self.socket.read(&mut buffer[have..]) {
            Ok(0) => return Verdict::Failed,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Verdict::Pending,
            Err(_) => return Verdict::Failed,
        };
        let expected = &self.request()[have..have + length];
        let got = &buffer[have..have + length];
        *wrong += expected.iter().zip(got).filter(|(a, b)| a != b).count() as u64;
        if have + length < LENGTH {
            self.stage = Stage::Answering(have + length);
            return Verdict::Pending;
        }
        let _ = self.socket.shutdown(Shutdown::Both);
        Verdict::Answered
    }
}
