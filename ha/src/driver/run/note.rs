//! What is recorded of decisions: the driver says what happened, and what it knew is added here.

use std::time::{Duration, Instant};

use super::Driver;
use crate::record::{Known, Record, Stamp, What, Words};
use crate::vrrp::router::{Reason, State, Transition, active_down_interval};
use crate::vrrp::{AdverInterval, Preempt};

impl Driver {
    /// Records what was decided or has happened, with everything that this node knows now. Never
    /// waits; what there is no room for is counted.
    pub(super) fn record(&mut self, now: Instant, what: impl Into<Option<What>>) {
        let Some(what) = what.into() else { return };
        if !self.memory.admit(now, &what) {
            return self.recorder.lose();
        }
        let known = Some(self.known(now));
        self.recorder.send(Record { at: Stamp::now(), what, known });
    }

    pub(super) fn record_transition(&mut self, now: Instant, transition: Transition) {
        let fault = match transition.reason {
            Reason::Fault => self.node.fault().map_or(Words::NONE, Words::of),
            _ => Words::NONE,
        };
        self.record(now, What::Transition { transition, fault });
    }

    /// Records what has changed without a decision: who is heard as Active, which paths work.
    pub(super) fn record_news(&mut self, now: Instant) {
        for (place, port) in self.ports.paths.iter().enumerate() {
            let usable = port.primary.as_ref().map(drop).map_err(String::as_str);
            if let Some(what) = self.memory.path(place, usable) {
                return self.record(now, what);
            }
        }
        let heard = match self.node.state() {
            State::Active => None,
            State::Initialize | State::Backup => self.neighbors.active(),
        };
        let what = self.memory.active(heard.map(|heard| (heard.address, heard.interval)));
        // What it leaves alone though it has the higher priority.
        let lower = heard.map(|heard| heard.priority).filter(|theirs| {
            *theirs < self.config.priority && self.config.preempt == Preempt::Disabled
        });
        let waits = lower.filter(|_| what.is_some()).map(|theirs| {
            let own = self.config.priority;
            What::Waits(Words::of(format_args!(
                "it leaves the Active alone, though that has priority {theirs} and this node {own}: \
                 `preempt` is off"
            )))
        });
        self.record(now, what);
        self.record(now, waits);
    }

    fn known(&self, now: Instant) -> Known {
        let priority = self.node.advertised_priority();
        let lease = self.lease.as_ref().map(|lease| lease.left());
        let active = self.memory.heard_active();
        let active_down = active.and_then(|(_, interval)| {
            let interval = AdverInterval::from_duration(interval)?;
            Some(active_down_interval(self.config.priority, interval))
        });
        Known {
            state: self.node.state(),
            epoch: self.fence.epoch(),
            priority,
            lease: lease.filter(|left| *left > Duration::ZERO),
            active: active.map(|(who, _)| who),
            active_down,
            paths: self.memory.paths(),
            peers: self.memory.peers(now),
            stranger: self.memory.stranger(now),
        }
    }
}
