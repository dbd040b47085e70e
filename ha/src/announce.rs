//! The bytes that tell a LAN where a VIP is, and the reading of what a rival tells it.
//!
//! Written: gratuitous ARP (RFC 5227 §3, RFC 5944 §4.6) and unsolicited Neighbor Advertisements
//! (RFC 4861 §7.2.6), as whole Ethernet frames. Read: ARP and Neighbor Advertisements of others;
//! one that claims a VIP of this node for another MAC is a [`Rival`], evidence upon which
//! [`crate::node`] announces again. When to announce is decided there, never here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::util;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Length of a gratuitous ARP: Ethernet header and ARP for IPv4.
pub const ARP_LENGTH: usize = 42;

/// Length of an unsolicited NA: Ethernet header, IPv6 header, NA, one option.
pub const NA_LENGTH: usize = 86;

const BROADCAST: Mac = [0xff; 6];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// 802.1Q and 802.1ad.
const ETHERTYPE_TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// Ethernet as hardware, IPv4 as protocol, and the lengths of their addresses.
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ICMPV6_NEIGHBOR_ADVERT: u8 = 136;
const OPTION_TARGET_LINK_LAYER: u8 = 2;
const FLAG_ROUTER: u8 = 0x80;
const FLAG_SOLICITED: u8 = 0x40;
const FLAG_OVERRIDE: u8 = 0x20;
/// Where the ICMPv6 checksum is, counted in 16-bit words.
const ICMPV6_CHECKSUM_WORD: usize = 1;

/// Request or reply. Gratuitous ARP is sent as both: some hosts learn from one only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ArpOperation {
    /// ARP request, operation 1.
    Request,
    /// ARP reply, operation 2.
    Reply,
}

/// Whether this node is a router of its LAN (the R flag of an NA). Hosts that have it as their
/// default router drop it when an NA says it is none, and the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouterFlag {
    /// A host: the VIP is not anyone's default router.
    #[default]
    Host,
    /// A router.
    Router,
}

/// A gratuitous ARP for `vip`, to everyone.
///
/// ```text
///  0                   1                   2                   3
///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |       Hardware type (1)       |    Protocol type (0x0800)     |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |   Length (6)  |   Length (4)  |           Operation           |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |  Sender MAC (6 bytes), sender IP (4): this node's, the VIP    |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |  Target MAC (6 bytes), target IP (4): see below, the VIP      |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
///
/// The target MAC is zero in a request (RFC 5227 §2.3) and the sender's in a reply (RFC 5944
/// §4.6).
pub fn gratuitous_arp(mac: Mac, vip: Ipv4Addr, operation: ArpOperation) -> [u8; ARP_LENGTH] {
    let (code, target_mac) = match operation {
        ArpOperation::Request => (1, [0; 6]),
        ArpOperation::Reply => (2, mac),
    };
    let mut frame = [0; ARP_LENGTH];
    fill(
        &mut frame,
        &[
            &BROADCAST,
            &mac,
            &ETHERTYPE_ARP,
            &ARP_ETHERNET_IPV4,
            &[0, code],
            &mac,
            &vip.octets(),
            &target_mac,
            &vip.octets(),
        ],
    );
    frame
}

