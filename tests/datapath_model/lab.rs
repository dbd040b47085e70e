//! The configuration that every story runs with: each mode, family and protocol, and what makes
//! flows meet: services that share a server, a NAT address, a seed; a NAT address that is the VIP.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use baton::datapath::skeleton::types::{backend_state, forward_mode, select_by};

use crate::wire::{TCP, UDP};

#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) id: u32,
    pub(crate) listen: SocketAddr,
    pub(crate) protocol: u8,
    pub(crate) mode: forward_mode,
    pub(crate) select: select_by,
    pub(crate) seed: u64,
    pub(crate) backends: Vec<u16>,
}

#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pub(crate) id: u16,
    pub(crate) address: SocketAddr,
    /// What packets to it come from, in `passthrough` with `source = "vip"`.
    pub(crate) nat: IpAddr,
    /// Backends at the same address, port and protocol are one server.
    pub(crate) server: u32,
    pub(crate) protocol: u8,
    pub(crate) service: u32,
}

/// A side of the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Front,
    Back,
}

impl Side {
    /// Its network's number.
    pub(crate) fn network(self) -> u16 {
        if self == Self::Front { 77 } else { 78 }
    }
}

/// The Ethernet address of a host of a side.
pub(crate) fn ethernet(side: Side, host: u8) -> [u8; 6] {
    [2, 0, 0, 0, side.network() as u8, host]
}

#[derive(Debug, Clone)]
pub(crate) struct Lab {
    pub(crate) services: Vec<Service>,
    pub(crate) backends: Vec<Backend>,
}

/// Services of one family; the lab has as many of each.
pub(crate) const SERVICES_OF_A_FAMILY: usize = 11;
/// Most established flows: few, so that stories fill the table.
pub(crate) const FLOWS: u32 = 24;
/// Most half-open flows: more than a story has, since which one is evicted is the kernel's secret.
pub(crate) const HALF_OPEN: u32 = 4096;

/// In jiffies, and far from any sum of the ages in `story::AGES`.
pub(crate) const IDLE: u32 = 105_500;
pub(crate) const HALF_CLOSE: u32 = 50_500;
pub(crate) const CLOSED: u32 = 10_500;

impl Lab {
    pub(crate) fn new() -> Self {
        let mut lab = Self { services: Vec::new(), backends: Vec::new() };
        for v6 in [false, true] {
            let (nat, dnat) = (forward_mode::MODE_NAT, forward_mode::MODE_DNAT);
            let (l2, proxy) = (forward_mode::MODE_DSR_L2, forward_mode::MODE_PROXY);
            let back = address(v6, 78, 0x100);
            lab.add(v6, 80, TCP, nat, back, &[(11, 8080), (12, 8080), (13, 8080)]);
            lab.add(v6, 81, TCP, nat, back, &[(11, 8080)]);
            lab.add(v6, 53, UDP, nat, back, &[(11, 5353), (12, 5353)]);
            lab.add(v6, 82, TCP, dnat, back, &[(11, 8080), (12, 8080)]);
            lab.add(v6, 54, UDP, dnat, back, &[(11, 5353), (12, 5353)]);
            lab.add(v6, 83, TCP, l2, back, &[(11, 83), (12, 83)]);
            lab.add(v6, 55, UDP, l2, back, &[(11, 55), (12, 55)]);
            lab.add(v6, 84, TCP, proxy, back, &[(11, 8080)]);
            lab.add(v6, 85, TCP, dnat, back, &[(11, 8080)]);
            lab.add(v6, 56, UDP, nat, address(v6, 77, 0x100), &[(11, 5353), (13, 5353)]);
            lab.add(v6, 57, UDP, nat, back, &[(11, 5353)]);
        }
        assert_eq!(lab.services.len(), 2 * SERVICES_OF_A_FAMILY);
        lab
    }

    fn add(
        &mut self,
        v6: bool,
        port: u16,
        protocol: u8,
        mode: forward_mode,
        nat: IpAddr,
        backends: &[(u16, u16)],
    ) {
        let service = self.services.len() as u32 + 1;
        let ids = backends
            .iter()
            .map(|&(host, port)| {
                let id = self.backends.len() as u16 + 1;
                let address = SocketAddr::new(address(v6, 78, host), port);
                let same =
                    |other: &&Backend| (other.address, other.protocol) == (address, protocol);
                let server = self.backends.iter().find(same).map_or(id.into(), |same| same.server);
                self.backends.push(Backend { id, address, nat, server, protocol, service });
                id
            })
            .collect();
        self.services.push(Service {
            id: service,
            listen: SocketAddr::new(address(v6, 77, 0x100), port),
            protocol,
            mode,
            select: if port == 56 { select_by::SELECT_SOURCE } else { select_by::SELECT_FLOW },
            // The same of all of a protocol: their flows want the same NAT ports.
            seed: 0xba70 + u64::from(protocol),
            backends: ids,
        });
    }

    pub(crate) fn backend(&self, id: u16) -> &Backend {
        &self.backends[usize::from(id) - 1]
    }

    pub(crate) fn service(&self, id: u32) -> &Service {
        &self.services[id as usize - 1]
    }

    /// Addresses of ours, and of servers.
    pub(crate) fn addresses(&self) -> HashSet<IpAddr> {
        let vips = self.services.iter().map(|service| service.listen.ip());
        let backends = self.backends.iter();
        vips.chain(backends.flat_map(|it| [it.nat, it.address.ip()])).collect()
    }

    /// Bits of `address_use`: a VIP, a NAT address, a server's.
    pub(crate) fn address_use(&self, address: IpAddr) -> u32 {
        let vip = self.services.iter().any(|service| service.listen.ip() == address);
        let nat = self.backends.iter().any(|backend| backend.nat == address);
        let server = self.backends.iter().any(|backend| backend.address.ip() == address);
        u32::from(vip) | u32::from(nat) << 1 | u32::from(server) << 2
    }
}

/// A host of network 77 (front) or 78 (back). 0x100 is host 100, the relay's.
pub(crate) fn address(v6: bool, network: u16, host: u16) -> IpAddr {
    if v6 {
        return IpAddr::from([0xfd00 | decimal(network), 0, 0, 0, 0, 0, 0, decimal_host(host)]);
    }
    let last = if host == 0x100 { 100 } else { host as u8 };
    IpAddr::from([10, network as u8, 0, last])
}

/// 77 as 0x77, so that IPv6 addresses look like those of IPv4.
fn decimal(number: u16) -> u16 {
    number / 10 * 16 + number % 10
}

fn decimal_host(host: u16) -> u16 {
    if host == 0x100 { host } else { decimal(host) }
}

/// The host's part of its Ethernet address.
pub(crate) fn ethernet_host(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(v4) => v4.octets()[3],
        // fd78::11 is the host of 10.78.0.11.
        IpAddr::V6(v6) => {
            let host = v6.segments()[7];
            (host >> 8 & 15) as u8 * 100 + (host >> 4 & 15) as u8 * 10 + (host & 15) as u8
        }
    }
}

/// States that a story gives backends.
pub(crate) const STATES: [backend_state; 4] = [
    backend_state::BACKEND_UP,
    backend_state::BACKEND_DRAINED,
    backend_state::BACKEND_DOWN,
    backend_state::BACKEND_GONE,
];
