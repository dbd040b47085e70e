//! How flows have come and gone since the tables were made, as the kernel counts it (lifetimes.h).

use serde::{Deserialize, Serialize};

use super::load::Error;
use super::maps::Table;
use super::skeleton::types::flow_count;

/// Counts, over all services and CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetimes {
    /// Flows begun: half-open.
    pub begun: u64,
    /// Half-open flows replaced by another try of their client.
    pub replaced: u64,
    /// Established.
    pub established: u64,
    /// Half-open flows that timed out.
    pub half_open_expired: u64,
    /// Half-open flows that the operator ended.
    pub half_open_ended: u64,
    /// Established flows that timed out, in whatever state.
    pub expired: u64,
    /// Established flows that were ended: their backend left, or the operator wanted it.
    pub ended: u64,
    /// UDP flows that went to another backend, since theirs left.
    pub moved: u64,
    /// RSTs that were sent on and not believed.
    pub resets_disbelieved: u64,
    /// FINs, the same.
    pub fins_disbelieved: u64,
    /// RSTs that the other end's silence has to confirm.
    pub resets_doubted: u64,
    /// Established flows of the node before that were not replicated in time.
    pub adopted: u64,
}

impl Lifetimes {
    pub(super) fn read(table: &Table<u32, u64>) -> Result<Self, Error> {
        let count = |what: flow_count| -> Result<u64, Error> {
            let each = table.find_per_cpu(&what.0).map_err(Error::bpf("read how flows ended"))?;
            Ok(each.iter().sum())
        };
        Ok(Self {
            begun: count(flow_count::FLOWS_BEGUN)?,
            replaced: count(flow_count::FLOWS_REPLACED)?,
            established: count(flow_count::FLOWS_ESTABLISHED)?,
            half_open_expired: count(flow_count::FLOWS_HALF_EXPIRED)?,
            half_open_ended: count(flow_count::FLOWS_HALF_ENDED)?,
            expired: count(flow_count::FLOWS_EXPIRED)?,
            ended: count(flow_count::FLOWS_ENDED)?,
            moved: count(flow_count::FLOWS_MOVED)?,
            resets_disbelieved: count(flow_count::RESETS_DISBELIEVED)?,
            fins_disbelieved: count(flow_count::FINS_DISBELIEVED)?,
            resets_doubted: count(flow_count::RESETS_DOUBTED)?,
            adopted: count(flow_count::FLOWS_ADOPTED)?,
        })
    }

    /// Half-open flows that others have pushed out of the table, at least: of those that had begun
    /// at this moment, whatever has not ended in another way until `later` and was not there in
    /// between.
    pub(super) fn pushed_out_before(&self, later: &Self, there: u32) -> u64 {
        let ended = later.replaced
            + later.established
            + later.half_open_expired
            + later.half_open_ended
            + u64::from(there);
        self.begun.saturating_sub(ended)
    }
}
