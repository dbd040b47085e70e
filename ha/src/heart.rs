//! What nodes tell each other in heartbeats, beyond the adverts in them, and what this node makes
//! of it: that it is not heard, or that its gateway is lost to it alone.
//!
//! Pure: fed with what came and with time, it says what the node is to be told ([`Output::Tell`])
//! and when a heartbeat is wanted out of turn ([`Output::Beat`]). docs/failover.md has the table of
//! what follows from which loss.
//!
//! *Quick* heartbeats, every few milliseconds, are more than words: while a Backup that relies on
//! them acknowledges them, the Active's lease is no longer than they carry it ([`lease_length`]), and
//! the Backup claims as soon as the lease is over of which the last heartbeat told. An Active that
//! misses acknowledgements can't know whether it is heard: it advertises on all paths at once, so that
//! a Backup to which only the channel is dead learns of it in time, and waits as it does without heartbeats.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use wincode::{SchemaRead, SchemaWrite};

use crate::gateway::Reach;
use crate::node::Input;
use crate::vrrp::router::State;

/// Intervals of silence after which a Backup says so, and after which an Active that hears it say
/// so gives way: before the Backup may claim, which it may not within three (RFC 9568 §6.1).
pub const SILENT_INTERVALS: u32 = 2;

/// How long after its gateway was lost a node asks itself whether it is the only one: the others
/// find out at other times.
pub const JUDGE_AFTER: Duration = Duration::from_secs(1);

/// How old, when the gateway was lost, the last word of a peer may be that is silent since.
pub const RECENT: Duration = Duration::from_secs(3);

/// Heartbeats that come this often or more often are quick.
pub const QUICK: Duration = Duration::from_millis(9);

/// The shortest lease: what a busy machine may hold up a real-time thread for, and a little more.
const SHORTEST_LEASE: Duration = Duration::from_millis(6);

/// For how long an Active whose acknowledgements end goes on relying on them. By then a Backup has
/// claimed, or has heard adverts and relies on them.
const ACKNOWLEDGED: Duration = Duration::from_millis(50);

/// Between two adverts out of turn.
const REPEAT_SPACING: Duration = Duration::from_millis(1);

/// Heartbeats that are under way, at the most; what is beyond is not reckoned with.
const UNDER_WAY: usize = 64;

/// The lease of an Active with quick heartbeats: so long after each it may be silent.
pub fn lease_length(heartbeat: Duration) -> Duration {
    (3 * heartbeat + REPEAT_SPACING).max(SHORTEST_LEASE)
}

/// How the sender of a heartbeat stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Standing {
    /// It can't carry the VIPs now.
    Unfit,
    /// It could.
    Backup,
    /// It does.
    Active,
}

impl From<State> for Standing {
    fn from(state: State) -> Self {
        match state {
            State::Initialize => Self::Unfit,
            State::Backup => Self::Backup,
            State::Active => Self::Active,
        }
    }
}

/// What a heartbeat says of its sender besides its adverts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Word {
    /// How it stands.
    pub standing: Standing,
    /// Its gateway.
    pub gateway: Reach,
    /// For how long it has heard nothing of the receiver, on any path, in microseconds.
    pub silence_us: u32,
    /// When it was sent, by a clock of the sender's, in microseconds.
    pub stamp_us: u64,
    /// The stamp of the receiver's last heartbeat that came; 0: none.
    pub echo_us: u64,
    /// Whether the sender sends quick heartbeats and relies on those of others.
    pub quick: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Tell the node.
    Tell(Input),
    /// Send a heartbeat to everyone now: what it says does not bear waiting.
    Beat,
}

/// What this node knows of the others by their heartbeats.
#[derive(Debug)]
pub struct Heart {
    /// Advertisement_Interval of this node.
    interval: Duration,
    /// Between two heartbeats, where they are quick.
    quick: Option<Duration>,
    began: Instant,
    state: State,
    since: Instant,
    gateway: Reach,
    lost_at: Instant,
    judge_at: Option<Instant>,
    alone: bool,
    peers: Vec<Pulse>,
    /// The peer whose lease the node was told of last.
    leased: Option<usize>,
    /// When an advert out of turn is due at the earliest.
    repeat_at: Instant,
    outputs: VecDeque<Output>,
}

/// One peer.
#[derive(Debug)]
struct Pulse {
    name: String,
    /// When anything of it came, on any path.
    heard_at: Instant,
    /// Its silence was told of already.
    silence_told: bool,
    /// Its last word, unless it has been refuted since.
    word: Option<(Word, Instant)>,
    /// Stamps of heartbeats to it that it has not acknowledged, in their order.
    unacknowledged: VecDeque<u64>,
    acknowledged_at: Option<Instant>,
}

