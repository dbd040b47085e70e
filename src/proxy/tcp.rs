//! TCP: accept, admit, connect to a backend (and to another where that fails), join.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;
use tracing::{debug, trace, warn};

use super::header::Header;
use super::join::{End, join};
use super::listen;
use super::seat::{Order, Phase, Seat, Seated, Seats, Which};
use super::worker::Shared;
use crate::pool::{Admission, Member, Place, Pool};
use crate::service::ProxyProtocol;

/// A TCP service in one worker.
pub(crate) struct TcpFront {
    pub(crate) pool: RefCell<Arc<Pool>>,
    pub(crate) seats: Rc<Seats>,
    /// `None` once it is closed.
    listener: RefCell<Option<Rc<TcpListener>>>,
    shared: Rc<Shared>,
    /// The last accept failed; it has been logged.
    short: Cell<bool>,
}

/// How long accepting pauses when it fails for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(50);

impl TcpFront {
    pub(crate) fn new(
        pool: Arc<Pool>,
        listener: std::net::TcpListener,
        shared: Rc<Shared>,
    ) -> io::Result<Self> {
        Ok(Self {
            pool: RefCell::new(pool),
            seats: Rc::default(),
            listener: RefCell::new(Some(Rc::new(TcpListener::from_std(listener)?))),
            shared,
            short: Cell::new(false),
        })
    }

    /// Accepts for as long as it is polled.
    pub(crate) async fn accept(self: Rc<Self>) {
        let Some(listener) = self.listener() else { return };
        loop {
            match listener.accept().await {
                Ok((client, peer)) => {
                    self.short.set(false);
                    self.take(client, peer);
                }
                Err(error) => self.pause(error).await,
            }
        }
    }

    /// Takes what waits in the kernel's queue and forgets the listener. It closes when
    /// [`TcpFront::accept`] is no longer polled either.
    pub(crate) fn close(self: &Rc<Self>) {
        self.each_waiting(|client, peer| self.take(client, peer));
        *self.listener.borrow_mut() = None;
    }

    /// Resets sessions, and what waits in the kernel's queue; how many there were.
    pub(crate) fn reset(self: &Rc<Self>, which: &Which) -> usize {
        let mut waiting = 0;
        self.each_waiting(|client, peer| {
            if which.covers(self.came_to(&client)) {
                // Dropped, and so reset.
                waiting += 1;
            } else {
                self.take(client, peer);
            }
        });
        self.pool.borrow().counters.reset_on_yield.fetch_add(waiting, Ordering::Relaxed);
        self.seats.reset(which) + waiting as usize
    }

    /// The address that a client came to: the service's, unless that is every address.
    fn came_to(&self, client: &TcpStream) -> IpAddr {
        let listen = self.pool.borrow().service.listen.ip();
        if !listen.is_unspecified() {
            return listen;
        }
        client.local_addr().map_or(listen, |address| address.ip())
    }

    /// Empties the kernel's queue of what is in it now. It asks the kernel itself: the runtime may
    /// not have heard yet that a connection waits, and lets a task have only so many at once.
    fn each_waiting(&self, mut each: impl FnMut(TcpStream, SocketAddr)) {
        let Some(listener) = self.listener() else { return };
        let listener = SockRef::from(&*listener);
        // The queue never has more than this; what comes meanwhile is not waited for.
        for _ in 0..=listen::BACKLOG {
            match accept(&listener) {
                Ok((client, peer)) => each(client, peer),
                // The client was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => return,
            }
        }
    }

    fn listener(&self) -> Option<Rc<TcpListener>> {
        self.listener.borrow().clone()
    }

    /// An accept that fails must neither end the listener nor spin.
    async fn pause(&self, error: io::Error) {
        if error.kind() == io::ErrorKind::ConnectionAborted {
            // The client was gone before it was accepted.
            return;
        }
        add_one(&self.pool.borrow().counters.accept_failed);
        if !self.short.replace(true) {
            let service = &self.pool.borrow().service.name;
            warn!(%service, %error, "can't accept connections; trying again");
        }
        tokio::time::sleep(PAUSE).await;
    }

    /// Starts the session of an accepted connection, or resets it at once. Resetting tells the
    /// client now what a full queue would let it find out by waiting, and keeps the queue for
    /// clients that can be served.
    fn take(self: &Rc<Self>, client: TcpStream, peer: SocketAddr) {
        let pool = self.pool.borrow();
        let Some(permit) = self.shared.capacity.enter() else {
            add_one(&pool.counters.refused_service_limit);
            return;
        };
        let Ok(admission) = pool.admit(peer.ip()) else { return };
        // It has its seat from here on, so that an order that comes next finds it.
        let seat = self.seats.sit(self.came_to(&client));
        let front = Rc::clone(self);
        drop(pool);
        tokio::task::spawn_local(async move {
            front.session(client, peer, admission, seat).await;
            drop(permit);
        });
    }

