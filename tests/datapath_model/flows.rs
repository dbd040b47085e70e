//! The model's flow table: a list. A flow is one record, whatever the kernel makes of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use baton::datapath::skeleton::types::flow_flag;

use crate::lab::Side;

/// A client and the service that it talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) client: (IpAddr, u16),
    pub(crate) service: u32,
}

/// Where a backend sends to, and which server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ReplyKey {
    pub(crate) to: (IpAddr, u16),
    pub(crate) server: u32,
}

/// When something happened, in jiffies: not before, not after.
pub(crate) type Moment = (u32, u32);

/// What a direction has shown.
pub(crate) const FIN: u8 = flow_flag::FLOW_FIN.0 as u8;
pub(crate) const RST: u8 = flow_flag::FLOW_RST.0 as u8;
/// The other end seems to have reset the flow.
pub(crate) const DOUBT: u8 = flow_flag::FLOW_DOUBT.0 as u8;
/// Ended, since its backend has left.
pub(crate) const ENDED: u8 = flow_flag::FLOW_ENDED.0 as u8;
/// Its numbers are not known; the next segment tells.
pub(crate) const LEARNT: u8 = flow_flag::FLOW_LEARNT.0 as u8;
/// Of the backend: its SYN came.
pub(crate) const SYN_ACK: u8 = flow_flag::FLOW_SYN_ACK.0 as u8;

/// Of one direction's segments: one past the last byte, and what they acknowledge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) end: u32,
    pub(crate) acknowledged: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) backend: u16,
    /// The source port towards the backend.
    pub(crate) port: u16,
    /// None in DSR, where replies do not come by.
    pub(crate) reply: Option<ReplyKey>,
    pub(crate) established: bool,
    pub(crate) client_flags: u8,
    pub(crate) backend_flags: u8,
    pub(crate) client: Numbers,
    pub(crate) server: Numbers,
    /// The number of the backend's SYN+ACK, once it came.
    pub(crate) isn: Option<u32>,
    pub(crate) side: Side,
    pub(crate) began: Moment,
    pub(crate) client_seen: Moment,
    pub(crate) backend_seen: Moment,
}

impl Flow {
    /// Whoever goes on is told.
    pub(crate) fn end(&mut self, now: Moment) {
        self.client_flags |= ENDED | RST;
        self.client_seen = now;
        if self.reply.is_some() {
            self.backend_flags |= ENDED | RST;
        }
    }

    /// Reset, or closed from both ends.
    pub(crate) fn is_closed(&self) -> bool {
        (self.client_flags | self.backend_flags) & RST != 0
            || self.client_flags & self.backend_flags & FIN != 0
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Flows {
    all: BTreeMap<Key, Flow>,
}

impl Flows {
    pub(crate) fn find(&mut self, key: &Key) -> Option<&mut Flow> {
        self.all.get_mut(key)
    }

    pub(crate) fn peek(&self, key: &Key) -> Option<&Flow> {
        self.all.get(key)
    }

    pub(crate) fn by_reply(&mut self, reply: &ReplyKey) -> Option<(Key, &mut Flow)> {
        let mut all = self.all.iter_mut();
        all.find(|(_, flow)| flow.reply.as_ref() == Some(reply)).map(|(key, flow)| (*key, flow))
    }

    pub(crate) fn insert(&mut self, key: Key, flow: Flow) {
        self.all.insert(key, flow);
    }

    pub(crate) fn remove(&mut self, key: &Key) {
        self.all.remove(key);
    }

    pub(crate) fn retain(&mut self, keep: impl FnMut(&Key, &mut Flow) -> bool) {
        self.all.retain(keep);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Key, &Flow)> {
        self.all.iter()
    }

    pub(crate) fn established(&self) -> usize {
        self.all.values().filter(|flow| flow.established).count()
    }

    /// Established flows whose replies come by.
    pub(crate) fn established_with_replies(&self) -> usize {
        let mut all = self.all.values();
        all.by_ref().filter(|flow| flow.established && flow.reply.is_some()).count()
    }
}
