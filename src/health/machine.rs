//! Rise and fall of one backend as a sans-IO machine: when to probe, when to give up, and what
//! the results make of its health.
//!
//! Fed with [`Input`]s and time, it says what to do as [`Output`]s, whose order is part of the
//! contract. It never reads the clock, connects or logs; `task` does that and hands what it says
//! on to the members of the pools.
//!
//! One probe is in flight at most. Starts are counted from start to start, so that slow answers
//! don't stretch the interval; starts that were missed are skipped, not made up for. The first
//! starts of many backends are close together, so the second one of each comes up to half an
//! interval early: from then on they are spread.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::pool::Health;
use crate::service::Check;

/// The first probe starts within this (or the interval, where shorter), since clients wait for its
/// result: until all are known, source hashing has not all servers to choose from.
const FIRST_WITHIN: Duration = Duration::from_millis(100);

/// When a backend is probed and how results count; correct by construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timing {
    interval: Duration,
    timeout: Duration,
    rise: u32,
    fall: u32,
}

impl Timing {
    /// From a check. The timeout is cut to the interval, so that one probe is in flight at most;
    /// an interval of less than 1 ms counts as 1 ms, and a `rise` or `fall` of 0 as 1.
    pub fn new(check: &Check) -> Self {
        let interval = check.interval.max(Duration::from_millis(1));
        Self {
            interval,
            timeout: check.timeout.min(interval),
            rise: check.rise.max(1),
            fall: check.fall.max(1),
        }
    }
}

/// Number of a probe: the answer to one that was cancelled counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeId(u64);

/// What happens to the machine, time aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The probe got this far; named in the reason where it then runs out of time.
    Reached(ProbeId, &'static str),
    /// The probe ended: well, or with a reason for people.
    Finished(ProbeId, Result<(), String>),
    /// The probe failed for want of something on this node: it says nothing about the backend.
    Void(ProbeId),
}

/// What the machine wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Begin a probe; none is in flight.
    StartProbe(ProbeId),
    /// Stop that probe; it ran out of time.
    CancelProbe(ProbeId),
    /// The verdict on the backend changed.
    HealthChanged {
        /// What it was.
        from: Health,
        /// What it is; never [`Health::Unknown`].
        to: Health,
        /// Why, for people.
        reason: String,
    },
    /// The verdict stands, but there is something new to say about it.
    ReasonChanged(String),
}

/// The machine of one backend.
#[derive(Debug)]
pub struct Machine {
    timing: Timing,
    phase: Phase,
    /// How much sooner than an interval the next start is.
    early: Duration,
    verdict: Verdict,
    reason: String,
    probes: u64,
    results: u64,
    outputs: VecDeque<Output>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting { start: Instant },
    Probing { probe: ProbeId, started: Instant, deadline: Instant, reached: &'static str },
}

/// The counts are of results in a row that speak against the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Unknown,
    Up { failures: u32 },
    Down { successes: u32 },
}

impl Machine {
    /// A backend not probed yet. Its first probe starts at a time derived from `seed`, within
    /// 100 ms or the interval, whichever is shorter; its second half an interval to an interval
    /// later.
    pub fn new(now: Instant, timing: Timing, seed: u64) -> Self {
        let start = now + spread(seed, FIRST_WITHIN.min(timing.interval));
        let early = spread(!seed, timing.interval / 2);
        Self {
            timing,
            phase: Phase::Waiting { start },
            early,
            verdict: Verdict::Unknown,
            reason: String::new(),
            probes: 0,
            results: 0,
            outputs: VecDeque::new(),
        }
    }

