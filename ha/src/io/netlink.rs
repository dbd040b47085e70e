//! Asks the kernel about links and addresses, and configures the VIPs, on a thread of its own:
//! every request takes the kernel's RTNL lock, which others may hold for long, and adverts must
//! not wait for that.
//!
//! Notifications only say that something changed; then the kernel is asked anew. So a snapshot is
//! right whatever was lost or overtaken on the way, and one that was taken after a request shows
//! what that request did.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use futures_util::stream::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, CacheInfo};
use rtnetlink::packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{AddressMessageBuilder, Handle, MulticastGroup};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::interfaces::{Address, Interface, Interfaces};
use crate::config::Vip;

/// Requests that may wait. The driver makes a handful a second; while the kernel answers none of
/// them, refreshes are dropped, see [`Netlink::request`].
const REQUESTS: usize = 64;
/// Answers that may wait: more than there can be requests, so that the thread never waits.
const EVENTS: usize = 4 * REQUESTS;
/// How often carrier is looked at: the kernel may delay its notification by a second.
const POLL_LINKS: Duration = Duration::from_millis(100);
/// How often everything is looked at, should a notification be lost: every so many polls.
const FULL_POLLS: u32 = 10;
/// An answer that did not come by then was lost.
const ANSWER: Duration = Duration::from_secs(1);

/// What the thread is to look after.
#[derive(Debug, Clone)]
pub struct Watch {
    /// The interfaces of paths and VIPs.
    pub interfaces: BTreeSet<String>,
    /// The VIPs, in the order of the configuration.
    pub vips: Vec<Vip>,
    /// Lifetime of a configured VIP, whole seconds.
    pub valid_lft: Duration,
    /// Whether a VIP may stand before it was asked for: only the address owner's.
    pub owner: bool,
}

/// Grows with every request.
pub type Ticket = u64;

/// What is wanted of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Configure these VIPs (by place), or renew their lifetime.
    Configure(Vec<usize>),
    /// Remove every VIP.
    Remove,
}

/// The state of the kernel after a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The interfaces.
    pub interfaces: Interfaces,
    /// The last request that had been carried out.
    pub after: Ticket,
}

/// What the thread reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A request was carried out; `Err` lists what failed.
    Done(Ticket, Result<(), String>),
    /// A VIP stood on an interface though this node does not own it; the result of removing it.
    Stray {
        /// The address.
        address: IpAddr,
        /// Index of the interface.
        index: u32,
        /// Whether it could be removed.
        removed: Result<(), String>,
    },
    /// The kernel could not be asked.
    Trouble(String),
}

/// The thread, as the driver sees it. It ends when this is dropped.
#[derive(Debug)]
pub struct Netlink {
    requests: mpsc::Sender<(Ticket, Operation)>,
    /// What it reports, in order.
    pub events: mpsc::Receiver<Event>,
    /// The latest snapshot.
    pub snapshots: watch::Receiver<Snapshot>,
    last: Ticket,
}

impl Netlink {
    /// Starts the thread, which removes the VIPs that this node does not own; returns once the
    /// first snapshot is there. `prepare` runs first on the thread.
    pub fn start(watch: Watch, prepare: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (requests, requests_in) = mpsc::channel(REQUESTS);
        let (events_out, events) = mpsc::channel(EVENTS);
        let (snapshots_out, snapshots) = watch::channel(Snapshot::default());
        let (started, wait) = sync_channel(1);
        thread::Builder::new().name("baton-netlink".to_owned()).spawn(move || {
            prepare();
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            runtime.block_on(async move {
                let mut worker = match Worker::open(watch, events_out, snapshots_out) {
                    Ok(worker) => worker,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return;
                    }
                };
                let _ = started.send(worker.sync().await.map_err(io::Error::other));
                worker.run(requests_in).await;
            });
        })?;
        wait.recv().map_err(|_| io::Error::other("the netlink thread ended"))??;
        Ok(Self { requests, events, snapshots, last: 0 })
    }

    /// Asks for something; [`Event::Done`] with the ticket follows. `None`: too much is waiting
    /// already.
    pub fn request(&mut self, operation: Operation) -> Option<Ticket> {
        let ticket = self.last + 1;
        self.requests.try_send((ticket, operation)).ok()?;
        self.last = ticket;
        Some(ticket)
    }

    /// The last request that was made.
    pub fn last(&self) -> Ticket {
        self.last
    }

    /// Removes every VIP and waits until that is done. What was asked before and is not answered
    /// yet is void then; events other than answers are returned.
    pub async fn remove(&mut self) -> (Result<(), String>, Vec<Event>) {
        let mut others = Vec::new();
        let ended = || Err("the netlink thread ended".to_owned());
        self.last += 1;
        if self.requests.send((self.last, Operation::Remove)).await.is_err() {
            return (ended(), others);
        }
        loop {
            match self.events.recv().await {
                Some(Event::Done(ticket, result)) if ticket == self.last => {
                    return (result, others);
                }
                Some(Event::Done(..)) => {}
                Some(event) => others.push(event),
                None => return (ended(), others),
            }
        }
    }
}

