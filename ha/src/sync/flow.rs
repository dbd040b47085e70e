//! A flow and its changes, as they go over the wire.
//!
//! Services and backends are numbers that the source gives them and tells in
//! [`super::Frame::Names`]; each node has numbers of its own. Times are ages: nodes share no clock.

use std::net::IpAddr;

use wincode::{SchemaRead, SchemaWrite};

/// Which flow: who talks to which service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct FlowKey {
    /// The source's number of the service.
    pub service: u16,
    /// The client's address.
    pub client: IpAddr,
    /// Its port.
    pub port: u16,
}

/// An established flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Flow {
    /// Which.
    pub key: FlowKey,
    /// The source's number of its backend.
    pub backend: u16,
    /// Its source port towards the backend.
    pub nat_port: u16,
    /// What the client's packets have shown; the datapath's bits.
    pub flags: u8,
    /// What the backend's have.
    pub reply_flags: u8,
    /// Time since its last packet in either direction, in milliseconds.
    pub idle_ms: u32,
    /// Time since its first one, in seconds.
    pub age_s: u32,
}

/// A client and the backend that its new flows to a service go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Affinity {
    /// The source's number of the service.
    pub service: u16,
    /// The client's address.
    pub client: IpAddr,
    /// The source's number of the backend.
    pub backend: u16,
    /// Time since a flow of its last began or ended, in milliseconds.
    pub age_ms: u32,
}

/// What happened to a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Change {
    /// It is established, or has been used.
    Put(Flow),
    /// It has ended.
    End(FlowKey),
}

impl FlowKey {
    /// Its bucket in the digests: the same on every node, whatever numbers they give.
    pub fn bucket(&self) -> u16 {
        let (high, low) = match self.client {
            IpAddr::V4(v4) => (0, u64::from(v4.to_bits())),
            IpAddr::V6(v6) => ((v6.to_bits() >> 64) as u64, v6.to_bits() as u64),
        };
        let mut hash = mix(high ^ 0x9e37_79b9_7f4a_7c15);
        hash = mix(hash ^ low);
        (mix(hash ^ u64::from(self.port)) >> 48) as u16
    }
}

impl Change {
    /// Whose.
    pub fn key(&self) -> &FlowKey {
        match self {
            Self::Put(flow) => &flow.key,
            Self::End(key) => key,
        }
    }
}

/// A good mixture of 64 bits (the finalizer of splitmix64).
pub(crate) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
