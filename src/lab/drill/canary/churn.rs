//! Many new TCP connections a second, all of them held: what becomes of the youngest when their
//! relay goes away, which no replication can have told of yet.
//!
//! A connection counts as established once its first record has come back, so that both ends and
//! the client know of it. It has survived if a second record, sent after the takeover, comes back
//! byte for byte. In between it is silent.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::Socket;

use super::fresh::connect;
use super::{Stop, Worker};
use crate::lab::netns::Netns;

/// Most connections: the ports of one client address, with some to spare.
const MOST: usize = 60_000;
/// Descriptors besides the connections'.
const SPARE: u64 = 1000;
/// Time that the last one asked has for its answer: five tries of TCP's.
const PATIENCE: Duration = Duration::from_secs(7);
/// Connections that are asked at a time, about a millisecond from each other.
const ASKED: usize = 20;
/// Most events that are taken at a time.
const EVENTS: usize = 512;
const RECORD: usize = 16;

const OPENING: u8 = 0;
const HOLDING: u8 = 1;
const ASKING: u8 = 2;

/// One that was established.
#[derive(Debug, Clone, Copy)]
pub(in crate::lab::drill) struct Held {
    /// When its first record had come back.
    pub(in crate::lab::drill) established: Instant,
    /// Whether the second one did.
    pub(in crate::lab::drill) survived: bool,
    /// Bytes of either that were wrong.
    pub(in crate::lab::drill) wrong: u64,
}

/// The canary.
pub(in crate::lab::drill) struct Churn {
    phase: Arc<AtomicU8>,
    worker: Worker<io::Result<Vec<Held>>>,
}

impl Churn {
    /// Begins to open so many a second, from the client's namespace.
    pub(in crate::lab::drill) fn start(
        client: &Netns,
        target: SocketAddr,
        rate: u32,
    ) -> io::Result<Self> {
        let phase = Arc::new(AtomicU8::new(OPENING));
        let (client, seen) = (client.clone(), Arc::clone(&phase));
        let worker = Worker::spawn("churn", move |stop| {
            client.enter(|| Crowd::new(target, rate)?.run(&seen, &stop))?
        })?;
        Ok(Self { phase, worker })
    }

    /// Opens no more.
    pub(in crate::lab::drill) fn hold(&self) {
        self.phase.store(HOLDING, Ordering::Relaxed);
    }

    /// Asks all that are established, waits for their answers, and closes them.
    pub(in crate::lab::drill) fn ask(self) -> io::Result<Vec<Held>> {
        self.phase.store(ASKING, Ordering::Relaxed);
        self.worker.join()
    }
}

struct Crowd {
    target: SocketAddr,
    rate: u32,
    /// Most connections, as many as there are descriptors for.
    most: usize,
    epoll: Epoll,
    connections: Vec<Connection>,
}

struct Connection {
    socket: Socket,
    established: Option<Instant>,
    wrong: u64,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    /// So many bytes of the first record are back.
    First(usize),
    Held,
    /// The same of the second.
    Second(usize),
    Survived,
    Lost,
}

impl Crowd {
    fn new(target: SocketAddr, rate: u32) -> io::Result<Self> {
        let most = descriptors()?.saturating_sub(SPARE).min(MOST as u64) as usize;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { target, rate, most, epoll, connections: Vec::with_capacity(most) })
    }

    fn run(mut self, phase: &AtomicU8, stop: &Stop) -> io::Result<Vec<Held>> {
        let begun = Instant::now();
        let mut events = vec![EpollEvent::empty(); EVENTS];
        let (mut asked, mut until) = (0, None);
        while !stop.asked() && until.is_none_or(|until| Instant::now() < until) {
            match phase.load(Ordering::Relaxed) {
                OPENING => self.open(begun.elapsed()),
                HOLDING => {}
                _ if asked < self.connections.len() => {
                    let next = (asked + ASKED).min(self.connections.len());
                    (asked..next).for_each(|number| self.connections[number].ask(number));
                    asked = next;
                }
                _ if self.waiting() => until = until.or(Some(Instant::now() + PATIENCE)),
                _ => break,
            }
            let ready = match self.epoll.wait(&mut events, EpollTimeout::from(1_u8)) {
                Err(nix::errno::Errno::EINTR) => 0,
                ready => ready?,
            };
            for event in &events[..ready] {
                let number = event.data() as usize;
                self.connections[number].progress(number);
            }
        }
        let held = self.connections.iter().filter_map(|connection| {
            let survived = connection.stage == Stage::Survived;
            let wrong = connection.wrong;
            connection.established.map(|established| Held { established, survived, wrong })
        });
        Ok(held.collect())
    }

    /// As many as are due by now.
    fn open(&mut self, since: Duration) {
        let due = (since.as_secs_f64() * f64::from(self.rate)) as usize;
        while self.connections.len() < due.min(self.most) {
            let Ok(socket) = connect(self.target) else { return };
            let number = self.connections.len();
            let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
            let event = EpollEvent::new(interest, number as u64);
            if self.epoll.add(socket.as_fd(), event).is_err() {
                return;
            }
            let stage = Stage::Connecting;
            self.connections.push(Connection { socket, established: None, wrong: 0, stage });
        }
    }

    /// Whether any may still answer.
    fn waiting(&self) -> bool {
        self.connections.iter().any(|connection| matches!(connection.stage, Stage::Second(_)))
    }
}