struct Worker {
    watch: Watch,
    kernel: Kernel,
    notices: Notices,
    events: mpsc::Sender<Event>,
    snapshots: watch::Sender<Snapshot>,
    /// Whether the VIPs are to stand.
    owning: bool,
    after: Ticket,
}

type Notices = futures_util::stream::BoxStream<'static, NetlinkMessage<RouteNetlinkMessage>>;

impl Worker {
    fn open(
        watch: Watch,
        events: mpsc::Sender<Event>,
        snapshots: watch::Sender<Snapshot>,
    ) -> io::Result<Self> {
        let owning = watch.owner;
        let (kernel, notices) = (Kernel::open()?, monitor()?);
        Ok(Self { watch, kernel, notices, events, snapshots, owning, after: 0 })
    }

    async fn run(&mut self, mut requests: mpsc::Receiver<(Ticket, Operation)>) {
        let mut poll = interval(POLL_LINKS);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut polls = 0;
        loop {
            let result = tokio::select! {
                biased;
                request = requests.recv() => match request {
                    Some((ticket, operation)) => {
                        self.carry_out(ticket, operation).await;
                        self.sync().await
                    }
                    None => return,
                },
                notice = self.notices.next() => match notice {
                    Some(notice) => self.noticed(notice).await,
                    None => self.reopen(),
                },
                _ = poll.tick() => {
                    polls = (polls + 1) % FULL_POLLS;
                    if polls == 0 { self.sync().await } else { self.check_links().await }
                }
            };
            if let Err(trouble) = result {
                let _ = self.events.try_send(Event::Trouble(trouble));
                if let Err(trouble) = self.reopen() {
                    let _ = self.events.try_send(Event::Trouble(trouble));
                    tokio::time::sleep(POLL_LINKS).await;
                }
            }
        }
    }

    /// New sockets: an answer was lost, or a socket ended.
    fn reopen(&mut self) -> Result<(), String> {
        let open = || Ok((Kernel::open()?, monitor()?));
        (self.kernel, self.notices) =
            open().map_err(|error: io::Error| format!("open a netlink socket: {error}"))?;
        Ok(())
    }

    async fn carry_out(&mut self, ticket: Ticket, operation: Operation) {
        let interfaces = self.snapshots.borrow().interfaces.clone();
        let mut failed = Vec::new();
        match operation {
            Operation::Configure(vips) => {
                self.owning = true;
                for vip in vips.into_iter().filter_map(|place| self.watch.vips.get(place)) {
                    if let Err(error) = self.configure(&interfaces, vip).await {
                        failed.push(format!("add {}/{}: {error}", vip.address, vip.prefix));
                    }
                }
            }
            Operation::Remove => {
                self.owning = false;
                for vip in &self.watch.vips {
                    let Some(interface) = interfaces.0.get(&vip.interface) else {
                        continue;
                    };
                    let message = address_message(interface.index, vip.address, vip.prefix);
                    match self.kernel.delete(message).await {
                        Ok(()) => {}
                        // It is not there, or the interface is gone.
                        Err(error)
                            if matches!(
                                error.raw_os_error(),
                                Some(libc::EADDRNOTAVAIL | libc::ENODEV)
                            ) => {}
                        Err(error) => failed.push(format!("remove {}: {error}", vip.address)),
                    }
                }
            }
        }
        self.after = ticket;
        let result = if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) };
        let _ = self.events.send(Event::Done(ticket, result)).await;
    }

    async fn configure(&self, interfaces: &Interfaces, vip: &Vip) -> io::Result<()> {
        let interface = interfaces
            .0
            .get(&vip.interface)
            .ok_or_else(|| io::Error::other(format!("no interface `{}`", vip.interface)))?;
        let covered = interface.covers(vip, &self.watch.vips);
        self.kernel.configure(interface.index, vip, self.watch.valid_lft, covered).await
    }

    /// Asks again, where the notice is about a watched interface.
    async fn noticed(&mut self, notice: NetlinkMessage<RouteNetlinkMessage>) -> Result<(), String> {
        let mut relevant = self.concerns(&notice);
        // Whatever else is there already is served by the same answer.
        while let Some(Some(notice)) = futures_util::FutureExt::now_or_never(self.notices.next()) {
            relevant |= self.concerns(&notice);
        }
        if relevant { self.sync().await } else { Ok(()) }
    }

    fn concerns(&self, notice: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let known = |index: u32| {
            self.snapshots.borrow().interfaces.0.values().any(|interface| interface.index == index)
        };
        match &notice.payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
            ) => {
                known(link.header.index)
                    || link.attributes.iter().any(|attribute| {
                        matches!(attribute, LinkAttribute::IfName(name)
                            if self.watch.interfaces.contains(name))
                    })
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
            ) => known(address.header.index),
            NetlinkPayload::Overrun(_) => true,
            _ => false,
        }
    }

    /// Looks at the links alone, and at the rest only if one changed.
    async fn check_links(&mut self) -> Result<(), String> {
        for name in &self.watch.interfaces {
            let link = self.kernel.link(name).await.map_err(|error| format!("{name}: {error}"))?;
            let same = match (&link, self.snapshots.borrow().interfaces.0.get(name)) {
                (None, None) => true,
                (Some(link), Some(known)) => {
                    (link.index, link.up, link.carrier) == (known.index, known.up, known.carrier)
                }
                (Some(_), None) | (None, Some(_)) => false,
            };
            if !same {
                return self.sync().await;
            }
        }
        Ok(())
    }

    /// Takes a snapshot, removes strays, publishes it if it is news.
    async fn sync(&mut self) -> Result<(), String> {
        let mut interfaces = Interfaces::default();
        for name in &self.watch.interfaces {
            let what = |error: io::Error| format!("ask the kernel about `{name}`: {error}");
            let Some(mut link) = self.kernel.link(name).await.map_err(what)? else {
                continue;
            };
            link.addresses = self.kernel.addresses(link.index).await.map_err(what)?;
            interfaces.0.insert(name.clone(), link);
        }
        if !self.owning {
            self.remove_strays(&mut interfaces).await;
        }
        let snapshot = Snapshot { interfaces, after: self.after };
        self.snapshots.send_if_modified(|published| {
            let news = *published != snapshot;
            *published = snapshot;
            news
        });
        Ok(())
    }

    async fn remove_strays(&self, interfaces: &mut Interfaces) {
        for interface in interfaces.0.values_mut() {
            let is_vip = |address: &Address| {
                self.watch.vips.iter().any(|vip| vip.address == address.address)
            };
            let (strays, rest) = interface.addresses.drain(..).partition(is_vip);
            interface.addresses = rest;
            for stray in Vec::from_iter::<Vec<Address>>(strays) {
                let message = address_message(interface.index, stray.address, stray.prefix);
                let removed = self.kernel.delete(message).await.map_err(|error| error.to_string());
                let index = interface.index;
                if removed.is_err() {
                    interface.addresses.push(stray);
                }
                let _ =
                    self.events.try_send(Event::Stray { address: stray.address, index, removed });
            }
        }
    }
}

