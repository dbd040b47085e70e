//! The kernel's jiffies, by which the gate and the flows are timed: how long one is, and how many
//! there were.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::gate::Deadline;
use super::skeleton::types;

/// Frequencies that kernels are built with.
const FREQUENCIES: [u64; 4] = [100, 250, 300, 1000];

/// How long a jiffy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Jiffies in a second.
    frequency: u64,
}

impl Clock {
    /// How long a jiffy is, from one reading of jiffies and monotonic nanoseconds since the start.
    /// `None`: it does not show; read again later and use [`Clock::between`].
    ///
    /// The kernel begins to count five minutes before 2³² (INITIAL_JIFFIES, so that a wrap of 32
    /// bits shows early). What fits best tells the frequency, except near that moment, when every
    /// frequency fits.
    pub(super) fn at(reading: types::clock) -> Option<Self> {
        let expected = |frequency: u64| {
            let start = (1_u64 << 32) - 300 * frequency;
            start + (u128::from(reading.nanoseconds) * u128::from(frequency) / 1_000_000_000) as u64
        };
        let off = |frequency: u64| reading.jiffies.abs_diff(expected(frequency));
        let mut fits = FREQUENCIES.map(|frequency| (off(frequency), frequency));
        fits.sort_unstable();
        let [(best, frequency), (second, _), ..] = fits;
        (best.saturating_mul(4) < second).then_some(Self { frequency })
    }

    /// The same from two readings, at least 100 ms apart.
    pub(super) fn between(earlier: types::clock, later: types::clock) -> Self {
        let jiffies = u128::from(later.jiffies.wrapping_sub(earlier.jiffies));
        let nanoseconds = u128::from(later.nanoseconds.wrapping_sub(earlier.nanoseconds)).max(1);
        let seen = (jiffies * 1_000_000_000 / nanoseconds) as u64;
        let frequency = FREQUENCIES.into_iter().min_by_key(|frequency| frequency.abs_diff(seen));
        Self { frequency: frequency.expect("there are frequencies to choose from") }
    }

    /// Nanoseconds of a jiffy, as the kernel rounds them (TICK_NSEC).
    fn nanoseconds(&self) -> u64 {
        (1_000_000_000 + self.frequency / 2) / self.frequency
    }

    /// That many jiffies, at least 1: rounded up, so that nothing is shorter than was asked for.
    pub fn jiffies(&self, duration: Duration) -> u64 {
        let jiffies = (duration.as_nanos() * u128::from(self.frequency)).div_ceil(1_000_000_000);
        u64::try_from(jiffies).unwrap_or(u64::MAX).max(1)
    }

    /// Seconds of an age in 32 bits; of one that is negative, since its beginning was written by
    /// another CPU a moment after `now` was read, 0.
    pub(super) fn seconds(&self, age: u32) -> f64 {
        f64::from((age as i32).max(0)) / self.frequency as f64
    }

    /// The same in 32 bits, at most half of their range, which is as far as ages can be compared.
    pub(super) fn timeout(&self, duration: Duration) -> u32 {
        u32::try_from(self.jiffies(duration)).unwrap_or(u32::MAX).min(i32::MAX as u32)
    }
}

impl Clock {
    /// The same of an age, which may be nothing at all.
    pub(super) fn timeout_or_none(&self, age: Duration) -> u32 {
        if age.is_zero() { 0 } else { self.timeout(age) }
    }
}

/// From this process's monotonic clock to the kernel's clocks, without asking the kernel: jiffies
/// are counted by its monotonic clock, so that one reading of both tells the rest.
///
/// Whatever is not known exactly is taken so that no [`Deadline`] is later than what was asked for:
/// a jiffy was counted some time before it was read, and so jiffies come a little sooner than is
/// reckoned here, by less than one.
#[derive(Debug)]
pub(super) struct Tick {
    clock: Clock,
    /// When jiffy 0 would have begun by this process's clock, at the latest; modulo 2⁶⁴.
    zero: AtomicU64,
    /// What the kernel's clock is ahead of this process's, at the least, modulo 2⁶⁴: not zero in a
    /// time namespace.
    ahead: AtomicU64,
}

/// A reading of the kernel's clocks, and of this process's before and after.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sighting {
    pub(super) before: u64,
    pub(super) kernel: types::clock,
    pub(super) after: u64,
}

impl Tick {
    pub(super) fn new(clock: Clock, first: Sighting) -> Self {
        let tick = Self { clock, zero: AtomicU64::new(0), ahead: AtomicU64::new(0) };
        tick.zero.store(tick.zero_by(first), Ordering::Release);
        tick.note(first);
        tick
    }

    /// Takes in another reading: soon after a jiffy's beginning it tells more; and where the
    /// kernel lost ticks, it shows.
    pub(super) fn note(&self, sighting: Sighting) {
        let seen = self.zero_by(sighting);
        let later = seen.wrapping_sub(self.zero.load(Ordering::Acquire)).cast_signed();
        if later < 0 || later.unsigned_abs() > 2 * self.clock.nanoseconds() {
            self.zero.store(seen, Ordering::Release);
        }
        let Sighting { before, kernel, after } = sighting;
        let same = (before..=after).contains(&kernel.nanoseconds);
        let ahead = if same { 0 } else { kernel.nanoseconds.wrapping_sub(after) };
        self.ahead.store(ahead, Ordering::Release);
    }

