//! Two nodes and what is between them, in virtual time: adverts on front and on back, heartbeats
//! on the channel, a gateway in front.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use baton_ha::config::{AnnounceConfig, ChecksumForm, Family, HaConfig, Path, Transport, Vip};
use baton_ha::gateway::{self, Watch};
use baton_ha::heart::{self, Heart, Word};
use baton_ha::node::{Input, Node, Output};
use baton_ha::vrrp::router::{Advert, State};
use baton_ha::vrrp::{AdverInterval, Preempt, Priority, Vrid};

use crate::situation::{Combination, Fate};

/// How long everything takes on its way.
pub(crate) const DELAY: Duration = Duration::from_micros(300);
/// A connection that is silent in one direction is given up in both.
pub(crate) const CHANNEL_SILENCE: Duration = Duration::from_secs(3);
/// Node b starts later, so that a is Active.
const LATER: Duration = Duration::from_secs(1);
const GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1));

/// How the two are configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) interval_cs: u16,
    pub(crate) priorities: [u8; 2],
    pub(crate) preempt: bool,
    /// Between two heartbeats.
    pub(crate) heartbeat_ms: u64,
}

impl Setup {
    fn adver_interval(self) -> AdverInterval {
        AdverInterval::from_centiseconds(self.interval_cs).expect("an interval of the tests")
    }

    fn heartbeat(self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    pub(crate) fn is_quick(self) -> bool {
        self.heartbeat() <= heart::QUICK
    }

    pub(crate) fn interval(self) -> Duration {
        self.adver_interval().duration()
    }
}

/// What is on its way to a node.
#[derive(Debug, Clone)]
enum Parcel {
    Advert {
        path: usize,
        priority: Priority,
    },
    Beat {
        word: Word,
        advert: Option<Priority>,
        lease: Duration,
    },
    Answer,
    /// The channel was closed by the other side.
    Closed,
}

struct Station {
    node: Node,
    heart: Heart,
    watch: Watch,
    beat_at: Instant,
    runs: bool,
}

/// The two, and what is between them.
pub(crate) struct Pair {
    setup: Setup,
    start: Instant,
    now: Instant,
    stations: [Station; 2],
    /// By time of arrival, which is the order of sending.
    under_way: VecDeque<(Instant, usize, Parcel)>,
    lost: Option<(Combination, Instant)>,
    together: Duration,
    transitions: u32,
    journal: String,
}

impl Pair {
    pub(crate) fn new(setup: Setup) -> Self {
        let start = Instant::now();
        let station = |at: usize| Station {
            node: Node::new(&config(setup, at)),
            heart: Heart::new(
                start,
                setup.interval(),
                setup.is_quick().then(|| setup.heartbeat()),
                [["b"], ["a"]][at].map(str::to_owned).into_iter(),
            ),
            watch: Watch::new(start, vec![GATEWAY]),
            beat_at: start,
            runs: false,
        };
        let mut pair = Self {
            setup,
            start,
            now: start,
            stations: [station(0), station(1)],
            under_way: VecDeque::new(),
            lost: None,
            together: Duration::ZERO,
            transitions: 0,
            journal: String::new(),
        };
        pair.begin(0);
        pair.run_for(LATER);
        pair.begin(1);
        pair
    }

    fn begin(&mut self, at: usize) {
        self.stations[at].runs = true;
        self.stations[at].beat_at = self.now;
        self.stations[at].heart.meet(self.now, 0);
        for interface in ["front", "back"] {
            self.link(at, interface, Ok(()));
        }
        self.tell(at, Input::Paths(Ok(())));
        self.tell(at, Input::Startup);
    }

    /// Whether each is Active.
    pub(crate) fn actives(&self) -> [bool; 2] {
        [0, 1].map(|at| self.is_active(at))
    }

    fn is_active(&self, at: usize) -> bool {
        self.stations[at].runs && self.stations[at].node.state() == State::Active
    }

    /// For how long both have been Active.
    pub(crate) fn together(&self) -> Duration {
        self.together
    }