/// Requests and their answers.
struct Kernel {
    handle: Handle,
}

impl Kernel {
    fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check()?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    async fn link(&self, name: &str) -> io::Result<Option<Interface>> {
        let mut answer = Box::pin(
            self.handle
                .link()
                .get()
                .match_name(name)
                .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats])
                .execute(),
        );
        match in_time(answer.try_next()).await {
            Ok(link) => Ok(link.as_ref().map(interface)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn addresses(&self, index: u32) -> io::Result<Vec<Address>> {
        let mut request = self.handle.address().get().set_link_index_filter(index);
        request.message_mut().header.index = index;
        let messages: Vec<AddressMessage> = in_time(request.execute().try_collect()).await?;
        Ok(messages.iter().filter_map(address).collect())
    }

    async fn configure(
        &self,
        index: u32,
        vip: &Vip,
        valid_lft: Duration,
        covered: bool,
    ) -> io::Result<()> {
        let mut request = self.handle.address().add(index, vip.address, vip.prefix).replace();
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = u32::try_from(valid_lft.as_secs()).unwrap_or(u32::MAX - 1).max(1);
        // An IPv6 address that is deprecated answers, but is never chosen as a source: what this
        // node says by itself does not come from the VIP. IPv4 has no need of that: there the
        // VIP is not chosen as long as there is another address of its network.
        lifetime.ifa_preferred = if vip.address.is_ipv4() { lifetime.ifa_valid } else { 0 };
        let mut flags = AddressFlags::empty();
        if vip.address.is_ipv6() {
            flags |= AddressFlags::Nodad;
        }
        if covered {
            flags |= AddressFlags::Noprefixroute;
        }
        let message = request.message_mut();
        message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        message.attributes.push(AddressAttribute::Flags(flags));
        in_time(request.execute()).await
    }

    async fn delete(&self, message: AddressMessage) -> io::Result<()> {
        in_time(self.handle.address().del(message).execute()).await
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, rtnetlink::Error>>) -> io::Result<T> {
    match timeout(ANSWER, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(rtnetlink::Error::NetlinkError(message))) => Err(message.to_io()),
        Ok(Err(error)) => Err(io::Error::other(error)),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Notices of changes of links and addresses.
fn monitor() -> io::Result<Notices> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, _, notices) = rtnetlink::new_multicast_connection(&groups)?;
    tokio::spawn(connection);
    Ok(notices.map(|(notice, _)| notice).boxed())
}

fn interface(link: &LinkMessage) -> Interface {
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => <[u8; 6]>::try_from(mac.as_slice()).ok(),
        _ => None,
    });
    Interface {
        index: link.header.index,
        mac: mac.unwrap_or_default(),
        up: link.header.flags.contains(LinkFlags::Up),
        carrier: link.header.flags.contains(LinkFlags::LowerUp),
        addresses: Vec::new(),
    }
}

fn address(message: &AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let tentative =
        flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    Some(Address {
        address: local.or(peer)?,
        prefix: message.header.prefix_len,
        ready: !tentative && !flags.contains(AddressFlags::Dadfailed),
    })
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    match address {
        IpAddr::V4(address) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, prefix).build()
        }
        IpAddr::V6(address) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, prefix).build()
        }
    }
}
