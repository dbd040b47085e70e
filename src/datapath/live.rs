//! How many flows services and backends have now, which the kernel counts as they are established
//! and end (bpf/live.h): read here, compared with the flows that a walk came by, and put right.
//!
//! The kernel misses next to nothing (an entry that is given to another flow while a CPU still
//! holds it), but what it misses would stay for ever; and flows that userspace writes into the
//! table are not counted until they are found here.

use std::collections::HashMap;

use libbpf_rs::Result as BpfResult;

use super::load::Error;
use super::maps::{Maps, Table};
use super::registry::{BACKENDS, SERVICES};
use super::skeleton::types;
use super::sweep::Sweeper;

/// Flows that are there by what the kernel has counted; never negative, though the two numbers may
/// be read while they change.
pub fn flows(live: &types::live) -> u32 {
    u32::try_from(live.begun.wrapping_sub(live.ended) as i32).unwrap_or(0)
}

/// What the kernel has counted, at one moment.
#[derive(Debug)]
struct Snapshot {
    services: Vec<types::live>,
    backends: Vec<types::live>,
}

impl Snapshot {
    fn take(maps: &Maps) -> BpfResult<Self> {
        let all = |table: &Table<u32, types::live>, size: u32| -> BpfResult<Vec<types::live>> {
            let mut all = vec![types::live::default(); size as usize];
            for (id, live) in table.slices(size)? {
                if let Some(slot) = all.get_mut(id as usize) {
                    *slot = live;
                }
            }
            Ok(all)
        };
        Ok(Self {
            services: all(&maps.service_live, SERVICES)?,
            backends: all(&maps.backend_live, BACKENDS)?,
        })
    }
}

/// A walk through the flows, which counts them one by one.
#[derive(Debug)]
pub(super) struct Census {
    before: Snapshot,
    /// Entries, counted by the kernel or not.
    pub(super) all: u32,
    services: Vec<u32>,
    backends: Vec<u32>,
}

impl Census {
    /// Begins before the first flow is read.
    pub(super) fn begin(maps: &Maps) -> BpfResult<Self> {
        Ok(Self {
            before: Snapshot::take(maps)?,
            all: 0,
            services: vec![0; SERVICES as usize],
            backends: vec![0; BACKENDS as usize],
        })
    }

    /// A flow that the walk came by.
    pub(super) fn add(&mut self, key: &types::flow_key, flow: &types::flow) {
        self.all += 1;
        if flow.counted == 0 {
            return;
        }
        let count = |of: &mut [u32], id: u16| {
            if let Some(n) = of.get_mut(usize::from(id)) {
                *n += 1;
            }
        };
        count(&mut self.services, key.service);
        count(&mut self.backends, flow.backend);
    }
}

/// Whose flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Of {
    Service(u32),
    Backend(u32),
}

/// What was found wrong in the last walk.
#[derive(Debug, Default)]
pub(super) struct Audit {
    suspected: HashMap<Of, i32>,
}

impl Audit {
    /// Compares a census that has just ended with what the kernel has counted, and corrects what
    /// was off in the census before too: a flow between the counting and the table is off once.
    pub(super) fn settle(&mut self, census: &Census, sweeper: &Sweeper) -> Result<(), Error> {
        let after =
            Snapshot::take(sweeper.maps()).map_err(Error::bpf("read the counts of flows"))?;
        for (of, surplus) in self.confirm(census, &after) {
            let (kind, id) = match of {
                Of::Service(id) => (types::repaired::REPAIR_SERVICE, id),
                Of::Backend(id) => (types::repaired::REPAIR_BACKEND, id),
            };
            if surplus > 0 {
                tracing::info!(?of, surplus, "the count of live flows was off");
            } else {
                // As it should be: the kernel does not count flows that come from another node.
                tracing::debug!(?of, found = -surplus, "flows that were not counted are now");
            }
            sweeper.repair(types::repair { of: kind.0, id, surplus })?;
        }
        Ok(())
    }

