//! `baton lab up|status|exec|down` as an operator uses them. Needs root.

mod lab_support;

use std::process::Stdio;
use std::time::{Duration, Instant};

use lab_support::{Guard, baton, processes, run, text, traces};

fn name(test: &str) -> String {
    format!("bt-{test}-{}", std::process::id())
}

fn exec(lab: &str, node: &str, command: &[&str]) -> String {
    let mut args = vec!["lab", "exec", "--name", lab, node, "--"];
    args.extend(command);
    let output = run(&args);
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_lab_comes_up_serves_and_leaves_nothing() {
    let lab = name("up");
    let guard = Guard(lab.clone());
    let up = run(&["lab", "up", "--name", &lab, "--relays", "3"]);
    assert!(up.status.success(), "{}", text(&up));
    assert!(text(&up).contains("relay1 is Active"), "{}", text(&up));
    assert!(text(&up).contains(&format!("baton lab down --name {lab}")), "what to try next");

    let again = run(&["lab", "up", "--name", &lab]);
    assert!(again.status.success() && text(&again).contains("up already"), "{}", text(&again));

    let status = run(&["lab", "status", "--name", &lab, "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let nodes = status["nodes"].as_array().unwrap();
    let holds: Vec<_> = nodes.iter().filter(|node| node["holds_vip"] == true).collect();
    assert_eq!((nodes.len(), holds.len()), (7, 1), "{status}");
    assert_eq!(holds[0]["node"], "relay1");

    // Real servers, directly and through the relay; the client reaches backends without it.
    let page = exec(&lab, "client", &["curl", "-sS", "--max-time", "5", "http://10.78.0.12/"]);
    assert_eq!(page, "backend2 client=10.77.0.10\n");
    let socks = [
        "curl",
        "-sS",
        "--max-time",
        "5",
        "--retry",
        "5",
        "--retry-all-errors",
        "--retry-delay",
        "1",
        "--socks5",
        "10.77.0.100:1080",
        "http://10.78.0.1/",
    ];
    let page = exec(&lab, "client", &socks);
    assert!(page.starts_with("switch client=10.78.0.1"), "{page}");
    // IPv6 is usable at once, and routed.
    exec(&lab, "client", &["ping", "-c1", "-W2", "fd78::11"]);

    let nobody = run(&["lab", "exec", "--name", &lab, "relay9", "--", "true"]);
    assert!(!nobody.status.success() && text(&nobody).contains("relay3"), "{}", text(&nobody));

    drop(guard);
    assert_eq!(traces(&lab), [] as [String; 0]);
    let gone = run(&["lab", "status", "--name", &lab]);
    assert_eq!(gone.status.code(), Some(1), "{}", text(&gone));
    let down = run(&["lab", "down", "--name", &lab]);
    assert!(down.status.success() && text(&down).contains("nothing to do"), "{}", text(&down));
}

#[test]
fn what_a_killed_lab_up_leaves_is_removed() {
    let lab = name("kill");
    let guard = Guard(lab.clone());
    // Killed at different points: before, during and after the daemons start.
    for delay in [30, 150, 400] {
        let mut up = baton(&["lab", "up", "--name", &lab])
            .stderr(Stdio::null())
            .spawn()
            .expect("the program can be started");
        std::thread::sleep(Duration::from_millis(delay));
        up.kill().unwrap();
        up.wait().unwrap();
    }
    // The next one cleans up by itself, and so does `down`.
    let up = run(&["lab", "up", "--name", &lab]);
    assert!(up.status.success(), "{}", text(&up));
    drop(guard);
    assert_eq!(traces(&lab), [] as [String; 0]);
}

#[test]
fn two_labs_live_side_by_side_and_one_is_in_one_pair_of_hands() {
    let labs = [name("a"), name("b")];
    let guards = labs.clone().map(Guard);
    let mut children = labs
        .clone()
        .map(|lab| baton(&["lab", "up", "--name", &lab]).stderr(Stdio::null()).spawn().unwrap());
    // While one builds it, no other may.
    let deadline = Instant::now() + Duration::from_secs(5);
    while processes(&labs[0]).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    if children[0].try_wait().unwrap().is_none() {
        let other = run(&["lab", "down", "--name", &labs[0]]);
        assert!(text(&other).contains("hands of another process"), "{}", text(&other));
    }
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    drop(guards);
    for lab in labs {
        assert_eq!(traces(&lab), [] as [String; 0]);
    }
}

#[test]
fn names_that_would_reach_outside_are_refused() {
    for name in ["", "a/b", "..", "-x", "a b", &"x".repeat(41)] {
        let output = run(&["lab", "down", &format!("--name={name}")]);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", text(&output));
        assert!(text(&output).contains("lab name"), "{name}: {}", text(&output));
    }
}
