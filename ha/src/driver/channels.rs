//! The peer channel's sockets: one connection to each peer, made by the node whose name comes
//! first, accepted by the other; opened again and again for as long as it is not there.
//!
//! Heartbeats go first. What others want to send waits in a queue of each peer's until the
//! connection has taken nearly all that came before, so that a heartbeat has little in front of it.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;

use crate::channel::hello::{BootId, Identity};
use crate::channel::key::ClusterKey;
use crate::channel::session::{Event, HANDSHAKE_TIME, Peer, Refused, Role, Session};
use crate::config::ChannelConfig;

/// Bytes that a connection has not taken; beyond that, what waits in queues goes on waiting.
const UNSENT: usize = 64 << 10;
/// Bytes that are read from one connection before others get their turn.
const READ: usize = 256 << 10;
/// Connections that were accepted and have not shown yet who they are.
const STRANGERS: usize = 8;
/// Connections that are accepted in one turn.
const ACCEPTS: usize = 4;
/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(200);
/// After a refusal that only an operator can mend.
const RETRY_REFUSED: Duration = Duration::from_secs(5);
/// An established connection on which nothing comes for so long is given up.
const SILENCE: Duration = Duration::from_secs(3);
/// Messages that wait for a connection to take them, per peer.
pub(super) const QUEUE: usize = 256;

/// A peer by its place in the configuration.
pub(super) type PeerPlace = usize;

/// What happened on the channels.
#[derive(Debug)]
pub(super) enum Happening {
    Up(PeerPlace, Peer),
    /// Ended; whether the other side closed it, which a dying process does.
    Down(PeerPlace, String, Ended),
    /// Never came about, for a reason that an operator can mend.
    Refused(PeerPlace, Refused),
    /// Somebody else: from an address of no peer, or of nobody who is one.
    Stranger(IpAddr, String),
    Message(PeerPlace, Vec<u8>),
    Trouble(String),
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The other side closed or reset it: its process has ended, or ended it.
    ByPeer,
    /// By this side, or the network.
    Here,
}

/// This node on the channel.
struct Local {
    identity: Identity,
    key: ClusterKey,
    /// Where it listens, and from where it connects.
    address: SocketAddr,
}

/// Every channel.
pub(super) struct Channels {
    local: Local,
    listener: Option<TcpListener>,
    listen_at: Option<Instant>,
    strangers: Vec<Open>,
    pub(super) peers: Vec<ChannelPeer>,
    happened: VecDeque<Happening>,
}

/// A peer's channel.
pub(super) struct ChannelPeer {
    pub(super) name: String,
    address: SocketAddr,
    role: Role,
    link: Link,
    queue: mpsc::Receiver<Vec<u8>>,
    /// Why the last attempt failed, while there is no connection.
    pub(super) why: Option<String>,
    /// Since when there is one.
    pub(super) since: Option<Instant>,
    pub(super) peer: Option<Peer>,
    pub(super) sent: u64,
    pub(super) received: u64,
}

type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

enum Link {
    /// Not before this time; `None`: the other side connects.
    Idle(Option<Instant>),
    Connecting(Connecting, Instant),
    Open(Box<Open>),
}

/// A connection.
struct Open {
    stream: TcpStream,
    session: Session,
    remote: IpAddr,
    /// When it is given up, if nothing comes.
    deadline: Instant,
}

impl Local {
    fn session(&self, role: Role, expected: Vec<String>) -> Session {
        Session::new(role, self.identity.clone(), expected, self.key.clone())
    }
}

impl Channels {
    /// With the ends of the peers' queues.
    pub(super) fn new(
        config: &ChannelConfig,
        node: &str,
        boot: BootId,
        queues: Vec<mpsc::Receiver<Vec<u8>>>,
    ) -> Self {
        let identity = Identity { cluster: config.cluster.clone(), node: node.to_owned(), boot };
        let now = Instant::now();
        let peers = config.peers.iter().zip(queues).map(|(peer, queue)| {
            let role = if *node < *peer.name { Role::Initiator } else { Role::Responder };
            ChannelPeer {
                name: peer.name.clone(),
                address: peer.address,
                role,
                link: Link::Idle((role == Role::Initiator).then_some(now)),
                queue,
                why: None,
                since: None,
                peer: None,
                sent: 0,
                received: 0,
            }
        });
        let peers: Vec<_> = peers.collect();
        let listens = peers.iter().any(|peer| peer.role == Role::Responder);
        Self {
            local: Local { identity, key: config.key.clone(), address: config.address },
            listener: None,
            listen_at: listens.then_some(now),
            strangers: Vec::new(),
            peers,
            happened: VecDeque::new(),
        }
    }