/// An unsolicited NA for `vip` to all nodes, from `source`, an address of the interface (the VIP
/// itself serves).
///
/// ```text
///  0                   1                   2                   3
///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |   Type (136)  |    Code (0)   |          Checksum             |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |R|S|O|                     Reserved                            |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |                  Target Address (16 bytes)                    |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |    Type (2)   |  Length (1)   |   Target MAC (6 bytes)        |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
pub fn unsolicited_na(
    mac: Mac,
    source: Ipv6Addr,
    vip: Ipv6Addr,
    router: RouterFlag,
) -> [u8; NA_LENGTH] {
    let flags = FLAG_OVERRIDE
        | match router {
            RouterFlag::Host => 0,
            RouterFlag::Router => FLAG_ROUTER,
        };
    let mut na = [0; 32];
    fill(
        &mut na,
        &[
            &[ICMPV6_NEIGHBOR_ADVERT, 0, 0, 0],
            &[flags, 0, 0, 0],
            &vip.octets(),
            &[OPTION_TARGET_LINK_LAYER, 1],
            &mac,
        ],
    );
    let checksum = icmpv6_checksum(&na, &source, &ALL_NODES);
    na[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = [0; NA_LENGTH];
    fill(
        &mut frame,
        &[
            &ALL_NODES_MAC,
            &mac,
            &ETHERTYPE_IPV6,
            &[0x60, 0, 0, 0],
            &[0, 32, IpNextHeaderProtocols::Icmpv6.0, 255],
            &source.octets(),
            &ALL_NODES.octets(),
            &na,
        ],
    );
    frame
}

/// An ARP packet for IPv4 over Ethernet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArpSeen {
    /// Request or reply.
    pub operation: ArpOperation,
    /// Who says so.
    pub sender_mac: Mac,
    /// The address it speaks for; unspecified in a probe (RFC 5227 §2.1.1).
    pub sender: Ipv4Addr,
    /// The address it asks for, or answers to.
    pub target: Ipv4Addr,
}

/// A valid Neighbor Advertisement (RFC 4861 §7.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NaSeen {
    /// Source of the packet.
    pub source: Ipv6Addr,
    /// The address it speaks for.
    pub target: Ipv6Addr,
    /// Where it says the target is: the target link-layer option, or, where a unicast answer
    /// leaves it out, the sender of the frame.
    pub mac: Mac,
    /// The S flag: an answer to a solicitation.
    pub solicited: bool,
}

/// Another node speaks for a VIP (RFC 5227 §2.4, RFC 4862 §5.4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rival {
    /// The VIP.
    pub vip: IpAddr,
    /// Where it says the VIP is.
    pub mac: Mac,
    /// In what kind of packet.
    pub evidence: Evidence,
}

/// In what kind of packet a rival was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// An ARP request with the VIP as its sender.
    ArpRequest,
    /// An ARP reply with the VIP as its sender.
    ArpReply,
    /// A Neighbor Advertisement with the VIP as its target.
    NeighborAdvert,
}

/// Why a frame says nothing about a VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SeenError {
    /// Too short for what it says it is.
    #[error("{0} bytes, too short")]
    Truncated(usize),
    /// Of a VLAN other than that of the interface: a VIP is claimed on its own LAN only.
    #[error("frame with a VLAN tag")]
    Tagged,
    /// Neither ARP nor IPv6, whichever was to be read: nothing is wrong.
    #[error("EtherType {0:#06x}")]
    EtherType(u16),
    /// ARP for something else than IPv4 over Ethernet.
    #[error("ARP for other hardware or another protocol than IPv4 over Ethernet")]
    ArpKind,
    /// Neither request nor reply.
    #[error("ARP operation {0}")]
    ArpOperation(u16),
    /// Not IPv6, or longer than what came.
    #[error("malformed IPv6 header")]
    IpHeader,
    /// Not ICMPv6: nothing is wrong.
    #[error("IPv6 next header {0}")]
    NextHeader(u8),
    /// Other ICMPv6 than an NA: nothing is wrong.
    #[error("ICMPv6 type {0}")]
    IcmpType(u8),
    /// An NA that passed a router, so it does not come from this LAN.
    #[error("hop limit {0}, not 255")]
    HopLimit(u8),
    /// Bad ICMPv6 checksum.
    #[error("bad checksum")]
    Checksum,
    /// An NA that breaks RFC 4861 §7.1.2: code, multicast target, solicited to a group, options.
    #[error("malformed neighbor advertisement")]
    Na,
    /// A group or zero as the MAC of one node.
    #[error("not the MAC of one node")]
    Mac,
}

