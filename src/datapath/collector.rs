//! The collector of flows: a thread that walks the flow tables a slice at a time, and has the
//! program in the kernel (collect.h, through `sweep`) remove what has timed out, and end what has
//! lost its backend.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::live::{Audit, Census};
use super::load::Error;
use super::registry::SERVICES;
use super::skeleton::types;
use super::sweep::{How, SWEEP, Sweeper};

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
/// After flows were ended, until their ends are told once more.
const AGAIN: Duration = Duration::from_secs(1);

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
    counted: Mutex<FlowCounts>,
    /// Whether flows are left alone: they are copies of another node's, which knows when they end.
    paused: AtomicBool,
}

/// How many flows the last walk came by, which is a few seconds ago at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowCounts {
    /// Established; also those that are closed and not yet removed.
    pub all: u32,
    /// Half-open.
    pub half_open: u32,
    /// Half-open flows that others have pushed out since the tables were made: at least so many,
    /// since it follows from what the kernel counts of the others.
    pub pushed_out: u64,
    /// Flows of the node before that were adopted since the tables were made (bpf/adopt.h).
    pub adopted: u64,
}

impl Collector {
    /// Starts it.
    pub(super) fn start(sweeper: Arc<Sweeper>, hurried: u32) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("baton-collect".to_owned()).spawn(move || {
                let mut walk = Walk {
                    sweeper,
                    hurried,
                    full: false,
                    again: false,
                    audit: Audit::default(),
                    shared: theirs,
                };
                while !walk.stopped() {
                    if let Err(error) = walk.once() {
                        tracing::warn!(%error, "can't collect old flows; trying again");
                    }
                    std::thread::park_timeout(walk.pause());
                }
            })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Has the next walk look at every flow, since a backend has left, and begin at once.
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

