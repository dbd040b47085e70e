//! Every situation of the virtual router × every input and timeout, with the exact ordered
//! outputs: `golden/router_table.txt` says what must happen, and is written to be read.
//!
//! After a wanted change: `BATON_BLESS=1 cargo test -p baton-ha --test router_table`, then read
//! the diff line by line against RFC 9568 §6.4 and docs/decisions/.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use baton_ha::config::Family;
use baton_ha::vrrp::router::{
    Advert, CLAIM_ADVERTS, Input, Output, PreemptBy, RouterConfig, Transition, VirtualRouter, Wish,
};
use baton_ha::vrrp::{AdverInterval, Preempt, Priority};

const INTERVAL: Duration = Duration::from_millis(100);
const LOCAL: &str = "10.77.0.3";
const LESS: &str = "10.77.0.2";
const GREATER: &str = "10.77.0.4";

/// Where a router can stand when something happens.
#[derive(Debug, Clone, Copy)]
enum Situation {
    Stopped,
    StoppedFaulty,
    Faulty,
    Backup,
    BackupPreempting,
    BackupAsking,
    BackupOfYielded,
    BackupNoPreempt,
    BackupDeferring,
    BackupDeferred,
    BackupOwner,
    Active,
    ActiveOwner,
    Claiming,
    Claimed,
    Held,
    HeldUndisputed,
}

const SITUATIONS: [(Situation, &str); 17] = [
    (Situation::Stopped, "initialize, not started"),
    (Situation::StoppedFaulty, "initialize, not started, with a fault"),
    (Situation::Faulty, "initialize, started, with a fault"),
    (Situation::Backup, "backup of an Active of priority 100, Preempt_Mode on"),
    (Situation::BackupPreempting, "backup that has heard an Active of priority 99"),
    (Situation::BackupAsking, "backup that has heard an Active of priority 99, and is to ask it"),
    (Situation::BackupOfYielded, "backup that has heard priority 0"),
    (Situation::BackupNoPreempt, "backup of an Active of priority 99, Preempt_Mode off"),
    (Situation::BackupDeferring, "backup after the operator's yield, Preempt_Mode on"),
    (
        Situation::BackupDeferred,
        "backup after its yield, when the Active that followed yielded too",
    ),
    (
        Situation::BackupOwner,
        "backup with priority 255 (after a takeover of another), Preempt_Mode off",
    ),
    (Situation::Active, "active by election"),
    (Situation::ActiveOwner, "active with priority 255"),
    (Situation::Claiming, "active by takeover, claiming"),
    (Situation::Claimed, "active by takeover, its last claim sent"),
    (Situation::Held, "active by takeover, holding, just after the claim"),
    (Situation::HeldUndisputed, "active by takeover, holding, long after"),
];

impl Situation {
    fn config(self) -> (u8, Preempt) {
        match self {
            Situation::Stopped
            | Situation::StoppedFaulty
            | Situation::Faulty
            | Situation::Backup
            | Situation::BackupPreempting
            | Situation::BackupAsking
            | Situation::BackupOfYielded
            | Situation::BackupDeferring
            | Situation::BackupDeferred
            | Situation::Active
            | Situation::Claiming
            | Situation::Claimed
            | Situation::Held
            | Situation::HeldUndisputed => (100, Preempt::Enabled),
            Situation::BackupNoPreempt => (100, Preempt::Disabled),
            Situation::BackupOwner => (255, Preempt::Disabled),
            Situation::ActiveOwner => (255, Preempt::Enabled),
        }
    }

    /// A router that stands so. It last ran 20 ms ago; one that is claiming, 2 ms ago.
    fn bench(self) -> Bench {
        let (priority, preempt) = self.config();
        let mut bench = Bench::new(priority, preempt);
        let mut lag = Duration::from_millis(20);
        match self {
            Situation::Stopped => {}
            Situation::StoppedFaulty => bench.input(Input::Fault),
            Situation::Faulty => {
                bench.input(Input::Startup);
                bench.input(Input::Fault);
            }
            Situation::Backup => bench.start_and_hear(100, LESS),
            Situation::BackupPreempting | Situation::BackupNoPreempt => {
                bench.start_and_hear(99, LESS);
            }
            Situation::BackupAsking => {
                bench.input(Input::PreemptBy(PreemptBy::Asking));
                bench.start_and_hear(99, LESS);
            }
            Situation::BackupOfYielded => bench.start_and_hear(0, LESS),
            Situation::BackupOwner => bench.start_and_hear(255, GREATER),
            Situation::BackupDeferring => {
                bench.start_and_claim();
                bench.input(Input::Yield);
            }
            Situation::BackupDeferred => {
                bench.start_and_claim();
                bench.input(Input::Yield);
                bench.input(advert(99, LESS));
                bench.input(advert(0, LESS));
            }
            Situation::Active => bench.start_and_claim(),
            Situation::ActiveOwner => bench.input(Input::Startup),
            Situation::Claiming
            | Situation::Claimed
            | Situation::Held
            | Situation::HeldUndisputed => {
                bench.input(Input::Startup);
                bench.input(Input::Takeover);
                let timers = match self {
                    Situation::Claimed => CLAIM_ADVERTS - 1,
                    Situation::Held => CLAIM_ADVERTS,
                    Situation::HeldUndisputed => CLAIM_ADVERTS + 5,
                    _ => 0,
                };
                for _ in 0..timers {
                    bench.timer();
                }
                if timers < CLAIM_ADVERTS {
                    lag = Duration::from_millis(2);
                }
            }
        }
        bench.now += lag;
        bench.outputs.clear();
        bench
    }
}

