//! UDP: a session per client address and port, with a connected socket of its own towards its backend.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::UdpSocket;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::capacity::Permit;
use super::datagram::{Datagrams, Peer};
use super::seat::Which;
use super::worker::Shared;
use crate::pool::{Admin, Admission, Health, Member, Place, Pool};

/// A UDP service in one worker.
pub(crate) struct UdpFront {
    pub(crate) pool: RefCell<Arc<Pool>>,
    socket: Datagrams,
    /// By client. Bounded by the service's `max_connections` (over all workers): when it is
    /// reached, datagrams of new clients are dropped and counted until sessions time out.
    sessions: RefCell<HashMap<Peer, Entry>>,
    shared: Rc<Shared>,
    /// No new sessions.
    closing: Cell<bool>,
}

/// A session in the table. Its replies end with it, at their task's next turn; what it counts
/// against limits is given back at once, so that the client's next session has room.
struct Entry {
    session: Rc<Session>,
    replies: AbortHandle,
    _place: Place,
    _admission: Admission,
    _permit: Permit,
}

struct Session {
    upstream: UdpSocket,
    last: Cell<Instant>,
    member: Arc<Member>,
}

/// The largest datagram there is, and one more byte.
const DATAGRAM_MOST: usize = 1 << 16;

/// Datagrams that one socket may deliver before the others have their turn.
const BATCH: usize = 64;

/// What a socket still has after a batch was taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Nothing,
    Perhaps,
}

impl UdpFront {
    pub(crate) fn new(
        pool: Arc<Pool>,
        socket: std::net::UdpSocket,
        shared: Rc<Shared>,
    ) -> io::Result<Self> {
        Ok(Self {
            pool: RefCell::new(pool),
            socket: Datagrams::new(socket)?,
            sessions: RefCell::default(),
            shared,
            closing: Cell::new(false),
        })
    }

