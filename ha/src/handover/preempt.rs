//! A node of higher priority than the Active's: it asks until it is given the VIPs, or has waited
//! for long enough.

use std::time::{Duration, Instant};

use super::{ASK_AGAIN, Machine, Other, Output, PeerId, Refusal, State};
use crate::vrrp::router::Wish;

/// What such a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Preempt {
    /// The Active.
    peer: PeerId,
    since: Instant,
    /// When it asks next; `None`: it has waited for long enough.
    ask_at: Option<Instant>,
    /// Why it was not given the VIPs yet.
    last: Option<Refusal>,
}

/// The same for status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The Active, which has the lower priority.
    pub peer: PeerId,
    /// Since when.
    pub since: Instant,
    /// Until when; `None`: that is over, and this node leaves the Active alone.
    pub until: Option<Instant>,
    /// Why the Active did not give the VIPs yet.
    pub why: Option<Refusal>,
}

impl Preempt {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.ask_at
    }

    pub(super) fn refused(&mut self, now: Instant, refusal: Refusal) {
        self.last = Some(refusal);
        self.ask_at = self.ask_at.map(|_| now + ASK_AGAIN);
    }

    pub(super) fn waiting(&self, patience: Duration) -> Waiting {
        let until = self.ask_at.map(|_| self.since + patience);
        Waiting { peer: self.peer, since: self.since, until, why: self.last }
    }
}

impl Machine {
    /// Asks if that is due.
    pub(super) fn preempt(&mut self, now: Instant) {
        let peer = match self.election.active {
            Other::Peer(peer) if self.election.wants_to_preempt => peer,
            Other::Peer(_) | Other::Nobody | Other::Stranger => {
                self.preempt = None;
                return;
            }
        };
        // Another Active, another chance.
        let known = self.preempt.filter(|preempt| preempt.peer == peer);
        let mut preempt =
            known.unwrap_or(Preempt { peer, since: now, ask_at: Some(now), last: None });
        if self.state == State::Idle && preempt.ask_at.is_some_and(|at| at <= now) {
            let over = preempt.last.is_some() && now >= preempt.since + self.config.preempt_wait;
            if over {
                preempt.ask_at = None;
                self.outputs.push_back(Output::GaveUp(peer, preempt.last));
            } else if self.up[peer] {
                preempt.ask_at = Some(now + ASK_AGAIN);
                self.ask(now, peer, Wish::Preempt, false);
            } else {
                preempt.refused(now, Refusal::NoChannel(peer));
            }
        }
        self.preempt = Some(preempt);
    }
}