impl Heart {
    /// A node that starts, with peers of these names, in the order of the configuration.
    /// `quick` is the time between two heartbeats, where they are quick.
    pub fn new(
        now: Instant,
        interval: Duration,
        quick: Option<Duration>,
        peers: impl Iterator<Item = String>,
    ) -> Self {
        let pulse = |name| Pulse {
            name,
            heard_at: now,
            silence_told: false,
            word: None,
            unacknowledged: VecDeque::with_capacity(UNDER_WAY),
            acknowledged_at: None,
        };
        Self {
            interval,
            quick,
            began: now,
            leased: None,
            repeat_at: now,
            state: State::Initialize,
            since: now,
            gateway: Reach::Unknown,
            lost_at: now,
            judge_at: None,
            alone: false,
            peers: peers.map(pulse).collect(),
            outputs: VecDeque::new(),
        }
    }

    /// What this node's heartbeat to a peer says.
    pub fn word(&mut self, now: Instant, place: usize) -> Word {
        let stamp_us = micros(now.saturating_duration_since(self.began)) + 1;
        let pulse = &mut self.peers[place];
        if pulse.unacknowledged.len() < UNDER_WAY {
            pulse.unacknowledged.push_back(stamp_us);
        }
        let silence = now.saturating_duration_since(pulse.heard_at);
        Word {
            stamp_us,
            echo_us: pulse.word.map_or(0, |(word, _)| word.stamp_us),
            quick: self.quick.is_some(),
            standing: self.state.into(),
            gateway: self.gateway,
            silence_us: u32::try_from(silence.as_micros()).unwrap_or(u32::MAX),
        }
    }

    /// How long this node's lease is to be, where a Backup relies on its quick heartbeats.
    pub fn lease(&self, now: Instant) -> Option<Duration> {
        let relies = |pulse: &Pulse| {
            let acknowledged = pulse.acknowledged_at.is_some_and(|at| at + ACKNOWLEDGED > now);
            acknowledged && pulse.relies()
        };
        self.quick.filter(|_| self.peers.iter().any(relies)).map(lease_length)
    }

    /// The node stands so from now on.
    pub fn stand(&mut self, now: Instant, state: State) {
        if self.state != state {
            self.state = state;
            self.since = now;
            self.outputs.push_back(Output::Beat);
        }
    }

    /// There is a connection with a peer: from here on its silence counts.
    pub fn meet(&mut self, now: Instant, place: usize) {
        self.peers[place].hear(now);
        self.peers[place].unacknowledged.clear();
    }

    /// A heartbeat of a peer.
    pub fn hear(&mut self, now: Instant, place: usize, word: Word) {
        let began = self.began;
        let pulse = &mut self.peers[place];
        pulse.hear(now);
        pulse.word = Some((word, now));
        if pulse.unacknowledged.front().is_some_and(|first| *first <= word.echo_us) {
            pulse.acknowledged_at = Some(began + Duration::from_micros(word.echo_us));
        }
        while pulse.unacknowledged.pop_front_if(|first| *first <= word.echo_us).is_some() {}
        let bound = SILENT_INTERVALS * self.interval;
        let silence = Duration::from_micros(word.silence_us.into());
        if self.state == State::Active
            && word.standing == Standing::Backup
            && silence.min(now.saturating_duration_since(self.since)) >= bound
        {
            self.outputs.push_back(Output::Tell(Input::Unheard));
        } else if self.state == State::Active
            && word.quick
            && word.standing == Standing::Active
            && self
                .patience()
                .is_some_and(|patience| (patience..ACKNOWLEDGED).contains(&self.waits(now, place)))
        {
            // It claimed because quick heartbeats ended, and hears nothing else either.
            self.outputs.push_back(Output::Tell(Input::Unheard));
        }
        self.judge(now);
    }

    /// The heartbeat that was heard just now says that its sender is Active, until its lease is over;
    /// or it says something else. To be called after the advert in it was taken in.
    pub fn hear_lease(&mut self, place: usize, lease: Duration) {
        let word = self.peers[place].word.map(|(word, _)| word);
        let quick = word.filter(|word| word.standing == Standing::Active && word.quick);
        // None at all: it has just yielded, and its advert says so.
        let told = !lease.is_zero() && lease <= lease_length(QUICK);
        if quick.is_some() && self.quick.is_some() && told {
            self.leased = Some(place);
            self.outputs.push_back(Output::Tell(Input::ActiveLease(Some(lease))));
        } else {
            let active = word.is_some_and(|word| word.standing == Standing::Active);
            self.forget_lease(|leased| leased == place || active);
        }
    }

    fn forget_lease(&mut self, of: impl Fn(usize) -> bool) {
        if self.leased.take_if(|leased| of(*leased)).is_some() {
            self.outputs.push_back(Output::Tell(Input::ActiveLease(None)));
        }
    }

    /// For how long the first heartbeat has waited that this peer has not acknowledged.
    fn waits(&self, now: Instant, place: usize) -> Duration {
        let first = self.peers[place].unacknowledged.front();
        let sent = first.map(|stamp| self.began + Duration::from_micros(*stamp));
        sent.map_or(Duration::ZERO, |sent| now.saturating_duration_since(sent))
    }

