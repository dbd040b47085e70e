//! One seed: a cluster, storms, and calms with drills; what must be so once a calm has settled.

use std::time::Duration;

use baton_ha::config::Family;
use baton_ha::vrrp::router::{CLAIM_ADVERTS, CLAIM_SPACING, Input, RouterConfig, State};
use baton_ha::vrrp::{AdverInterval, Preempt, Priority};

use crate::network::Network;
use crate::random::Random;
use crate::world::World;

pub(crate) fn run(seed: u64) -> World {
    let mut random = Random::new(seed);
    let configs = cluster(&mut random);
    let intervals = configs.iter().map(|config| config.advert_interval.duration());
    let fastest = intervals.min().expect("a cluster has nodes");
    // In a LAN that is at peace an advert comes within CLAIM_SPACING; simultaneous takeovers need
    // that much.
    let most = CLAIM_SPACING * 2 / 5;
    let calm = Calm {
        network: Network::calm(configs.len(), most.min(fastest * random.pick(&[1, 2, 5]) / 100)),
        jitter: most.min(fastest * random.pick(&[0, 1, 3]) / 100),
    };
    let mut world = World::new(seed, random, configs, calm.network.clone());
    let first = world.random.below(world.nodes.len());
    let configs: Vec<_> = world.nodes.iter().map(|node| format!("{:?}", node.config)).collect();
    configs.into_iter().for_each(|line| world.note(line));
    world.start(first);
    for _ in 0..3 {
        storm(&mut world);
        begin_calm(&mut world, &calm);
        settle(&mut world);
        for _ in 0..3 {
            drill(&mut world);
        }
    }
    world
}

/// The network and the nodes' tardiness in a calm.
struct Calm {
    network: Network,
    jitter: Duration,
}

fn cluster(random: &mut Random) -> Vec<RouterConfig> {
    let nodes = 2 + random.below(4);
    let interval = random.pick(&[1, 2, 10, 100]);
    let same_interval = random.chance(75);
    let priorities = random.below(4);
    let owner = random.chance(10);
    let preempts: &[Preempt] = match random.below(3) {
        0 => &[Preempt::Enabled],
        1 => &[Preempt::Disabled],
        _ => &[Preempt::Enabled, Preempt::Disabled],
    };
    (0..nodes)
        .map(|at| RouterConfig {
            priority: Priority::new(match priorities {
                _ if owner && at == 0 => 255,
                0 => 100,
                1 => 250 - 50 * at as u8,
                2 => 101 + at as u8,
                _ => 1 + random.below(254) as u8,
            }),
            advert_interval: AdverInterval::from_centiseconds(if same_interval {
                interval
            } else {
                random.pick(&[1, 2, 10, 100])
            })
            .expect("centiseconds in range"),
            preempt: random.pick(preempts),
            decides_ties: Family::V4,
            startup_hold: Duration::ZERO,
        })
        .collect()
}

fn storm(world: &mut World) {
    world.calm_since = None;
    let nodes = world.nodes.len();
    for _ in 0..5 + world.random.below(15) {
        let interval = world.interval();
        let at = world.random.below(nodes);
        match world.random.below(14) {
            0..4 => {
                world.network = Network::storm(nodes, interval, &mut world.random);
                world.jitter = interval * world.random.pick(&[0, 2, 10, 50]) / 100;
                world.note(format!("{:?}", world.network));
            }
            4 => world.pause(at),
            5 => world.resume(at),
            6 => world.crash(at),
            7 | 8 => start_if_down(world, at),
            9 => command(world, at, Input::Takeover),
            10 => command(world, at, Input::Yield),
            11 => fault(world, at),
            12 => recover(world, at),
            _ => {}
        }
        let time = world.random.duration(interval / 5, interval * 4);
        world.run_for(time);
    }
}

fn begin_calm(world: &mut World, calm: &Calm) {
    let in_flight = world.network.delay;
    world.network = calm.network.clone();
    world.jitter = calm.jitter;
    world.run_for(in_flight);
    let survivor = world.random.below(world.nodes.len());
    for at in 0..world.nodes.len() {
        world.resume(at);
        if at == survivor || world.random.chance(75) {
            start_if_down(world, at);
            recover(world, at);
        }
    }
    disturbed(world);
}

