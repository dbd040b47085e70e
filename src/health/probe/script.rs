//! An external program: exit status 0 is success; otherwise the first line it prints is the
//! reason.
//!
//! It runs in a process group of its own, with nothing of this process but standard output and
//! error, and an environment of `PATH` and what [`Probe::Script`](crate::service::Probe::Script)
//! names. When it ends, or when the probe is dropped, every process of the group is killed. A
//! process that leaves the group (`setsid`) leaves our reach.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::{ProbeError, Progress, Target, printable};

/// Bytes kept of what it prints; those after are read and dropped.
const KEPT: usize = 4096;

/// Bytes read of what it prints; one that prints more waits until its time is up.
const READ: usize = 1024 * 1024;

/// Characters of the reason.
const REASON: usize = 200;

/// Runs the program to its end.
pub(super) async fn run(
    command: &[String],
    target: &Target,
    progress: &Progress,
) -> Result<(), ProbeError> {
    let (mut group, mut output) = Group::start(command, target)
        .map_err(|source| ProbeError::Start { what: "script", source })?;
    progress.reach("the script still runs");
    let mut printed = Vec::new();
    tokio::select! {
        // Output first: when it has ended, what it printed is read too.
        biased;
        never = collect(&mut output, &mut printed, progress) => match never {},
        ended = group.ended() => ended.map_err(broken)?,
    }
    let status = group.finish().await.map_err(broken)?;
    verdict(status, &printed)
}

fn broken(source: io::Error) -> ProbeError {
    ProbeError::Broken { reached: "waiting for the script", source }
}

/// Keeps the beginning of the output; never ends, the script does.
async fn collect(
    output: &mut pipe::Receiver,
    kept: &mut Vec<u8>,
    progress: &Progress,
) -> std::convert::Infallible {
    let mut chunk = [0; 4096];
    let mut read = 0;
    while let Ok(count @ 1..) = output.read(&mut chunk).await {
        kept.extend_from_slice(&chunk[..count.min(KEPT - kept.len())]);
        read += count;
        if read > READ {
            progress.reach("the script still runs and prints without end");
            break;
        }
    }
    std::future::pending().await
}

fn verdict(status: ExitStatus, printed: &[u8]) -> Result<(), ProbeError> {
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("script: exit status {code}"),
        (None, Some(signal)) => format!("script: ended by signal {signal}"),
        (None, None) => "script: ended oddly".to_owned(),
    };
    let first = printed.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty());
    Err(ProbeError::Answer(match first {
        None => how,
        Some(line) => format!("{how}: {}", reason(line)),
    }))
}

/// A line as it is, where it is plain text, and escaped otherwise.
fn reason(line: &[u8]) -> String {
    match str::from_utf8(line.trim_ascii()) {
        Ok(text) if !text.chars().any(char::is_control) => text.chars().take(REASON).collect(),
        _ => printable(line),
    }
}

/// A process group whose leader is not waited for yet, so that its number is still ours.
struct Group {
    leader: Option<Child>,
    id: Pid,
    exit: AsyncFd<OwnedFd>,
}

impl Group {
    fn start(command: &[String], target: &Target) -> io::Result<(Self, pipe::Receiver)> {
        let [program, arguments @ ..] = command else {
            return Err(io::Error::other("the check names no program"));
        };
        let (reader, writer) = io::pipe()?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
            .env("BATON_BACKEND", &target.backend)
            .env("BATON_ADDRESS", target.address.ip().to_string())
            .env("BATON_PORT", target.address.port().to_string())
            .env("BATON_SERVICE", &target.service)
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .process_group(0)
            .kill_on_drop(true);
        // SAFETY: between fork and exec only a system call is made, and no memory is touched.
        unsafe { command.pre_exec(close_on_exec) };
        let leader = command.spawn()?;
        let id = leader.id().ok_or(Errno::ESRCH)?;
        // SAFETY: an `OwnedFd` is the same open descriptor as long as it lives.
        let exit = unsafe { AsyncFd::register_with_interest(pidfd(id)?, Interest::READABLE)? };
        let group = Self { leader: Some(leader), id: Pid::from_raw(id.cast_signed()), exit };
        Ok((group, pipe::Receiver::from_owned_fd(reader.into())?))
    }

    /// Waits until the leader has ended, and leaves it as a zombie.
    async fn ended(&mut self) -> io::Result<()> {
        self.exit.readable().await.map(drop)
    }

    /// Kills what the leader left behind and says how it ended.
    async fn finish(mut self) -> io::Result<ExitStatus> {
        let Some(mut leader) = self.leader.take() else { return Err(Errno::ECHILD.into()) };
        kill(self.id);
        leader.wait().await
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(mut leader) = self.leader.take() {
            kill(self.id);
            // So that it does not stay a zombie; it dies in its own time.
            tokio::spawn(async move { leader.wait().await });
        }
    }
}

/// Only while the leader is not waited for: after that the number may be somebody else's.
fn kill(group: Pid) {
    // Its last process may have ended by itself.
    let _ = killpg(group, Signal::SIGKILL);
}

/// Whatever this process was started with stays here.
fn close_on_exec() -> io::Result<()> {
    // SAFETY: takes no pointer; the descriptors stay open until exec, whose errors travel on one.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// A descriptor that is readable once the process has ended.
fn pidfd(process: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just opened it for us, close-on-exec, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_is_the_reason() {
        let verdict = |status, printed: &[u8]| {
            verdict(ExitStatus::from_raw(status), printed).map_err(|error| error.to_string())
        };
        assert_eq!(verdict(0, b"fine"), Ok(()));
        assert_eq!(verdict(0x200, b""), Err("script: exit status 2".into()));
        assert_eq!(verdict(9, b"\n"), Err("script: ended by signal 9".into()));
        assert_eq!(
            verdict(0x100, "\n  disk ä full \nmore".as_bytes()),
            Err("script: exit status 1: disk ä full".into())
        );
        assert_eq!(
            verdict(0x100, b"\x1b[31mred\n"),
            Err(r#"script: exit status 1: "\x1b[31mred""#.into())
        );
        let long = verdict(0x100, &[b'a'; KEPT]).expect_err("not 0");
        assert_eq!(long.len(), "script: exit status 1: ".len() + REASON);
    }
}
