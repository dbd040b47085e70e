//! Keeps XDP's ways as the kernel has them: a thread that follows routes, rules, neighbours and
//! links by netlink, and writes `ways`, `neighbours` and `legs`. What they mean is in `ways`.
//!
//! A neighbour that is in use by XDP and by nobody else would go stale without the kernel noticing
//! that it is missed: the thread asks for it. Whatever can't be mirrored is taken out of the maps,
//! and its packets go by TC.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::hooks;
use super::maps::Maps;
use super::nic::Nic;
use super::skeleton::types;
use super::ways::{self, Host, Known, Route, Way};

/// Between two looks at everything that has changed; neighbours alone are followed at once.
const GRAIN: Duration = Duration::from_millis(200);
/// How often everything is looked at, whether anything is said to have changed or not.
const FULL: Duration = Duration::from_secs(10);
/// How often neighbours that are stale are looked at: are they in use?
const REFRESH: Duration = Duration::from_secs(1);
/// An answer that did not come by then was lost.
const ANSWER: Duration = Duration::from_secs(5);
/// As in bounds.h.
const WAYS: usize = 16384;
const NEIGHBOURS: usize = 16384;

/// The running thread; it ends when this is dropped, and leaves the maps as they are.
#[derive(Debug)]
pub(super) struct Mirror {
    interfaces: watch::Sender<BTreeSet<u32>>,
}

impl Mirror {
    /// Starts to follow what concerns these interfaces, in this thread's network namespace.
    pub(super) fn start(maps: Arc<Maps>, interfaces: BTreeSet<u32>) -> io::Result<Self> {
        let (sender, receiver) = watch::channel(interfaces);
        thread::Builder::new().name("baton-ways".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => runtime.block_on(follow(&maps, receiver)),
                Err(error) => tracing::error!(%error, "XDP's ways can't be followed"),
            }
        })?;
        Ok(Self { interfaces: sender })
    }

    /// These interfaces from now on.
    pub(super) fn follow(&self, interfaces: BTreeSet<u32>) {
        self.interfaces.send_if_modified(|now| {
            let news = *now != interfaces;
            *now = interfaces;
            news
        });
    }
}

/// Takes every way out of the maps: all packets go by TC.
pub(super) fn clear(maps: &Maps) -> libbpf_rs::Result<()> {
    maps.legs.clear()?;
    maps.ways.clear()?;
    maps.neighbours.clear()
}

/// Until nobody wants it any more. When the kernel can't be asked, nothing stays in the maps.
async fn follow(maps: &Maps, mut interfaces: watch::Receiver<BTreeSet<u32>>) {
    while interfaces.has_changed().is_ok() {
        let error = match Worker::open(maps, &mut interfaces).await {
            Ok(mut worker) => match worker.run(&mut interfaces).await {
                Ok(()) => return,
                Err(error) => error,
            },
            Err(error) => error,
        };
        tracing::warn!(%error, "XDP's ways are not known; packets go by TC meanwhile");
        if let Err(error) = clear(maps) {
            tracing::error!(%error, "XDP's old ways can't be removed");
        }
        tokio::time::sleep(FULL / 10).await;
    }
}

type Notice = NetlinkMessage<RouteNetlinkMessage>;

struct Worker<'a> {
    maps: &'a Maps,
    handle: Handle,
    notices: BoxStream<'static, Notice>,
    interfaces: BTreeSet<u32>,
    /// What is in the maps.
    routes: HashMap<Route, Way>,
    hosts: HashMap<Host, Neighbour>,
    /// Why ways are left to the kernel, to say it once.
    policy: bool,
}

#[derive(Debug, Clone, Copy)]
struct Neighbour {
    mac: [u8; 6],
    stale: bool,
    /// What the map had as the time of use when it was last looked at.
    used: u32,
}