    /// Ready while there is something to do for [`Channels::work`].
    pub(super) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut ready = !self.happened.is_empty();
        if let Some(listener) = &self.listener
            && let Poll::Ready(accepted) = listener.poll_accept(context)
        {
            self.accepted(accepted);
            ready = true;
        }
        for open in &mut self.strangers {
            ready |= open.poll_ready(context);
        }
        for peer in &mut self.peers {
            ready |= peer.poll_ready(context);
        }
        if ready { Poll::Ready(()) } else { Poll::Pending }
    }

    /// When [`Channels::work`] is wanted without anything being ready.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let strangers = self.strangers.iter().map(|open| open.deadline);
        let peers = self.peers.iter().filter_map(|peer| match &peer.link {
            Link::Idle(at) => *at,
            Link::Connecting(_, at) => Some(*at),
            Link::Open(open) => Some(open.deadline),
        });
        strangers.chain(peers).chain(self.listen_at).min()
    }

    /// Reads, writes, connects, gives up.
    pub(super) fn work(&mut self, now: Instant) {
        if self.listen_at.take_if(|at| *at <= now).is_some() {
            match listen(self.local.address) {
                Ok(listener) => self.listener = Some(listener),
                Err(error) => {
                    self.listen_at = Some(now + 5 * RETRY);
                    let what = format!("listen for peers on {}: {error}", self.local.address);
                    self.happened.push_back(Happening::Trouble(what));
                }
            }
        }
        for _ in 0..ACCEPTS {
            let Some(listener) = &self.listener else { break };
            let mut context = Context::from_waker(std::task::Waker::noop());
            match listener.poll_accept(&mut context) {
                Poll::Ready(accepted) => self.accepted(accepted),
                Poll::Pending => break,
            }
        }
        self.meet(now);
        for (place, peer) in self.peers.iter_mut().enumerate() {
            peer.work(now, place, &self.local, &mut self.happened);
        }
    }

    /// What has happened, in order.
    pub(super) fn poll_happening(&mut self) -> Option<Happening> {
        self.happened.pop_front()
    }

    /// Sends a message, before whatever waits in the queue. Whether there is a connection.
    pub(super) fn send(&mut self, place: PeerPlace, message: &[u8]) -> bool {
        self.peers[place].send(message)
    }

    /// Ends a connection whose other end is not to be relied on.
    pub(super) fn end(&mut self, now: Instant, place: PeerPlace, why: &str) {
        self.peers[place].down(now, place, why.to_owned(), Ended::Here, &mut self.happened);
    }

    fn accepted(&mut self, accepted: io::Result<(TcpStream, SocketAddr)>) {
        let (stream, remote) = match accepted {
            Ok((stream, remote)) => (stream, remote.ip().to_canonical()),
            Err(error) => {
                let what = format!("accept a peer's connection: {error}");
                return self.happened.push_back(Happening::Trouble(what));
            }
        };
        let expected: Vec<String> = self
            .peers
            .iter()
            .filter(|peer| peer.role == Role::Responder && peer.address.ip() == remote)
            .map(|peer| peer.name.clone())
            .collect();
        let why = if expected.is_empty() {
            "no peer that connects to this node has that address"
        } else if self.strangers.len() >= STRANGERS {
            "too many connections have not shown yet who they are"
        } else {
            prepare(&stream);
            let session = self.local.session(Role::Responder, expected);
            let deadline = Instant::now() + HANDSHAKE_TIME;
            self.strangers.push(Open { stream, session, remote, deadline });
            return;
        };
        self.happened.push_back(Happening::Stranger(remote, why.to_owned()));
    }

    /// Goes on with those who have not shown yet who they are.
    fn meet(&mut self, now: Instant) {
        for mut open in std::mem::take(&mut self.strangers) {
            match open.work(now) {
                Ok(()) => match open.session.poll_event() {
                    Some(Event::Established(peer)) => self.established(now, open, peer),
                    Some(Event::Message(_)) | None if open.deadline <= now => {
                        let why = "it did not say who it is in time".to_owned();
                        self.happened.push_back(Happening::Stranger(open.remote, why));
                    }
                    Some(Event::Message(_)) | None => self.strangers.push(open),
                },
                Err(Broken::Refused(refused)) => {
                    // It is told why.
                    let _ = open.flush();
                    let place = self.peers.iter().position(|peer| {
                        peer.role == Role::Responder && peer.address.ip() == open.remote
                    });
                    match place {
                        Some(place) => {
                            self.peers[place].why = Some(refused.to_string());
                            self.happened.push_back(Happening::Refused(place, refused));
                        }
                        None => {
                            let why = refused.to_string();
                            self.happened.push_back(Happening::Stranger(open.remote, why));
                        }
                    }
                }
                Err(Broken::Closed(why, _)) => {
                    self.happened.push_back(Happening::Stranger(open.remote, why));
                }
            }
        }
    }

    fn established(&mut self, now: Instant, open: Open, peer: Peer) {
        let Some(place) = self.peers.iter().position(|known| known.name == peer.node) else {
            return;
        };
        // It has come again: the older connection is one that it has given up.
        if matches!(self.peers[place].link, Link::Open(_)) {
            let why = "it has connected anew".to_owned();
            self.peers[place].down(now, place, why, Ended::Here, &mut self.happened);
        }
        self.peers[place].up(now, place, open, peer, &mut self.happened);
    }
}

