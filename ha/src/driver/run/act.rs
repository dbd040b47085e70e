//! What the node wants done, in its order.

use std::time::{Instant, SystemTime};

use tracing::{info, warn};

use super::{Driver, Purpose, VIEW_SENT};
use crate::driver::commands::Kind;
use crate::driver::counters::Counter;
use crate::handover;
use crate::io::netlink::Operation;
use crate::lease;
use crate::node::{Input, Output};
use crate::vrrp::Priority;
use crate::vrrp::router::{Reason, State, Transition};

impl Driver {
    /// Does what the node wants, in its order.
    pub(super) async fn perform(&mut self) {
        while let Some(output) = self.node.poll_output() {
            match output {
                Output::SendAdvert(priority) => self.send_advert(priority),
                Output::ConfigureVips => {
                    let all = (0..self.config.vips.len()).collect();
                    self.ask(Operation::Configure(all), Purpose::Claim);
                }
                Output::RefreshVips => {
                    // One that waits already will do.
                    if !self.asked.iter().any(|(_, purpose)| *purpose == Purpose::Refresh) {
                        let all = (0..self.config.vips.len()).collect();
                        self.ask(Operation::Configure(all), Purpose::Refresh);
                    }
                }
                Output::RestoreVip(vip) => {
                    self.ask(Operation::Configure(vec![vip]), Purpose::Restore(vip));
                }
                Output::RemoveVips => self.remove_vips().await,
                Output::Announce => self.announce(),
                Output::Transition(transition) => self.transition(transition),
            }
        }
    }

    fn send_advert(&mut self, priority: Priority) {
        if priority != Priority::YIELD {
            let epoch = self.fence.hold();
            // Before the advert, from which a Backup counts.
            self.renew_lease(Instant::now(), epoch);
        }
        let (sent, failed) = self.ports.send_advert(priority);
        self.beat(Instant::now(), Some(priority));
        self.counters.count(Counter::AdvertSent, sent);
        for what in failed {
            self.trouble(Counter::AdvertSendFailed, what);
        }
        let now = Instant::now();
        if let Some(pending) = &mut self.pending
            && pending.is_first_advert()
        {
            pending.step(now, format!("advert of priority {priority} sent"));
        }
        self.publish_by(now + VIEW_SENT);
    }

    /// Holds the VIPs from now on for as long as heartbeats and adverts carry it; in silence while
    /// a handover lets no packet pass.
    pub(super) fn renew_lease(&mut self, now: Instant, epoch: u64) {
        let Some(lease) = &self.lease else { return };
        let slow = lease::length(self.config.advert_interval.duration());
        let quick = self.heart.lease(now);
        self.leased_quickly = quick.is_some();
        let length = quick.map_or(slow, |quick| quick.min(slow));
        match self.handover.as_ref().is_some_and(handover::Machine::is_frozen) {
            true => lease.hold(length),
            false => lease.renew(length, epoch),
        }
    }

    fn ask(&mut self, operation: Operation, purpose: Purpose) {
        match self.netlink.request(operation) {
            Some(ticket) => self.asked.push_back((ticket, purpose)),
            None => {
                let why = "the kernel does not answer netlink requests".to_owned();
                self.trouble(Counter::ConfigureFailed, why.clone());
                if purpose != Purpose::Refresh {
                    self.node.handle_input(Instant::now(), Input::ConfigureFailed(why));
                }
            }
        }
    }

    async fn remove_vips(&mut self) {
        self.fence.release();
        // At once; removing takes the kernel a while.
        if let Some(lease) = &self.lease {
            lease.close();
        }
        self.asked.clear();
        let (result, others) = self.netlink.remove().await;
        self.deferred.extend(others);
        match result {
            Ok(()) => {
                if let Some(lease) = &self.lease {
                    lease.end();
                }
            }
            // The lease runs on, and when it ends the guard tries too.
            Err(why) => self.trouble(Counter::RemoveFailed, why),
        }
        let now = Instant::now();
        if let Some(pending) = &mut self.pending {
            pending.step(now, "VIPs removed");
        }
        self.publish_by(now);
    }

    fn announce(&mut self) {
        let (sent, failed) = self.ports.announce();
        self.counters.count(Counter::AnnouncementSent, sent);
        for what in failed {
            self.trouble(Counter::AnnouncementFailed, what);
        }
        if let Some(mut pending) = self.pending.take_if(|pending| pending.kind == Kind::Takeover) {
            pending.step(Instant::now(), "VIPs announced");
            pending.succeed(self.fence.epoch(), None);
        }
        self.announced = true;
    }

    fn transition(&mut self, transition: Transition) {
        let now = Instant::now();
        let Transition { from, to, reason } = transition;
        self.heart.stand(now, to);
        if from != to {
            self.since = (now, SystemTime::now());
        }
        if to == State::Active {
            self.takeovers += u64::from(from != to);
            self.neighbors.none_active();
        }
        self.record_transition(now, transition);
        let (node, vrid) = (self.config.node.clone(), self.config.vrid);
        let priority = self.node.advertised_priority();
        match self.node.fault().filter(|_| reason == Reason::Fault) {
            Some(fault) => self.journal.say(move || {
                warn!(node, %vrid, ?from, ?to, ?reason, fault, "transition");
            }),
            None => self.journal.say(move || {
                info!(node, %vrid, ?from, ?to, ?reason, %priority, "transition");
            }),
        }
        self.settle(now, transition);
        self.publish_by(now);
    }
}
