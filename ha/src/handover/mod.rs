//! The VIPs go from one node to another as a transaction, by messages on the peer channel
//! ([`message`]): takeover, yield, and the return of a node of higher priority.
//!
//! Pure: [`Machine::handle_input`], [`Machine::handle_timeout`], [`Machine::poll_timeout`],
//! [`Machine::poll_output`]. It decides when this node asks, gives and takes. Who is Active is
//! still the virtual router's word ([`crate::vrrp::router`]): until the Active has released nothing
//! has changed, and from then on each timer of the election that runs out finds a node without an
//! Active, as after any yield. So wherever a node dies or a message is lost, the election's rules
//! decide; the transaction only makes sure that they need not.
//!
//! The asker takes what it is given only for as long as the giver does not take it back, counted from
//! its own [`Handover::Go`], which is before the giver gave: no clocks are compared.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::vrrp::router::{GIVEN_PATIENCE, State as Role, Wish};

mod giver;
pub mod message;
mod preempt;
#[cfg(test)]
mod simulation;

pub use message::{Handover, Took, Why};
pub use preempt::Waiting;

use message::micros;
use preempt::Preempt;

/// How long a peer may take to say that it has heard.
pub const ANSWER: Duration = Duration::from_millis(500);
/// How long the giver may take until it is ready, from the asker's view.
pub const READY: Duration = Duration::from_secs(4);
/// How long bringing the asker up to date may take.
pub const CATCH_UP: Duration = Duration::from_secs(2);
/// How long no packet passes before the giver thinks better of it.
pub const FLUSH: Duration = Duration::from_millis(150);
/// How often a node asks that is to preempt.
pub const ASK_AGAIN: Duration = Duration::from_millis(200);

/// A peer, by its place in the configuration.
pub type PeerId = usize;

/// What the machine must know.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// How many peers there are on the channel.
    pub peers: usize,
    /// This node's Advertisement_Interval.
    pub advert_interval: Duration,
    /// How long a node that is to preempt waits until it is in sync.
    pub preempt_wait: Duration,
    /// Whether flows are replicated, for the time being.
    pub replicates: bool,
}

/// How the election stands, from this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Election {
    /// Of this node.
    pub role: Role,
    /// The highest epoch that was heard of.
    pub epoch: u64,
    /// Who else is Active.
    pub active: Other,
    /// Whether this node is to preempt that one by asking.
    pub wants_to_preempt: bool,
    /// Until when that one may answer for the VIPs though it is not heard any more.
    pub lease_until: Option<Instant>,
}

/// Who is Active, if it is not this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Other {
    /// Nobody that was heard of lately.
    Nobody,
    /// A peer of the channel.
    Peer(PeerId),
    /// A node with which there is no peer channel in the configuration.
    Stranger,
}

