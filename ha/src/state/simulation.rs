//! Nodes that are set, cut off from each other, heal, and start anew, in virtual time: in the end
//! all of them say the same, and the last word that all had heard of stands.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::settings::{Kind, MOST_SETTINGS};
use super::shared::{Input, Output};
use super::{Admin, Frame, Health, Shared, Target, Value, View};
use crate::sync::simulation::Random;

type Link = VecDeque<(Instant, Frame)>;

struct World {
    now: Instant,
    random: Random,
    nodes: Vec<Shared>,
    views: Vec<Vec<View>>,
    /// From, to: frames on their way; `None`: no connection.
    links: Vec<Vec<Option<Link>>>,
    /// Whether a full queue drops frames now and then.
    drops: bool,
}

fn target(n: u64) -> Target {
    let backend = std::net::SocketAddr::from(([10, 78, 0, n as u8], 80));
    Target::new("10.77.0.100:80".parse().unwrap(), 6, backend)
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let count = 2 + random.below(2) as usize;
        Self {
            now: Instant::now(),
            nodes: (0..count).map(|n| Shared::new(&format!("n{n}"))).collect(),
            views: vec![Vec::new(); count],
            links: (0..count).map(|_| (0..count).map(|_| None).collect()).collect(),
            drops: seed % 2 == 1,
            random,
        }
    }

    fn connect(&mut self, one: usize, two: usize, up: bool) {
        if one == two || self.links[one][two].is_some() == up {
            return;
        }
        for (from, to) in [(one, two), (two, one)] {
            self.links[from][to] = up.then(VecDeque::new);
            let input = if up { Input::Connected(to) } else { Input::Disconnected(to) };
            self.nodes[from].handle_input(self.now, input);
            self.obey(from);
        }
    }

    fn obey(&mut self, node: usize) {
        while let Some(output) = self.nodes[node].poll_output() {
            if let Output::Send(to, frame) = output {
                let delay = Duration::from_micros(200 + self.random.below(3000));
                let lost = self.drops && self.random.one_in(40);
                if let Some(link) = self.links[node][to].as_mut().filter(|_| !lost) {
                    let at =
                        link.back().map_or(self.now + delay, |(at, _)| (self.now + delay).max(*at));
                    link.push_back((at, frame));
                }
            }
        }
    }

    fn set(&mut self, node: usize, n: u64, value: Value) {
        self.nodes[node].set(self.now, target(n), value).unwrap();
        self.obey(node);
    }

    fn faults(&mut self) {
        let count = self.nodes.len() as u64;
        let (one, two) = (self.random.below(count) as usize, self.random.below(count) as usize);
        if self.random.one_in(40) {
            let up = self.random.one_in(2);
            self.connect(one, two, up);
        }
        if self.random.one_in(15) {
            let value = match self.random.below(4) {
                0 => Value::Admin(Admin::Enabled),
                1 => Value::Admin(Admin::Drained),
                2 => Value::Weight(Some(1 + self.random.below(256) as u16)),
                _ => Value::Weight(None),
            };
            let n = self.random.below(20);
            self.set(one, n, value);
        }
        if self.random.one_in(20) {
            let view = |n| View { target: target(n), sees: Health::Up, selects: Health::Down };
            let some = self.random.below(12);
            self.views[one] = (some..some + self.random.below(9)).map(view).collect();
            self.see(one);
        }
        if self.random.one_in(400) {
            (0..self.nodes.len()).for_each(|other| self.connect(one, other, false));
            self.nodes[one] = Shared::new(&format!("n{one}"));
            self.see(one);
        }
    }

    fn see(&mut self, node: usize) {
        let views = self.views[node].clone();
        self.nodes[node].handle_input(self.now, Input::Views(views));
        self.obey(node);
    }

    fn step(&mut self, busy: bool) {
        self.now += Duration::from_millis(1);
        if busy {
            self.faults();
        }
        for from in 0..self.nodes.len() {
            for to in 0..self.nodes.len() {
                while let Some(link) = &mut self.links[from][to]
                    && let Some((_, frame)) = link.pop_front_if(|(at, _)| *at <= self.now)
                {
                    self.nodes[to].handle_input(self.now, Input::Frame(from, frame));
                    self.obey(to);
                }
            }
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].poll_timeout().is_some_and(|at| at <= self.now) {
                self.nodes[node].handle_timeout(self.now);
                self.obey(node);
            }
        }
    }

    fn settle(&mut self) {
        for one in 0..self.nodes.len() {
            (0..one).for_each(|two| self.connect(one, two, true));
        }
        self.drops = false;
        (0..5000).for_each(|_| self.step(false));
    }
}