    /// What is off in this census and was in the last.
    fn confirm(&mut self, census: &Census, after: &Snapshot) -> Vec<(Of, i32)> {
        let before = &census.before;
        let services = before.services.iter().zip(&after.services).zip(&census.services);
        let backends = before.backends.iter().zip(&after.backends).zip(&census.backends);
        let services = (0..).map(Of::Service).zip(services);
        let backends = (0..).map(Of::Backend).zip(backends);
        let suspected: HashMap<Of, i32> = services
            .chain(backends)
            .map(|(of, ((before, after), found))| (of, surplus(before, after, *found)))
            .filter(|(_, surplus)| *surplus != 0)
            .collect();
        let common = |(of, now): (&Of, &i32)| {
            let last = self.suspected.get(of)?;
            (last.signum() == now.signum())
                .then(|| (*of, if now.abs() < last.abs() { *now } else { *last }))
        };
        let confirmed: Vec<_> = suspected.iter().filter_map(common).collect();
        self.suspected = suspected;
        for (of, _) in &confirmed {
            self.suspected.remove(of);
        }
        confirmed
    }
}

/// How many flows too many (negative: too few) the kernel counts for certain, whenever those that
/// came and went during the walk did so: the walk may have seen all that came and none that went,
/// or the other way round.
fn surplus(before: &types::live, after: &types::live, found: u32) -> i32 {
    let counted = i64::from(before.begun.wrapping_sub(before.ended) as i32);
    let came = i64::from(after.begun.wrapping_sub(before.begun) as i32).max(0);
    let went = i64::from(after.ended.wrapping_sub(before.ended) as i32).max(0);
    let off = counted - i64::from(found);
    let (least, most) = (off - went, off + came);
    let certain = if least > 0 { least } else { most.min(0) };
    certain.clamp(i32::MIN.into(), i32::MAX.into()) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(begun: u32, ended: u32) -> types::live {
        types::live { begun, ended, ..Default::default() }
    }

    #[test]
    fn live_flows_wrap_and_are_never_negative() {
        assert_eq!(flows(&live(5, 3)), 2);
        assert_eq!(flows(&live(1, u32::MAX)), 2);
        assert_eq!(flows(&live(3, 4)), 0);
    }

    #[test]
    fn only_what_is_certain_is_off() {
        let quiet = |counted, found| surplus(&live(counted, 0), &live(counted, 0), found);
        assert_eq!(quiet(10, 10), 0);
        assert_eq!(quiet(12, 10), 2);
        assert_eq!(quiet(7, 10), -3);
        // 5 came and 3 went meanwhile.
        let busy = |counted, found| surplus(&live(counted, 0), &live(counted + 5, 3), found);
        for found in 97..=105 {
            assert_eq!(busy(100, found), 0, "{found}");
        }
        assert_eq!(busy(100, 96), 1);
        assert_eq!(busy(100, 106), -1);
    }

    fn census(counted: u32, found: u32) -> (Census, Snapshot) {
        let snapshot = || Snapshot { services: vec![live(counted, 0)], backends: vec![live(7, 0)] };
        let before = snapshot();
        (Census { before, all: found, services: vec![found], backends: vec![7] }, snapshot())
    }

    #[test]
    fn it_is_corrected_when_it_was_off_twice() {
        let mut audit = Audit::default();
        let mut found = |counted, there| {
            let (census, after) = census(counted, there);
            audit.confirm(&census, &after)
        };
        assert_eq!(found(12, 10), []);
        assert_eq!(found(10, 10), []);
        assert_eq!(found(12, 10), []);
        // What both say.
        assert_eq!(found(15, 10), [(Of::Service(0), 2)]);
        // Judged anew after a correction.
        assert_eq!(found(13, 10), []);
        assert_eq!(found(7, 10), []);
        assert_eq!(found(9, 10), [(Of::Service(0), -1)]);
    }
}