/// Reads an Ethernet frame that holds ARP. Padding after the packet is ignored.
pub fn parse_arp(frame: &[u8]) -> Result<ArpSeen, SeenError> {
    let (_, packet) = open_ethernet(frame, ETHERTYPE_ARP)?;
    let Some((packet, _)) = packet.split_first_chunk::<28>() else {
        return Err(SeenError::Truncated(frame.len()));
    };
    let (kind, rest) = split::<6>(packet)?;
    if *kind != ARP_ETHERNET_IPV4 {
        return Err(SeenError::ArpKind);
    }
    let (operation, rest) = split::<2>(rest)?;
    let (sender_mac, rest) = split::<6>(rest)?;
    let (sender, rest) = split::<4>(rest)?;
    let (_, rest) = split::<6>(rest)?;
    let (target, _) = split::<4>(rest)?;
    Ok(ArpSeen {
        operation: match u16::from_be_bytes(*operation) {
            1 => ArpOperation::Request,
            2 => ArpOperation::Reply,
            other => return Err(SeenError::ArpOperation(other)),
        },
        sender_mac: of_one_node(*sender_mac)?,
        sender: Ipv4Addr::from(*sender),
        target: Ipv4Addr::from(*target),
    })
}

/// Reads an Ethernet frame that holds a Neighbor Advertisement, with the checks of RFC 4861
/// §7.1.2. One behind an extension header is not read: RFC 6980 forbids the one that matters.
pub fn parse_na(frame: &[u8]) -> Result<NaSeen, SeenError> {
    let (source_mac, packet) = open_ethernet(frame, ETHERTYPE_IPV6)?;
    let Some((header, rest)) = packet.split_first_chunk::<40>() else {
        return Err(SeenError::Truncated(frame.len()));
    };
    let [version, _, _, _, length_high, length_low, next_header, hop_limit, addresses @ ..] =
        *header;
    if version >> 4 != 6 {
        return Err(SeenError::IpHeader);
    }
    if next_header != IpNextHeaderProtocols::Icmpv6.0 {
        return Err(SeenError::NextHeader(next_header));
    }
    let length = usize::from(u16::from_be_bytes([length_high, length_low]));
    let icmp = rest.get(..length).ok_or(SeenError::IpHeader)?;
    let (source, destination) = split::<16>(&addresses)?;
    let (destination, _) = split::<16>(destination)?;
    let (source, destination) = (Ipv6Addr::from(*source), Ipv6Addr::from(*destination));

    let Some((na, options)) = icmp.split_first_chunk::<24>() else {
        return Err(match icmp.first() {
            Some(&kind) if kind != ICMPV6_NEIGHBOR_ADVERT => SeenError::IcmpType(kind),
            _ => SeenError::Truncated(frame.len()),
        });
    };
    let [kind, code, sum_high, sum_low, flags, _, _, _, target @ ..] = *na;
    if kind != ICMPV6_NEIGHBOR_ADVERT {
        return Err(SeenError::IcmpType(kind));
    }
    if hop_limit != 255 {
        return Err(SeenError::HopLimit(hop_limit));
    }
    if icmpv6_checksum(icmp, &source, &destination) != u16::from_be_bytes([sum_high, sum_low]) {
        return Err(SeenError::Checksum);
    }
    let target = Ipv6Addr::from(target);
    let solicited = flags & FLAG_SOLICITED != 0;
    if code != 0 || target.is_multicast() || (solicited && destination.is_multicast()) {
        return Err(SeenError::Na);
    }
    let mac = target_link_layer(options)?.unwrap_or(source_mac);
    Ok(NaSeen { source, target, mac: of_one_node(mac)?, solicited })
}

impl ArpSeen {
    /// The rival that this packet shows, if it speaks for one of `vips` with a MAC that is not
    /// among `own`. A probe is none: it asks before it takes (RFC 5227 §2.1.1).
    pub fn rival(&self, own: &[Mac], vips: &[IpAddr]) -> Option<Rival> {
        let evidence = match self.operation {
            ArpOperation::Request => Evidence::ArpRequest,
            ArpOperation::Reply => Evidence::ArpReply,
        };
        rival(IpAddr::V4(self.sender), self.sender_mac, evidence, own, vips)
    }
}