/// What happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The election stands so now.
    Election(Election),
    /// There is a connection with a peer.
    Up(PeerId),
    /// There is none any more.
    Down(PeerId),
    /// A peer says something.
    Message(PeerId, Handover),
    /// The operator wants this node Active.
    Takeover {
        /// Whatever it costs.
        force: bool,
    },
    /// The operator wants this node not to be Active.
    Yield {
        /// Whatever it costs.
        force: bool,
    },
    /// Whether flows are replicated.
    Replicates(bool),
    /// The peer of [`Output::CatchUp`] has everything but for what is happening now.
    CaughtUp {
        /// As it was asked for.
        run: u64,
    },
    /// It has not, or not in time.
    Behind {
        /// As it was asked for.
        run: u64,
        /// Flows that it has not acknowledged.
        lacking: u64,
        /// Flows that there are.
        of: u64,
    },
    /// What [`Output::Freeze`] asked for is done; what was not acknowledged in time, `lacking` says.
    Flushed {
        /// As it was asked for.
        run: u64,
        /// Changes that are not acknowledged.
        lacking: u64,
    },
    /// The VIPs are announced by this node.
    Announced,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Say something to a peer.
    Send(PeerId, Handover),
    /// Bring a peer's flows up to date: answered by [`Input::CaughtUp`] or [`Input::Behind`].
    CatchUp {
        /// Whose.
        peer: PeerId,
        /// To be handed back.
        run: u64,
    },
    /// Let no packet for a VIP pass any more, and have the last delta acknowledged: answered by
    /// [`Input::Flushed`].
    Freeze {
        /// By whom.
        peer: PeerId,
        /// To be handed back.
        run: u64,
    },
    /// Nothing came of it: let packets pass again, if this node is still Active.
    Thaw,
    /// Release the VIPs, then say how the election stands.
    Give(Wish),
    /// Claim the VIPs under an epoch above this one, then say how the election stands.
    Take {
        /// On whose wish.
        wish: Wish,
        /// The giver's epoch.
        epoch: u64,
    },
    /// Claim the VIPs by adverts alone, as an operator's takeover.
    Claim,
    /// Give the VIPs to whoever claims them, as an operator's yield.
    Abandon,
    /// The node that took the VIPs has died before it was heard as Active.
    TakerGone,
    /// Something was done, for whoever waits for the end.
    Step {
        /// By whom; `None`: by this node.
        peer: Option<PeerId>,
        /// When.
        at: Instant,
        /// What.
        what: String,
    },
    /// Flows that the new Active may lack.
    Lacking(u64),
    /// The operator's yield has come to its end: this peer has the VIPs.
    Yielded(PeerId),
    /// Nothing came of the operator's command, and nothing has changed.
    Refused(Refusal),
    /// To be logged: this node leaves an Active of lower priority alone.
    GaveUp(PeerId, Option<Refusal>),
}

/// Why nothing came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There is no connection with the node that is Active.
    NoChannel(PeerId),
    /// It did not answer.
    NoAnswer(PeerId, Duration),
    /// It said why.
    Said(PeerId, Why),
    /// The connection was lost on the way.
    Lost(PeerId),
    /// It was to give, and then said nothing more: who is Active is the election's word.
    Silent(PeerId),
    /// There is no connection with any peer.
    NoPeer,
    /// A handover is under way already, and past the point at which it could be left.
    Busy,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    election: Election,
    up: Vec<bool>,
    /// Of the last transaction that this node began.
    run: u64,
    state: State,
    command: Option<Command>,
    preempt: Option<Preempt>,
    outputs: VecDeque<Output>,
}

/// What the operator has said, until it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Takeover { force: bool },
    Yield { force: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// Asked, and waits for what comes next until the deadline.
    Asking {
        asked: Asked,
        heard: bool,
        deadline: Instant,
    },
    /// Said that it takes what is given.
    Willing {
        asked: Asked,
        go_at: Instant,
        deadline: Instant,
    },
    /// Was given the VIPs, and announces them.
    Taking {
        asked: Asked,
        since: Instant,
    },
    /// The operator insists: as soon as the node that does not answer advertises, or its lease is
    /// over.
    Insisting {
        until: Instant,
    },
    Giving(giver::Giving),
}

/// A transaction as the asker knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    peer: PeerId,
    run: u64,
    wish: Wish,
    at: Instant,
}

