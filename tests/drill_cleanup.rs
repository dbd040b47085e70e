//! However a drill ends, nothing stays. Needs root.

mod lab_support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use lab_support::{Guard, baton, processes, traces};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Starts a drill and waits until it has broken something, so that all is running.
fn begun() -> (Child, String) {
    let mut child = baton(&["drill", "power-off", "--report", "/dev/null"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    let lab = format!("drill-{}", child.id());
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    while !said.last().is_some_and(|line: &String| line.contains("fault: ")) {
        match lines.next() {
            Some(line) => said.push(line.unwrap()),
            None => panic!("the drill ended early:\n{}", said.join("\n")),
        }
    }
    // The pipe stays open for the drill's last words.
    std::thread::spawn(move || lines.for_each(drop));
    assert!(processes(&lab).len() >= 3, "{:?}", processes(&lab));
    (child, lab)
}

fn wait(child: &mut Child) -> std::process::ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("the drill did not end within 20 s of the signal");
}

#[test]
fn ctrl_c_in_the_middle_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (mut child, lab) = begun();
        let guard = Guard(lab.clone());
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let status = wait(&mut child);
        assert_eq!(status.code(), Some(130), "{signal}");
        assert_eq!(traces(&lab), [] as [String; 0], "{signal}");
        drop(guard);
    }
}

#[test]
fn sigkill_leaves_no_process_and_lab_down_removes_the_rest() {
    let (mut child, lab) = begun();
    let guard = Guard(lab.clone());
    child.kill().unwrap();
    child.wait().unwrap();
    // The kernel kills the daemons.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !processes(&lab).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(processes(&lab), [] as [String; 0]);
    assert!(!traces(&lab).is_empty(), "its namespaces are left for `lab down`");
    drop(guard);
    assert_eq!(traces(&lab), [] as [String; 0]);
}
