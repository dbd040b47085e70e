//! This node: its virtual router together with what follows from being Active. The VIPs are
//! configured, refreshed before the kernel drops them and put back when something else removes
//! them; they are announced on a schedule, slowly ever after, and again on evidence of a rival.
//!
//! Pure: it never reads the clock, touches a socket or logs. [`crate::driver`] feeds it and does
//! what its [`Output`]s say, in their order.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::config::{AnnounceConfig, Family, HaConfig};
use crate::vrrp::router::{
    self, Advert, PreemptBy, Reason, RouterConfig, State, Transition, VirtualRouter, Wish,
};
use crate::vrrp::{AdverInterval, Priority};

/// The shortest time between two attempts to put a VIP back, so that a fight with a network
/// manager costs neither side much.
pub const RESTORE_INTERVAL: Duration = Duration::from_millis(100);

/// How often a VIP may fail to be configured, in a row, before that is a fault of this node.
pub const CONFIGURE_ATTEMPTS: u32 = 3;

/// How long such a fault lasts before this node takes part again.
pub const CONFIGURE_FAULT: Duration = Duration::from_secs(60);

/// What happens to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The daemon is up; every [`Input::Link`] and [`Input::Paths`] that is known came before.
    Startup,
    /// The daemon stops.
    Shutdown,
    /// A valid advert of another node.
    Advert(Advert),
    /// The Active's daemon has ended; what its lease has left.
    ActiveGone(Duration),
    /// Another node has become Active since this one did, with that interval.
    Deposed(AdverInterval),
    /// A Backup has said that it hears nothing of this node.
    Unheard,
    /// What the Active has told of its lease in a quick heartbeat.
    ActiveLease(Option<Duration>),
    /// A Backup may miss quick heartbeats: advertise now.
    Repeat,
    /// This node's lease ended before it was renewed.
    LeaseOver,
    /// Whether the gateway is lost to this node alone, and why that is thought.
    Gateway(Result<(), String>),
    /// The operator wants this node Active now.
    Takeover,
    /// The operator wants this node not to be Active.
    Yield,
    /// This node gives the VIPs to another, which knows.
    Give(Wish),
    /// Another node has given the VIPs to this one.
    Take(Wish),
    /// From now on, how this node preempts.
    PreemptBy(PreemptBy),
    /// Another MAC address claims a VIP (ARP, NA).
    Rival,
    /// The VIPs have another MAC address now than they were announced with.
    Moved,
    /// Whether an interface of the VIPs can carry them, with the reason where it can't.
    Link {
        /// Interface name.
        interface: String,
        /// `Err` says what is wrong.
        usable: Result<(), String>,
    },
    /// Whether there is a path that could carry adverts, with the reason where there is none.
    Paths(Result<(), String>),
    /// What the last [`Output::ConfigureVips`] or [`Output::RestoreVip`] asked for is done.
    Configured,
    /// It failed, with the reason.
    ConfigureFailed(String),
    /// The kernel does not have this VIP (by its place in the configuration), though it was
    /// configured.
    VipMissing(usize),
}

/// What the node wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send an advert with this priority on every path.
    SendAdvert(Priority),
    /// Configure every VIP and report [`Input::Configured`] or [`Input::ConfigureFailed`].
    ConfigureVips,
    /// Renew the lifetime of every VIP.
    RefreshVips,
    /// Remove every VIP; nothing else is sent before that is done.
    RemoveVips,
    /// Put back one VIP, by its place in the configuration; reported as for
    /// [`Output::ConfigureVips`].
    RestoreVip(usize),
    /// Announce every VIP.
    Announce,
    /// The state changed; to be logged and shown.
    Transition(Transition),
}

/// A node; see the module.
#[derive(Debug)]
pub struct Node {
    router: VirtualRouter,
    announce: AnnounceConfig,
    refresh_every: Duration,
    /// Per interface of the VIPs.
    links: BTreeMap<String, Result<(), String>>,
    paths: Result<(), String>,
    gateway: Result<(), String>,
    configure_fault: Option<(Instant, String)>,
    /// What the virtual router was told.
    faulted: bool,
    holding: Holding,
    outputs: VecDeque<Output>,
}