    pub(crate) fn transitions(&self) -> u32 {
        self.transitions
    }

    pub(crate) fn journal(&self) -> &str {
        &self.journal
    }

    /// From now on.
    pub(crate) fn lose(&mut self, combination: &Combination) {
        writeln!(self.journal, "{:?} {combination:?}", self.now - self.start).unwrap();
        self.lost = Some((*combination, self.now));
        for at in 0..2 {
            let fate = combination.fate[at];
            if matches!(fate, Fate::Dead | Fate::Ended) {
                self.stations[at].runs = false;
            }
            if fate == Fate::Ended {
                self.under_way.push_back((self.now + DELAY, 1 - at, Parcel::Closed));
            }
            let down = || Err("no carrier".to_owned());
            if matches!(fate, Fate::NoFront | Fate::NoLink) {
                self.link(at, "front", down());
            }
            if matches!(fate, Fate::NoBack | Fate::NoLink) {
                self.link(at, "back", down());
            }
        }
    }

    fn link(&mut self, at: usize, interface: &str, usable: Result<(), String>) {
        self.tell(at, Input::Link { interface: interface.to_owned(), usable });
    }

    /// Lets time pass. What has arrived comes before timers, as in the driver.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.next().filter(|next| *next <= end) {
            self.pass(next);
            while self.under_way.front().is_some_and(|(due, ..)| *due <= self.now) {
                let (_, to, parcel) = self.under_way.pop_front().expect("it was looked at");
                if self.stations[to].runs {
                    self.deliver(to, parcel);
                }
            }
            for at in 0..2 {
                if self.stations[at].runs {
                    self.timeouts(at);
                }
            }
        }
        self.pass(end);
    }

    fn pass(&mut self, to: Instant) {
        let to = to.max(self.now);
        if self.actives() == [true, true] {
            self.together += to - self.now;
        }
        self.now = to;
    }

    fn next(&self) -> Option<Instant> {
        let running = self.stations.iter().filter(|station| station.runs);
        let timers = running.flat_map(|station| {
            [
                station.node.poll_timeout(),
                station.heart.poll_timeout(),
                station.watch.poll_timeout(),
                Some(station.beat_at),
            ]
        });
        timers.chain([self.under_way.front().map(|(due, ..)| *due)]).flatten().min()
    }

    fn timeouts(&mut self, at: usize) {
        let now = self.now;
        let station = &mut self.stations[at];
        station.watch.handle_timeout(now);
        station.heart.handle_timeout(now);
        station.node.handle_timeout(now);
        if station.beat_at <= now {
            self.beat(at);
        }
        self.obey(at);
    }

    fn deliver(&mut self, to: usize, parcel: Parcel) {
        let now = self.now;
        match parcel {
            Parcel::Advert { path, priority } => {
                self.stations[to].heart.hear_advert(now, 0, priority == Priority::YIELD);
                self.hear(to, path, priority);
            }
            Parcel::Beat { word, advert, lease } => {
                self.stations[to].heart.hear(now, 0, word);
                if let Some(priority) = advert {
                    self.hear(to, 0, priority);
                }
                self.stations[to].heart.hear_lease(0, lease);
            }
            Parcel::Answer => self.stations[to].watch.answer(GATEWAY),
            Parcel::Closed => {
                self.stations[to].heart.forget(now, 0);
                self.tell(to, Input::ActiveGone(Duration::ZERO));
            }
        }
        self.obey(to);
    }

    fn hear(&mut self, to: usize, path: usize, priority: Priority) {
        self.tell(
            to,
            Input::Advert(Advert {
                source: address(path, 1 - to),
                local: address(path, to),
                priority,
                interval: self.setup.adver_interval(),
            }),
        );
    }

    fn tell(&mut self, at: usize, input: Input) {
        if !matches!(input, Input::Advert(_)) {
            writeln!(self.journal, "{:?} {at} < {input:?}", self.now - self.start).unwrap();
        }
        self.stations[at].node.handle_input(self.now, input);
        self.obey(at);
    }

    fn obey(&mut self, at: usize) {
        loop {
            let station = &mut self.stations[at];
            if let Some(output) = station.node.poll_output() {
                self.perform(at, output);
            } else if let Some(output) = station.heart.poll_output() {
                match output {
                    heart::Output::Tell(input) => self.tell(at, input),
                    heart::Output::Beat => self.beat(at),
                }
            } else if let Some(output) = station.watch.poll_output() {
                match output {
                    gateway::Output::Ask(_) => {
                        let answers = self.lost.is_none_or(|(lost, _)| lost.gateway[at]);
                        if answers {
                            self.under_way.push_back((self.now + DELAY, at, Parcel::Answer));
                        }
                    }
                    gateway::Output::Reach(reach) => station.heart.reach(self.now, reach),
                }
            } else {
                break;
            }
        }
    }

    fn perform(&mut self, at: usize, output: Output) {
        match output {
            Output::SendAdvert(priority) => {
                for path in 0..2 {
                    if self.lost.is_none_or(|(lost, _)| lost.adverts[1 - at][path]) {
                        let parcel = Parcel::Advert { path, priority };
                        self.under_way.push_back((self.now + DELAY, 1 - at, parcel));
                    }
                }
                self.beat_with(at, Some(priority));
            }
            Output::ConfigureVips | Output::RestoreVip(_) => self.tell(at, Input::Configured),
            Output::Transition(transition) => {
                writeln!(self.journal, "{:?} {at} {transition:?}", self.now - self.start).unwrap();
                self.transitions += u32::from(transition.from != transition.to);
                self.stations[at].heart.stand(self.now, transition.to);
            }
            Output::RefreshVips | Output::RemoveVips | Output::Announce => {}
        }
    }

    fn beat(&mut self, at: usize) {
        let node = &self.stations[at].node;
        let advert = (node.state() == State::Active).then(|| node.advertised_priority());
        self.beat_with(at, advert);
    }

    fn beat_with(&mut self, at: usize, advert: Option<Priority>) {
        let station = &mut self.stations[at];
        station.beat_at = self.now + self.setup.heartbeat();
        let slow = baton_ha::lease::length(self.setup.interval());
        let lease = station.heart.lease(self.now).unwrap_or(slow);
        let word = station.heart.word(self.now, 0);
        let arrives = self.lost.is_none_or(|(lost, since)| {
            let given_up = self.now >= since + CHANNEL_SILENCE && lost.beats.contains(&false);
            lost.beats[1 - at] && !given_up
        });
        if arrives && self.stations[1 - at].runs {
            let parcel = Parcel::Beat { word, advert, lease };
            self.under_way.push_back((self.now + DELAY, 1 - at, parcel));
        }
    }
}

