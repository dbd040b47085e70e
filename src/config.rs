//! TOML → raw (unknown keys denied) → [`Config`]: a `Config` in hand is correct.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_ha::config::HaConfig;

use crate::service::Service;

/// What the file means.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file.
    pub path: PathBuf,
    /// `[node]`.
    pub node: Node,
    /// Name of the cluster.
    pub cluster: String,
    /// Election, peers and VIPs; `None` without VIPs (a node that balances on its own addresses
    /// takes part in no election).
    pub ha: HaConfig,
    /// The services, in the order of the file.
    pub services: Vec<Arc<Service>>,
}

/// `[node]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// This node's name.
    pub name: String,
    /// The control socket.
    pub control: PathBuf,
    /// How long proxied connections may take to end after SIGTERM.
    pub shutdown_grace: Duration,
    /// Threads of the runtime that carries traffic; 0: one per core.
    pub workers: usize,
    /// Default log filter, overridden by `BATON_LOG`.
    pub log: String,
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        let _ = path;
        todo!("the config helper writes this")
    }
}

/// Everything that is wrong with a file, each with its place and what to write instead.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Errors(pub Vec<String>);
