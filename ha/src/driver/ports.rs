//! The driver's sockets, kept in step with the interfaces: opened when an interface appears,
//! opened anew when it was made anew, closed when it is gone.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::task::{Context, Poll};

use crate::announce::{ArpOperation, Mac, RouterFlag, gratuitous_arp, unsolicited_na};
use crate::config::{ChecksumForm, Family, HaConfig, Path, Transport, Vip};
use crate::io::ether::FrameSocket;
use crate::io::interfaces::Interfaces;
use crate::io::vrrp::AdvertSocket;
use crate::vrrp::packet::{Ends, GROUP_V4, GROUP_V6, Message};
use crate::vrrp::{AdverInterval, Priority, Vrid};

/// Every socket of the driver.
pub(super) struct Ports {
    pub(super) paths: Vec<PathPort>,
    pub(super) ears: Vec<Ear>,
    vips: Vec<Vip>,
    vrid: Vrid,
    interval: AdverInterval,
    checksum: ChecksumForm,
    /// Every address of the watched interfaces: an advert from one of them is our own.
    pub(super) own: Vec<IpAddr>,
    /// Every MAC of the watched interfaces: a claim by one of them is our own.
    pub(super) macs: Vec<Mac>,
}

/// What came of following the interfaces.
pub(super) struct Follow {
    /// What could not be opened; it is tried again next time.
    pub(super) trouble: Vec<String>,
    /// Whether a VIP has another MAC now.
    pub(super) mac_changed: bool,
}

/// A path with its socket.
pub(super) struct PathPort {
    pub(super) path: Path,
    pub(super) socket: Option<AdvertSocket>,
    pub(super) primary: Result<IpAddr, String>,
    /// Where adverts go, and from which address.
    routes: Vec<(IpAddr, IpAddr)>,
    pub(super) sent: u64,
    pub(super) received: u64,
}

/// Where a VIP's family is announced and heard on its interface.
pub(super) struct Ear {
    pub(super) interface: String,
    pub(super) family: Family,
    pub(super) socket: Option<FrameSocket>,
    mac: Mac,
    router: RouterFlag,
}

impl Ports {
    pub(super) fn new(config: &HaConfig) -> Self {
        let paths = config.paths.iter().map(PathPort::new).collect();
        let mut ears: Vec<Ear> = Vec::new();
        for vip in &config.vips {
            let (interface, family) = (&vip.interface, Family::of(vip.address));
            if !ears.iter().any(|ear| ear.interface == *interface && ear.family == family) {
                ears.push(Ear::new(interface.clone(), family));
            }
        }
        Self {
            paths,
            ears,
            vips: config.vips.clone(),
            vrid: config.vrid,
            interval: config.advert_interval,
            checksum: config.checksum,
            own: Vec::new(),
            macs: Vec::new(),
        }
    }

    /// Follows the interfaces.
    pub(super) fn follow(&mut self, interfaces: &Interfaces) -> Follow {
        let is_vip = |address: &IpAddr| self.vips.iter().any(|vip| vip.address == *address);
        self.own = interfaces
            .0
            .values()
            .flat_map(|interface| interface.addresses.iter().map(|own| own.address))
            .filter(|address| !is_vip(address))
            .collect();
        self.macs = interfaces.0.values().map(|interface| interface.mac).collect();
        let mut trouble = Vec::new();
        for port in &mut self.paths {
            port.follow(interfaces, &self.vips);
            trouble.extend(port.primary.as_ref().err().filter(|_| port.socket.is_none()).cloned());
        }
        let mut mac_changed = false;
        for ear in &mut self.ears {
            let mac = ear.mac;
            trouble.extend(ear.follow(interfaces).err());
            mac_changed |= mac != ear.mac;
        }
        Follow { trouble, mac_changed }
    }

