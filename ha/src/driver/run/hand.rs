//! Handovers: what the machine is told, and what it wants done.

use std::net::IpAddr;
use std::time::Instant;

use tracing::{info, warn};

use super::{Driver, VIEW_HEARD};
use crate::channel::message::Message;
use crate::channel::wire;
use crate::driver::channels::PeerPlace;
use crate::driver::{PeerEvent, Refused, Report, WaitingView};
use crate::handover::{Election, Input, Other, Output, Refusal, Why};
use crate::lease;
use crate::node;
use crate::record::{What, Words};
use crate::vrrp::router::{PreemptBy, State};

impl Driver {
    /// Tells the machine what happened, how the election stands before that, and does what it wants.
    pub(super) async fn tell_handover(&mut self, now: Instant, input: Input) {
        self.tell_election(now);
        if let Some(machine) = &mut self.handover {
            machine.handle_input(now, input);
        }
        self.oblige(now).await;
    }

    /// The same at the end of a turn, for what came meanwhile, and for time.
    pub(super) async fn hand_over(&mut self, now: Instant) {
        self.tell_election(now);
        let announced = std::mem::take(&mut self.announced);
        let Some(machine) = &mut self.handover else { return };
        if announced {
            machine.handle_input(now, Input::Announced);
        }
        if machine.poll_timeout().is_some_and(|at| at <= now) {
            machine.handle_timeout(now);
        }
        self.oblige(now).await;
    }

    pub(super) async fn report(&mut self, report: Report) {
        let input = match report {
            Report::Replicates => Input::Replicates(true),
            Report::CaughtUp { run } => Input::CaughtUp { run },
            Report::Behind { run, lacking, of } => Input::Behind { run, lacking, of },
            Report::Flushed { run, lacking } => Input::Flushed { run, lacking },
        };
        self.tell_handover(Instant::now(), input).await;
    }

    /// Who is on the other side of the channel does not lose the VIPs to a node of higher priority
    /// before that one is in sync; everybody else does as RFC 9568 has it.
    pub(super) fn choose_preemption(&mut self, active: IpAddr) {
        let replicates = self.handover.as_ref().is_some_and(|machine| machine.replicates());
        let way = match (replicates, self.place_of(active)) {
            (true, Some(_)) => PreemptBy::Asking,
            (true, None) | (false, _) => PreemptBy::Claiming,
        };
        if way != self.preempt_by {
            self.preempt_by = way;
            self.node.handle_input(Instant::now(), node::Input::PreemptBy(way));
        }
    }

    fn tell_election(&mut self, now: Instant) {
        let election = self.election(now);
        if self.election != Some(election)
            && let Some(machine) = &mut self.handover
        {
            self.election = Some(election);
            machine.handle_input(now, Input::Election(election));
        }
    }

    fn election(&self, now: Instant) -> Election {
        let lively = |at: Instant, interval| now.saturating_duration_since(at) < 4 * interval;
        let heard = self.neighbors.active().filter(|heard| lively(heard.at, heard.interval));
        let active = match heard {
            None => Other::Nobody,
            Some(heard) => match self.place_of(heard.address) {
                Some(place) => Other::Peer(place),
                None => Other::Stranger,
            },
        };
        Election {
            role: self.node.state(),
            epoch: self.fence.epoch(),
            active,
            wants_to_preempt: self.node.wants_to_preempt(),
            lease_until: self.active_lease.map(|(_, until)| until),
        }
    }

    /// Does what the machine wants, in its order.
    async fn oblige(&mut self, now: Instant) {
        while let Some(output) = self.handover.as_mut().and_then(|machine| machine.poll_output()) {
            match output {
                Output::Send(place, message) => {
                    let message = wire::encode(&Message::Handover(message));
                    if let Some(channels) = &mut self.channels {
                        channels.send(place, &message);
                    }
                }
                Output::CatchUp { peer: place, run } => {
                    self.tell(now, place, PeerEvent::CatchUp { place, run });
                }
                Output::Freeze { peer: place, run } => {
                    if let Some(lease) = &self.lease {
                        lease.close();
                    }
                    self.tell(now, place, PeerEvent::Flush { place, run });
                }
                Output::Thaw => self.thaw(now),
                Output::Give(wish) => self.feed(node::Input::Give(wish)).await,
                Output::Take { wish, epoch } => {
                    self.fence.heard_of(epoch);
                    self.feed(node::Input::Take(wish)).await;
                }
                Output::Claim => self.claim().await,
                Output::Abandon => {
                    let deadline = Instant::now() + self.yield_patience();
                    if let Some(pending) = &mut self.pending {
                        pending.deadline = deadline;
                    }
                    self.feed(node::Input::Yield).await;
                }
                Output::TakerGone => {
                    // It may have begun to answer.
                    let lease = lease::length(self.config.advert_interval.duration());
                    self.feed(node::Input::ActiveGone(lease)).await;
                }
                Output::Step { peer, at, what } => self.handover_step(peer, at, what),
                Output::Lacking(lacking) => self.lacking(lacking),
                Output::Yielded(_) => {
                    let active = self.neighbors.active().cloned();
                    if let Some(pending) = self.pending.take() {
                        pending.succeed(self.fence.epoch(), active);
                    }
                }
                Output::Refused(refusal) => self.refused(refusal),
                Output::GaveUp(place, why) => self.gave_up(place, why),
            }
            // What was done may have changed who is Active.
            self.tell_election(Instant::now());
        }
        self.publish_by(now + VIEW_HEARD);
    }