impl Machine {
    /// A machine on which nothing is under way.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            election: Election {
                role: Role::Initialize,
                epoch: 0,
                active: Other::Nobody,
                wants_to_preempt: false,
                lease_until: None,
            },
            up: vec![false; config.peers],
            run: 0,
            state: State::Idle,
            command: None,
            preempt: None,
            outputs: VecDeque::new(),
        }
    }

    /// Takes in what happened.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        match input {
            Input::Election(election) => self.elected(now, election),
            Input::Up(peer) => self.set_up(peer, true),
            Input::Down(peer) => {
                self.set_up(peer, false);
                self.down(now, peer);
            }
            Input::Message(peer, message) if peer < self.up.len() => {
                self.message(now, peer, message);
            }
            Input::Message(..) => {}
            Input::Takeover { force } => self.takeover(now, force),
            Input::Yield { force } => self.yield_vips(now, force),
            Input::Replicates(replicates) => self.config.replicates = replicates,
            Input::CaughtUp { run } => self.caught_up(now, run),
            Input::Behind { run, lacking, of } => self.behind(now, run, lacking, of),
            Input::Flushed { run, lacking } => self.flushed(now, run, lacking),
            Input::Announced => self.announced(now),
        }
        self.preempt(now);
    }

    /// Does what is due. To be called at [`Machine::poll_timeout`], and never harmful before.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::Asking { asked, heard, deadline } if deadline <= now => {
                let waited = if heard { now - asked.at } else { ANSWER };
                self.send(asked.peer, Handover::Cancel { run: asked.run });
                self.not_given(now, asked, Refusal::NoAnswer(asked.peer, waited));
            }
            State::Willing { asked, deadline, .. } if deadline <= now => {
                self.not_given(now, asked, Refusal::Silent(asked.peer));
            }
            State::Insisting { until } if until <= now => self.claim(),
            State::Giving(giving) => self.giver_timeout(now, giving),
            State::Idle
            | State::Asking { .. }
            | State::Willing { .. }
            | State::Taking { .. }
            | State::Insisting { .. } => {}
        }
        self.preempt(now);
    }

    /// When [`Machine::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Idle => self.preempt.as_ref().and_then(Preempt::deadline),
            State::Taking { .. } => None,
            State::Asking { deadline, .. } | State::Willing { deadline, .. } => Some(deadline),
            State::Insisting { until } => Some(until),
            State::Giving(giving) => Some(giving.deadline()),
        }
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether this node lets no packet for a VIP pass, though it is Active.
    pub fn is_frozen(&self) -> bool {
        matches!(self.state, State::Giving(giving) if giving.is_frozen())
    }

    /// Whether flows are replicated, so that VIPs do not move before they are.
    pub fn replicates(&self) -> bool {
        self.config.replicates
    }

    /// Whether an operator's command is under way.
    pub fn has_command(&self) -> bool {
        self.command.is_some()
    }

    /// What a node of higher priority than the Active's waits for.
    pub fn waiting(&self) -> Option<Waiting> {
        self.preempt.as_ref().map(|preempt| preempt.waiting(self.config.preempt_wait))
    }

    fn send(&mut self, peer: PeerId, message: Handover) {
        self.outputs.push_back(Output::Send(peer, message));
    }

    fn step(&mut self, peer: Option<PeerId>, at: Instant, what: impl Into<String>) {
        self.outputs.push_back(Output::Step { peer, at, what: what.into() });
    }

    fn set_up(&mut self, peer: PeerId, is_up: bool) {
        if let Some(up) = self.up.get_mut(peer) {
            *up = is_up;
        }
    }

    fn elected(&mut self, now: Instant, election: Election) {
        let before = std::mem::replace(&mut self.election, election);
        let active = election.role == Role::Active;
        match self.state {
            // The election was faster: whoever was asked is gone.
            State::Asking { asked, .. } | State::Willing { asked, .. } if active => {
                self.send(asked.peer, Handover::Cancel { run: asked.run });
                self.become_active_alone();
            }
            State::Insisting { .. } if active => self.become_active_alone(),
            // It was heard just now, so it hears the claim.
            State::Insisting { until } if election.lease_until.is_some_and(|end| end > until) => {
                self.claim();
            }
            State::Asking { asked, .. } | State::Willing { asked, .. }
                if election.role == Role::Initialize =>
            {
                self.send(asked.peer, Handover::Cancel { run: asked.run });
                self.idle();
            }
            State::Taking { .. } if !active && before.role == Role::Active => self.idle(),
            State::Insisting { .. } if election.role != before.role => self.idle(),
            State::Giving(giving) => self.giver_elected(now, giving),
            State::Idle
            | State::Asking { .. }
            | State::Willing { .. }
            | State::Taking { .. }
            | State::Insisting { .. } => {}
        }
    }

    /// It is Active by election: where the operator wanted that, it is to stay so.
    fn become_active_alone(&mut self) {
        self.state = State::Idle;
        match self.command {
            Some(Command::Takeover { .. }) => self.claim(),
            Some(Command::Yield { .. }) | None => self.command = None,
        }
    }

    fn idle(&mut self) {
        self.state = State::Idle;
        self.command = None;
    }

    fn claim(&mut self) {
        self.idle();
        self.outputs.push_back(Output::Claim);
    }

    fn down(&mut self, now: Instant, peer: PeerId) {
        match self.state {
            State::Asking { asked, .. } if asked.peer == peer => {
                self.not_given(now, asked, Refusal::Lost(peer));
            }
            // It may have given: the election will tell.
            State::Willing { asked, .. } if asked.peer == peer => {
                self.not_given(now, asked, Refusal::Silent(peer));
            }
            State::Giving(giving) => self.giver_down(now, giving, peer),
            State::Idle
            | State::Asking { .. }
            | State::Willing { .. }
            | State::Taking { .. }
            | State::Insisting { .. } => {}
        }
    }

    fn takeover(&mut self, now: Instant, force: bool) {
        match self.state {
            // Given is given, whether or not the other has said that it has them.
            State::Giving(giving) if giving.is_over() => {}
            State::Willing { .. } | State::Taking { .. } | State::Giving(_) => {
                return self.outputs.push_back(Output::Refused(Refusal::Busy));
            }
            // The operator's word counts more than the priorities.
            State::Asking { asked, .. } => {
                self.send(asked.peer, Handover::Cancel { run: asked.run });
            }
            State::Idle | State::Insisting { .. } => {}
        }
        self.state = State::Idle;
        self.command = Some(Command::Takeover { force });
        match self.election.active {
            Other::Peer(peer) if self.up[peer] => self.ask(now, peer, Wish::Takeover, force),
            Other::Peer(peer) => self.fail_command(now, Refusal::NoChannel(peer)),
            // There is nobody to ask.
            Other::Nobody | Other::Stranger => self.claim(),
        }
    }

    fn ask(&mut self, now: Instant, peer: PeerId, wish: Wish, force: bool) {
        self.run += 1;
        let asked = Asked { peer, run: self.run, wish, at: now };
        self.state = State::Asking { asked, heard: false, deadline: now + ANSWER };
        self.step(None, now, "asked for the VIPs");
        self.send(peer, Handover::Ask { run: self.run, wish, force });
    }

    /// What was asked for does not come.
    fn not_given(&mut self, now: Instant, asked: Asked, refusal: Refusal) {
        self.state = State::Idle;
        match asked.wish {
            Wish::Takeover => self.fail_command(now, refusal),
            Wish::Preempt => {
                if let Some(preempt) = &mut self.preempt {
                    preempt.refused(now, refusal);
                }
            }
            // The giver knows.
            Wish::Yield => {}
        }
    }

    /// The operator's command can't be done as a transaction: without one where that is wanted.
    fn fail_command(&mut self, now: Instant, refusal: Refusal) {
        match self.command.take() {
            Some(command @ Command::Takeover { force: true }) => {
                self.command = Some(command);
                self.step(None, now, "the Active can't be asked: claiming all the same");
                match self.election.lease_until.filter(|until| *until > now) {
                    // It may be frozen, and hear no claim: its lease tells how long it answers.
                    Some(until) => self.state = State::Insisting { until },
                    None => self.claim(),
                }
            }
            Some(Command::Yield { force: true }) => {
                self.step(None, now, "no Backup can be given the VIPs: yielding all the same");
                self.outputs.push_back(Output::Abandon);
            }
            Some(Command::Takeover { force: false } | Command::Yield { force: false }) => {
                self.outputs.push_back(Output::Refused(refusal));
            }
            None => {}
        }
    }

    fn message(&mut self, now: Instant, peer: PeerId, message: Handover) {
        match message {
            Handover::Offer { run } => self.offered(now, peer, run),
            Handover::Ask { run, wish, force } => self.asked(now, peer, run, wish, force),
            Handover::Heard { run } => {
                if let State::Asking { asked, heard: false, .. } = self.state
                    && asked.is(peer, run)
                {
                    self.state = State::Asking { asked, heard: true, deadline: now + READY };
                    self.step(Some(peer), now, "heard it");
                }
            }
            Handover::Refuse { run, why } => self.refused(now, peer, run, why),
            Handover::Ready { run } => {
                if let State::Asking { asked, .. } = self.state
                    && asked.is(peer, run)
                {
                    let deadline = now + self.valid() + FLUSH;
                    self.state = State::Willing { asked, go_at: now, deadline };
                    self.send(peer, Handover::Go { run });
                }
            }
            Handover::Go { run } => self.go(now, peer, run),
            Handover::Give { run, epoch, valid_us, lacking, took } => {
                if let State::Willing { asked, go_at, .. } = self.state
                    && asked.is(peer, run)
                {
                    let valid = Duration::from_micros(valid_us.into());
                    self.given(now, asked, now - go_at < valid, lacking, took, epoch);
                }
            }
            Handover::Taken { run, epoch, took_us } => self.taken(now, peer, run, epoch, took_us),
            Handover::Cancel { run } => self.cancelled(now, peer, run),
        }
    }

    fn offered(&mut self, now: Instant, peer: PeerId, run: u64) {
        let why = match (self.election.role, self.state) {
            (Role::Initialize, _) => Why::Fault,
            (Role::Active, _) => Why::Busy,
            (Role::Backup, State::Idle) => return self.ask(now, peer, Wish::Yield, false),
            // The same node: it gives, whoever wishes it.
            (Role::Backup, State::Asking { asked, .. }) if asked.peer == peer => return,
            (Role::Backup, _) => Why::Busy,
        };
        self.send(peer, Handover::Refuse { run, why });
    }

    fn refused(&mut self, now: Instant, peer: PeerId, run: u64, why: Why) {
        match self.state {
            State::Asking { asked, .. } | State::Willing { asked, .. } if asked.is(peer, run) => {
                self.not_given(now, asked, Refusal::Said(peer, why));
            }
            State::Giving(giving) => self.offer_refused(now, giving, peer, run, why),
            State::Idle
            | State::Asking { .. }
            | State::Willing { .. }
            | State::Taking { .. }
            | State::Insisting { .. } => {}
        }
    }

    fn given(
        &mut self,
        now: Instant,
        asked: Asked,
        is_valid: bool,
        lacking: u64,
        took: Took,
        epoch: u64,
    ) {
        // This node slept, or the network did: the giver is about to take the VIPs back.
        if !is_valid {
            return self.not_given(now, asked, Refusal::Silent(asked.peer));
        }
        let Asked { peer, wish, at, .. } = asked;
        let released = Duration::from_micros(took.released_us.into());
        // The ways there and back, taken for equal.
        let begun = at + (now - at).saturating_sub(released) / 2;
        let place = |us: u32| (begun + Duration::from_micros(us.into())).min(now);
        self.step(Some(peer), place(took.caught_up_us), "stopped forwarding: the last delta");
        self.step(Some(peer), place(took.flushed_us), "the last delta is acknowledged");
        self.step(Some(peer), place(took.released_us), format!("released the VIPs, epoch {epoch}"));
        self.outputs.push_back(Output::Lacking(lacking));
        self.state = State::Taking { asked, since: now };
        self.outputs.push_back(Output::Take { wish, epoch });
    }

    fn announced(&mut self, now: Instant) {
        if let State::Taking { asked, since } = self.state {
            let (run, epoch) = (asked.run, self.election.epoch);
            self.send(asked.peer, Handover::Taken { run, epoch, took_us: micros(now - since) });
            self.idle();
        }
    }

    /// For how long the giver does not take the VIPs back, with something to spare.
    fn valid(&self) -> Duration {
        (3 * self.config.advert_interval).max(GIVEN_PATIENCE) * 3 / 4
    }
}

impl Asked {
    fn is(&self, peer: PeerId, run: u64) -> bool {
        self.peer == peer && self.run == run
    }
}
