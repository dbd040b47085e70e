//! The lab: a client, relays, backends and a switch as network namespaces joined by veths, with
//! real daemons in them; and the drills that break something in it.
//!
//! Modules in reading order:
//!
//! * [`topology`]: what a lab consists of, as data.
//! * [`netns`], `wiring`: made real.
//! * `files`, [`process`]: the daemons' configuration, and how they are started and ended.
//! * [`Lab`]: a lab in hand; [`up`], [`down`], [`status`], [`exec`]: what the commands do.
//! * `many`: flows by the thousand, without a network.
//! * [`drill`]: canary traffic, a fault, a report.
//! * [`mod@bench`]: Baton beside others, and what a packet costs.
//! * [`echo`]: the echo server of the backends.
//! * [`cli`]: the commands.
//!
//! Everything that a lab leaves on the machine is in `/run/baton-lab/NAME` and in the namespaces
//! that its `lab.json` names, so that [`down`] finds all of it even after `kill -9`.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod bench;
mod build;
pub mod cli;
pub mod drill;
pub mod echo;
mod files;
mod many;
pub mod netns;
pub mod process;
mod state;
pub mod topology;
mod wiring;

pub use build::Lab;
use build::{Record, hold, read_record, remove_remains};
use netns::Netns;
use process::Lifetime;
pub use state::{LabStatus, NodeStatus, status};

/// Between two heartbeats, unless something else is asked for.
pub const HEARTBEAT: Duration = Duration::from_millis(10);

/// Where every lab has its directory.
pub const STATE: &str = "/run/baton-lab";

/// What a lab is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabOptions {
    /// Its name, see [`check_name`].
    pub name: String,
    /// How many relays, 1–[`topology::MAX_RELAYS`].
    pub relays: usize,
    /// How they are plugged in. With one link the lab has no configuration for them that works.
    pub links: topology::Links,
    /// The `baton` program.
    pub binary: PathBuf,
    /// What runs on the relays.
    pub software: Software,
    /// How they forward, if that is Baton.
    pub mode: Mode,
    /// What runs on the backends.
    pub servers: Servers,
    /// Advertisement interval of the relays.
    pub advert_interval: Duration,
    /// Between two heartbeats on the peer channel, where there is one.
    pub heartbeat: Duration,
    /// Whether relays have a service whose flows are made in the kernel, and tables for so many.
    pub many: Option<u32>,
    /// Whether the lab outlives its maker.
    pub lifetime: Lifetime,
}

/// What runs on the relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Software {
    /// `baton run`.
    Baton,
    /// keepalived, with nftables forwarding: the peer to compare with.
    Keepalived,
    /// The same, with conntrackd replicating the kernel's connections (FT-FW, external cache off).
    Conntrackd,
}

impl Software {
    /// Whether it is Baton's.
    pub fn is_baton(self) -> bool {
        self == Self::Baton
    }

    /// What it is called in reports.
    pub fn title(self) -> &'static str {
        match self {
            Self::Baton => "Baton",
            Self::Keepalived => "keepalived",
            Self::Conntrackd => "keepalived + conntrackd",
        }
    }

    /// As on the command line and in the names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baton => "baton",
            Self::Keepalived => "keepalived",
            Self::Conntrackd => "conntrackd",
        }
    }
}

/// How `baton run` forwards on the relays; what it does not say is as the configuration has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Connections are terminated on the relay.
    Proxy,
    /// Packets are rewritten in the kernel.
    Passthrough,
    /// In the kernel too; replies go straight to the client.
    Dsr,
}

impl Mode {
    /// As configurations and reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Passthrough => "passthrough",
            Self::Dsr => "dsr",
        }
    }
}

/// What runs on the backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Servers {
    /// Echo, web and SOCKS servers.
    All,
    /// Echo servers only.
    Echo,
}

