//! Fencing: of two nodes that are Active, the one that became so later counts.
//!
//! Each time of being Active has a number, the epoch: one more than the highest that this node has
//! heard of. Heartbeats carry it. Adverts don't, since RFC 9568 gives them no room; what is known of
//! their sender by its heartbeats holds for them too.
//!
//! Pure: [`crate::driver`] feeds it and does what it says.

use std::time::Instant;

/// What this node knows of epochs.
#[derive(Debug)]
pub struct Fence {
    /// The highest that was heard of, or used.
    highest: u64,
    /// The one under which this node is Active.
    holding: Option<u64>,
    peers: Vec<Peer>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Peer {
    /// Under which epoch it says that it is Active, and until when its lease holds.
    active: Option<(u64, Instant)>,
    stale: bool,
}

/// What a heartbeat is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As much as any.
    Heeded,
    /// Its sender believes itself Active, and another has become so since: it is not to be heard.
    Stale,
    /// Its sender became Active later than this node, which no longer is: it must fall silent at
    /// once, whatever the priorities.
    Deposed,
}

impl Fence {
    /// With so many peers, told apart by their place; nobody is Active.
    pub fn new(peers: usize) -> Self {
        Self { highest: 0, holding: None, peers: vec![Peer::default(); peers] }
    }

    /// What this node's heartbeats say: the epoch under which it is Active, or the highest that it
    /// has heard of.
    pub fn epoch(&self) -> u64 {
        self.holding.unwrap_or(self.highest)
    }

    /// This node advertises as Active; under which epoch. A new one, if it did not before.
    pub fn hold(&mut self) -> u64 {
        *self.holding.get_or_insert_with(|| {
            self.highest += 1;
            self.highest
        })
    }

    /// The epoch under which this node is Active.
    pub fn holding(&self) -> Option<u64> {
        self.holding
    }

    /// An epoch that a handover named.
    pub fn heard_of(&mut self, epoch: u64) {
        self.highest = self.highest.max(epoch);
    }

    /// This node is Active no more.
    pub fn release(&mut self) {
        self.holding = None;
    }

    /// Takes in a peer's heartbeat: its epoch, and, of one that is Active, when its lease ends.
    pub fn hear(
        &mut self,
        now: Instant,
        place: usize,
        epoch: u64,
        lease_end: Option<Instant>,
    ) -> Verdict {
        self.highest = self.highest.max(epoch);
        let Some(lease_end) = lease_end else {
            self.forget(place);
            return Verdict::Heeded;
        };
        let mut others = self.peers.iter().enumerate().filter(|(other, _)| *other != place);
        let newer = |active: (u64, Instant)| active.0 > epoch && active.1 > now;
        let stale = self.holding.is_some_and(|holding| holding > epoch)
            || others.any(|(_, peer)| peer.active.is_some_and(newer));
        if let Some(peer) = self.peers.get_mut(place) {
            *peer = Peer { active: (!stale).then_some((epoch, lease_end)), stale };
        }
        match self.holding {
            _ if stale => Verdict::Stale,
            Some(holding) if holding < epoch => Verdict::Deposed,
            Some(_) | None => Verdict::Heeded,
        }
    }

    /// There is no connection to that peer any more: what it was, is not known.
    pub fn forget(&mut self, place: usize) {
        if let Some(peer) = self.peers.get_mut(place) {
            *peer = Peer::default();
        }
    }

    /// Whether that peer was last heard as an Active that another has replaced.
    pub fn is_stale(&self, place: usize) -> bool {
        self.peers.get(place).is_some_and(|peer| peer.stale)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LEASE: Duration = Duration::from_millis(27);

    #[test]
    fn each_time_of_being_active_has_a_higher_number_than_all_before() {
        let now = Instant::now();
        let mut fence = Fence::new(2);
        assert_eq!((fence.hold(), fence.hold()), (1, 1));
        fence.release();
        assert_eq!(fence.hear(now, 0, 7, None), Verdict::Heeded);
        assert_eq!((fence.epoch(), fence.hold(), fence.epoch()), (7, 8, 8));
        // A Backup has heard of a later one: it is not this node's.
        assert_eq!(fence.hear(now, 1, 12, None), Verdict::Heeded);
        assert_eq!(fence.epoch(), 8);
        fence.release();
        assert_eq!(fence.hold(), 13);
    }

    #[test]
    fn of_two_that_are_active_the_later_one_counts() {
        let now = Instant::now();
        let (mut older, mut newer) = (Fence::new(1), Fence::new(1));
        let first = older.hold();
        newer.hear(now, 0, first, Some(now + LEASE));
        let second = newer.hold();
        assert_eq!(newer.hear(now, 0, first, Some(now + LEASE)), Verdict::Stale);
        assert!(newer.is_stale(0));
        assert_eq!(older.hear(now, 0, second, Some(now + LEASE)), Verdict::Deposed);
        older.release();
        assert_eq!(newer.hear(now, 0, older.epoch(), None), Verdict::Heeded);
        assert!(!newer.is_stale(0));
        // At the same time: the election decides.
        assert_eq!(newer.hear(now, 0, second, Some(now + LEASE)), Verdict::Heeded);
    }

    #[test]
    fn a_third_node_hears_the_later_one_for_as_long_as_its_lease_holds() {
        let now = Instant::now();
        let mut third = Fence::new(2);
        assert_eq!(third.hear(now, 0, 5, Some(now + LEASE)), Verdict::Heeded);
        assert_eq!(third.hear(now, 1, 6, Some(now + LEASE)), Verdict::Heeded);
        assert_eq!(third.hear(now, 0, 5, Some(now + LEASE)), Verdict::Stale);
        assert!(third.is_stale(0) && !third.is_stale(1));
        // The later one has gone: the older has never stopped.
        let after = now + LEASE;
        assert_eq!(third.hear(after, 0, 5, Some(after + LEASE)), Verdict::Heeded);
        assert_eq!(third.hear(now, 0, 5, Some(now + LEASE)), Verdict::Stale);
        third.forget(1);
        assert_eq!(third.hear(now, 0, 5, Some(now + LEASE)), Verdict::Heeded);
        // What is out of place harms nothing.
        assert_eq!(third.hear(now, 9, 5, Some(now + LEASE)), Verdict::Heeded);
        assert!(!third.is_stale(9));
    }
}