    /// An advert of a peer, on a path that is not the channel. Who yields is no better off than this
    /// node.
    pub fn hear_advert(&mut self, now: Instant, place: usize, yields: bool) {
        self.peers[place].hear(now);
        if yields {
            self.forget(now, place);
        } else {
            self.forget_lease(|leased| leased != place);
        }
    }

    /// The peer's daemon has ended.
    pub fn forget(&mut self, now: Instant, place: usize) {
        self.peers[place].word = None;
        self.judge(now);
    }

    /// What is known of this node's own gateway now.
    pub fn reach(&mut self, now: Instant, gateway: Reach) {
        if self.gateway != Reach::Lost && gateway == Reach::Lost {
            self.lost_at = now;
            self.judge_at = Some(now + JUDGE_AFTER);
        }
        self.gateway = gateway;
        self.outputs.push_back(Output::Beat);
        self.judge(now);
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Instant) {
        let bound = SILENT_INTERVALS * self.interval;
        let mut told = false;
        for pulse in self.peers.iter_mut().filter(|pulse| pulse.is_awaited()) {
            if pulse.heard_at + bound <= now {
                pulse.silence_told = true;
                told = true;
            }
        }
        if told && self.state == State::Backup {
            self.outputs.push_back(Output::Beat);
        }
        if self.judge_at.is_some_and(|at| at <= now) {
            self.judge(now);
        }
        if self.doubted_at().is_some_and(|at| at <= now) {
            self.repeat_at = now + REPEAT_SPACING;
            self.outputs.push_back(Output::Tell(Input::Repeat));
        }
    }

    /// How long a quick heartbeat may wait for its acknowledgement.
    fn patience(&self) -> Option<Duration> {
        self.quick.map(|quick| (2 * quick).max(SHORTEST_LEASE / 2))
    }

    /// From when on a Backup that relies on quick heartbeats may not hear them, unless it says that
    /// it does; `None` where there is none, or it has had the time to claim.
    fn doubted_at(&self) -> Option<Instant> {
        let patience = self.patience().filter(|_| self.state == State::Active)?;
        let first = self.peers.iter().filter(|pulse| pulse.relies()).filter_map(|pulse| {
            let sent = self.began + Duration::from_micros(*pulse.unacknowledged.front()?);
            (self.repeat_at < sent + ACKNOWLEDGED).then(|| self.repeat_at.max(sent + patience))
        });
        first.min()
    }

    /// When [`Heart::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let bound = SILENT_INTERVALS * self.interval;
        let awaited = self.peers.iter().filter(|pulse| pulse.is_awaited());
        let awaited = awaited.map(|pulse| pulse.heard_at + bound);
        awaited.chain(self.judge_at).chain(self.doubted_at()).min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Whether the gateway is lost to this node alone: then its own cable is what is dead.
    ///
    /// By the peers' last words. One that is silent now may have been cut off by what cut off the
    /// gateway; so its last word counts, unless it was old by then. Who has found itself alone stays
    /// so as long as another is Active: a gateway that is then lost to both moves nothing.
    fn judge(&mut self, now: Instant) {
        if self.gateway != Reach::Lost {
            self.judge_at = None;
            return self.conclude(None);
        }
        if now < self.lost_at + JUDGE_AFTER {
            return;
        }
        let words = || self.peers.iter().filter_map(|pulse| Some((&pulse.name, pulse.word?)));
        let better = words().find(|(_, (word, at))| {
            word.standing != Standing::Unfit
                && word.gateway == Reach::Reached
                && *at + RECENT >= self.lost_at
        });
        let fresh = |at: Instant| now.saturating_duration_since(at) < RECENT;
        let active =
            words().find(|(_, (word, at))| word.standing == Standing::Active && fresh(*at));
        let because = match better {
            Some((peer, _)) => Some(format!("the gateway answers {peer} and not this node")),
            None => active
                .filter(|_| self.alone)
                .map(|(peer, _)| format!("the gateway does not answer, and {peer} is Active")),
        };
        self.judge_at = active.filter(|_| because.is_some()).map(|(_, (_, at))| at + RECENT);
        self.conclude(because);
    }

    fn conclude(&mut self, because: Option<String>) {
        if self.alone != because.is_some() {
            self.alone = because.is_some();
            let told = Input::Gateway(because.map_or(Ok(()), Err));
            self.outputs.push_back(Output::Tell(told));
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Pulse {
    /// Whether it would claim when quick heartbeats end.
    fn relies(&self) -> bool {
        self.word.is_some_and(|(word, _)| word.quick && word.standing == Standing::Backup)
    }

    fn hear(&mut self, now: Instant) {
        self.heard_at = now;
        self.silence_told = false;
    }

    /// Whether its silence would be worth telling.
    fn is_awaited(&self) -> bool {
        let active = self.word.is_some_and(|(word, _)| word.standing == Standing::Active);
        active && !self.silence_told
    }
}
