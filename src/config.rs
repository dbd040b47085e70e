//! TOML → tables under a schema → [`Config`]; a `Config` in hand is correct.
//!
//! The way of a file: `Config::load` reads it, `toml` parses it into values with their places,
//! `section` holds each table against its schema, `value` reads single values, and `node`,
//! `cluster`, `vips`, `election` with `paths`, `checks` and `services` turn the tables into types.
//! Whatever does not fit is reported (`problem`) with its place and what to write instead, and the
//! reading goes on, so that one run tells everything that is wrong. No part of this looks at the
//! machine; [`system`] does: whether its interfaces can carry what the file says. [`describe()`]
//! tells people and programs what a `Config` means, [`reload_blockers`] what a new one may change.
//!
//! docs/config.md lists every key.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_ha::config::HaConfig;
use toml::de::DeTable;

use crate::datapath::hooks::Choice;
use crate::service::{Check, Service};

mod checks;
mod cluster;
mod datapath;
mod describe;
mod duration;
mod election;
mod flows;
mod modes;
mod node;
mod paths;
mod problem;
mod reload;
mod section;
mod services;
pub mod system;
mod value;
mod vips;

pub use cluster::Channel;
pub use describe::{active_down_interval, describe, describe_json};
pub use duration::show as show_duration;
pub use problem::{Errors, Place, Problem, Severity};
pub use reload::reload_blockers;

use problem::{Report, Source};
use section::{At, ROOT, Section};

/// The file that is read where none is named.
pub const DEFAULT_PATH: &str = "/etc/baton/baton.toml";

/// Longest file that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// What the file means.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file.
    pub path: PathBuf,
    /// `[node]`.
    pub node: Node,
    /// Name of the cluster.
    pub cluster: String,
    /// The peer channel, if the file has one.
    pub channel: Option<Channel>,
    /// Election, peers and VIPs; `None` without VIPs (a node that balances on its own addresses
    /// takes part in no election).
    pub ha: Option<HaConfig>,
    /// How long this node, as Active, lets a peer see more healthy backends before it gives way to
    /// it; `None`: for ever.
    pub sick_after: Option<Duration>,
    /// The VIPs' names, in the order of [`HaConfig::vips`]; empty without VIPs.
    pub vip_names: Vec<String>,
    /// `[datapath]`.
    pub datapath: Datapath,
    /// The services, in the order of the file.
    pub services: Vec<Arc<Service>>,
    /// The checks, in the order of the file, those that no service uses too.
    pub checks: Vec<Arc<Check>>,
    /// What the file hardly means as it says it.
    pub warnings: Vec<Problem>,
    source: Source,
    places: Places,
}

/// Where the file says what the machine must have; [`system`] points there.
#[derive(Debug, Clone)]
struct Places {
    /// Of each VIP.
    vips: Vec<vips::Places>,
    /// Each of `election.interfaces` that the file names.
    interfaces: Vec<At<String>>,
    /// Of each service: where it listens.
    services: Vec<Range<usize>>,
    /// Of each check: its name.
    checks: Vec<Range<usize>>,
}

/// `[node]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// This node's name.
    pub name: String,
    /// The control socket.
    pub control: PathBuf,
    /// Where it keeps what outlives its daemon.
    pub state_dir: PathBuf,
    /// How long proxied connections may take to end after SIGTERM.
    pub shutdown_grace: Duration,
    /// Threads of the runtime that carries traffic; 0: one per core.
    pub workers: usize,
    /// Default log filter, overridden by `BATON_LOG`.
    pub log: String,
}

/// `[datapath]`: how much the tables in the kernel hold. They are made when the first service
/// needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datapath {
    /// Established flows. One more stays half-open, and its packets are dropped and counted.
    pub flows: u32,
    /// Half-open flows; the oldest make room for the newest.
    pub half_open_flows: u32,
    /// Where packets are taken.
    pub hook: Choice,
    /// Clients whose backend is remembered, of services with `affinity`.
    pub affinities: u32,
}

impl Default for Datapath {
    fn default() -> Self {
        Self { flows: 131_072, half_open_flows: 32_768, affinities: 65_536, hook: Choice::Auto }
    }
}

