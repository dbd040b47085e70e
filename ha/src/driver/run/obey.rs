//! The operator's commands, from their arrival to their end.

use std::time::Instant;

use super::{Driver, Flow, YIELD_MARGIN};
use crate::driver::commands::{Kind, Pending};
use crate::driver::{Command, Refused};
use crate::node::Input;
use crate::vrrp::Priority;
use crate::vrrp::router::{Advert, State, Transition};

impl Driver {
    pub(super) async fn command(&mut self, command: Command) -> Flow {
        let now = Instant::now();
        if let Some(pending) = self.pending.take() {
            pending.refuse(Refused::Superseded);
        }
        match command {
            Command::Takeover(answer) => {
                if let Some(fault) = self.node.fault() {
                    let _ = answer.send(Err(Refused::Fault(fault)));
                } else if let Some(owner) = self.node.outranked_by() {
                    let _ = answer.send(Err(Refused::Outranked(owner)));
                } else {
                    let mut pending = Pending::takeover(now, answer);
                    if self.node.holds_vips() {
                        // Nothing to wait for: it stays Active, and nobody preempts it.
                        pending.step(now, "Active already");
                        pending.succeed(None);
                    } else {
                        self.pending = Some(pending);
                    }
                    self.feed(Input::Takeover).await;
                }
                Flow::Continue
            }
            Command::Yield(answer) => {
                if self.node.state() == State::Active {
                    // Active_Down_Interval of a Backup is below 4 intervals.
                    let patience = 4 * self.config.advert_interval.duration() + YIELD_MARGIN;
                    self.pending = Some(Pending::yielding(now, patience, answer));
                    self.feed(Input::Yield).await;
                } else {
                    let _ = answer.send(Err(Refused::NotActive));
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
        if advert.priority == Priority::YIELD || self.node.state() == State::Active {
            return;
        }
        if let Some(mut pending) = self.pending.take_if(|pending| pending.kind == Kind::Yield) {
            let active = self.neighbors.active().cloned();
            pending.step(Instant::now(), format!("{} advertises", advert.source));
            pending.succeed(active);
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
