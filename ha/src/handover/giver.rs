//! The end of the node that has the VIPs.

use std::time::{Duration, Instant};

use super::message::micros;
use super::{
    ANSWER, CATCH_UP, Command, FLUSH, Handover, Machine, Other, Output, PeerId, Refusal, State,
    Took, Why,
};
use crate::vrrp::router::{GIVEN_PATIENCE, State as Role, Wish};

/// To whom, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Giving {
    peer: PeerId,
    /// The asker's, or, before it has asked, this node's own of the offer.
    run: u64,
    wish: Wish,
    force: bool,
    /// When it asked, or was offered the VIPs.
    since: Instant,
    stage: Stage,
    deadline: Instant,
    took: Took,
    lacking: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It was offered the VIPs.
    Offered,
    /// Its flows are brought up to date.
    CatchingUp,
    /// No packet passes: the last delta, and the asker's word, are awaited.
    Frozen { flushed: bool, willing: bool },
    /// The VIPs are being released.
    Releasing,
    /// They are the asker's.
    Given,
}

impl Giving {
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(super) fn is_frozen(&self) -> bool {
        matches!(self.stage, Stage::Frozen { .. })
    }

    pub(super) fn is_over(&self) -> bool {
        self.stage == Stage::Given
    }

    fn is(&self, peer: PeerId, run: u64) -> bool {
        self.peer == peer && self.run == run
    }

    fn elapsed_us(&self, now: Instant) -> u32 {
        micros(now - self.since)
    }
}

impl Machine {
    /// The operator wants this node to be rid of the VIPs.
    pub(super) fn yield_vips(&mut self, now: Instant, force: bool) {
        if let State::Giving(_) = self.state {
            return self.outputs.push_back(Output::Refused(Refusal::Busy));
        }
        self.command = Some(Command::Yield { force });
        self.offer(now, 0, Refusal::NoPeer);
    }

    /// Offers the VIPs to the first peer from this one on; `last` is why the one before was not it.
    fn offer(&mut self, now: Instant, from: PeerId, last: Refusal) {
        self.state = State::Idle;
        let Some(Command::Yield { force }) = self.command else { return };
        let Some(peer) = (from..self.up.len()).find(|peer| self.up[*peer]) else {
            return self.fail_command(now, last);
        };
        self.run += 1;
        let run = self.run;
        self.step(None, now, "offered the VIPs");
        self.send(peer, Handover::Offer { run });
        self.state = State::Giving(Giving {
            peer,
            run,
            wish: Wish::Yield,
            force,
            since: now,
            stage: Stage::Offered,
            deadline: now + ANSWER,
            took: Took::default(),
            lacking: 0,
        });
    }

    pub(super) fn asked(&mut self, now: Instant, peer: PeerId, run: u64, wish: Wish, force: bool) {
        let offered = |giving: &Giving| giving.stage == Stage::Offered && giving.peer == peer;
        let (wish, force) = match self.state {
            _ if self.election.role != Role::Active => {
                return self.refuse(peer, run, Why::NotActive);
            }
            State::Idle if wish == Wish::Yield => return self.refuse(peer, run, Why::NotActive),
            State::Idle => (wish, force),
            State::Giving(giving) if offered(&giving) => (wish, force || giving.force),
            // Its last one, which it has given up without our knowing.
            State::Giving(giving) if giving.peer == peer && giving.stage == Stage::CatchingUp => {
                (wish, force)
            }
            _ => return self.refuse(peer, run, Why::Busy),
        };
        let giving = Giving {
            peer,
            run,
            wish,
            force,
            since: now,
            stage: Stage::CatchingUp,
            deadline: now + CATCH_UP,
            took: Took::default(),
            lacking: 0,
        };
        self.step(Some(peer), now, "asked for the VIPs");
        self.send(peer, Handover::Heard { run });
        self.state = State::Giving(giving);
        if self.config.replicates {
            self.outputs.push_back(Output::CatchUp { peer, run });
        } else {
            self.freeze(now, giving);
        }
    }

