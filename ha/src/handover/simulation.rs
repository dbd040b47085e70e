//! Nodes with their virtual routers and this machine in virtual time: every message lost, every
//! node dead, asleep or cut off at every step of a handover, and long random lives by seed.
//!
//! What must be so: two nodes never answer for longer than an advert is on its way; what is refused
//! has changed nothing; who takes has every flow, unless the operator forced it; and once it is
//! quiet, exactly one node is Active.
//!
//! `BATON_SIM_SEED=17 cargo test -p baton-ha --lib handover` runs one seed with its journal.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::{
    Config, Election, FLUSH, Handover, Input, Machine, Other, Output, Refusal, Waiting, Why,
};
use crate::config::Family;
use crate::lease;
use crate::sync::simulation::Random;
use crate::vrrp::router::{
    self, Advert, CLAIM_SPACING, PreemptBy, RouterConfig, State as Role, VirtualRouter, Wish,
};
use crate::vrrp::{AdverInterval, Preempt, Priority};

const MS: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Advert {
        to: usize,
        from: usize,
        priority: u8,
        lease_left: Duration,
    },
    Message {
        to: usize,
        from: usize,
        link: u32,
        message: Handover,
    },
    Linked {
        to: usize,
        from: usize,
        link: u32,
        up: bool,
        died: bool,
    },
    /// Of replication, or of the kernel.
    Done {
        node: usize,
        life: u32,
        what: Done,
    },
    Timer {
        node: usize,
        timer: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    CatchUp { peer: usize, run: u64 },
    Flush { peer: usize, run: u64, began: Instant },
    Announce,
}

struct Node {
    config: RouterConfig,
    life: u32,
    alive: bool,
    asleep_since: Option<Instant>,
    inbox: Vec<Event>,
    router: VirtualRouter,
    machine: Machine,
    timer: u32,
    claimed: bool,
    /// The gate, as the kernel has it.
    frozen_since: Option<Instant>,
    lease_until: Instant,
    /// As an advert said.
    heard: Option<(usize, Instant, Instant)>,
    epoch: u64,
    /// Flows: each tick of traffic is one more.
    flows: u64,
    /// Whether its flows are those of the Active but for the lag.
    in_sync: bool,
    /// Whether the operator ever insisted.
    forced: bool,
    lacking: u64,
    refused: Option<Refusal>,
}

struct World {
    now: Instant,
    begun: Instant,
    random: Random,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    events: Vec<Option<Event>>,
    nodes: Vec<Node>,
    /// By pair: the connection, and whether it is up.
    links: Vec<(u32, bool)>,
    delay: Duration,
    /// One message in so many is lost; 0: none.
    loss: u64,
    adverts_lost: bool,
    /// Events handled since the command, and what is to happen before which one.
    steps: u64,
    plan: Option<(u64, Fault)>,
    overlap_since: Option<Instant>,
    /// When a node last claimed by adverts, as an operator wanted it.
    claim_at: Option<Instant>,
    /// Adverts were lost, or claims made without asking: nodes may overlap.
    rough: bool,
    journal: Vec<String>,
    takes: u64,
    /// Flows of the one that gave last.
    given: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Die(usize),
    Sleep(usize, Duration),
    Lose,
    Cut,
}

impl World {
    fn new(seed: u64, priorities: &[u8], interval_cs: u16, preempt: Preempt) -> Self {
        let now = Instant::now();
        let nodes: Vec<Node> = priorities
            .iter()
            .map(|p| Node::new(*p, interval_cs, preempt, priorities.len(), now))
            .collect();
        let count = nodes.len();
        Self {
            now,
            begun: now,
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            queue: BinaryHeap::new(),
            events: Vec::new(),
            nodes,
            links: vec![(0, false); count * count],
            delay: MS / 2,
            loss: 0,
            adverts_lost: false,
            steps: 0,
            plan: None,
            overlap_since: None,
            claim_at: None,
            rough: false,
            journal: Vec::new(),
            takes: 0,
            given: 0,
        }
    }

    fn note(&mut self, line: String) {
        let at = (self.now - self.begun).as_secs_f64();
        self.journal.push(format!("{at:10.5} {line}"));
    }