fn start_if_down(world: &mut World, at: usize) {
    if world.nodes[at].router.is_none() {
        world.start(at);
    }
}

fn fault(world: &mut World, at: usize) {
    if world.nodes[at].runs() && !world.nodes[at].faulty {
        world.nodes[at].faulty = true;
        world.input(at, Input::Fault);
    }
}

fn recover(world: &mut World, at: usize) {
    if world.nodes[at].runs() && world.nodes[at].faulty {
        world.nodes[at].faulty = false;
        world.input(at, Input::Recovered);
    }
}

/// An operator's command; ignored by a node that does not run.
fn command(world: &mut World, at: usize, input: Input) {
    if !world.nodes[at].runs() {
        return;
    }
    let was_active = world.nodes[at].claimed;
    world.input(at, input.clone());
    let node = &mut world.nodes[at];
    match input {
        Input::Takeover => node.held = node.claimed,
        Input::Yield => node.deferring |= was_active && !node.claimed,
        _ => unreachable!("an operator says takeover or yield"),
    }
}

/// The calm begins anew: something has just been done to a node.
fn disturbed(world: &mut World) {
    world.calm_since = Some(world.now);
    world.note("calm".into());
    for node in &mut world.nodes {
        node.transitions = 0;
        node.adverts = 0;
    }
}

/// Longer than Active_Down_Interval of the slowest, and the end of a takeover's claim.
fn detection_bound(world: &World) -> Duration {
    4 * world.interval() + 2 * world.round_trip() + CLAIM_SPACING * u32::from(CLAIM_ADVERTS)
}

/// Within the bound there is an Active, within another the right one, and then nothing changes.
fn settle(world: &mut World) {
    world.run_for(detection_bound(world));
    assert!(!world.actives().is_empty(), "nobody is Active");
    world.run_for(detection_bound(world));
    let active = sole_active(world);
    check_right(world, active);

    let transitions: u32 = world.nodes.iter().map(|node| node.transitions).sum();
    let storm = 6 * world.nodes.len() as u32;
    assert!(transitions <= storm, "{transitions} transitions since the calm began");
    disturbed(world);
    let time = 5 * world.interval();
    world.run_for(time);
    for (at, node) in world.nodes.iter().enumerate() {
        assert_eq!(node.transitions, 0, "{at} changes in a calm");
        let due = time.as_nanos() / node.config.advert_interval.duration().as_nanos() + 1;
        let due = if at == active { due } else { 0 };
        assert!(u128::from(node.adverts) <= due, "{at} sent {} of {due}", node.adverts);
    }
}

fn sole_active(world: &World) -> usize {
    let actives = world.actives();
    assert_eq!(actives.len(), 1, "{actives:?} are Active");
    actives[0]
}

/// Nobody who may preempt outranks the Active, and it advertises what it should.
fn check_right(world: &World, active: usize) {
    let node = &world.nodes[active];
    let router = node.router.as_ref().expect("an Active runs");
    let wanted = match node.held {
        true => node.config.priority.max(Priority::HELD),
        false => node.config.priority,
    };
    assert_eq!(router.advertised_priority(), wanted, "{active}, held: {}", node.held);
    for (at, other) in world.nodes.iter().enumerate() {
        let Some(router) = &other.router else { continue };
        let may_preempt = router.state() == State::Backup
            && !other.deferring
            && (other.config.preempt == Preempt::Enabled
                || other.config.priority == Priority::OWNER);
        assert!(
            !may_preempt || other.config.priority <= wanted,
            "{at} of priority {} leaves {active} Active at {wanted}",
            other.config.priority
        );
    }
}

/// Nodes that could be Active.
fn fit(world: &World) -> Vec<usize> {
    (0..world.nodes.len())
        .filter(|at| world.nodes[*at].runs() && !world.nodes[*at].faulty)
        .collect()
}

