//! What the driver counts, and how often it speaks of it.

use std::time::{Duration, Instant};

use crate::announce::{Evidence, SeenError};
use crate::vrrp::packet::DecodeError;

/// The shortest time between two log lines of one counter.
pub(super) const LOG_INTERVAL: Duration = Duration::from_secs(10);

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Something that the driver counts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            /// Every counter, in the order in which they are shown.
            pub const ALL: &[Counter] = &[$(Counter::$variant,)*];

            /// Its name; stable.
            pub fn name(self) -> &'static str {
                match self {
                    $(Counter::$variant => $name,)*
                }
            }
        }
    };
}

counters! {
    /// Adverts sent, one per path and destination.
    AdvertSent => "advert_sent",
    /// Adverts that could not be sent.
    AdvertSendFailed => "advert_send_failed",
    /// Valid adverts received.
    AdvertReceived => "advert_received",
    /// IPv4 header cut short.
    AdvertIpHeader => "advert_ip_header",
    /// Not IPv4 on an IPv4 path.
    AdvertIpVersion => "advert_ip_version",
    /// IPv4 total length wrong.
    AdvertIpLength => "advert_ip_length",
    /// Fragments.
    AdvertFragment => "advert_fragment",
    /// Not protocol 112.
    AdvertProtocol => "advert_protocol",
    /// TTL or hop limit not 255.
    AdvertTtl => "advert_ttl",
    /// This node's own adverts, come back.
    AdvertOwnSource => "advert_own_source",
    /// Shorter than an advert.
    AdvertTruncated => "advert_truncated",
    /// Of another virtual router; nothing is wrong.
    AdvertOtherVrid => "advert_other_vrid",
    /// VRRP of another version.
    AdvertVersion => "advert_version",
    /// VRRP, but no advert.
    AdvertType => "advert_type",
    /// Without addresses.
    AdvertNoAddresses => "advert_no_addresses",
    /// Length and address count disagree.
    AdvertLength => "advert_length",
    /// Checksum wrong in both forms.
    AdvertChecksum => "advert_checksum",
    /// Interval of zero.
    AdvertInterval => "advert_interval",
    /// Nodes heard for the first time, or for the first time since they were forgotten.
    NewNode => "new_node",
    /// From an address that is no peer, on a unicast path.
    AdvertStranger => "advert_stranger",
    /// Adverts that list other addresses than this node's.
    AddressesDiffer => "addresses_differ",
    /// Adverts with another interval than this node's.
    IntervalDiffers => "interval_differs",
    /// Adverts of others while this node was Active.
    RivalAdvert => "rival_advert",
    /// ARP that claimed a VIP while this node was Active.
    RivalArp => "rival_arp",
    /// Neighbor Advertisements that claimed a VIP while this node was Active.
    RivalNa => "rival_na",
    /// ARP and NA frames that broke their format, and other frames that are neither.
    FrameGarbage => "frame_garbage",
    /// Heartbeats sent on the peer channel, one per peer.
    HeartbeatSent => "heartbeat_sent",
    /// Heartbeats received.
    HeartbeatReceived => "heartbeat_received",
    /// Peers whose connection was refused, or that refused this node's: another key, cluster, name
    /// or version.
    PeerRefused => "peer_refused",
    /// Connections to the peer channel from nobody who is a peer.
    PeerStranger => "peer_stranger",
    /// Messages on the peer channel that could not be read.
    PeerGarbage => "peer_garbage",
    /// Adverts, heartbeats and flows of a node that believes itself Active and was replaced.
    Fenced => "fenced",
    /// Announcement frames sent.
    AnnouncementSent => "announcement_sent",
    /// Announcement frames that could not be sent.
    AnnouncementFailed => "announcement_failed",
    /// VIPs put back after something else removed them.
    VipRestored => "vip_restored",
    /// VIPs removed that stood on an interface without this node owning them.
    StrayVip => "stray_vip",
    /// Failures to configure or refresh VIPs.
    ConfigureFailed => "configure_failed",
    /// Failures to remove VIPs.
    RemoveFailed => "remove_failed",
    /// Failures to ask the kernel about its interfaces.
    NetlinkTrouble => "netlink_trouble",
    /// Failures to receive, or to open a socket.
    SocketTrouble => "socket_trouble",
    /// Times this node slept for longer than its Backups wait.
    Stalled => "stalled",
    /// Packets discarded because they came while it slept.
    Stale => "stale",
}

