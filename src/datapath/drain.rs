//! An upgrade whose tables are others: flows can't be taken over, since what the older tables hold is
//! not known here. Its filters stay attached behind ours and go on with the flows that they have;
//! new flows are ours. Once nothing comes by there any more, they are removed.
//!
//! Two things never change between layouts, so that this can be done: the pin `gate` begins with the
//! deadline, and `service_traffic` grows with each packet that is sent on.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore as _, MapFlags, MapHandle};

use super::bpffs;
use super::gate::Gate;
use super::hooks;
use super::load::Error;
use super::maps::Maps;
use super::nic;

/// Flows that nothing is heard of for so long are over.
const QUIET: Duration = Duration::from_secs(300);
/// And in any case after this: whatever an old program knows is as old.
const MOST: Duration = Duration::from_secs(3600);
/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// The older layouts that are still attached.
#[derive(Debug, Default)]
pub(super) struct Drain {
    old: Vec<Old>,
}

#[derive(Debug)]
struct Old {
    layout: u32,
    folder: PathBuf,
    gate: Arc<Gate>,
    traffic: MapHandle,
    began: Instant,
    looked: Instant,
    /// When packets were last seen to have passed, and their sum then.
    heard: Instant,
    sum: u64,
}

impl Drain {
    /// What there is to drain in this network namespace. Fails where a newer version's tables are.
    pub(super) fn find() -> Result<Self, Error> {
        let mut old = Vec::new();
        for folder in bpffs::other_layouts().map_err(Error::io("look for pins"))? {
            let unknown = || Error::OtherLayout(folder.display().to_string());
            let layout = bpffs::layout_of(&folder).filter(|layout| *layout < bpffs::LAYOUT);
            let layout = layout.ok_or_else(unknown)?;
            if interfaces(layout)?.is_empty() {
                bpffs::remove_layout(&folder).map_err(Error::io("remove old pins"))?;
                continue;
            }
            old.push(Old::open(layout, &folder).map_err(|error| {
                tracing::warn!(folder = %folder.display(), %error, "can't be drained");
                unknown()
            })?);
            tracing::warn!(
                layout,
                "the kernel holds flows of an older version, whose tables this one can't read: it \
                 goes on with them until they end (`baton unload` ends them at once)"
            );
        }
        Ok(Self { old })
    }

    /// Leaves to them what is theirs, on the interfaces where they are; removes those that are
    /// over.
    pub(super) fn apply(&mut self, maps: &Maps) -> Result<(), Error> {
        let mut wanted = BTreeSet::new();
        let mut over = Vec::new();
        for old in &mut self.old {
            if old.is_over().map_err(Error::bpf("read the traffic of old flows"))? {
                over.push(old.layout);
            } else {
                wanted.extend(interfaces(old.layout)?);
            }
        }
        // Before their filters go: what nobody behind us knows must not reach the stack.
        let doing = || Error::bpf("write which interfaces are drained");
        for (ifindex, _) in maps.draining.each().map_err(doing())? {
            if !wanted.contains(&ifindex) {
                maps.draining.remove(&ifindex).map_err(doing())?;
            }
        }
        for ifindex in &wanted {
            maps.draining.set(ifindex, &1).map_err(doing())?;
        }
        for old in self.old.extract_if(.., |old| over.contains(&old.layout)) {
            for ifindex in interfaces(old.layout)? {
                hooks::detach_layout(ifindex, old.layout)?;
            }
            bpffs::remove_layout(&old.folder).map_err(Error::io("remove old pins"))?;
            tracing::info!(layout = old.layout, "the older version's flows are over: removed");
        }
        Ok(())
    }

    /// The gate of each, to be opened and closed with ours.
    pub(super) fn gates(&self) -> Vec<Arc<Gate>> {
        self.old.iter().map(|old| Arc::clone(&old.gate)).collect()
    }
}

impl Old {
    fn open(layout: u32, folder: &Path) -> Result<Self, Error> {
        let pin = |name: &str| {
            MapHandle::from_pinned_path(folder.join(name)).map_err(Error::bpf("open an old map"))
        };
        let gate = Gate::map(pin("gate")?.as_fd()).map_err(Error::io("map the old gate"))?;
        let gate = Arc::new(gate);
        let traffic = pin("service_traffic")?;
        let now = Instant::now();
        let folder = folder.to_owned();
        Ok(Self { layout, folder, gate, traffic, began: now, looked: now, heard: now, sum: 0 })
    }

    fn is_over(&mut self) -> libbpf_rs::Result<bool> {
        if self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            let sum = self.sum()?;
            if sum != self.sum {
                (self.heard, self.sum) = (self.looked, sum);
            }
        }
        Ok(self.heard.elapsed() >= QUIET || self.began.elapsed() >= MOST)
    }

    /// Another one whenever a packet has passed.
    fn sum(&self) -> libbpf_rs::Result<u64> {
        let mut sum = DefaultHasher::new();
        for key in self.traffic.keys() {
            for of_cpu in self.traffic.lookup_percpu(&key, MapFlags::ANY)?.unwrap_or_default() {
                sum.write(&of_cpu);
            }
        }
        Ok(sum.finish())
    }
}

/// Those that have the filter of a layout.
fn interfaces(layout: u32) -> Result<BTreeSet<u32>, Error> {
    let all = nic::all().map_err(Error::io("list the interfaces"))?;
    Ok(all.into_iter().filter(|&ifindex| hooks::has_layout(ifindex, layout)).collect())
}
