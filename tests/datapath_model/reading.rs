//! What bytes say, and what is wrong with them: the datapath's reading of a frame, in the order in
//! which it looks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use baton::datapath::skeleton::types::drop_reason;

use crate::wire::{ETHERNET, TCP, UDP, comes_out, sum};

/// Most IPv6 extension headers, and how far from the frame's start the transport header may be.
const EXTENSIONS: usize = 6;
const FARTHEST: usize = 511;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    Whole,
    First,
    Later,
}

/// A packet of TCP or UDP that is as it should be.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) source: (IpAddr, u16),
    pub(crate) destination: (IpAddr, u16),
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    /// Of the network layer, as its header has it.
    pub(crate) length: usize,
    pub(crate) fragment: Fragment,
    /// Of the datagram that it is a fragment of.
    pub(crate) identification: u32,
    /// Where the transport header begins.
    pub(crate) transport: usize,
    /// Of TCP.
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    /// The number after the last byte; SYN and FIN are one each (RFC 9293 §3.4).
    pub(crate) sequence_end: u32,
}

#[derive(Debug)]
pub(crate) enum Reading {
    /// No TCP and no UDP over IP; where it goes, if that shows.
    Other(Option<IpAddr>),
    /// An IP packet whose network header is not all there.
    Cut,
    /// TCP or UDP, and wrong.
    Broken(IpAddr, drop_reason),
    Good(View),
}

/// Reads a frame.
pub(crate) fn read(frame: &[u8]) -> Reading {
    let network = &frame[ETHERNET..];
    match (frame[12], frame[13]) {
        (0x08, 0x00) if network.len() < 20 => Reading::Cut,
        (0x08, 0x00) => ipv4(network),
        (0x86, 0xdd) if network.len() < 40 => Reading::Cut,
        (0x86, 0xdd) => ipv6(network),
        // Tagged frames too: they are for the VLAN's interface.
        _ => Reading::Other(None),
    }
}

