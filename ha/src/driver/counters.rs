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
    AdvertSent => "advert-sent",
    /// Adverts that could not be sent.
    AdvertSendFailed => "advert-send-failed",
    /// Valid adverts received.
    AdvertReceived => "advert-received",
    /// IPv4 header cut short.
    AdvertIpHeader => "advert-ip-header",
    /// Not IPv4 on an IPv4 path.
    AdvertIpVersion => "advert-ip-version",
    /// IPv4 total length wrong.
    AdvertIpLength => "advert-ip-length",
    /// Fragments.
    AdvertFragment => "advert-fragment",
    /// Not protocol 112.
    AdvertProtocol => "advert-protocol",
    /// TTL or hop limit not 255.
    AdvertTtl => "advert-ttl",
    /// This node's own adverts, come back.
    AdvertOwnSource => "advert-own-source",
    /// Shorter than an advert.
    AdvertTruncated => "advert-truncated",
    /// Of another virtual router; nothing is wrong.
    AdvertOtherVrid => "advert-other-vrid",
    /// VRRP of another version.
    AdvertVersion => "advert-version",
    /// VRRP, but no advert.
    AdvertType => "advert-type",
    /// Without addresses.
    AdvertNoAddresses => "advert-no-addresses",
    /// Length and address count disagree.
    AdvertLength => "advert-length",
    /// Checksum wrong in both forms.
    AdvertChecksum => "advert-checksum",
    /// Interval of zero.
    AdvertInterval => "advert-interval",
    /// Adverts that list other addresses than this node's.
    AddressesDiffer => "addresses-differ",
    /// Adverts with another interval than this node's.
    IntervalDiffers => "interval-differs",
    /// Adverts of others while this node was Active.
    RivalAdvert => "rival-advert",
    /// ARP that claimed a VIP while this node was Active.
    RivalArp => "rival-arp",
    /// Neighbor Advertisements that claimed a VIP while this node was Active.
    RivalNa => "rival-na",
    /// ARP and NA frames that broke their format, and other frames that are neither.
    FrameGarbage => "frame-garbage",
    /// Announcement frames sent.
    AnnouncementSent => "announcement-sent",
    /// Announcement frames that could not be sent.
    AnnouncementFailed => "announcement-failed",
    /// VIPs put back after something else removed them.
    VipRestored => "vip-restored",
    /// VIPs removed that stood on an interface without this node owning them.
    StrayVip => "stray-vip",
    /// Failures to configure or refresh VIPs.
    ConfigureFailed => "configure-failed",
    /// Failures to remove VIPs.
    RemoveFailed => "remove-failed",
    /// Failures to ask the kernel about its interfaces.
    NetlinkTrouble => "netlink-trouble",
    /// Failures to receive, or to open a socket.
    SocketTrouble => "socket-trouble",
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
        assert!(list.contains(&("advert-ttl", 5)) && list.contains(&("advert-type", 1)));
    }

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), Counter::ALL.len());
    }
}
