//! How flows get to the other nodes: state, replicated as state.
//!
//! * [`flow`]: a flow and a change of it, as they go over the wire.
//! * [`frame`]: what the two ends say to each other.
//! * [`journal`]: the sequenced, bounded list of changes.
//! * [`source`]: the end of the Active node: journal, snapshots, digests, for each peer.
//! * [`receiver`]: the end of a Backup: applies, acknowledges, compares.
//!
//! All of it pure. Neither end holds a flow: the flows are in the kernel's tables, and the ends
//! ask for walks of them ([`source::Output::Walk`], [`receiver::Output::Sum`]).
//!
//! A receiver begins out of sync. It subscribes; the source sends a *snapshot* (a walk of its
//! table, in slices) while *deltas* (the journal) go on, and at its end the receiver removes what
//! was not mentioned. What can go wrong later (a full journal, lost events, a receiver that was
//! away too long) has one way out: the same again. Since the frames of a session keep their order,
//! a change that a slice overtakes or repeats does no harm.
//!
//! *Affinities* (which backend a client keeps to) follow from the beginnings and ends of flows, so
//! deltas say nothing of them; a snapshot has those whose flows are over.
//!
//! *Anti-entropy* finds what went wrong without anybody noticing: now and then both ends sum up
//! their tables by [`BUCKETS`] buckets. Buckets that nothing has changed between the start of the
//! source's walk and the end of the receiver's must be the same; those that are not are sent again.

pub mod flow;
pub mod frame;
pub mod journal;
pub mod receiver;
pub mod source;

#[cfg(test)]
pub(crate) mod simulation;

pub use flow::{Affinity, Change, Flow, FlowKey};
pub use frame::Frame;

/// Buckets of the digests, by a hash of the client's address and port: enough that most of them
/// are quiet while a large table is walked.
pub const BUCKETS: usize = 1 << 16;

/// Frames on their way to a peer that it has not acknowledged.
pub const WINDOW: u64 = 64;

/// Flows or changes in one frame.
pub const BATCH: usize = 384;

/// A set of buckets.
#[derive(Clone, PartialEq, Eq)]
pub struct BucketSet(Box<[u64]>);

impl BucketSet {
    /// None of them.
    pub fn empty() -> Self {
        Self(vec![0; BUCKETS / 64].into())
    }

    /// Those of a list.
    pub fn of(buckets: &[u16]) -> Self {
        let mut set = Self::empty();
        buckets.iter().for_each(|&bucket| set.insert(bucket));
        set
    }

    /// Takes one in.
    pub fn insert(&mut self, bucket: u16) {
        self.0[usize::from(bucket) / 64] |= 1 << (bucket % 64);
    }

    /// Whether it is in.
    pub fn contains(&self, bucket: u16) -> bool {
        self.0[usize::from(bucket) / 64] & (1 << (bucket % 64)) != 0
    }

    /// Leaves none in.
    pub fn clear(&mut self) {
        self.0.fill(0);
    }
}

impl std::fmt::Debug for BucketSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let members: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        write!(f, "BucketSet({members} of {BUCKETS})")
    }
}
