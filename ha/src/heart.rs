//! What nodes tell each other in heartbeats, beyond the adverts in them, and what this node makes
//! of it: that it is not heard, or that its gateway is lost to it alone.
//!
//! Pure: fed with what came and with time, it says what the node is to be told ([`Output::Tell`])
//! and when a heartbeat is wanted out of turn ([`Output::Beat`]). docs/failover.md has the table of
//! what follows from which loss.

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
    state: State,
    since: Instant,
    gateway: Reach,
    lost_at: Instant,
    judge_at: Option<Instant>,
    alone: bool,
    peers: Vec<Pulse>,
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
}

impl Heart {
    /// A node that starts, with peers of these names, in the order of the configuration.
    pub fn new(now: Instant, interval: Duration, peers: impl Iterator<Item = String>) -> Self {
        let pulse = |name| Pulse { name, heard_at: now, silence_told: false, word: None };
        Self {
            interval,
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
    pub fn word(&self, now: Instant, place: usize) -> Word {
        let silence = now.saturating_duration_since(self.peers[place].heard_at);
        Word {
            standing: self.state.into(),
            gateway: self.gateway,
            silence_us: u32::try_from(silence.as_micros()).unwrap_or(u32::MAX),
        }
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
    }

    /// A heartbeat of a peer.
    pub fn hear(&mut self, now: Instant, place: usize, word: Word) {
        self.peers[place].hear(now);
        self.peers[place].word = Some((word, now));
        let bound = SILENT_INTERVALS * self.interval;
        let silence = Duration::from_micros(word.silence_us.into());
        if self.state == State::Active
            && word.standing == Standing::Backup
            && silence.min(now.saturating_duration_since(self.since)) >= bound
        {
            self.outputs.push_back(Output::Tell(Input::Unheard));
        }
        self.judge(now);
    }

    /// An advert of a peer, on a path that is not the channel. Who yields is no better off than this
    /// node.
    pub fn hear_advert(&mut self, now: Instant, place: usize, yields: bool) {
        self.peers[place].hear(now);
        if yields {
            self.forget(now, place);
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
    }

    /// When [`Heart::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let bound = SILENT_INTERVALS * self.interval;
        let awaited = self.peers.iter().filter(|pulse| pulse.is_awaited());
        awaited.map(|pulse| pulse.heard_at + bound).chain(self.judge_at).min()
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

impl Pulse {
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