    /// The flows that the last walk came by.
    pub fn counted(&self) -> FlowCounts {
        *self.shared.counted.lock().expect("no panic while it is held")
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

/// What the thread works with.
struct Walk {
    sweeper: Arc<Sweeper>,
    /// What closed flows are kept when the table is getting full, in jiffies.
    hurried: u32,
    /// Whether the last walk found the table nearly full.
    full: bool,
    /// Whether the last walk ended flows: their ends are told once more, since a RST may be lost.
    again: bool,
    audit: Audit,
    shared: Arc<Shared>,
}

/// By number of the service: how many jiffies a flow must have been silent at least for the program
/// in the kernel to be asked.
struct Ages(Vec<u32>);

impl Walk {
    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    fn pause(&self) -> Duration {
        if self.again {
            AGAIN
        } else if self.full {
            SHORT_PAUSE
        } else {
            PAUSE
        }
    }

    /// One walk through the tables.
    fn once(&mut self) -> Result<(), Error> {
        let mut how = How::default();
        let mut all = self.shared.all.swap(false, Ordering::Relaxed);
        if std::mem::take(&mut self.again) {
            how.bits = types::sweep_how::SWEEP_AGAIN.0;
            all = true;
        }
        if self.full {
            how.closed_timeout = self.hurried;
        }
        let began = self.sweeper.flow_counts()?;
        let established = self.established(how, all)?;
        let half_open = self.half_open(all)?;
        let (Some((all, told)), Some(half_open)) = (established, half_open) else { return Ok(()) };
        self.again = told > 0 && how.bits == 0;
        let now = self.sweeper.flow_counts()?;
        let (pushed_out, adopted) = (began.pushed_out_before(&now, half_open), now.adopted);
        let mut counted = self.shared.counted.lock().expect("no panic while it is held");
        let pushed_out = pushed_out.max(counted.pushed_out);
        *counted = FlowCounts { all, half_open, pushed_out, adopted };
        Ok(())
    }

    /// The established flows; how many there are, and of how many the ends were told that they
    /// are over. `None`: it was stopped.
    fn established(&mut self, how: How, all: bool) -> Result<Option<(u32, u64)>, Error> {
        let sweeper = Arc::clone(&self.sweeper);
        let maps = sweeper.maps();
        let mut census = Census::begin(maps).map_err(Error::bpf("read the counts of flows"))?;
        let ages = Ages::read(&self.sweeper, how.closed_timeout)?;
        let now = self.sweeper.jiffies()? as u32;
        let mut told = 0;
        let mut old = Vec::with_capacity(SWEEP);
        let flows = maps.flows.slices(SLICE).map_err(Error::bpf("read the flows"))?;
        for (nth, (key, flow)) in flows.enumerate() {
            if all || ages.may_be_over(&key, &flow, now) {
                old.push(key);
            }
            if old.len() == SWEEP {
                told += self.hand_over(how, &mut old)?;
            }
            census.add(&key, &flow);
            if nth % SLICE as usize == SLICE as usize - 1 {
                std::thread::sleep(BREATH);
                if self.stopped() {
                    return Ok(None);
                }
            }
        }
        self.audit.settle(&census, &sweeper)?;
        let full = census.all as usize * 4 >= maps.flows.capacity() as usize * FULL_QUARTERS;
        if full && !self.full {
            tracing::warn!(
                flows = census.all,
                "the flow table is getting full; raise datapath.flows"
            );
        }
        self.full = full;
        told += self.hand_over(how, &mut old)?;
        if told > 0 {
            let again = how.bits != 0;
            tracing::info!(flows = told, again, "ends of flows told that their backend has left");
        }
        let failed = self.sweeper.take_failed();
        if failed > 0 {
            tracing::warn!(
                resets = failed,
                "can't send RSTs; who did not get one gets it with its next packet"
            );
        }
        Ok(Some((census.all, told)))
    }

    /// The half-open flows; how many there are. `None`: it was stopped.
    fn half_open(&self, all: bool) -> Result<Option<u32>, Error> {
        let mut count = 0;
        let how = How { bits: types::sweep_how::SWEEP_HALF_OPEN.0, closed_timeout: 0 };
        let ages = Ages::read_half_open(&self.sweeper)?;
        let now = self.sweeper.jiffies()? as u32;
        let mut old = Vec::with_capacity(SWEEP);
        let maps = self.sweeper.maps();
        let flows = maps.half_flows.slices(SLICE).map_err(Error::bpf("read half-open flows"))?;
        for (nth, (key, flow)) in flows.enumerate() {
            if all || ages.may_be_over(&key, &flow, now) {
                old.push(key);
            }
            if old.len() == SWEEP {
                self.hand_over(how, &mut old)?;
            }
            count += 1;
            if nth % SLICE as usize == SLICE as usize - 1 {
                std::thread::sleep(BREATH);
                if self.stopped() {
                    return Ok(None);
                }
            }
        }
        self.hand_over(how, &mut old)?;
        Ok(Some(count))
    }

    /// Has the program look at these again, and forgets them; how many were ended and told.
    fn hand_over(&self, how: How, old: &mut Vec<types::flow_key>) -> Result<u64, Error> {
        if self.shared.paused.load(Ordering::Relaxed) {
            old.clear();
        }
        let done = self.sweeper.sweep(how, old)?;
        self.shared.removed.fetch_add(done.flows - done.told.min(done.flows), Ordering::Relaxed);
        Ok(done.told)
    }
}

impl Ages {
    /// Of established flows: the shortest timeout of the states that they can be in.
    fn read(sweeper: &Sweeper, closed_timeout: u32) -> Result<Self, Error> {
        Self::of(sweeper, |service| {
            let closed = match closed_timeout {
                0 => service.closed_timeout,
                hurried => service.closed_timeout.min(hurried),
            };
            closed.min(service.half_close_timeout).min(service.idle_timeout)
        })
    }

    /// Of half-open ones.
    fn read_half_open(sweeper: &Sweeper) -> Result<Self, Error> {
        Self::of(sweeper, |service| service.half_open_timeout.min(service.closed_timeout))
    }

    fn of(sweeper: &Sweeper, age: impl Fn(&types::service) -> u32) -> Result<Self, Error> {
        let mut ages = vec![0; SERVICES as usize];
        let services = sweeper.maps().service_table.slices(SERVICES);
        for (id, service) in services.map_err(Error::bpf("read the services"))? {
            if let Some(place) = ages.get_mut(id as usize) {
                *place = age(&service);
            }
        }
        Ok(Self(ages))
    }

    fn may_be_over(&self, key: &types::flow_key, flow: &types::flow, now: u32) -> bool {
        let age = self.0.get(usize::from(key.service)).copied().unwrap_or(0);
        now.wrapping_sub(flow.seen) as i32 >= age as i32
    }
}
