//! A daemon of the lab: started in its namespace with its output in a log file, ended by its own
//! process id.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::netns::Netns;

/// Whether the daemons of a lab outlive the process that started them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// They stay until `lab down`.
    Detached,
    /// The kernel kills them when the thread that started them ends, even by SIGKILL.
    WithParent,
}

/// How a daemon is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// Its name within the node; its log is `NODE-NAME.log`.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
}

/// What is known of a daemon once it was started; kept in the lab's state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The node that it runs on.
    pub node: String,
    /// Its name within the node.
    pub name: String,
    /// Its process id.
    pub pid: i32,
    /// Where its output goes.
    pub log: PathBuf,
}

/// A running daemon. Dropping it does not end it.
#[derive(Debug)]
pub struct Process {
    /// What is known of it.
    pub started: Started,
    child: Child,
}

impl Daemon {
    /// A daemon of that name.
    pub fn new<A: Into<String>>(
        name: &str,
        program: impl Into<PathBuf>,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        Self {
            name: name.to_owned(),
            program: program.into(),
            args: args.into_iter().map(Into::into).collect(),
        }
    }

    /// Starts it on a node; its log in `dir` is appended to.
    pub fn start(
        &self,
        netns: &Netns,
        node: &str,
        dir: &Path,
        lifetime: Lifetime,
    ) -> io::Result<Process> {
        let log = dir.join(format!("{node}-{}.log", self.name));
        let out = OpenOptions::new().create(true).append(true).open(&log)?;
        let program = self.program.to_str().ok_or_else(|| {
            io::Error::other(format!("{}: the path is not UTF-8", self.program.display()))
        })?;
        let mut command = netns.command(program);
        command.args(&self.args).current_dir("/").envs(environment(dir, node));
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        tie(&mut command, lifetime);
        let child = command.spawn()?;
        // `ip netns exec` becomes the program, so this is the program's process id too.
        let pid = child.id() as i32;
        let started = Started { node: node.to_owned(), name: self.name.clone(), pid, log };
        Ok(Process { started, child })
    }
}

/// The control socket of the relay on a node.
pub fn socket(dir: &Path, node: &str) -> PathBuf {
    dir.join(format!("{node}.sock"))
}

/// Where the relay on a node keeps what outlives its daemon.
pub fn state(dir: &Path, node: &str) -> PathBuf {
    dir.join(format!("{node}.state"))
}

/// Where the commands find the relay on a node, for their environment.
pub fn environment(dir: &Path, node: &str) -> [(&'static str, PathBuf); 2] {
    let journal = crate::explain::path(&state(dir, node));
    [("BATON_SOCKET", socket(dir, node)), ("BATON_JOURNAL", journal)]
}

/// Gives the process a session of its own, out of the reach of the terminal's Ctrl-C, and ties
/// its life to this thread's where that is wanted.
fn tie(command: &mut Command, lifetime: Lifetime) {
    let before_exec = move || {
        nix::unistd::setsid()?;
        if lifetime == Lifetime::WithParent {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and touches no memory
    // but its own.
    unsafe { command.pre_exec(before_exec) };
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.started.pid
    }

    /// Whether it has ended; `Some` says how.
    pub fn ended(&mut self) -> io::Result<Option<std::process::ExitStatus>> {
        self.child.try_wait()
    }

    /// Sends SIGTERM and waits; SIGKILL once `patience` is over. Says how long it took.
    pub fn terminate(&mut self, patience: Duration) -> io::Result<Duration> {
        let begun = Instant::now();
        if self.ended()?.is_some() {
            return Ok(Duration::ZERO);
        }
        signal(self.pid(), Signal::SIGTERM)?;
        while self.ended()?.is_none() {
            if begun.elapsed() > patience {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(begun.elapsed())
    }

    /// The last lines of its log, to explain why it ended.
    pub fn log_tail(&self) -> String {
        tail(&self.started.log)
    }
}

/// Sends a signal to a process.
pub fn signal(pid: i32, signal: Signal) -> io::Result<()> {
    kill(Pid::from_raw(pid), signal).map_err(io::Error::from)
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    const LINES: usize = 12;
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Writes a file of the lab's directory.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    File::create(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