impl<'a> Worker<'a> {
    async fn open(
        maps: &'a Maps,
        interfaces: &mut watch::Receiver<BTreeSet<u32>>,
    ) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let mut worker = Self {
            maps,
            handle,
            notices: monitor()?,
            interfaces: interfaces.borrow_and_update().clone(),
            routes: HashMap::new(),
            hosts: HashMap::new(),
            policy: false,
        };
        worker.forget_others().map_err(io::Error::other)?;
        worker.sync().await?;
        Ok(worker)
    }

    async fn run(&mut self, interfaces: &mut watch::Receiver<BTreeSet<u32>>) -> io::Result<()> {
        let mut grain = interval(GRAIN);
        let mut refresh = interval(REFRESH);
        for ticks in [&mut grain, &mut refresh] {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let (mut changed, mut synced) = (false, Instant::now());
        loop {
            tokio::select! {
                wanted = interfaces.changed() => {
                    if wanted.is_err() {
                        return Ok(());
                    }
                    self.interfaces = interfaces.borrow_and_update().clone();
                    changed = true;
                }
                notice = self.notices.next() => match notice {
                    Some(notice) => changed |= self.noticed(&notice)?,
                    None => return Err(io::Error::other("the netlink socket has ended")),
                },
                _ = refresh.tick() => self.refresh().await?,
                _ = grain.tick() => if changed || synced.elapsed() >= FULL {
                    self.sync().await?;
                    (changed, synced) = (false, Instant::now());
                },
            }
        }
    }

    /// What an earlier daemon left of which nothing may be known any more.
    fn forget_others(&mut self) -> libbpf_rs::Result<()> {
        for (ifindex, _) in self.maps.legs.each()? {
            if !self.interfaces.contains(&ifindex) {
                self.maps.legs.remove(&ifindex)?;
            }
        }
        for (key, way) in self.maps.ways.each()? {
            if let Some((route, way)) = read_way(&key, &way) {
                self.routes.insert(route, way);
            } else {
                self.maps.ways.remove(&key)?;
            }
        }
        for (key, there) in self.maps.neighbours.each()? {
            let host = Host { ifindex: key.ifindex, address: key.address.into() };
            let known = Neighbour { mac: there.mac, stale: false, used: there.used };
            self.hosts.insert(host, known);
        }
        Ok(())
    }

    /// A neighbour's change is taken over at once; whether anything else has changed.
    fn noticed(&mut self, notice: &Notice) -> io::Result<bool> {
        match &notice.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
                if let Some((host, known)) = ways::of_neighbour(message) {
                    self.set_neighbour(host, known).map_err(io::Error::other)?;
                }
                Ok(false)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message)) => {
                if let Some((host, _)) = ways::of_neighbour(message) {
                    self.set_neighbour(host, Known::Nothing).map_err(io::Error::other)?;
                }
                Ok(false)
            }
            // Links, routes, rules, and notices that were lost.
            _ => Ok(true),
        }
    }

    /// Asks for everything, and brings the maps in line.
    async fn sync(&mut self) -> io::Result<()> {
        let links = in_time(self.handle.link().get().execute().try_collect::<Vec<_>>()).await?;
        self.sync_legs(&links).map_err(io::Error::other)?;
        let mut plain = true;
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules = self.handle.rule().get(version).execute();
            plain &= ways::are_plain(&in_time(rules.try_collect::<Vec<_>>()).await?);
        }
        if !plain && !self.policy {
            tracing::warn!("there are routing rules (`ip rule`): XDP leaves routed packets to TC");
        }
        self.policy = !plain;
        let routes = if plain { self.routes().await? } else { Vec::new() };
        self.sync_routes(&routes).map_err(io::Error::other)?;
        let neighbours = self.handle.neighbours().get().execute();
        let neighbours = in_time(neighbours.try_collect::<Vec<_>>()).await?;
        let mut there = BTreeSet::new();
        for (host, known) in neighbours.iter().filter_map(ways::of_neighbour) {
            there.insert((host.ifindex, host.address));
            self.set_neighbour(host, known).map_err(io::Error::other)?;
        }
        let gone = self.hosts.keys().filter(|host| !there.contains(&(host.ifindex, host.address)));
        for host in gone.copied().collect::<Vec<_>>() {
            self.set_neighbour(host, Known::Nothing).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Routes of both families.
    async fn routes(&self) -> io::Result<Vec<RouteMessage>> {
        let v4 = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build());
        let mut all = in_time(v4.execute().try_collect::<Vec<_>>()).await?;
        let v6 = self.handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build());
        all.extend(in_time(v6.execute().try_collect::<Vec<_>>()).await?);
        Ok(all)
    }

    fn sync_legs(&self, links: &[LinkMessage]) -> libbpf_rs::Result<()> {
        for &ifindex in &self.interfaces {
            let link = links.iter().find(|link| link.header.index == ifindex);
            match link.and_then(leg) {
                Some(leg) => self.maps.legs.set(&ifindex, &leg)?,
                None => self.maps.legs.remove(&ifindex)?,
            }
        }
        Ok(())
    }

    fn sync_routes(&mut self, all: &[RouteMessage]) -> libbpf_rs::Result<()> {
        let mut wanted = ways::of_routes(all, &self.interfaces);
        if wanted.len() > WAYS {
            tracing::warn!(
                routes = wanted.len(),
                most = WAYS,
                "too many routes to mirror: XDP leaves routed packets to TC"
            );
            wanted.clear();
        }
        // First what goes, since the map may be full; a packet that meets neither goes by TC, or,
        // for this moment, by a shorter prefix.
        for gone in self.routes.keys().filter(|route| !wanted.contains_key(route)) {
            self.maps.ways.remove(&way_key(gone))?;
        }
        for (route, way) in &wanted {
            if self.routes.get(route) != Some(way) {
                self.maps.ways.set(&way_key(route), &way_record(*way))?;
            }
        }
        self.routes = wanted;
        Ok(())
    }

    fn set_neighbour(&mut self, host: Host, known: Known) -> libbpf_rs::Result<()> {
        let key = types::neighbour_key { address: host.address.into(), ifindex: host.ifindex };
        match known {
            Known::At { mac, stale } if self.interfaces.contains(&host.ifindex) => {
                let before = self.hosts.get(&host).copied();
                if before.is_none() && self.hosts.len() >= NEIGHBOURS {
                    return Ok(());
                }
                let used = before.map_or(0, |before| before.used);
                if before.is_none_or(|before| before.mac != mac) {
                    let record = types::neighbour { mac, used, ..Default::default() };
                    self.maps.neighbours.set(&key, &record)?;
                }
                self.hosts.insert(host, Neighbour { mac, stale, used });
            }
            _ => {
                if self.hosts.remove(&host).is_some() {
                    self.maps.neighbours.remove(&key)?;
                }
            }
        }
        Ok(())
    }

    /// Has the kernel confirm those that are stale and in use: it sees no traffic of XDP's.
    async fn refresh(&mut self) -> io::Result<()> {
        let mut missed = Vec::new();
        for (host, neighbour) in self.hosts.iter_mut().filter(|(_, neighbour)| neighbour.stale) {
            let key = types::neighbour_key { address: host.address.into(), ifindex: host.ifindex };
            let there = self.maps.neighbours.find(&key).map_err(io::Error::other)?;
            let Some(there) = there else { continue };
            if there.used != neighbour.used {
                neighbour.used = there.used;
                missed.push(*host);
            }
        }
        for Host { ifindex, address } in missed {
            let request = self.handle.neighbours().add(ifindex, address);
            let request = request.state(NeighbourState::None).flags(NeighbourFlags::Use).replace();
            // It may have gone meanwhile, which a notice tells.
            if let Err(error) = in_time(request.execute()).await {
                tracing::debug!(%address, %error, "a neighbour could not be asked for");
            }
        }
        Ok(())
    }
}