    async fn session(
        &self,
        client: TcpStream,
        peer: SocketAddr,
        admission: Admission,
        seat: Seated,
    ) {
        let (backend, place) = match self.connect(&client, peer, &seat).await {
            Ok(connected) => connected,
            Err(reason) => {
                self.count_unconnected(reason);
                trace!(%peer, ?reason, "not connected");
                return;
            }
        };
        let pool = Arc::clone(&self.pool.borrow());
        let (limits, counters) = (&pool.service.limits, &pool.counters);
        let end = join(&client, &backend, limits, counters, &seat, &self.shared.tools).await;
        match end {
            End::Closed { settled } => {
                // A peer that takes nothing doesn't keep what is left for ever.
                if settled {
                    let most = Some(limits.half_close_timeout);
                    let _ = SockRef::from(&client).set_tcp_user_timeout(most);
                    let _ = SockRef::from(&backend).set_tcp_user_timeout(most);
                }
                // From here on the kernel sees to it that bytes and ends arrive.
                let _ = SockRef::from(&client).set_linger(None);
                let _ = SockRef::from(&backend).set_linger(None);
            }
            End::Idle => add_one(&counters.idle_closed),
            End::Told(Order::Disabled) => add_one(&counters.reset_on_disable),
            End::Told(Order::Yield) => add_one(&counters.reset_on_yield),
            End::Failed(error) => {
                let backend = &place.member.backend.name;
                trace!(%peer, backend, %error, "reset");
            }
            End::Told(Order::Elsewhere) => {}
        }
        // The sockets go before the places, so that neither limit is ever passed on the wire.
        drop((client, backend));
        drop((place, admission));
    }

    fn count_unconnected(&self, reason: Unconnected) {
        let pool = self.pool.borrow();
        match reason {
            Unconnected::NoBackend => add_one(&pool.counters.refused_no_backend),
            Unconnected::AllFailed => add_one(&pool.counters.connect_failed),
            Unconnected::Yielded => add_one(&pool.counters.reset_on_yield),
            Unconnected::ClientLeft => {}
        }
    }

    /// A connection to a backend and the place on it. What the client sends meanwhile waits in
    /// its socket.
    async fn connect(
        &self,
        client: &TcpStream,
        peer: SocketAddr,
        seat: &Seat,
    ) -> Result<(TcpStream, Place), Unconnected> {
        let mut tried: Vec<Arc<Member>> = Vec::new();
        loop {
            // The pool of this moment: it may have been renewed since the last attempt.
            let pool = Arc::clone(&self.pool.borrow());
            let Some(place) = pool.pick(peer.ip(), &tried) else {
                return Err(if tried.is_empty() {
                    Unconnected::NoBackend
                } else {
                    Unconnected::AllFailed
                });
            };
            if !tried.is_empty() {
                add_one(&pool.counters.connect_retried);
            }
            let limits = &pool.service.limits;
            seat.has(&place.member, Phase::Connecting);
            let attempt = timeout(limits.connect_timeout, attempt(&pool, &place, client, peer));
            tokio::select! {
                biased;
                order = poll_fn(|cx| seat.poll_order(cx.waker())) => match order {
                    Order::Yield => return Err(Unconnected::Yielded),
                    Order::Disabled | Order::Elsewhere => {}
                },
                connected = attempt => match connected.unwrap_or(Err(Errno::ETIMEDOUT.into())) {
                    // Its health may have been found out just now.
                    Ok(backend) if place.member.usable() => {
                        seat.has(&place.member, Phase::Joined);
                        return Ok((backend, place));
                    }
                    Ok(_) => {}
                    Err(error) => {
                        add_one(&place.member.failed);
                        let (service, backend) = (&pool.service.name, &place.member.backend.name);
                        debug!(%service, %backend, %error, "can't connect");
                    }
                },
                _ = client.ready(Interest::ERROR) => return Err(Unconnected::ClientLeft),
            }
            tried.push(Arc::clone(&place.member));
            if tried.len() > limits.connect_retries as usize {
                return Err(Unconnected::AllFailed);
            }
        }
    }
}

/// Why a client was not connected to a backend.
#[derive(Debug, Clone, Copy)]
enum Unconnected {
    NoBackend,
    AllFailed,
    ClientLeft,
    Yielded,
}

/// Accepts a connection that waits, without waiting for one.
fn accept(listener: &Socket) -> io::Result<(TcpStream, SocketAddr)> {
    let (client, peer) = listener.accept()?;
    client.set_nonblocking(true)?;
    let peer = peer.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((TcpStream::from_std(client.into())?, peer))
}

/// One attempt to connect, up to and including the PROXY protocol header.
async fn attempt(
    pool: &Pool,
    place: &Place,
    client: &TcpStream,
    peer: SocketAddr,
) -> io::Result<TcpStream> {
    let address = place.member.backend.address;
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    listen::prepare(&socket)?;
    let backend = TcpSocket::from_std_stream(socket.into()).connect(address).await?;
    if pool.service.proxy_protocol != ProxyProtocol::Off {
        let header = Header::new(pool.service.proxy_protocol, peer, client.local_addr()?);
        // A socket that is new has room for it.
        backend.writable().await?;
        if backend.try_write(header.as_bytes())? < header.as_bytes().len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(backend)
}

fn add_one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