/// A router, its clock, and what it has said.
struct Bench {
    router: VirtualRouter,
    now: Instant,
    outputs: Vec<Output>,
}

impl Bench {
    fn new(priority: u8, preempt: Preempt) -> Self {
        let config = RouterConfig {
            priority: Priority::new(priority),
            advert_interval: AdverInterval::from_duration(INTERVAL).unwrap(),
            preempt,
            decides_ties: Family::V4,
            startup_hold: Duration::ZERO,
        };
        Self { router: VirtualRouter::new(config), now: Instant::now(), outputs: Vec::new() }
    }

    fn input(&mut self, input: Input) {
        self.router.handle_input(self.now, input);
        self.poll();
    }

    fn handle_timeout(&mut self) {
        self.router.handle_timeout(self.now);
        self.poll();
    }

    fn poll(&mut self) {
        self.outputs.extend(std::iter::from_fn(|| self.router.poll_output()));
    }

    /// Lets the next timer fire on time.
    fn timer(&mut self) {
        if let Some(at) = self.router.poll_timeout() {
            self.now = at;
            self.handle_timeout();
        }
    }

    /// Lets timers fire on time until one says something; a machine that is still silent after so
    /// many of them goes round in a circle.
    fn timers_until_output(&mut self) {
        for _ in 0..20 {
            if self.outputs.is_empty() {
                self.timer();
            }
        }
    }

    /// When a router that is left alone says something next.
    fn next_deed(mut self) -> String {
        let now = self.now;
        self.outputs.clear();
        self.timers_until_output();
        match self.outputs.first() {
            Some(output) => format!("{} in {:?}", output_name(output), self.now - now),
            None => "nothing more".into(),
        }
    }

    fn start_and_hear(&mut self, priority: u8, source: &str) {
        self.input(Input::Startup);
        self.input(advert(priority, source));
    }

    fn start_and_claim(&mut self) {
        self.input(Input::Startup);
        self.outputs.clear();
        self.timers_until_output();
    }
}

/// An advert with another interval than this node's own, to see which one is used.
fn advert(priority: u8, source: &str) -> Input {
    Input::Advert(Advert {
        source: source.parse().unwrap(),
        local: LOCAL.parse().unwrap(),
        priority: Priority::new(priority),
        interval: AdverInterval::from_centiseconds(20).unwrap(),
    })
}

/// Leases of an Active that is gone: shorter, and longer, than the Backup would wait anyway.
const GONE: [Duration; 2] = [Duration::from_millis(30), Duration::from_secs(9)];

const WISHES: [Wish; 3] = [Wish::Takeover, Wish::Yield, Wish::Preempt];

fn next_wish(wish: Wish) -> Option<Wish> {
    WISHES.into_iter().skip_while(|other| *other != wish).nth(1)
}

/// The input that comes after this one in the table; every variant has its place.
fn next_input(input: &Input) -> Option<Input> {
    const ADVERTS: [(u8, &str); 10] = [
        (0, LESS),
        (99, GREATER),
        (100, LESS),
        (100, LOCAL),
        (100, GREATER),
        (101, LESS),
        (254, LESS),
        (254, GREATER),
        (255, LESS),
        (255, GREATER),
    ];
    match input {
        Input::Startup => Some(Input::Shutdown),
        Input::Shutdown => Some(Input::Takeover),
        Input::Takeover => Some(Input::Yield),
        Input::Yield => Some(Input::Fault),
        Input::Fault => Some(Input::Recovered),
        Input::Recovered => Some(Input::ActiveGone(GONE[0])),
        Input::ActiveGone(lease) if *lease == GONE[0] => Some(Input::ActiveGone(GONE[1])),
        Input::ActiveGone(_) => Some(Input::Unheard),
        Input::Unheard => Some(Input::ActiveLease(Some(GONE[0]))),
        Input::ActiveLease(Some(_)) => Some(Input::ActiveLease(None)),
        Input::ActiveLease(None) => Some(Input::Repeat),
        Input::Repeat => Some(Input::LeaseOver),
        Input::LeaseOver => Some(Input::Deposed(AdverInterval::from_centiseconds(20).unwrap())),
        Input::Deposed(_) => Some(Input::Give(WISHES[0])),
        Input::Give(wish) => Some(match next_wish(*wish) {
            Some(wish) => Input::Give(wish),
            None => Input::Take(WISHES[0]),
        }),
        Input::Take(wish) => Some(match next_wish(*wish) {
            Some(wish) => Input::Take(wish),
            None => Input::PreemptBy(PreemptBy::Asking),
        }),
        Input::PreemptBy(_) => Some(advert(ADVERTS[0].0, ADVERTS[0].1)),
        Input::Advert(_) => {
            let at = ADVERTS.iter().position(|(p, s)| advert(*p, s) == *input).unwrap();
            ADVERTS.get(at + 1).map(|(priority, source)| advert(*priority, source))
        }
    }
}

