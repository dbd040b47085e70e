//! Reading a journal: the old file and the present one, whatever state they are in.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::Entry;
use super::entry::boot_id;
use super::file::{LIMIT, old};

/// What a file may be at most: there may be one that was not written by this version.
const MOST: u64 = 16 * LIMIT;

/// What a journal says.
#[derive(Debug, Default)]
pub struct Journal {
    /// In the order in which they were written, the oldest first.
    pub entries: Vec<Entry>,
    /// Lines that are no entry: cut short when the power went, or damaged.
    pub bad: u64,
}

/// Reads a journal.
///
/// # Errors
///
/// The system's, where the file is not there or can't be read. The old one may be missing.
pub fn read(path: &Path) -> io::Result<Journal> {
    let mut journal = Journal::default();
    // The present one first: should it become the old one meanwhile, that is seen.
    let (newer, inode) = bytes(path)?;
    match bytes(&old(path)) {
        Ok((older, other)) if other != inode => journal.take(&older),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    journal.take(&newer);
    Ok(journal)
}

fn bytes(path: &Path) -> io::Result<(Vec<u8>, u64)> {
    let file = OpenOptions::new().read(true).open(path)?;
    let inode = file.metadata()?.ino();
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok((bytes, inode))
}

impl Journal {
    fn take(&mut self, bytes: &[u8]) {
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(entry) => self.entries.push(entry),
                Err(_) => self.bad += 1,
            }
        }
    }
}

/// From when on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// So long ago.
    Ago(Duration),
    /// A moment.
    Time(SystemTime),
}

/// This moment, on the clocks that entries have.
#[derive(Debug, Clone)]
pub struct Now {
    /// The boot that the machine is in.
    pub boot: String,
    /// Since then.
    pub mono: Duration,
    /// For people.
    pub wall: SystemTime,
}

impl Now {
    /// Of this machine.
    pub fn here() -> Self {
        let stamp = baton_ha::record::Stamp::now();
        Self { boot: boot_id(), mono: stamp.boot, wall: stamp.wall }
    }

    /// When an entry was made. Of this boot that is known whatever has become of the clock on the
    /// wall since; of another there is nothing but that clock.
    fn time_of(&self, entry: &Entry) -> Option<SystemTime> {
        if entry.boot == self.boot && !self.boot.is_empty() {
            let age = self.mono.saturating_sub(Duration::from_micros(entry.mono_us));
            return self.wall.checked_sub(age);
        }
        humantime::parse_rfc3339(&entry.wall).ok()
    }

    /// Whether an entry was made since then. One whose time is not known is shown rather than not.
    pub fn is_since(&self, entry: &Entry, since: Since) -> bool {
        let from = match since {
            Since::Ago(ago) => self.wall.checked_sub(ago),
            Since::Time(time) => Some(time),
        };
        match (self.time_of(entry), from) {
            (Some(time), Some(from)) => time >= from,
            (_, _) => true,
        }
    }

    /// What was written: a span (`10m`, `2h 30m`), a time of day (`03:12`, the last time that it was
    /// so), or a date with a time; all in UTC.
    ///
    /// # Errors
    ///
    /// What can be written instead.
    pub fn since(&self, text: &str) -> Result<Since, String> {
        if let Ok(ago) = humantime::parse_duration(text) {
            return Ok(Since::Ago(ago));
        }
        if let Some(of_day) = time_of_day(text) {
            let day = Duration::from_secs(86_400);
            let now = self.wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let midnight = Duration::from_secs(now.as_secs() / day.as_secs() * day.as_secs());
            let today = SystemTime::UNIX_EPOCH + midnight + of_day;
            return Ok(Since::Time(if today > self.wall { today - day } else { today }));
        }
        let full = if text.len() == "2026-11-23 03:12".len() {
            format!("{text}:00")
        } else {
            text.to_owned()
        };
        humantime::parse_rfc3339_weak(&full).map(Since::Time).map_err(|_| {
            "write a span (10m, 2h), a time of day (03:12), or a date with a time \
             (\"2026-11-23 03:12:00\"), in UTC"
                .to_owned()
        })
    }
}