/// How the VIPs stand.
#[derive(Debug)]
enum Holding {
    /// Not ours.
    Nothing,
    /// Asked for; `retry_at` where the last attempt failed.
    Claiming { failures: u32, retry_at: Option<Instant>, refresh_at: Instant },
    /// Ours.
    Held(Held),
}

#[derive(Debug)]
struct Held {
    /// When they were configured: the schedule counts from here.
    since: Instant,
    /// The next entry of the schedule.
    next: usize,
    /// The next of the slow announcements.
    slow_at: Option<Instant>,
    /// The last announcement that a rival provoked.
    rival_last: Option<Instant>,
    /// The next one, where it has to wait.
    rival_at: Option<Instant>,
    refresh_at: Instant,
    /// VIPs to put back, and when.
    restore_at: BTreeMap<usize, Instant>,
    restored_last: BTreeMap<usize, Instant>,
    failures: u32,
}

impl Node {
    /// A node in Initialize. Every interface of the VIPs counts as unusable until an
    /// [`Input::Link`] says otherwise, and so do the paths.
    pub fn new(config: &HaConfig) -> Self {
        let unknown = |interface: &str| Err(format!("`{interface}` was not looked at yet"));
        Self {
            router: VirtualRouter::new(RouterConfig {
                priority: config.priority,
                advert_interval: config.advert_interval,
                preempt: config.preempt,
                startup_hold: config.startup_hold,
                decides_ties: if config.paths.iter().any(|path| path.family == Family::V4) {
                    Family::V4
                } else {
                    Family::V6
                },
            }),
            announce: config.announce.clone(),
            refresh_every: config.valid_lft / 3,
            links: config
                .vips
                .iter()
                .map(|vip| (vip.interface.clone(), unknown(&vip.interface)))
                .collect(),
            paths: Err("no path was looked at yet".to_owned()),
            gateway: Ok(()),
            configure_fault: None,
            faulted: false,
            holding: Holding::Nothing,
            outputs: VecDeque::new(),
        }
    }

    /// State of the virtual router.
    pub fn state(&self) -> State {
        self.router.state()
    }

    /// Why it is in that state.
    pub fn reason(&self) -> Reason {
        self.router.reason()
    }

    /// What this node advertises while Active.
    pub fn advertised_priority(&self) -> Priority {
        self.router.advertised_priority()
    }

    /// The address owner that no takeover can outrank, if one is Active.
    pub fn outranked_by(&self) -> Option<IpAddr> {
        self.router.outranked_by()
    }

    /// Whether this node is Backup to an Active that it is to preempt by asking for the VIPs.
    pub fn wants_to_preempt(&self) -> bool {
        self.router.wants_to_preempt()
    }

    /// Whether every VIP was configured and none was removed since.
    pub fn holds_vips(&self) -> bool {
        matches!(self.holding, Holding::Held(_))
    }

