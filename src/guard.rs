//! The guard of the lease, as a process: `baton run` posts it, and it removes the VIPs when the
//! daemon is dead or frozen ([`baton_ha::lease`] says when).
//!
//! It is a child of the daemon with two descriptors: standard input is the end of a pipe that
//! closes when the daemon is gone, standard output the file of the lease. It has a process group
//! of its own, so that Ctrl-C and Ctrl-Z in the daemon's terminal do not reach it, and ends by
//! itself. One that ends before its daemon is replaced.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use baton_ha::config::{HaConfig, Vip};
use baton_ha::lease::{Guard, Lease};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::balancer::start_log;

/// Before a guard that ended is replaced.
const REPLACE_AFTER: Duration = Duration::from_secs(1);
/// What a guard that ends leaves its log for being read.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Arguments of the hidden command `baton guard`.
#[derive(Debug, clap::Args)]
pub struct GuardArgs {
    /// ADDRESS/PREFIX@INTERFACE, each of them.
    #[arg(long = "vip", value_parser = vip)]
    vips: Vec<Vip>,
    #[arg(long)]
    advert_interval_ms: u64,
    #[arg(long)]
    realtime: bool,
}

/// Starts the guard and sees to it that there is one; the lease is in a file beside the control
/// socket. Without a guard the node runs all the same, and its VIPs outlive a crash until the end
/// of `valid_lft`; so what is wrong is a warning.
pub fn post(ha: &HaConfig, control: &Path) -> Option<Lease> {
    match try_post(ha, control) {
        Ok(lease) => Some(lease),
        Err(error) => {
            tracing::warn!(
                valid_lft = ?ha.valid_lft,
                "no guard: the VIPs of a daemon that dies stay until their valid_lft: {error}"
            );
            None
        }
    }
}

fn try_post(ha: &HaConfig, control: &Path) -> io::Result<Lease> {
    let (lease, file) = Lease::take(&lease_file(control))?;
    let (alive, held) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let ha = ha.clone();
    let first = spawn(&ha, &alive, &file)?;
    // The other end of the pipe is held until this process is no more, whatever ends it.
    std::mem::forget(held);
    thread::Builder::new().name("baton-guard".to_owned()).spawn(move || {
        let mut standing = Ok(first);
        loop {
            match standing.and_then(|mut guard: Child| guard.wait()) {
                Ok(status) => tracing::warn!(%status, "the guard has ended; posting another"),
                Err(error) => tracing::warn!(%error, "no guard; trying again"),
            }
            thread::sleep(REPLACE_AFTER);
            standing = spawn(&ha, &alive, &file);
        }
    })?;
    Ok(lease)
}

/// The daemon ends in order: nothing of the lease is left behind.
pub fn dismiss(control: &Path) {
    // A node without VIPs has none.
    let _ = std::fs::remove_file(lease_file(control));
}

/// One for each daemon that may run at a time.
fn lease_file(control: &Path) -> PathBuf {
    let mut path = control.as_os_str().to_owned();
    path.push(".lease");
    path.into()
}

fn spawn(ha: &HaConfig, alive: &OwnedFd, file: &File) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("baton").arg("guard");
    for vip in &ha.vips {
        command.arg("--vip").arg(format!("{}/{}@{}", vip.address, vip.prefix, vip.interface));
    }
    let interval = ha.advert_interval.duration().as_millis();
    command.args(["--advert-interval-ms", &interval.to_string()]);
    if ha.realtime {
        command.arg("--realtime");
    }
    command.stdin(Stdio::from(alive.try_clone()?)).stdout(Stdio::from(file.try_clone()?));
    command.process_group(0).spawn()
}

impl GuardArgs {
    /// Guards until the daemon is gone and the VIPs with it.
    pub fn stand(self) -> anyhow::Result<()> {
        // Whoever stops the daemon's whole service stops the guard too, by ending the daemon.
        for ignored in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            // SAFETY: ignoring a signal runs no handler.
            unsafe { signal(ignored, SigHandler::SigIgn)? };
        }
        start_log("info")?;
        let alive = io::stdin().as_fd().try_clone_to_owned()?;
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let lease =
            Lease::shared(&file).context("`baton guard` is started by `baton run`, not by hand")?;
        let advert_interval = Duration::from_millis(self.advert_interval_ms.max(1));
        let guard = Guard { vips: self.vips, advert_interval, realtime: self.realtime };
        let mut words = None;
        guard.stand(&lease, &alive, |result| {
            words = thread::Builder::new().spawn(|| say(result)).ok()
        })?;
        if words.is_some_and(|words| !words.is_finished()) {
            thread::sleep(LAST_WORDS);
        }
        Ok(())
    }
}

/// On a thread of its own: a reader of the log that has stopped must not stop the guard.
fn say(removal: Result<(), String>) {
    match removal {
        Ok(()) => tracing::warn!("the daemon no longer renews its lease: VIPs removed"),
        Err(error) => tracing::error!(
            "the daemon no longer renews its lease, and its VIPs can't be removed: {error}"
        ),
    }
}

fn vip(text: &str) -> Result<Vip, String> {
    let parse = || {
        let (address, interface) = text.split_once('@')?;
        let (address, prefix) = address.split_once('/')?;
        Some(Vip {
            address: address.parse().ok()?,
            prefix: prefix.parse().ok()?,
            interface: interface.to_owned(),
        })
    };
    parse().ok_or_else(|| "write ADDRESS/PREFIX@INTERFACE".into())
}