/// Why a lab could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Namespaces need root.
    #[error("a lab needs root for its network namespaces: run it with sudo")]
    NotRoot,
    /// A name that can't be part of a namespace's.
    #[error("lab name '{0}': write 1–40 letters, digits or dashes, the first not a dash")]
    Name(String),
    /// Another process is at it.
    #[error("lab '{0}' is in the hands of another process: wait for it, or choose another --name")]
    Busy(String),
    /// There is no such lab.
    #[error("there is no lab '{0}': make it with `baton lab up{1}`")]
    Missing(String, String),
    /// There is no such node in it.
    #[error("lab '{lab}' has no node '{node}': it has {}", nodes.join(", "))]
    NoNode {
        /// The lab.
        lab: String,
        /// The node asked for.
        node: String,
        /// The nodes that there are.
        nodes: Vec<String>,
    },
    /// A daemon did not start, or did not get ready.
    #[error("{node}: {name} {what}; its log {log} ends:\n{tail}")]
    Daemon {
        /// Its node.
        node: String,
        /// Its name.
        name: String,
        /// What is wrong.
        what: String,
        /// Its log file.
        log: String,
        /// The last lines of it.
        tail: String,
    },
    /// The relays are up, but nobody is served.
    #[error("the service behind the VIP was not steady within {0:?}; see the logs in {1}")]
    Silent(Duration, String),
    /// A signal asked to end.
    #[error("interrupted")]
    Interrupted,
    /// A system call or a program failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// The error.
        #[source]
        source: io::Error,
    },
}

/// Names what was being done when an I/O error came.
trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, LabError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, LabError> {
        self.map_err(|source| LabError::Io { doing: what.into(), source })
    }
}

/// Whether a name can be a lab's.
///
/// # Errors
/// [`LabError::Name`] unless 1–40 ASCII letters, digits or dashes, the first not a dash.
pub fn check_name(name: &str) -> Result<(), LabError> {
    let fits = (1..=40).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    fits.then_some(()).ok_or_else(|| LabError::Name(name.to_owned()))
}

fn check_root() -> Result<(), LabError> {
    nix::unistd::geteuid().is_root().then_some(()).ok_or(LabError::NotRoot)
}

/// What [`up`] came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Up {
    /// It was up already.
    Already,
    /// It is up now, and this relay is Active.
    Made {
        /// The relay that holds the VIP.
        active: String,
    },
}

/// Makes a lab and starts everything in it, unless it is up already.
pub fn up(options: &LabOptions, say: &mut dyn FnMut(&str)) -> Result<Up, LabError> {
    check_root()?;
    check_name(&options.name)?;
    let held = hold(&options.name)?;
    if read_record(&options.name).is_some_and(|record| intact(&record)) {
        return Ok(Up::Already);
    }
    let mut lab = Lab::build_held(options.clone(), held, say)?;
    say(match options.software {
        Software::Baton => "starting `baton run` on every relay",
        Software::Keepalived => "starting keepalived on every relay",
        Software::Conntrackd => "starting conntrackd and keepalived on every relay",
    });
    let active = lab.start_relays()?;
    lab.record(true)?;
    Ok(Up::Made { active })
}

/// Everything runs that ran when the lab was complete.
fn intact(record: &Record) -> bool {
    record.complete
        && record.topology.nodes.iter().all(|node| {
            let netns = Netns::existing(&record.topology.namespace(&node.name));
            let pids = netns.pids().unwrap_or_default();
            let mut here = record.processes.iter().filter(|process| process.node == node.name);
            netns.exists() && here.all(|process| pids.contains(&process.pid))
        })
}

/// Removes a lab; `false` if there is none.
pub fn down(name: &str) -> Result<bool, LabError> {
    check_root()?;
    check_name(name)?;
    let _held = hold(name)?;
    remove_remains(name)
}

/// The names of all labs on this machine.
pub fn names() -> Vec<String> {
    let entries = std::fs::read_dir(STATE).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn missing(name: &str) -> LabError {
    let flag = if name == cli::DEFAULT_NAME { String::new() } else { format!(" --name {name}") };
    LabError::Missing(name.to_owned(), flag)
}

/// Becomes a command that runs in a node of a lab. `baton` in it is this program, and its
/// commands speak to the relay of that node.
pub fn exec(
    name: &str,
    node: &str,
    command: &[String],
) -> Result<std::convert::Infallible, LabError> {
    check_root()?;
    check_name(name)?;
    let record = read_record(name).ok_or_else(|| missing(name))?;
    let Some(found) = record.topology.node(node) else {
        let nodes = record.topology.nodes.into_iter().map(|node| node.name).collect();
        return Err(LabError::NoNode { lab: name.to_owned(), node: node.to_owned(), nodes });
    };
    let (program, args) = command.split_first().expect("clap asks for a command");
    let netns = Netns::existing(&record.topology.namespace(&found.name));
    let mut command = netns.command(program);
    command.args(args).envs(process::environment(&Path::new(STATE).join(name), node));
    if let Some(dir) = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned))
    {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", dir.display()));
    }
    let error = command.exec();
    Err(LabError::Io { doing: format!("running {program} in {}", netns.name()), source: error })
}
