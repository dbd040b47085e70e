//! Exact ordered outputs, in virtual time.

use std::net::IpAddr;

use super::*;
use crate::config::{ChecksumForm, Family, Path, Transport, Vip};
use crate::vrrp::{AdverInterval, Preempt, Vrid};

const MS: Duration = Duration::from_millis(1);

/// A node whose time is a number of milliseconds.
struct Bench {
    node: Node,
    start: Instant,
    now: u64,
}

pub(crate) fn config(priority: u8) -> HaConfig {
    let vip = |address: &str, interface: &str| Vip {
        address: address.parse().unwrap(),
        prefix: 24,
        interface: interface.to_owned(),
    };
    HaConfig {
        node: "a".to_owned(),
        vrid: Vrid::new(51).unwrap(),
        priority: Priority::new(priority),
        advert_interval: AdverInterval::from_centiseconds(10).unwrap(),
        preempt: Preempt::Enabled,
        startup_hold: Duration::ZERO,
        preempt_wait: Duration::from_secs(60),
        checksum: ChecksumForm::Plain,
        paths: vec![Path {
            interface: "front".to_owned(),
            family: Family::V4,
            transport: Transport::Multicast,
            addresses: vec!["10.77.0.100".parse().unwrap()],
        }],
        vips: vec![vip("10.77.0.100", "front"), vip("10.78.0.100", "back")],
        peers: Vec::new(),
        announce: AnnounceConfig::default(),
        valid_lft: Duration::from_secs(3),
        realtime: false,
        channel: None,
    }
}

impl Bench {
    fn new(config: &HaConfig) -> Self {
        Self { node: Node::new(config), start: Instant::now(), now: 0 }
    }

    /// Started with every link up: Backup, its outputs taken.
    fn backup() -> Self {
        let mut bench = Self::new(&config(100));
        bench.link("front", Ok(()));
        bench.link("back", Ok(()));
        bench.input(Input::Paths(Ok(())));
        assert_eq!(bench.input(Input::Startup), [to(State::Initialize, State::Backup, STARTUP)]);
        bench
    }

