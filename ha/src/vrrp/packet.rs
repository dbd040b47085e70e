//! The VRRPv3 advert on the wire (RFC 9568 §5): bytes ⇄ [`Message`].
//!
//! It judges one packet by itself, with the checks of RFC 9568 §7.1, and never by what was heard
//! before. What it rejects is a [`DecodeError`], which the driver counts by
//! [name](DecodeError::name); what it accepts goes on to [`crate::vrrp::router`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use pnet_packet::ip::IpNextHeaderProtocol;
use pnet_packet::util;

use crate::config::{ChecksumForm, Family};
use crate::vrrp::{AdverInterval, Priority, Vrid};

/// IP protocol number of VRRP (RFC 9568 §5.1.1.4).
pub const PROTOCOL: u8 = 112;

/// TTL and hop limit of every advert: one that passed a router carries less (RFC 9568 §5.1.1.3).
pub const TTL: u8 = 255;

/// Group to which IPv4 adverts go (RFC 9568 §5.1.1.2).
pub const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 18);

/// Group to which IPv6 adverts go (RFC 9568 §5.1.2.2).
pub const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x12);

const VERSION: u8 = 3;
const TYPE_ADVERTISEMENT: u8 = 1;
const HEADER: usize = 8;
/// Where the checksum is, counted in 16-bit words.
const CHECKSUM_WORD: usize = 3;

/// An advert to send.
///
/// ```text
///  0                   1                   2                   3
///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |Version| Type  | Virtual Rtr ID|   Priority    |IPvX Addr Count|
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |Reserve| Max Advertise Interval|          Checksum             |
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// |                       IPvX Address(es)                        |
/// +                                                               +
/// +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Virtual Rtr ID.
    pub vrid: Vrid,
    /// Priority.
    pub priority: Priority,
    /// Max Advertise Interval.
    pub interval: AdverInterval,
    /// IPvX Address(es): 1–255 of the family of the path.
    pub addresses: &'a [IpAddr],
}

/// Source and destination of a packet, of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// Of an IPv4 packet.
    V4 {
        /// Its source.
        source: Ipv4Addr,
        /// Its destination.
        destination: Ipv4Addr,
    },
    /// Of an IPv6 packet.
    V6 {
        /// Its source.
        source: Ipv6Addr,
        /// Its destination.
        destination: Ipv6Addr,
    },
}

/// A packet's IP header, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// From where to where.
    pub ends: Ends,
    /// TTL or hop limit on arrival.
    pub ttl: u8,
}

/// What the receiving path expects.
#[derive(Debug, Clone, Copy)]
pub struct Receiver<'a> {
    /// Its VRID.
    pub vrid: Vrid,
    /// This node's own addresses: adverts that come back from a switch are not a rival's.
    pub own: &'a [IpAddr],
}

/// An advert that passed every check; borrows from the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received<'a> {
    /// Virtual Rtr ID; the receiver's.
    pub vrid: Vrid,
    /// Priority.
    pub priority: Priority,
    /// Max Advertise Interval.
    pub interval: AdverInterval,
    /// The form that the checksum has; always with pseudo-header for IPv6.
    pub checksum: ChecksumForm,
    /// The VIPs that the sender lists. Another list than this node's own is a fault of some
    /// configuration and to be shown, but no reason to drop the advert (RFC 9568 §7.1).
    pub addresses: Addresses<'a>,
}

/// The address list of a received advert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses<'a> {
    bytes: &'a [u8],
    family: Family,
}

/// Why a packet is not an advert for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than an IPv4 header, or than the header says of itself.
    #[error("{0} bytes do not hold the IPv4 header")]
    IpHeader(usize),
    /// Not IPv4 where it was to be.
    #[error("IP version {0} on an IPv4 path")]
    IpVersion(u8),
    /// Total length outside of what came.
    #[error("IPv4 total length {claimed} with {have} bytes")]
    IpLength {
        /// The total length it claims.
        claimed: u16,
        /// What came.
        have: usize,
    },
    /// Part of a datagram; adverts fit into one.
    #[error("fragment of an IPv4 datagram")]
    Fragment,
    /// Another protocol than VRRP.
    #[error("IP protocol {0}, not VRRP's 112")]
    Protocol(u8),
    /// It passed a router, so it does not come from this LAN.
    #[error("TTL or hop limit {0}, not 255")]
    Ttl(u8),
    /// This node's own advert came back.
    #[error("own advert came back")]
    OwnSource,
    /// Shorter than the fixed part of an advert.
    #[error("{0} bytes, shorter than an advert")]
    Truncated(usize),
    /// Of another virtual router: nothing is wrong.
    #[error("VRID {0} of another virtual router")]
    OtherVrid(u8),
    /// Another version of VRRP with this node's VRID.
    #[error("VRRP version {0}, not 3: set the other node to version 3 or give it another VRID")]
    Version(u8),
    /// Not an ADVERTISEMENT.
    #[error("VRRP type {0}, not an advertisement")]
    Type(u8),
    /// No addresses.
    #[error("advert lists no addresses")]
    NoAddresses,
    /// Longer or shorter than its address count says.
    #[error("advert of {have} bytes, its address count says {expected}")]
    Length {
        /// Length by the address count.
        expected: usize,
        /// Length of what came.
        have: usize,
    },
    /// Right in neither form.
    #[error("bad checksum")]
    Checksum,
    /// Max Advertise Interval of 0.
    #[error("advertisement interval of 0")]
    Interval,
}

