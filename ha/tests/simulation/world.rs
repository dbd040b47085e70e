//! Nodes, their network and virtual time; the invariants that hold at every moment.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use baton_ha::vrrp::Priority;
use baton_ha::vrrp::router::{
    Advert, Input, Output, Reason, RouterConfig, State, Transition, VirtualRouter,
};

use crate::network::{Network, Order};
use crate::random::Random;

/// What a node's socket holds while the node is paused.
const INBOX: usize = 32;

/// Each node hears the others by IPv4 and by IPv6.
const PATHS: usize = 2;

pub(crate) struct World {
    seed: u64,
    base: Instant,
    pub(crate) now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    sequence: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) network: Network,
    /// When the last advert on a path from a node to another comes.
    arrivals: BTreeMap<(usize, usize, usize), Duration>,
    pub(crate) random: Random,
    /// How late a node that runs may handle a timer.
    pub(crate) jitter: Duration,
    journal: VecDeque<String>,
    tally: Tally,
    /// Since when nothing but the passing of time disturbs the nodes; `None` in a storm.
    pub(crate) calm_since: Option<Duration>,
    overlap_since: Option<Duration>,
}

pub(crate) struct Node {
    pub(crate) config: RouterConfig,
    /// `None` while crashed.
    pub(crate) router: Option<VirtualRouter>,
    pub(crate) paused: bool,
    pub(crate) faulty: bool,
    inbox: VecDeque<Advert>,
    /// Whether the node has its VIPs, by what the router said.
    pub(crate) claimed: bool,
    /// The timer event that counts; earlier ones are void.
    timer: u64,
    sent_at: Duration,
    /// The operator said `takeover`, and the node has been Active since.
    pub(crate) held: bool,
    /// The operator said `yield`, and the node has not been Active since.
    pub(crate) deferring: bool,
    pub(crate) transitions: u32,
    pub(crate) adverts: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Deliver { to: usize, from: usize, path: usize, priority: u8 },
    Timer { node: usize, timer: u64 },
}

/// What happened, over all seeds.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    pub(crate) events: u64,
    pub(crate) claims: u64,
    pub(crate) takeovers: u64,
    pub(crate) stalls: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) overlaps: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Tally) {
        self.events += other.events;
        self.claims += other.claims;
        self.takeovers += other.takeovers;
        self.stalls += other.stalls;
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.overlaps += other.overlaps;
    }
}

impl World {
    pub(crate) fn new(
        seed: u64,
        random: Random,
        configs: Vec<RouterConfig>,
        network: Network,
    ) -> Self {
        Self {
            seed,
            base: Instant::now(),
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            sequence: 0,
            nodes: configs.into_iter().map(Node::new).collect(),
            network,
            arrivals: BTreeMap::new(),
            random,
            jitter: Duration::ZERO,
            journal: VecDeque::new(),
            tally: Tally::default(),
            calm_since: None,
            overlap_since: None,
        }
    }

    /// The slowest Advertisement_Interval.
    pub(crate) fn interval(&self) -> Duration {
        let intervals = self.nodes.iter().map(|node| node.config.advert_interval.duration());
        intervals.max().expect("a world has nodes")
    }

    /// How long an advert and its answer take at the most, in a calm.
    pub(crate) fn round_trip(&self) -> Duration {
        2 * (self.network.delay + self.jitter)
    }

    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    pub(crate) fn journal(&self) -> String {
        self.journal.iter().map(|line| format!("{line}\n")).collect()
    }

    pub(crate) fn note(&mut self, line: String) {
        const LINES: usize = 4000;
        if self.journal.len() == LINES {
            self.journal.pop_front();
        }
        self.journal.push_back(format!("{:>12.6} {line}", self.now.as_secs_f64()));
    }

    /// Nodes that run and have their VIPs.
    pub(crate) fn actives(&self) -> Vec<usize> {
        (0..self.nodes.len())
            .filter(|at| self.nodes[*at].runs() && self.nodes[*at].claimed)
            .collect()
    }

