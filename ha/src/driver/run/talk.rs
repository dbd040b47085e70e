//! The peer channel: heartbeats, which are adverts on a path of their own, and what others send
//! over it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::error::TrySendError;
use tracing::{info, warn};

use super::{Driver, VIEW_HEARD};
use crate::channel::message::{Heartbeat, HeartbeatAdvert, Message};
use crate::channel::wire;
use crate::config::Family;
use crate::driver::PeerEvent;
use crate::driver::channels::{Ended, Happening, PeerPlace};
use crate::driver::counters::Counter;
use crate::fence::Verdict;
use crate::handover;
use crate::heart;
use crate::node::Input;
use crate::record::{What, Words};
use crate::vrrp::router::{Advert, State};
use crate::vrrp::{AdverInterval, Priority};

impl Driver {
    /// Reads and writes the channel, and takes in what came. What comes in `history` was queued
    /// while this node slept: it says nothing of who is Active now.
    pub(super) async fn talk(&mut self, now: Instant, history: bool) {
        let Some(channels) = &mut self.channels else { return };
        channels.work(now);
        if self.heartbeat_at.is_some_and(|at| at <= now) {
            self.beat(now, self.advert_now());
        }
        while let Some(happening) = self.channels.as_mut().and_then(|c| c.poll_happening()) {
            self.happening(now, happening, history).await;
        }
        self.heed().await;
    }

    /// What follows from what the peers say.
    pub(super) async fn heed(&mut self) {
        while let Some(output) = self.heart.poll_output() {
            match output {
                heart::Output::Tell(input) => {
                    if let Input::Unheard | Input::Gateway(_) = &input {
                        let told = format!("{input:?}");
                        let what = Words::of(format_args!("by what the peers say: {told}"));
                        self.record(Instant::now(), What::Did(what));
                        self.journal.say(move || info!(told, "by what the peers say"));
                    }
                    self.feed(input).await;
                }
                heart::Output::Beat => self.beat(Instant::now(), self.advert_now()),
            }
        }
    }

    /// The peer on the channel that has this address.
    pub(super) fn place_of(&self, source: IpAddr) -> Option<PeerPlace> {
        let name = self.neighbors.name(source)?;
        let channels = self.channels.as_ref()?;
        channels.peers.iter().position(|peer| peer.name == name)
    }

    /// What heartbeats say of this node's adverts.
    fn advert_now(&self) -> Option<Priority> {
        (self.node.state() == State::Active).then(|| self.node.advertised_priority())
    }

    /// A heartbeat to every peer.
    pub(super) fn beat(&mut self, now: Instant, priority: Option<Priority>) {
        if priority.is_some_and(|priority| priority != Priority::YIELD)
            && let Some(epoch) = self.fence.holding()
            && self.heart.lease(now).is_some()
        {
            self.renew_lease(now, epoch);
        }
        let Some(channels) = &mut self.channels else { return };
        self.heartbeat_at = Some(now + self.heartbeat);
        let source = self.ports.paths.iter().find_map(|port| port.primary.as_ref().ok());
        let advert = source.zip(priority).map(|(source, priority)| HeartbeatAdvert {
            source: *source,
            priority: priority.value(),
            interval_cs: self.config.advert_interval.centiseconds(),
        });
        let lease = self.lease.as_ref().map_or(0, |lease| lease.left().as_micros());
        for place in 0..channels.peers.len() {
            let heartbeat = Heartbeat {
                epoch: self.fence.epoch(),
                lease_us: u32::try_from(lease).unwrap_or(u32::MAX),
                word: self.heart.word(now, place),
                advert,
            };
            let message = wire::encode(&Message::Heartbeat(heartbeat));
            if channels.send(place, &message) {
                self.counters.count(Counter::HeartbeatSent, 1);
            }
        }
    }

