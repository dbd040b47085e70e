//! What was heard of each peer on each path, and when; and how many records there may be.
//!
//! Pure, and of a fixed size once it is made: nothing that comes in makes it grow.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{BeatHeard, Channel, Heard, PATHS, PEERS, PeerKnown, What, Who, Words};
use crate::channel::message::Heartbeat;
use crate::config::HaConfig;
use crate::vrrp::Priority;
use crate::vrrp::router::Advert;

/// Transitions that may be recorded at once, and after that so many a second.
const TRANSITIONS: Pace = Pace::new(500, 5);
/// The same for everything else.
const REST: Pace = Pace::new(200, 2);

/// See the module.
#[derive(Debug)]
pub struct Memory {
    /// In the order of the configuration.
    peers: Vec<Peer>,
    /// Whose each address is.
    addresses: Vec<(IpAddr, usize)>,
    /// The place of each peer of the channel among the peers.
    by_channel: Vec<Option<usize>>,
    stranger: Option<(IpAddr, Instant, Priority)>,
    active: Option<(Who, Duration)>,
    paths: [Option<bool>; PATHS],
    transitions: Pace,
    rest: Pace,
}

#[derive(Debug, Clone, Copy, Default)]
struct Peer {
    adverts: [Option<(Instant, Priority)>; PATHS],
    beat: Option<(Instant, Heartbeat)>,
    link: Link,
    /// Why the last attempt was refused, while that is so.
    refused: Words,
}

#[derive(Debug, Clone, Copy, Default)]
enum Link {
    #[default]
    Never,
    Up(Instant),
    Down {
        at: Instant,
        by_peer: bool,
        lease: Duration,
        why: Words,
    },
}

impl Memory {
    /// That of a node that has heard nothing.
    pub fn new(config: &HaConfig) -> Self {
        let peers = config.peers.iter().take(PEERS);
        let addresses = peers.clone().enumerate();
        let addresses = addresses
            .flat_map(|(place, peer)| peer.addresses.iter().map(move |address| (*address, place)));
        let channel = config.channel.iter().flat_map(|channel| &channel.peers);
        let place = |name: &str| config.peers.iter().take(PEERS).position(|p| p.name == name);
        Self {
            addresses: addresses.collect(),
            by_channel: channel.map(|peer| place(&peer.name)).collect(),
            peers: vec![Peer::default(); peers.len()],
            stranger: None,
            active: None,
            paths: [None; PATHS],
            transitions: TRANSITIONS,
            rest: REST,
        }
    }

    /// Whose address that is.
    pub fn who(&self, address: IpAddr) -> Who {
        let known = self.addresses.iter().find(|(known, _)| *known == address);
        known.map_or(Who::Stranger(address), |(_, place)| Who::Peer(*place))
    }

    /// The place of a peer of the channel among the peers; `None` where records leave it out.
    pub fn peer(&self, channel: usize) -> Option<usize> {
        self.by_channel.get(channel).copied().flatten()
    }

    /// An advert came on a path.
    pub fn advert(&mut self, now: Instant, path: usize, advert: &Advert) {
        let heard = (now, advert.priority);
        match self.who(advert.source) {
            Who::Peer(peer) => {
                if let Some(place) = self.peers[peer].adverts.get_mut(path) {
                    *place = Some(heard);
                }
            }
            Who::Stranger(address) => self.stranger = Some((address, heard.0, heard.1)),
        }
    }

    /// A heartbeat came on the channel.
    pub fn heartbeat(&mut self, now: Instant, channel: usize, heartbeat: Heartbeat) {
        if let Some(peer) = self.peer(channel) {
            self.peers[peer].beat = Some((now, heartbeat));
        }
    }

    /// A channel is up: what is to be recorded.
    pub fn up(&mut self, now: Instant, channel: usize) -> Option<What> {
        let place = self.peer(channel)?;
        self.peers[place].link = Link::Up(now);
        self.peers[place].refused = Words::NONE;
        Some(What::ChannelUp(place))
    }

    /// A channel is down: what is to be recorded.
    pub fn down(&mut self, now: Instant, channel: usize, by_peer: bool, why: &str) -> Option<What> {
        let place = self.peer(channel)?;
        let peer = &mut self.peers[place];
        let lease = peer.beat.map_or(Duration::ZERO, |(at, beat)| lease_left(now, at, &beat));
        peer.link = Link::Down { at: now, by_peer, lease, why: Words::of(why) };
        Some(What::ChannelDown(place))
    }

    /// A peer was refused; to be recorded unless the last thing that was said of it is the same.
    pub fn refused(&mut self, channel: usize, why: Words) -> Option<What> {
        let peer = self.peer(channel)?;
        let before = std::mem::replace(&mut self.peers[peer].refused, why);
        (before != why).then_some(What::PeerRefused { peer, why })
    }