fn address(path: usize, at: usize) -> IpAddr {
    IpAddr::from([10, 77 + path as u8, 0, 2 + at as u8])
}

fn config(setup: Setup, at: usize) -> HaConfig {
    let interfaces = ["front", "back"];
    let vip = |path: usize| IpAddr::from([10, 77 + path as u8, 0, 100]);
    HaConfig {
        node: ["a", "b"][at].to_owned(),
        vrid: Vrid::new(51).expect("51 is a VRID"),
        priority: Priority::new(setup.priorities[at]),
        advert_interval: setup.adver_interval(),
        preempt: if setup.preempt { Preempt::Enabled } else { Preempt::Disabled },
        checksum: ChecksumForm::Plain,
        paths: (0..2)
            .map(|path| Path {
                interface: interfaces[path].to_owned(),
                family: Family::V4,
                transport: Transport::Multicast,
                addresses: vec![vip(path)],
            })
            .collect(),
        vips: (0..2)
            .map(|path| Vip {
                address: vip(path),
                prefix: 24,
                interface: interfaces[path].to_owned(),
            })
            .collect(),
        peers: Vec::new(),
        startup_hold: Duration::ZERO,
        preempt_wait: Duration::from_secs(60),
        announce: AnnounceConfig::default(),
        valid_lft: Duration::from_secs(3),
        realtime: false,
        channel: None,
    }
}