    fn interval(&self) -> Duration {
        self.nodes[0].config.advert_interval.duration()
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.events.push(Some(event));
        self.queue.push(Reverse((self.now + after, self.events.len() as u64 - 1)));
    }

    fn way(&mut self) -> Duration {
        self.delay + Duration::from_micros(self.random.below(50))
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(&Reverse((at, number))) = self.queue.peek()
            && at <= end
        {
            self.queue.pop();
            self.now = at;
            let Some(event) = self.events[number as usize].take() else { continue };
            let lost = self.sabotage(&event);
            if !lost {
                self.happen(event);
            }
            self.check();
        }
        self.now = end;
        self.check();
    }

    /// Does what is planned before this step; whether the event is lost by it.
    fn sabotage(&mut self, event: &Event) -> bool {
        if matches!(event, Event::Timer { .. }) {
            return false;
        }
        self.steps += 1;
        let Some((_, fault)) = self.plan.take_if(|(at, _)| *at == self.steps) else { return false };
        self.note(format!("{fault:?} before {event:?}"));
        match fault {
            Fault::Die(node) => self.die(node),
            Fault::Sleep(node, time) => self.sleep(node, time),
            Fault::Cut => self.cut(0, 1),
            Fault::Lose => return matches!(event, Event::Message { .. }),
        }
        false
    }

    fn link(&self, one: usize, other: usize) -> usize {
        one.min(other) * self.nodes.len() + one.max(other)
    }

    fn connect(&mut self, one: usize, other: usize) {
        let pair = self.link(one, other);
        if self.links[pair].1 || !self.nodes[one].alive || !self.nodes[other].alive {
            return;
        }
        let link = self.links[pair].0 + 1;
        self.links[pair] = (link, true);
        for (to, from) in [(one, other), (other, one)] {
            let way = self.way();
            self.schedule(way, Event::Linked { to, from, link, up: true, died: false });
        }
    }

    fn cut(&mut self, one: usize, other: usize) {
        self.unlink(one, other, false);
    }

    fn unlink(&mut self, one: usize, other: usize, died: bool) {
        let pair = self.link(one, other);
        if !self.links[pair].1 {
            return;
        }
        let link = self.links[pair].0;
        self.links[pair].1 = false;
        for (to, from) in [(one, other), (other, one)] {
            let way = self.way();
            self.schedule(way, Event::Linked { to, from, link, up: false, died });
        }
    }

    fn start(&mut self, at: usize) {
        let count = self.nodes.len();
        let old = &self.nodes[at];
        let mut node = Node::new(
            old.config.priority.value(),
            old.config.advert_interval.centiseconds(),
            old.config.preempt,
            count,
            self.now,
        );
        node.life = old.life + 1;
        node.timer = old.timer + 1;
        node.alive = true;
        self.nodes[at] = node;
        self.note(format!("{at} starts"));
        let way = if self.nodes[at].config.preempt == Preempt::Enabled {
            PreemptBy::Asking
        } else {
            PreemptBy::Claiming
        };
        self.route(at, router::Input::PreemptBy(way));
        self.route(at, router::Input::Startup);
        (0..count).filter(|other| *other != at).for_each(|other| self.connect(at, other));
    }

    fn die(&mut self, at: usize) {
        if !self.nodes[at].alive {
            return;
        }
        self.note(format!("{at} dies"));
        self.nodes[at].alive = false;
        self.nodes[at].asleep_since = None;
        self.nodes[at].inbox.clear();
        let count = self.nodes.len();
        (0..count).filter(|other| *other != at).for_each(|other| self.unlink(at, other, true));
    }

    fn sleep(&mut self, at: usize, time: Duration) {
        if self.nodes[at].runs() {
            self.note(format!("{at} sleeps {time:?}"));
            self.nodes[at].asleep_since = Some(self.now);
            self.nodes[at].timer += 1;
            let timer = self.nodes[at].timer;
            self.schedule(time, Event::Timer { node: at, timer });
        }
    }