    pub(super) fn caught_up(&mut self, now: Instant, run: u64) {
        if let State::Giving(giving @ Giving { stage: Stage::CatchingUp, .. }) = self.state
            && giving.run == run
        {
            self.freeze(now, giving);
        }
    }

    pub(super) fn behind(&mut self, now: Instant, run: u64, lacking: u64, of: u64) {
        if let State::Giving(giving @ Giving { stage: Stage::CatchingUp, .. }) = self.state
            && giving.run == run
        {
            match giving.force {
                true => self.freeze(now, Giving { lacking, ..giving }),
                false => self.think_better(now, giving, Why::Behind { lacking, of }),
            }
        }
    }

    fn freeze(&mut self, now: Instant, giving: Giving) {
        let Giving { peer, run, .. } = giving;
        let took = Took { caught_up_us: giving.elapsed_us(now), ..giving.took };
        let flushed = !self.config.replicates;
        let stage = Stage::Frozen { flushed, willing: false };
        self.state = State::Giving(Giving { stage, deadline: now + FLUSH, took, ..giving });
        self.send(peer, Handover::Ready { run });
        if !flushed {
            self.outputs.push_back(Output::Freeze { peer, run });
            self.step(None, now, "stopped forwarding: the last delta");
        }
    }

    pub(super) fn flushed(&mut self, now: Instant, run: u64, lacking: u64) {
        let State::Giving(giving) = self.state else { return };
        let Stage::Frozen { willing, .. } = giving.stage else { return };
        if giving.run != run {
            return;
        }
        if lacking > 0 && !giving.force {
            return self.think_better(now, giving, Why::Late { lacking });
        }
        let took = Took { flushed_us: giving.elapsed_us(now), ..giving.took };
        let lacking = lacking.max(giving.lacking);
        let stage = Stage::Frozen { flushed: true, willing };
        self.state = State::Giving(Giving { stage, took, lacking, ..giving });
        if lacking == 0 {
            self.step(None, now, "the last delta is acknowledged");
        }
        self.release_if_due();
    }

    pub(super) fn go(&mut self, _now: Instant, peer: PeerId, run: u64) {
        let State::Giving(giving) = self.state else { return };
        if let (true, Stage::Frozen { flushed, .. }) = (giving.is(peer, run), giving.stage) {
            let stage = Stage::Frozen { flushed, willing: true };
            self.state = State::Giving(Giving { stage, ..giving });
            self.release_if_due();
        }
    }

    /// The point of no return.
    fn release_if_due(&mut self) {
        if let State::Giving(giving) = self.state
            && giving.stage == (Stage::Frozen { flushed: true, willing: true })
        {
            self.state = State::Giving(Giving { stage: Stage::Releasing, ..giving });
            self.outputs.push_back(Output::Give(giving.wish));
        }
    }

    /// Nothing came of it, and nothing has changed.
    fn think_better(&mut self, now: Instant, giving: Giving, why: Why) {
        let Giving { peer, run, .. } = giving;
        self.refuse(peer, run, why);
        self.leave(now, giving, Refusal::Said(peer, why));
    }

    /// Goes on as the Active; an operator's yield goes on to the next peer.
    fn leave(&mut self, now: Instant, giving: Giving, refusal: Refusal) {
        if giving.is_frozen() {
            self.outputs.push_back(Output::Thaw);
        }
        self.offer(now, giving.peer + 1, refusal);
    }

    fn refuse(&mut self, peer: PeerId, run: u64, why: Why) {
        self.send(peer, Handover::Refuse { run, why });
    }

    pub(super) fn offer_refused(
        &mut self,
        now: Instant,
        giving: Giving,
        peer: PeerId,
        run: u64,
        why: Why,
    ) {
        if giving.is(peer, run) && giving.stage == Stage::Offered {
            self.offer(now, peer + 1, Refusal::Said(peer, why));
        }
    }

    pub(super) fn cancelled(&mut self, now: Instant, peer: PeerId, run: u64) {
        let State::Giving(giving) = self.state else { return };
        let early = matches!(giving.stage, Stage::CatchingUp | Stage::Frozen { .. });
        if giving.is(peer, run) && early {
            self.leave(now, giving, Refusal::Silent(peer));
        }
    }

