//! What comes in on the sockets: adverts, ARP, Neighbor Advertisements.

use std::net::IpAddr;
use std::time::Instant;

use tracing::{info, trace, warn};

use super::{BATCH, Driver, RETRY, VIEW_HEARD, VIEW_SENT};
use crate::announce::{parse_arp, parse_na};
use crate::config::{Family, Transport};
use crate::driver::counters::Counter;
use crate::io::{ether, vrrp};
use crate::node::Input;
use crate::record::What;
use crate::vrrp::Priority;
use crate::vrrp::packet::{DecodeError, Receiver, decode};
use crate::vrrp::router::{Advert, State};

impl Driver {
    pub(super) async fn read_adverts(&mut self) {
        let mut buffer = [0; vrrp::RECEIVE_BUFFER];
        for place in 0..self.ports.paths.len() {
            for _ in 0..BATCH {
                let Some(socket) = &self.ports.paths[place].socket else { break };
                match socket.receive(&mut buffer) {
                    Ok(Some(datagram)) => self.packet(place, datagram, &buffer).await,
                    Ok(None) => break,
                    Err(error) => {
                        self.ports.paths[place].socket = None;
                        self.reopen_later(format!("receive adverts: {error}"));
                        break;
                    }
                }
            }
        }
    }

    async fn packet(&mut self, place: usize, datagram: vrrp::Datagram, buffer: &[u8]) {
        let now = Instant::now();
        let port = &mut self.ports.paths[place];
        let receiver = Receiver { vrid: self.config.vrid, own: &self.ports.own };
        let opened = datagram.open(buffer);
        let source = opened.as_ref().ok().map(|(envelope, _)| envelope.ends.source());
        let decoded = opened.and_then(|(envelope, bytes)| decode(bytes, &envelope, &receiver));
        let (received, source, local) = match (decoded, source, &port.primary) {
            (Ok(received), Some(source), Ok(local)) => (received, source, *local),
            (Err(error), _, _) => {
                let interface = port.path.interface.clone();
                self.garbage(now, source, &interface, error);
                return;
            }
            // Without an address of its own, the path takes no part.
            (Ok(_), _, _) => return,
        };
        if let Transport::Unicast(peers) = &port.path.transport
            && !peers.contains(&source)
        {
            self.stranger(now, source);
            return;
        }
        if let Some(place) = self.stale_peer(source) {
            return self.fenced(now, place, None);
        }
        let port = &mut self.ports.paths[place];
        port.received += 1;
        let same_addresses = received.addresses.same_as(&port.path.addresses);
        let interface = port.path.interface.clone();
        self.counters.count(Counter::AdvertReceived, 1);
        let advert =
            Advert { source, local, priority: received.priority, interval: received.interval };
        if tracing::enabled!(tracing::Level::TRACE) {
            let listed: Vec<IpAddr> = received.addresses.iter().collect();
            self.journal.say(move || trace!(?advert, ?listed, interface, "advert received"));
        }
        self.memory.advert(now, place, &advert);
        self.compare(now, &advert, same_addresses);
        if self.neighbors.hear(now, &advert)
            && let Some(suppressed) = self.note(Counter::NewNode, now)
        {
            let node = self.neighbors.label(source);
            self.journal.say(move || {
                info!(node, priority = %advert.priority, suppressed, "another node advertises");
            });
        }
        if let Some(place) = self.place_of(source) {
            self.heart.hear_advert(now, place, advert.priority == Priority::YIELD);
        }
        self.publish_by(now + VIEW_HEARD);
        self.choose_preemption(source);
        self.feed(Input::Advert(advert)).await;
        self.another_is_active(&advert);
    }

