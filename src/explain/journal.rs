//! The thread that writes the journal, and the daemon's end of it.
//!
//! Each entry is one write; the file is synced as soon as nothing more waits to be written. So a
//! killed daemon loses nothing that it had decided more than a moment before, and a machine whose
//! power goes little more. What can't be written is logged once and counted, and the next entry
//! tries again; entries are then missing, which the next one that is written says.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use baton_ha::config::HaConfig;
use baton_ha::driver::Handle;
use baton_ha::record::{self, Record, Recorder, Stamp, Words};
use baton_ha::vrrp::router::Reason;
use serde::{Deserialize, Serialize};

use super::entry::Names;
use super::file::{File, LIMIT};
use super::{Backends, Before, Entry, What, path, read};
use crate::status::ReplicationStatus;

/// Looks at what is around the election that are remembered: entries are given what was so before.
const LOOKS: usize = 32;
/// How long the end of the daemon waits for the last entries.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the rest of the daemon knows, that the election does not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Around {
    /// Flows on the other nodes.
    pub flows: Option<ReplicationStatus>,
    /// Backends.
    pub health: Option<Backends>,
}

/// The journal of a running daemon.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    recorder: Recorder,
    shared: Arc<Shared>,
}

/// What the thread shares with the daemon.
#[derive(Debug, Default)]
struct Shared {
    /// The newest last.
    looks: Mutex<VecDeque<(Duration, Around)>>,
    written: AtomicU64,
    failed: AtomicU64,
    /// Why nothing can be written now.
    trouble: Mutex<Option<String>>,
}

/// The journal, for status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JournalStatus {
    /// Its file.
    pub file: PathBuf,
    /// Entries written since the start.
    pub written: u64,
    /// Entries that are missing: they came too fast, or could not be written.
    pub lost: u64,
    /// Why nothing can be written now.
    pub trouble: Option<String>,
}

impl Journal {
    /// Begins to write what the driver records. `None` where another does that already. `started`:
    /// when the daemon did.
    ///
    /// # Errors
    ///
    /// That there can be no thread. A file that can't be written is none.
    pub fn start(
        folder: &Path,
        ha: &HaConfig,
        handle: &Handle,
        started: Stamp,
    ) -> std::io::Result<Option<Self>> {
        let Some(records) = handle.records() else { return Ok(None) };
        let (path, recorder) = (path(folder), handle.recorder());
        let shared = Arc::<Shared>::default();
        let mut writer = Writer {
            file: File::new(path.clone(), LIMIT),
            path: path.clone(),
            names: Names::new(ha),
            recorder: recorder.clone(),
            shared: Arc::clone(&shared),
            lost: 0,
            missing: 0,
        };
        thread::Builder::new().name("baton-journal".to_owned()).spawn(move || {
            writer.begin(started);
            writer.run(&records);
        })?;
        Ok(Some(Self { path, recorder, shared }))
    }

    /// An operator asks for something.
    pub fn asked(&self, what: &str, by: &str) {
        self.send(record::What::Asked { what: Words::of(what), by: Words::of(by) });
    }

    /// And was refused.
    pub fn refused(&self, what: &str, why: &str) {
        self.send(record::What::Refused { what: Words::of(what), why: Words::of(why) });
    }

    /// Another part of the daemon has decided something about the election.
    pub fn did(&self, what: &str) {
        self.send(record::What::Did(Words::of(what)));
    }

    /// The daemon was told to stop.
    pub fn stopping(&self, why: &str) {
        self.send(record::What::Stopping(Words::of(why)));
    }

    /// What is around the election now; entries from now on have it.
    pub fn look(&self, around: Around) {
        let mut looks = self.shared.looks.lock().unwrap_or_else(PoisonError::into_inner);
        while looks.len() >= LOOKS {
            looks.pop_front();
        }
        looks.push_back((Stamp::now().boot, around));
    }

    /// For status.
    pub fn status(&self) -> JournalStatus {
        JournalStatus {
            file: self.path.clone(),
            written: self.shared.written.load(Ordering::Relaxed),
            lost: self.recorder.lost() + self.shared.failed.load(Ordering::Relaxed),
            trouble: self.shared.trouble().clone(),
        }
    }

