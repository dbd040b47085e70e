//! External programs: what they are given, what is made of their end, and that nothing of them
//! stays.

use std::os::fd::AsRawFd;
use std::time::Duration;

use baton::health::Checks;
use baton::pool::Health;
use baton::service::Probe;

use crate::support::*;

fn shell(text: &str) -> Probe {
    Probe::Script { command: ["/bin/sh", "-c", text].map(str::to_owned).to_vec() }
}

fn backend() -> std::net::SocketAddr {
    "[fd78::11]:1080".parse().expect("an address")
}

#[test]
fn the_exit_status_decides_and_the_first_line_says_why() {
    let endless = down("no answer within 2s (the script still runs and prints without end)");
    let rows = vec![
        (shell("exit 0"), up()),
        (shell("echo fine; sleep 0.1"), up()),
        (shell("exit 3"), down("script: exit status 3")),
        (
            shell("echo; echo disk full; echo more; exit 1"),
            down("script: exit status 1: disk full"),
        ),
        (shell("echo lost >&2; exit 1"), down("script: exit status 1: lost")),
        (shell("kill -9 $$"), down("script: ended by signal 9")),
        (shell("sleep 100"), down("no answer within 2s (the script still runs)")),
        (shell("while :; do echo yes; done"), endless.clone()),
        (Probe::Script { command: vec!["/usr/bin/yes".into()] }, endless),
        (
            Probe::Script { command: vec!["/nowhere/check".into()] },
            down("script: no such file or directory"),
        ),
        // Found by PATH, and its own output closed early is nothing to wait for.
        (Probe::Script { command: vec!["true".into()] }, up()),
        (shell("exec >&- 2>&-; sleep 0.2; exit 0"), up()),
        // More output than is kept, none of it in the way of the end.
        (shell("head -c 500000 /dev/zero; exit 0"), up()),
    ];
    let (probes, expected): (Vec<_>, Vec<_>) =
        rows.into_iter().map(|(probe, expected)| ((probe, backend()), expected)).unzip();
    for ((probe, seen), expected) in probes.clone().into_iter().zip(verdicts(probes)).zip(expected)
    {
        assert_eq!(seen, expected, "{probe:?}");
    }
}

#[test]
fn a_script_gets_what_is_documented_and_no_more() {
    let dir = tempfile::tempdir().expect("a directory");
    // One that a careless library has left inheritable.
    let file = std::fs::File::open("/dev/null").expect("a file");
    // SAFETY: the descriptor is open, and stays so.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
    // And an input of ours that never ends.
    let (input, _writer) = std::io::pipe().expect("a pipe");
    // SAFETY: both descriptors are open; nothing in these tests reads from the first.
    unsafe { libc::dup2(input.as_raw_fd(), 0) };
    let text = format!(
        "cd {}; env | sort > env; ls /proc/$$/fd > fds; cat > input; echo $(($$ - $(cut -d' ' -f5 /proc/$$/stat))) > group",
        dir.path().display()
    );
    assert_eq!(verdicts(vec![(shell(&text), backend())]), [up()]);
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("a file");
    let env = read("env");
    let names: Vec<_> = env.lines().filter_map(|line| line.split('=').next()).collect();
    // PWD and OLDPWD are the shell's own.
    let given: Vec<_> =
        names.iter().filter(|name| !["PWD", "OLDPWD", "_", "SHLVL"].contains(name)).collect();
    assert_eq!(
        given,
        [&"BATON_ADDRESS", &"BATON_BACKEND", &"BATON_PORT", &"BATON_SERVICE", &"PATH"]
    );
    for line in
        ["BATON_ADDRESS=fd78::11", "BATON_BACKEND=b1080", "BATON_PORT=1080", "BATON_SERVICE=s0"]
    {
        assert!(env.lines().any(|seen| seen == line), "{env}");
    }
    let fds: Vec<_> = read("fds")
        .lines()
        .map(str::to_owned)
        .filter(|fd| fd.len() == 1 && fd.as_str() <= "9")
        .collect();
    // The fourth is the shell's own script or listing, never a fifth of ours.
    assert_eq!(&fds[..3], ["0", "1", "2"]);
    assert!(!read("fds").lines().any(|fd| fd == file.as_raw_fd().to_string()), "{fds:?}");
    assert_eq!(read("input"), "");
    assert_eq!(read("group"), "0\n", "the script leads its process group");
}

#[test]
fn a_script_that_overruns_is_killed_with_its_children() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("group");
    let text =
        format!("sleep 1000 & (sleep 1000 & sleep 1000) & echo $$ > {}; wait", file.display());
    let pools = [pool("s", &check(shell(&text)), &[backend()])];
    with_checks(&pools, |pools| {
        eventually("the script runs", || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'))
        });
        let id = std::fs::read_to_string(&file).expect("a file").trim().parse().expect("a number");
        eventually("its children run", || group(id).len() >= 4);
        assert_eq!(
            first_verdict(&pools[0].members[0]),
            down("no answer within 2s (the script still runs)")
        );
        eventually("all of it is gone, zombies too", || group(id).is_empty());
    });
}

#[test]
fn what_a_script_leaves_behind_when_it_ends_is_killed_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("group");
    let text = format!("sleep 1000 & echo $$ > {}; exit 0", file.display());
    let pools = [pool("s", &check(shell(&text)), &[backend()])];
    with_checks(&pools, |pools| {
        assert_eq!(first_verdict(&pools[0].members[0]), up());
        let id = std::fs::read_to_string(&file).expect("a file").trim().parse().expect("a number");
        eventually("all of it is gone, zombies too", || group(id).is_empty());
    });
}

#[test]
fn a_script_ends_with_its_check() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("group");
    let text = format!("echo $$ > {}; sleep 1000", file.display());
    let mut check = check(shell(&text));
    (check.interval, check.timeout) = (PATIENCE, PATIENCE);
    let pools = [pool("s", &check, &[backend()])];
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut checks = runtime.block_on(async { Checks::start(&pools) });
    eventually("the script runs", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.ends_with('\n'))
    });
    let id = std::fs::read_to_string(&file).expect("a file").trim().parse().expect("a number");
    assert!(!group(id).is_empty());
    runtime.block_on(async { checks.apply(&[]) });
    eventually("all of it is gone, zombies too", || group(id).is_empty());
    assert_eq!(pools[0].members[0].health(), Health::Unknown);
    runtime.shutdown_timeout(Duration::from_secs(1));
}