impl ChannelPeer {
    /// Whether messages can be sent.
    pub(super) fn is_up(&self) -> bool {
        self.peer.is_some()
    }

    fn poll_ready(&mut self, context: &mut Context<'_>) -> bool {
        match &mut self.link {
            Link::Idle(_) => false,
            Link::Connecting(connecting, _) => match connecting.as_mut().poll(context) {
                Poll::Ready(connected) => {
                    // Kept for `work`, which does the rest.
                    *connecting = Box::pin(std::future::ready(connected));
                    true
                }
                Poll::Pending => false,
            },
            Link::Open(open) => {
                let mut ready = open.poll_ready(context);
                while open.has_room()
                    && let Poll::Ready(Some(message)) = self.queue.poll_recv(context)
                {
                    open.session.send(&message);
                    self.sent += 1;
                    ready = true;
                }
                ready
            }
        }
    }

    fn work(
        &mut self,
        now: Instant,
        place: PeerPlace,
        local: &Local,
        happened: &mut VecDeque<Happening>,
    ) {
        match &mut self.link {
            Link::Idle(at) if at.is_some_and(|at| at <= now) => {
                let connecting = connect(self.address, local.address.ip());
                self.link = Link::Connecting(Box::pin(connecting), now + HANDSHAKE_TIME);
            }
            Link::Idle(_) => {}
            Link::Connecting(connecting, deadline) => {
                let mut context = Context::from_waker(std::task::Waker::noop());
                match connecting.as_mut().poll(&mut context) {
                    Poll::Ready(Ok(stream)) => {
                        prepare(&stream);
                        let expected = vec![self.name.clone()];
                        let session = local.session(Role::Initiator, expected);
                        let remote = self.address.ip();
                        let deadline = *deadline;
                        self.link =
                            Link::Open(Box::new(Open { stream, session, remote, deadline }));
                        self.exchange(now, place, happened);
                    }
                    Poll::Ready(Err(error)) => {
                        self.fail(now, format!("connect to {}: {error}", self.address), RETRY);
                    }
                    Poll::Pending if *deadline <= now => {
                        self.fail(now, format!("{} does not answer", self.address), RETRY);
                    }
                    Poll::Pending => {}
                }
            }
            Link::Open(_) => self.exchange(now, place, happened),
        }
    }

    /// Reads and writes.
    fn exchange(&mut self, now: Instant, place: PeerPlace, happened: &mut VecDeque<Happening>) {
        let Link::Open(open) = &mut self.link else { return };
        let worked = open.work(now);
        let mut established = None;
        while let Some(event) = open.session.poll_event() {
            match event {
                Event::Established(peer) => established = Some(peer),
                Event::Message(message) => {
                    self.received += 1;
                    happened.push_back(Happening::Message(place, message));
                }
            }
        }
        let overdue = open.deadline <= now;
        if let Some(peer) = established {
            self.since = Some(now);
            self.why = None;
            self.peer = Some(peer.clone());
            happened.push_back(Happening::Up(place, peer));
        }
        match worked {
            Ok(()) if overdue && self.is_up() => {
                self.down(now, place, "it is silent".to_owned(), Ended::Here, happened);
            }
            Ok(()) if overdue => {
                self.fail(now, format!("{} does not answer", self.address), RETRY);
            }
            Ok(()) => {}
            Err(Broken::Closed(why, ended)) if self.is_up() => {
                self.down(now, place, why, ended, happened);
            }
            Err(Broken::Closed(why, _)) => self.fail(now, why, RETRY),
            Err(Broken::Refused(refused)) if self.is_up() => {
                self.down(now, place, refused.to_string(), Ended::Here, happened);
            }
            Err(Broken::Refused(refused)) => {
                self.fail(now, refused.to_string(), RETRY_REFUSED);
                happened.push_back(Happening::Refused(place, refused));
            }
        }
    }