/// What frames that go out of a link need; `None` where none can.
fn leg(link: &LinkMessage) -> Option<types::leg> {
    let (mut mac, mut mtu) = (None, 0);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            _ => {}
        }
    }
    if !link.header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let nic = Nic::read(link.header.index).ok()?;
    let redirect = hooks::takes_redirected(&nic);
    // A frame that is longer may be in several buffers, which not every driver sends.
    if redirect && !nic.features.takes_redirected_jumbo() {
        mtu = mtu.min(ONE_BUFFER);
    }
    let flag = |set: bool, flag: types::leg_flag| if set { flag.0 as u8 } else { 0 };
    let flags = flag(redirect, types::leg_flag::LEG_REDIRECT)
        | flag(!nic.sends_back(), types::leg_flag::LEG_NO_TX);
    Some(types::leg { mac: mac?, flags, mtu, ..Default::default() })
}

/// Bytes of IP that surely fit into one page with all that belongs to a frame.
const ONE_BUFFER: u32 = 3000;

/// IPv4 prefixes are counted in the mapped address, and the interface comes first.
fn way_key(route: &Route) -> types::way_key {
    let family = if route.to.is_ipv4() { 96 } else { 0 };
    types::way_key {
        prefix: 32 + family + u32::from(route.prefix),
        ifindex: route.ifindex,
        to: route.to.into(),
    }
}

fn way_record(way: Way) -> types::way {
    let (kind, gateway) = match way {
        Way::OnLink => (types::way_kind::WAY_ON_LINK, None),
        Way::Gateway(gateway) => (types::way_kind::WAY_GATEWAY, Some(gateway)),
        Way::Kernel => (types::way_kind::WAY_KERNEL, None),
    };
    let gateway = gateway.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    types::way { gateway: gateway.into(), kind: kind.0 }
}

/// The reverse of both; `None` for what this program would not write.
fn read_way(key: &types::way_key, way: &types::way) -> Option<(Route, Way)> {
    // Of the default route of IPv4 the address does not say the family, the length does.
    let to: IpAddr = key.to.into();
    let family = if to.is_ipv4() { 96 } else { 0 };
    let prefix = u8::try_from(key.prefix.checked_sub(32 + family)?).ok()?;
    let way = match types::way_kind(way.kind) {
        types::way_kind::WAY_ON_LINK => Way::OnLink,
        types::way_kind::WAY_GATEWAY => Way::Gateway(way.gateway.into()),
        types::way_kind::WAY_KERNEL => Way::Kernel,
        _ => return None,
    };
    Some((Route { ifindex: key.ifindex, to, prefix }, way))
}

/// Notices of everything that makes a way.
fn monitor() -> io::Result<BoxStream<'static, Notice>> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ];
    let (connection, _, notices) = rtnetlink::new_multicast_connection(&groups)?;
    tokio::spawn(connection);
    Ok(notices.map(|(notice, _)| notice).boxed())
}

async fn in_time<T>(answer: impl Future<Output = Result<T, rtnetlink::Error>>) -> io::Result<T> {
    match timeout(ANSWER, answer).await {
        Ok(answer) => answer.map_err(io::Error::other),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_are_written_as_they_are_read() {
        for (to, prefix) in [("0.0.0.0", 0), ("10.77.0.0", 24), ("::", 0), ("fd77::", 64)] {
            let route = Route { ifindex: 3, to: to.parse().unwrap(), prefix };
            for way in [Way::OnLink, Way::Kernel, Way::Gateway("10.77.0.1".parse().unwrap())] {
                assert_eq!(read_way(&way_key(&route), &way_record(way)), Some((route, way)));
            }
        }
    }
}