    async fn happening(&mut self, now: Instant, happening: Happening, history: bool) {
        let name = |driver: &Self, place: PeerPlace| {
            driver.channels.as_ref().map(|channels| channels.peers[place].name.clone())
        };
        match happening {
            Happening::Up(place, peer) => {
                let what = self.memory.up(now, place);
                self.record(now, what);
                let (peer_name, boot, version) = (peer.node.clone(), peer.boot, peer.version);
                self.journal.say(move || {
                    info!(peer = peer_name, %boot, version, "peer channel is up");
                });
                self.heart.meet(now, place);
                self.tell(now, place, PeerEvent::Up { place, peer });
                self.beat(now, self.advert_now());
                self.tell_handover(now, handover::Input::Up(place)).await;
            }
            Happening::Down(place, why, ended) => {
                let peer = name(self, place);
                let what = self.memory.down(now, place, ended == Ended::ByPeer, &why);
                self.record(now, what);
                self.fence.forget(place);
                self.peer_gone(now, place, ended).await;
                self.journal.say(move || warn!(peer, why, "peer channel is down"));
                self.tell(now, place, PeerEvent::Down { place });
                self.tell_handover(now, handover::Input::Down(place)).await;
            }
            Happening::Refused(place, refused) => {
                let peer = name(self, place);
                let what = self.memory.refused(place, Words::of(&refused));
                self.record(now, what);
                if let Some(suppressed) = self.note(Counter::PeerRefused, now) {
                    self.journal.say(move || {
                        warn!(peer, suppressed, "peer channel refused: {refused}");
                    });
                }
            }
            Happening::Stranger(address, why) => {
                if let Some(suppressed) = self.note(Counter::PeerStranger, now) {
                    self.journal.say(move || {
                        warn!(%address, suppressed, "connection to the peer channel closed: {why}");
                    });
                }
            }
            Happening::Trouble(what) => self.trouble(Counter::SocketTrouble, what),
            Happening::Message(place, bytes) => match wire::decode::<Message>(&bytes) {
                Ok(Message::Heartbeat(heartbeat)) if !history => {
                    self.heartbeat(now, place, heartbeat).await;
                }
                Ok(Message::Heartbeat(_)) => self.counters.count(Counter::Stale, 1),
                Ok(Message::Handover(message)) if !history => {
                    let input = handover::Input::Message(place, message);
                    self.tell_handover(now, input).await;
                }
                // Whoever waits for an answer gives up in time.
                Ok(Message::Handover(_)) => self.counters.count(Counter::Stale, 1),
                // What it asks for itself, as one that follows, is heard.
                Ok(Message::Sync(frame)) if self.fence.is_stale(place) && frame.tells_flows() => {
                    self.counters.count(Counter::Fenced, 1);
                }
                Ok(Message::Sync(frame)) => {
                    self.tell(now, place, PeerEvent::Frame { place, frame });
                }
                Ok(Message::State(frame)) => {
                    self.tell(now, place, PeerEvent::State { place, frame });
                }
                Err(_) => {
                    self.note(Counter::PeerGarbage, now);
                    if let Some(channels) = &mut self.channels {
                        channels.end(now, place, "it sent what can't be read");
                    }
                }
            },
        }
        self.publish_by(now);
    }

    /// To whoever replicates. A peer has a window that this has room for; one that does not keep
    /// to it loses its connection.
    pub(super) fn tell(&mut self, now: Instant, place: PeerPlace, event: PeerEvent) {
        let Some(events) = &self.peer_events else { return };
        if let Err(TrySendError::Full(_)) = events.try_send(event)
            && let Some(channels) = &mut self.channels
        {
            channels.end(now, place, "it sent more than was taken in");
        }
    }

    /// The kernel of a node whose daemon has ended closes its connections: that is evidence, where
    /// silence is not.
    async fn peer_gone(&mut self, now: Instant, place: PeerPlace, ended: Ended) {
        if ended == Ended::ByPeer {
            self.heart.forget(now, place);
        }
        let Some(active_lease) = self.active_lease.take_if(|(active, _)| *active == place) else {
            return;
        };
        if ended == Ended::ByPeer {
            let left = active_lease.1.saturating_duration_since(now);
            self.feed(Input::ActiveGone(left)).await;
        }
    }

