//! The kernel's jiffies, by which the gate and the flows are timed: how long one is, and how many
//! there were.

use std::time::Duration;

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

    #[test]
    fn durations_are_rounded_up() {
        let clock = Clock { frequency: 250 };
        assert_eq!(clock.jiffies(Duration::from_secs(1)), 250);
        assert_eq!(clock.jiffies(Duration::from_millis(5)), 2);
        assert_eq!(clock.jiffies(Duration::ZERO), 1);
        assert_eq!(clock.timeout(Duration::from_secs(1 << 40)), i32::MAX as u32);
    }
}
