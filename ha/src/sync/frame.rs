//! What the two ends of replication say to each other. Each frame is one message of the peer
//! channel.

use std::net::IpAddr;

use wincode::{SchemaRead, SchemaWrite};

use super::flow::{Affinity, Change, Flow};
use crate::channel::hello::BootId;

/// A place in a source's journal. It stands for the state of its table at that place only while
/// that node has not stopped being Active in between, so life and epoch belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Position {
    /// The source's life.
    pub boot: BootId,
    /// Which of its times of being Active.
    pub epoch: u64,
    /// All changes before this one are applied.
    pub seq: u64,
}

/// Which flows are sent.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Scope {
    /// All.
    All,
    /// Those of some buckets.
    Buckets(Vec<u16>),
}

/// The flows of a bucket, summed up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct BucketSum {
    /// How many.
    pub flows: u32,
    /// The sum of their identities, modulo 2⁶⁴: hashes of service, client, backend and port, by
    /// their addresses, so the same on every node.
    pub sum: u64,
}

/// What a number of the source's means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Name {
    /// A service.
    Service {
        /// Its number.
        number: u16,
        /// Its VIP.
        vip: IpAddr,
        /// Its port.
        port: u16,
        /// IP protocol number.
        protocol: u8,
    },
    /// A backend.
    Backend {
        /// Its number.
        number: u16,
        /// The number of its service.
        service: u16,
        /// Its address.
        address: IpAddr,
        /// Its port.
        port: u16,
    },
}

/// What the comparison of a digest came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Compared {
    /// Buckets that could be compared: nothing has changed them meanwhile.
    pub buckets: u32,
    /// Buckets of these that differ.
    pub different: u32,
    /// Flows that the source has in the compared ones.
    pub flows: u64,
    /// Flows of these that the receiver has for certain: those in buckets that are the same.
    pub kept: u64,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Frame {
    /// Receiver: send me your flows. With a place: only what came after it, if you still know.
    Subscribe {
        /// Which subscription of this receiver's life: the answer to an older one is none.
        run: u64,
        /// What the receiver has; `None`: everything is wanted.
        have: Option<Position>,
    },
    /// Source: not Active, nothing to send.
    NotActive,
    /// Source: what follows belongs to that subscription, and frames are counted from here.
    Subscribed {
        /// As it was asked for.
        run: u64,
    },
    /// Source: what numbers mean, before they are used. A number that is named again means
    /// something else from then on.
    Names(Vec<Name>),
    /// Source: changes in the order in which they happened.
    Delta {
        /// Where the first one is; the next frame's first is behind the last.
        first: Position,
        /// The changes.
        changes: Vec<Change>,
    },
    /// Source: flows follow, as they are now.
    Begin(Scope),
    /// Source: some of them.
    Slice(Vec<Flow>),
    /// Source: which backends clients keep to; of a snapshot of everything, after the flows.
    Affinities(Vec<Affinity>),
    /// Source: that were all; whatever else the receiver has of that scope is no more.
    End {
        /// Where the journal is now.
        at: Position,
    },
    /// Source: sums of a run of buckets, `None` where something has changed meanwhile. The frames
    /// of a digest follow each other with nothing in between.
    Digest {
        /// The first bucket.
        first: u16,
        /// As many as there are.
        sums: Vec<Option<BucketSum>>,
    },
    /// Receiver: these differ, send them again.
    Repair(Vec<u16>),
    /// Receiver: what a digest came to.
    Compared(Compared),
    /// Receiver: so many frames of its last subscription are applied.
    Ack {
        /// Frames.
        frames: u64,
    },
}