    async fn heartbeat(&mut self, now: Instant, place: PeerPlace, heartbeat: Heartbeat) {
        self.counters.count(Counter::HeartbeatReceived, 1);
        self.memory.heartbeat(now, place, heartbeat);
        self.heart.hear(now, place, heartbeat.word);
        let active =
            heartbeat.advert.is_some_and(|advert| advert.priority != Priority::YIELD.value());
        // Counted from its arrival, so never too short.
        let lease_end = now + Duration::from_micros(heartbeat.lease_us.into());
        match self.fence.hear(now, place, heartbeat.epoch, active.then_some(lease_end)) {
            Verdict::Heeded => {}
            Verdict::Stale => return self.fenced(now, place, Some(heartbeat.epoch)),
            Verdict::Deposed => self.deposed(&heartbeat).await,
        }
        if active {
            self.active_lease = Some((place, lease_end));
        } else {
            self.active_lease.take_if(|(active, _)| *active == place);
        }
        let lease = Duration::from_micros(heartbeat.lease_us.into());
        let Some(HeartbeatAdvert { source, priority, interval_cs }) = heartbeat.advert else {
            return self.heart.hear_lease(place, lease);
        };
        let (Some(local), Some(interval)) =
            (self.local_for(source), AdverInterval::from_centiseconds(interval_cs))
        else {
            return;
        };
        let advert = Advert { source, local, priority: Priority::new(priority), interval };
        if self.neighbors.hear(now, &advert) {
            let node = self.neighbors.label(source);
            self.journal.say(move || {
                info!(node, priority = %advert.priority, "another node advertises on the channel");
            });
        }
        self.publish_by(now + VIEW_HEARD);
        self.choose_preemption(source);
        self.feed(Input::Advert(advert)).await;
        self.another_is_active(&advert);
        self.heart.hear_lease(place, lease);
        // One that came in the same read renews this one's.
        self.heed().await;
    }

    /// Another has become Active since this node did: silence first, then the rest.
    async fn deposed(&mut self, heartbeat: &Heartbeat) {
        if let Some(lease) = &self.lease {
            lease.close();
        }
        let interval = heartbeat.advert.map(|advert| advert.interval_cs);
        let interval = interval.and_then(AdverInterval::from_centiseconds);
        self.feed(Input::Deposed(interval.unwrap_or(self.config.advert_interval))).await;
    }

    /// What an Active that another has replaced says is not heard.
    pub(super) fn fenced(&mut self, now: Instant, place: PeerPlace, epoch: Option<u64>) {
        let Some(suppressed) = self.note(Counter::Fenced, now) else { return };
        let Some(channels) = &self.channels else { return };
        let (peer, newest) = (channels.peers[place].name.clone(), self.fence.epoch());
        self.journal.say(move || {
            warn!(
                peer,
                ?epoch,
                newest,
                suppressed,
                "it believes itself Active, and was replaced: not heard"
            );
        });
    }

    /// The peer that sends from there, if it is an Active that another has replaced.
    pub(super) fn stale_peer(&self, source: IpAddr) -> Option<PeerPlace> {
        let from = self.config.peers.iter().find(|peer| peer.addresses.contains(&source))?;
        let mut peers = self.channels.as_ref()?.peers.iter();
        peers.position(|peer| peer.name == from.name).filter(|place| self.fence.is_stale(*place))
    }

    /// This node's own primary address of the same family, by which ties are broken.
    fn local_for(&self, source: IpAddr) -> Option<IpAddr> {
        let same = |local: &&IpAddr| Family::of(**local) == Family::of(source);
        let primaries = self.ports.paths.iter().filter_map(|port| port.primary.as_ref().ok());
        primaries.into_iter().find(same).copied()
    }
}