    /// What keeps this node from taking part, if anything.
    pub fn fault(&self) -> Option<String> {
        let links = self.links.values().filter_map(|usable| usable.as_ref().err());
        let paths = self.paths.as_ref().err();
        let configure = self.configure_fault.as_ref().map(|(_, why)| why);
        let gateway = self.gateway.as_ref().err();
        let all: Vec<&str> =
            links.chain(paths).chain(gateway).chain(configure).map(String::as_str).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Takes in what happened.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        match input {
            Input::Startup => {
                self.reconsider(now);
                self.route(now, router::Input::Startup);
            }
            Input::Shutdown => self.route(now, router::Input::Shutdown),
            Input::Advert(advert) => self.route(now, router::Input::Advert(advert)),
            Input::ActiveGone(lease) => self.route(now, router::Input::ActiveGone(lease)),
            Input::Deposed(interval) => self.route(now, router::Input::Deposed(interval)),
            Input::Unheard => self.route(now, router::Input::Unheard),
            Input::ActiveLease(lease) => self.route(now, router::Input::ActiveLease(lease)),
            Input::Repeat => self.route(now, router::Input::Repeat),
            Input::LeaseOver => self.route(now, router::Input::LeaseOver),
            Input::Gateway(reached) => {
                self.gateway = reached;
                self.reconsider(now);
            }
            Input::Takeover => self.route(now, router::Input::Takeover),
            Input::Yield => self.route(now, router::Input::Yield),
            Input::Give(wish) => self.route(now, router::Input::Give(wish)),
            Input::Take(wish) => self.route(now, router::Input::Take(wish)),
            Input::PreemptBy(way) => self.route(now, router::Input::PreemptBy(way)),
            Input::Rival | Input::Moved => self.rival(now),
            Input::Link { interface, usable } => {
                if let Some(known) = self.links.get_mut(&interface) {
                    *known = usable;
                    self.reconsider(now);
                }
            }
            Input::Paths(usable) => {
                self.paths = usable;
                self.reconsider(now);
            }
            Input::Configured => self.configured(now),
            Input::ConfigureFailed(why) => self.configure_failed(now, why),
            Input::VipMissing(vip) => self.missing(now, vip),
        }
    }

    /// Does what is due. To be called at [`Node::poll_timeout`], and never harmful before.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.router.handle_timeout(now);
        self.pump(now);
        if self.configure_fault.as_ref().is_some_and(|(until, _)| *until <= now) {
            self.configure_fault = None;
            self.reconsider(now);
        }
        let refresh_every = self.refresh_every;
        let due = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        match &mut self.holding {
            Holding::Nothing => {}
            Holding::Claiming { retry_at, refresh_at, .. } => {
                if due(retry_at) {
                    *refresh_at = now + refresh_every;
                    self.outputs.push_back(Output::ConfigureVips);
                }
            }
            Holding::Held(held) => {
                if held.refresh_at <= now {
                    held.refresh_at = now + refresh_every;
                    self.outputs.push_back(Output::RefreshVips);
                }
                while let Some((&vip, _)) = held.restore_at.iter().find(|(_, at)| **at <= now) {
                    held.restore_at.remove(&vip);
                    held.restored_last.insert(vip, now);
                    self.outputs.push_back(Output::RestoreVip(vip));
                }
                if held.announcement_due(&self.announce, now) {
                    self.outputs.push_back(Output::Announce);
                }
            }
        }
    }

    /// When [`Node::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let holding = match &self.holding {
            Holding::Nothing => None,
            Holding::Claiming { retry_at, .. } => *retry_at,
            Holding::Held(held) => held.next_deadline(&self.announce),
        };
        let fault = self.configure_fault.as_ref().map(|(until, _)| *until);
        [self.router.poll_timeout(), holding, fault].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    fn route(&mut self, now: Instant, input: router::Input) {
        self.router.handle_input(now, input);
        self.pump(now);
    }

    /// Hands on what the virtual router wants, and keeps the schedules in step with it.
    fn pump(&mut self, now: Instant) {
        while let Some(output) = self.router.poll_output() {
            match output {
                router::Output::SendAdvert(priority) => {
                    self.outputs.push_back(Output::SendAdvert(priority));
                }
                router::Output::Claim => {
                    self.holding = Holding::Claiming {
                        failures: 0,
                        retry_at: None,
                        refresh_at: now + self.refresh_every,
                    };
                    self.outputs.push_back(Output::ConfigureVips);
                }
                router::Output::Release => {
                    self.holding = Holding::Nothing;
                    self.outputs.push_back(Output::RemoveVips);
                }
                router::Output::Announce => self.rival(now),
                router::Output::Transition(transition) => {
                    self.outputs.push_back(Output::Transition(transition));
                }
            }
        }
    }

    /// Tells the virtual router when a fault begins or ends; before the start and after the end
    /// too, it takes no notice then but remembers.
    fn reconsider(&mut self, now: Instant) {
        let faulted = self.fault().is_some();
        if faulted == self.faulted {
            return;
        }
        self.faulted = faulted;
        let input = if faulted { router::Input::Fault } else { router::Input::Recovered };
        self.route(now, input);
    }

    /// Neighbors may have a wrong idea of where the VIPs are.
    fn rival(&mut self, now: Instant) {
        let Holding::Held(held) = &mut self.holding else {
            // Not ours, or about to be announced anyway.
            return;
        };
        match held.rival_last.map(|last| last + self.announce.rival_interval) {
            Some(earliest) if earliest > now => held.rival_at = Some(earliest),
            Some(_) | None => {
                held.rival_last = Some(now);
                held.rival_at = None;
                self.outputs.push_back(Output::Announce);
            }
        }
    }

    fn configured(&mut self, now: Instant) {
        match &mut self.holding {
            Holding::Nothing => {}
            Holding::Claiming { refresh_at, .. } => {
                let mut held = Held::new(now, *refresh_at, &self.announce);
                if held.announcement_due(&self.announce, now) {
                    self.outputs.push_back(Output::Announce);
                }
                self.holding = Holding::Held(held);
            }
            Holding::Held(held) => {
                held.failures = 0;
                self.outputs.push_back(Output::Announce);
            }
        }
    }

    fn configure_failed(&mut self, now: Instant, why: String) {
        let failures = match &mut self.holding {
            Holding::Nothing => return,
            Holding::Claiming { failures, retry_at, .. } => {
                *failures += 1;
                *retry_at = Some(now + RESTORE_INTERVAL);
                *failures
            }
            Holding::Held(held) => {
                held.failures += 1;
                held.failures
            }
        };
        if failures >= CONFIGURE_ATTEMPTS {
            self.configure_fault = Some((now + CONFIGURE_FAULT, why));
            self.reconsider(now);
        }
    }

    fn missing(&mut self, now: Instant, vip: usize) {
        let Holding::Held(held) = &mut self.holding else {
            return;
        };
        match held.restored_last.get(&vip).map(|last| *last + RESTORE_INTERVAL) {
            Some(earliest) if earliest > now => {
                held.restore_at.insert(vip, earliest);
            }
            Some(_) | None => {
                held.restored_last.insert(vip, now);
                self.outputs.push_back(Output::RestoreVip(vip));
            }
        }
    }
}