    pub(super) fn giver_elected(&mut self, now: Instant, giving: Giving) {
        let active = self.election.role == Role::Active;
        match giving.stage {
            Stage::Releasing if !active => self.give(now, giving),
            // Something else has ended this node's time.
            Stage::Offered | Stage::CatchingUp | Stage::Frozen { .. } if !active => {
                if giving.stage != Stage::Offered {
                    self.refuse(giving.peer, giving.run, Why::NotActive);
                }
                self.idle();
                self.outputs.push_back(Output::Thaw);
            }
            // Nobody took them, and they are this node's again.
            Stage::Given if active => self.idle(),
            Stage::Given
            | Stage::Releasing
            | Stage::Offered
            | Stage::CatchingUp
            | Stage::Frozen { .. } => {}
        }
    }

    /// The VIPs are released.
    fn give(&mut self, now: Instant, giving: Giving) {
        let Giving { peer, run, lacking, .. } = giving;
        let took = Took { released_us: giving.elapsed_us(now), ..giving.took };
        let valid_us = micros(self.valid());
        let epoch = self.election.epoch;
        self.send(peer, Handover::Give { run, epoch, valid_us, lacking, took });
        let what = format!("released the VIPs and gave them, epoch {epoch}");
        self.step(None, now, what);
        self.outputs.push_back(Output::Lacking(lacking));
        let patience = (4 * self.config.advert_interval).max(GIVEN_PATIENCE);
        let deadline = now + patience + Duration::from_millis(500);
        let stage = Stage::Given;
        self.state = State::Giving(Giving { stage, took, since: now, deadline, ..giving });
    }

    pub(super) fn taken(&mut self, now: Instant, peer: PeerId, run: u64, epoch: u64, took_us: u32) {
        let State::Giving(giving) = self.state else { return };
        if giving.is(peer, run) && giving.stage == Stage::Given {
            let took = Duration::from_micros(took_us.into());
            let way = (now - giving.since).saturating_sub(took) / 2;
            let at = (giving.since + way + took).min(now);
            self.step(Some(peer), at, format!("announced the VIPs, epoch {epoch}"));
            self.end_of_giving(peer);
        }
    }

    fn end_of_giving(&mut self, peer: PeerId) {
        self.state = State::Idle;
        if let Some(Command::Yield { .. }) = self.command.take() {
            self.outputs.push_back(Output::Yielded(peer));
        }
    }

    pub(super) fn giver_down(&mut self, now: Instant, giving: Giving, peer: PeerId) {
        if giving.peer != peer {
            return;
        }
        match giving.stage {
            Stage::Offered | Stage::CatchingUp | Stage::Frozen { .. } => {
                self.leave(now, giving, Refusal::Lost(peer));
            }
            // It is told in vain, and found out below.
            Stage::Releasing => {}
            Stage::Given => {
                self.idle();
                self.outputs.push_back(Output::TakerGone);
            }
        }
    }

    pub(super) fn giver_timeout(&mut self, now: Instant, giving: Giving) {
        if giving.deadline > now {
            return;
        }
        let Giving { peer, lacking, .. } = giving;
        match giving.stage {
            Stage::Offered => {
                self.offer(now, peer + 1, Refusal::NoAnswer(peer, ANSWER));
            }
            Stage::CatchingUp => {
                self.think_better(now, giving, Why::Behind { lacking, of: lacking })
            }
            // Forced, it goes without an acknowledgement; never without the asker's word.
            Stage::Frozen { willing: true, .. } if giving.force => {
                let stage = Stage::Frozen { flushed: true, willing: true };
                self.state = State::Giving(Giving { stage, ..giving });
                self.release_if_due();
            }
            Stage::Frozen { .. } => self.think_better(now, giving, Why::Late { lacking }),
            Stage::Releasing => {
                let deadline = now + FLUSH;
                self.state = State::Giving(Giving { deadline, ..giving });
            }
            // It may have taken them, and its word was lost.
            Stage::Given => match self.election.active {
                Other::Peer(peer) => self.end_of_giving(peer),
                Other::Nobody | Other::Stranger => self.idle(),
            },
        }
    }
}