impl Frame {
    /// Whether it tells a receiver what the flows are.
    pub fn tells_flows(&self) -> bool {
        match self {
            Self::Subscribed { .. }
            | Self::Names(_)
            | Self::Delta { .. }
            | Self::Begin(_)
            | Self::Slice(_)
            | Self::Affinities(_)
            | Self::End { .. }
            | Self::Digest { .. } => true,
            Self::Subscribe { .. }
            | Self::NotActive
            | Self::Repair(_)
            | Self::Compared(_)
            | Self::Ack { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::channel::wire::{LONGEST_FRAME, decode, encode};
    use crate::sync::{BATCH, FlowKey};

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
            any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
        ]
    }

    prop_compose! {
        fn key()(service: u16, client in address(), port: u16) -> FlowKey {
            FlowKey { service, client, port }
        }
    }

    prop_compose! {
        fn flow()(
            key in key(), backend: u16, nat_port: u16, flags: u8, reply_flags: u8, idle_ms: u32,
            age_s: u32,
        ) -> Flow {
            Flow { key, backend, nat_port, flags, reply_flags, idle_ms, age_s }
        }
    }

    prop_compose! {
        fn affinity()(service: u16, client in address(), backend: u16, age_ms: u32) -> Affinity {
            Affinity { service, client, backend, age_ms }
        }
    }

    prop_compose! {
        fn position()(boot: [u8; 16], epoch: u64, seq: u64) -> Position {
            Position { boot: BootId(boot), epoch, seq }
        }
    }

    fn name() -> impl Strategy<Value = Name> {
        (any::<[u16; 3]>(), address(), any::<Option<u8>>()).prop_map(
            |([number, port, service], address, protocol)| match protocol {
                Some(protocol) => Name::Service { number, vip: address, port, protocol },
                None => Name::Backend { number, service, address, port },
            },
        )
    }

    fn some<T: std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
        prop::collection::vec(of, 0..20)
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let change = prop_oneof![flow().prop_map(Change::Put), key().prop_map(Change::End)];
        let sum = (any::<bool>(), any::<u32>(), any::<u64>())
            .prop_map(|(known, flows, sum)| known.then_some(BucketSum { flows, sum }));
        let scope = prop_oneof![Just(Scope::All), some(any::<u16>()).prop_map(Scope::Buckets)];
        prop_oneof![
            (any::<u64>(), prop::option::of(position()))
                .prop_map(|(run, have)| Frame::Subscribe { run, have }),
            any::<u64>().prop_map(|run| Frame::Subscribed { run }),
            Just(Frame::NotActive),
            some(name()).prop_map(Frame::Names),
            (position(), some(change)).prop_map(|(first, changes)| Frame::Delta { first, changes }),
            scope.prop_map(Frame::Begin),
            some(flow()).prop_map(Frame::Slice),
            some(affinity()).prop_map(Frame::Affinities),
            position().prop_map(|at| Frame::End { at }),
            (any::<u16>(), some(sum)).prop_map(|(first, sums)| Frame::Digest { first, sums }),
            some(any::<u16>()).prop_map(Frame::Repair),
            any::<[u32; 4]>().prop_map(|[buckets, different, flows, kept]| {
                let (flows, kept) = (flows.into(), kept.into());
                Frame::Compared(Compared { buckets, different, flows, kept })
            }),
            any::<u64>().prop_map(|frames| Frame::Ack { frames }),
        ]
    }

    proptest! {
        #[test]
        fn frames_are_written_as_bincode_writes_them(frame in frame()) {
            let bytes = encode(&frame);
            let theirs = bincode::encode_to_vec(&frame, bincode::config::standard()).unwrap();
            prop_assert_eq!(&bytes, &theirs);
            prop_assert_eq!(decode::<Frame>(&bytes).unwrap(), frame);
            for length in 0..bytes.len() {
                prop_assert!(decode::<Frame>(&bytes[..length]).is_err());
            }
            prop_assert!(decode::<Frame>(&[bytes, vec![0]].concat()).is_err());
        }

        #[test]
        fn any_bytes_are_a_frame_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(frame) = decode::<Frame>(&bytes) {
                // What is read can be written, though not always as it was: zeros may be padded.
                prop_assert_eq!(decode::<Frame>(&encode(&frame)).unwrap(), frame);
            }
        }
    }

    #[test]
    fn a_length_that_is_a_lie_reserves_no_memory() {
        // A slice of 2^63 flows.
        let mut bytes = encode(&Frame::Slice(Vec::new()));
        bytes.pop();
        bytes.push(0xfd);
        bytes.extend((1_u64 << 63).to_le_bytes());
        assert!(decode::<Frame>(&bytes).is_err());
    }

    #[test]
    fn the_longest_frames_fit_and_a_flow_is_small() {
        let key = FlowKey {
            service: u16::MAX,
            client: Ipv6Addr::from_bits(u128::MAX).into(),
            port: u16::MAX,
        };
        let flow = Flow {
            key,
            backend: u16::MAX,
            nat_port: u16::MAX,
            flags: 255,
            reply_flags: 255,
            idle_ms: u32::MAX,
            age_s: u32::MAX,
        };
        let affinity =
            Affinity { service: u16::MAX, client: key.client, backend: u16::MAX, age_ms: u32::MAX };
        let position = Position { boot: BootId([255; 16]), epoch: u64::MAX, seq: u64::MAX };
        let largest =
            Name::Service { number: u16::MAX, vip: key.client, port: u16::MAX, protocol: 255 };
        let sum = Some(BucketSum { flows: u32::MAX, sum: u64::MAX });
        for frame in [
            Frame::Delta { first: position, changes: vec![Change::Put(flow); BATCH] },
            Frame::Slice(vec![flow; BATCH]),
            Frame::Affinities(vec![affinity; BATCH]),
            Frame::Names(vec![largest; BATCH]),
            Frame::Digest { first: 0, sums: vec![sum; 1024] },
            Frame::Repair(vec![u16::MAX; crate::sync::receiver::MOST_REPAIRED]),
            Frame::Begin(Scope::Buckets(vec![u16::MAX; crate::sync::receiver::MOST_REPAIRED])),
        ] {
            let length = encode(&frame).len();
            assert!(length <= LONGEST_FRAME, "{length}");
        }
        assert!(encode(&flow).len() <= 48, "{}", encode(&flow).len());
        let v4 = FlowKey { client: Ipv4Addr::new(192, 0, 2, 1).into(), service: 3, ..key };
        let usual = Flow {
            key: v4,
            backend: 40,
            idle_ms: 2000,
            age_s: 60,
            flags: 0,
            reply_flags: 4,
            ..flow
        };
        println!("IPv4 {}, the longest {}", encode(&usual).len(), encode(&flow).len());
        assert!(encode(&usual).len() <= 24, "{}", encode(&usual).len());
    }
}
