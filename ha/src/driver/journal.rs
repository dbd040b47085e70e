//! Log lines leave the driver's thread before they are written: who reads the log may be slow or
//! stopped, and the election must not wait for that.

use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, channel, sync_channel};
use std::thread;
use std::time::Duration;

/// Lines that may wait. When it is full lines are dropped, and how many is logged after.
const LINES: usize = 1024;

/// How long the end waits for the last lines.
const LAST_WORDS: Duration = Duration::from_millis(200);

type Line = Box<dyn FnOnce() + Send>;

/// Where the driver's log lines go. The thread that writes them ends when this is dropped.
pub(super) struct Journal {
    lines: SyncSender<Line>,
    lost: u64,
}

impl Journal {
    pub(super) fn start() -> io::Result<Self> {
        let (lines, queue) = sync_channel::<Line>(LINES);
        thread::Builder::new()
            .name("baton-ha-log".to_owned())
            .spawn(move || queue.into_iter().for_each(|line| line()))?;
        Ok(Self { lines, lost: 0 })
    }

    /// Has `line`, which calls one of tracing's macros, run soon.
    pub(super) fn say(&mut self, line: impl FnOnce() + Send + 'static) {
        if self.lost > 0 {
            let lost = self.lost;
            let report: Line = Box::new(move || tracing::warn!(lost, "log lines were dropped"));
            if self.lines.try_send(report).is_ok() {
                self.lost = 0;
            }
        }
        match self.lines.try_send(Box::new(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.lost += 1,
        }
    }
}

impl Drop for Journal {
    /// Gives what was said last a moment to be written: the process may be about to end.
    fn drop(&mut self) {
        let (written, wait) = channel();
        if self
            .lines
            .try_send(Box::new(move || {
                // Nobody waits any longer: it took too long.
                let _ = written.send(());
            }))
            .is_ok()
        {
            let _ = wait.recv_timeout(LAST_WORDS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_reader_costs_lines_but_no_time() {
        let mut journal = Journal::start().unwrap();
        let (release, hold) = channel::<()>();
        journal.say(move || hold.recv().unwrap());
        for _ in 0..2 * LINES {
            journal.say(|| {});
        }
        assert!((LINES as u64 - 1..=LINES as u64 + 1).contains(&journal.lost), "{}", journal.lost);
        release.send(()).unwrap();
        let (done, wait) = channel();
        while journal.lost > 0 {
            let done = done.clone();
            journal.say(move || done.send(()).unwrap());
            std::thread::yield_now();
        }
        wait.recv().unwrap();
    }
}