fn settings(node: &Shared) -> Vec<super::Setting> {
    node.settings().each().collect()
}

#[test]
fn whatever_happens_all_come_to_the_same_once_it_is_quiet() {
    let seeds = std::env::var("BATON_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    for seed in 0..seeds.unwrap_or(40) {
        let mut world = World::new(seed);
        (0..3000).for_each(|_| world.step(true));
        world.settle();
        // And a last word, once all have heard everything.
        world.set(0, 3, Value::Admin(Admin::Disabled));
        (0..50).for_each(|_| world.step(false));
        for one in 0..world.nodes.len() {
            assert_eq!(settings(&world.nodes[one]), settings(&world.nodes[0]), "seed {seed}");
            let key = (target(3), Kind::Admin);
            let (value, version) = world.nodes[one].settings().find(&key).unwrap();
            assert_eq!(value, Value::Admin(Admin::Disabled), "seed {seed}");
            assert_eq!(version.node, "n0", "seed {seed}");
            assert_eq!(world.nodes[one].settings().dropped(), 0, "seed {seed}");
            for two in (0..world.nodes.len()).filter(|two| *two != one) {
                assert!(world.nodes[one].agrees(two), "seed {seed}: {one} {two}");
                let seen = world.nodes[one].views_of(world.now, two).expect("all of it, and fresh");
                let seen: Vec<_> = seen.values().copied().collect();
                assert_eq!(seen, world.views[two], "seed {seed}: {two} as {one} knows it");
            }
        }
    }
}

#[test]
fn what_was_set_survives_the_restart_of_any_node_as_long_as_one_knows_it() {
    let mut world = World::new(2);
    world.connect(0, 1, true);
    world.set(0, 1, Value::Admin(Admin::Drained));
    (0..20).for_each(|_| world.step(false));
    for node in [0, 1, 0] {
        (0..world.nodes.len()).for_each(|other| world.connect(node, other, false));
        world.nodes[node] = Shared::new(&format!("n{node}"));
        world.connect(node, 1 - node, true);
        (0..20).for_each(|_| world.step(false));
        let found = world.nodes[node].settings().find(&(target(1), Kind::Admin)).unwrap();
        assert_eq!(found.0, Value::Admin(Admin::Drained));
        assert!(world.nodes[node].settings().has_learned());
    }
}

#[test]
fn a_large_state_goes_over_in_bursts() {
    let mut world = World::new(4);
    for n in 0..MOST_SETTINGS as u64 {
        let backend = std::net::SocketAddr::from(([10, 78, 0, 1], n as u16));
        let target = Target::new("10.77.0.100:80".parse().unwrap(), 6, backend);
        world.nodes[0].set(world.now, target, Value::Admin(Admin::Drained)).unwrap();
    }
    world.connect(0, 1, true);
    let waiting = world.links[0][1].as_ref().unwrap().len();
    assert!(waiting <= 8, "{waiting} frames at once");
    (0..200).for_each(|_| world.step(false));
    assert_eq!(settings(&world.nodes[1]).len(), MOST_SETTINGS);
    assert!(world.nodes[1].agrees(0));
}

#[test]
fn a_peer_that_falls_silent_is_not_of_now() {
    let mut world = World::new(4);
    world.connect(0, 1, true);
    (0..100).for_each(|_| world.step(false));
    assert!(world.nodes[0].views_of(world.now, 1).is_some());
    // Frozen, its connection open.
    let later = world.now + super::shared::FRESH;
    assert!(world.nodes[0].views_of(later, 1).is_none());
    world.connect(0, 1, false);
    assert!(world.nodes[0].views_of(world.now, 1).is_none());
}
