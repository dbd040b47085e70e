//! One connection of the peer channel, from bytes to messages and back.
//!
//! Pure: it is fed with what the socket gave ([`Session::receive`]), and says what the socket is to
//! take ([`Session::unsent`]). Whoever drives it bounds the time that a handshake may take
//! ([`HANDSHAKE_TIME`]) and closes the socket when [`Refused`] comes back, after the last bytes,
//! which tell the other side why.
//!
//! On the wire: a length of two bytes (big endian), then a part. Parts: initiator's hello,
//! responder's hello, the two messages of the handshake, then encrypted messages. Instead of a hello
//! or the handshake's second message, the responder may send a refusal, in the clear; it is shown,
//! and never believed any further.

use std::collections::VecDeque;
use std::time::Duration;

use snow::{HandshakeState, TransportState};
use wincode::{SchemaRead, SchemaWrite};

use super::hello::{self, BootId, Hello, Identity, MAGIC};
use super::key::ClusterKey;
use super::wire::{self, LONGEST_FRAME};

/// How long it may take until a session is established; then the driver ends it.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(3);

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
/// What encryption adds to a message.
const TAG: usize = 16;
/// Bytes of a part's length.
const PREFIX: usize = 2;
/// The longest part before the session is established, so that a stranger can't make us hold more.
const LONGEST_EARLY: usize = 256;
/// What a refusal begins with, where a hello or a message of the handshake could be.
const REFUSAL: [u8; 4] = *b"BTN!";

/// Who began the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We did.
    Initiator,
    /// The other side did.
    Responder,
}

/// The other side of an established session. It has the cluster key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub node: String,
    /// This life of it.
    pub boot: BootId,
    /// The version that both speak.
    pub version: u16,
}

/// What came of received bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The other side has shown that it has the key and is there now.
    Established(Peer),
    /// A message of its.
    Message(Vec<u8>),
}

/// Why a session ended, or never came to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The other side speaks something else.
    #[error("what listens there is not a Baton node's peer channel")]
    NotBaton,
    /// No version in common.
    #[error("it speaks versions {0} to {1} of the peer protocol, this node {OLDEST} to {NEWEST}: update the older one", OLDEST = hello::OLDEST, NEWEST = hello::NEWEST)]
    Version(u16, u16),
    /// Another cluster.
    #[error(
        "it belongs to cluster `{0}`: one of the two has a wrong `cluster` or a wrong peer address"
    )]
    Cluster(String),
    /// It has our own name.
    #[error("it has this node's own name `{0}`: nodes of a cluster need different names")]
    SameName(String),
    /// A name that no peer in the configuration has.
    #[error("it is `{0}`, which is not the peer that the configuration has at this address")]
    Stranger(String),
    /// It has another key.
    #[error("its cluster key is another one: copy the key file of one node to the others")]
    Key,
    /// An established session broke: a message was changed, left out or repeated on the way.
    #[error("a message was not authentic")]
    Tampered,
    /// It refused us.
    #[error("it refuses this node: {0}")]
    ByPeer(Refusal),
}

/// What one side tells the other about a refusal; not authenticated, so only shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite, thiserror::Error)]
pub enum Refusal {
    /// No version in common.
    #[error("no version of the peer protocol in common; update the older one")]
    Version,
    /// Another cluster.
    #[error("it belongs to another cluster")]
    Cluster,
    /// The name is its own, or none that it knows.
    #[error("this node's name is its own, or is none of its peers'")]
    Name,
    /// Another key.
    #[error("this node's cluster key is another one")]
    Key,
}

/// A session.
#[derive(Debug)]
pub struct Session {
    local: Identity,
    /// Who may be at the other end.
    expected: Vec<String>,
    key: ClusterKey,
    role: Role,
    state: State,
    received: Vec<u8>,
    unsent: Vec<u8>,
    events: VecDeque<Event>,
    /// Where messages are encrypted and decrypted.
    buffer: Vec<u8>,
}

#[derive(Debug)]
enum State {
    /// The other side's hello is to come.
    Hello {
        sent: Vec<u8>,
    },
    /// Its message of the handshake is to come.
    Handshake {
        noise: Box<HandshakeState>,
        peer: Hello,
        version: u16,
    },
    /// Its first encrypted message is to come: only that shows a responder that the initiator is
    /// there now, and no recording. It is empty.
    Proof {
        noise: Box<TransportState>,
        peer: Peer,
    },
    Established {
        noise: Box<TransportState>,
    },
    Over,
}

