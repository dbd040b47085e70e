//! The virtual router of RFC 9568 §6.4 as a sans-IO machine: Initialize, Backup, Active.
//!
//! Fed with [`Input`]s and time, it says what to do as [`Output`]s, whose order is part of the
//! contract. It never reads the clock, touches a socket or logs; [`crate::node`] adds the
//! announcement schedule and hands the outputs on to the driver.
//!
//! The caller hands over every packet it holds before it calls
//! [`handle_timeout`](VirtualRouter::handle_timeout), so that an advert that came in time is not
//! overtaken by the timer that it should have restarted.
//!
//! What Baton adds to the RFC (takeover, yield, stalls) is argued in `docs/decisions/`.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::config::Family;
use crate::vrrp::{AdverInterval, Preempt, Priority};

mod words;

pub use words::{Advert, Input, Output, PreemptBy, Reason, RouterConfig, State, Transition, Wish};

/// Adverts of priority 255 that a takeover sends: enough that the loss of one in three still
/// leaves less than 1 in 200 takeovers unheard.
pub const CLAIM_ADVERTS: u8 = 5;

/// Time between two adverts of a takeover's claim; no longer than the shortest interval.
pub const CLAIM_SPACING: Duration = Duration::from_millis(10);

/// The shortest time between an advert and an answer to a rival: it bounds what a flood of adverts
/// can make a node send.
pub const ANSWER_SPACING: Duration = Duration::from_millis(1);

/// How far apart Backups claim when they know that the Active is gone: by priority, as in
/// Skew_Time.
pub const GONE_SKEW: Duration = Duration::from_millis(2);

/// How long at least a node that gave the VIPs to another waits before it takes them back, where the
/// other never advertises. It covers what configuring addresses takes on a busy machine.
pub const GIVEN_PATIENCE: Duration = Duration::from_millis(200);

/// Intervals for which an Active answers a rival that should give way, before it takes the rival
/// for deaf and gives way itself. A rival that hears gives way to the first answer; until the third
/// advert of a deaf one, two answers and two or three adverts of this node's own were lost.
pub const UNHEARD_INTERVALS: u32 = 2;

/// A Backup that relies on quick heartbeats and did not run for longer looks at its sockets once
/// more before it claims.
const LATE: Duration = Duration::from_millis(3);

/// One virtual router on this node.
#[derive(Debug)]
pub struct VirtualRouter {
    config: RouterConfig,
    preempt_by: PreemptBy,
    machine: Machine,
    reason: Reason,
    outputs: VecDeque<Output>,
}

/// The state with its timers.
#[derive(Debug, Clone, Copy)]
enum Machine {
    Initialize(Halt),
    Backup(Backup),
    Active(Active),
}

/// Why a router in Initialize takes no part, and so what lets it out.
#[derive(Debug, Clone, Copy)]
enum Halt {
    /// Waits for `Startup`.
    Stopped,
    /// Waits for `Startup`, and then for `Recovered`.
    StoppedFaulty,
    /// Started; waits for `Recovered`.
    Faulty,
}

#[derive(Debug, Clone, Copy)]
struct Backup {
    /// Active_Adver_Interval: the Active's, or this node's until one is heard.
    active_adver_interval: AdverInterval,
    /// When the Active_Down_Timer fires.
    active_down_at: Instant,
    /// The reason this node gives if it fires.
    claim_reason: Reason,
    /// When this machine last ran; a long gap means that the node slept.
    ran_at: Instant,
    stance: Stance,
    /// Whether the Active is one that this node is to preempt.
    outranks: bool,
    owner: Option<OwnerHeard>,
    /// By quick heartbeats; `None` where there are none.
    quick: Option<Quick>,
}

/// What the last quick heartbeat of the Active told.
#[derive(Debug, Clone, Copy)]
struct Quick {
    heard_at: Instant,
    /// When this node may claim.
    over_at: Instant,
}