type Event = (String, Box<dyn Fn(&mut Bench)>);

/// What can happen: every input, and time.
fn events() -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for input in std::iter::successors(Some(Input::Startup), next_input) {
        events.push((input_name(&input), Box::new(move |bench| bench.input(input.clone()))));
    }
    events.push((
        "timer, 1 ns early".into(),
        Box::new(|bench| {
            if let Some(at) = bench.router.poll_timeout() {
                bench.now = at - Duration::from_nanos(1);
                bench.handle_timeout();
            }
        }),
    ));
    events.push(("timer, on time".into(), Box::new(Bench::timer)));
    events.push((
        "timers, until one says something".into(),
        Box::new(|bench| {
            bench.timers_until_output();
        }),
    ));
    // Asleep since it last ran (20 ms ago) until these bounds: 2 intervals of a Backup of 100 ms,
    // 3 intervals of an Active, 2 intervals of a Backup of an Active of 200 ms.
    for milliseconds in [180, 280, 380] {
        let bound = Duration::from_millis(milliseconds);
        let nanosecond = Duration::from_nanos(1);
        for sleep in [bound - nanosecond, bound, bound + nanosecond] {
            events.push((
                format!("awake after {sleep:?} more, timer"),
                Box::new(move |bench| {
                    bench.now += sleep;
                    bench.handle_timeout();
                }),
            ));
        }
    }
    for input in [Input::Takeover, Input::Shutdown, advert(99, LESS), advert(101, LESS)] {
        events.push((
            format!("awake after 1 s more, {}", input_name(&input)),
            Box::new(move |bench| {
                bench.now += Duration::from_secs(1);
                bench.input(input.clone());
            }),
        ));
    }
    events
}

fn input_name(input: &Input) -> String {
    match input {
        Input::Startup => "startup".into(),
        Input::Shutdown => "shutdown".into(),
        Input::Takeover => "takeover".into(),
        Input::Yield => "yield".into(),
        Input::Fault => "fault".into(),
        Input::Recovered => "recovered".into(),
        Input::ActiveGone(lease) => format!("active gone, lease {lease:?}"),
        Input::Deposed(interval) => format!("deposed by one of {:?}", interval.duration()),
        Input::Give(wish) => format!("give, {wish:?}"),
        Input::Take(wish) => format!("take, {wish:?}"),
        Input::PreemptBy(way) => format!("preempt by {way:?}"),
        Input::Unheard => "unheard".into(),
        Input::ActiveLease(lease) => format!("lease of the Active {lease:?}"),
        Input::Repeat => "repeat".into(),
        Input::LeaseOver => "lease over".into(),
        Input::Advert(advert) => {
            let address = match advert.source.cmp(&advert.local) {
                std::cmp::Ordering::Less => "less",
                std::cmp::Ordering::Equal => "same",
                std::cmp::Ordering::Greater => "greater",
            };
            format!("advert {}, address {address}", advert.priority)
        }
    }
}

fn output_name(output: &Output) -> String {
    match output {
        Output::SendAdvert(priority) => format!("send {priority}"),
        Output::Claim => "CLAIM".into(),
        Output::Release => "RELEASE".into(),
        Output::Announce => "announce".into(),
        Output::Transition(Transition { from, to, reason }) => {
            format!("{from:?} > {to:?} ({reason:?})")
        }
    }
}

fn table() -> String {
    let mut text = String::from(
        "interval 100 ms, received adverts carry 200 ms; skew of priority 100: 60.9375 ms at \
         100 ms, 121.875 ms at 200 ms\n\
         event | outputs in order | state, what it advertises, what it does next if left alone\n",
    );
    for (situation, name) in SITUATIONS {
        let (priority, _) = situation.config();
        writeln!(text, "\n# {name}; configured priority {priority}").unwrap();
        for (event, happen) in events() {
            let mut bench = situation.bench();
            happen(&mut bench);
            let outputs: Vec<_> = bench.outputs.iter().map(output_name).collect();
            let outputs = if outputs.is_empty() { "-".into() } else { outputs.join(", ") };
            let (state, priority) = (bench.router.state(), bench.router.advertised_priority());
            writeln!(text, "{event} | {outputs} | {state:?}, {priority}, {}", bench.next_deed())
                .unwrap();
        }
    }
    text
}

#[test]
fn every_situation_and_event_has_its_outputs() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/router_table.txt");
    let found = table();
    if std::env::var_os("BATON_BLESS").is_some() {
        std::fs::write(path, &found).unwrap();
    }
    let wanted = std::fs::read_to_string(path).unwrap();
    for (line, (found, wanted)) in found.lines().zip(wanted.lines()).enumerate() {
        assert_eq!(found, wanted, "{path}:{}", line + 1);
    }
    assert_eq!(found.lines().count(), wanted.lines().count());
}
