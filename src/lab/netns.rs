//! One network namespace: made, entered and removed. Uses `ip netns`, so that `ip netns exec`
//! works on it from any shell.

use std::fs::File;
use std::process::{Command, Output};
use std::{io, thread};

use nix::sched::{CloneFlags, setns};

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

    /// Ends every process in it (by process id), waits for them, and removes it.
    pub fn remove(&self) -> io::Result<()> {
        for pid in self.pids()? {
            // A process that is gone already is as good as ended.
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
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

    /// Runs `work` on a thread inside it; sockets made there stay in it, whoever uses them later.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let file = File::open(format!("/run/netns/{}", self.name))?;
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

/// Runs a command to its end; an exit status other than 0 is an error with what it printed.
pub fn run(command: &mut Command) -> io::Result<Output> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(output);
    }
    Err(io::Error::other(format!(
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}
