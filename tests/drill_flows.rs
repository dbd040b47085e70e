//! What replication is for: whatever happens to the Active, connections of kernel services go on.
//! Needs root.
//!
//! No bound on time here, but drills count a connection that is silent for long as lost, and the
//! machine may be busy: a drill that loses one is run once more, with the loss printed.

// Each test file uses its part.
#[allow(dead_code)]
mod lab_support;

use baton::lab::drill::report::{Report, Run};
use lab_support::{baton, text};

fn drill(fault: &str, mode: &str) -> Run {
    let (fault, times) = fault.split_once(' ').unwrap_or((fault, "1"));
    let arguments = ["drill", fault, "--times", times, "--mode", mode, "--rate", "100", "--json"];
    let output =
        baton(&[&arguments[..], &["--report", "/dev/null"]].concat()).output().expect("it starts");
    assert!(output.status.success(), "{}", text(&output));
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(&*report.mode, mode);
    report.runs.into_iter().next().unwrap()
}

fn nothing_is_lost(fault: &str, mode: &str) {
    let judge = |run: &Run| {
        let connections = &run.connections;
        println!("{fault}, {mode}: {connections:?}, two answering {:?} ms", run.two_answering_ms);
        connections.kept == 20
            && connections.lost == 0
            && run.wrong_bytes == 0
            && run.two_answering_ms == Some(0.0)
    };
    assert!(judge(&drill(fault, mode)) || judge(&drill(fault, mode)), "twice");
}

#[test]
fn passthrough_connections_outlive_what_happens_to_the_active() {
    for fault in ["kill", "power-off", "pause", "link-down", "takeover"] {
        nothing_is_lost(fault, "passthrough");
    }
}

#[test]
fn dsr_connections_do_too() {
    nothing_is_lost("power-off", "dsr");
}

#[test]
fn planned_takeovers_back_and_forth_lose_nothing() {
    nothing_is_lost("takeover 5", "passthrough");
    nothing_is_lost("takeover 2", "dsr");
}

#[test]
fn a_kill_in_the_middle_of_a_takeover_leaves_one_active_and_every_connection() {
    for fault in ["takeover-kill", "takeover-kill-backup"] {
        nothing_is_lost(fault, "passthrough");
    }
}
