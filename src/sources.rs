//! How many connections each source address has, for the limit per source.
//!
//! An IPv6 source is its /64: a single host can take any address in it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard};

/// Connections by source. An entry lives as long as its source has a connection, so there are at
/// most as many as the service has connections (its `max_connections`), and a full table can't
/// come about before the service's own limit refuses the client.
#[derive(Debug)]
pub struct Sources {
    /// Sharded, so that threads that accept at the same time seldom meet.
    shards: [Mutex<HashMap<IpAddr, u32>>; SHARDS],
    hasher: RandomState,
}

const SHARDS: usize = 16;

impl Default for Sources {
    fn default() -> Self {
        Self { shards: Default::default(), hasher: RandomState::new() }
    }
}

impl Sources {
    /// Counts a connection from `source`, or returns `false` where it has `most` already.
    pub fn enter(&self, source: IpAddr, most: u32) -> bool {
        let source = prefix(source);
        let mut shard = self.shard(source);
        let count = shard.entry(source).or_insert(0);
        let free = *count < most;
        if free {
            *count += 1;
        } else if *count == 0 {
            shard.remove(&source);
        }
        free
    }

    /// Takes back what [`Sources::enter`] counted.
    pub fn leave(&self, source: IpAddr) {
        let source = prefix(source);
        if let Entry::Occupied(mut entry) = self.shard(source).entry(source) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    fn shard(&self, source: IpAddr) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        let index = self.hasher.hash_one(source) as usize % SHARDS;
        self.shards[index].lock().expect("no panic while it is held")
    }
}

fn prefix(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(sources: &Sources) -> usize {
        sources.shards.iter().map(|shard| shard.lock().unwrap().len()).sum()
    }

    #[test]
    fn a_source_gets_its_share_and_no_more() {
        let sources = Sources::default();
        let one = "10.77.0.10".parse().unwrap();
        assert!(sources.enter(one, 2));
        assert!(sources.enter(one, 2));
        assert!(!sources.enter(one, 2));
        assert!(sources.enter("10.77.0.11".parse().unwrap(), 2));
        sources.leave(one);
        assert!(sources.enter(one, 2));
    }

    #[test]
    fn nothing_is_kept_of_a_source_without_connections() {
        let sources = Sources::default();
        let one = "10.77.0.10".parse().unwrap();
        assert!(!sources.enter(one, 0));
        assert!(sources.enter(one, 1));
        sources.leave(one);
        assert_eq!(entries(&sources), 0);
    }

    #[test]
    fn an_ipv6_source_is_its_64() {
        let sources = Sources::default();
        assert!(sources.enter("fd77::1".parse().unwrap(), 1));
        assert!(!sources.enter("fd77::2".parse().unwrap(), 1));
        assert!(sources.enter("fd77:0:0:1::2".parse().unwrap(), 1));
    }
}
