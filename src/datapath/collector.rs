//! The collector of old flows: a thread that walks the flow table a slice at a time, and has the
//! program in the kernel (collect.h) remove what has timed out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::live::{Audit, Census};
use super::load::{Error, Loaded};
use super::maps::Maps;
use super::skeleton::types;

/// Flows read with one system call.
const SLICE: u32 = 4096;
/// Between two slices, so that a great table is not walked in one go.
const BREATH: Duration = Duration::from_millis(1);
/// Between the end of one walk and the next.
const PAUSE: Duration = Duration::from_secs(2);
/// The same when the table is getting full.
const SHORT_PAUSE: Duration = Duration::from_millis(200);
/// The table is getting full from here on, in quarters; closed flows make room sooner then.
const FULL_QUARTERS: usize = 3;
/// Flows that one run of the program looks at: `SWEEP` in bounds.h.
const SWEEP: usize = size_of::<types::sweep>() / size_of::<types::flow_key>();

/// The running collector; dropping it ends the thread.
#[derive(Debug)]
pub struct Collector {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    all: AtomicBool,
    removed: AtomicU64,
    counted: AtomicU32,
    /// Whether flows are left alone: they are copies of another node's, which knows when they end.
    paused: AtomicBool,
}

impl Collector {
    /// Starts it.
    pub(super) fn start(loaded: Loaded, maps: Arc<Maps>, ages: Ages) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("baton-collect".to_owned()).spawn(move || {
                let audit = Audit::default();
                let mut walk = Walk { loaded, maps, ages, full: false, audit, shared: theirs };
                while !walk.stopped() {
                    if let Err(error) = walk.once() {
                        tracing::warn!(%error, "can't collect old flows; trying again");
                    }
                    std::thread::park_timeout(if walk.full { SHORT_PAUSE } else { PAUSE });
                }
            })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Has the next walk look at every flow, since a backend has gone, and begin at once.
    pub fn look_at_all(&self) {
        self.shared.all.store(true, Ordering::Relaxed);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Whether flows are left alone, whatever their age.
    pub(super) fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Relaxed);
    }

    /// Flows that were removed since the start.
    pub fn removed(&self) -> u64 {
        self.shared.removed.load(Ordering::Relaxed)
    }

    /// The entries that the last walk came by, which is a few seconds ago at most; also of flows
    /// that are closed and not yet removed.
    pub fn counted(&self) -> u32 {
        self.shared.counted.load(Ordering::Relaxed)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// How long the client of a flow must have been silent for the flow to be looked at, in jiffies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ages {
    /// The shortest of all timeouts.
    pub(super) usual: u32,
    /// When the table is getting full: what closed flows are kept then.
    pub(super) hurried: u32,
}

/// What the thread works with.
struct Walk {
    loaded: Loaded,
    maps: Arc<Maps>,
    ages: Ages,
    /// Whether the last walk found the table nearly full.
    full: bool,
    audit: Audit,
    shared: Arc<Shared>,
}

impl Walk {
    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// One walk through the table.
    fn once(&mut self) -> Result<(), Error> {
        let youngest = if self.full { self.ages.hurried } else { self.ages.usual };
        let read = || Error::bpf("read the flows");
        let mut census = Census::begin(&self.maps).map_err(read())?;
        let all = self.shared.all.swap(false, Ordering::Relaxed);
        let now = self.loaded.jiffies()? as u32;
        let mut old = Vec::with_capacity(SWEEP);
        let flows = self.maps.flows.slices(SLICE).map_err(read())?;
        for (nth, (key, flow)) in flows.enumerate() {
            let age = now.wrapping_sub(flow.seen) as i32;
            if all || age >= youngest as i32 {
                old.push(key);
            }
            if old.len() == SWEEP {
                self.hand_over(&mut old)?;
            }
            census.add(&key, &flow);
            if nth % SLICE as usize == SLICE as usize - 1 {
                std::thread::sleep(BREATH);
                if self.stopped() {
                    return Ok(());
                }
            }
        }
        self.shared.counted.store(census.all, Ordering::Relaxed);
        self.audit.settle(&census, &self.maps, &self.loaded)?;
        let count = census.all as usize;
        let full = count * 4 >= self.maps.flows.capacity() as usize * FULL_QUARTERS;
        if full && !self.full {
            tracing::warn!(flows = count, "the flow table is getting full; raise datapath.flows");
        }
        self.full = full;
        self.hand_over(&mut old)
    }

    /// Has the program look at these again, and forgets them.
    fn hand_over(&self, old: &mut Vec<types::flow_key>) -> Result<(), Error> {
        if self.shared.paused.load(Ordering::Relaxed) {
            old.clear();
        }
        if old.is_empty() {
            return Ok(());
        }
        let mut sweep = types::sweep {
            count: old.len() as u32,
            closed_timeout: if self.full { self.ages.hurried } else { 0 },
            ..Default::default()
        };
        sweep.keys[..old.len()].copy_from_slice(old);
        old.clear();
        self.maps.sweep.set(&0, &sweep).map_err(Error::bpf("write the sweep"))?;
        self.loaded.collect()?;
        let done = self.maps.sweep.find(&0).map_err(Error::bpf("read the sweep"))?;
        let removed = done.map_or(0, |sweep| sweep.removed);
        self.shared.removed.fetch_add(u64::from(removed), Ordering::Relaxed);
        Ok(())
    }
}