    /// Who is heard as Active now, with its interval; what is to be recorded, if that is news.
    pub fn active(&mut self, heard: Option<(IpAddr, Duration)>) -> Option<What> {
        let heard = heard.map(|(address, interval)| (self.who(address), interval));
        let before = std::mem::replace(&mut self.active, heard);
        let (who, _) = heard?;
        (before.map(|(who, _)| who) != Some(who)).then_some(What::Follows(who))
    }

    /// Whether a path works now; what is to be recorded, if that is news.
    pub fn path(&mut self, path: usize, usable: Result<(), &str>) -> Option<What> {
        let known = self.paths.get_mut(path)?;
        let before = known.replace(usable.is_ok());
        (before.is_some_and(|before| before != usable.is_ok())).then(|| What::Path {
            path,
            usable: usable.is_ok(),
            why: usable.map_or_else(Words::of, |()| Words::NONE),
        })
    }

    /// The node last heard as Active, and its interval.
    pub fn heard_active(&self) -> Option<(Who, Duration)> {
        self.active
    }

    /// Whether each path works.
    pub fn paths(&self) -> [Option<bool>; PATHS] {
        self.paths
    }

    /// What is known of each peer now.
    pub fn peers(&self, now: Instant) -> [Option<PeerKnown>; PEERS] {
        let mut known = [None; PEERS];
        known.iter_mut().zip(&self.peers).for_each(|(known, peer)| *known = Some(peer.known(now)));
        known
    }

    /// The last node heard that is no peer.
    pub fn stranger(&self, now: Instant) -> Option<(IpAddr, Heard)> {
        self.stranger.map(|(address, at, priority)| (address, heard(now, at, priority)))
    }

    /// Whether there may be a record now: a flood of events is to leave the history alone.
    pub fn admit(&mut self, now: Instant, what: &What) -> bool {
        let pace = if what.is_transition() { &mut self.transitions } else { &mut self.rest };
        pace.take(now)
    }
}

impl Peer {
    fn known(&self, now: Instant) -> PeerKnown {
        PeerKnown {
            adverts: self.adverts.map(|advert| {
                let (at, priority) = advert?;
                Some(heard(now, at, priority))
            }),
            beat: self.beat.map(|(at, beat)| BeatHeard {
                ago: now.saturating_duration_since(at),
                epoch: beat.epoch,
                lease: Duration::from_micros(beat.lease_us.into()),
                word: beat.word,
                priority: beat.advert.map(|advert| Priority::new(advert.priority)),
            }),
            channel: match self.link {
                Link::Never => Channel::Never,
                Link::Up(since) => Channel::Up(now.saturating_duration_since(since)),
                Link::Down { at, by_peer, lease, why } => {
                    Channel::Down { ago: now.saturating_duration_since(at), by_peer, lease, why }
                }
            },
        }
    }
}

fn heard(now: Instant, at: Instant, priority: Priority) -> Heard {
    Heard { ago: now.saturating_duration_since(at), priority }
}

fn lease_left(now: Instant, at: Instant, beat: &Heartbeat) -> Duration {
    let said = Duration::from_micros(beat.lease_us.into());
    said.saturating_sub(now.saturating_duration_since(at))
}

/// So many at once, and after that so many a second.
#[derive(Debug, Clone, Copy)]
struct Pace {
    most: u32,
    per_second: u32,
    left: u32,
    filled: Option<Instant>,
}

impl Pace {
    const fn new(most: u32, per_second: u32) -> Self {
        Self { most, per_second, left: most, filled: None }
    }

