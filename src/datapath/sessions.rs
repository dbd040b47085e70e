//! The flows in the kernel, as `baton sessions` lists and ends them. A list is bounded: a walk
//! through the tables ends when enough are found.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use libbpf_rs::Result as BpfResult;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::load::Error;
use super::maps::{Maps, Table};
use super::registry::{protocol, socket};
use super::skeleton::types;
use super::sweep::{How, SWEEP, Sweeper};
use crate::pool::Pool;
use crate::service::Protocol;

/// The most that one answer lists.
pub const MOST: usize = 10_000;
/// Flows read with one system call; more than any bucket of the kernel's table ever holds.
const SLICE: u32 = 4096;

/// Which flows are meant: those for which all that is given is so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Name of the service.
    pub service: Option<String>,
    /// Name of the backend.
    pub backend: Option<String>,
    /// Address of the client.
    pub client: Option<IpAddr>,
    /// The most of them; a list never has more than [`MOST`].
    pub limit: usize,
}

/// What was ended by the operator.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Established flows.
    pub established: u64,
    /// Half-open flows.
    pub half_open: u64,
    /// Those of them whose ends were sent a RST: TCP's.
    pub told: u64,
}

/// Some flows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sessions {
    /// In no order.
    pub sessions: Vec<Session>,
    /// Whether there are more than the limit.
    pub more: bool,
}

/// A flow.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Session {
    /// Name of its service.
    pub service: String,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The client.
    pub client: SocketAddr,
    /// Name of its backend.
    pub backend: String,
    /// The backend's address.
    pub backend_address: SocketAddr,
    /// The address that the backend sees; `None` where it sees the client's.
    pub nat: Option<SocketAddr>,
    /// How far it is.
    pub state: SessionState,
    /// Seconds since its first packet.
    pub age_s: f64,
    /// Seconds since its last packet.
    pub idle_s: f64,
}

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// Not both ends have shown that they are there.
    HalfOpen,
    /// They have.
    Established,
    /// One end has closed its direction.
    HalfClosed,
    /// Both have, or it was reset; it is removed soon.
    Closed,
}

/// What is the same for many flows.
struct Place {
    service: String,
    backend: String,
    protocol: Protocol,
    mode: types::forward_mode,
    record: types::backend,
}

/// A walk.
pub(super) struct Walk<'a> {
    pub(super) maps: &'a Maps,
    pub(super) clock: Clock,
    /// The low bits of jiffies.
    pub(super) now: u32,
    pub(super) pools: &'a [Arc<Pool>],
    pub(super) wanted: &'a Wanted,
}