    /// Whether there is a path that could carry adverts; see [`PathPort::fit`].
    pub(super) fn fit(&self, interfaces: &Interfaces) -> Result<(), String> {
        let mut reasons = Vec::new();
        for port in &self.paths {
            match port.fit(interfaces) {
                Ok(()) => return Ok(()),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(reasons.join("; "))
    }

    /// Sends an advert on every path; how many went out, and what failed.
    pub(super) fn send_advert(&mut self, priority: Priority) -> (u64, Vec<String>) {
        let (mut sent, mut failed) = (0, Vec::new());
        for port in &mut self.paths {
            let Some(socket) = &port.socket else { continue };
            let message = Message {
                vrid: self.vrid,
                priority,
                interval: self.interval,
                addresses: &port.path.addresses,
            };
            for (source, destination) in &port.routes {
                let result = Ends::new(*source, *destination)
                    .ok_or_else(|| io::Error::other("two families"))
                    .and_then(|ends| message.encode(&ends, self.checksum).map_err(io::Error::other))
                    .and_then(|bytes| socket.send(&bytes, *source, *destination));
                match result {
                    Ok(()) => {
                        port.sent += 1;
                        sent += 1;
                    }
                    Err(error) => {
                        let interface = &port.path.interface;
                        failed.push(format!("{source} to {destination} on {interface}: {error}"));
                    }
                }
            }
        }
        (sent, failed)
    }

    /// Announces every VIP; how many frames went out, and what failed.
    pub(super) fn announce(&self) -> (u64, Vec<String>) {
        let (mut sent, mut failed) = (0, Vec::new());
        for vip in &self.vips {
            let family = Family::of(vip.address);
            let Some((ear, socket)) = self
                .ears
                .iter()
                .find(|ear| ear.interface == vip.interface && ear.family == family)
                .and_then(|ear| Some((ear, ear.socket.as_ref()?)))
            else {
                failed.push(format!("{}: no socket on {}", vip.address, vip.interface));
                continue;
            };
            for frame in ear.frames(vip.address) {
                match socket.send(&frame) {
                    Ok(()) => sent += 1,
                    Err(error) => {
                        failed.push(format!("{} on {}: {error}", vip.address, vip.interface));
                    }
                }
            }
        }
        (sent, failed)
    }

    /// Throws away what is queued; how much it was.
    pub(super) fn discard(&self) -> u64 {
        /// More than the queues hold.
        const BOUND: u64 = 100_000;
        let mut buffer = [0; 64];
        let mut discarded = 0;
        for socket in self.paths.iter().filter_map(|port| port.socket.as_ref()) {
            while discarded < BOUND && matches!(socket.receive(&mut buffer), Ok(Some(_))) {
                discarded += 1;
            }
        }
        for socket in self.ears.iter().filter_map(|ear| ear.socket.as_ref()) {
            while discarded < BOUND && matches!(socket.receive(&mut buffer), Ok(Some(_))) {
                discarded += 1;
            }
        }
        discarded
    }

    /// Ready while any socket may have something.
    pub(super) fn poll_readable(&self, context: &mut Context<'_>) -> Poll<()> {
        // Every one is polled, so that every one can wake the task.
        let paths = self.paths.iter().filter_map(|port| port.socket.as_ref());
        let ears = self.ears.iter().filter_map(|ear| ear.socket.as_ref());
        let paths = paths.filter(|socket| socket.poll_readable(context).is_ready()).count();
        let ears = ears.filter(|socket| socket.poll_readable(context).is_ready()).count();
        if paths + ears > 0 { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl PathPort {
    fn new(path: &Path) -> Self {
        Self {
            path: path.clone(),
            socket: None,
            primary: Err(format!("`{}` was not looked at yet", path.interface)),
            routes: Vec::new(),
            sent: 0,
            received: 0,
        }
    }

    fn follow(&mut self, interfaces: &Interfaces, vips: &[Vip]) {
        let name = &self.path.interface;
        let index = interfaces.0.get(name).map(|interface| interface.index);
        if self.socket.as_ref().map(AdvertSocket::index) != index {
            self.socket = None;
        }
        self.primary = interfaces.primary(&self.path, vips);
        if let (None, Some(index)) = (&self.socket, index) {
            match AdvertSocket::open(self.path.family, name, index) {
                Ok(socket) => self.socket = Some(socket),
                Err(error) => {
                    self.primary = Err(format!("open a VRRP socket on `{name}`: {error}"))
                }
            }
        }
        let destinations = match (&self.path.transport, self.path.family) {
            (Transport::Multicast, Family::V4) => vec![(None, IpAddr::V4(GROUP_V4))],
            (Transport::Multicast, Family::V6) => vec![(None, IpAddr::V6(GROUP_V6))],
            (Transport::Unicast(peers), _) => {
                peers.iter().map(|peer| (Some(*peer), *peer)).collect()
            }
        };
        let route = |(towards, destination)| {
            let source = interfaces.source(&self.path, vips, towards).ok()?;
            Some((source, destination))
        };
        self.routes = destinations.into_iter().filter_map(route).collect();
    }

    /// Whether the path could carry adverts. A path without carrier is fit all the same: with a
    /// cable from node to node, that is how it looks when the *other* node lost its power.
    fn fit(&self, interfaces: &Interfaces) -> Result<(), String> {
        let no_carrier =
            interfaces.0.get(&self.path.interface).is_some_and(|known| known.up && !known.carrier);
        match &self.primary {
            Ok(_) => Ok(()),
            Err(_) if no_carrier => Ok(()),
            Err(reason) => Err(reason.clone()),
        }
    }
}

impl Ear {
    fn new(interface: String, family: Family) -> Self {
        Self { interface, family, socket: None, mac: [0; 6], router: RouterFlag::Host }
    }

    fn follow(&mut self, interfaces: &Interfaces) -> Result<(), String> {
        let interface = interfaces.0.get(&self.interface);
        // One that was down has an error pending, which would cost the first announcement.
        let interface = interface.filter(|known| known.up);
        if self.socket.as_ref().map(FrameSocket::index) != interface.map(|known| known.index) {
            self.socket = None;
        }
        let Some(interface) = interface else { return Ok(()) };
        self.mac = interface.mac;
        if self.family == Family::V6 {
            self.router = router_flag(&self.interface);
        }
        if self.socket.is_none() {
            let name = &self.interface;
            let socket = FrameSocket::open(self.family, interface.index)
                .map_err(|error| format!("open a packet socket on `{name}`: {error}"))?;
            self.socket = Some(socket);
        }
        Ok(())
    }

    fn frames(&self, vip: IpAddr) -> Vec<Vec<u8>> {
        match vip {
            IpAddr::V4(vip) => [ArpOperation::Request, ArpOperation::Reply]
                .map(|operation| gratuitous_arp(self.mac, vip, operation).to_vec())
                .to_vec(),
            IpAddr::V6(vip) => vec![unsolicited_na(self.mac, vip, vip, self.router).to_vec()],
        }
    }
}

/// What the kernel itself says in its advertisements on this interface: a host by `forwarding`.
fn router_flag(interface: &str) -> RouterFlag {
    match fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{interface}/forwarding")) {
        Ok(value) if value.trim() != "0" => RouterFlag::Router,
        Ok(_) | Err(_) => RouterFlag::Host,
    }
}
