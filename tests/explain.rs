//! `baton explain` on both nodes of a pair, with real daemons in namespaces: what it says after a
//! `kill -9` of the Active, and that whatever becomes of the journal, the election goes on. Needs
//! root.

// Each test file uses its part.
#[allow(dead_code)]
mod lab_support;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use baton::explain::read::read;
use baton::explain::{ChannelKnown, Entry, What};
use baton::status::Status;
use baton_ha::vrrp::router::{Reason, State};
use lab_support::{Guard, run, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Generous: the machine may be busy. Whoever waits polls, so nothing is slower for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// A pair of passthrough relays.
struct Pair {
    lab: String,
    _guard: Guard,
}

impl Pair {
    fn up(test: &str) -> Self {
        let lab = format!("bt-{test}-{}", std::process::id());
        let guard = Guard(lab.clone());
        let up = run(&["lab", "up", "--name", &lab, "--mode", "passthrough"]);
        assert!(up.status.success(), "{}", text(&up));
        Self { lab, _guard: guard }
    }

    fn dir(&self) -> PathBuf {
        Path::new("/run/baton-lab").join(&self.lab)
    }

    fn journal(&self, relay: &str) -> PathBuf {
        self.dir().join(format!("{relay}.state/journal.jsonl"))
    }

    fn exec(&self, relay: &str, command: &[&str]) -> std::process::Output {
        run(&[&["lab", "exec", "--name", &self.lab, relay, "--", "baton"], command].concat())
    }

    fn explain(&self, relay: &str, options: &[&str]) -> String {
        let output = self.exec(relay, &[&["explain"], options].concat());
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn entries(&self, relay: &str) -> Vec<Entry> {
        let lines = self.explain(relay, &["--json", "--last", "1000"]);
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn status(&self, relay: &str) -> Option<Status> {
        serde_json::from_slice(&self.exec(relay, &["status", "--json"]).stdout).ok()
    }

    fn state(&self, relay: &str) -> Option<State> {
        Some(self.status(relay)?.election?.state)
    }

    fn until_state(&self, relay: &str, state: State) {
        until(&format!("{relay} is {state:?}"), || self.state(relay) == Some(state));
    }

    fn kill(&self, relay: &str) {
        let pid = self.status(relay).unwrap().pid;
        kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGKILL).unwrap();
        until(&format!("{relay} is gone"), || self.status(relay).is_none());
    }

    /// Starts the daemon of a relay by hand, as an operator would.
    fn start(&self, relay: &str) -> Daemon {
        let file = self.dir().join(format!("{relay}.toml"));
        let log = fs::File::create(self.dir().join(format!("{relay}-again.log"))).unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{relay}", self.lab)]);
        command.arg(env!("CARGO_BIN_EXE_baton")).args(["run", "-c"]).arg(file).stderr(log);
        Daemon(command.spawn().unwrap())
    }
}

struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn transition(entry: &Entry) -> Option<(State, State, Reason)> {
    match entry.what {
        What::Transition { from, to, reason, .. } => Some((from, to, reason)),
        _ => None,
    }
}

#[test]
fn both_nodes_tell_why_after_a_kill() {
    let pair = Pair::up("explain");
    until("relay2 is in sync", || {
        let status = pair.status("relay2").and_then(|status| status.replication);
        status.is_some_and(|replication| replication.compared_s.is_some())
    });
    pair.kill("relay1");
    pair.until_state("relay2", State::Active);

    // The new Active: why, with the numbers.
    let entries = pair.entries("relay2");
    let takeover = (State::Backup, State::Active);
    let why = entries
        .iter()
        .rev()
        .find(|entry| transition(entry).is_some_and(|(from, to, _)| (from, to) == takeover));
    let why = why.expect("it says that it took over");
    let known = why.known.as_ref().unwrap();
    assert_eq!(known.active.as_deref(), Some("relay1"));
    let [relay1] = &known.peers[..] else { panic!("{known:?}") };
    let heartbeat = relay1.heartbeat.as_ref().expect("heartbeats came");
    assert_eq!(heartbeat.priority, Some(200));
    assert!(!relay1.adverts.is_empty(), "{relay1:?}");
    assert!(relay1.adverts.iter().all(|advert| advert.priority == 200 && advert.ms >= 0.0));
    let ChannelKnown::Down { ms, by_peer: true, lease_ms, .. } = &relay1.channel else {
        panic!("its daemon was killed: {relay1:?}");
    };
    // The lease that it had then is over: at once, or later, but never before.
    if transition(why).is_some_and(|(.., reason)| reason == Reason::ActiveGone) {
        assert!(*ms >= *lease_ms, "claimed {ms} ms after the end, with {lease_ms} ms left then");
    }
    assert!(heartbeat.ms + 0.001 >= *ms, "nothing comes after the end: {relay1:?}");
    let flows = why.flows.as_ref().expect("flows are replicated here");
    assert!(flows.from.is_some() && flows.compared_s.is_some(), "as a Backup: {flows:?}");
    assert_eq!(why.health.as_ref().map(|health| health.of > 0), Some(true));
    let words = pair.explain("relay2", &["--since", "10m"]);
    println!("{words}");
    let row = words.lines().rev().find(|line| line.contains("Backup to Active")).unwrap();
    assert!(row.contains("relay1"), "{row}");
    for word in ["last advert ", "heartbeat ", "channel closed by it ", "flows ", "health "] {
        assert!(words.contains(word), "{word}: {words}");
    }

    // The old Active, dead: its file is read all the same.
    let last = pair.entries("relay1").pop().unwrap();
    assert_eq!(last.known.map(|known| known.state), Some(State::Active));
    // And after its restart.
    let daemon = pair.start("relay1");
    pair.until_state("relay1", State::Backup);
    let entries = pair.entries("relay1");
    let started = entries.iter().rev().find_map(|entry| match &entry.what {
        What::Started { before, .. } => Some(before.clone()),
        _ => None,
    });
    let before = started.unwrap().expect("there was a daemon before");
    assert_eq!(
        (before.state, before.said_so, before.rebooted),
        (Some(State::Active), false, false)
    );
    let words = pair.explain("relay1", &["--last", "50"]);
    println!("{words}");
    assert!(words.contains("Active) ended without a word, killed or crashed"), "{words}");
    // It has the higher priority, and the lab's nodes do not preempt.
    until("it says what it leaves alone", || {
        let waits =
            |entry: &Entry| matches!(&entry.what, What::Waits { why } if why.contains("off"));
        pair.entries("relay1").iter().any(waits)
    });

    // An operator's command, with who asked; and one that is refused.
    until("takeover by the operator", || pair.exec("relay1", &["takeover"]).status.success());
    pair.until_state("relay1", State::Active);
    assert!(!pair.exec("relay2", &["yield"]).status.success(), "it is not Active");
    let asked = pair.entries("relay1").into_iter().find_map(|entry| match entry.what {
        What::Asked { what, by } if what.starts_with("takeover") => Some(by),
        _ => None,
    });
    let by = asked.expect("the command");
    assert!(by.contains("root") && by.contains("baton (pid "), "{by}");
    let refused = pair.entries("relay2").into_iter().rev().find_map(|entry| match entry.what {
        What::Refused { what, why } => Some((what, why)),
        _ => None,
    });
    let (what, why) = refused.expect("the refusal");
    assert!(what.starts_with("yield") && why.contains("not Active"), "{what}: {why}");
    drop(daemon);
}

#[test]
fn a_journal_that_can_not_be_written_disturbs_nothing() {
    let pair = Pair::up("full");
    pair.until_state("relay1", State::Active);
    pair.kill("relay2");
    pair.until_state("relay1", State::Active);
    // A disk of its own, which is full at once; and half a line of a daemon before.
    let folder = pair.dir().join("relay2.state");
    let disk = Disk::mount(&folder, "64k");
    let path = pair.journal("relay2");
    // As long as a page, but for a byte, so that nothing fits behind it.
    fs::write(&path, format!("{:4095}", "{\"wall\":\"2026-11-2")).unwrap();
    let filler = folder.join("filler");
    fill(&filler);
    let daemon = pair.start("relay2");
    pair.until_state("relay2", State::Backup);
    until("status tells of it", || {
        let journal = pair.status("relay2").and_then(|status| status.journal);
        journal.is_some_and(|journal| journal.lost > 0 && journal.trouble.is_some())
    });
    let shown = pair.exec("relay2", &["status"]);
    assert!(text(&shown).contains("can't be written: No space left"), "{}", text(&shown));
    // The election goes on as ever.
    pair.kill("relay1");
    pair.until_state("relay2", State::Active);
    let log = fs::read_to_string(pair.dir().join("relay2-again.log")).unwrap();
    assert_eq!(log.matches("decisions can't be written down").count(), 1, "once: {log}");

    // Once there is room, it goes on, says how many are missing, and the halves hurt nobody.
    fs::remove_file(&filler).unwrap();
    assert!(!pair.exec("relay2", &["drain", "nobody"]).status.success());
    until("it writes again", || {
        let journal = pair.status("relay2").and_then(|status| status.journal);
        journal.is_some_and(|journal| journal.trouble.is_none() && journal.written > 0)
    });
    let journal = read(&path).unwrap();
    assert!(journal.bad >= 1, "the half line");
    assert!(journal.entries.iter().any(|entry| entry.missing > 0), "{:?}", journal.entries);
    let output = pair.exec("relay2", &["explain"]);
    assert!(output.status.success(), "{}", text(&output));
    let shown = text(&output);
    assert!(shown.contains("missing here") && shown.contains("left out: cut short"), "{shown}");
    drop((daemon, disk));
}

/// A small tmpfs, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, size: &str) -> Self {
        let option = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &option, "baton-test"])
            .arg(at)
            .status()
            .unwrap();
        assert!(mounted.success());
        Self(at.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Takes all the room that there is.
fn fill(path: &Path) {
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    while file.write_all(&[0; 512]).is_ok() {}
}
