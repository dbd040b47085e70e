//! From a list of attempts to an outage. Pure.

use std::time::{Duration, Instant};

/// One thing that a client tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    /// When it began.
    pub(super) started: Instant,
    /// When it was answered, if it was answered in time.
    pub(super) answered: Option<Instant>,
}

/// A stretch of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outage {
    /// Start of the last attempt that was answered before it.
    pub(super) from: Instant,
    /// Start of the first attempt that was answered after it; of the last attempt, if none was.
    pub(super) to: Instant,
    /// When the answer that ended it came; `None`: the service did not come back.
    pub(super) answer: Option<Instant>,
}

impl Outage {
    /// How long it took.
    pub(super) fn length(&self) -> Duration {
        self.to - self.from
    }
}

/// The longest outage among attempts (in order of their start) that reaches past `since`: between
/// the starts of two answered attempts with at least one unanswered in between. An attempt that
/// merely began late is none.
pub(super) fn longest(attempts: &[Attempt], since: Instant) -> Option<Outage> {
    let mut worst: Option<Outage> = None;
    let mut consider = |outage: Outage| {
        if outage.to >= since && worst.is_none_or(|worst| outage.length() > worst.length()) {
            worst = Some(outage);
        }
    };
    let mut last_good = attempts.first().map(|attempt| attempt.started);
    let mut failing = false;
    for attempt in attempts {
        match (attempt.answered, last_good) {
            (None, _) => failing = true,
            (Some(answer), Some(from)) if failing => {
                consider(Outage { from, to: attempt.started, answer: Some(answer) });
                failing = false;
                last_good = Some(attempt.started);
            }
            (Some(_), _) => last_good = Some(attempt.started),
        }
    }
    if let (true, Some(from), Some(last)) = (failing, last_good, attempts.last()) {
        consider(Outage { from, to: last.started, answer: None });
    }
    worst
}

/// Whether every attempt that began between `from` and `to` was answered, and there was one.
pub(super) fn all_answered(attempts: &[Attempt], from: Instant, to: Instant) -> bool {
    let begin = attempts.partition_point(|attempt| attempt.started < from);
    let end = attempts.partition_point(|attempt| attempt.started <= to);
    begin < end && attempts[begin..end].iter().all(|attempt| attempt.answered.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(base: Instant, ms: u64) -> Instant {
        base + Duration::from_millis(ms)
    }

    /// `(start, answered)` in ms.
    fn attempts(base: Instant, list: &[(u64, bool)]) -> Vec<Attempt> {
        let attempt = |&(ms, good): &(u64, bool)| Attempt {
            started: at(base, ms),
            answered: good.then(|| at(base, ms + 1)),
        };
        list.iter().map(attempt).collect()
    }

    #[test]
    fn the_longest_stretch_counts_between_answered_attempts() {
        let base = Instant::now();
        let list = attempts(
            base,
            &[(0, true), (1, false), (2, true), (10, true), (11, false), (12, false), (30, true)],
        );
        let outage = longest(&list, base).unwrap();
        assert_eq!((outage.from, outage.to), (at(base, 10), at(base, 30)));
        assert_eq!(outage.answer, Some(at(base, 31)));
    }

    #[test]
    fn a_canary_that_slept_has_seen_no_outage() {
        let base = Instant::now();
        assert_eq!(longest(&attempts(base, &[(0, true), (500, true)]), base), None);
    }

    #[test]
    fn what_was_over_before_the_fault_does_not_count() {
        let base = Instant::now();
        let list = attempts(base, &[(0, true), (1, false), (100, true), (200, false), (210, true)]);
        let outage = longest(&list, at(base, 150)).unwrap();
        assert_eq!(outage.length(), Duration::from_millis(110));
    }

    #[test]
    fn a_service_that_does_not_come_back_has_no_answer() {
        let base = Instant::now();
        let outage = longest(&attempts(base, &[(0, true), (1, false), (90, false)]), base).unwrap();
        assert_eq!((outage.length(), outage.answer), (Duration::from_millis(90), None));
        let never = longest(&attempts(base, &[(0, false), (9, false)]), base).unwrap();
        assert_eq!((never.length(), never.answer), (Duration::from_millis(9), None));
    }

    #[test]
    fn recovery_needs_attempts_and_all_of_them() {
        let base = Instant::now();
        let list = attempts(base, &[(0, false), (10, true), (20, true)]);
        assert!(all_answered(&list, at(base, 5), at(base, 30)));
        assert!(!all_answered(&list, base, at(base, 30)));
        assert!(!all_answered(&list, at(base, 21), at(base, 30)));
    }
}
