//! "Backends sick" is not "this node sick": an Active gives way only to a peer that sees strictly
//! more healthy backends, and has for a while. A backend that is dead for all moves nothing.
//!
//! What is compared are backends that both know of and this node has probed, so a node that
//! has just started, or is short of something, is not sick. Each time that this node has given way
//! the next one takes twice as long, up to 32 times; an hour without takes that back. So backends
//! that come and go on both sides in turn make no node pass the VIPs on and on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::shared::PeerId;
use super::{Health, Target, View};

/// How often the time is doubled at most.
const DOUBLINGS: u32 = 5;
/// For so long after the last time, the next one takes longer.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// How many of the same backends two nodes see up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// This one.
    pub here: usize,
    /// The other.
    pub there: usize,
}

/// This node should give way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GiveWay {
    /// To whom: the one that sees most.
    pub to: PeerId,
    /// Why.
    pub seen: Seen,
}

/// The decision.
#[derive(Debug)]
pub struct Sick {
    /// How long a peer must have seen more; `None`: never.
    after: Option<Duration>,
    since: Option<Instant>,
    given: u32,
    given_at: Option<Instant>,
}

impl Seen {
    /// From what this node sees, and what the other says.
    pub fn compare(
        here: impl Iterator<Item = (Target, Health)>,
        there: &BTreeMap<Target, View>,
    ) -> Self {
        let known = here.filter(|(_, health)| *health != Health::Unknown);
        let both = known.filter_map(|(target, health)| Some((health, there.get(&target)?.sees)));
        both.fold(Self { here: 0, there: 0 }, |seen, (here, there)| Self {
            here: seen.here + usize::from(here == Health::Up),
            there: seen.there + usize::from(there == Health::Up),
        })
    }
}

impl Sick {
    /// Of a node that gives way when a peer has seen more for so long; `None`: never.
    pub fn new(after: Option<Duration>) -> Self {
        Self { after, since: None, given: 0, given_at: None }
    }

    /// What this node and those peers see now that could take over; nobody unless this node is
    /// Active. To be called often; says once that this node should give way, and again after as
    /// long if it has not.
    pub fn look(
        &mut self,
        now: Instant,
        peers: impl Iterator<Item = (PeerId, Seen)>,
    ) -> Option<GiveWay> {
        let after = self.after?;
        let more = peers.filter(|(_, seen)| seen.there > seen.here);
        let Some((to, seen)) = more.max_by_key(|(_, seen)| seen.there) else {
            self.since = None;
            return None;
        };
        self.given_at = self.given_at.filter(|at| now < *at + REMEMBERED);
        if self.given_at.is_none() {
            self.given = 0;
        }
        let since = *self.since.get_or_insert(now);
        if now < since + after * (1 << self.given.min(DOUBLINGS)) {
            return None;
        }
        self.since = None;
        self.given += 1;
        self.given_at = Some(now);
        Some(GiveWay { to, seen })
    }

    /// Since when a peer has seen more.
    pub fn since(&self) -> Option<Instant> {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(5);
    const STEP: Duration = Duration::from_millis(100);

    struct Bench {
        now: Instant,
        sick: Sick,
    }

    impl Bench {
        fn new() -> Self {
            Self { now: Instant::now(), sick: Sick::new(Some(AFTER)) }
        }

        /// Looks for so long, or until it gives way; the time that it took.
        fn look(&mut self, here: usize, there: usize, time: Duration) -> Option<Duration> {
            let start = self.now;
            while self.now < start + time {
                let peers = [(3, Seen { here, there })];
                if self.sick.look(self.now, peers.into_iter()).is_some() {
                    return Some(self.now - start);
                }
                self.now += STEP;
            }
            None
        }
    }

    #[test]
    fn it_gives_way_to_a_peer_that_sees_more_for_long_enough() {
        let long = Duration::from_secs(7200);
        for (here, there, expected) in
            [(1, 2, Some(AFTER)), (0, 1, Some(AFTER)), (0, 0, None), (1, 1, None), (2, 1, None)]
        {
            assert_eq!(Bench::new().look(here, there, long), expected, "{here} {there}");
        }
        let never =
            Sick::new(None).look(Instant::now(), [(0, Seen { here: 0, there: 9 })].into_iter());
        assert_eq!(never, None);
    }

    #[test]
    fn what_passes_is_forgotten() {
        let mut bench = Bench::new();
        for _ in 0..100 {
            assert_eq!(bench.look(1, 2, AFTER - STEP), None);
            assert_eq!(bench.look(2, 2, STEP), None);
        }
    }

    #[test]
    fn each_time_takes_twice_as_long_until_an_hour_has_passed() {
        let mut bench = Bench::new();
        let long = Duration::from_secs(600);
        for factor in [1, 2, 4, 8, 16, 32, 32, 32] {
            assert_eq!(bench.look(1, 2, long), Some(AFTER * factor));
        }
        assert_eq!(bench.look(2, 2, REMEMBERED), None);
        assert_eq!(bench.look(1, 2, long), Some(AFTER));
    }

    #[test]
    fn two_nodes_do_not_pass_it_on_and_on() {
        // Backends that come and go, always at the wrong moment: whoever is Active sees fewer.
        let mut nodes = [Bench::new(), Bench::new()];
        let (mut active, mut changes, start) = (0, 0, nodes[0].now);
        let mut now = start;
        while now < start + Duration::from_secs(3600) {
            nodes[active].now = now;
            if nodes[active].look(1, 2, STEP).is_some() {
                active = 1 - active;
                changes += 1;
            }
            now += STEP;
        }
        assert!(changes < 60, "{changes} in an hour; without the doubling it were 720");
    }

    #[test]
    fn only_what_both_know_is_compared() {
        let target = |n: u8| {
            let backend = std::net::SocketAddr::from(([10, 78, 0, n], 80));
            Target::new("10.77.0.100:80".parse().unwrap(), 6, backend)
        };
        use Health::{Down, Unknown, Up};
        let there: BTreeMap<_, _> = [(1, Up), (2, Up), (3, Unknown), (4, Up), (9, Up)]
            .map(|(n, sees)| (target(n), View { target: target(n), sees, selects: Down }))
            .into();
        let here = [(1, Up), (2, Down), (3, Up), (4, Unknown), (8, Up)];
        let seen = Seen::compare(here.into_iter().map(|(n, sees)| (target(n), sees)), &there);
        assert_eq!(seen, Seen { here: 2, there: 2 });
    }
}