    /// Lets time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(Reverse((at, _, event))) = self.queue.peek().copied()
            && at <= end
        {
            self.queue.pop();
            self.now = at;
            self.tally.events += 1;
            self.happen(event);
            self.check_overlap();
        }
        self.now = end;
        self.check_overlap();
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Deliver { to, from, path, priority } => {
                let advert = Advert {
                    source: address(path, from),
                    local: address(path, to),
                    priority: Priority::new(priority),
                    interval: self.nodes[from].config.advert_interval,
                };
                let node = &mut self.nodes[to];
                if node.paused {
                    if node.inbox.len() < INBOX {
                        node.inbox.push_back(advert);
                    }
                } else if node.router.is_some() {
                    self.input(to, Input::Advert(advert));
                }
            }
            Event::Timer { node, timer } => {
                if self.nodes[node].timer == timer && self.nodes[node].runs() {
                    self.timeout(node);
                }
            }
        }
    }

    /// Hands an input to a node that runs.
    pub(crate) fn input(&mut self, at: usize, input: Input) {
        let now = self.base + self.now;
        let Some(router) = &mut self.nodes[at].router else { return };
        let line = match input {
            Input::Advert(_) => None,
            _ => Some(format!("{at} < {input:?}")),
        };
        router.handle_input(now, input);
        line.into_iter().for_each(|line| self.note(line));
        self.obey(at);
    }

    fn timeout(&mut self, at: usize) {
        let now = self.base + self.now;
        if let Some(router) = &mut self.nodes[at].router {
            router.handle_timeout(now);
        }
        self.obey(at);
    }

    pub(crate) fn start(&mut self, at: usize) {
        self.note(format!("{at} starts"));
        let node = &mut self.nodes[at];
        node.reset();
        node.router = Some(VirtualRouter::new(node.config.clone()));
        if node.faulty {
            self.input(at, Input::Fault);
        }
        self.input(at, Input::Startup);
    }

    pub(crate) fn crash(&mut self, at: usize) {
        self.note(format!("{at} crashes"));
        self.nodes[at].reset();
    }

    pub(crate) fn pause(&mut self, at: usize) {
        self.note(format!("{at} is paused"));
        self.nodes[at].paused = true;
    }

    /// A node wakes: what its socket held, then its timers, or the other way round.
    pub(crate) fn resume(&mut self, at: usize) {
        if !std::mem::take(&mut self.nodes[at].paused) {
            return;
        }
        self.note(format!("{at} wakes"));
        let timers_first = self.random.chance(50);
        if timers_first {
            self.timeout(at);
        }
        while let Some(advert) = self.nodes[at].inbox.pop_front() {
            self.input(at, Input::Advert(advert));
        }
        self.timeout(at);
    }

    /// Does what the router says, holding it to the order that it promises.
    fn obey(&mut self, at: usize) {
        let mut released_just_now = false;
        while let Some(output) = self.nodes[at].router.as_mut().and_then(VirtualRouter::poll_output)
        {
            let priority_zero = Output::SendAdvert(Priority::YIELD);
            let node = &mut self.nodes[at];
            match output {
                Output::SendAdvert(priority) => {
                    let silence = self.now - node.sent_at;
                    if output == priority_zero {
                        assert!(!node.claimed, "{at} yields before it releases");
                        assert!(released_just_now, "{at} yields without having released");
                    } else if node.claimed {
                        let limit = 3 * node.config.advert_interval.duration();
                        assert!(silence < limit, "{at} woke after {silence:?} and sent first");
                    }
                    node.sent_at = self.now;
                    node.adverts += 1;
                    self.send(at, priority);
                }
                Output::Claim => {
                    assert!(!node.claimed, "{at} claims twice");
                    assert_eq!(node.sent_at, self.now, "{at} claims without an advert");
                    node.claimed = true;
                    node.deferring = false;
                    self.tally.claims += 1;
                }
                Output::Release => {
                    assert!(node.claimed, "{at} releases what it has not");
                    node.claimed = false;
                    node.held = false;
                }
                Output::Announce => assert!(node.claimed, "{at} announces what it has not"),
                Output::Transition(Transition { reason, .. }) => {
                    node.transitions += 1;
                    self.tally.stalls += u64::from(reason == Reason::Stalled);
                    self.tally.takeovers += u64::from(reason == Reason::Takeover);
                    node.deferring |= reason == Reason::Unheard;
                }
            }
            released_just_now = output == Output::Release;
            if !matches!(output, Output::SendAdvert(_) | Output::Announce) {
                self.note(format!("{at}   {output:?}"));
            }
        }
        let node = &mut self.nodes[at];
        if let Some(router) = &node.router {
            assert_eq!(node.claimed, router.state() == State::Active, "{at}: VIPs and state");
            node.timer += 1;
            if let Some(due) = router.poll_timeout() {
                let jitter = self.random.duration(Duration::ZERO, self.jitter);
                let due = due.saturating_duration_since(self.base).max(self.now) + jitter;
                let event = Event::Timer { node: at, timer: node.timer };
                self.schedule(due, event);
            }
        }
    }

    fn send(&mut self, from: usize, priority: Priority) {
        for path in 0..PATHS {
            for to in (0..self.nodes.len()).filter(|to| *to != from) {
                let delays = self.network.send(from, to, &mut self.random);
                self.tally.lost += u64::from(delays.is_empty());
                self.tally.duplicated += u64::from(delays.len() > 1);
                for delay in delays {
                    let last = self.arrivals.entry((from, to, path)).or_default();
                    let arrival = match self.network.order {
                        Order::Kept => (self.now + delay).max(*last),
                        Order::Lost => self.now + delay,
                    };
                    *last = arrival;
                    let priority = priority.value();
                    self.schedule(arrival, Event::Deliver { to, from, path, priority });
                }
            }
        }
    }

    fn schedule(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((at, self.sequence, event)));
    }

    /// Two nodes that run never have the VIPs for longer than it takes them to hear each other.
    fn check_overlap(&mut self) {
        if self.actives().len() < 2 {
            self.overlap_since = None;
            return;
        }
        if self.overlap_since.is_none() {
            self.tally.overlaps += 1;
        }
        let since = *self.overlap_since.get_or_insert(self.now);
        if let Some(calm) = self.calm_since {
            let settled = calm + self.interval() + self.round_trip();
            // Before, they wait for the next advert; after, a claim is an advert.
            let bound = if since < settled { settled } else { since + self.round_trip() };
            assert!(
                self.now <= bound,
                "{:?} have been Active together since {since:?}",
                self.actives()
            );
        }
    }
}

