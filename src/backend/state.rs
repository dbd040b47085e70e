//! What was done on this machine, kept in a file, and bringing the machine in line with it: what a
//! service needs is there, what none needs any more is as it was before. The file is in /run, like
//! what it describes gone with a reboot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::program::{self, Entry};
use super::system;

const FOLDER: &str = "/run/baton/backend";

/// What one service needs of this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Need {
    /// On the loopback.
    pub(super) vip: Option<IpAddr>,
    /// Kernel parameters, each with the value that it gets where it does not do as it is.
    pub(super) sysctls: Vec<(String, i64)>,
    /// Where the program runs.
    pub(super) interfaces: Vec<String>,
    /// What it is told.
    pub(super) entries: Vec<Entry>,
}

/// What is needed, and what we have changed.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) services: BTreeMap<String, Need>,
    /// VIPs that we have added.
    addresses: BTreeSet<IpAddr>,
    /// Parameters that we have set: before, and to what.
    sysctls: BTreeMap<String, (i64, i64)>,
    /// Interfaces that the program runs on.
    attached: BTreeSet<String>,
    /// Interfaces whose clsact qdisc we have made.
    clsact: BTreeSet<String>,
}

/// What came of it, step by step. `Display` is for people.
#[derive(Debug, Serialize)]
pub struct Report {
    service: String,
    steps: Vec<Step>,
}

#[derive(Debug, Serialize)]
struct Step {
    /// `done`, `undone`, `unchanged`.
    result: &'static str,
    what: String,
}

impl Report {
    /// The same for programs: `service`, `steps[]` with `result` (`done`, `undone`, `unchanged`)
    /// and `what`.
    pub fn json(&self) -> String {
        let value = serde_json::to_value(self).expect("strings are JSON");
        format!("{value:#}\n")
    }

    fn push(&mut self, result: &'static str, what: impl Into<String>) {
        self.steps.push(Step { result, what: what.into() });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Step { result, what } in &self.steps {
            writeln!(f, "{result:<9}  {what}")?;
        }
        if self.steps.is_empty() {
            writeln!(f, "nothing was done here for service {}", self.service)?;
        }
        Ok(())
    }
}

/// Changes what is needed, and the machine accordingly. What was done is remembered also where a
/// step fails.
pub(super) fn change(
    service: &str,
    change: impl FnOnce(&mut State) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let (mut file, mut state) = open()?;
    let mut report = Report { service: service.to_owned(), steps: Vec::new() };
    change(&mut state)?;
    let done = state.settle(&mut report);
    save(&mut file, &state)?;
    done.map(|()| report)
}