impl Config {
    /// Reads and checks a file, without looking at the machine.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        let text = read(path)?;
        Self::parse(path, &text)
    }

    /// What `text` means; `path` is what errors call it.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Errors> {
        let source = Source::new(path, text);
        let report = Report::default();
        let document = match DeTable::parse(text) {
            Ok(document) => document,
            Err(error) => {
                syntax(&source, &report, &error);
                return Err(Errors::among(&source, report.into_drafts())
                    .expect_err("a syntax error has been reported"));
            }
        };
        // What a missing table is complained of at.
        let start = 0..text.find('\n').unwrap_or(text.len());
        let root = Section::new(&ROOT, document.get_ref(), start, &report);
        let parts = Parts::read(&root);

        let warnings = Errors::among(&source, report.into_drafts())?;
        Ok(parts.join(source, warnings))
    }

    /// The name of a VIP.
    pub fn vip_name(&self, address: IpAddr) -> Option<&str> {
        let vips = self.ha.as_ref().map_or(&[][..], |ha| &ha.vips);
        let index = vips.iter().position(|vip| vip.address == address)?;
        self.vip_names.get(index).map(String::as_str)
    }
}

/// The tables of a file, each read as far as it could be.
struct Parts {
    node: Option<Node>,
    cluster: cluster::Cluster,
    vips: vips::Vips,
    election: election::Election,
    datapath: Datapath,
    checks: Vec<checks::Named>,
    services: Vec<services::Listening>,
}

impl Parts {
    fn read(root: &Section<'_>) -> Self {
        let node = node::read(root);
        let vips = vips::read(root);
        let cluster = cluster::read(root, node.as_ref(), &vips.right);
        let election = election::read(root, node.as_ref(), &cluster, &vips.right);
        let datapath = datapath::read(root);
        let checks = checks::read(root);
        let services = services::read(root, &vips, &checks, &datapath);
        Self { node, cluster, vips, election, datapath, checks, services }
    }

    /// What they mean together; none of them may have been wrong.
    fn join(self, source: Source, warnings: Vec<Problem>) -> Config {
        let places = Places {
            vips: self.vips.right.iter().map(|vip| vip.places.clone()).collect(),
            interfaces: self.election.listed,
            services: self.services.iter().map(|service| service.place.clone()).collect(),
            checks: self.checks.iter().map(|check| check.name.span.clone()).collect(),
        };
        let services = self.services.into_iter().map(|listening| Arc::new(listening.service));
        Config {
            path: source.path().to_owned(),
            node: self.node.expect("without a node an error has been reported"),
            cluster: self.cluster.name,
            channel: self.cluster.channel,
            ha: self.election.ha,
            sick_after: self.election.sick_after,
            vip_names: self.vips.right.into_iter().map(|vip| vip.name).collect(),
            datapath: self.datapath,
            services: services.collect(),
            checks: self.checks.into_iter().filter_map(|named| named.check).collect(),
            warnings,
            source,
            places,
        }
    }
}

fn read(path: &Path) -> Result<String, Errors> {
    let whole = |what: String, hint: &str| Errors::whole(path, what, hint);
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => whole(
            "there is no such file".into(),
            "write one, beginning from a sample in config/, or name another with -c FILE",
        ),
        std::io::ErrorKind::IsADirectory => {
            whole("this is a directory".into(), "name the file in it: -c DIRECTORY/FILE")
        }
        _ => whole(
            format!("can't be read: {error}"),
            "make it readable, or name another with -c FILE",
        ),
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > LONGEST {
        return Err(whole(
            "is longer than 1 MiB, so it is hardly a configuration".into(),
            "name another file with -c FILE",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = valid.iter().filter(|byte| **byte == b'\n').count() + 1;
        whole(
            format!("line {line} is not valid UTF-8"),
            "save the file in UTF-8, the encoding of TOML",
        )
    })
}

/// Reports what the TOML parser says, with what to write where that is clear.
fn syntax(source: &Source, report: &Report, error: &toml::de::Error) {
    let span = error.span().unwrap_or(0..0);
    let found = source.text().get(span.clone()).unwrap_or_default().trim();
    let message = error.message();
    let (what, hint) = if message == "duplicate key" {
        let word = section::shorten(found);
        (
            format!("`{word}` is there twice in one table"),
            format!("write `{word}` once; for a list of tables, write its header in [[ ]]"),
        )
    } else if message.starts_with("string values must be quoted") {
        match found {
            "" => ("there is no value".into(), "write a value after the `=`".into()),
            word => {
                let word = section::shorten(word);
                (format!("{word} is no value"), format!("write {word:?}: strings stand in quotes"))
            }
        }
    } else if message.contains("array table") {
        let hint = "write the header of an entry of a list in two brackets, as `[[vips]]`";
        (format!("this is not TOML: {message}"), hint.into())
    } else if message.contains("array") {
        let hint = "write a comma between the entries of the list, and `]` at its end";
        (format!("this is not TOML: {message}"), hint.into())
    } else {
        let hint = "write `[table]` or `key = value`, with strings in quotes";
        (format!("this is not TOML: {message}"), hint.into())
    };
    report.error(&span, what, hint);
}
