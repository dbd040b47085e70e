//! The operator's commands, from their arrival to their end.

use std::time::{Duration, Instant};

use super::{Driver, Flow, YIELD_MARGIN};
use crate::driver::commands::{Kind, Pending};
use crate::driver::{Command, Refused};
use crate::handover;
use crate::node::Input;
use crate::vrrp::Priority;
use crate::vrrp::router::{Advert, State, Transition};

/// How long the nodes may take to agree; each wait of theirs is shorter.
const HANDOVER: Duration = Duration::from_secs(30);

impl Driver {
    pub(super) async fn command(&mut self, command: Command) -> Flow {
        let now = Instant::now();
        if let Some(pending) = self.pending.take() {
            pending.refuse(Refused::Superseded);
        }
        match command {
            Command::Takeover(force, answer) => {
                if let Some(fault) = self.node.fault() {
                    let _ = answer.send(Err(Refused::Fault(fault)));
                } else {
                    self.take_over(now, force, Pending::takeover(now, answer)).await;
                }
                Flow::Continue
            }
            Command::Yield(force, answer) => {
                if self.node.state() != State::Active {
                    let _ = answer.send(Err(Refused::NotActive));
                } else if self.handover.is_some() {
                    self.pending = Some(Pending::yielding(now, HANDOVER, answer));
                    self.tell_handover(now, handover::Input::Yield { force }).await;
                } else {
                    self.pending = Some(Pending::yielding(now, self.yield_patience(), answer));
                    self.feed(Input::Yield).await;
                }
                Flow::Continue
            }
            Command::Shutdown(answer) => {
                self.feed(Input::Shutdown).await;
                self.publish();
                self.goodbye = Some(answer);
                Flow::End
            }
        }
    }

    async fn take_over(&mut self, now: Instant, force: bool, mut pending: Pending) {
        if self.node.holds_vips() {
            // Nothing to wait for: it stays Active, and nobody preempts it.
            pending.step(now, "Active already");
            pending.succeed(self.fence.epoch(), None);
            return self.feed(Input::Takeover).await;
        }
        self.pending = Some(pending);
        if self.handover.is_some() && self.node.state() == State::Backup {
            self.tell_handover(now, handover::Input::Takeover { force }).await;
        } else {
            self.claim().await;
        }
    }

    /// Claims by adverts, unless there is an Active that they can't outrank.
    pub(super) async fn claim(&mut self) {
        if let Some(owner) = self.node.outranked_by() {
            if let Some(pending) = self.pending.take() {
                pending.refuse(Refused::Outranked(owner));
            }
            return;
        }
        self.feed(Input::Takeover).await;
    }

    /// How long another node may take to claim the VIPs.
    pub(super) fn yield_patience(&self) -> Duration {
        // Active_Down_Interval of a Backup is below 4 intervals.
        4 * self.config.advert_interval.duration() + YIELD_MARGIN
    }

    /// What a transition means for the command that is waiting.
    pub(super) fn settle(&mut self, now: Instant, transition: Transition) {
        let Some(mut pending) = self.pending.take() else { return };
        let Transition { from, to, reason } = transition;
        pending.step(now, format!("{from:?} to {to:?} ({reason:?})"));
        match (pending.kind, to) {
            (Kind::Takeover, State::Active) | (Kind::Yield, State::Backup) => {
                self.pending = Some(pending);
            }
            (Kind::Yield, State::Active) => {
                let elapsed = pending.elapsed(now);
                pending.refuse(Refused::Unclaimed(elapsed));
            }
            (Kind::Takeover, State::Backup | State::Initialize)
            | (Kind::Yield, State::Initialize) => {
                let why =
                    self.node.fault().unwrap_or_else(|| format!("it left Active: {reason:?}"));
                pending.refuse(Refused::Fault(why));
            }
        }
    }

    /// A yield has come to its end once another node advertises.
    pub(super) fn another_is_active(&mut self, advert: &Advert) {
        // Who was given them says so.
        let handed_over = self.handover.as_ref().is_some_and(|machine| machine.has_command());
        if advert.priority == Priority::YIELD || self.node.state() == State::Active || handed_over {
            return;
        }
        if let Some(mut pending) = self.pending.take_if(|pending| pending.kind == Kind::Yield) {
            let active = self.neighbors.active().cloned();
            pending.step(Instant::now(), format!("{} advertises", advert.source));
            pending.succeed(self.fence.epoch(), active);
        }
    }

    /// Ends a command that has waited for too long.
    pub(super) fn give_up(&mut self, now: Instant) {
        if let Some(pending) = self.pending.take_if(|pending| pending.deadline <= now) {
            let why = match pending.kind {
                Kind::Takeover => Refused::Fault("the kernel does not configure the VIPs".into()),
                Kind::Yield => Refused::Unclaimed(pending.elapsed(now)),
            };
            pending.refuse(why);
        }
    }
}