/// Whether a Backup may preempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stance {
    /// As Preempt_Mode says.
    Configured,
    /// Not before the present Active is gone: the operator made this node yield, or the Active does
    /// not hear it.
    Deferring,
}

/// An Active that advertises 255.
#[derive(Debug, Clone, Copy)]
struct OwnerHeard {
    source: IpAddr,
    first: Instant,
    last: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Active {
    /// When the Adver_Timer fires.
    adver_at: Instant,
    /// When the last advert was sent: Backups wait from here.
    sent_at: Instant,
    standing: Standing,
    /// Since when a tie is lost in the family that does not decide it.
    tie_lost_at: Option<Instant>,
    /// A rival that should give way.
    rival: Option<Rival>,
}

/// A node that advertises and should give way to this one: when it was heard first, and last.
#[derive(Debug, Clone, Copy)]
struct Rival {
    first: Instant,
    last: Instant,
}

/// What an answer does to the Adver_Timer (RFC 9568 §6.4.3).
#[derive(Debug, Clone, Copy)]
enum AdverTimer {
    Reset,
    RunsOn,
}

/// By what right a node is Active, and so what priority it advertises.
#[derive(Debug, Clone, Copy)]
enum Standing {
    /// The election's: the configured priority.
    Elected,
    /// A takeover that deposes whoever is Active: 255.
    Claiming {
        /// Adverts of the claim still to be sent. After the last it goes on for
        /// [`CLAIM_SPACING`]: a rival that claims at the same time and is about to hear that
        /// advert must not find this node at 254, or both would give way.
        left: u8,
        insist_until: Instant,
    },
    /// A takeover that came about: 254, so that no configured priority preempts it.
    Held {
        /// Until then a rival that holds too is one that missed the claim: claim again.
        insist_until: Instant,
    },
}

impl VirtualRouter {
    /// A router in Initialize, waiting for [`Input::Startup`].
    pub fn new(config: RouterConfig) -> Self {
        Self {
            config,
            preempt_by: PreemptBy::Claiming,
            machine: Machine::Initialize(Halt::Stopped),
            reason: Reason::Startup,
            outputs: VecDeque::new(),
        }
    }