    /// Something happened.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        match (self.phase, input) {
            (Phase::Probing { probe, started, deadline, .. }, Input::Reached(of, reached))
                if of == probe =>
            {
                self.phase = Phase::Probing { probe, started, deadline, reached };
            }
            (Phase::Probing { probe, started, .. }, Input::Finished(of, result)) if of == probe => {
                self.wait(now, started);
                self.judge(result);
            }
            (Phase::Probing { probe, started, .. }, Input::Void(of)) if of == probe => {
                self.wait(now, started);
            }
            // Of a probe that was cancelled meanwhile.
            (Phase::Probing { .. } | Phase::Waiting { .. }, Input::Reached(..))
            | (Phase::Probing { .. } | Phase::Waiting { .. }, Input::Finished(..))
            | (Phase::Probing { .. } | Phase::Waiting { .. }, Input::Void(..)) => {}
        }
    }

    /// Time has passed; a call before [`Machine::poll_timeout`] does nothing.
    ///
    /// One call ends a probe or starts one, never both: where the next start is due when a probe
    /// runs out of time, it comes with the next call, so that whoever runs probes can have others
    /// take their turn in between.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.phase {
            Phase::Waiting { start } if now >= start => {
                let probe = ProbeId(self.probes);
                self.probes += 1;
                let deadline = now + self.timing.timeout;
                self.phase = Phase::Probing { probe, started: now, deadline, reached: "" };
                self.outputs.push_back(Output::StartProbe(probe));
            }
            Phase::Probing { probe, started, deadline, reached } if now >= deadline => {
                self.outputs.push_back(Output::CancelProbe(probe));
                self.wait(now, started);
                // Called so late, this node was asleep (paused, suspended), and a probe that
                // nobody attended to says nothing about the backend.
                if now < deadline + self.timing.timeout.max(Duration::from_millis(100)) {
                    self.judge(Err(out_of_time(self.timing.timeout, reached)));
                }
            }
            Phase::Waiting { .. } | Phase::Probing { .. } => {}
        }
    }

    /// When [`Machine::handle_timeout`] is due: the start of the next probe, or the end of the
    /// time of the one in flight. Never `None`: a backend is always checked again.
    pub fn poll_timeout(&self) -> Option<Instant> {
        Some(match self.phase {
            Phase::Waiting { start } => start,
            Phase::Probing { deadline, .. } => deadline,
        })
    }

    /// What to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The verdict.
    pub fn health(&self) -> Health {
        match self.verdict {
            Verdict::Unknown => Health::Unknown,
            Verdict::Up { .. } => Health::Up,
            Verdict::Down { .. } => Health::Down,
        }
    }

    /// Probes that have ended with a result: one that says something about the backend.
    pub fn results(&self) -> u64 {
        self.results
    }

    /// The next start is an interval after the last one; one that has gone by is made up for at
    /// once, those before it are skipped.
    fn wait(&mut self, now: Instant, started: Instant) {
        let start = started + self.timing.interval - std::mem::take(&mut self.early);
        self.phase = Phase::Waiting { start: start.max(now) };
    }

    /// Counts a result; the first one decides at once.
    fn judge(&mut self, result: Result<(), String>) {
        self.results += 1;
        let Timing { rise, fall, .. } = self.timing;
        let (verdict, reason) = match (self.verdict, result) {
            (Verdict::Unknown | Verdict::Up { .. }, Ok(())) => {
                (Verdict::Up { failures: 0 }, "answers".to_owned())
            }
            (Verdict::Unknown | Verdict::Down { .. }, Err(reason)) => {
                (Verdict::Down { successes: 0 }, reason)
            }
            (Verdict::Up { failures }, Err(reason)) if failures + 1 >= fall => {
                (Verdict::Down { successes: 0 }, reason)
            }
            (Verdict::Up { failures }, Err(reason)) => {
                let failures = failures + 1;
                (Verdict::Up { failures }, format!("{reason} (failure {failures} of {fall})"))
            }
            (Verdict::Down { successes }, Ok(())) if successes + 1 >= rise => {
                (Verdict::Up { failures: 0 }, "answers".to_owned())
            }
            (Verdict::Down { successes }, Ok(())) => {
                let successes = successes + 1;
                (
                    Verdict::Down { successes },
                    format!("answers again (success {successes} of {rise})"),
                )
            }
        };
        let from = self.health();
        self.verdict = verdict;
        let to = self.health();
        let news = self.reason != reason;
        self.reason.clone_from(&reason);
        if from != to {
            self.outputs.push_back(Output::HealthChanged { from, to, reason });
        } else if news {
            self.outputs.push_back(Output::ReasonChanged(reason));
        }
    }
}

fn out_of_time(timeout: Duration, reached: &str) -> String {
    match reached {
        "" => format!("no answer within {timeout:?}"),
        _ => format!("no answer within {timeout:?} ({reached})"),
    }
}

