//! A lab as it is now.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::build::{holders, read_record};
use super::netns::Netns;
use super::topology::Role;
use super::{LabError, STATE, Software, check_name, check_root, missing, process};
use crate::control::{self, Reply, Request};
use crate::status::Status;

/// A lab as it is now.
#[derive(Debug, Clone, Serialize)]
pub struct LabStatus {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What runs on the relays.
    pub software: Software,
    /// Every node.
    pub nodes: Vec<NodeStatus>,
}

/// A node as it is now.
#[derive(Debug, Clone, Serialize)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Its namespace.
    pub namespace: String,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// What its daemon says it is: `Active`, `Backup`, …, or that it does not answer; `None` for
    /// nodes that don't run Baton.
    pub state: Option<String>,
    /// Whether its kernel has the VIP; `None` for nodes that are no relays.
    pub holds_vip: Option<bool>,
    /// Its daemons: name, process id, whether they run.
    pub daemons: Vec<(String, i32, bool)>,
}

/// How a lab is now.
pub fn status(name: &str) -> Result<LabStatus, LabError> {
    check_root()?;
    check_name(name)?;
    let record = read_record(name).ok_or_else(|| missing(name))?;
    let holders = holders(&record.topology)?;
    let dir = Path::new(STATE).join(name);
    let nodes = record.topology.nodes.iter().map(|node| {
        let namespace = record.topology.namespace(&node.name);
        let pids = Netns::existing(&namespace).pids().unwrap_or_default();
        let here = record.processes.iter().filter(|process| process.node == node.name);
        let asked = node.role == Role::Relay && record.software == Software::Baton;
        NodeStatus {
            state: asked.then(|| state(&process::socket(&dir, &node.name))),
            node: node.name.clone(),
            namespace,
            addresses: node.addresses().collect(),
            holds_vip: (node.role == Role::Relay).then(|| holders.contains(&node.name)),
            daemons: here.map(|p| (p.name.clone(), p.pid, pids.contains(&p.pid))).collect(),
        }
    });
    let nodes = nodes.collect();
    Ok(LabStatus { name: name.to_owned(), dir, software: record.software, nodes })
}

/// What the daemon behind a control socket says it is.
pub(super) fn ask(socket: &Path) -> Option<Status> {
    const PATIENCE: Duration = Duration::from_millis(500);
    match control::ask(socket, &Request::Status, PATIENCE) {
        Ok(Reply::Ok(value)) => serde_json::from_value(value).ok(),
        Ok(Reply::Error(_) | Reply::Unready(_)) | Err(_) => None,
    }
}

fn state(socket: &Path) -> String {
    match ask(socket).and_then(|status| status.election) {
        Some(election) => format!("{:?}", election.state),
        None => "no answer".to_owned(),
    }
}