    fn wake(&mut self, at: usize) {
        let Some(since) = self.nodes[at].asleep_since.take() else { return };
        let slept = self.now - since >= 3 * self.interval();
        self.note(format!("{at} wakes"));
        let length = lease::length(self.interval());
        if let Some((_, _, until)) = self.nodes[at].heard.as_mut().filter(|_| slept) {
            // Renewed while nobody listened.
            *until = self.now + length;
        }
        self.timeout(at);
        for event in std::mem::take(&mut self.nodes[at].inbox) {
            // What was queued while it slept for long is history; that a connection ended is not.
            if !slept || matches!(event, Event::Linked { .. } | Event::Done { .. }) {
                self.happen(event);
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let to = match event {
            Event::Advert { to, .. } | Event::Message { to, .. } | Event::Linked { to, .. } => to,
            Event::Done { node, .. } => node,
            Event::Timer { node, timer } => {
                if self.nodes[node].timer == timer && self.nodes[node].alive {
                    match self.nodes[node].asleep_since {
                        Some(_) => self.wake(node),
                        None => self.timeout(node),
                    }
                }
                return;
            }
        };
        if !self.nodes[to].alive {
            return;
        }
        if self.nodes[to].asleep_since.is_some() {
            self.nodes[to].inbox.push(event);
            return;
        }
        match event {
            Event::Advert { from, priority, lease_left, .. } => {
                if priority != 0 {
                    self.nodes[to].heard = Some((from, self.now, self.now + lease_left));
                }
                let advert = Advert {
                    source: [10, 0, 0, from as u8].into(),
                    local: [10, 0, 0, to as u8].into(),
                    priority: Priority::new(priority),
                    interval: self.nodes[from].config.advert_interval,
                };
                self.route(to, router::Input::Advert(advert));
            }
            Event::Message { from, link, message, .. } => {
                if self.links[self.link(to, from)].0 == link {
                    self.note(format!("{to} < {from} {message:?}"));
                    self.feed(to, Input::Message(from, message));
                }
            }
            Event::Linked { from, link, up, died, .. } => {
                if self.links[self.link(to, from)].0 == link {
                    let heard = self.nodes[to].heard.filter(|(active, ..)| *active == from && died);
                    if let Some((_, _, until)) = heard {
                        let left = until.saturating_duration_since(self.now);
                        self.route(to, router::Input::ActiveGone(left));
                    }
                    self.nodes[to].in_sync &= up || heard.is_none();
                    self.feed(to, if up { Input::Up(from) } else { Input::Down(from) });
                    if up {
                        // In sync a while after.
                        self.nodes[to].in_sync = self.random.one_in(2);
                    }
                }
            }
            Event::Done { life, what, .. } if self.nodes[to].life == life => self.done(to, what),
            Event::Done { .. } | Event::Timer { .. } => {}
        }
    }

    fn done(&mut self, at: usize, what: Done) {
        match what {
            Done::CatchUp { peer, run } => {
                let behind = !self.nodes[peer].runs() || !self.nodes[peer].in_sync;
                let of = self.nodes[at].flows;
                self.nodes[peer].in_sync |= self.random.one_in(3);
                self.feed(
                    at,
                    match behind {
                        true => Input::Behind { run, lacking: of.max(1), of },
                        false => Input::CaughtUp { run },
                    },
                );
            }
            Done::Flush { peer, run, began } => {
                let linked = self.links[self.link(at, peer)].1;
                if self.nodes[peer].runs() && self.nodes[peer].in_sync && linked {
                    self.nodes[peer].flows = self.nodes[at].flows;
                    self.feed(at, Input::Flushed { run, lacking: 0 });
                } else if self.nodes[peer].in_sync && self.now - began < FLUSH - 50 * MS {
                    let life = self.nodes[at].life;
                    let what = Done::Flush { peer, run, began };
                    self.schedule(10 * MS, Event::Done { node: at, life, what });
                } else {
                    self.feed(at, Input::Flushed { run, lacking: 7 });
                }
            }
            Done::Announce => {
                if self.nodes[at].claimed {
                    self.feed(at, Input::Announced);
                }
            }
        }
    }

    fn timeout(&mut self, at: usize) {
        let now = self.now;
        self.nodes[at].router.handle_timeout(now);
        self.obey(at);
        self.nodes[at].machine.handle_timeout(now);
        self.perform(at);
    }

    fn route(&mut self, at: usize, input: router::Input) {
        let now = self.now;
        self.nodes[at].router.handle_input(now, input);
        self.obey(at);
    }

    fn feed(&mut self, at: usize, input: Input) {
        let now = self.now;
        self.nodes[at].machine.handle_input(now, input);
        self.perform(at);
    }

    fn obey(&mut self, at: usize) {
        let now = self.now;
        while let Some(output) = self.nodes[at].router.poll_output() {
            match output {
                router::Output::SendAdvert(priority) => {
                    let length = lease::length(self.interval());
                    if priority != Priority::YIELD {
                        self.nodes[at].lease_until = now + length;
                    }
                    self.advertise(at, priority.value(), length);
                }
                router::Output::Claim => {
                    self.note(format!("{at} claims"));
                    let node = &mut self.nodes[at];
                    node.claimed = true;
                    node.in_sync = false;
                    let life = node.life;
                    let after = MS + self.way();
                    self.schedule(after, Event::Done { node: at, life, what: Done::Announce });
                }
                router::Output::Release => {
                    self.note(format!("{at} releases"));
                    self.nodes[at].claimed = false;
                    self.nodes[at].frozen_since = None;
                }
                router::Output::Announce => {}
                router::Output::Transition(transition) => {
                    self.note(format!("{at} {transition:?}"));
                    let node = &mut self.nodes[at];
                    if transition.to == Role::Active && transition.from != transition.to {
                        node.epoch += 1;
                        node.heard = None;
                    }
                }
            }
        }
        let node = &self.nodes[at];
        let lively = node.heard.filter(|(_, at, _)| now - *at < 4 * self.interval());
        let election = Election {
            role: node.router.state(),
            epoch: node.epoch,
            active: lively.map_or(Other::Nobody, |(peer, ..)| Other::Peer(peer)),
            wants_to_preempt: node.router.wants_to_preempt(),
            lease_until: node.heard.map(|(_, _, until)| until),
        };
        self.feed(at, Input::Election(election));
        self.set_timer(at);
    }

    fn set_timer(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if node.asleep_since.is_some() {
            return;
        }
        node.timer += 1;
        let timer = node.timer;
        let due = [node.router.poll_timeout(), node.machine.poll_timeout()];
        if let Some(due) = due.into_iter().flatten().min() {
            let after = due.saturating_duration_since(self.now);
            self.schedule(after, Event::Timer { node: at, timer });
        }
    }

    fn advertise(&mut self, from: usize, priority: u8, lease_left: Duration) {
        for to in (0..self.nodes.len()).filter(|to| *to != from) {
            if !self.adverts_lost {
                let way = self.way();
                self.schedule(way, Event::Advert { to, from, priority, lease_left });
            }
            // Epochs go with heartbeats.
            let epoch = self.nodes[from].epoch;
            self.nodes[to].epoch = self.nodes[to].epoch.max(epoch);
        }
    }

    fn perform(&mut self, at: usize) {
        let now = self.now;
        while let Some(output) = self.nodes[at].machine.poll_output() {
            if !matches!(output, Output::Step { .. } | Output::Send(..)) {
                self.note(format!("{at}   {output:?}"));
            }
            let life = self.nodes[at].life;
            match output {
                Output::Send(to, message) => {
                    let (link, up) = self.links[self.link(at, to)];
                    let lost = self.loss > 0 && self.random.one_in(self.loss);
                    if up && !lost {
                        let way = self.way();
                        self.schedule(way, Event::Message { to, from: at, link, message });
                    }
                }
                Output::CatchUp { peer, run } => {
                    let (what, way) = (Done::CatchUp { peer, run }, 2 * self.way());
                    self.schedule(way, Event::Done { node: at, life, what });
                }
                Output::Freeze { peer, run } => {
                    self.nodes[at].frozen_since = Some(now);
                    let (what, way) = (Done::Flush { peer, run, began: now }, 2 * self.way());
                    self.schedule(way, Event::Done { node: at, life, what });
                }
                Output::Thaw => self.nodes[at].frozen_since = None,
                Output::Give(wish) => {
                    assert!(self.nodes[at].claimed, "{at} gives what it has not");
                    self.given = self.nodes[at].flows;
                    self.route(at, router::Input::Give(wish));
                }
                Output::Take { wish, epoch } => {
                    self.takes += 1;
                    self.nodes[at].epoch = self.nodes[at].epoch.max(epoch);
                    let node = &self.nodes[at];
                    assert!(node.forced || node.lacking == 0, "{at} was not to take this");
                    assert!(node.lacking > 0 || node.flows == self.given, "{at} lacks flows");
                    self.route(at, router::Input::Take(wish));
                }
                Output::Claim => {
                    self.rough |= self.nodes[at].heard.is_none();
                    self.claim_at = Some(self.now);
                    self.route(at, router::Input::Takeover);
                }
                Output::Abandon => self.route(at, router::Input::Yield),
                Output::TakerGone => {
                    let lease = lease::length(self.interval());
                    self.route(at, router::Input::ActiveGone(lease));
                }
                Output::Refused(refusal) => self.nodes[at].refused = Some(refusal),
                Output::Lacking(lacking) => self.nodes[at].lacking = lacking,
                Output::Step { .. } | Output::Yielded(_) | Output::GaveUp(..) => {}
            }
        }
        self.set_timer(at);
    }

    fn takeover(&mut self, at: usize, force: bool) {
        if self.nodes[at].runs() && self.nodes[at].router.state() == Role::Backup {
            self.note(format!("{at}: operator's takeover, force {force}"));
            self.nodes[at].forced |= force;
            self.feed(at, Input::Takeover { force });
        }
    }

    fn yield_vips(&mut self, at: usize, force: bool) {
        if self.nodes[at].runs() && self.nodes[at].router.state() == Role::Active {
            self.note(format!("{at}: operator's yield, force {force}"));
            self.nodes.iter_mut().for_each(|node| node.forced |= force);
            self.feed(at, Input::Yield { force });
        }
    }

    fn actives(&self) -> Vec<usize> {
        (0..self.nodes.len())
            .filter(|at| self.nodes[*at].runs() && self.nodes[*at].claimed)
            .collect()
    }

    /// Nodes whose kernel answers for the VIPs.
    fn answering(&self) -> Vec<usize> {
        let answers = |node: &Node| {
            node.claimed && node.lease_until > self.now && node.frozen_since.is_none()
        };
        (0..self.nodes.len()).filter(|at| answers(&self.nodes[*at])).collect()
    }

    fn check(&mut self) {
        let answering = self.answering();
        if let [one] = answering[..] {
            self.nodes[one].flows += 1;
        }
        if answering.len() < 2 || self.rough {
            self.overlap_since = None;
        } else {
            let since = *self.overlap_since.get_or_insert(self.now);
            // Who is given the VIPs claims them too, with the priority of whoever is told to claim:
            // the next advert tells them apart.
            let claims = self.claim_at.is_some_and(|at| at + CLAIM_SPACING >= since);
            let spacing = if claims { CLAIM_SPACING } else { Duration::ZERO };
            let bound = 2 * (self.delay + MS) + spacing;
            assert!(self.now - since <= bound, "{answering:?} answer since {since:?}");
        }
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.runs()) {
            let frozen = node.frozen_since.map(|since| self.now - since);
            assert!(frozen.is_none_or(|time| time <= FLUSH + MS), "{at} is frozen for {frozen:?}");
        }
    }

    /// Everybody is there, nothing is lost: within a bound there is one Active, which forwards.
    fn settle(&mut self) {
        self.loss = 0;
        self.adverts_lost = false;
        let count = self.nodes.len();
        for at in 0..count {
            self.wake(at);
            if !self.nodes[at].alive {
                self.start(at);
            }
        }
        let pairs = (0..count).flat_map(|one| (one + 1..count).map(move |other| (one, other)));
        pairs.for_each(|(one, other)| self.connect(one, other));
        self.run_for(8 * self.interval() + Duration::from_secs(8));
        let actives = self.actives();
        assert_eq!(actives.len(), 1, "{actives:?} are Active");
        assert_eq!(self.answering(), actives);
        self.rough = false;
    }
}

impl Node {
    fn new(priority: u8, cs: u16, preempt: Preempt, nodes: usize, now: Instant) -> Self {
        let config = RouterConfig {
            priority: Priority::new(priority),
            advert_interval: AdverInterval::from_centiseconds(cs).unwrap(),
            preempt,
            decides_ties: Family::V4,
            startup_hold: Duration::ZERO,
        };
        let machine = Machine::new(Config {
            peers: nodes,
            advert_interval: config.advert_interval.duration(),
            preempt_wait: Duration::from_secs(60),
            replicates: true,
        });
        Self {
            router: VirtualRouter::new(config.clone()),
            config,
            life: 0,
            alive: false,
            asleep_since: None,
            inbox: Vec::new(),
            machine,
            timer: 0,
            claimed: false,
            frozen_since: None,
            lease_until: now,
            heard: None,
            epoch: 0,
            flows: 0,
            in_sync: false,
            forced: false,
            lacking: 0,
            refused: None,
        }
    }

