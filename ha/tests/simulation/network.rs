//! What the network does to an advert between two nodes.

use std::time::Duration;

use crate::random::Random;

/// Conditions of every link, for the time being.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    /// Percent of adverts lost.
    pub(crate) loss: u8,
    /// Percent of adverts that come twice.
    pub(crate) duplication: u8,
    /// The longest delay.
    pub(crate) delay: Duration,
    /// Whether a later advert may come first.
    pub(crate) order: Order,
    /// `from → to` pairs whose adverts are all lost.
    pub(crate) deaf: Vec<(usize, usize)>,
    /// The side of each node: nodes of different sides do not hear each other.
    pub(crate) side: Vec<u8>,
}

/// Whether adverts on one path between two nodes keep their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Kept,
    Lost,
}

impl Network {
    pub(crate) fn calm(nodes: usize, delay: Duration) -> Self {
        Self {
            loss: 0,
            duplication: 0,
            delay,
            order: Order::Kept,
            deaf: Vec::new(),
            side: vec![0; nodes],
        }
    }

    pub(crate) fn storm(nodes: usize, interval: Duration, random: &mut Random) -> Self {
        let mut network = Self {
            loss: random.pick(&[0, 0, 10, 30, 60]),
            duplication: random.pick(&[0, 0, 20]),
            delay: interval * random.pick(&[1, 5, 20, 60, 150]) / 100,
            order: random.pick(&[Order::Kept, Order::Lost]),
            deaf: Vec::new(),
            side: vec![0; nodes],
        };
        if random.chance(30) {
            for _ in 0..=random.below(nodes) {
                network.deaf.push((random.below(nodes), random.below(nodes)));
            }
        }
        if random.chance(25) {
            for side in &mut network.side {
                *side = random.below(2) as u8;
            }
        }
        network
    }

    /// After how long an advert comes, once for each copy; none if it is lost.
    pub(crate) fn send(&self, from: usize, to: usize, random: &mut Random) -> Vec<Duration> {
        if self.side[from] != self.side[to]
            || self.deaf.contains(&(from, to))
            || random.chance(self.loss)
        {
            return Vec::new();
        }
        let copies = 1 + usize::from(random.chance(self.duplication));
        (0..copies).map(|_| random.duration(self.delay / 4, self.delay)).collect()
    }
}