impl Walk<'_> {
    pub(super) fn run(&self) -> BpfResult<Sessions> {
        let mut found = Sessions::default();
        let mut places = HashMap::new();
        for (table, half) in [(&self.maps.flows, false), (&self.maps.half_flows, true)] {
            if !found.more {
                self.walk(table, half, &mut places, &mut found)?;
            }
        }
        Ok(found)
    }

    fn walk(
        &self,
        table: &Table<types::flow_key, types::flow>,
        half: bool,
        places: &mut HashMap<(u16, u16), Option<Place>>,
        found: &mut Sessions,
    ) -> BpfResult<()> {
        let client = self.wanted.client.map(|address| types::address::from(address).words);
        for (key, flow) in table.slices(SLICE)? {
            if client.is_some_and(|words| words != key.client.words) {
                continue;
            }
            let ids = (key.service, flow.backend);
            let place = match places.entry(ids) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(self.place(ids)?),
            };
            let Some(place) = place else { continue };
            if found.sessions.len() == self.wanted.limit.min(MOST) {
                found.more = true;
                return Ok(());
            }
            found.sessions.push(self.session(place, half, &key, &flow)?);
        }
        Ok(())
    }

    /// Ends the flows that are wanted: UDP's are removed, both ends of TCP's are sent a RST.
    pub(super) fn end(&self, sweeper: &Sweeper) -> Result<Ended, Error> {
        let half = types::sweep_how::SWEEP_HALF_OPEN.0;
        let mut left = self.wanted.limit;
        let (established, told) = self.end_in(sweeper, &self.maps.flows, 0, &mut left)?;
        let (half_open, also) = self.end_in(sweeper, &self.maps.half_flows, half, &mut left)?;
        Ok(Ended { established, half_open, told: told + also })
    }

    fn end_in(
        &self,
        sweeper: &Sweeper,
        table: &Table<types::flow_key, types::flow>,
        bits: u32,
        left: &mut usize,
    ) -> Result<(u64, u64), Error> {
        let read = || Error::bpf("read the flows");
        let how = How { bits: bits | types::sweep_how::SWEEP_END.0, closed_timeout: 0 };
        let client = self.wanted.client.map(|address| types::address::from(address).words);
        let mut places = HashMap::new();
        let (mut ended, mut told) = (0, 0);
        let mut keys = Vec::with_capacity(SWEEP);
        let mut sweep = |keys: &mut Vec<_>| -> Result<(), Error> {
            let done = sweeper.sweep(how, keys)?;
            ended += done.flows;
            told += done.told;
            Ok(())
        };
        for (key, flow) in table.slices(SLICE).map_err(read())? {
            if *left == 0 {
                break;
            }
            if client.is_some_and(|words| words != key.client.words) {
                continue;
            }
            let wanted = match places.entry((key.service, flow.backend)) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => {
                    let place = self.place(*new.key()).map_err(read())?;
                    *new.insert(place.is_some())
                }
            };
            if wanted {
                keys.push(key);
                *left -= 1;
            }
            if keys.len() == SWEEP {
                sweep(&mut keys)?;
            }
        }
        sweep(&mut keys)?;
        Ok((ended, told))
    }

    /// The service and backend of these numbers, if they are wanted. What the configuration no
    /// longer has goes by its address.
    fn place(&self, (service, backend): (u16, u16)) -> BpfResult<Option<Place>> {
        let Some(of) = self.maps.service_table.find(&service.into())? else { return Ok(None) };
        let Some(record) = self.maps.backend_table.find(&backend.into())? else { return Ok(None) };
        let Some(protocol) = protocol(of.protocol) else { return Ok(None) };
        let (listen, address) = (socket(of.vip, of.port), socket(record.address, record.port));
        let mut pools = self.pools.iter().map(|pool| &pool.service);
        let known = pools.find(|service| (service.listen, service.protocol) == (listen, protocol));
        let mut backends = known.iter().flat_map(|service| &service.backends);
        let backend = backends.find(|backend| backend.address == address);
        let place = Place {
            service: known.map_or(listen.to_string(), |service| service.name.clone()),
            backend: backend.map_or(address.to_string(), |backend| backend.name.clone()),
            protocol,
            mode: types::forward_mode(of.mode.into()),
            record,
        };
        let is = |wanted: &Option<String>, name: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted == name)
        };
        let wanted = is(&self.wanted.service, &place.service);
        Ok((wanted && is(&self.wanted.backend, &place.backend)).then_some(place))
    }

    fn session(
        &self,
        place: &Place,
        half: bool,
        key: &types::flow_key,
        flow: &types::flow,
    ) -> BpfResult<Session> {
        let nat = place.mode == types::forward_mode::MODE_NAT;
        let reply_key = types::reply_key {
            address: if nat { place.record.nat } else { key.client },
            server: place.record.server,
            port: flow.nat_port,
            ..Default::default()
        };
        let reply = match half {
            true => self.maps.half_replies.find(&reply_key)?.map(|half| half.reply),
            // In DSR there is none.
            false => self.maps.replies.find(&reply_key)?,
        };
        let since = |then: u32| self.clock.seconds(self.now.wrapping_sub(then));
        let idle = since(flow.seen);
        Ok(Session {
            service: place.service.clone(),
            protocol: place.protocol,
            client: socket(key.client, key.port),
            backend: place.backend.clone(),
            backend_address: socket(place.record.address, place.record.port),
            nat: nat.then(|| socket(place.record.nat, flow.nat_port)),
            state: state(half, flow.flags, reply.map_or(0, |reply| reply.flags)),
            age_s: since(flow.began),
            idle_s: reply.map_or(idle, |reply| idle.min(since(reply.seen))),
        })
    }
}

fn state(half: bool, client: u8, backend: u8) -> SessionState {
    let fin = types::flow_flag::FLOW_FIN.0 as u8;
    let rst = types::flow_flag::FLOW_RST.0 as u8;
    if (client | backend) & rst != 0 || client & backend & fin != 0 {
        SessionState::Closed
    } else if (client | backend) & fin != 0 {
        SessionState::HalfClosed
    } else if half {
        SessionState::HalfOpen
    } else {
        SessionState::Established
    }
}