/// What a connection sends: no two records are alike.
fn record(number: usize, which: u8) -> [u8; RECORD] {
    let mut record = *b"baton-held......";
    record[7] = which;
    record[8..].copy_from_slice(&(number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    record
}

impl Connection {
    fn ask(&mut self, number: usize) {
        if self.stage == Stage::Held {
            self.send(number, 2, Stage::Second(0));
        }
    }

    fn send(&mut self, number: usize, which: u8, then: Stage) {
        self.stage = match self.socket.write(&record(number, which)) {
            Ok(RECORD) => then,
            Ok(_) | Err(_) => Stage::Lost,
        };
    }

    /// Something may have come, or gone out.
    fn progress(&mut self, number: usize) {
        if self.stage == Stage::Connecting {
            match self.socket.take_error() {
                Ok(None) if self.socket.peer_addr().is_ok() => {
                    self.send(number, 1, Stage::First(0));
                }
                Ok(None) => return,
                Ok(Some(_)) | Err(_) => self.stage = Stage::Lost,
            }
        }
        let mut buffer = [0; RECORD];
        while !matches!(self.stage, Stage::Survived | Stage::Lost) {
            match self.socket.read(&mut buffer) {
                Ok(0) => self.stage = Stage::Lost,
                Ok(length) => self.take(number, &buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.stage = Stage::Lost,
            }
        }
    }

    fn take(&mut self, number: usize, bytes: &[u8]) {
        let (which, have) = match self.stage {
            Stage::First(have) => (1, have),
            Stage::Second(have) => (2, have),
            // Nothing was sent that this could be the answer to.
            Stage::Connecting | Stage::Held | Stage::Survived | Stage::Lost => {
                self.wrong += bytes.len() as u64;
                return;
            }
        };
        let expected = record(number, which);
        let differ = expected[have..].iter().zip(bytes).filter(|(a, b)| a != b).count();
        let then = have + bytes.len();
        self.wrong += (differ + then.saturating_sub(RECORD)) as u64;
        self.stage = match (which, then < RECORD) {
            (1, true) => Stage::First(then),
            (1, false) => {
                self.established = Some(Instant::now());
                Stage::Held
            }
            (_, true) => Stage::Second(then),
            (_, false) if self.wrong == 0 => Stage::Survived,
            (_, false) => Stage::Lost,
        };
    }
}

/// As many as this process may ever have: that many from here on.
fn descriptors() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Takes so many connections, echoes one record of each; then the second one of all but the
    /// last two: of these one is closed, and one answers other bytes.
    fn serve(listener: &TcpListener, count: usize) {
        let mut streams: Vec<_> = (0..count).map(|_| listener.accept().unwrap().0).collect();
        let mut buffer = [0; RECORD];
        for stream in &mut streams {
            stream.read_exact(&mut buffer).unwrap();
            stream.write_all(&buffer).unwrap();
        }
        drop(streams.pop());
        for stream in &mut streams {
            stream.read_exact(&mut buffer).unwrap();
            stream.write_all(&buffer).unwrap();
        }
    }

    #[test]
    fn only_those_that_echo_again_have_survived() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        let server = thread::spawn(move || serve(&listener, 10));
        let phase = Arc::new(AtomicU8::new(OPENING));
        let seen = Arc::clone(&phase);
        let client = Worker::spawn("churn", move |stop| {
            let mut crowd = Crowd::new(target, 1)?;
            // All at once, and no more.
            crowd.open(Duration::from_secs(10));
            crowd.rate = 0;
            crowd.run(&seen, &stop)
        });
        thread::sleep(Duration::from_millis(200));
        let churn = Churn { phase, worker: client.unwrap() };
        churn.hold();
        let held = churn.ask().unwrap();
        server.join().unwrap();
        assert_eq!(held.len(), 10);
        assert_eq!(held.iter().filter(|held| held.survived).count(), 9);
        assert_eq!(held.iter().map(|held| held.wrong).sum::<u64>(), 0);
    }

    #[test]
    fn other_bytes_are_wrong_and_no_survival() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = connect(listener.local_addr().unwrap()).unwrap();
        let mut connection =
            Connection { socket, established: None, wrong: 0, stage: Stage::First(0) };
        connection.take(7, &record(7, 1)[..5]);
        connection.take(7, &record(7, 1)[5..]);
        assert_eq!((connection.stage, connection.wrong), (Stage::Held, 0));
        connection.stage = Stage::Second(0);
        connection.take(7, &record(8, 2));
        assert_eq!(connection.stage, Stage::Lost);
        assert!(connection.wrong > 0);
    }
}