/// A share of `range` that depends on nothing but the seed (the finalizer of SplitMix64).
fn spread(seed: u64, range: Duration) -> Duration {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let part = z >> 32;
    let nanos = u64::try_from(range.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(((u128::from(nanos) * u128::from(part)) >> 32) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);
    const TIMEOUT: Duration = Duration::from_secs(2);

    fn timing(rise: u32, fall: u32) -> Timing {
        Timing { interval: INTERVAL, timeout: TIMEOUT, rise, fall }
    }

    /// A machine in virtual time.
    struct Bench {
        now: Instant,
        machine: Machine,
    }

    impl Bench {
        fn new(rise: u32, fall: u32) -> Self {
            Self::with(timing(rise, fall))
        }

        /// Without the second start's being early, which has a test of its own.
        fn with(timing: Timing) -> Self {
            let now = Instant::now();
            let mut machine = Machine::new(now, timing, 7);
            machine.early = Duration::ZERO;
            Self { now, machine }
        }

        /// Sleeps until the machine is due and wakes it.
        fn due(&mut self) -> Vec<Output> {
            self.now = self.machine.poll_timeout().expect("always due");
            self.machine.handle_timeout(self.now);
            self.outputs()
        }

        fn after(&mut self, time: Duration, input: Input) -> Vec<Output> {
            self.now += time;
            self.machine.handle_input(self.now, input);
            self.outputs()
        }

        fn outputs(&mut self) -> Vec<Output> {
            std::iter::from_fn(|| self.machine.poll_output()).collect()
        }

        /// Runs one probe to its result.
        fn probe(&mut self, result: Result<(), &str>) -> Vec<Output> {
            let started = self.due();
            let [Output::StartProbe(probe)] = started[..] else { panic!("{started:?}") };
            self.after(MS, Input::Finished(probe, result.map_err(str::to_owned)))
        }
    }

    const MS: Duration = Duration::from_millis(1);

    fn changed(from: Health, to: Health, reason: &str) -> Vec<Output> {
        vec![Output::HealthChanged { from, to, reason: reason.to_owned() }]
    }

    fn says(reason: &str) -> Vec<Output> {
        vec![Output::ReasonChanged(reason.to_owned())]
    }

    /// Every verdict × result, for rise 2 and fall 3.
    #[test]
    fn verdicts_and_results() {
        use Verdict::{Down, Unknown, Up};
        let (ok, no) = (Ok(()), Err("no"));
        type Row<'a> = (Verdict, Result<(), &'a str>, Verdict, Vec<Output>);
        let table: Vec<Row> = vec![
            (Unknown, ok, Up { failures: 0 }, changed(Health::Unknown, Health::Up, "answers")),
            (Unknown, no, Down { successes: 0 }, changed(Health::Unknown, Health::Down, "no")),
            (Up { failures: 0 }, ok, Up { failures: 0 }, says("answers")),
            (Up { failures: 2 }, ok, Up { failures: 0 }, says("answers")),
            (Up { failures: 0 }, no, Up { failures: 1 }, says("no (failure 1 of 3)")),
            (Up { failures: 1 }, no, Up { failures: 2 }, says("no (failure 2 of 3)")),
            (
                Up { failures: 2 },
                no,
                Down { successes: 0 },
                changed(Health::Up, Health::Down, "no"),
            ),
            (Down { successes: 0 }, no, Down { successes: 0 }, says("no")),
            (Down { successes: 1 }, no, Down { successes: 0 }, says("no")),
            (
                Down { successes: 0 },
                ok,
                Down { successes: 1 },
                says("answers again (success 1 of 2)"),
            ),
            (
                Down { successes: 1 },
                ok,
                Up { failures: 0 },
                changed(Health::Down, Health::Up, "answers"),
            ),
        ];
        for (before, result, after, outputs) in table {
            let mut bench = Bench::new(2, 3);
            bench.machine.verdict = before;
            assert_eq!(bench.probe(result), outputs, "{before:?} × {result:?}");
            assert_eq!(bench.machine.verdict, after, "{before:?} × {result:?}");
        }
    }

    /// Every phase × (input or time): what comes out and what is waited for then.
    #[test]
    fn phases_and_inputs() {
        let t = Instant::now();
        let (mine, old) = (ProbeId(4), ProbeId(3));
        let waiting = Phase::Waiting { start: t + INTERVAL };
        let probing =
            Phase::Probing { probe: mine, started: t, deadline: t + TIMEOUT, reached: "" };
        let reached =
            |text| Phase::Probing { probe: mine, started: t, deadline: t + TIMEOUT, reached: text };
        let next = |start: Instant| Phase::Probing {
            probe: ProbeId(5),
            started: start,
            deadline: start + TIMEOUT,
            reached: "",
        };
        let up = || changed(Health::Unknown, Health::Up, "answers");
        let down = |reason| changed(Health::Unknown, Health::Down, reason);
        let none = Vec::new;
        let start = || vec![Output::StartProbe(ProbeId(5))];
        let cancel = || vec![Output::CancelProbe(mine)];
        let ok = Ok(());
        let no = || Err("no".to_owned());

        type Row = (Phase, Duration, Option<Input>, Phase, Vec<Output>);
        let late = INTERVAL + TIMEOUT;
        let table: Vec<Row> = vec![
            (waiting, MS, Some(Input::Reached(old, "far")), waiting, none()),
            (waiting, MS, Some(Input::Finished(old, ok.clone())), waiting, none()),
            (waiting, MS, Some(Input::Finished(old, no())), waiting, none()),
            (waiting, MS, Some(Input::Void(old)), waiting, none()),
            (waiting, INTERVAL - MS, None, waiting, none()),
            (waiting, INTERVAL, None, next(t + INTERVAL), start()),
            (waiting, late, None, next(t + late), start()),
            (probing, MS, Some(Input::Reached(old, "far")), probing, none()),
            (probing, MS, Some(Input::Reached(mine, "far")), reached("far"), none()),
            (probing, MS, Some(Input::Finished(old, no())), probing, none()),
            (probing, MS, Some(Input::Void(old)), probing, none()),
            (probing, MS, Some(Input::Void(mine)), waiting, none()),
            (probing, MS, Some(Input::Finished(mine, ok.clone())), waiting, up()),
            (probing, MS, Some(Input::Finished(mine, no())), waiting, down("no")),
            // An answer read late still counts; the start that went by is made up for at once.
            (
                probing,
                late,
                Some(Input::Finished(mine, ok)),
                Phase::Waiting { start: t + late },
                up(),
            ),
            (probing, TIMEOUT - MS, None, probing, none()),
            (probing, TIMEOUT, None, waiting, [cancel(), down("no answer within 2s")].concat()),
            (
                reached("far"),
                TIMEOUT + MS,
                None,
                waiting,
                [cancel(), down("no answer within 2s (far)")].concat(),
            ),
            // Woken far too late: the probe says nothing about the backend.
            (probing, TIMEOUT * 2, None, waiting, cancel()),
            (probing, late, None, Phase::Waiting { start: t + late }, cancel()),
        ];
        for (before, time, input, after, outputs) in table {
            let row = format!("{before:?} + {time:?} × {input:?}");
            let mut machine = Machine::new(t, timing(1, 1), 0);
            machine.phase = before;
            machine.early = Duration::ZERO;
            machine.probes = 5;
            let now = t + time;
            match input {
                Some(input) => machine.handle_input(now, input),
                None => machine.handle_timeout(now),
            }
            let seen: Vec<_> = std::iter::from_fn(|| machine.poll_output()).collect();
            assert_eq!(seen, outputs, "{row}");
            assert_eq!(machine.phase, after, "{row}");
        }
    }

    /// How many of these times are in each tenth of the range.
    fn tenths(times: &[Duration], from: Duration, length: Duration) -> Vec<usize> {
        let tenth = |time: &Duration| (*time - from).as_nanos() * 10 / length.as_nanos();
        let places: Vec<_> = times.iter().map(tenth).collect();
        assert!(places.iter().all(|place| *place < 10));
        (0..10).map(|tenth| places.iter().filter(|place| **place == tenth).count()).collect()
    }

    #[test]
    fn the_first_starts_depend_on_the_seed_alone_and_are_spread() {
        let now = Instant::now();
        let starts = |seed| {
            let mut machine = Machine::new(now, timing(1, 1), seed);
            let first = machine.poll_timeout().expect("always due");
            machine.handle_timeout(first);
            machine.handle_input(first + MS, Input::Finished(ProbeId(0), Ok(())));
            let second = machine.poll_timeout().expect("always due");
            machine.handle_timeout(second);
            machine.handle_input(second + MS, Input::Finished(ProbeId(1), Ok(())));
            let third = machine.poll_timeout().expect("always due");
            assert_eq!(third - second, INTERVAL);
            (first - now, second - first)
        };
        let all: Vec<_> = (0..1000).map(starts).collect();
        assert_eq!(all, (0..1000).map(starts).collect::<Vec<_>>());
        let (first, second): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        let even = 60..140;
        let first = tenths(&first, Duration::ZERO, FIRST_WITHIN);
        assert!(first.iter().all(|count| even.contains(count)), "{first:?}");
        let second = tenths(&second, INTERVAL / 2 + Duration::from_nanos(1), INTERVAL / 2);
        assert!(second.iter().all(|count| even.contains(count)), "{second:?}");

        let short = Timing { interval: MS * 10, timeout: MS, rise: 1, fall: 1 };
        let at = Machine::new(now, short, 1).poll_timeout().expect("always due") - now;
        assert!(at < MS * 10);
    }

    #[test]
    fn probes_start_an_interval_apart_however_long_they_take() {
        let mut bench = Bench::new(2, 3);
        let mut starts = Vec::new();
        for round in 0..6 {
            let outputs = bench.due();
            let [Output::StartProbe(probe)] = outputs[..] else { panic!("{outputs:?}") };
            starts.push(bench.now);
            // 0, 0.5, 1 … seconds; from the fifth on it runs into the timeout.
            if round < 4 {
                bench.after(Duration::from_millis(500) * round, Input::Finished(probe, Ok(())));
            } else {
                assert_eq!(bench.due()[0], Output::CancelProbe(probe));
                assert_eq!(bench.now, starts[round as usize] + TIMEOUT);
            }
        }
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == INTERVAL));
    }

    #[test]
    fn a_timeout_as_long_as_the_interval_ends_one_probe_and_starts_the_next() {
        let mut bench =
            Bench::with(Timing { interval: TIMEOUT, timeout: TIMEOUT, rise: 1, fall: 1 });
        bench.due();
        assert_eq!(
            bench.due(),
            [
                vec![Output::CancelProbe(ProbeId(0))],
                changed(Health::Unknown, Health::Down, "no answer within 2s"),
            ]
            .concat()
        );
        let then = bench.now;
        assert_eq!(bench.due(), [Output::StartProbe(ProbeId(1))]);
        assert_eq!(bench.now, then);
    }

    /// Whatever the results are, the verdict changes only after a full run of contrary ones, and
    /// at most one probe is in flight.
    #[test]
    fn the_verdict_follows_runs_only() {
        for seed in 0..200u64 {
            let (rise, fall) = (1 + (seed % 4) as u32, 1 + (seed / 4 % 4) as u32);
            let mut bench = Bench::new(rise, fall);
            let (mut health, mut run) = (Health::Unknown, 0);
            for round in 0..100u64 {
                let good = spread(seed * 1000 + round, MS) < MS / 2;
                for output in bench.probe(if good { Ok(()) } else { Err("no") }) {
                    assert!(!matches!(output, Output::StartProbe(_)), "seed {seed}");
                }
                let contrary = good != (health == Health::Up);
                run = if contrary { run + 1 } else { 0 };
                let needed = match health {
                    Health::Unknown => 0,
                    Health::Up => fall,
                    Health::Down => rise,
                };
                if health == Health::Unknown || run >= needed {
                    health = if good { Health::Up } else { Health::Down };
                    run = 0;
                }
                assert_eq!(bench.machine.health(), health, "seed {seed} round {round}");
            }
        }
    }

    #[test]
    fn timing_is_cut_to_what_works() {
        let check = Check {
            name: "c".into(),
            probe: crate::service::Probe::Tcp,
            interval: Duration::ZERO,
            timeout: TIMEOUT,
            rise: 0,
            fall: 0,
            port: None,
        };
        assert_eq!(Timing::new(&check), Timing { interval: MS, timeout: MS, rise: 1, fall: 1 });
    }
}
