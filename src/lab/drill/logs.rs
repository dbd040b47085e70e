//! The relays' own word on their transitions, from the logs of `baton run`. A log gives the time
//! of day; here it becomes one of the monotonic clock.

use std::time::{Duration, Instant, SystemTime};

use crate::lab::Lab;
use crate::lab::topology::Role;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A transition that a relay has logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogLine {
    /// The relay.
    pub(super) node: String,
    /// When, by its own account.
    pub(super) at: Instant,
    /// What.
    pub(super) what: String,
}

/// The transitions in the logs of every relay of a lab.
pub(super) fn read(lab: &Lab) -> Vec<LogLine> {
    let clock = Clock::now();
    let mut lines = Vec::new();
    for relay in lab.topology.role(Role::Relay) {
        let log = lab.dir.join(format!("{}-relay.log", relay.name));
        // keepalived's log has another form, and seconds only.
        let text = std::fs::read_to_string(log).unwrap_or_default();
        lines.extend(text.lines().filter_map(|line| transition(&relay.name, line, &clock)));
    }
    lines
}

/// The same moment by both clocks.
struct Clock {
    time_of_day: Duration,
    instant: Instant,
}

impl Clock {
    fn now() -> Self {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = since_epoch.unwrap_or_default().as_secs_f64() % DAY.as_secs_f64();
        Self { time_of_day: Duration::from_secs_f64(seconds), instant: Instant::now() }
    }

    /// The moment of a time of day in the last 24 hours.
    fn instant(&self, time_of_day: Duration) -> Option<Instant> {
        let ago = match self.time_of_day.checked_sub(time_of_day) {
            Some(ago) => ago,
            None => (self.time_of_day + DAY).checked_sub(time_of_day)?,
        };
        self.instant.checked_sub(ago)
    }
}

/// `2026-11-22T03:12:00.123456Z  INFO …: transition … from=Backup to=Active reason=ActiveDown`
fn transition(node: &str, line: &str, clock: &Clock) -> Option<LogLine> {
    let (stamp, rest) = line.split_once(' ')?;
    if !rest.contains("transition") {
        return None;
    }
    let field = |name: &str| {
        rest.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    };
    let (from, to, reason) = (field("from")?, field("to")?, field("reason")?);
    let detected = if matches!(reason, "ActiveDown" | "ActiveYielded") { "detected: " } else { "" };
    Some(LogLine {
        node: node.to_owned(),
        at: clock.instant(time_of_day(stamp)?)?,
        what: format!("{detected}{from} to {to}, {reason} (its log)"),
    })
}

fn time_of_day(stamp: &str) -> Option<Duration> {
    let mut parts = stamp.split_once('T')?.1.strip_suffix('Z')?.splitn(3, ':');
    let hours: u32 = parts.next()?.parse().ok().filter(|hours| *hours < 24)?;
    let minutes: u32 = parts.next()?.parse().ok().filter(|minutes| *minutes < 60)?;
    let seconds: f64 = parts.next()?.parse().ok().filter(|s| (0.0..61.0).contains(s))?;
    Some(
        Duration::from_secs(u64::from(hours * 3600 + minutes * 60))
            + Duration::from_secs_f64(seconds),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "2026-11-22T00:00:01.500000Z  INFO baton_ha::driver::run: transition \
                        node=\"relay2\" vrid=77 from=Backup to=Active reason=ActiveDown";

    #[test]
    fn a_transition_is_found_with_its_time_across_midnight() {
        let now = Instant::now() + Duration::from_secs(100);
        let clock = Clock { time_of_day: Duration::from_secs(3), instant: now };
        let line = transition("relay2", LINE, &clock).unwrap();
        assert_eq!(line.at, now - Duration::from_millis(1500));
        assert_eq!(line.what, "detected: Backup to Active, ActiveDown (its log)");
        let yesterday = LINE.replace("T00:00:01.5", "T23:59:59.0");
        assert_eq!(
            transition("relay2", &yesterday, &clock).unwrap().at,
            now - Duration::from_secs(4)
        );
    }

    #[test]
    fn other_lines_are_nothing() {
        let clock = Clock::now();
        for cut in 0..LINE.len() {
            let _ = transition("x", &LINE[..cut], &clock);
        }
        for line in ["", "no stamp", "2026-11-22T99:00:00Z transition from=a to=b reason=c"] {
            assert_eq!(transition("x", line, &clock), None, "{line}");
        }
    }
}