/// Locked until the file is closed.
fn open() -> anyhow::Result<(File, State)> {
    let inode = fs::metadata("/proc/thread-self/ns/net")?.ino();
    fs::create_dir_all(FOLDER).with_context(|| format!("make {FOLDER}"))?;
    let path = PathBuf::from(FOLDER).join(format!("net-{inode}.json"));
    let failed = || format!("open {}", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(failed)?;
    file.lock().with_context(failed)?;
    let mut text = String::new();
    file.read_to_string(&mut text).with_context(failed)?;
    if text.trim().is_empty() {
        return Ok((file, State::default()));
    }
    let mut state: State = serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged: remove it", path.display()))?;
    if state.is_of_another_namespace() {
        state = State::default();
    }
    Ok((file, state))
}

fn save(file: &mut File, state: &State) -> anyhow::Result<()> {
    let text = if state.services.is_empty() && state.is_clean() {
        String::new()
    } else {
        serde_json::to_string_pretty(state)?
    };
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(text.as_bytes()).context("write what was done")
}

impl State {
    fn is_clean(&self) -> bool {
        self.addresses.is_empty() && self.sysctls.is_empty() && self.attached.is_empty()
    }

    /// The number of a namespace is given to another one once it is gone; in that one, nothing of
    /// what we did is there.
    fn is_of_another_namespace(&self) -> bool {
        let there = self.attached.iter().any(|interface| program::is_attached(interface))
            || self.addresses.iter().any(|vip| matches!(system::interface_of(*vip), Ok(Some(_))))
            || self
                .sysctls
                .iter()
                .any(|(name, (_, set))| system::sysctl(name).is_ok_and(|now| now == *set));
        !self.is_clean() && !there
    }

    /// Refuses what contradicts what another service needs.
    pub(super) fn check(&self, service: &str, need: &Need) -> anyhow::Result<()> {
        for (other, theirs) in self.services.iter().filter(|(name, _)| *name != service) {
            let collides = |ours: &Entry| theirs.entries.iter().any(|theirs| ours.collides(theirs));
            if need.entries.iter().any(collides) {
                anyhow::bail!(
                    "service {other:?}, which was set up here, has the same backend address and \
                     port, or the same VIP, with something else: `baton backend-setup {other} \
                     --remove` first"
                );
            }
        }
        Ok(())
    }

    /// From the inside out: before the VIP is there, nobody may hear of it, and what comes for it
    /// is taken out of its tunnel. Away it goes the other way round.
    fn settle(&mut self, report: &mut Report) -> anyhow::Result<()> {
        self.set_sysctls(report)?;
        self.install(report)?;
        self.add_addresses(report)?;
        self.remove_addresses(report)?;
        self.uninstall(report)?;
        self.restore_sysctls(report)
    }

    fn set_sysctls(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let wanted: BTreeMap<_, _> =
            self.services.values().flat_map(|need| need.sysctls.iter().cloned()).collect();
        for (name, value) in wanted {
            let now = system::sysctl(&name)?;
            if does(&name, now, value)? {
                report.push("unchanged", format!("{name} = {now}"));
                continue;
            }
            system::set_sysctl(&name, value)?;
            report.push("done", format!("{name} = {value} (was {now})"));
            self.sysctls.entry(name).and_modify(|(_, set)| *set = value).or_insert((now, value));
        }
        Ok(())
    }

    fn install(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let mut interfaces: BTreeSet<_> =
            self.services.values().flat_map(|need| need.interfaces.iter().cloned()).collect();
        // One that another service's setup has found may have gone since.
        interfaces.retain(|name| program::check(std::slice::from_ref(name)).is_ok());
        if interfaces.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> =
            self.services.values().flat_map(|need| need.entries.iter().cloned()).collect();
        let new: Vec<_> =
            interfaces.iter().filter(|name| !program::is_attached(name)).cloned().collect();
        for interface in &new {
            if !system::has_clsact(interface) {
                self.clsact.insert(interface.clone());
            }
            self.attached.insert(interface.clone());
        }
        let all: Vec<_> = interfaces.into_iter().collect();
        program::install(&all, &entries)?;
        for interface in &all {
            let result = if new.contains(interface) { "done" } else { "unchanged" };
            report.push(result, format!("eBPF program on {interface}"));
        }
        Ok(())
    }

    fn add_addresses(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let wanted: BTreeSet<_> = self.services.values().filter_map(|need| need.vip).collect();
        for vip in wanted {
            if let Some(interface) = system::interface_of(vip)? {
                report.push("unchanged", format!("{vip} on {interface}"));
                continue;
            }
            let command = system::add_address(vip);
            system::command(&command)?;
            self.addresses.insert(vip);
            report.push("done", command);
        }
        Ok(())
    }

    fn remove_addresses(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let wanted: BTreeSet<_> = self.services.values().filter_map(|need| need.vip).collect();
        let gone: Vec<_> = self.addresses.difference(&wanted).copied().collect();
        for vip in gone {
            if system::interface_of(vip)?.as_deref() == Some("lo") {
                let command = system::remove_address(vip);
                system::command(&command)?;
                report.push("undone", command);
            }
            self.addresses.remove(&vip);
        }
        Ok(())
    }

    fn uninstall(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let wanted: BTreeSet<_> =
            self.services.values().flat_map(|need| need.interfaces.iter().cloned()).collect();
        let gone: Vec<_> = self.attached.difference(&wanted).cloned().collect();
        for interface in &gone {
            program::detach(interface)?;
            if self.clsact.remove(interface) {
                system::remove_clsact(interface)?;
            }
            self.attached.remove(interface);
            report.push("undone", format!("eBPF program on {interface}"));
        }
        if self.attached.is_empty() && !gone.is_empty() {
            program::unpin()?;
        }
        Ok(())
    }

    fn restore_sysctls(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let wanted: BTreeSet<_> = self
            .services
            .values()
            .flat_map(|need| need.sysctls.iter().map(|(name, _)| name.clone()))
            .collect();
        let gone: Vec<_> =
            self.sysctls.keys().filter(|name| !wanted.contains(*name)).cloned().collect();
        for name in gone {
            let Some((before, set)) = self.sysctls.remove(&name) else { continue };
            match system::sysctl(&name) {
                Ok(now) if now == set => {
                    system::set_sysctl(&name, before)?;
                    report.push("undone", format!("{name} = {before} (was {now})"));
                }
                Ok(now) => {
                    report.push("unchanged", format!("{name} = {now}, which we did not set"));
                }
                // Of an interface that has gone.
                Err(_) => {}
            }
        }
        Ok(())
    }
}

/// Whether a parameter does as it is: the kernel takes the greater one of `all` and the
/// interface's, and for `rp_filter` only 1 (strict) is in the way.
fn does(name: &str, now: i64, wanted: i64) -> anyhow::Result<bool> {
    if name.ends_with(".rp_filter") {
        return Ok(now.max(system::sysctl("net.ipv4.conf.all.rp_filter")?) != 1);
    }
    Ok(now >= wanted)
}
