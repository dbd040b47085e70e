//! The lab with the kernel's modes: the service answers. Drills with them are in drill_flows.rs.
//! Needs root.

mod lab_support;

use lab_support::{Guard, run, text, traces};

const MODES: [&str; 2] = ["passthrough", "dsr"];

#[test]
fn a_lab_serves_in_the_kernels_modes() {
    for mode in MODES {
        let lab = format!("bt-mode-{mode}-{}", std::process::id());
        let guard = Guard(lab.clone());
        let up = run(&["lab", "up", "--name", &lab, "--mode", mode]);
        assert!(up.status.success(), "{}", text(&up));
        let fetch = |args: &[&str]| {
            let curl = ["curl", "-sS", "--max-time", "5", "--retry", "5", "--retry-all-errors"];
            let exec = ["lab", "exec", "--name", &lab, "client", "--"];
            let output = run(&[&exec[..], &curl, args].concat());
            assert!(output.status.success(), "{mode} {args:?}: {}", text(&output));
            String::from_utf8(output.stdout).unwrap()
        };
        let seen =
            if mode == "dsr" { ["10.77.0.10", "fd77::10"] } else { ["10.78.0.100", "fd77::100"] };
        for (url, seen) in ["http://10.77.0.100/", "http://[fd77::100]/"].into_iter().zip(seen) {
            let page = fetch(&[url]);
            assert!(
                page.starts_with("backend") && page.ends_with(&format!("client={seen}\n")),
                "{page}"
            );
        }
        let page = fetch(&["--socks5", "10.77.0.100:1080", "http://10.78.0.1/"]);
        assert!(page.starts_with("switch client=10.78.0.1"), "{page}");
        drop(guard);
        assert_eq!(traces(&lab), [] as [String; 0]);
    }
}