    /// Carries datagrams from clients for as long as it is polled.
    pub(crate) async fn carry(self: Rc<Self>) {
        let mut datagram = vec![0; DATAGRAM_MOST].into_boxed_slice();
        loop {
            let ready = self.socket.readable().await;
            if ready.is_err() || self.take_batch(&mut datagram) == Waiting::Perhaps {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Takes in what waits, at most a batch.
    fn take_batch(self: &Rc<Self>, datagram: &mut [u8]) -> Waiting {
        for _ in 0..BATCH {
            match self.socket.receive(datagram) {
                Ok((len, peer)) => self.inward(peer, &datagram[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Waiting::Nothing;
                }
                // An ICMP error about a reply: that client is gone, its session times out.
                Err(_) => {}
            }
        }
        Waiting::Perhaps
    }

    /// Sessions that are there go on, new ones are refused.
    pub(crate) fn close(&self) {
        self.closing.set(true);
    }

    /// Ends sessions; how many.
    pub(crate) fn reset(&self, which: &Which) -> usize {
        let listen = self.pool.borrow().service.listen.ip();
        let mut sessions = self.sessions.borrow_mut();
        let before = sessions.len();
        sessions.retain(|peer, _| !which.covers(peer.at.unwrap_or(listen)));
        before - sessions.len()
    }

    /// Ends the sessions whose backend is down, disabled or no longer in the pool: their next
    /// datagram goes to another.
    pub(crate) fn heed_members(&self) {
        let pool = self.pool.borrow();
        self.sessions.borrow_mut().retain(|_, entry| {
            let member = &entry.session.member;
            pool.has(member) && member.health() != Health::Down && member.admin() != Admin::Disabled
        });
    }

    /// One datagram from a client.
    fn inward(self: &Rc<Self>, peer: Peer, datagram: &[u8]) {
        let known = self.sessions.borrow().get(&peer).map(|entry| Rc::clone(&entry.session));
        let refused = match known {
            None => None,
            Some(session) => match session.send(datagram) {
                Ok(_) => return self.count_in(datagram.len()),
                Err(error) if is_refusal(&error) => {
                    add_one(&session.member.failed);
                    self.sessions.borrow_mut().remove(&peer);
                    Some(Arc::clone(&session.member))
                }
                Err(_) => return self.drop_one(),
            },
        };
        match self.open(peer, refused.as_ref()) {
            Some(session) if session.send(datagram).is_ok() => self.count_in(datagram.len()),
            _ => self.drop_one(),
        }
    }

    /// A session with a backend other than `refused`, where there is another.
    fn open(self: &Rc<Self>, peer: Peer, refused: Option<&Arc<Member>>) -> Option<Rc<Session>> {
        if self.closing.get() {
            return None;
        }
        let client = peer.client;
        let pool = self.pool.borrow();
        let Some(permit) = self.shared.capacity.enter() else {
            add_one(&pool.counters.refused_service_limit);
            return None;
        };
        let admission = pool.admit(client.ip()).ok()?;
        let other = refused.and_then(|member| pool.pick(client.ip(), std::slice::from_ref(member)));
        let Some(place) = other.or_else(|| pool.pick(client.ip(), &[])) else {
            add_one(&pool.counters.refused_no_backend);
            return None;
        };
        let upstream = match upstream(place.member.backend.address) {
            Ok(upstream) => upstream,
            Err(error) => {
                debug!(%client, backend = place.member.backend.name, %error, "no session");
                add_one(&pool.counters.connect_failed);
                return None;
            }
        };
        let session = Rc::new(Session {
            upstream,
            last: Cell::new(Instant::now()),
            member: Arc::clone(&place.member),
        });
        let replies = Rc::clone(self).replies(peer, Rc::clone(&session));
        let replies = tokio::task::spawn_local(replies).abort_handle();
        let entry = Entry {
            session: Rc::clone(&session),
            replies,
            _place: place,
            _admission: admission,
            _permit: permit,
        };
        self.sessions.borrow_mut().insert(peer, entry);
        Some(session)
    }

    /// Carries a session's replies until it has been idle for too long or its backend refuses.
    async fn replies(self: Rc<Self>, peer: Peer, session: Rc<Session>) {
        let idle_timeout = self.pool.borrow().service.limits.idle_timeout;
        loop {
            let end = session.last.get() + idle_timeout;
            tokio::select! {
                biased;
                ready = session.upstream.readable() => {
                    match ready.and_then(|()| self.outward(peer, &session)) {
                        Ok(Waiting::Nothing) => {}
                        Ok(Waiting::Perhaps) => tokio::task::yield_now().await,
                        Err(_) => {
                            add_one(&session.member.failed);
                            break;
                        }
                    }
                }
                () = sleep_until(end) => if session.last.get() + idle_timeout <= Instant::now() {
                    add_one(&self.pool.borrow().counters.idle_closed);
                    break;
                }
            }
        }
        let mut sessions = self.sessions.borrow_mut();
        if sessions.get(&peer).is_some_and(|entry| Rc::ptr_eq(&entry.session, &session)) {
            sessions.remove(&peer);
        }
    }

    /// Hands on the replies that wait, at most a batch. An error is the backend's refusal.
    fn outward(&self, peer: Peer, session: &Session) -> io::Result<Waiting> {
        let datagram = &mut *self.shared.datagram.borrow_mut();
        for _ in 0..BATCH {
            let len = match session.upstream.try_recv(datagram) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Waiting::Nothing);
                }
                Err(error) => return Err(error),
            };
            session.last.set(Instant::now());
            if self.socket.send(&datagram[..len], peer).is_ok() {
                self.pool.borrow().counters.bytes_out.fetch_add(len as u64, Ordering::Relaxed);
            } else {
                self.drop_one();
            }
        }
        Ok(Waiting::Perhaps)
    }

    fn count_in(&self, bytes: usize) {
        self.pool.borrow().counters.bytes_in.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn drop_one(&self) {
        add_one(&self.pool.borrow().counters.datagrams_dropped);
    }
}

impl Session {
    /// Sends without asking the runtime whether the socket is writable, which it doesn't know of
    /// a new one; where the buffer is full, the datagram is lost as on any link.
    fn send(&self, datagram: &[u8]) -> io::Result<usize> {
        self.last.set(Instant::now());
        SockRef::from(&self.upstream).send(datagram)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.replies.abort();
    }
}

fn upstream(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), None)?;
    socket.connect(&address.into())?;
    UdpSocket::from_std(socket.into())
}

/// What a connected socket reports of the backend's ICMP errors.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ENETUNREACH];
    refusals.iter().any(|&errno| error.raw_os_error() == Some(errno as i32))
}

fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
