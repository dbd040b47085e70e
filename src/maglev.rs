//! Maglev tables: which backend each slot of a schedule belongs to. Pure.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), §3.4:
//! each backend has its own permutation of the slots, and they take turns at claiming the next
//! free one of theirs, as often as their weights say. Every node that knows the same backends
//! builds the same table, and when one leaves, nearly all slots of the others stay theirs.

use crate::scheduler::mix;

/// Slots of a table: a prime, far above the number of backends, so that shares are exact within a
/// few hundredths of a percent.
pub const SLOTS: usize = 65537;

/// What takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What is written into its slots.
    pub id: u16,
    /// What its permutation is made from: the same on every node, as [`crate::scheduler::backend_key`].
    pub key: u64,
    /// Share of the slots, at least 1.
    pub weight: u16,
}

/// A place in a backend's permutation.
struct Turn {
    id: u16,
    at: u64,
    skip: u64,
    /// In each round it may claim while its credit reaches the greatest weight.
    weight: u32,
    credit: u32,
}

/// The id of each slot. Without entries every slot is 0.
///
/// Neither the order of the entries nor their ids matter to who gets a slot, only their keys and
/// weights; keys must differ.
pub fn table(entries: &[Entry]) -> Vec<u16> {
    let mut slots = vec![0; SLOTS];
    let mut ordered: Vec<&Entry> = entries.iter().collect();
    ordered.sort_by_key(|entry| entry.key);
    let greatest = ordered.iter().map(|entry| u32::from(entry.weight)).max().unwrap_or(0);
    let mut turns: Vec<Turn> = ordered.into_iter().map(Turn::new).collect();
    let mut taken = vec![false; SLOTS];
    let mut left = if greatest == 0 { 0 } else { SLOTS };
    while left > 0 {
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < greatest {
                continue;
            }
            turn.credit -= greatest;
            let slot = turn.claim(&mut taken);
            slots[slot] = turn.id;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    slots
}

impl Turn {
    fn new(entry: &Entry) -> Self {
        let size = SLOTS as u64;
        Self {
            id: entry.id,
            at: mix(entry.key) % size,
            // A prime number of slots: every step from 1 to one less reaches all of them.
            skip: mix(mix(entry.key)) % (size - 1) + 1,
            weight: u32::from(entry.weight),
            credit: 0,
        }
    }

    /// The next slot of its permutation that nobody has. There must be one.
    fn claim(&mut self, taken: &mut [bool]) -> usize {
        loop {
            let slot = self.at as usize;
            self.at = (self.at + self.skip) % SLOTS as u64;
            if !std::mem::replace(&mut taken[slot], true) {
                return slot;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(weights: &[u16]) -> Vec<Entry> {
        let entry = |(n, &weight)| Entry { id: n as u16 + 1, key: mix(0xbac0 + n as u64), weight };
        weights.iter().enumerate().map(entry).collect()
    }

    fn shares(table: &[u16], backends: usize) -> Vec<usize> {
        let mut shares = vec![0; backends + 1];
        for &id in table {
            shares[usize::from(id)] += 1;
        }
        shares
    }

    #[test]
    fn nobody_gets_anything_of_nothing() {
        assert!(table(&[]).iter().all(|&id| id == 0));
    }

    #[test]
    fn a_lone_backend_gets_everything() {
        assert!(table(&entries(&[3])).iter().all(|&id| id == 1));
    }

    #[test]
    fn the_table_never_changes() {
        // Other nodes and older versions must agree.
        let sum = table(&entries(&[1, 2, 3])).iter().fold(0, |sum, &id| mix(sum ^ u64::from(id)));
        assert_eq!(sum, 0xadf0_0bdb_6f05_6798, "{sum:#x}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(1_u16..=256, 1..40)) {
            let shares = shares(&table(&entries(&weights)), weights.len());
            prop_assert_eq!(shares[0], 0);
            // Each is at most a turn ahead of or behind what its weight makes of the rounds, which
            // are the same for all: so there is a number of rounds that fits them all.
            let rounds = |turn: f64| {
                let pairs = shares[1..].iter().zip(&weights);
                pairs.map(move |(&share, &weight)| (share as f64 + turn) / f64::from(weight))
            };
            let least = rounds(-1.0).fold(f64::MIN, f64::max);
            let most = rounds(1.0).fold(f64::MAX, f64::min);
            prop_assert!(least <= most, "{:?} of {:?}", shares, weights);
        }

        #[test]
        fn order_does_not_matter(weights in prop::collection::vec(1_u16..=16, 2..12)) {
            let straight = entries(&weights);
            let mut turned = straight.clone();
            turned.reverse();
            prop_assert!(table(&straight) == table(&turned));
        }

        #[test]
        fn who_leaves_moves_hardly_anybody_elses_slots(
            count in 2_usize..20,
            leaving in any::<prop::sample::Index>(),
        ) {
            let all = entries(&vec![1; count]);
            let gone = leaving.index(count);
            let mut left = all.clone();
            left.remove(gone);
            let (before, after) = (table(&all), table(&left));
            let moved = before
                .iter()
                .zip(&after)
                .filter(|&(&was, &is)| was != all[gone].id && was != is)
                .count();
            // The paper sees a few percent at most with tables a hundred times the backends.
            prop_assert!(moved < SLOTS / 50, "{} moved", moved);
        }
    }
}