    fn up(
        &mut self,
        now: Instant,
        place: PeerPlace,
        open: Open,
        peer: Peer,
        happened: &mut VecDeque<Happening>,
    ) {
        self.link = Link::Open(Box::new(open));
        self.since = Some(now);
        self.why = None;
        self.peer = Some(peer.clone());
        happened.push_back(Happening::Up(place, peer));
        self.exchange(now, place, happened);
    }

    fn down(
        &mut self,
        now: Instant,
        place: PeerPlace,
        why: String,
        ended: Ended,
        happened: &mut VecDeque<Happening>,
    ) {
        if !self.is_up() {
            return;
        }
        self.fail(now, why.clone(), Duration::ZERO);
        happened.push_back(Happening::Down(place, why, ended));
    }

    fn fail(&mut self, now: Instant, why: String, retry: Duration) {
        self.link = Link::Idle((self.role == Role::Initiator).then(|| now + retry));
        self.since = None;
        self.peer = None;
        self.why = Some(why);
        // What was to be sent was for a session that is gone.
        while self.queue.try_recv().is_ok() {}
    }

    fn send(&mut self, message: &[u8]) -> bool {
        let Link::Open(open) = &mut self.link else { return false };
        if !open.session.is_established() {
            return false;
        }
        open.session.send(message);
        self.sent += 1;
        // At once: the rest goes when there is room. What fails shows when it is read.
        let _ = open.flush();
        true
    }
}

/// Why a connection is over.
enum Broken {
    Closed(String, Ended),
    Refused(Refused),
}

impl Open {
    fn has_room(&self) -> bool {
        self.session.is_established() && self.session.unsent().len() < UNSENT
    }

    fn poll_ready(&self, context: &mut Context<'_>) -> bool {
        let readable = self.stream.poll_read_ready(context).is_ready();
        let unsent = !self.session.unsent().is_empty();
        readable || unsent && self.stream.poll_write_ready(context).is_ready()
    }

    fn work(&mut self, now: Instant) -> Result<(), Broken> {
        let read = self.read(now);
        let written = self.flush();
        read?;
        written.map_err(|error| Broken::Closed(error.to_string(), ended_by(&error)))
    }

    fn read(&mut self, now: Instant) -> Result<(), Broken> {
        let mut buffer = [0; 16 << 10];
        let mut total = 0;
        while total < READ {
            match self.stream.try_read(&mut buffer) {
                Ok(0) => {
                    let why = "it has closed the connection".to_owned();
                    return Err(Broken::Closed(why, Ended::ByPeer));
                }
                Ok(length) => {
                    total += length;
                    self.session.receive(&buffer[..length]).map_err(Broken::Refused)?;
                    if self.session.is_established() {
                        self.deadline = now + SILENCE;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(Broken::Closed(error.to_string(), ended_by(&error))),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.session.unsent().is_empty() {
            match self.stream.try_write(self.session.unsent()) {
                Ok(length) => self.session.sent(length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn ended_by(error: &io::Error) -> Ended {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Ended::ByPeer,
        _ => Ended::Here,
    }
}

/// As every connection of the channel is: in front of other traffic, and never held back to be
/// sent together with what comes later. What fails here is a matter of speed.
fn prepare(stream: &TcpStream) {
    /// CS6, network control (RFC 4594).
    const CLASS: u32 = 0xc0;
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true);
    let _ = match stream.peer_addr() {
        Ok(SocketAddr::V4(_)) => socket.set_tos_v4(CLASS),
        Ok(SocketAddr::V6(_)) | Err(_) => socket.set_tclass_v6(CLASS),
    };
    let _ = socket.set_tcp_user_timeout(Some(SILENCE));
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    // The address may come later than we do.
    if address.is_ipv6() {
        socket.set_freebind_v6(true)?;
        socket.set_only_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(16)?;
    TcpListener::from_std(socket.into())
}

/// From the address that the peer knows this node by.
async fn connect(address: SocketAddr, from: IpAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.bind(SocketAddr::new(from, 0))?;
    socket.connect(address).await
}