impl Node {
    fn new(config: RouterConfig) -> Self {
        Self {
            config,
            router: None,
            paused: false,
            faulty: false,
            inbox: VecDeque::new(),
            claimed: false,
            timer: 0,
            sent_at: Duration::ZERO,
            held: false,
            deferring: false,
            transitions: 0,
            adverts: 0,
        }
    }

    /// Its process is gone. A fault of its interface stays, and its timers are void.
    fn reset(&mut self) {
        let (timer, faulty) = (self.timer + 1, self.faulty);
        *self = Self { timer, faulty, ..Self::new(self.config.clone()) };
    }

    pub(crate) fn runs(&self) -> bool {
        self.router.is_some() && !self.paused
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            const LINES: usize = 80;
            let from = self.journal.len().saturating_sub(LINES);
            for line in self.journal.range(from..) {
                eprintln!("{line}");
            }
            eprintln!(
                "at {:?} of seed {seed}; again: \
                 BATON_SIM_SEED={seed} cargo test -p baton-ha --test simulation",
                self.now,
                seed = self.seed
            );
        }
    }
}

/// Path 0 is IPv4, path 1 IPv6, on which nodes have the opposite order.
fn address(path: usize, node: usize) -> IpAddr {
    let node = node as u8;
    match path {
        0 => IpAddr::from([10, 77, 0, 2 + node]),
        _ => IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0x99 - u16::from(node)]),
    }
}