fn ipv4(bytes: &[u8]) -> Reading {
    let address =
        |at: usize| IpAddr::V4(Ipv4Addr::from_octets(bytes[at..at + 4].try_into().unwrap()));
    let (source, destination) = (address(12), address(16));
    let broken = |reason| Reading::Broken(destination, reason);
    let protocol = bytes[9];
    if protocol != TCP && protocol != UDP {
        return Reading::Other(Some(destination));
    }
    let (version, header) = (bytes[0] >> 4, usize::from(bytes[0] & 15) * 4);
    if version != 4 || header < 20 {
        return broken(drop_reason::DROP_BAD_HEADER);
    }
    if bytes.len() < header {
        return broken(drop_reason::DROP_TRUNCATED);
    }
    let length = usize::from(u16_at(bytes, 2));
    if length < header {
        return broken(drop_reason::DROP_BAD_LENGTH);
    }
    if !comes_out(sum(&bytes[..header])) {
        return broken(drop_reason::DROP_BAD_CHECKSUM);
    }
    let place = u16_at(bytes, 6);
    let offset = usize::from(place & 0x1fff) * 8;
    let fragment = match (place & 0x1fff, place & 0x2000) {
        (0, 0) => Fragment::Whole,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    let view = View {
        source: (source, 0),
        destination: (destination, 0),
        protocol,
        ttl: bytes[8],
        length,
        fragment,
        identification: u32::from(u16_at(bytes, 4)),
        transport: ETHERNET + header,
        flags: 0,
        sequence: 0,
        acknowledgement: 0,
        sequence_end: 0,
    };
    transport(bytes, header, offset, view)
}

fn ipv6(bytes: &[u8]) -> Reading {
    let address = |at: usize| Ipv6Addr::from_octets(bytes[at..at + 16].try_into().unwrap());
    let (source, destination) = (address(8), address(24));
    let broken = |reason| Reading::Broken(destination.into(), reason);
    // On the wire these are nobody's; in our tables they would be IPv4's.
    if source.to_ipv4_mapped().is_some() {
        return broken(drop_reason::DROP_BAD_SOURCE);
    }
    if destination.to_ipv4_mapped().is_some() {
        return broken(drop_reason::DROP_BAD_HEADER);
    }
    let (mut next, mut at, mut fragment, mut headers) = (bytes[6], 40, Fragment::Whole, 0);
    let (mut offset, mut identification) = (0, 0);
    while matches!(next, 0 | 43 | 44 | 60) && fragment != Fragment::Later {
        if headers == EXTENSIONS {
            return broken(drop_reason::DROP_BAD_HEADER);
        }
        headers += 1;
        if bytes.len() < at + 8 {
            return broken(drop_reason::DROP_TRUNCATED);
        }
        let length = if next == 44 { 8 } else { (usize::from(bytes[at + 1]) + 1) * 8 };
        match next {
            44 => {
                let place = u16_at(bytes, at + 2);
                offset = usize::from(place & !7);
                identification = u32_at(bytes, at + 4);
                fragment = match (place >> 3, place & 1) {
                    (0, 0) => fragment,
                    (0, _) => Fragment::First,
                    _ => Fragment::Later,
                }
            }
            // It has not come to where it goes to; its checksum is over another address.
            43 if bytes[at + 3] != 0 => return broken(drop_reason::DROP_BAD_HEADER),
            _ => {}
        }
        next = bytes[at];
        at += length;
        if ETHERNET + at > FARTHEST {
            return broken(drop_reason::DROP_BAD_HEADER);
        }
    }
    let is_extension = matches!(next, 0 | 43 | 44 | 60);
    // A later fragment of what begins, after its fragment header, with other extension headers.
    if next != TCP && next != UDP && !is_extension {
        return Reading::Other(Some(destination.into()));
    }
    if bytes[0] >> 4 != 6 {
        return broken(drop_reason::DROP_BAD_HEADER);
    }
    let view = View {
        source: (source.into(), 0),
        destination: (destination.into(), 0),
        protocol: next,
        ttl: bytes[7],
        length: 40 + usize::from(u16_at(bytes, 4)),
        fragment,
        identification,
        transport: ETHERNET + at,
        flags: 0,
        sequence: 0,
        acknowledgement: 0,
        sequence_end: 0,
    };
    transport(bytes, at, offset, view)
}

/// `header`: bytes of the network layer in front of the transport header. `offset`: of a fragment.
fn transport(bytes: &[u8], header: usize, offset: usize, mut view: View) -> Reading {
    let destination = view.destination.0;
    let broken = |reason| Reading::Broken(destination, reason);
    let whole = view.fragment == Fragment::Whole;
    let least = if view.protocol == TCP { 20 } else { 8 };
    if view.fragment != Fragment::Later {
        // What decides must not come later: RFC 1858, RFC 7112.
        if view.length < header + least && !whole {
            return broken(drop_reason::DROP_TINY_FRAGMENT);
        }
        if view.length.min(bytes.len()) < header + least {
            return broken(drop_reason::DROP_TRUNCATED);
        }
    }
    if view.length > bytes.len() || view.length < header {
        return broken(drop_reason::DROP_BAD_LENGTH);
    }
    let there = view.length - header;
    if view.fragment == Fragment::Later {
        // It would be written over the header of the first: RFC 3128.
        if view.protocol == TCP && offset < 20 {
            return broken(drop_reason::DROP_TINY_FRAGMENT);
        }
        return Reading::Good(view);
    }
    let transport = &bytes[header..];
    view.source.1 = u16_at(transport, 0);
    view.destination.1 = u16_at(transport, 2);
    if view.protocol == TCP {
        let own = usize::from(transport[12] >> 4) * 4;
        match own > there {
            _ if own < 20 => return broken(drop_reason::DROP_BAD_HEADER),
            true if whole => return broken(drop_reason::DROP_BAD_HEADER),
            true => return broken(drop_reason::DROP_TINY_FRAGMENT),
            false => {}
        }
        view.flags = transport[13];
        view.sequence = u32_at(transport, 4);
        view.acknowledgement = u32_at(transport, 8);
        let (syn, fin) = (u32::from(view.flags >> 1 & 1), u32::from(view.flags & 1));
        let bytes = (there - own) as u32;
        view.sequence_end = view.sequence.wrapping_add(bytes + syn + fin);
    } else {
        let own = usize::from(u16_at(transport, 4));
        if own < 8 || whole && own > there {
            return broken(drop_reason::DROP_BAD_LENGTH);
        }
    }
    Reading::Good(view)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}