/// Why an advert can't be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// It would list none or more than 255.
    #[error("an advert lists 1 to 255 addresses, not {0}")]
    Count(usize),
    /// An address is of the other family than the packet.
    #[error("{0} is not of the family of its path")]
    Family(IpAddr),
}

impl Message<'_> {
    /// The advert as the payload of an IP packet between `ends`. `form` matters for IPv4 only.
    pub fn encode(&self, ends: &Ends, form: ChecksumForm) -> Result<Vec<u8>, EncodeError> {
        let count = u8::try_from(self.addresses.len())
            .ok()
            .filter(|count| *count > 0)
            .ok_or(EncodeError::Count(self.addresses.len()))?;
        let [interval_high, interval_low] = self.interval.centiseconds().to_be_bytes();
        let mut bytes = vec![
            VERSION << 4 | TYPE_ADVERTISEMENT,
            self.vrid.value(),
            self.priority.value(),
            count,
            interval_high,
            interval_low,
            0,
            0,
        ];
        for address in self.addresses {
            match (address, ends) {
                (IpAddr::V4(v4), Ends::V4 { .. }) => bytes.extend(v4.octets()),
                (IpAddr::V6(v6), Ends::V6 { .. }) => bytes.extend(v6.octets()),
                _ => return Err(EncodeError::Family(*address)),
            }
        }
        let checksum = checksum(&bytes, ends, form);
        bytes[2 * CHECKSUM_WORD..HEADER].copy_from_slice(&checksum.to_be_bytes());
        Ok(bytes)
    }
}

/// Splits a whole IPv4 datagram, as a raw socket delivers it, into header and payload.
pub fn open_ipv4(datagram: &[u8]) -> Result<(Envelope, &[u8]), DecodeError> {
    let Some((header, _)) = datagram.split_first_chunk::<20>() else {
        return Err(DecodeError::IpHeader(datagram.len()));
    };
    if header[0] >> 4 != 4 {
        return Err(DecodeError::IpVersion(header[0] >> 4));
    }
    let header_length = usize::from(header[0] & 0x0f) * 4;
    if header_length < header.len() || header_length > datagram.len() {
        return Err(DecodeError::IpHeader(datagram.len()));
    }
    let claimed = u16::from_be_bytes([header[2], header[3]]);
    let payload = datagram
        .get(header_length..usize::from(claimed))
        .ok_or(DecodeError::IpLength { claimed, have: datagram.len() })?;
    const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
    if u16::from_be_bytes([header[6], header[7]]) & MORE_FRAGMENTS_AND_OFFSET != 0 {
        return Err(DecodeError::Fragment);
    }
    if header[9] != PROTOCOL {
        return Err(DecodeError::Protocol(header[9]));
    }
    let [.., s0, s1, s2, s3, d0, d1, d2, d3] = *header;
    let ends = Ends::V4 {
        source: Ipv4Addr::new(s0, s1, s2, s3),
        destination: Ipv4Addr::new(d0, d1, d2, d3),
    };
    Ok((Envelope { ends, ttl: header[8] }, payload))
}