    /// Takes one input. Its outputs are then to be polled.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        self.notice_stall(now);
        match (self.machine, input) {
            (_, Input::PreemptBy(way)) => self.preempt_by = way,
            (Machine::Initialize(Halt::Stopped), Input::Startup) => {
                self.start(now, Reason::Startup);
            }
            (Machine::Initialize(Halt::Stopped), Input::Fault) => {
                self.machine = Machine::Initialize(Halt::StoppedFaulty);
            }
            (Machine::Initialize(Halt::StoppedFaulty), Input::Startup) => {
                self.enter(Machine::Initialize(Halt::Faulty), Reason::Fault);
            }
            (Machine::Initialize(Halt::StoppedFaulty), Input::Recovered) => {
                self.machine = Machine::Initialize(Halt::Stopped);
            }
            (Machine::Initialize(Halt::Faulty), Input::Recovered) => {
                self.start(now, Reason::Recovered);
            }
            (Machine::Initialize(Halt::Faulty), Input::Shutdown) => {
                self.enter(Machine::Initialize(Halt::StoppedFaulty), Reason::Shutdown);
            }
            (
                Machine::Initialize(_),
                Input::Startup
                | Input::Shutdown
                | Input::Advert(_)
                | Input::Takeover
                | Input::Yield
                | Input::Fault
                | Input::Recovered
                | Input::ActiveGone(_)
                | Input::Give(_)
                | Input::Take(_)
                | Input::Unheard
                | Input::ActiveLease(_)
                | Input::Repeat
                | Input::LeaseOver
                | Input::Deposed(_),
            ) => {}

            (Machine::Backup(backup), Input::Advert(advert)) => {
                self.advert_in_backup(now, backup, advert);
            }
            (Machine::Backup(backup), Input::Takeover) => {
                let wait = active_down_interval(self.config.priority, backup.active_adver_interval);
                self.become_active(now, claim(now, wait), Reason::Takeover);
            }
            (Machine::Backup(_), Input::Fault) => {
                self.enter(Machine::Initialize(Halt::Faulty), Reason::Fault)
            }
            (Machine::Backup(_), Input::Shutdown) => {
                self.enter(Machine::Initialize(Halt::Stopped), Reason::Shutdown)
            }
            (Machine::Backup(backup), Input::ActiveGone(lease)) => {
                self.machine = Machine::Backup(self.without_active(now, backup, lease));
            }
            (Machine::Backup(backup), Input::ActiveLease(lease)) => {
                let skew = self.gone_skew();
                let quick = lease.map(|lease| Quick { heard_at: now, over_at: now + lease + skew });
                self.machine = Machine::Backup(Backup { quick, ..backup });
            }
            (Machine::Backup(backup), Input::Take(wish)) => self.take(now, backup, wish),
            (
                Machine::Backup(_),
                Input::Startup
                | Input::Yield
                | Input::Recovered
                | Input::Give(_)
                | Input::Unheard
                | Input::Repeat
                | Input::LeaseOver
                | Input::Deposed(_),
            ) => {}

            (Machine::Active(active), Input::Advert(advert)) => {
                self.advert_in_active(now, active, advert);
            }
            (Machine::Active(active), Input::Takeover) => {
                let wait = active_down_interval(self.config.priority, self.config.advert_interval);
                let standing = claim(now, wait);
                let active = self.send_advert(now, Active { standing, ..active });
                self.enter(Machine::Active(active), Reason::Takeover);
            }
            (Machine::Active(_), Input::Yield) => {
                self.release_and_yield();
                self.become_backup(now, self.config.advert_interval, Reason::Yield);
            }
            (Machine::Active(_), Input::Unheard) => self.give_way_unheard(now),
            (Machine::Active(active), Input::Repeat) => self.repeat(now, active),
            (Machine::Active(_), Input::LeaseOver) => self.stall(now),
            (Machine::Active(_), Input::Fault) => {
                self.release_and_yield();
                self.enter(Machine::Initialize(Halt::Faulty), Reason::Fault);
            }
            (Machine::Active(_), Input::Shutdown) => {
                self.release_and_yield();
                self.enter(Machine::Initialize(Halt::Stopped), Reason::Shutdown);
            }
            (Machine::Active(_), Input::Deposed(interval)) => {
                self.outputs.push_back(Output::Release);
                self.become_backup(now, interval, Reason::Deposed);
            }
            (Machine::Active(_), Input::Give(wish)) => self.give(now, wish),
            (
                Machine::Active(_),
                Input::Startup
                | Input::Recovered
                | Input::ActiveGone(_)
                | Input::Take(_)
                | Input::ActiveLease(_),
            ) => {}
        }
    }

