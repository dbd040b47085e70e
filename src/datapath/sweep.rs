//! The collector's program in the kernel (collect.h), as calls: flows are handed to it by key, and
//! it removes or ends what is to be; the ends of TCP flows that were ended are told here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::mem::offset_of;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use libbpf_rs::Result as BpfResult;

use super::lifetimes::Lifetimes;
use super::load::{Error, Loaded};
use super::maps::Maps;
use super::registry::socket;
use super::resets::{Reset, Resets};
use super::skeleton::types;

/// Flows that one run of the program looks at: `SWEEP` in bounds.h.
pub(super) const SWEEP: usize = (offset_of!(types::sweep, swept) - offset_of!(types::sweep, keys))
    / size_of::<types::flow_key>();

/// A pause after each run in which the ends of flows were told: at most 128,000 flows a second, so
/// that neither a queue nor the other work of this node suffers.
const PACE: Duration = Duration::from_millis(2);

/// How a sweep goes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct How {
    /// Bits of `sweep_how`.
    pub(super) bits: u32,
    /// Closed flows are kept at most so many jiffies; 0: as their service says.
    pub(super) closed_timeout: u32,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// Flows removed, or ended.
    pub(super) flows: u64,
    /// TCP flows among them whose ends were told; they are removed a little later.
    pub(super) told: u64,
}

/// Whoever has flows looked at. One at a time: there is one `sweep`.
#[derive(Debug)]
pub(super) struct Sweeper {
    loaded: Loaded,
    maps: Arc<Maps>,
    resets: Resets,
    turn: Mutex<()>,
}

/// The records that flows refer to, each read once.
type Known<K, V> = HashMap<K, Option<V>>;

impl Sweeper {
    pub(super) fn new(loaded: Loaded, maps: Arc<Maps>) -> Result<Self, Error> {
        let resets = Resets::open().map_err(Error::io("open sockets to send RSTs"))?;
        Ok(Self { loaded, maps, resets, turn: Mutex::new(()) })
    }

    /// Has the program look at these flows, at most [`SWEEP`], and forgets them.
    pub(super) fn sweep(&self, how: How, keys: &mut Vec<types::flow_key>) -> Result<Done, Error> {
        debug_assert!(keys.len() <= SWEEP, "{} flows", keys.len());
        if keys.is_empty() {
            return Ok(Done::default());
        }
        let mut sweep = types::sweep {
            count: keys.len() as u32,
            closed_timeout: how.closed_timeout,
            how: how.bits,
            ..Default::default()
        };
        sweep.keys[..keys.len()].copy_from_slice(keys);
        keys.clear();
        let turn = self.turn.lock().expect("no panic while it is held");
        self.maps.sweep.set(&0, &sweep).map_err(Error::bpf("write the sweep"))?;
        self.loaded.collect()?;
        let done = self.maps.sweep.find(&0).map_err(Error::bpf("read the sweep"))?;
        drop(turn);
        let Some(sweep) = done else { return Ok(Done::default()) };
        let told = self.tell(&sweep).map_err(Error::bpf("read whom to send RSTs to"))?;
        if told > 0 {
            std::thread::sleep(PACE);
        }
        Ok(Done { flows: sweep.removed.into(), told })
    }

    /// Sends RSTs to the ends of the flows that were ended; how many flows these are.
    fn tell(&self, sweep: &types::sweep) -> BpfResult<u64> {
        let mut services = Known::new();
        let mut backends = Known::new();
        let mut told = 0;
        for (key, swept) in sweep.keys.iter().zip(&sweep.swept).take(sweep.count as usize) {
            if u32::from(swept.done) != types::sweep_done::SWEPT_ENDED.0 {
                continue;
            }
            let service =
                known(&mut services, key.service, |id| self.maps.service_table.find(&id.into()))?;
            let backend =
                known(&mut backends, swept.backend, |id| self.maps.backend_table.find(&id.into()))?;
            let (Some(service), Some(backend)) = (service, backend) else { continue };
            resets_of(key, swept, &service, &backend)
                .iter()
                .flatten()
                .for_each(|reset| self.resets.send(reset));
            told += 1;
        }
        Ok(told)
    }

    /// The maps that it works on.
    pub(super) fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The jiffies now.
    pub(super) fn jiffies(&self) -> Result<u64, Error> {
        self.loaded.jiffies()
    }

    /// Puts a count of live flows right.
    pub(super) fn repair(&self, repair: types::repair) -> Result<(), Error> {
        self.loaded.repair(repair)
    }

    /// How flows have come and gone.
    pub(super) fn flow_counts(&self) -> Result<Lifetimes, Error> {
        Lifetimes::read(&self.maps.flow_counts)
    }

    /// RSTs that could not be sent since this was last asked.
    pub(super) fn take_failed(&self) -> u64 {
        self.resets.take_failed()
    }
}

fn known<V: Copy>(
    records: &mut Known<u16, V>,
    id: u16,
    find: impl FnOnce(u16) -> BpfResult<Option<V>>,
) -> BpfResult<Option<V>> {
    Ok(match records.entry(id) {
        Entry::Occupied(record) => *record.get(),
        Entry::Vacant(new) => *new.insert(find(id)?),
    })
}

/// The RSTs to the client and to the backend. Of direct server return the backend has said nothing
/// here, and expects what the client has sent last; where it knows the VIP as its own address
/// (`l2`, `ipip`) it can't be reached by that from here, and learns it from the client.
fn resets_of(
    key: &types::flow_key,
    swept: &types::swept,
    service: &types::service,
    backend: &types::backend,
) -> [Option<Reset>; 2] {
    let client = socket(key.client, key.port);
    let server = socket(backend.address, backend.port);
    let peer = match types::forward_mode(service.mode.into()) {
        types::forward_mode::MODE_NAT => Some(socket(backend.nat, swept.nat_port)),
        types::forward_mode::MODE_DNAT | types::forward_mode::MODE_DSR_NAT => Some(client),
        _ => None,
    };
    let to_client = Reset {
        from: socket(service.vip, service.port),
        to: client,
        sequence: swept.client.acknowledged,
        acknowledgement: swept.client.end,
    };
    let heard = swept.server.end != 0 || swept.server.acknowledged != 0;
    let to_server = peer.map(|peer| Reset {
        from: peer,
        to: server,
        sequence: if heard { swept.server.acknowledged } else { swept.client.end },
        acknowledgement: if heard { swept.server.end } else { swept.client.acknowledged },
    });
    [Some(to_client), to_server]
}