    /// Active by takeover of a silent LAN, VIPs configured at the time it returns.
    fn active() -> Self {
        let mut bench = Self::backup();
        // Active_Down_Interval at priority 100: 3 * 100 ms + 60.9 ms.
        let claimed = bench.run_to(361);
        assert_eq!(
            claimed,
            [
                (361, Output::SendAdvert(Priority::new(100))),
                (361, Output::ConfigureVips),
                (361, to(State::Backup, State::Active, Reason::ActiveDown)),
            ]
        );
        bench.now = 362;
        assert_eq!(bench.input(Input::Configured), [Output::Announce]);
        bench
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn input(&mut self, input: Input) -> Vec<Output> {
        self.node.handle_input(self.at(self.now), input);
        std::iter::from_fn(|| self.node.poll_output()).collect()
    }

    fn link(&mut self, interface: &str, usable: Result<(), &str>) -> Vec<Output> {
        let usable = usable.map_err(str::to_owned);
        self.input(Input::Link { interface: interface.to_owned(), usable })
    }

    fn advert(&mut self, priority: u8) -> Vec<Output> {
        self.input(Input::Advert(Advert {
            source: IpAddr::from([10, 77, 0, 3]),
            local: IpAddr::from([10, 77, 0, 2]),
            priority: Priority::new(priority),
            interval: AdverInterval::from_centiseconds(10).unwrap(),
        }))
    }

    /// Lets time pass, each deadline in its turn, rounded up to a whole millisecond.
    fn run_to(&mut self, ms: u64) -> Vec<(u64, Output)> {
        let mut outputs = Vec::new();
        while let Some(deadline) = self.node.poll_timeout() {
            let wait = deadline.saturating_duration_since(self.start);
            let due = u64::try_from((wait + MS - Duration::from_nanos(1)).as_millis()).unwrap();
            if due > ms {
                break;
            }
            self.now = self.now.max(due);
            self.node.handle_timeout(self.at(self.now));
            while let Some(output) = self.node.poll_output() {
                outputs.push((self.now, output));
            }
        }
        self.now = ms;
        outputs
    }

    /// The times at which an output comes, up to `ms`.
    fn times(&mut self, wanted: &Output, ms: u64) -> Vec<u64> {
        let outputs = self.run_to(ms);
        outputs.iter().filter(|(_, output)| output == wanted).map(|(at, _)| *at).collect()
    }
}

const STARTUP: Reason = Reason::Startup;

fn to(from: State, to: State, reason: Reason) -> Output {
    Output::Transition(Transition { from, to, reason })
}

#[test]
fn announcements_follow_the_claim_on_schedule_and_go_on_slowly() {
    let mut bench = Bench::active();
    assert_eq!(
        bench.times(&Output::Announce, 100_000),
        // 20, 100, 300, 1000 and 3000 ms after 362; then every 30 s.
        [382, 462, 662, 1362, 3362, 30_362, 60_362, 90_362]
    );
}

#[test]
fn without_a_refresh_there_is_the_schedule_only() {
    let mut config = config(255);
    config.announce.refresh = Duration::ZERO;
    config.announce.schedule = vec![Duration::ZERO, Duration::from_millis(50)];
    let mut bench = Bench::new(&config);
    bench.link("front", Ok(()));
    bench.link("back", Ok(()));
    bench.input(Input::Paths(Ok(())));
    bench.input(Input::Startup);
    assert_eq!(bench.input(Input::Configured), [Output::Announce]);
    assert_eq!(bench.times(&Output::Announce, 100_000), [50]);
}

#[test]
fn announcements_that_are_due_together_are_one() {
    let mut bench = Bench::active();
    // Late for those at 382 and 462, but not so late that it slept: Backups wait for 300 ms.
    bench.node.handle_timeout(bench.at(600));
    let outputs: Vec<Output> = std::iter::from_fn(|| bench.node.poll_output()).collect();
    assert_eq!(outputs, [Output::SendAdvert(Priority::new(100)), Output::Announce]);
}

#[test]
fn the_lifetime_is_renewed_three_times_before_it_ends() {
    let mut bench = Bench::active();
    assert_eq!(bench.times(&Output::RefreshVips, 4500), [1361, 2361, 3361, 4361]);
}

#[test]
fn nothing_is_announced_or_refreshed_before_the_addresses_are_there() {
    let mut bench = Bench::backup();
    bench.run_to(361);
    let outputs = bench.run_to(3000);
    assert!(
        outputs.iter().all(|(_, output)| matches!(output, Output::SendAdvert(_))),
        "{outputs:?}"
    );
    assert!(bench.input(Input::Rival).is_empty());
    assert_eq!(bench.input(Input::Configured), [Output::Announce]);
}

#[test]
fn a_rival_is_answered_at_once_and_then_at_a_bounded_rate() {
    let mut bench = Bench::active();
    bench.run_to(5000);
    let mut announced = Vec::new();
    for at in 5000..5350 {
        let outputs = bench.run_to(at);
        let due = outputs.iter().filter(|(_, output)| *output == Output::Announce).count();
        let provoked = bench.input(Input::Rival).len();
        announced.extend(vec![at; due + provoked]);
    }
    assert_eq!(announced, [5000, 5100, 5200, 5300]);
    assert_eq!(bench.times(&Output::Announce, 20_000), [5400], "the last one is answered too");
}

#[test]
fn another_mac_is_announced() {
    let mut bench = Bench::active();
    bench.run_to(5000);
    assert_eq!(bench.input(Input::Moved), [Output::Announce]);
}

#[test]
fn a_rivals_advert_is_answered_with_an_announcement() {
    let mut bench = Bench::active();
    bench.run_to(5050);
    let outputs = bench.advert(50);
    assert!(outputs.contains(&Output::Announce), "{outputs:?}");
}

#[test]
fn who_is_outranked_removes_its_vips_and_is_silent() {
    let mut bench = Bench::active();
    bench.run_to(400);
    assert_eq!(
        bench.advert(200),
        [Output::RemoveVips, to(State::Active, State::Backup, Reason::Outranked)]
    );
    bench.now += 50;
    assert!(bench.input(Input::Rival).is_empty());
    assert!(bench.input(Input::VipMissing(0)).is_empty());
    assert!(bench.input(Input::Configured).is_empty(), "an answer that came too late");
    for _ in 0..50 {
        assert!(bench.advert(200).is_empty());
        let next = bench.now + 100;
        assert!(bench.run_to(next).is_empty());
    }
}

#[test]
fn after_a_sleep_the_vips_go_first_and_nothing_is_sent() {
    let mut bench = Bench::active();
    bench.run_to(5000);
    bench.node.handle_timeout(bench.at(65_000));
    let outputs: Vec<Output> = std::iter::from_fn(|| bench.node.poll_output()).collect();
    assert_eq!(outputs, [Output::RemoveVips, to(State::Active, State::Backup, Reason::Stalled)]);
}

#[test]
fn a_link_that_goes_down_makes_the_node_yield_and_one_that_comes_back_lets_it_take_part() {
    let mut bench = Bench::active();
    bench.run_to(5000);
    assert_eq!(
        bench.link("back", Err("`back` has no carrier")),
        [
            Output::RemoveVips,
            Output::SendAdvert(Priority::YIELD),
            to(State::Active, State::Initialize, Reason::Fault),
        ]
    );
    assert_eq!(bench.node.fault().as_deref(), Some("`back` has no carrier"));
    assert!(bench.link("front", Err("`front` is gone")).is_empty(), "a fault already");
    assert!(bench.link("back", Ok(())).is_empty(), "the other one is down still");
    assert_eq!(
        bench.link("front", Ok(())),
        [to(State::Initialize, State::Backup, Reason::Recovered)]
    );
    assert_eq!(bench.node.fault(), None);
}

#[test]
fn an_interface_without_vips_is_no_matter() {
    let mut bench = Bench::active();
    assert!(bench.link("other", Err("gone")).is_empty());
    assert_eq!(bench.node.fault(), None);
}

#[test]
fn without_any_path_it_takes_no_part() {
    let mut bench = Bench::active();
    let outputs = bench.input(Input::Paths(Err("no address".to_owned())));
    assert_eq!(outputs.last(), Some(&to(State::Active, State::Initialize, Reason::Fault)));
}

#[test]
fn a_node_that_starts_without_its_links_waits_for_them() {
    let mut bench = Bench::new(&config(100));
    bench.input(Input::Paths(Ok(())));
    bench.link("front", Ok(()));
    bench.link("back", Err("no interface `back`"));
    assert_eq!(
        bench.input(Input::Startup),
        [to(State::Initialize, State::Initialize, Reason::Fault)]
    );
    assert!(bench.run_to(10_000).is_empty());
    assert!(bench.input(Input::Takeover).is_empty());
    assert_eq!(
        bench.link("back", Ok(())),
        [to(State::Initialize, State::Backup, Reason::Recovered)]
    );
}

#[test]
fn a_vip_that_something_removed_is_put_back_and_announced_at_a_bounded_rate() {
    let mut bench = Bench::active();
    bench.run_to(5000);
    assert_eq!(bench.input(Input::VipMissing(1)), [Output::RestoreVip(1)]);
    bench.now += 1;
    assert_eq!(bench.input(Input::Configured), [Output::Announce]);
    bench.now += 1;
    assert!(bench.input(Input::VipMissing(1)).is_empty(), "again already: in a while");
    assert_eq!(bench.input(Input::VipMissing(0)), [Output::RestoreVip(0)], "another one");
    assert_eq!(bench.times(&Output::RestoreVip(1), 6000), [5100]);
}

#[test]
fn a_claim_that_keeps_failing_is_a_fault_that_is_tried_again_later() {
    let mut bench = Bench::backup();
    bench.run_to(361);
    let failed = || Input::ConfigureFailed("EACCES".to_owned());
    assert!(bench.input(failed()).is_empty());
    assert_eq!(bench.times(&Output::ConfigureVips, 470), [461]);
    assert!(bench.input(failed()).is_empty());
    assert_eq!(bench.times(&Output::ConfigureVips, 575), [570]);
    assert_eq!(
        bench.input(failed()),
        [
            Output::RemoveVips,
            Output::SendAdvert(Priority::YIELD),
            to(State::Active, State::Initialize, Reason::Fault),
        ]
    );
    assert_eq!(bench.node.fault().as_deref(), Some("EACCES"));
    assert_eq!(
        bench.run_to(60_575),
        [(60_575, to(State::Initialize, State::Backup, Reason::Recovered))]
    );
}

#[test]
fn failures_count_in_a_row_only() {
    let mut bench = Bench::active();
    for round in 0..10 {
        bench.run_to(5000 + 1000 * round);
        let failed = Input::ConfigureFailed("ENOBUFS".to_owned());
        assert!(bench.input(failed.clone()).is_empty());
        assert!(bench.input(failed).is_empty());
        assert_eq!(bench.input(Input::Configured), [Output::Announce]);
    }
    assert_eq!(bench.node.state(), State::Active);
}

#[test]
fn shutdown_yields_and_links_mean_nothing_after() {
    let mut bench = Bench::active();
    assert_eq!(
        bench.input(Input::Shutdown),
        [
            Output::RemoveVips,
            Output::SendAdvert(Priority::YIELD),
            to(State::Active, State::Initialize, Reason::Shutdown),
        ]
    );
    assert!(bench.link("front", Err("gone")).is_empty());
    assert!(bench.link("front", Ok(())).is_empty());
    assert!(bench.run_to(100_000).is_empty());
}

#[test]
fn a_takeover_claims_announces_and_is_held() {
    let mut bench = Bench::backup();
    bench.advert(200);
    let outputs = bench.input(Input::Takeover);
    assert_eq!(
        outputs,
        [
            Output::SendAdvert(Priority::OWNER),
            Output::ConfigureVips,
            to(State::Backup, State::Active, Reason::Takeover),
        ]
    );
    bench.now += 1;
    assert_eq!(bench.input(Input::Configured), [Output::Announce]);
    bench.run_to(500);
    assert_eq!(bench.node.advertised_priority(), Priority::HELD);
}

#[test]
fn a_yield_removes_before_it_says_so() {
    let mut bench = Bench::active();
    assert_eq!(
        bench.input(Input::Yield),
        [
            Output::RemoveVips,
            Output::SendAdvert(Priority::YIELD),
            to(State::Active, State::Backup, Reason::Yield),
        ]
    );
}