    /// Packets pass again.
    fn thaw(&mut self, now: Instant) {
        if let (State::Active, Some(epoch)) = (self.node.state(), self.fence.holding()) {
            self.renew_lease(now, epoch);
        }
        self.tell(now, 0, PeerEvent::FlushOver);
    }

    fn handover_step(&mut self, peer: Option<PeerPlace>, at: Instant, what: String) {
        let peer = peer.map(|place| self.peer_name(place));
        if let Some(pending) = &mut self.pending {
            pending.step_by(peer.clone(), at, what.clone());
        }
        let node = peer.unwrap_or_else(|| self.config.node.clone());
        let words = Words::of(format_args!("handover: {node}: {what}"));
        self.record(Instant::now(), What::Did(words));
        self.journal.say(move || info!(node, "handover: {what}"));
    }

    fn lacking(&mut self, lacking: u64) {
        if let Some(pending) = &mut self.pending {
            pending.lacking = Some(lacking);
        }
        if lacking > 0 {
            self.journal.say(move || warn!(lacking, "handover without these flows, by force"));
        }
    }

    fn refused(&mut self, refusal: Refusal) {
        let words = self.words(refusal);
        if let Some(pending) = self.pending.take() {
            pending.refuse(match refusal {
                Refusal::Silent(_) | Refusal::Busy => Refused::Left(words),
                Refusal::NoChannel(_)
                | Refusal::NoAnswer(..)
                | Refusal::Said(..)
                | Refusal::Lost(_)
                | Refusal::NoPeer => Refused::Unready(words),
            });
        }
    }

    fn gave_up(&mut self, place: PeerPlace, why: Option<Refusal>) {
        let active = self.peer_name(place);
        let why = why.map(|refusal| self.words(refusal));
        let waited = self.config.preempt_wait;
        let lack = why.as_deref().unwrap_or("it was not asked in time");
        let words = Words::of(format_args!("it leaves {active} alone, not being in sync: {lack}"));
        self.record(Instant::now(), What::Waits(words));
        self.journal.say(move || {
            warn!(
                active,
                ?waited,
                why,
                "this node has the higher priority and does not preempt: it is not in sync; \
                 `baton takeover --force` does it all the same"
            );
        });
    }

    /// What keeps this node from preempting, for the view.
    pub(super) fn waiting(&self) -> Option<WaitingView> {
        let waiting = self.handover.as_ref()?.waiting()?;
        let flows = match waiting.why {
            Some(Refusal::Said(_, Why::Behind { lacking, of })) => {
                Some((of.saturating_sub(lacking), of))
            }
            _ => None,
        };
        Some(WaitingView {
            peer: self.peer_name(waiting.peer),
            since: waiting.since,
            until: waiting.until,
            why: waiting.why.map(|refusal| self.words(refusal)),
            flows,
        })
    }

    fn peer_name(&self, place: PeerPlace) -> String {
        let peer = self.channels.as_ref().and_then(|channels| channels.peers.get(place));
        peer.map_or_else(|| "?".to_owned(), |peer| peer.name.clone())
    }

    fn words(&self, refusal: Refusal) -> String {
        match refusal {
            Refusal::NoChannel(place) => {
                let peer = self.channels.as_ref().and_then(|channels| channels.peers.get(place));
                let why = peer.and_then(|peer| peer.why.as_deref()).unwrap_or("not connected yet");
                format!(
                    "{} is Active, and there is no peer channel to it ({why})",
                    self.peer_name(place)
                )
            }
            Refusal::NoAnswer(place, waited) => format!(
                "{} did not answer within {} ms: it may be frozen, or the channel cut",
                self.peer_name(place),
                waited.as_millis()
            ),
            Refusal::Said(place, why) => format!("{}: {why}", self.peer_name(place)),
            Refusal::Lost(place) => {
                format!("the peer channel to {} was lost on the way", self.peer_name(place))
            }
            Refusal::Silent(place) => format!(
                "{} was about to hand over and then said nothing more: the election decides, see \
                 `baton status`",
                self.peer_name(place)
            ),
            Refusal::NoPeer => "no Backup is connected to the peer channel".to_owned(),
            Refusal::Busy => "a handover is under way: say it again in a moment".to_owned(),
        }
    }
}
