//! The choice among eligible backends, pure: round-robin, source-hash, least-connections, random.
//!
//! It never looks at health or limits (that is [`crate::pool`]'s business), takes no lock and
//! allocates nothing. What differs from one choice to the next comes in from outside: the
//! candidates, and a random number.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicI64, Ordering};

use crate::service::Scheduler;

/// A backend that may be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Share of the traffic, at least 1.
    pub weight: u16,
    /// Connections it has now.
    pub connections: u32,
    /// [`backend_key`] of its address.
    pub key: u64,
    /// Its turn in the round robin.
    pub turn: &'a Turn,
}

/// How far a backend's turn has come: its `current weight` in smooth weighted round robin.
#[derive(Debug, Default)]
pub struct Turn(AtomicI64);

/// Chooses one of the candidates, by its place in the iterator; `None` where there is none.
///
/// `draw` is a uniformly random number; `source` matters to source-hash only.
pub fn choose<'a>(
    scheduler: Scheduler,
    source: IpAddr,
    draw: u64,
    candidates: impl Iterator<Item = Candidate<'a>> + Clone,
) -> Option<usize> {
    match scheduler {
        Scheduler::RoundRobin => round_robin(candidates),
        // The configuration keeps `maglev` to services in the kernel; by source is what comes
        // nearest to it here.
        Scheduler::SourceHash | Scheduler::Maglev => source_hash(source_key(source), candidates),
        Scheduler::LeastConnections => least_connections(draw, candidates),
        Scheduler::Random => random(draw, candidates),
    }
}

/// Smooth weighted round robin: every candidate's turn grows by its weight, the furthest is
/// chosen and set back by the sum. The additions and the subtraction cancel out whatever the
/// interleaving, so threads that choose at the same moment may at worst agree on one backend, and
/// the shares stay exact without a lock.
fn round_robin<'a>(candidates: impl Iterator<Item = Candidate<'a>>) -> Option<usize> {
    let mut total = 0;
    let mut best: Option<(i64, usize, &Turn)> = None;
    for (index, candidate) in candidates.enumerate() {
        let weight = i64::from(candidate.weight);
        total += weight;
        let turn = candidate.turn.0.fetch_add(weight, Ordering::Relaxed) + weight;
        if best.is_none_or(|(furthest, ..)| turn > furthest) {
            best = Some((turn, index, candidate.turn));
        }
    }
    let (_, index, turn) = best?;
    turn.0.fetch_sub(total, Ordering::Relaxed);
    Some(index)
}

/// Weighted rendezvous hashing: each candidate draws a number from the hash of source and
/// backend, the largest `-weight / ln(number)` wins. A candidate that leaves takes only its own
/// sources with it.
fn source_hash<'a>(source: u64, candidates: impl Iterator<Item = Candidate<'a>>) -> Option<usize> {
    let mut best: Option<(f64, usize)> = None;
    for (index, candidate) in candidates.enumerate() {
        let hash = mix(source ^ candidate.key);
        // 53 bits, moved off both 0 and 1, where the logarithm would be infinite or zero.
        let uniform = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        let score = -f64::from(candidate.weight) / uniform.ln();
        if best.is_none_or(|(most, _)| score > most) {
            best = Some((score, index));
        }
    }
    best.map(|(_, index)| index)
}

/// Fewest connections for its weight, counting the one to come; ties at random.
fn least_connections<'a>(
    mut draw: u64,
    candidates: impl Iterator<Item = Candidate<'a>>,
) -> Option<usize> {
    let mut best: Option<(u64, u64, usize)> = None;
    let mut ties = 0;
    for (index, candidate) in candidates.enumerate() {
        let load = u64::from(candidate.connections) + 1;
        let weight = u64::from(candidate.weight);
        let order = match best {
            None => std::cmp::Ordering::Less,
            // load / weight against best, without a division.
            Some((best_load, best_weight, _)) => (load * best_weight).cmp(&(best_load * weight)),
        };
        match order {
            std::cmp::Ordering::Less => {
                ties = 1;
                best = Some((load, weight, index));
            }
            std::cmp::Ordering::Equal => {
                // The k-th of the tied takes the place with probability 1/k: all are alike.
                ties += 1;
                draw = mix(draw);
                if draw.is_multiple_of(ties) {
                    best = Some((load, weight, index));
                }
            }
            std::cmp::Ordering::Greater => {}
        }
    }
    best.map(|(.., index)| index)
}

/// At random, by weight.
fn random<'a>(draw: u64, candidates: impl Iterator<Item = Candidate<'a>> + Clone) -> Option<usize> {
    let total: u64 = candidates.clone().map(|candidate| u64::from(candidate.weight)).sum();
    let mut left = draw.checked_rem(total)?;
    let mut last = None;
    for (index, candidate) in candidates.enumerate() {
        let weight = u64::from(candidate.weight);
        last = Some(index);
        if left < weight {
            break;
        }
        left -= weight;
    }
    // Some may have become ineligible since they were added up; then it is the last.
    last
}

/// What source-hash knows a backend by: a hash of its address and port, the same on every node
/// and after every restart.
pub fn backend_key(address: SocketAddr) -> u64 {
    mix(source_key(address.ip()) ^ u64::from(address.port()))
}

fn source_key(source: IpAddr) -> u64 {
    match source {
        IpAddr::V4(address) => mix(u64::from(address.to_bits())),
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            mix(mix((bits >> 64) as u64) ^ bits as u64)
        }
    }
}

