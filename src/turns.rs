//! Rounds of weighted turns: in which order backends get new flows, evenly spread. Pure.
//!
//! Each backend's turns have windows, one after the other, as wide as its share demands; every slot
//! goes to whoever must have it soonest among those whose window has begun (earliest deadline
//! first). So after any number of slots nobody is a whole turn ahead of his share or behind it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::maglev::{Entry, SLOTS};

/// A turn to come: the slot that it may not be before, the slot that it must be before, and whose.
type Window = (u64, u64, usize);

/// One round: the id for each slot. It is as long as the weights without their common divisor are
/// together, and cut off at [`SLOTS`], which a round is longer than only with hundreds of backends
/// of great and odd weights.
pub fn round(entries: &[Entry]) -> Vec<u16> {
    let mut ordered: Vec<&Entry> = entries.iter().filter(|entry| entry.weight > 0).collect();
    ordered.sort_by_key(|entry| entry.key);
    let divisor = ordered.iter().fold(0, |divisor, entry| common(divisor, entry.weight.into()));
    let weight = |of: usize| u64::from(ordered[of].weight) / divisor;
    let total: u64 = (0..ordered.len()).map(weight).sum();
    let window = |turn: u64, of: usize| -> Window {
        (turn * total / weight(of), ((turn + 1) * total).div_ceil(weight(of)), of)
    };
    let mut turns = vec![0; ordered.len()];
    let mut waiting: BinaryHeap<_> = (0..ordered.len()).map(|of| Reverse(window(0, of))).collect();
    let mut ready = BinaryHeap::new();
    let mut slots = Vec::new();
    for slot in 0..total.min(SLOTS as u64) {
        while let Some(Reverse((from, until, of))) = waiting.peek().copied()
            && from <= slot
        {
            waiting.pop();
            ready.push(Reverse((until, of)));
        }
        let Reverse((_, of)) = ready.pop().expect("the windows of a slot are never all used");
        slots.push(ordered[of].id);
        turns[of] += 1;
        waiting.push(Reverse(window(turns[of], of)));
    }
    slots
}

/// The greatest common divisor.
fn common(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { common(other, one % other) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::scheduler::mix;

    fn entries(weights: &[u16]) -> Vec<Entry> {
        let entry = |(n, &weight)| Entry { id: n as u16 + 1, key: mix(n as u64), weight };
        weights.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn nobody_has_no_turns() {
        assert!(round(&[]).is_empty());
    }

    #[test]
    fn equals_take_turns() {
        let round = round(&entries(&[4, 4, 4]));
        assert_eq!(round.len(), 3);
        assert!((1..=3).all(|id| round.contains(&id)), "{round:?}");
    }

    #[test]
    fn the_heavy_one_does_not_burst() {
        let round = round(&entries(&[5, 1, 1]));
        let longest = round.chunk_by(|one, other| one == other).map(<[u16]>::len).max();
        assert_eq!((round.len(), longest), (7, Some(3)), "{round:?}");
    }

    #[test]
    fn a_round_that_is_too_long_is_cut_off() {
        // 1024 backends, the sum of whose weights is greater than the slots, with no divisor.
        let weights: Vec<u16> = (0..1024).map(|n| 100 + n % 157).collect();
        assert_eq!(round(&entries(&weights)).len(), SLOTS);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nobody_is_ever_a_turn_ahead_or_behind(
            weights in prop::collection::vec(1_u16..=256, 1..24),
        ) {
            let round = round(&entries(&weights));
            let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
            let mut turns = vec![0; weights.len()];
            for (slot, &id) in (1..).zip(&round) {
                turns[usize::from(id) - 1] += 1;
                for (&got, &weight) in turns.iter().zip(&weights) {
                    let due = slot * u64::from(weight);
                    prop_assert!(got >= due / total, "{} of {} at {}", got, weight, slot);
                    prop_assert!(got <= due.div_ceil(total), "{} of {} at {}", got, weight, slot);
                }
            }
            for (&got, &weight) in turns.iter().zip(&weights) {
                prop_assert_eq!(got * total, u64::from(weight) * round.len() as u64);
            }
        }
    }
}