/// One thing done to a settled cluster, and what must come of it.
fn drill(world: &mut World) {
    let active = sole_active(world);
    let fit = fit(world);
    let others: Vec<usize> = fit.iter().copied().filter(|at| *at != active).collect();
    let owner = fit.iter().any(|at| world.nodes[*at].config.priority == Priority::OWNER);
    let any = world.random.pick(&fit);
    match world.random.below(9) {
        0 => {
            world.note(format!("drill: takeover of {any}"));
            disturbed(world);
            command(world, any, Input::Takeover);
            world.run_for(world.round_trip());
            if !owner {
                assert_eq!(world.actives(), [any], "a takeover is done in a round trip");
            }
            settle(world);
            assert!(owner || world.actives() == [any], "a takeover lasts");
        }
        1 => drill_rival_takeovers(world, &fit, owner),
        2 if !others.is_empty() => {
            world.note(format!("drill: yield of {active}"));
            disturbed(world);
            command(world, active, Input::Yield);
            settle(world);
            assert!(world.nodes[active].deferring, "{active} came back after its yield");
        }
        3 if !others.is_empty() => {
            world.note(format!("drill: crash of {active}"));
            disturbed(world);
            world.crash(active);
            settle(world);
        }
        4 if !others.is_empty() => {
            world.note(format!("drill: shutdown of {active}"));
            disturbed(world);
            world.input(active, Input::Shutdown);
            world.crash(active);
            settle(world);
        }
        5 => drill_pause(world, active),
        6 if !others.is_empty() => {
            let sleeper = world.random.pick(&others);
            disturbed(world);
            drill_pause(world, sleeper);
            // Its socket holds what it missed: there was an Active all along.
            assert_eq!(world.actives(), [active], "{sleeper} took over when it woke");
        }
        7 if !others.is_empty() => drill_return(world, active, &others),
        8 if !others.is_empty() => {
            world.note(format!("drill: fault of {active}"));
            disturbed(world);
            fault(world, active);
            settle(world);
            disturbed(world);
            recover(world, active);
            settle(world);
        }
        _ => {}
    }
}

/// Two operators on two nodes: the later wins, unless it comes while the earlier still claims.
fn drill_rival_takeovers(world: &mut World, fit: &[usize], owner: bool) {
    let first = world.random.pick(fit);
    let second = world.random.pick(fit);
    let claim = (CLAIM_SPACING + world.jitter) * u32::from(CLAIM_ADVERTS);
    let between = match world.random.below(4) {
        0 => Duration::ZERO,
        1 => world.random.duration(Duration::ZERO, claim),
        2 => claim + world.round_trip() + Duration::from_nanos(1),
        _ => claim + world.round_trip() + world.interval() * 3 / 2,
    };
    world.note(format!("drill: takeover of {first}, {between:?} later of {second}"));
    disturbed(world);
    command(world, first, Input::Takeover);
    world.run_for(between);
    disturbed(world);
    command(world, second, Input::Takeover);
    settle(world);
    if owner {
        return;
    }
    let active = sole_active(world);
    assert!(world.nodes[active].held, "{active} is Active, and nobody told it to take over");
    if between > claim + world.round_trip() {
        assert_eq!(active, second, "the later takeover counts");
    }
}

/// A Backup restarts: it preempts only if it may and outranks the Active.
fn drill_return(world: &mut World, active: usize, others: &[usize]) {
    let at = world.random.pick(others);
    world.note(format!("drill: restart of {at}"));
    disturbed(world);
    world.crash(at);
    settle(world);
    let router = world.nodes[active].router.as_ref().expect("an Active runs");
    let advertised = router.advertised_priority();
    let config = &world.nodes[at].config;
    // With a shorter interval of its own it may not wait for the Active's first advert.
    let patient = config.advert_interval >= world.nodes[active].config.advert_interval;
    let preempts = config.priority > advertised
        && (config.preempt == Preempt::Enabled || config.priority == Priority::OWNER);
    let wanted = if preempts { at } else { active };
    disturbed(world);
    world.start(at);
    // An owner is Active as soon as it starts, and then the address decides between owners.
    let owner = world.nodes[at].config.priority == Priority::OWNER;
    settle(world);
    assert!(owner || !patient || world.actives() == [wanted], "{at} came back");
}

fn drill_pause(world: &mut World, at: usize) {
    let interval = world.interval();
    let time = world.random.duration(interval / 3, interval * 9);
    world.note(format!("drill: {at} sleeps {time:?}"));
    world.pause(at);
    world.run_for(time);
    world.resume(at);
    disturbed(world);
    settle(world);
}