impl Session {
    /// A session that is about to begin. `expected` are the names that the other side may have.
    pub fn new(role: Role, local: Identity, expected: Vec<String>, key: ClusterKey) -> Self {
        let sent = Hello::of(&local).encode();
        let mut session = Self {
            local,
            expected,
            key,
            role,
            state: State::Hello { sent: sent.clone() },
            received: Vec::with_capacity(PREFIX + LONGEST_FRAME + TAG),
            unsent: Vec::with_capacity(2 * LONGEST_FRAME),
            events: VecDeque::new(),
            buffer: vec![0; LONGEST_FRAME + TAG],
        };
        if role == Role::Initiator {
            session.put(&sent);
        }
        session
    }

    /// Whether messages can be sent.
    pub fn is_established(&self) -> bool {
        matches!(self.state, State::Established { .. })
    }

    /// Takes in what the socket gave.
    ///
    /// # Errors
    ///
    /// Why the session is over. What is in [`Session::unsent`] then may still be sent.
    pub fn receive(&mut self, mut bytes: &[u8]) -> Result<(), Refused> {
        while !bytes.is_empty() {
            let wanted = self.wanted()?;
            let (now, later) = bytes.split_at(bytes.len().min(wanted - self.received.len()));
            self.received.extend_from_slice(now);
            bytes = later;
            if self.received.len() >= PREFIX && self.received.len() == self.wanted()? {
                let part = std::mem::take(&mut self.received);
                let taken = self.take(&part[PREFIX..]);
                // Its memory is for the next one.
                self.received = part;
                self.received.clear();
                if let Err(refused) = taken {
                    self.end(&refused);
                    return Err(refused);
                }
            }
        }
        Ok(())
    }

    /// What has come of it, in order.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Encrypts a message. Nothing is sent before the session is established, nor after its end.
    ///
    /// # Panics
    ///
    /// If the message is longer than [`LONGEST_FRAME`].
    pub fn send(&mut self, message: &[u8]) {
        assert!(message.len() <= LONGEST_FRAME, "a message is a frame at most");
        if let State::Established { noise } = &mut self.state {
            encrypt(noise, message, &mut self.buffer, &mut self.unsent);
        }
    }

    /// What the socket is to take.
    pub fn unsent(&self) -> &[u8] {
        &self.unsent
    }

    /// The socket has taken so many bytes of it.
    pub fn sent(&mut self, bytes: usize) {
        self.unsent.drain(..bytes);
    }

