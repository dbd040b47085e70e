//! Rules of the virtual router that take several steps, each with two or three routers and no
//! network between them.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use baton_ha::config::Family;
use baton_ha::vrrp::router::{
    ANSWER_SPACING, Advert, CLAIM_ADVERTS, Input, Output, Reason, RouterConfig, State, Transition,
    VirtualRouter,
};
use baton_ha::vrrp::{AdverInterval, Preempt, Priority};

const INTERVAL: Duration = Duration::from_millis(100);

/// Routers that hear each other at once.
struct Lan {
    now: Instant,
    routers: Vec<VirtualRouter>,
    /// Adverts of these routers are lost.
    mute: Vec<usize>,
}

impl Lan {
    fn new(priorities: &[u8]) -> Self {
        let routers =
            priorities.iter().map(|priority| router(*priority, Preempt::Enabled)).collect();
        let mut lan = Self { now: Instant::now(), routers, mute: Vec::new() };
        for at in 0..lan.routers.len() {
            lan.input(at, Input::Startup);
        }
        lan.run_for(10 * INTERVAL);
        lan
    }

    fn input(&mut self, at: usize, input: Input) {
        self.routers[at].handle_input(self.now, input);
        self.deliver();
    }

    /// Carries adverts about until nobody says anything.
    fn deliver(&mut self) {
        while let Some((from, output)) =
            (0..self.routers.len()).find_map(|at| Some((at, self.routers[at].poll_output()?)))
        {
            let Output::SendAdvert(priority) = output else { continue };
            for to in (0..self.routers.len()).filter(|to| *to != from) {
                if !self.mute.contains(&from) {
                    let advert = Advert { local: address(to), ..advert(priority.value(), from) };
                    self.routers[to].handle_input(self.now, Input::Advert(advert));
                }
            }
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.routers.iter().filter_map(VirtualRouter::poll_timeout).min()
            && at <= end
        {
            self.now = at;
            for router in &mut self.routers {
                router.handle_timeout(at);
            }
            self.deliver();
        }
        self.now = end;
    }

    fn actives(&self) -> Vec<usize> {
        (0..self.routers.len()).filter(|at| self.routers[*at].state() == State::Active).collect()
    }
}

fn router(priority: u8, preempt: Preempt) -> VirtualRouter {
    VirtualRouter::new(RouterConfig {
        priority: Priority::new(priority),
        advert_interval: AdverInterval::from_duration(INTERVAL).unwrap(),
        preempt,
        decides_ties: Family::V4,
        startup_hold: Duration::ZERO,
    })
}

fn address(at: usize) -> IpAddr {
    IpAddr::from([10, 77, 0, 2 + at as u8])
}

/// An advert of router `from`, as router 9 hears it.
fn advert(priority: u8, from: usize) -> Advert {
    Advert {
        source: address(from),
        local: address(9),
        priority: Priority::new(priority),
        interval: AdverInterval::from_duration(INTERVAL).unwrap(),
    }
}

fn outputs(router: &mut VirtualRouter) -> Vec<Output> {
    std::iter::from_fn(|| router.poll_output()).collect()
}

#[test]
fn skew_is_not_rounded_to_centiseconds() {
    let mut router = VirtualRouter::new(RouterConfig {
        priority: Priority::new(200),
        advert_interval: AdverInterval::from_centiseconds(1).unwrap(),
        preempt: Preempt::Enabled,
        decides_ties: Family::V4,
        startup_hold: Duration::ZERO,
    });
    let start = Instant::now();
    let mut now = start;
    router.handle_input(now, Input::Startup);
    for _ in 0..4 {
        now = router.poll_timeout().unwrap();
        router.handle_timeout(now);
    }
    assert_eq!(router.state(), State::Active);
    assert_eq!(now - start, Duration::from_micros(32_187) + Duration::from_nanos(500));
}

#[test]
fn takeovers_go_back_and_forth_any_number_of_times() {
    let mut lan = Lan::new(&[200, 100, 150]);
    assert_eq!(lan.actives(), [0]);
    for round in 0..12 {
        let at = [1, 2, 0][round % 3];
        lan.input(at, Input::Takeover);
        assert_eq!(lan.actives(), [at], "at once");
        assert_eq!(lan.routers[at].reason(), Reason::Takeover);
        lan.run_for(20 * INTERVAL);
        assert_eq!(lan.actives(), [at], "for good, whatever the configured priorities");
        assert_eq!(lan.routers[at].advertised_priority(), Priority::HELD);
    }
}

#[test]
fn a_node_that_holds_forgets_it_when_it_is_deposed() {
    let mut lan = Lan::new(&[200, 100]);
    lan.input(1, Input::Takeover);
    lan.run_for(5 * INTERVAL);
    lan.input(0, Input::Takeover);
    assert_eq!(lan.routers[1].advertised_priority(), Priority::new(100));
    // The holder goes away; the other is Active with its configured priority.
    lan.input(0, Input::Shutdown);
    lan.run_for(5 * INTERVAL);
    assert_eq!(lan.actives(), [1]);
    assert_eq!(lan.routers[1].advertised_priority(), Priority::new(100));
    // So the higher priority preempts when it comes back.
    lan.input(0, Input::Startup);
    lan.run_for(5 * INTERVAL);
    assert_eq!(lan.actives(), [0]);
}

#[test]
fn a_takeover_whose_claim_was_lost_claims_again() {
    // The Active holds, and has the greater address, so that a tie at 254 is its own.
    let mut lan = Lan::new(&[100, 200]);
    lan.input(1, Input::Takeover);
    lan.run_for(5 * INTERVAL);
    assert_eq!(lan.actives(), [1]);
    lan.mute = vec![0];
    lan.input(0, Input::Takeover);
    lan.run_for(INTERVAL * 3 / 4);
    assert_eq!(lan.actives(), [0, 1], "nobody heard the claim");
    lan.mute.clear();
    lan.run_for(INTERVAL);
    assert_eq!(lan.actives(), [0]);
}

#[test]
fn after_a_yield_the_node_waits_until_the_active_is_gone() {
    let mut lan = Lan::new(&[200, 100]);
    lan.input(0, Input::Yield);
    lan.run_for(30 * INTERVAL);
    assert_eq!(lan.actives(), [1], "a higher priority does not preempt after its yield");
    lan.input(1, Input::Yield);
    lan.run_for(3 * INTERVAL);
    assert_eq!(lan.actives(), [0], "the Active yielded");
    // It is itself again: another's takeover, and an end to that.
    lan.input(1, Input::Takeover);
    lan.run_for(5 * INTERVAL);
    lan.input(1, Input::Shutdown);
    lan.run_for(5 * INTERVAL);
    assert_eq!(lan.actives(), [0]);
}

#[test]
fn after_a_yield_that_nobody_takes_up_the_node_claims_again() {
    let mut lan = Lan::new(&[200]);
    lan.input(0, Input::Yield);
    lan.run_for(INTERVAL * 32 / 10);
    assert_eq!(lan.actives(), [] as [usize; 0]);
    lan.run_for(INTERVAL * 3 / 10);
    assert_eq!(lan.actives(), [0]);
    assert_eq!(lan.routers[0].reason(), Reason::ActiveDown);
}

#[test]
fn an_owner_is_known_by_adverts_that_outlast_a_claim() {
    let mut backup = router(100, Preempt::Enabled);
    let mut now = Instant::now();
    backup.handle_input(now, Input::Startup);
    for heard in 0..10 {
        // The owner has two paths, and so two addresses.
        backup.handle_input(now, Input::Advert(advert(255, heard % 2)));
        let outranked = backup.outranked_by();
        assert_eq!(outranked, (heard >= 5).then(|| address(heard % 2)), "{heard}");
        now += INTERVAL;
    }
    backup.handle_input(now, Input::Advert(advert(254, 0)));
    assert_eq!(backup.outranked_by(), None);
}

#[test]
fn a_takeover_is_not_mistaken_for_an_owner() {
    let mut lan = Lan::new(&[200, 100]);
    lan.input(1, Input::Takeover);
    for _ in 0..200 {
        lan.run_for(INTERVAL / 10);
        assert_eq!(lan.routers[0].outranked_by(), None);
    }
}

#[test]
fn a_flood_of_adverts_is_answered_at_a_bounded_rate() {
    let mut active = router(255, Preempt::Enabled);
    let start = Instant::now();
    active.handle_input(start, Input::Startup);
    outputs(&mut active);
    let mut sent = 0;
    let step = ANSWER_SPACING / 100;
    for at in 0..1000 {
        let now = start + step * at;
        for priority in [0, 99] {
            active.handle_input(now, Input::Advert(advert(priority, 0)));
        }
        active.handle_timeout(now);
        let outputs = outputs(&mut active);
        sent += outputs.iter().filter(|output| matches!(output, Output::SendAdvert(_))).count();
    }
    assert!((9..=11).contains(&sent), "{sent} adverts in {:?}", step * 1000);
}

#[test]
fn an_answer_that_is_put_off_is_still_given() {
    let mut active = router(255, Preempt::Enabled);
    let start = Instant::now();
    active.handle_input(start, Input::Startup);
    outputs(&mut active);
    active.handle_input(start + ANSWER_SPACING / 2, Input::Advert(advert(99, 0)));
    assert_eq!(outputs(&mut active), [Output::Announce]);
    assert_eq!(active.poll_timeout(), Some(start + ANSWER_SPACING));
    active.handle_timeout(start + ANSWER_SPACING);
    assert_eq!(outputs(&mut active), [Output::SendAdvert(Priority::OWNER)]);
}

/// Two nodes may have one order of addresses by IPv4 and the other by IPv6.
#[test]
fn ties_are_decided_by_ipv4_and_by_ipv6_only_after_an_interval() {
    let by_ipv6 = Advert {
        source: "fe80::9".parse().unwrap(),
        local: "fe80::1".parse().unwrap(),
        ..advert(100, 0)
    };
    let by_ipv4 = advert(100, 0);
    let active = || {
        let mut router = router(100, Preempt::Enabled);
        let mut now = Instant::now();
        router.handle_input(now, Input::Startup);
        for _ in 0..4 {
            now = router.poll_timeout().unwrap();
            router.handle_timeout(now);
        }
        now += INTERVAL / 2;
        outputs(&mut router);
        (router, now)
    };

    // Lost by IPv6, won by IPv4, again and again: this node stays, and the other gives way.
    let (mut router, now) = active();
    router.handle_input(now, Input::Advert(by_ipv6));
    assert_eq!(outputs(&mut router), [Output::Announce], "in doubt nothing is said");
    router.handle_input(now, Input::Advert(by_ipv4));
    assert_eq!(router.state(), State::Active);

    // Lost by IPv6, and nothing comes by IPv4: that path is broken.
    let (mut router, mut now) = active();
    router.handle_input(now, Input::Advert(by_ipv6));
    for _ in 0..2 {
        now += INTERVAL / 2;
        router.handle_timeout(now);
    }
    assert_eq!(router.state(), State::Active);
    router.handle_input(now, Input::Advert(by_ipv6));
    assert_eq!((router.state(), router.reason()), (State::Backup, Reason::Outranked));

    // A higher priority is no tie, by whatever path it comes.
    let (mut router, now) = active();
    let higher = Advert { priority: Priority::new(101), ..by_ipv6 };
    router.handle_input(now, Input::Advert(higher));
    assert_eq!(router.state(), State::Backup);

    // A doubt of long ago is no doubt of today.
    let (mut router, mut now) = active();
    router.handle_input(now, Input::Advert(by_ipv6));
    for _ in 0..10 {
        now += INTERVAL / 2;
        router.handle_timeout(now);
    }
    router.handle_input(now, Input::Advert(by_ipv6));
    assert_eq!(router.state(), State::Active);
}

#[test]
fn a_claim_is_short_and_then_held() {
    let mut backup = router(100, Preempt::Enabled);
    let mut now = Instant::now();
    backup.handle_input(now, Input::Startup);
    backup.handle_input(now, Input::Takeover);
    let start = now;
    let mut sent = Vec::new();
    while sent.len() < usize::from(CLAIM_ADVERTS) + 2 {
        for output in outputs(&mut backup) {
            if let Output::SendAdvert(priority) = output {
                sent.push((priority.value(), (now - start).as_millis()));
            }
        }
        now = backup.poll_timeout().unwrap();
        backup.handle_timeout(now);
    }
    let claim = [(255, 0), (255, 10), (255, 20), (255, 30), (255, 40), (254, 50), (254, 150)];
    assert_eq!(sent, claim);
}

#[test]
fn a_node_that_has_just_begun_to_listen_holds_back_and_a_lone_one_claims_after() {
    let hold = Duration::from_secs(1);
    let config = |priority| RouterConfig {
        priority: Priority::new(priority),
        advert_interval: AdverInterval::from_centiseconds(10).unwrap(),
        preempt: Preempt::Enabled,
        decides_ties: Family::V4,
        startup_hold: hold,
    };
    let begun = Instant::now();
    let claimed_after = |router: &mut VirtualRouter, since: Instant| {
        let mut now = since;
        while router.state() == State::Backup {
            now = router.poll_timeout().unwrap();
            router.handle_timeout(now);
        }
        now - since
    };
    let mut router = VirtualRouter::new(config(200));
    router.handle_input(begun, Input::Startup);
    assert_eq!(claimed_after(&mut router, begun), hold);
    // The same when its links come back.
    router.handle_input(begun + hold, Input::Fault);
    router.handle_input(begun + 2 * hold, Input::Recovered);
    assert_eq!(claimed_after(&mut router, begun + 2 * hold), hold);
    // The address owner does not wait (RFC 9568 §6.4.1).
    let mut owner = VirtualRouter::new(config(255));
    owner.handle_input(begun, Input::Startup);
    assert_eq!(owner.state(), State::Active);
    // What it hears counts more: an Active that yields is followed at once.
    let mut router = VirtualRouter::new(config(200));
    router.handle_input(begun, Input::Startup);
    let yielded = Advert {
        source: "10.77.0.2".parse().unwrap(),
        local: "10.77.0.3".parse().unwrap(),
        priority: Priority::YIELD,
        interval: AdverInterval::from_centiseconds(10).unwrap(),
    };
    router.handle_input(begun, Input::Advert(yielded));
    assert!(claimed_after(&mut router, begun) < Duration::from_millis(30));
}

/// An Active of priority 200 that hears a rival of 100 at these times, in hundredths of its interval.
fn rival_at(hundredths: &[u32]) -> (VirtualRouter, Vec<Output>) {
    let mut router = router(200, Preempt::Enabled);
    let start = Instant::now();
    let mut now = start;
    router.handle_input(now, Input::Startup);
    while router.state() != State::Active {
        now = router.poll_timeout().unwrap();
        router.handle_timeout(now);
    }
    outputs(&mut router);
    let start = now;
    for at in hundredths {
        let at = start + INTERVAL * *at / 100;
        while let Some(due) = router.poll_timeout().filter(|due| *due <= at) {
            router.handle_timeout(due);
        }
        outputs(&mut router);
        router.handle_input(at, Input::Advert(advert(100, 0)));
    }
    let last = outputs(&mut router);
    (router, last)
}

#[test]
fn a_rival_that_never_gives_way_does_not_hear() {
    for heard in [&[30, 130, 229][..], &[30, 40, 50, 60], &[30, 130, 431], &[30]] {
        let (router, last) = rival_at(heard);
        assert_eq!(router.state(), State::Active, "{heard:?}");
        assert!(last.contains(&Output::Announce), "it is answered: {heard:?}");
    }
    for heard in [&[30, 130, 230][..], &[30, 230], &[30, 329]] {
        let (mut router, last) = rival_at(heard);
        let expected = [
            Output::Release,
            Output::SendAdvert(Priority::YIELD),
            Output::Transition(Transition {
                from: State::Active,
                to: State::Backup,
                reason: Reason::Unheard,
            }),
        ];
        assert_eq!(last, expected, "{heard:?}");
        // For as long as the rival is there, it stays Backup.
        let mut now = Instant::now() + 10 * INTERVAL;
        for _ in 0..20 {
            router.handle_input(now, Input::Advert(advert(100, 0)));
            router.handle_timeout(now);
            now += INTERVAL;
        }
        assert_eq!(router.state(), State::Backup);
    }
}
