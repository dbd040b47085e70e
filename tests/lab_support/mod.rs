//! What the tests of the lab and of drills share: the program, and what a lab leaves behind.

use std::path::Path;
use std::process::{Command, Output};

/// The program under test.
pub(crate) fn baton(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(args).env_remove("RUST_BACKTRACE");
    command
}

/// Runs it to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    baton(args).output().expect("the program can be started")
}

/// Standard output and error, for assertions.
pub(crate) fn text(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Everything on this machine that belongs to a lab: namespaces, its directory, processes that
/// run in its namespaces or have its name on their command line.
pub(crate) fn traces(lab: &str) -> Vec<String> {
    let mut found = Vec::new();
    let prefix = format!("{lab}-");
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) {
            found.push(format!("namespace {name}"));
        }
    }
    let dir = Path::new("/run/baton-lab").join(lab);
    if dir.exists() {
        found.push(format!("directory {}", dir.display()));
    }
    found.extend(processes(lab));
    found
}

/// Processes with the lab's directory or namespaces on their command line, or its control socket
/// in their environment: every daemon of a lab has the latter.
pub(crate) fn processes(lab: &str) -> Vec<String> {
    let marks = [format!("/run/baton-lab/{lab}/"), format!("netns exec {lab}-")];
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("there is /proc").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<u32>() else { continue };
        if pid == std::process::id() {
            continue;
        }
        let read = |file: &str| {
            let bytes = std::fs::read(entry.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let command = read("cmdline");
        let all = format!("{command} {}", read("environ"));
        if !command.is_empty() && marks.iter().any(|mark| all.contains(mark)) {
            found.push(format!("process {pid} {command}"));
        }
    }
    found
}

/// Takes a lab down when a test ends, however it ends.
pub(crate) struct Guard(pub(crate) String);

impl Drop for Guard {
    fn drop(&mut self) {
        let output = run(&["lab", "down", "--name", &self.0]);
        if !output.status.success() && !std::thread::panicking() {
            panic!("lab down: {}", text(&output));
        }
    }
}