/// Reads the payload of an IP packet (RFC 9568 §7.1).
///
/// The VRID is looked at before the version, so that another virtual router of this LAN is
/// [`DecodeError::OtherVrid`] whatever it speaks: version 2 has its VRID in the same place.
pub fn decode<'a>(
    bytes: &'a [u8],
    envelope: &Envelope,
    receiver: &Receiver<'_>,
) -> Result<Received<'a>, DecodeError> {
    if envelope.ttl != TTL {
        return Err(DecodeError::Ttl(envelope.ttl));
    }
    if receiver.own.contains(&envelope.ends.source()) {
        return Err(DecodeError::OwnSource);
    }
    let Some((header, list)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(DecodeError::Truncated(bytes.len()));
    };
    let [version_type, vrid, priority, count, interval_high, interval_low, sum_high, sum_low] =
        *header;
    if vrid != receiver.vrid.value() {
        return Err(DecodeError::OtherVrid(vrid));
    }
    if version_type >> 4 != VERSION {
        return Err(DecodeError::Version(version_type >> 4));
    }
    if version_type & 0x0f != TYPE_ADVERTISEMENT {
        return Err(DecodeError::Type(version_type & 0x0f));
    }
    if count == 0 {
        return Err(DecodeError::NoAddresses);
    }
    let addresses = Addresses { bytes: list, family: envelope.ends.family() };
    let expected = HEADER + usize::from(count) * addresses.width();
    if bytes.len() != expected {
        return Err(DecodeError::Length { expected, have: bytes.len() });
    }
    let claimed = u16::from_be_bytes([sum_high, sum_low]);
    let checksum = [ChecksumForm::Plain, ChecksumForm::PseudoHeader]
        .into_iter()
        .find(|form| checksum(bytes, &envelope.ends, *form) == claimed)
        .ok_or(DecodeError::Checksum)?;
    // The four bits above the interval are reserved and ignored.
    let interval = u16::from_be_bytes([interval_high, interval_low]) & 0x0fff;
    Ok(Received {
        vrid: receiver.vrid,
        priority: Priority::new(priority),
        interval: AdverInterval::from_centiseconds(interval).ok_or(DecodeError::Interval)?,
        checksum: match addresses.family {
            Family::V4 => checksum,
            Family::V6 => ChecksumForm::PseudoHeader,
        },
        addresses,
    })
}

/// RFC 9568 §5.2.8. The field itself counts as zero.
fn checksum(bytes: &[u8], ends: &Ends, form: ChecksumForm) -> u16 {
    let protocol = IpNextHeaderProtocol(PROTOCOL);
    match (ends, form) {
        (Ends::V4 { .. }, ChecksumForm::Plain) => util::checksum(bytes, CHECKSUM_WORD),
        (Ends::V4 { source, destination }, ChecksumForm::PseudoHeader) => {
            util::ipv4_checksum(bytes, CHECKSUM_WORD, &[], source, destination, protocol)
        }
        (Ends::V6 { source, destination }, ChecksumForm::Plain | ChecksumForm::PseudoHeader) => {
            util::ipv6_checksum(bytes, CHECKSUM_WORD, &[], source, destination, protocol)
        }
    }
}

impl Ends {
    /// `None` if the two are not of one family.
    pub fn new(source: IpAddr, destination: IpAddr) -> Option<Self> {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Some(Ends::V4 { source, destination }),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Some(Ends::V6 { source, destination }),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
        }
    }

    /// Source address.
    pub fn source(&self) -> IpAddr {
        match self {
            Ends::V4 { source, .. } => IpAddr::V4(*source),
            Ends::V6 { source, .. } => IpAddr::V6(*source),
        }
    }

    /// The family of both.
    pub fn family(&self) -> Family {
        match self {
            Ends::V4 { .. } => Family::V4,
            Ends::V6 { .. } => Family::V6,
        }
    }
}

impl<'a> Addresses<'a> {
    /// The addresses in the order of the advert; 1–255 of one family.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<'a> {
        let family = self.family;
        self.bytes.chunks_exact(self.width()).map(move |chunk| match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::from(
                <[u8; 4]>::try_from(chunk).expect("chunks of an IPv4 list have 4 bytes"),
            )),
            Family::V6 => IpAddr::V6(Ipv6Addr::from(
                <[u8; 16]>::try_from(chunk).expect("chunks of an IPv6 list have 16 bytes"),
            )),
        })
    }

    /// Whether these are the same addresses as `own`, in whatever order.
    pub fn same_as(&self, own: &[IpAddr]) -> bool {
        self.bytes.len() == own.len() * self.width()
            && (self.iter().eq(own.iter().copied())
                || (self.iter().all(|address| own.contains(&address))
                    && own.iter().all(|address| self.iter().any(|listed| listed == *address))))
    }

    fn width(&self) -> usize {
        match self.family {
            Family::V4 => 4,
            Family::V6 => 16,
        }
    }
}

impl DecodeError {
    /// Name of its counter; stable.
    pub fn name(&self) -> &'static str {
        match self {
            DecodeError::IpHeader(_) => "ip-header",
            DecodeError::IpVersion(_) => "ip-version",
            DecodeError::IpLength { .. } => "ip-length",
            DecodeError::Fragment => "fragment",
            DecodeError::Protocol(_) => "protocol",
            DecodeError::Ttl(_) => "ttl",
            DecodeError::OwnSource => "own-source",
            DecodeError::Truncated(_) => "truncated",
            DecodeError::OtherVrid(_) => "other-vrid",
            DecodeError::Version(_) => "version",
            DecodeError::Type(_) => "type",
            DecodeError::NoAddresses => "no-addresses",
            DecodeError::Length { .. } => "length",
            DecodeError::Checksum => "checksum",
            DecodeError::Interval => "interval",
        }
    }
}