impl NaSeen {
    /// The rival that this packet shows, if it speaks for one of `vips` with a MAC that is not
    /// among `own`.
    pub fn rival(&self, own: &[Mac], vips: &[IpAddr]) -> Option<Rival> {
        rival(IpAddr::V6(self.target), self.mac, Evidence::NeighborAdvert, own, vips)
    }
}

fn rival(vip: IpAddr, mac: Mac, evidence: Evidence, own: &[Mac], vips: &[IpAddr]) -> Option<Rival> {
    (vips.contains(&vip) && !own.contains(&mac)).then_some(Rival { vip, mac, evidence })
}

impl SeenError {
    /// Name of its counter; stable.
    pub fn name(&self) -> &'static str {
        match self {
            SeenError::Truncated(_) => "truncated",
            SeenError::Tagged => "tagged",
            SeenError::EtherType(_) => "ethertype",
            SeenError::ArpKind => "arp-kind",
            SeenError::ArpOperation(_) => "arp-operation",
            SeenError::IpHeader => "ip-header",
            SeenError::NextHeader(_) => "next-header",
            SeenError::IcmpType(_) => "icmp-type",
            SeenError::HopLimit(_) => "hop-limit",
            SeenError::Checksum => "checksum",
            SeenError::Na => "na",
            SeenError::Mac => "mac",
        }
    }
}

/// The frame's source MAC and payload, if it has that EtherType.
fn open_ethernet(frame: &[u8], ethertype: [u8; 2]) -> Result<(Mac, &[u8]), SeenError> {
    let Some((header, payload)) = frame.split_first_chunk::<14>() else {
        return Err(SeenError::Truncated(frame.len()));
    };
    let [_, _, _, _, _, _, source @ .., high, low] = *header;
    if [high, low] == ethertype {
        Ok((source, payload))
    } else if ETHERTYPE_TAGS.contains(&[high, low]) {
        Err(SeenError::Tagged)
    } else {
        Err(SeenError::EtherType(u16::from_be_bytes([high, low])))
    }
}

/// The target link-layer address among the options of an NA (RFC 4861 §4.6). An option of length
/// 0, or past the end, makes the packet invalid.
fn target_link_layer(mut options: &[u8]) -> Result<Option<Mac>, SeenError> {
    let mut found = None;
    while let [kind, length, ..] = *options {
        let length = usize::from(length) * 8;
        let option = options.get(..length).filter(|_| length > 0).ok_or(SeenError::Na)?;
        if kind == OPTION_TARGET_LINK_LAYER {
            let (mac, _) = split::<6>(&option[2..])?;
            found = Some(*mac);
        }
        options = &options[length..];
    }
    if options.is_empty() { Ok(found) } else { Err(SeenError::Na) }
}

fn of_one_node(mac: Mac) -> Result<Mac, SeenError> {
    const GROUP: u8 = 1;
    if mac == [0; 6] || mac[0] & GROUP != 0 { Err(SeenError::Mac) } else { Ok(mac) }
}

fn icmpv6_checksum(icmp: &[u8], source: &Ipv6Addr, destination: &Ipv6Addr) -> u16 {
    let protocol = IpNextHeaderProtocols::Icmpv6;
    util::ipv6_checksum(icmp, ICMPV6_CHECKSUM_WORD, &[], source, destination, protocol)
}

fn split<const N: usize>(bytes: &[u8]) -> Result<(&[u8; N], &[u8]), SeenError> {
    bytes.split_first_chunk().ok_or(SeenError::Truncated(bytes.len()))
}

/// Writes the parts one after the other; together they are as long as the frame.
fn fill(mut frame: &mut [u8], parts: &[&[u8]]) {
    for part in parts {
        let (here, rest) = frame.split_at_mut(part.len());
        here.copy_from_slice(part);
        frame = rest;
    }
    debug_assert!(frame.is_empty(), "the parts fill the frame");
}
