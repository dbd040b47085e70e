//! How often changes are sent where they come fast. Pure.
//!
//! A change that comes alone goes at once. Where thousands come each second, a frame for every few
//! of them would cost both nodes more than the flows themselves: there a frame waits until
//! [`PERIOD`] after the one before, and takes along what has come meanwhile.

use std::time::{Duration, Instant};

/// Between two readings of changes that come fast.
pub(super) const PERIOD: Duration = Duration::from_millis(1);
/// Changes in a millisecond from which on they do.
const FAST: u128 = 5;
/// What that is judged by.
const WINDOW: Duration = Duration::from_millis(10);

/// The pace.
#[derive(Debug)]
pub(super) struct Pace {
    window: Instant,
    /// Changes in the window.
    changes: u128,
    fast: bool,
    next: Instant,
}

impl Pace {
    /// Nothing has come yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { window: now, changes: 0, fast: false, next: now }
    }

    /// So many changes were read.
    pub(super) fn read(&mut self, now: Instant, changes: usize) {
        self.changes += changes as u128;
        let length = now.saturating_duration_since(self.window);
        if length >= WINDOW {
            self.fast = self.changes >= length.as_millis() * FAST;
            self.window = now;
            self.changes = 0;
        }
        self.next = now + PERIOD;
    }

    /// Until when the next reading waits; `None`: it need not.
    pub(super) fn held(&self, now: Instant) -> Option<Instant> {
        (self.fast && now < self.next).then_some(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changes so many microseconds apart for 50 ms, each read as soon as it may be: how many
    /// readings there were in the last 20 ms.
    fn readings(pace: &mut Pace, begun: Instant, apart: u64) -> u64 {
        let (mut waiting, mut readings) = (0, 0);
        for micros in (0..50_000).step_by(10) {
            let now = begun + Duration::from_micros(micros);
            waiting += usize::from(micros % apart == 0);
            if waiting > 0 && pace.held(now).is_none() {
                pace.read(now, waiting);
                waiting = 0;
                readings += u64::from(micros >= 30_000);
            }
        }
        readings
    }

    #[test]
    fn few_changes_go_at_once_and_many_together() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        assert_eq!(readings(&mut pace, begun, 500), 40, "2,000 a second, each at once");
        let then = begun + Duration::from_secs(1);
        assert_eq!(readings(&mut pace, then, 50), 20, "20,000 a second, every millisecond");
        let after = begun + Duration::from_secs(2);
        assert_eq!(readings(&mut pace, after, 10_000), 2, "100 a second, each at once again");
    }
}
