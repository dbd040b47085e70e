//! What each side of a peer channel says first, in the clear: that it is Baton, which versions of
//! the protocol it speaks, its cluster and its name. Nothing in it is secret, and nothing in it is
//! believed before the handshake has shown that both sides sent and saw the same.

use std::fmt;

use wincode::{SchemaRead, SchemaWrite};

use super::session::Refused;
use super::wire;

/// The version of the protocol that this program speaks best.
pub const NEWEST: u16 = 1;
/// The oldest it still speaks: the one before, once there is one.
pub const OLDEST: u16 = 1;

/// The first bytes of every connection.
pub(super) const MAGIC: [u8; 4] = *b"BTN\x01";
/// The longest name of a cluster or node, in bytes.
pub const LONGEST_NAME: usize = 64;
/// The longest hello.
pub(super) const LONGEST: usize = 4 + 2 * 3 + 2 * (1 + LONGEST_NAME);

/// One life of a node: drawn anew at each start, so that its peers see that it has forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Hash, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct BootId(pub [u8; 16]);

/// Who a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of its cluster.
    pub cluster: String,
    /// Its own name.
    pub node: String,
    /// This life of it.
    pub boot: BootId,
}

/// A hello.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
pub struct Hello {
    /// The oldest version of the protocol that it speaks.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
    /// Its cluster.
    pub cluster: String,
    /// Its name.
    pub node: String,
}

impl BootId {
    /// A new one.
    ///
    /// # Errors
    ///
    /// The kernel's, where `/dev/urandom` can't be read.
    pub fn draw() -> std::io::Result<Self> {
        super::key::random().map(Self)
    }
}

impl fmt::Debug for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Its first four bytes, enough to tell lives apart in a log.
impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Hello {
    pub(super) fn of(identity: &Identity) -> Self {
        Self {
            oldest: OLDEST,
            newest: NEWEST,
            cluster: identity.cluster.clone(),
            node: identity.node.clone(),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(wire::encode(self));
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Refused> {
        let body = bytes.strip_prefix(&MAGIC).ok_or(Refused::NotBaton)?;
        if bytes.len() > LONGEST {
            return Err(Refused::NotBaton);
        }
        let hello: Self = wire::decode(body).map_err(|_| Refused::NotBaton)?;
        let fits = |name: &str| !name.is_empty() && name.len() <= LONGEST_NAME;
        let printable = |name: &str| name.chars().all(|c| !c.is_control());
        let names = [&hello.cluster, &hello.node];
        if names.iter().all(|name| fits(name) && printable(name)) && hello.oldest <= hello.newest {
            Ok(hello)
        } else {
            Err(Refused::NotBaton)
        }
    }

    /// The newest version that both speak.
    pub(super) fn version_with(&self, other: &Self) -> Option<u16> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }
}