/// `3:12`, `03:12`, `03:12:07`.
fn time_of_day(text: &str) -> Option<Duration> {
    let parts: Vec<u64> = text
        .split(':')
        .map(|part| {
            let digits = (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| part.parse().ok()).flatten()
        })
        .collect::<Option<_>>()?;
    let (hours, minutes, seconds) = match parts[..] {
        [hours, minutes] => (hours, minutes, 0),
        [hours, minutes, seconds] => (hours, minutes, seconds),
        _ => return None,
    };
    (hours < 24 && minutes < 60 && seconds < 60)
        .then(|| Duration::from_secs(hours * 3600 + minutes * 60 + seconds))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::explain::What;

    pub(in crate::explain) fn entry(boot: &str, mono_s: u64, wall: &str) -> Entry {
        Entry {
            wall: wall.to_owned(),
            boot: boot.to_owned(),
            mono_us: mono_s * 1_000_000,
            pid: 1,
            node: "relay1".to_owned(),
            what: What::Follows { peer: "relay2".to_owned() },
            missing: 0,
            known: None,
            flows: None,
            health: None,
        }
    }

    fn now() -> Now {
        Now {
            boot: "this".to_owned(),
            mono: Duration::from_secs(10_000),
            wall: humantime::parse_rfc3339("2026-11-23T04:00:00Z").unwrap(),
        }
    }

    #[test]
    fn damaged_lines_are_counted_and_everything_else_is_read_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let line =
            |mono| serde_json::to_string(&entry("this", mono, "2026-11-23T03:12:07.000Z")).unwrap();
        std::fs::write(old(&path), format!("{}\n{}\n", line(1), line(2))).unwrap();
        let half = &line(9)[..40];
        let later = line(5).replace("follows", "of-a-later-version");
        let text = format!("{}\n{half}\n\n{later}\n\0\0\u{fffd}\n[]\n{}\n{half}", line(3), line(6));
        std::fs::write(&path, text).unwrap();
        let journal = read(&path).unwrap();
        let order: Vec<_> = journal.entries.iter().map(|entry| entry.mono_us / 1_000_000).collect();
        assert_eq!(order, [1, 2, 3, 5, 6]);
        assert_eq!(journal.entries[3].what, What::Unknown);
        assert_eq!(journal.bad, 4);
    }

    #[test]
    fn a_clock_that_was_set_hides_nothing_of_this_boot() {
        let (now, ago) = (now(), |minutes: u64| Since::Ago(Duration::from_secs(60 * minutes)));
        // Five minutes ago by the clock that never jumps, whatever the one on the wall said then.
        for wall in ["2026-11-23T03:55:00Z", "1970-01-01T00:00:01Z", "2050-01-01T00:00:00Z"] {
            let entry = entry("this", 10_000 - 300, wall);
            assert!(now.is_since(&entry, ago(6)), "{wall}");
            assert!(!now.is_since(&entry, ago(4)), "{wall}");
            assert!(now.is_since(&entry, now.since("03:54").unwrap()), "{wall}");
            assert!(!now.is_since(&entry, now.since("03:56").unwrap()), "{wall}");
        }
        // Of another boot there is no other clock.
        let entry = entry("before", 20_000, "2026-11-23T03:55:00Z");
        assert!(now.is_since(&entry, ago(6)) && !now.is_since(&entry, ago(4)));
    }

    #[test]
    fn times_are_written_as_people_write_them() {
        let now = now();
        let at = |text: &str| Since::Time(humantime::parse_rfc3339(text).unwrap());
        for (text, expected) in [
            ("10m", Since::Ago(Duration::from_secs(600))),
            ("1h 30m", Since::Ago(Duration::from_secs(5400))),
            ("03:12", at("2026-11-23T03:12:00Z")),
            ("3:12:07", at("2026-11-23T03:12:07Z")),
            ("23:59", at("2026-11-22T23:59:00Z")),
            ("2026-11-22 03:12", at("2026-11-22T03:12:00Z")),
            ("2026-11-22T03:12:07Z", at("2026-11-22T03:12:07Z")),
        ] {
            assert_eq!(now.since(text), Ok(expected), "{text}");
        }
        for wrong in ["", "03", "24:00", "03:60", "03:12:07:01", "yesterday", "-5m", "+3:12", "::"]
        {
            assert!(now.since(wrong).is_err(), "{wrong}");
        }
    }
}