/// The finalizer of SplitMix64: a bijection in which every input bit moves every output bit.
pub(crate) const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    struct Backends {
        weights: Vec<u16>,
        turns: Vec<Turn>,
        keys: Vec<u64>,
        connections: Vec<u32>,
    }

    impl Backends {
        fn new(weights: &[u16]) -> Self {
            Self {
                weights: weights.to_vec(),
                turns: weights.iter().map(|_| Turn::default()).collect(),
                keys: (0..weights.len())
                    .map(|n| backend_key(format!("10.78.0.{}:1080", n + 1).parse().unwrap()))
                    .collect(),
                connections: vec![0; weights.len()],
            }
        }

        fn candidates(&self) -> impl Iterator<Item = Candidate<'_>> + Clone {
            (0..self.weights.len()).map(|n| Candidate {
                weight: self.weights[n],
                connections: self.connections[n],
                key: self.keys[n],
                turn: &self.turns[n],
            })
        }

        /// Picks `times`; how often each came.
        fn tally(&self, scheduler: Scheduler, times: usize) -> Vec<usize> {
            let mut tally = vec![0; self.weights.len()];
            for n in 0..times {
                let source = source(n as u32);
                let draw = mix(n as u64);
                tally[choose(scheduler, source, draw, self.candidates()).unwrap()] += 1;
            }
            tally
        }
    }

    fn source(n: u32) -> IpAddr {
        Ipv4Addr::from_bits(0x0a4d_0000 + n).into()
    }

    #[test]
    fn round_robin_is_smooth() {
        let backends = Backends::new(&[5, 1, 1]);
        let order: Vec<usize> =
            (0..7).map(|_| round_robin(backends.candidates()).unwrap()).collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn nobody_is_chosen_from_nobody() {
        for scheduler in [
            Scheduler::RoundRobin,
            Scheduler::SourceHash,
            Scheduler::LeastConnections,
            Scheduler::Random,
        ] {
            assert_eq!(choose(scheduler, source(1), 7, std::iter::empty()), None);
        }
    }

    #[test]
    fn random_chooses_though_some_have_left_meanwhile() {
        let backends = Backends::new(&[1, 1]);
        // Both when they are added up, then the first alone.
        let looks = std::cell::Cell::new(0);
        let candidates = backends.candidates().filter(|_| looks.replace(looks.get() + 1) < 3);
        assert_eq!(random(1, candidates), Some(0));
    }

    #[test]
    fn round_robin_keeps_its_shares_when_threads_choose_at_once() {
        let backends = Backends::new(&[3, 2, 1]);
        let tallies: Vec<Vec<usize>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| backends.tally(Scheduler::RoundRobin, 6000)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (index, share) in [12_000, 8000, 4000].into_iter().enumerate() {
            let got: usize = tallies.iter().map(|tally| tally[index]).sum();
            assert!(got.abs_diff(share) <= 8, "{index}: {got} of {share}");
        }
    }

    #[test]
    fn ties_between_least_loaded_are_fair() {
        let tally = Backends::new(&[1, 1, 1]).tally(Scheduler::LeastConnections, 30_000);
        assert!(tally.iter().all(|&got| got.abs_diff(10_000) < 600), "{tally:?}");
    }

    #[test]
    fn the_backend_key_never_changes() {
        // Other nodes and older versions must agree.
        assert_eq!(backend_key("10.78.0.11:1080".parse().unwrap()), 0x10b9_6585_a319_e3e7);
        assert_eq!(backend_key("[fd78::11]:1080".parse().unwrap()), 0x5a2f_cdfe_a814_18f7);
    }

    proptest! {
        #[test]
        fn round_robin_is_exact_over_a_cycle(weights in prop::collection::vec(1_u16..=256, 1..8)) {
            let total: usize = weights.iter().map(|&weight| usize::from(weight)).sum();
            let tally = Backends::new(&weights).tally(Scheduler::RoundRobin, total * 2);
            for (got, weight) in tally.iter().zip(&weights) {
                prop_assert_eq!(*got, usize::from(*weight) * 2);
            }
        }

        #[test]
        fn shares_follow_the_weights(weights in prop::collection::vec(1_u16..=16, 2..6)) {
            let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            for scheduler in [Scheduler::SourceHash, Scheduler::Random] {
                let tally = Backends::new(&weights).tally(scheduler, 20_000);
                for (got, weight) in tally.iter().zip(&weights) {
                    let share = *got as f64 / 20_000.0;
                    let due = f64::from(*weight) / total;
                    prop_assert!((share - due).abs() < 0.02, "{scheduler:?}: {share} of {due}");
                }
            }
        }

        #[test]
        fn only_the_clients_of_a_leaving_backend_move(
            weights in prop::collection::vec(1_u16..=256, 2..8),
            leaving in any::<prop::sample::Index>(),
        ) {
            let all = Backends::new(&weights);
            let leaving = leaving.index(weights.len());
            for n in 0..500 {
                let key = source_key(source(n));
                let before = source_hash(key, all.candidates()).unwrap();
                let left = (0..weights.len()).filter(|&index| index != leaving);
                let left: Vec<usize> = left.collect();
                let rest = left.iter().map(|&index| all.candidates().nth(index).unwrap());
                let after = left[source_hash(key, rest).unwrap()];
                prop_assert!(before == leaving || before == after);
            }
        }

        #[test]
        fn least_connections_takes_the_least_loaded(
            members in prop::collection::vec((1_u16..=256, 0_u32..=u32::MAX), 1..8),
            draw: u64,
        ) {
            let mut backends =
                Backends::new(&members.iter().map(|member| member.0).collect::<Vec<_>>());
            backends.connections = members.iter().map(|member| member.1).collect();
            let chosen = least_connections(draw, backends.candidates()).unwrap();
            let load = |index: usize| {
                (u128::from(members[index].1) + 1, u128::from(members[index].0))
            };
            let (connections, weight) = load(chosen);
            for index in 0..members.len() {
                let (other, other_weight) = load(index);
                prop_assert!(connections * other_weight <= other * weight);
            }
        }
    }
}
