//! When the VIP appears on and disappears from the relays' interfaces: what their kernels say
//! over rtnetlink (`man 7 rtnetlink`), so not what the daemons claim.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::canary::{Stop, readable, wait};
use crate::lab::netns::Netns;

const GROUPS: u32 = (libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR) as u32;
const NLMSG_HEADER: usize = 16;
const IFADDRMSG: usize = 8;

/// A VIP that came or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// When its kernel said so.
    pub(super) at: Instant,
    /// The relay.
    pub(super) node: String,
    /// Whether it is there now.
    pub(super) held: bool,
}

/// A relay and a socket on which its kernel tells of addresses.
#[derive(Debug)]
pub(super) struct Source {
    node: String,
    socket: OwnedFd,
}

impl Source {
    /// Subscribes in a relay's namespace.
    pub(super) fn open(node: &str, netns: &Netns) -> io::Result<Self> {
        let socket = netns.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let route = SockProtocol::NetlinkRoute;
            let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, route)?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
            Ok::<_, io::Error>(socket)
        })??;
        Ok(Self { node: node.to_owned(), socket })
    }
}

/// Notes changes of `vip` until it is told to stop; `holders` have it at the start, and come
/// first in the list. A refresh of its lifetime is no change.
pub(super) fn run(
    sources: &[Source],
    vip: IpAddr,
    holders: Vec<String>,
    stop: &Stop,
) -> Vec<Change> {
    let at = Instant::now();
    let mut changes: Vec<Change> =
        holders.into_iter().map(|node| Change { at, node, held: true }).collect();
    let mut buffer = vec![0_u8; 64 * 1024];
    while !stop.asked() {
        let mut sockets: Vec<_> = sources
            .iter()
            .map(|source| readable(std::os::fd::AsFd::as_fd(&source.socket)))
            .collect();
        wait(&mut sockets, Duration::from_millis(50));
        for source in sources {
            while let Ok(length) =
                recv(source.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)
            {
                let at = Instant::now();
                for held in changes_of(&buffer[..length], vip) {
                    let before = changes.iter().rev().find(|change| change.node == source.node);
                    if before.map(|change| change.held) != Some(held) {
                        changes.push(Change { at, node: source.node.clone(), held });
                    }
                }
            }
        }
    }
    changes
}

/// What the messages of one datagram say of `vip`: `true` it is there, `false` it is gone.
fn changes_of(mut datagram: &[u8], vip: IpAddr) -> Vec<bool> {
    let mut found = Vec::new();
    while let Some((kind, body, rest)) = next_message(datagram) {
        datagram = rest;
        let held = match kind {
            libc::RTM_NEWADDR => true,
            libc::RTM_DELADDR => false,
            _ => continue,
        };
        if body.len() >= IFADDRMSG && addresses(body).any(|address| address == vip) {
            found.push(held);
        }
    }
    found
}

/// Splits off the first message: its type and body.
fn next_message(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
    let body = datagram.get(NLMSG_HEADER..length)?;
    Some((kind, body, datagram.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The addresses among the attributes of an `ifaddrmsg`.
fn addresses(body: &[u8]) -> impl Iterator<Item = IpAddr> {
    let mut rest = &body[IFADDRMSG..];
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
    .filter(|(kind, _)| matches!(*kind, libc::IFA_LOCAL | libc::IFA_ADDRESS))
    .filter_map(|(_, value)| match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(value).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, address: [u8; 4]) -> Vec<u8> {
        let mut message = Vec::new();
        message.extend(32_u32.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend([2, 24, 0, 0, 1, 0, 0, 0]);
        message.extend(8_u16.to_ne_bytes());
        message.extend(libc::IFA_LOCAL.to_ne_bytes());
        message.extend(address);
        message
    }

    #[test]
    fn every_message_of_a_datagram_is_read_and_only_the_vip_counts() {
        let vip = IpAddr::from([10, 77, 0, 100]);
        let datagram = [
            message(libc::RTM_NEWADDR, [10, 77, 0, 100]),
            message(libc::RTM_NEWADDR, [10, 77, 0, 2]),
            message(libc::RTM_NEWLINK, [10, 77, 0, 100]),
            message(libc::RTM_DELADDR, [10, 77, 0, 100]),
        ]
        .concat();
        assert_eq!(changes_of(&datagram, vip), [true, false]);
    }

    #[test]
    fn a_datagram_that_is_cut_anywhere_does_no_harm() {
        let vip = IpAddr::from([10, 77, 0, 100]);
        let datagram = message(libc::RTM_NEWADDR, [10, 77, 0, 100]);
        for length in 0..datagram.len() {
            assert_eq!(changes_of(&datagram[..length], vip), [] as [bool; 0], "{length}");
        }
        assert_eq!(changes_of(&[0; 64], vip), [] as [bool; 0]);
    }
}