impl Held {
    fn new(now: Instant, refresh_at: Instant, announce: &AnnounceConfig) -> Self {
        Self {
            since: now,
            next: 0,
            slow_at: (!announce.refresh.is_zero()).then(|| now + announce.refresh),
            rival_last: None,
            rival_at: None,
            refresh_at,
            restore_at: BTreeMap::new(),
            restored_last: BTreeMap::new(),
            failures: 0,
        }
    }

    fn next_deadline(&self, announce: &AnnounceConfig) -> Option<Instant> {
        let scheduled = announce.schedule.get(self.next).map(|delay| self.since + *delay);
        let restore = self.restore_at.values().min().copied();
        [scheduled, self.slow_at, self.rival_at, Some(self.refresh_at), restore]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes every announcement that is due off the schedules: however many there are, one
    /// announcement serves them all.
    fn announcement_due(&mut self, announce: &AnnounceConfig, now: Instant) -> bool {
        let mut due = false;
        while announce.schedule.get(self.next).is_some_and(|delay| self.since + *delay <= now) {
            self.next += 1;
            due = true;
        }
        if self.slow_at.is_some_and(|at| at <= now) {
            self.slow_at = Some(now + announce.refresh);
            due = true;
        }
        if self.rival_at.is_some_and(|at| at <= now) {
            self.rival_at = None;
            self.rival_last = Some(now);
            due = true;
        }
        due
    }
}

#[cfg(test)]
pub(crate) mod tests;