    /// Lets time pass up to `now`; harmless when nothing is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.notice_stall(now);
        match self.machine {
            Machine::Initialize(_) => {}
            Machine::Backup(backup) if now >= backup.active_down_at => {
                self.become_active(now, Standing::Elected, backup.claim_reason);
            }
            Machine::Backup(Backup { quick: Some(quick), .. }) if now >= quick.over_at => {
                self.become_active(now, Standing::Elected, Reason::ActiveSilent);
            }
            Machine::Active(active) if now >= active.adver_at => {
                self.machine = Machine::Active(self.send_advert(now, active));
            }
            Machine::Backup(_) | Machine::Active(_) => {}
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) is to be called next, if nothing happens
    /// before. `None` in Initialize.
    ///
    /// A Backup also asks to run once per Active_Adver_Interval without an advert: how late that
    /// comes tells whether the node slept.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.machine {
            Machine::Initialize(_) => None,
            Machine::Backup(backup) => {
                let tick = backup.ran_at + backup.active_adver_interval.duration();
                let quick = backup.quick.map(|quick| quick.over_at);
                [Some(backup.active_down_at), Some(tick), quick].into_iter().flatten().min()
            }
            Machine::Active(active) => Some(active.adver_at),
        }
    }

    /// The next thing to do, in order, until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The present state.
    pub fn state(&self) -> State {
        match &self.machine {
            Machine::Initialize(_) => State::Initialize,
            Machine::Backup(_) => State::Backup,
            Machine::Active(_) => State::Active,
        }
    }

    /// Why it is in that state.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// What this node advertises now, or would if it became Active by election.
    pub fn advertised_priority(&self) -> Priority {
        match &self.machine {
            Machine::Active(active) => self.priority_of(active.standing),
            Machine::Initialize(_) | Machine::Backup(_) => self.config.priority,
        }
    }

    /// The address owner that no takeover can outrank, if this node is Backup to one: its adverts
    /// have carried 255 for longer than the claim of a takeover lasts.
    pub fn outranked_by(&self) -> Option<IpAddr> {
        let Machine::Backup(Backup { owner: Some(owner), active_adver_interval, .. }) =
            &self.machine
        else {
            return None;
        };
        let claim = CLAIM_SPACING * u32::from(CLAIM_ADVERTS) + 4 * active_adver_interval.duration();
        (owner.last.saturating_duration_since(owner.first) >= claim).then_some(owner.source)
    }

    /// Whether this node is Backup to an Active that it is to preempt by asking for the VIPs.
    pub fn wants_to_preempt(&self) -> bool {
        let outranks = matches!(self.machine, Machine::Backup(backup) if backup.outranks);
        outranks && self.preempt_by == PreemptBy::Asking
    }

    /// Leaves Initialize (RFC 9568 §6.4.1).
    fn start(&mut self, now: Instant, reason: Reason) {
        if self.config.priority == Priority::OWNER {
            let reason = if reason == Reason::Startup { Reason::AddressOwner } else { reason };
            self.become_active(now, Standing::Elected, reason);
        } else {
            self.become_backup(now, self.config.advert_interval, reason);
            self.not_before(now + self.config.startup_hold);
        }
    }

    /// Holds a Backup back from claiming, as long as it hears nothing.
    fn not_before(&mut self, earliest: Instant) {
        if let Machine::Backup(backup) = &mut self.machine {
            backup.active_down_at = backup.active_down_at.max(earliest);
        }
    }

    /// Another node has agreed to take the VIPs. No advert says that this one yields: it would
    /// invite all others. Should the other not take them, this node does when its
    /// Active_Down_Timer fires.
    fn give(&mut self, now: Instant, wish: Wish) {
        self.outputs.push_back(Output::Release);
        let reason = match wish {
            Wish::Yield => Reason::Yield,
            Wish::Takeover | Wish::Preempt => Reason::HandedOver,
        };
        self.become_backup(now, self.config.advert_interval, reason);
        self.not_before(now + GIVEN_PATIENCE);
    }

    fn take(&mut self, now: Instant, backup: Backup, wish: Wish) {
        let (standing, reason) = match wish {
            Wish::Takeover => {
                let wait = active_down_interval(self.config.priority, backup.active_adver_interval);
                (claim(now, wait), Reason::Takeover)
            }
            Wish::Yield => (Standing::Elected, Reason::ActiveYielded),
            Wish::Preempt => (Standing::Elected, Reason::Preempted),
        };
        self.become_active(now, standing, reason);
    }

    /// RFC 9568 §6.4.2, "If an ADVERTISEMENT is received".
    fn advert_in_backup(&mut self, now: Instant, backup: Backup, advert: Advert) {
        let priority = self.config.priority;
        // Heartbeats are overdue, and yet the Active lives: it is the channel that is silent.
        let quick = backup.quick.filter(|quick| {
            let patience = quick.over_at.saturating_duration_since(quick.heard_at);
            now.saturating_duration_since(quick.heard_at) < patience / 2
        });
        let backup = Backup { quick, ..backup };
        let outranks = advert.priority != Priority::YIELD
            && advert.priority < priority
            && self.may_preempt(backup.stance);
        self.machine = Machine::Backup(if advert.priority == Priority::YIELD {
            Backup {
                active_down_at: now + skew_time(priority, backup.active_adver_interval),
                claim_reason: Reason::ActiveYielded,
                stance: Stance::Configured,
                outranks,
                ..backup
            }
        } else if !outranks || self.preempt_by == PreemptBy::Asking {
            Backup {
                active_adver_interval: advert.interval,
                active_down_at: now + active_down_interval(priority, advert.interval),
                claim_reason: Reason::ActiveDown,
                outranks,
                ..backup
            }
        } else {
            // Discarded: the timer runs on, and when it fires this node preempts.
            Backup { claim_reason: Reason::Preempted, outranks, ..backup }
        });
        self.note_owner(now, &advert);
    }

    /// The Active is gone for good: there is nothing to wait for but the end of its lease, and for
    /// Backups of higher priority. Never longer than without that word.
    fn without_active(&self, now: Instant, backup: Backup, lease: Duration) -> Backup {
        let gone_at = now + lease + self.gone_skew();
        if gone_at >= backup.active_down_at {
            return backup;
        }
        Backup {
            active_down_at: gone_at,
            claim_reason: Reason::ActiveGone,
            stance: Stance::Configured,
            ..backup
        }
    }

    fn gone_skew(&self) -> Duration {
        GONE_SKEW * (256 - u32::from(self.config.priority.value())) / 256
    }

    /// RFC 9568 §6.4.3, "If an ADVERTISEMENT is received".
    fn advert_in_active(&mut self, now: Instant, active: Active, advert: Advert) {
        let own = self.priority_of(active.standing);
        if advert.priority == Priority::YIELD {
            self.answer(now, active, AdverTimer::Reset);
        } else if let Some(standing) = self.reclaim(now, active, &advert) {
            self.machine = Machine::Active(self.send_advert(now, Active { standing, ..active }));
            self.outputs.push_back(Output::Announce);
        } else if let Some(since) = self.tie_in_doubt(now, active, &advert) {
            self.machine = Machine::Active(Active { tie_lost_at: Some(since), ..active });
            self.outputs.push_back(Output::Announce);
        } else if (advert.priority, advert.source) > (own, advert.local) {
            self.outputs.push_back(Output::Release);
            self.become_backup(now, advert.interval, Reason::Outranked);
            self.note_owner(now, &advert);
        } else if let Some(rival) = self.deafness_in_doubt(now, active, &advert) {
            let active = Active { rival: Some(rival), ..active };
            self.machine = Machine::Active(active);
            self.answer(now, active, AdverTimer::RunsOn);
        } else {
            self.give_way_unheard(now);
        }
    }

    /// What is known now of a rival that should give way; `None` once it should have long ago.
    fn deafness_in_doubt(&self, now: Instant, active: Active, advert: &Advert) -> Option<Rival> {
        let interval = advert.interval.max(self.config.advert_interval).duration();
        let recent = |rival: &Rival| now.saturating_duration_since(rival.last) < 3 * interval;
        let first = active.rival.filter(recent).map_or(now, |rival| rival.first);
        let doubtful = now.saturating_duration_since(first) < UNHEARD_INTERVALS * interval;
        doubtful.then_some(Rival { first, last: now })
    }

    /// The rival can't be told anything, so this node gives way, and until the rival is gone it
    /// does not preempt: they would take turns.
    fn give_way_unheard(&mut self, now: Instant) {
        self.release_and_yield();
        self.become_backup(now, self.config.advert_interval, Reason::Unheard);
    }

    /// Since when a tie is lost in the family that does not decide it, while the other may still
    /// decide: the rival sends on all its paths at once, so an interval is ample.
    fn tie_in_doubt(&self, now: Instant, active: Active, advert: &Advert) -> Option<Instant> {
        let lost = advert.priority == self.priority_of(active.standing)
            && advert.source > advert.local
            && Family::of(advert.source) != self.config.decides_ties;
        if !lost {
            return None;
        }
        let patience = advert.interval.max(self.config.advert_interval).duration();
        let lately = |at: &Instant| now.saturating_duration_since(*at) < 3 * patience;
        let since = active.tie_lost_at.filter(lately).unwrap_or(now);
        (now.saturating_duration_since(since) < patience).then_some(since)
    }

    /// The claim anew, where a rival that holds a takeover missed the claim of this node's later
    /// one: their priorities are the same, and the address is not to decide.
    fn reclaim(&self, now: Instant, active: Active, advert: &Advert) -> Option<Standing> {
        match active.standing {
            Standing::Held { insist_until }
                if now < insist_until
                    && advert.priority == Priority::HELD
                    && self.priority_of(active.standing) == Priority::HELD =>
            {
                Some(Standing::Claiming { left: CLAIM_ADVERTS, insist_until })
            }
            Standing::Elected | Standing::Claiming { .. } | Standing::Held { .. } => None,
        }
    }

    /// Asserts the Active state towards a node that is not, or should not be, Active: at once, or
    /// [`ANSWER_SPACING`] after the last advert. It is never left out, because a third node may
    /// have believed the other. A claim needs no more adverts than it has: the next is due within
    /// [`CLAIM_SPACING`].
    fn answer(&mut self, now: Instant, active: Active, timer: AdverTimer) {
        let earliest = active.sent_at + ANSWER_SPACING;
        self.machine = Machine::Active(match (active.standing, timer) {
            (Standing::Claiming { .. }, _) => active,
            _ if now < earliest => Active { adver_at: active.adver_at.min(earliest), ..active },
            (_, AdverTimer::Reset) => self.send_advert(now, active),
            (_, AdverTimer::RunsOn) => {
                Active { adver_at: active.adver_at, ..self.send_advert(now, active) }
            }
        });
        self.outputs.push_back(Output::Announce);
    }

    /// Sends the advert that is due; the result has the Adver_Timer set for the next.
    fn send_advert(&mut self, now: Instant, active: Active) -> Active {
        let due = match active.standing {
            Standing::Claiming { left: 0, insist_until } => Standing::Held { insist_until },
            standing => standing,
        };
        self.outputs.push_back(Output::SendAdvert(self.priority_of(due)));
        let (standing, wait) = match due {
            Standing::Claiming { left, insist_until } => {
                (Standing::Claiming { left: left.saturating_sub(1), insist_until }, CLAIM_SPACING)
            }
            Standing::Elected | Standing::Held { .. } => {
                (due, self.config.advert_interval.duration())
            }
        };
        Active { adver_at: now + wait, sent_at: now, standing, ..active }
    }

    fn become_active(&mut self, now: Instant, standing: Standing, reason: Reason) {
        let active =
            Active { adver_at: now, sent_at: now, standing, tie_lost_at: None, rival: None };
        let active = self.send_advert(now, active);
        self.outputs.push_back(Output::Claim);
        self.enter(Machine::Active(active), reason);
    }

    fn become_backup(&mut self, now: Instant, interval: AdverInterval, reason: Reason) {
        let backup = Backup {
            active_adver_interval: interval,
            active_down_at: now + active_down_interval(self.config.priority, interval),
            claim_reason: Reason::ActiveDown,
            ran_at: now,
            stance: match reason {
                Reason::Yield | Reason::HandedOver | Reason::Unheard => Stance::Deferring,
                _ => Stance::Configured,
            },
            outranks: false,
            owner: None,
            quick: None,
        };
        self.enter(Machine::Backup(backup), reason);
    }

    /// Stops being Active in such an order that no packet which invites another node to claim is
    /// sent while this one still answers for the VIPs.
    fn release_and_yield(&mut self) {
        self.outputs.push_back(Output::Release);
        self.outputs.push_back(Output::SendAdvert(Priority::YIELD));
    }

    fn enter(&mut self, machine: Machine, reason: Reason) {
        let from = self.state();
        self.machine = machine;
        self.reason = reason;
        let to = self.state();
        self.outputs.push_back(Output::Transition(Transition { from, to, reason }));
    }

    /// Finds out that the node slept (SIGSTOP, a paused VM), before anything else is done.
    ///
    /// An Active that sent nothing for 3 intervals, the least that any Backup waits, may have been
    /// replaced: it releases and sends nothing. A Backup that did not run for 2 intervals, where
    /// it asked for 1, did not listen: its timer starts anew.
    fn notice_stall(&mut self, now: Instant) {
        match &mut self.machine {
            Machine::Initialize(_) => {}
            Machine::Backup(backup) => {
                let interval = backup.active_adver_interval;
                let gap = now.saturating_duration_since(backup.ran_at);
                let slept = gap > 2 * interval.duration();
                backup.ran_at = now;
                if let Some(quick) = &mut backup.quick
                    && gap > LATE
                {
                    quick.over_at = quick.over_at.max(now + LATE / 3);
                }
                if slept {
                    let anew = now + active_down_interval(self.config.priority, interval);
                    // A hold may reach further.
                    backup.active_down_at = backup.active_down_at.max(anew);
                    backup.claim_reason = Reason::ActiveDown;
                }
            }
            Machine::Active(active) => {
                let interval = self.config.advert_interval;
                if now.saturating_duration_since(active.sent_at) >= 3 * interval.duration() {
                    self.stall(now);
                }
            }
        }
    }

    /// Somebody else may own the VIPs by now.
    fn stall(&mut self, now: Instant) {
        self.outputs.push_back(Output::Release);
        self.become_backup(now, self.config.advert_interval, Reason::Stalled);
    }

    /// An advert out of turn; a claim's next one comes soon anyway.
    fn repeat(&mut self, now: Instant, active: Active) {
        if !matches!(active.standing, Standing::Claiming { .. })
            && now >= active.sent_at + ANSWER_SPACING
        {
            let sent = self.send_advert(now, active);
            self.machine = Machine::Active(Active { adver_at: active.adver_at, ..sent });
        }
    }

    /// Remembers an Active that advertises 255, on whatever path; any other advert refutes it.
    fn note_owner(&mut self, now: Instant, advert: &Advert) {
        if let Machine::Backup(backup) = &mut self.machine {
            backup.owner = (advert.priority == Priority::OWNER).then(|| OwnerHeard {
                source: advert.source,
                first: backup.owner.map_or(now, |owner| owner.first),
                last: now,
            });
        }
    }

    /// The address owner preempts whatever Preempt_Mode says (RFC 9568 §6.1), but nobody preempts
    /// after an operator's yield.
    fn may_preempt(&self, stance: Stance) -> bool {
        match stance {
            Stance::Deferring => false,
            Stance::Configured => match self.config.preempt {
                Preempt::Enabled => true,
                Preempt::Disabled => self.config.priority == Priority::OWNER,
            },
        }
    }

    fn priority_of(&self, standing: Standing) -> Priority {
        match standing {
            Standing::Elected => self.config.priority,
            Standing::Claiming { .. } => Priority::OWNER,
            Standing::Held { .. } => self.config.priority.max(Priority::HELD),
        }
    }
}

/// What a takeover begins with. `wait` is how long a rival that lives may be silent.
fn claim(now: Instant, wait: Duration) -> Standing {
    Standing::Claiming { left: CLAIM_ADVERTS, insist_until: now + wait }
}

/// Skew_Time (RFC 9568 §6.1), not rounded: 2.2 ms at an interval of 10 ms and priority 200.
fn skew_time(priority: Priority, interval: AdverInterval) -> Duration {
    interval.duration() * (256 - u32::from(priority.value())) / 256
}

/// Active_Down_Interval (RFC 9568 §6.1): how long after the last advert of an Active with this
/// interval a Backup of this priority claims.
pub fn active_down_interval(priority: Priority, interval: AdverInterval) -> Duration {
    3 * interval.duration() + skew_time(priority, interval)
}