impl From<&DecodeError> for Counter {
    fn from(error: &DecodeError) -> Self {
        match error {
            DecodeError::IpHeader(_) => Self::AdvertIpHeader,
            DecodeError::IpVersion(_) => Self::AdvertIpVersion,
            DecodeError::IpLength { .. } => Self::AdvertIpLength,
            DecodeError::Fragment => Self::AdvertFragment,
            DecodeError::Protocol(_) => Self::AdvertProtocol,
            DecodeError::Ttl(_) => Self::AdvertTtl,
            DecodeError::OwnSource => Self::AdvertOwnSource,
            DecodeError::Truncated(_) => Self::AdvertTruncated,
            DecodeError::OtherVrid(_) => Self::AdvertOtherVrid,
            DecodeError::Version(_) => Self::AdvertVersion,
            DecodeError::Type(_) => Self::AdvertType,
            DecodeError::NoAddresses => Self::AdvertNoAddresses,
            DecodeError::Length { .. } => Self::AdvertLength,
            DecodeError::Checksum => Self::AdvertChecksum,
            DecodeError::Interval => Self::AdvertInterval,
        }
    }
}

impl From<&SeenError> for Counter {
    fn from(_: &SeenError) -> Self {
        Self::FrameGarbage
    }
}

impl From<Evidence> for Counter {
    fn from(evidence: Evidence) -> Self {
        match evidence {
            Evidence::ArpRequest | Evidence::ArpReply => Self::RivalArp,
            Evidence::NeighborAdvert => Self::RivalNa,
        }
    }
}

/// The counts, and when each was last spoken of.
#[derive(Debug)]
pub(super) struct Counters([Count; Counter::ALL.len()]);

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    total: u64,
    logged: Option<Instant>,
    suppressed: u64,
}

impl Counters {
    pub(super) fn new() -> Self {
        Self([Count::default(); Counter::ALL.len()])
    }

    /// Counts without a word.
    pub(super) fn count(&mut self, counter: Counter, by: u64) {
        self.0[counter as usize].total += by;
    }

    /// Counts one; `Some` with the number of lines that were held back if it is to be logged now.
    pub(super) fn note(&mut self, counter: Counter, now: Instant) -> Option<u64> {
        let count = &mut self.0[counter as usize];
        count.total += 1;
        if count.logged.is_some_and(|at| now.saturating_duration_since(at) < LOG_INTERVAL) {
            count.suppressed += 1;
            return None;
        }
        count.logged = Some(now);
        Some(std::mem::take(&mut count.suppressed))
    }

    pub(super) fn list(&self) -> Vec<(&'static str, u64)> {
        Counter::ALL
            .iter()
            .map(|counter| (counter.name(), self.0[*counter as usize].total))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_flood_is_one_line_in_ten_seconds_that_says_how_much_it_was() {
        let mut counters = Counters::new();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!(counters.note(Counter::AdvertTtl, at(0)), Some(0));
        assert_eq!(counters.note(Counter::AdvertTtl, at(1)), None);
        assert_eq!(counters.note(Counter::AdvertTtl, at(9)), None);
        assert_eq!(counters.note(Counter::AdvertType, at(9)), Some(0), "of another kind");
        assert_eq!(counters.note(Counter::AdvertTtl, at(10)), Some(2));
        assert_eq!(counters.note(Counter::AdvertTtl, at(11)), None);
        let list = counters.list();
        assert!(list.contains(&("advert_ttl", 5)) && list.contains(&("advert_type", 1)));
    }

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), Counter::ALL.len());
    }
}
