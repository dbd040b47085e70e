//! What can be lost: every combination, and the situation that it is in the words of the table.

use std::fmt;

/// What has become of a node itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It runs, and its links are up.
    Fine,
    /// The front link has no carrier.
    NoFront,
    /// The back link has none.
    NoBack,
    /// Neither has.
    NoLink,
    /// Its power is off.
    Dead,
    /// Its daemon has ended, and its kernel has closed the peer channel.
    Ended,
}

/// What is lost from one moment on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Combination {
    /// Of node a, of node b.
    pub(crate) fate: [Fate; 2],
    /// Adverts that arrive at a node, on front and on back.
    pub(crate) adverts: [[bool; 2]; 2],
    /// Whether heartbeats arrive at a node.
    pub(crate) beats: [bool; 2],
    /// Whether the gateway answers a node.
    pub(crate) gateway: [bool; 2],
}

/// The columns of the table, in its order.
pub(crate) const COLUMNS: usize = 8;

/// A combination in the words of the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Situation(pub(crate) [&'static str; COLUMNS]);

impl Combination {
    /// All that can be: over a link without carrier nothing arrives in either direction, and a
    /// node that is dead neither says nor hears anything.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        use Fate::{Dead, Ended, Fine, NoBack, NoFront, NoLink};
        let fates = [Fine, NoFront, NoBack, NoLink, Dead, Ended];
        let pairs = fates.into_iter().flat_map(move |a| fates.map(|b| [a, b]));
        let bit = |bits: u32, at: u32| bits >> at & 1 == 0;
        pairs
            .filter(|pair| !pair.iter().all(|fate| matches!(fate, Dead | Ended)))
            .flat_map(move |fate| {
                (0..1 << 8).map(move |bits| Self {
                    fate,
                    adverts: [[bit(bits, 0), bit(bits, 1)], [bit(bits, 2), bit(bits, 3)]],
                    beats: [bit(bits, 4), bit(bits, 5)],
                    gateway: [bit(bits, 6), bit(bits, 7)],
                })
            })
            .filter(Self::can_be)
    }

    fn can_be(&self) -> bool {
        let no_path = |path: usize| {
            self.fate.iter().any(|fate| match fate {
                Fate::Fine => false,
                Fate::NoFront => path == 0,
                Fate::NoBack => path == 1,
                Fate::NoLink | Fate::Dead | Fate::Ended => true,
            })
        };
        let gone = |node: usize| matches!(self.fate[node], Fate::Dead | Fate::Ended);
        let no_beats = gone(0) || gone(1);
        (0..2).all(|to| {
            (0..2).all(|path| !(self.adverts[to][path] && no_path(path)))
                && !(self.beats[to] && no_beats)
                && !(self.gateway[to] && (gone(to) || no_path_of(self.fate[to])))
        })
    }

    /// In the words of the table.
    pub(crate) fn situation(&self) -> Situation {
        let ok = |arrives: bool| if arrives { "ok" } else { "lost" };
        let fate = |fate: Fate| match fate {
            Fate::Fine => "ok",
            Fate::NoFront | Fate::NoBack | Fate::NoLink => "link",
            Fate::Dead => "dead",
            Fate::Ended => "ended",
        };
        let adverts = |to: usize| ok(self.adverts[to].contains(&true));
        Situation([
            fate(self.fate[0]),
            fate(self.fate[1]),
            adverts(1),
            ok(self.beats[1]),
            adverts(0),
            ok(self.beats[0]),
            ok(self.gateway[0]),
            ok(self.gateway[1]),
        ])
    }
}

/// The gateway is in front.
fn no_path_of(fate: Fate) -> bool {
    matches!(fate, Fate::NoFront | Fate::NoLink)
}

impl Situation {
    /// Whether a word of a reaches b.
    pub(crate) fn b_hears(&self) -> bool {
        self.0[2] == "ok" || self.0[3] == "ok"
    }

    /// Whether adverts of b reach a.
    pub(crate) fn adverts_to_a(&self) -> bool {
        self.0[4] == "ok"
    }

    /// Once a connection that is silent in one direction is given up.
    pub(crate) fn with_channel_given_up(mut self) -> Self {
        if self.0[3] == "lost" || self.0[5] == "lost" {
            (self.0[3], self.0[5]) = ("lost", "lost");
        }
        self
    }

    /// Whether heartbeats of b reach a.
    pub(crate) fn beats_to_a(&self) -> bool {
        self.0[5] == "ok"
    }
}

impl fmt::Display for Situation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}