    /// Says what an operator can mend.
    fn compare(&mut self, now: Instant, advert: &Advert, same_addresses: bool) {
        let (source, priority) = (advert.source, advert.priority);
        if !same_addresses && let Some(suppressed) = self.note(Counter::AddressesDiffer, now) {
            let node = self.neighbors.label(source);
            self.journal.say(move || {
                warn!(
                    node,
                    suppressed,
                    "advert lists other addresses than this node: compare \
                    the VIPs of both configurations"
                );
            });
        }
        let (theirs, ours) = (advert.interval.duration(), self.config.advert_interval.duration());
        if theirs != ours
            && let Some(suppressed) = self.note(Counter::IntervalDiffers, now)
        {
            let node = self.neighbors.label(source);
            self.journal.say(move || {
                warn!(
                    node,
                    ?theirs,
                    ?ours,
                    suppressed,
                    "advertisement intervals differ: make \
                    them the same"
                );
            });
        }
        if self.node.state() == State::Active
            && priority != Priority::YIELD
            && let Some(suppressed) = self.note(Counter::RivalAdvert, now)
        {
            self.record(now, What::Rival { who: self.memory.who(source), priority });
            let node = self.neighbors.label(source);
            self.journal.say(move || {
                info!(node, %priority, suppressed, "another node advertises while this one is \
                    Active");
            });
        }
    }

    fn garbage(&mut self, now: Instant, source: Option<IpAddr>, interface: &str, why: DecodeError) {
        if let DecodeError::OtherVrid(_) = why {
            // Another virtual router on this LAN.
            self.counters.count(Counter::AdvertOtherVrid, 1);
            self.publish_by(now + VIEW_SENT);
            return;
        }
        if let Some(suppressed) = self.note(Counter::from(&why), now) {
            let interface = interface.to_owned();
            self.journal.say(move || {
                warn!(?source, interface, suppressed, "packet is no advert for this node: {why}");
            });
        }
    }

    /// Where the peers are listed, nobody else is heard.
    fn stranger(&mut self, now: Instant, source: IpAddr) {
        if let Some(suppressed) = self.note(Counter::AdvertStranger, now) {
            self.journal.say(move || {
                warn!(%source, suppressed, "advert of a node that is not among the unicast peers");
            });
        }
    }

    pub(super) async fn read_frames(&mut self) {
        let mut buffer = [0; ether::RECEIVE_BUFFER];
        for place in 0..self.ports.ears.len() {
            for _ in 0..BATCH {
                let Some(socket) = &self.ports.ears[place].socket else { break };
                match socket.receive(&mut buffer) {
                    Ok(Some(length)) => self.frame(place, &buffer[..length]).await,
                    Ok(None) => break,
                    Err(error) => {
                        self.ports.ears[place].socket = None;
                        self.reopen_later(format!("receive frames: {error}"));
                        break;
                    }
                }
            }
        }
    }

    /// A socket with an error was closed: one that keeps it would keep the loop spinning.
    fn reopen_later(&mut self, why: String) {
        let retry_at = Instant::now() + RETRY;
        self.retry_at = Some(self.retry_at.map_or(retry_at, |at| at.min(retry_at)));
        self.trouble(Counter::SocketTrouble, why);
    }

    async fn frame(&mut self, place: usize, frame: &[u8]) {
        let now = Instant::now();
        let ear = &self.ports.ears[place];
        let vips: Vec<IpAddr> = self
            .config
            .vips
            .iter()
            .filter(|vip| vip.interface == ear.interface)
            .map(|vip| vip.address)
            .collect();
        let macs = &self.ports.macs;
        let rival = match ear.family {
            Family::V4 => parse_arp(frame).map(|arp| arp.rival(macs, &vips)),
            Family::V6 => parse_na(frame).map(|na| na.rival(macs, &vips)),
        };
        let interface = ear.interface.clone();
        match rival {
            Ok(Some(rival)) if self.node.state() == State::Active => {
                if let Some(suppressed) = self.note(Counter::from(rival.evidence), now) {
                    self.journal.say(move || {
                        warn!(?rival, interface, suppressed, "another MAC claims a VIP");
                    });
                }
                self.feed(Input::Rival).await;
            }
            Ok(_) => {}
            Err(why) => {
                if let Some(suppressed) = self.note(Counter::from(&why), now) {
                    self.journal.say(move || {
                        info!(interface, suppressed, "frame is neither ARP nor NA: {why}");
                    });
                }
            }
        }
    }
}
