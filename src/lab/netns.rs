//! One network namespace: made, entered and removed. Uses `ip netns`, so that `ip netns exec`
//! works on it from any shell.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long killed processes of a namespace may take to be gone.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

/// A named network namespace. Dropping it does not remove it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with its loopback up.
    pub fn create(name: &str) -> io::Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        run(Command::new("ip").args(["-n", name, "link", "set", "lo", "up"]))?;
        Ok(Self { name: name.to_owned() })
    }

    /// A namespace that is there already.
    pub fn existing(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Ends every process in it (by process id), waits for them, and removes it.
    ///
    /// # Errors
    /// The namespace is not there, or a process outlives SIGKILL by five seconds.
    pub fn remove(&self) -> io::Result<()> {
        let deadline = Instant::now() + REMOVE_PATIENCE;
        loop {
            // Not listable: the namespace was made only half-way, and nothing runs in it.
            let pids = self.pids().unwrap_or_default();
            if pids.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!(
                    "namespace {}: processes {pids:?} do not end",
                    self.name
                )));
            }
            for pid in pids {
                // A process that is gone already is as good as ended.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(10));
        }
        run(Command::new("ip").args(["netns", "del", &self.name])).map(drop)
    }

    /// The processes in it.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let output = run(Command::new("ip").args(["netns", "pids", &self.name]))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| line.trim().parse().ok()).collect())
    }

    /// A command that will run in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs `ip -n NAME ARGS`.
    pub fn ip(&self, args: &str) -> io::Result<Output> {
        run(Command::new("ip").args(["-n", &self.name]).args(args.split_whitespace()))
    }

    /// Runs many `ip` commands in it, one a line, in one process; the first error ends it.
    pub fn ip_batch(&self, lines: &str) -> io::Result<()> {
        run_with_input(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), lines).map(drop)
    }

    /// Sets kernel parameters (`net.…`) in it.
    pub fn sysctl(&self, parameters: &[(&str, &str)]) -> io::Result<()> {
        self.enter(|| {
            for (name, value) in parameters {
                let path = format!("/proc/sys/{}", name.replace('.', "/"));
                std::fs::write(&path, value)
                    .map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
            }
            Ok(())
        })?
    }

    /// Runs `work` on a thread inside it; sockets made there stay in it, whoever uses them later.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let file = File::open(self.path())
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.name)))?;
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&file, CloneFlags::CLONE_NEWNET)?;
                    Ok(work())
                })
                .join()
                .expect("the work of a namespace thread does not panic")
        })
    }
}

/// Runs a command to its end; an exit status other than 0 is an error with what it printed. It
/// runs in a process group of its own, so that Ctrl-C does not break a clean-up half-way.
pub fn run(command: &mut Command) -> io::Result<Output> {
    let output = command.stdin(Stdio::null()).process_group(0).output()?;
    judge(command, output)
}

/// Like [`run`], with `input` on standard input.
pub fn run_with_input(command: &mut Command, input: &str) -> io::Result<Output> {
    let mut child = command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("it was asked for above");
    // A command that ends early says why on its own; the broken pipe adds nothing.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    judge(command, output)
}

fn judge(command: &Command, output: Output) -> io::Result<Output> {
    if output.status.success() {
        return Ok(output);
    }
    Err(io::Error::other(format!(
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}