    fn take(&mut self, now: Instant) -> bool {
        let filled = *self.filled.get_or_insert(now);
        let seconds = now.saturating_duration_since(filled).as_secs();
        if seconds > 0 {
            let more = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_mul(self.per_second);
            self.left = self.left.saturating_add(more).min(self.most);
            self.filled = Some(filled + Duration::from_secs(seconds));
        }
        let taken = self.left > 0;
        self.left = self.left.saturating_sub(1);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::message::HeartbeatAdvert;
    use crate::gateway::Reach;
    use crate::heart::{Standing, Word};
    use crate::node::tests::config;
    use crate::vrrp::AdverInterval;

    fn memory() -> Memory {
        let mut config = config(100);
        let peer = |name: &str, address: &str| crate::config::Peer {
            name: name.to_owned(),
            addresses: vec![address.parse().unwrap()],
        };
        config.peers = vec![peer("b", "10.77.0.3"), peer("c", "10.77.0.4")];
        let at = |name: &str| crate::config::ChannelPeer {
            name: name.to_owned(),
            address: "10.78.0.3:1".parse().unwrap(),
        };
        config.channel = Some(crate::config::ChannelConfig {
            cluster: "lab".to_owned(),
            key: crate::channel::key::ClusterKey::from_bytes([7; 32]),
            address: "10.78.0.2:1".parse().unwrap(),
            // In another order than the peers.
            peers: vec![at("c"), at("b")],
            heartbeat: Duration::from_millis(10),
            replicates: true,
        });
        Memory::new(&config)
    }

    fn advert(source: &str, priority: u8) -> Advert {
        Advert {
            source: source.parse().unwrap(),
            local: "10.77.0.2".parse().unwrap(),
            priority: Priority::new(priority),
            interval: AdverInterval::from_centiseconds(10).unwrap(),
        }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn each_peer_is_remembered_on_each_path() {
        let (mut memory, start) = (memory(), Instant::now());
        memory.advert(start, 0, &advert("10.77.0.3", 200));
        memory.advert(start + 2 * MS, 1, &advert("10.77.0.3", 200));
        memory.advert(start + 3 * MS, PATHS, &advert("10.77.0.3", 200));
        memory.advert(start + 4 * MS, 0, &advert("10.9.9.9", 50));
        let advert = HeartbeatAdvert {
            source: "10.77.0.3".parse().unwrap(),
            priority: 200,
            interval_cs: 10,
        };
        let (standing, gateway) = (Standing::Active, Reach::Unknown);
        let word =
            Word { standing, gateway, silence_us: 40, stamp_us: 0, echo_us: 0, quick: false };
        let beat = Heartbeat { epoch: 7, lease_us: 250_000, word, advert: Some(advert) };
        memory.heartbeat(start + 5 * MS, 1, beat);
        memory.heartbeat(start + 5 * MS, 9, beat);
        let down = memory.down(start + 15 * MS, 1, true, "it has closed the connection");
        assert_eq!(down, Some(What::ChannelDown(0)), "the second of the channel is the first");
        let now = start + 20 * MS;
        let [Some(b), Some(c), None, ..] = memory.peers(now) else { panic!("two peers") };
        let priority = Priority::new(200);
        assert_eq!(b.adverts[0], Some(Heard { ago: 20 * MS, priority }));
        assert_eq!(b.adverts[1], Some(Heard { ago: 18 * MS, priority }));
        assert_eq!(b.adverts[2..], [None; PATHS - 2]);
        let (lease, ago) = (250 * MS, 15 * MS);
        let priority = Some(priority);
        assert_eq!(b.beat, Some(BeatHeard { ago, epoch: 7, lease, word, priority }));
        let why = Words::of("it has closed the connection");
        assert_eq!(b.channel, Channel::Down { ago: 5 * MS, by_peer: true, lease: 240 * MS, why });
        assert_eq!((c.beat, c.channel), (None, Channel::Never));
        let heard = Heard { ago: 16 * MS, priority: Priority::new(50) };
        assert_eq!(memory.stranger(now), Some(("10.9.9.9".parse().unwrap(), heard)));
    }

    #[test]
    fn only_news_is_recorded() {
        let (mut memory, now) = (memory(), Instant::now());
        let heard = |address: &str| Some((address.parse().unwrap(), 10 * MS));
        assert_eq!(memory.active(heard("10.77.0.4")), Some(What::Follows(Who::Peer(1))));
        assert_eq!(memory.active(heard("10.77.0.4")), None);
        assert_eq!(memory.active(None), None);
        assert_eq!(memory.active(heard("10.77.0.4")), Some(What::Follows(Who::Peer(1))));
        assert_eq!(memory.path(0, Ok(())), None, "the first look");
        assert_eq!(memory.path(0, Ok(())), None);
        let why = Words::of("no carrier");
        assert_eq!(
            memory.path(0, Err("no carrier")),
            Some(What::Path { path: 0, usable: false, why })
        );
        assert_eq!(memory.path(PATHS, Err("no carrier")), None);
        let why = Words::of("another key");
        assert_eq!(memory.refused(0, why), Some(What::PeerRefused { peer: 1, why }));
        assert_eq!(memory.refused(0, why), None, "once");
        assert_eq!(memory.up(now, 0), Some(What::ChannelUp(1)));
        assert!(memory.refused(0, why).is_some(), "again");
    }

    #[test]
    fn a_flood_is_held_back_and_transitions_last() {
        let (mut memory, start) = (memory(), Instant::now());
        for _ in 0..REST.most {
            assert!(memory.admit(start, &What::Started));
        }
        for _ in 0..7 {
            assert!(!memory.admit(start, &What::Started));
        }
        let transition = What::Transition {
            transition: crate::vrrp::router::Transition {
                from: crate::vrrp::router::State::Backup,
                to: crate::vrrp::router::State::Active,
                reason: crate::vrrp::router::Reason::ActiveDown,
            },
            fault: Words::NONE,
        };
        assert!(memory.admit(start, &transition));
        let later = start + Duration::from_millis(1500);
        assert!(memory.admit(later, &What::Started));
        assert!(memory.admit(later, &What::Started));
        assert!(!memory.admit(later, &What::Started), "two a second");
    }
}