    /// Waits a moment for what was recorded last: the process is about to end.
    pub fn finish(&self) {
        let end = Instant::now() + LAST_WORDS;
        let done = || {
            let done = [&self.shared.written, &self.shared.failed];
            done.iter().map(|count| count.load(Ordering::Acquire)).sum::<u64>()
        };
        // The writer adds one of its own: that of the start.
        while done() < self.recorder.sent() + 1 && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn send(&self, what: record::What) {
        self.recorder.send(Record { at: Stamp::now(), what, known: None });
    }
}

impl Shared {
    fn trouble(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was around the election when something was decided.
    fn around(&self, at: Duration) -> Around {
        let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let before = looks.iter().rev().find(|(looked, _)| *looked <= at);
        before.map(|(_, around)| around.clone()).unwrap_or_default()
    }
}

/// The thread.
struct Writer {
    file: File,
    path: PathBuf,
    names: Names,
    recorder: Recorder,
    shared: Arc<Shared>,
    /// What the recorder had lost at the last entry.
    lost: u64,
    /// Entries that could not be written since the last one that was.
    missing: u64,
}

impl Writer {
    /// The entry of the start, with the last word of the daemon before.
    fn begin(&mut self, at: Stamp) {
        let start = Record { at, what: record::What::Started, known: None };
        let before = read::read(&self.path).ok();
        let last = before.as_ref().and_then(|journal| before_of(&journal.entries));
        let before =
            last.map(|before| Before { rebooted: before.1 != self.names.boot(), ..before.0 });
        let version = env!("CARGO_PKG_VERSION").into();
        let entry = self.names.with(&start, What::Started { version, before });
        self.write(entry);
    }

    fn run(&mut self, records: &Receiver<Record>) {
        while let Ok(record) = records.recv() {
            self.record(&record);
            loop {
                match records.try_recv() {
                    Ok(record) => self.record(&record),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.sync(),
                }
            }
            self.sync();
        }
    }

    fn record(&mut self, record: &Record) {
        let Around { flows, health } = self.shared.around(record.at.boot);
        let known = record.known.is_some();
        let entry = Entry {
            flows: flows.filter(|_| known),
            health: health.filter(|_| known),
            ..self.names.entry(record)
        };
        self.write(entry);
    }

    fn write(&mut self, entry: Entry) {
        let lost = self.recorder.lost();
        let missing = self.missing + (lost - self.lost);
        let line = serde_json::to_vec(&Entry { missing, ..entry });
        let written = line.map_err(std::io::Error::from).and_then(|line| self.file.append(&line));
        self.lost = lost;
        match written {
            Ok(()) => {
                self.missing = 0;
                self.shared.written.fetch_add(1, Ordering::Release);
                self.well(missing);
            }
            Err(error) => {
                self.missing = missing + 1;
                self.shared.failed.fetch_add(1, Ordering::Release);
                self.trouble(&error);
            }
        }
    }

    fn sync(&mut self) {
        if let Err(error) = self.file.sync() {
            self.trouble(&error);
        }
    }

    /// Said once, until it is over.
    fn trouble(&self, error: &std::io::Error) {
        let said = self.shared.trouble().replace(error.to_string());
        if said.is_none() {
            let file = self.path.display();
            tracing::warn!(%file, "decisions can't be written down for `baton explain`: {error}");
        }
    }

    fn well(&self, missing: u64) {
        if self.shared.trouble().take().is_some() {
            tracing::info!(missing, "decisions are written down again");
        }
    }
}

/// The last word of the daemon before, and its boot.
fn before_of(entries: &[Entry]) -> Option<(Before, String)> {
    let last = entries.last()?;
    let of_it = || entries.iter().rev().take_while(|e| (e.pid, &e.boot) == (last.pid, &last.boot));
    let state = of_it().find_map(|entry| match entry.what {
        What::Transition { to, .. } => Some(to),
        _ => entry.known.as_ref().map(|known| known.state),
    });
    let shut = |entry: &Entry| {
        matches!(
            entry.what,
            What::Stopping { .. } | What::Transition { reason: Reason::Shutdown, .. }
        )
    };
    let before = Before {
        wall: last.wall.clone(),
        pid: last.pid,
        state,
        said_so: of_it().any(shut),
        rebooted: false,
    };
    Some((before, last.boot.clone()))
}
