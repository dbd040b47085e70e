//! What goes wrong between relays, as drills: clients of kernel services must not notice. Needs
//! root.
//!
//! Drills count a connection that is silent for long as lost, and the machine may be busy: a drill
//! that fails is run once more, with the reason printed.

// Each test file uses its part.
#[allow(dead_code)]
mod lab_support;

use std::sync::{Mutex, MutexGuard, PoisonError};

use baton::lab::drill::report::{Report, Run};
use lab_support::{baton, text};

/// One drill at a time: they would disturb each other.
static MACHINE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The run, or what the drill says against it.
fn drill(fault: &str, mode: &str) -> Result<Run, String> {
    let arguments = ["drill", fault, "--mode", mode, "--rate", "100", "--json"];
    let output =
        baton(&[&arguments[..], &["--report", "/dev/null"]].concat()).output().expect("it starts");
    if !output.status.success() {
        return Err(text(&output));
    }
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    Ok(report.runs.into_iter().next().unwrap())
}

/// No connection is lost, no byte is wrong, and the Backup can take over afterwards; for how long
/// two nodes answer is `split`'s to judge.
fn nobody_notices(fault: &str, mode: &str, split: impl Fn(f64) -> bool) {
    let judge = |run: Result<Run, String>| {
        println!("{fault}, {mode}: {run:#?}");
        run.is_ok_and(|run| {
            let connections = &run.connections;
            connections.kept == 20
                && connections.lost == 0
                && run.wrong_bytes == 0
                && run.two_answering_ms.is_some_and(&split)
        })
    };
    assert!(judge(drill(fault, mode)) || judge(drill(fault, mode)), "twice");
}

fn one_answers(ms: f64) -> bool {
    ms == 0.0
}

#[test]
fn a_peer_channel_that_is_cut_is_gone_on_with() {
    let _alone = alone();
    nobody_notices("channel-cut", "passthrough", one_answers);
    nobody_notices("channel-cut", "dsr", one_answers);
}

#[test]
fn a_joiner_that_dies_in_its_snapshot_gets_all_the_next_time() {
    let _alone = alone();
    nobody_notices("restart-in-snapshot", "passthrough", one_answers);
    nobody_notices("restart-in-snapshot", "dsr", one_answers);
}

#[test]
fn who_lags_behind_the_journal_gets_a_snapshot() {
    let _alone = alone();
    nobody_notices("journal-full", "passthrough", one_answers);
    nobody_notices("journal-full", "dsr", one_answers);
}

#[test]
fn a_wrong_key_and_another_version_are_told_and_healed() {
    let _alone = alone();
    nobody_notices("key-changed", "passthrough", one_answers);
    nobody_notices("old-version", "dsr", one_answers);
}

#[test]
fn paths_that_fail_between_relays_lose_nothing() {
    let _alone = alone();
    nobody_notices("back-link-down", "passthrough", one_answers);
    nobody_notices("one-way-in", "passthrough", one_answers);
    nobody_notices("one-way-out", "passthrough", one_answers);
    nobody_notices("restart-both", "passthrough", one_answers);
}

/// Nobody can know of the other: both answer until one hears the other again.
#[test]
fn a_partition_that_heals_leaves_one() {
    let _alone = alone();
    nobody_notices("partition", "passthrough", |ms| ms > 0.0);
}