    fn runs(&self) -> bool {
        self.alive && self.asleep_since.is_none()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let from = self.journal.len().saturating_sub(100);
            self.journal[from..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Two nodes, the first Active, the second in sync.
fn pair(seed: u64, interval_cs: u16) -> World {
    let mut world = World::new(seed, &[200, 100], interval_cs, Preempt::Disabled);
    world.start(0);
    world.run_for(Duration::from_secs(1) + 5 * world.interval());
    world.start(1);
    world.run_for(Duration::from_secs(1));
    assert_eq!(world.actives(), [0]);
    world.nodes[1].in_sync = true;
    world.steps = 0;
    world
}

fn command(world: &mut World, which: usize) {
    match which {
        0 => world.takeover(1, false),
        1 => world.yield_vips(0, false),
        2 => world.takeover(1, true),
        _ => world.yield_vips(0, true),
    }
}

#[test]
fn a_handover_moves_the_vips_and_takes_a_few_milliseconds() {
    for which in 0..4 {
        let mut world = pair(1, 10);
        let (before, epoch) = (world.now, world.nodes[0].epoch);
        command(&mut world, which);
        world.run_for(12 * MS);
        assert_eq!((world.actives(), world.takes), (vec![1], 1), "{which}");
        assert!(world.nodes[1].epoch > epoch && world.nodes[1].refused.is_none());
        assert!(world.now - before < 15 * MS);
        let idle = |node: &Node| node.machine.state == super::State::Idle;
        assert!(world.nodes.iter().all(idle), "both know that it is done");
        world.settle();
        assert_eq!(world.actives(), [1], "it stays");
    }
}

#[test]
fn a_backup_that_is_not_in_sync_is_refused_and_forced() {
    for (force, active) in [(false, 0), (true, 1)] {
        let mut world = pair(1, 10);
        world.nodes[1].in_sync = false;
        world.takeover(1, force);
        world.run_for(300 * MS);
        assert_eq!(world.actives(), [active]);
        let said = matches!(world.nodes[1].refused, Some(Refusal::Said(0, Why::Behind { .. })));
        assert_eq!(said, !force);
    }
}

#[test]
fn a_silent_active_is_left_alone_unless_forced() {
    // Longer than the channel's answer takes, shorter than the election's.
    for (force, active) in [(false, 0), (true, 1)] {
        let mut world = pair(1, 100);
        world.sleep(0, Duration::from_millis(if force { 9000 } else { 1500 }));
        world.takeover(1, force);
        world.run_for(Duration::from_millis(2900));
        assert_eq!(world.nodes[1].refused.is_some(), !force);
        assert_eq!(world.actives(), [active]);
    }
}

/// Every fault before every step of every command.
#[test]
fn whoever_dies_sleeps_or_is_not_heard_at_any_step_one_node_is_active() {
    let sleeps = [5, 60, 140, 230, 400, 900].map(Duration::from_millis);
    let mut faults = vec![Fault::Lose, Fault::Cut, Fault::Die(0), Fault::Die(1)];
    faults.extend(sleeps.iter().flat_map(|time| [Fault::Sleep(0, *time), Fault::Sleep(1, *time)]));
    let mut worlds = 0;
    for interval_cs in [1, 10] {
        for which in 0..4 {
            for fault in &faults {
                for step in 1..24 {
                    let mut world = pair(step, interval_cs);
                    world.plan = Some((step, *fault));
                    command(&mut world, which);
                    unless_refused_it_moves(&mut world, which);
                    world.settle();
                    worlds += 1;
                }
            }
        }
    }
    assert_eq!(worlds, 2 * 4 * 16 * 23);
}

/// What is refused has changed nothing: the Active is the same, or dead or asleep.
fn unless_refused_it_moves(world: &mut World, which: usize) {
    // Takeovers are said to 1, yields to 0.
    let asker = [1, 0, 1, 0][which];
    for _ in 0..600 {
        world.run_for(10 * MS);
        if let Some(refusal) = world.nodes[asker].refused.take() {
            // The giver's word, or ours, that it is not Active, leaves open who is.
            let open = Refusal::Said(0, Why::NotActive);
            let sure = !matches!(refusal, Refusal::Silent(_)) && refusal != open;
            let same = world.nodes[0].claimed || !world.nodes[0].runs();
            // The election may have been faster.
            let moved = world.nodes[1].claimed;
            assert!(!sure || same || moved, "{refusal:?}");
        }
    }
}

/// The return of a node of higher priority, which is in sync sooner or later.
#[test]
fn the_higher_priority_comes_back_when_it_is_in_sync_and_not_before() {
    for seed in 1..200 {
        let mut world = World::new(seed, &[100, 200], 10, Preempt::Enabled);
        world.start(0);
        world.run_for(Duration::from_secs(2));
        world.start(1);
        world.run_for(2 * MS);
        world.nodes[1].in_sync = false;
        world.run_for(150 * MS);
        let Waiting { peer, .. } = world.nodes[1].machine.waiting().expect("it waits, or has them");
        assert_eq!(peer, 0);
        world.run_for(Duration::from_secs(10));
        assert_eq!((world.actives(), world.takes), (vec![1], 1));
    }
}

#[test]
fn long_lives_by_seed() {
    let seed = std::env::var("BATON_SIM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = seed.map_or(0..200, |seed: u64| seed..seed + 1);
    let mut takes = 0;
    for seed in seeds.clone() {
        let world = life(seed);
        takes += world.takes;
        if seeds.end - seeds.start == 1 {
            world.journal.iter().for_each(|line| println!("{line}"));
        }
    }
    assert!(seed.is_some() || takes > 500, "{takes} handovers prove little");
}

fn life(seed: u64) -> World {
    let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
    let count = 2 + random.below(2) as usize;
    let priorities: Vec<u8> = (0..count).map(|_| 100 + random.below(3) as u8 * 50).collect();
    let preempt = [Preempt::Enabled, Preempt::Disabled][random.below(2) as usize];
    let mut world = World::new(seed, &priorities, [1, 10][random.below(2) as usize], preempt);
    (0..count).for_each(|at| world.start(at));
    world.settle();
    for _ in 0..4 {
        for _ in 0..12 {
            let at = random.below(count as u64) as usize;
            match random.below(12) {
                0..5 => world.takeover(at, random.one_in(4)),
                5 | 6 => {
                    world.actives().into_iter().for_each(|at| world.yield_vips(at, false));
                }
                7 => world.die(at),
                8 => world.start_if_dead(at),
                9 => world.sleep(at, Duration::from_millis(1 + random.below(800))),
                10 => world.cut(at, (at + 1) % count),
                _ => {
                    world.loss = [0, 0, 3, 10][random.below(4) as usize];
                    world.adverts_lost = random.one_in(8);
                    world.rough |= world.adverts_lost;
                }
            }
            let time = Duration::from_micros(random.below(4000) * random.below(400));
            world.run_for(time);
        }
        world.settle();
    }
    world
}

impl World {
    fn start_if_dead(&mut self, at: usize) {
        if !self.nodes[at].alive {
            self.start(at);
        }
    }
}

#[test]
fn wishes_say_who_is_to_stay() {
    for (wish, advertised) in [(Wish::Takeover, 254), (Wish::Yield, 100), (Wish::Preempt, 100)] {
        let mut world = pair(1, 10);
        world.route(1, router::Input::Take(wish));
        world.run_for(100 * MS);
        assert_eq!(world.nodes[1].router.advertised_priority().value(), advertised);
    }
}
