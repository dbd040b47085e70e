//! The guard of the lease, as a process: `baton run` posts it, and it removes the VIPs when the
//! daemon is dead or frozen ([`baton_ha::lease`] says when).
//!
//! It is a child of the daemon with two descriptors: standard input is the end of a pipe that
//! closes when the daemon is gone, standard output the memory of the lease. It has a process
//! group of its own, so that Ctrl-C and Ctrl-Z in the daemon's terminal do not reach it, and
//! ends by itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use baton_ha::config::{HaConfig, Vip};
use baton_ha::lease::{Guard, Lease};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::balancer::start_log;

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

/// Starts the guard. Without it the node runs all the same, and its VIPs outlive a crash until
/// the end of `valid_lft`; so what is wrong is a warning.
pub fn post(ha: &HaConfig) -> Option<Lease> {
    match try_post(ha) {
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

fn try_post(ha: &HaConfig) -> io::Result<Lease> {
    let (lease, memory) = Lease::new()?;
    let (alive, held) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
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
    let child =
        command.stdin(Stdio::from(alive)).stdout(Stdio::from(memory)).process_group(0).spawn()?;
    tracing::debug!(pid = child.id(), "guard posted");
    // The other end of the pipe is held until this process is no more, whatever ends it.
    std::mem::forget(held);
    Ok(lease)
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
        let alive = owned(&io::stdin())?;
        let lease = Lease::shared(&owned(&io::stdout())?)
            .context("`baton guard` is started by `baton run`, not by hand")?;
        let advert_interval = Duration::from_millis(self.advert_interval_ms.max(1));
        let guard = Guard { vips: self.vips, advert_interval, realtime: self.realtime };
        guard.stand(&lease, &alive, |result| match result {
            Ok(()) => tracing::warn!("the daemon no longer renews its lease: VIPs removed"),
            Err(error) => tracing::error!(
                "the daemon no longer renews its lease, and its VIPs can't be removed: {error}"
            ),
        })?;
        Ok(())
    }
}

fn owned(stream: &impl AsFd) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
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
