//! From the driver's record, which knows places, to the journal's entry, which has names.

use std::time::{Duration, SystemTime};

use baton_ha::config::{Family, HaConfig};
use baton_ha::record::{self, Channel, Heard, Record, Who, Words};

use super::{
    AdvertKnown, ChannelKnown, Entry, HeartbeatKnown, Known, PathKnown, PeerKnown, Stranger, What,
};

/// What this daemon writes on each entry, and the names of what records have as places.
#[derive(Debug, Clone)]
pub(super) struct Names {
    node: String,
    boot: String,
    paths: Vec<String>,
    peers: Vec<String>,
}

impl Names {
    pub(super) fn new(ha: &HaConfig) -> Self {
        let two = |interface: &str| {
            ha.paths.iter().filter(|path| path.interface == interface).count() > 1
        };
        let path = |path: &baton_ha::config::Path| match (two(&path.interface), path.family) {
            (false, _) => path.interface.clone(),
            (true, Family::V4) => format!("{} IPv4", path.interface),
            (true, Family::V6) => format!("{} IPv6", path.interface),
        };
        Self {
            node: ha.node.clone(),
            boot: boot_id(),
            paths: ha.paths.iter().map(path).collect(),
            peers: ha.peers.iter().map(|peer| peer.name.clone()).collect(),
        }
    }

    pub(super) fn boot(&self) -> &str {
        &self.boot
    }

    /// The entry of a record, but for what the driver does not know.
    pub(super) fn entry(&self, record: &Record) -> Entry {
        self.with(record, self.what(record.what))
    }

    /// The same with another word on what happened.
    pub(super) fn with(&self, record: &Record, what: What) -> Entry {
        Entry {
            wall: wall(record.at.wall),
            boot: self.boot.clone(),
            mono_us: u64::try_from(record.at.boot.as_micros()).unwrap_or(u64::MAX),
            pid: std::process::id(),
            node: self.node.clone(),
            what,
            missing: 0,
            known: record.known.as_ref().map(|known| self.known(known)),
            flows: None,
            health: None,
        }
    }

    fn what(&self, what: record::What) -> What {
        use record::What as W;
        match what {
            W::Started => What::Started { version: env!("CARGO_PKG_VERSION").into(), before: None },
            W::Stopping(why) => What::Stopping { why: why.to_string() },
            W::Transition { transition, fault } => What::Transition {
                from: transition.from,
                to: transition.to,
                reason: transition.reason,
                fault: some(fault),
            },
            W::Follows(who) => What::Follows { peer: self.who(who) },
            W::Rival { who, priority } => {
                What::Rival { peer: self.who(who), priority: priority.value() }
            }
            W::Path { path, usable, why } => {
                What::Path { path: self.path(path), usable, why: some(why) }
            }
            W::ChannelUp(peer) => What::ChannelUp { peer: self.peer(peer) },
            W::ChannelDown(peer) => What::ChannelDown { peer: self.peer(peer) },
            W::PeerRefused { peer, why } => {
                What::PeerRefused { peer: self.peer(peer), why: why.to_string() }
            }
            W::Slept(late) => What::Slept { ms: ms(late) },
            W::Waits(why) => What::Waits { why: why.to_string() },
            W::Did(what) => What::Did { what: what.to_string() },
            W::Asked { what, by } => What::Asked { what: what.to_string(), by: by.to_string() },
            W::Refused { what, why } => {
                What::Refused { what: what.to_string(), why: why.to_string() }
            }
        }
    }

    fn known(&self, known: &record::Known) -> Known {
        let paths = known.paths.iter().enumerate();
        let paths = paths.filter_map(|(place, usable)| {
            Some(PathKnown { path: self.path(place), usable: (*usable)? })
        });
        let peers = known.peers.iter().enumerate();
        let peers = peers.filter_map(|(place, peer)| Some(self.peer_known(place, peer.as_ref()?)));
        Known {
            state: known.state,
            epoch: known.epoch,
            priority: known.priority.value(),
            lease_ms: known.lease.map(ms),
            active: known.active.map(|who| self.who(who)),
            active_down_ms: known.active_down.map(ms),
            paths: paths.collect(),
            peers: peers.collect(),
            stranger: known.stranger.map(|(address, Heard { ago, priority })| Stranger {
                address: address.to_string(),
                ms: ms(ago),
                priority: priority.value(),
            }),
        }
    }

    fn peer_known(&self, place: usize, peer: &record::PeerKnown) -> PeerKnown {
        let adverts = peer.adverts.iter().enumerate().filter_map(|(path, heard)| {
            let Heard { ago, priority } = (*heard)?;
            Some(AdvertKnown { path: self.path(path), ms: ms(ago), priority: priority.value() })
        });
        PeerKnown {
            peer: self.peer(place),
            adverts: adverts.collect(),
            heartbeat: peer.beat.map(|beat| HeartbeatKnown {
                ms: ms(beat.ago),
                epoch: beat.epoch,
                lease_ms: ms(beat.lease),
                priority: beat.priority.map(|priority| priority.value()),
                silence_ms: f64::from(beat.word.silence_us) / 1e3,
            }),
            channel: match peer.channel {
                Channel::Never => ChannelKnown::Never,
                Channel::Up(since) => ChannelKnown::Up { ms: ms(since) },
                Channel::Down { ago, by_peer, lease, why } => ChannelKnown::Down {
                    ms: ms(ago),
                    by_peer,
                    lease_ms: ms(lease),
                    why: why.to_string(),
                },
            },
        }
    }

    fn who(&self, who: Who) -> String {
        match who {
            Who::Peer(place) => self.peer(place),
            Who::Stranger(address) => address.to_string(),
        }
    }

    fn peer(&self, place: usize) -> String {
        self.peers.get(place).cloned().unwrap_or_else(|| format!("peer {place}"))
    }

    fn path(&self, place: usize) -> String {
        self.paths.get(place).cloned().unwrap_or_else(|| format!("path {place}"))
    }
}

fn some(words: Words) -> Option<String> {
    Some(words.to_string()).filter(|words| !words.is_empty())
}

pub(super) fn wall(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

/// Milliseconds, to the microsecond.
fn ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

/// The boot that the machine is in; a journal tells by it which clocks can be compared.
pub(super) fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}