    /// What is not later than this moment of this process's clock.
    pub(super) fn deadline(&self, until: u64) -> Deadline {
        let since = until.wrapping_sub(self.zero.load(Ordering::Acquire));
        Deadline {
            jiffies: since / self.clock.nanoseconds(),
            nanoseconds: until.wrapping_add(self.ahead.load(Ordering::Acquire)),
        }
    }

    fn zero_by(&self, sighting: Sighting) -> u64 {
        let counted = sighting.kernel.jiffies.wrapping_mul(self.clock.nanoseconds());
        sighting.after.wrapping_sub(counted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(frequency: u64, uptime_ms: u64, off: u64) -> types::clock {
        let start = (1_u64 << 32) - 300 * frequency;
        types::clock {
            jiffies: start + uptime_ms * frequency / 1000 + off,
            nanoseconds: uptime_ms * 1_000_000,
        }
    }

    #[test]
    fn one_reading_tells_the_frequency() {
        for frequency in FREQUENCIES {
            for uptime in [0, 1, 200, 400, 3600, 400 * 24 * 3600] {
                let shown = Clock::at(reading(frequency, uptime * 1000, 30));
                assert_eq!(shown, Some(Clock { frequency }), "{uptime} s");
            }
        }
    }

    #[test]
    fn where_one_does_not_two_do() {
        for frequency in FREQUENCIES {
            let (earlier, later) = (reading(frequency, 300_000, 7), reading(frequency, 300_104, 7));
            assert_eq!(Clock::at(earlier), None);
            assert_eq!(Clock::between(earlier, later), Clock { frequency });
        }
    }

    /// A kernel whose jiffies are counted in time, read `at` nanoseconds after its start by a
    /// process whose clock is `ahead` of it.
    fn sight(clock: Clock, at: u64, ahead: u64) -> Sighting {
        let start = (1_u64 << 32) - 300 * clock.frequency;
        let kernel = types::clock { jiffies: start + at / clock.nanoseconds(), nanoseconds: at };
        let after = at.wrapping_add(ahead);
        Sighting { before: after.wrapping_sub(1_000), kernel, after }
    }

    #[test]
    fn a_deadline_is_never_late_and_less_than_two_jiffies_early() {
        for frequency in FREQUENCIES {
            let clock = Clock { frequency };
            let jiffy = clock.nanoseconds();
            for ahead in [0, 77_000_000_000, 77_000_000_000_u64.wrapping_neg()] {
                for phase in [0, 1, jiffy / 2, jiffy - 1] {
                    let at = 400_000 * jiffy + phase;
                    let tick = Tick::new(clock, sight(clock, at, ahead));
                    for length in [0, 1, 27_500_000, 2_750_000_000] {
                        let end = at + length;
                        let deadline = tick.deadline(end.wrapping_add(ahead));
                        // Jiffies as the kernel counts them at the end: closed by then.
                        let then = sight(clock, end, ahead).kernel.jiffies;
                        assert!(deadline.jiffies <= then, "late: {frequency} {phase} {length}");
                        assert!(deadline.jiffies + 2 > then, "early: {frequency} {phase} {length}");
                        let nanoseconds = end - deadline.nanoseconds;
                        assert!(nanoseconds <= 1_000, "{frequency} {phase} {nanoseconds}");
                    }
                }
            }
        }
    }

    #[test]
    fn later_readings_make_it_exact_and_lost_ticks_show() {
        let clock = Clock { frequency: 250 };
        let at = |ms: u64, lost: u64| {
            let mut sighting = sight(clock, ms * 1_000_000, 0);
            sighting.kernel.jiffies -= lost;
            sighting
        };
        let jiffies = |tick: &Tick, ms: u64| tick.deadline(ms * 1_000_000).jiffies;
        let tick = Tick::new(clock, at(400_003, 0));
        let then = |ms: u64| sight(clock, ms * 1_000_000, 0).kernel.jiffies;
        assert_eq!(jiffies(&tick, 500_000), then(500_000) - 1);
        tick.note(at(400_100, 0));
        assert_eq!(jiffies(&tick, 500_000), then(500_000));
        // A reading that is merely late tells nothing.
        tick.note(at(400_203, 0));
        assert_eq!(jiffies(&tick, 500_000), then(500_000));
        // Ten ticks that the kernel did not count: it never makes up for them.
        tick.note(at(400_300, 10));
        assert_eq!(jiffies(&tick, 500_000), then(500_000) - 10);
    }

    #[test]
    fn durations_are_rounded_up() {
        let clock = Clock { frequency: 250 };
        assert_eq!(clock.jiffies(Duration::from_secs(1)), 250);
        assert_eq!(clock.jiffies(Duration::from_millis(5)), 2);
        assert_eq!(clock.jiffies(Duration::ZERO), 1);
        assert_eq!(clock.timeout(Duration::from_secs(1 << 40)), i32::MAX as u32);
    }
}