    /// How long the part that is being received is, with its length; known from its first bytes.
    fn wanted(&self) -> Result<usize, Refused> {
        let Some(&[high, low]) = self.received.first_chunk() else { return Ok(PREFIX) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        match self.state {
            State::Over => Err(Refused::Tampered),
            State::Established { .. } if length > LONGEST_FRAME + TAG => Err(Refused::Tampered),
            State::Established { .. } => Ok(PREFIX + length),
            _ if length > LONGEST_EARLY => Err(Refused::NotBaton),
            _ => Ok(PREFIX + length),
        }
    }

    fn take(&mut self, part: &[u8]) -> Result<(), Refused> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Hello { sent } => self.take_hello(&sent, part),
            State::Handshake { noise, peer, version } => {
                self.take_handshake(*noise, peer, version, part)
            }
            State::Proof { mut noise, peer } => {
                match noise.read_message(part, &mut self.buffer) {
                    Ok(0) => {}
                    Ok(_) | Err(_) => return Err(Refused::Tampered),
                }
                self.state = State::Established { noise };
                self.events.push_back(Event::Established(peer));
                Ok(())
            }
            State::Established { mut noise } => {
                let length =
                    noise.read_message(part, &mut self.buffer).map_err(|_| Refused::Tampered)?;
                self.state = State::Established { noise };
                self.events.push_back(Event::Message(self.buffer[..length].to_vec()));
                Ok(())
            }
            State::Over => Err(Refused::Tampered),
        }
    }

    fn take_hello(&mut self, sent: &[u8], part: &[u8]) -> Result<(), Refused> {
        if let Some(refusal) = part.strip_prefix(&REFUSAL) {
            return Err(refusal_in(refusal));
        }
        let peer = Hello::decode(part)?;
        let version = Hello::of(&self.local)
            .version_with(&peer)
            .ok_or(Refused::Version(peer.oldest, peer.newest))?;
        if peer.cluster != self.local.cluster {
            return Err(Refused::Cluster(peer.cluster));
        }
        if peer.node == self.local.node {
            return Err(Refused::SameName(peer.node));
        }
        if !self.expected.contains(&peer.node) {
            return Err(Refused::Stranger(peer.node));
        }
        let (first, second) = match self.role {
            Role::Initiator => (sent, part),
            Role::Responder => (part, sent),
        };
        let prologue = [first, second].concat();
        let mut noise = Box::new(self.noise(&prologue));
        match self.role {
            Role::Initiator => {
                let boot = self.local.boot.0;
                let length = noise
                    .write_message(&boot, &mut self.buffer)
                    .expect("the first message of the handshake is the initiator's");
                put(&mut self.unsent, &self.buffer[..length]);
            }
            Role::Responder => self.put(sent),
        }
        self.state = State::Handshake { noise, peer, version };
        Ok(())
    }

    fn noise(&self, prologue: &[u8]) -> HandshakeState {
        let pattern = PATTERN.parse().expect("the pattern is one that snow knows");
        let builder = snow::Builder::new(pattern)
            .psk(0, self.key.bytes())
            .and_then(|builder| builder.prologue(prologue))
            .expect("key and prologue are set once");
        let built = match self.role {
            Role::Initiator => builder.build_initiator(),
            Role::Responder => builder.build_responder(),
        };
        built.expect("this pattern needs nothing else")
    }

    fn take_handshake(
        &mut self,
        mut noise: HandshakeState,
        hello: Hello,
        version: u16,
        part: &[u8],
    ) -> Result<(), Refused> {
        if let (Role::Initiator, Some(refusal)) = (self.role, part.strip_prefix(&REFUSAL)) {
            return Err(refusal_in(refusal));
        }
        let length = noise.read_message(part, &mut self.buffer).map_err(|_| Refused::Key)?;
        let boot = self.buffer[..length].try_into().map_err(|_| Refused::NotBaton)?;
        let peer = Peer { node: hello.node, boot: BootId(boot), version };
        if self.role == Role::Responder {
            let boot = self.local.boot.0;
            let length = noise
                .write_message(&boot, &mut self.buffer)
                .expect("the second message of the handshake is the responder's");
            put(&mut self.unsent, &self.buffer[..length]);
        }
        let mut noise =
            Box::new(noise.into_transport_mode().expect("both messages have been exchanged"));
        match self.role {
            Role::Responder => self.state = State::Proof { noise, peer },
            Role::Initiator => {
                encrypt(&mut noise, &[], &mut self.buffer, &mut self.unsent);
                self.state = State::Established { noise };
                self.events.push_back(Event::Established(peer));
            }
        }
        Ok(())
    }

    fn put(&mut self, part: &[u8]) {
        put(&mut self.unsent, part);
    }

    /// Tells the other side, where it can make use of it.
    fn end(&mut self, refused: &Refused) {
        self.state = State::Over;
        let refusal = match refused {
            Refused::Version(..) => Refusal::Version,
            Refused::Cluster(_) => Refusal::Cluster,
            Refused::SameName(_) | Refused::Stranger(_) => Refusal::Name,
            Refused::Key => Refusal::Key,
            Refused::NotBaton | Refused::Tampered | Refused::ByPeer(_) => return,
        };
        if self.role == Role::Responder {
            let part = [REFUSAL.as_slice(), &wire::encode(&refusal)].concat();
            self.put(&part);
        }
    }
}

fn refusal_in(bytes: &[u8]) -> Refused {
    wire::decode(bytes).map_or(Refused::NotBaton, Refused::ByPeer)
}

fn encrypt(noise: &mut TransportState, message: &[u8], buffer: &mut [u8], unsent: &mut Vec<u8>) {
    let length = noise
        .write_message(message, buffer)
        .expect("the buffer holds the longest message, and nonces don't run out");
    put(unsent, &buffer[..length]);
}

fn put(unsent: &mut Vec<u8>, part: &[u8]) {
    let length = u16::try_from(part.len()).expect("a part's length fits");
    unsent.extend(length.to_be_bytes());
    unsent.extend_from_slice(part);
}

// A refusal can't be taken for a hello.
const _: () = assert!(REFUSAL[3] != MAGIC[3]);

#[cfg(test)]
mod tests;
