//! VRRPv3 (RFC 9568): the advert on the wire ([`packet`]) and the virtual router as a machine
//! ([`router`]). Nothing here reads the clock, touches a socket or logs.

use std::fmt;
use std::time::Duration;

pub mod packet;
pub mod router;

/// Virtual router identifier, 1–255 (RFC 9568 §5.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vrid(u8);

impl Vrid {
    /// `None` for 0.
    pub fn new(value: u8) -> Option<Self> {
        (value != 0).then_some(Self(value))
    }

    /// The value on the wire.
    pub fn value(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Vrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Priority in the election (RFC 9568 §5.2.4): 1–255 of a node, 0 on the wire to yield.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Priority(u8);

impl Priority {
    /// The Active stops: Backups need not wait for the Active_Down_Timer.
    pub const YIELD: Self = Self(0);
    /// Held after an operator's takeover, so that nobody but another takeover preempts.
    pub const HELD: Self = Self(254);
    /// The address owner's, and the claim of a takeover while it lasts.
    pub const OWNER: Self = Self(255);

    /// Any value; 0 is [`Priority::YIELD`].
    pub fn new(value: u8) -> Self {
        Self(value)
    }

    /// The value on the wire.
    pub fn value(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Max Advertise Interval: centiseconds, 1–4095, on the wire (RFC 9568 §5.2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdverInterval(u16);

impl AdverInterval {
    /// `None` outside 1–4095.
    pub fn from_centiseconds(value: u16) -> Option<Self> {
        (1..=4095).contains(&value).then_some(Self(value))
    }

    /// `None` unless a whole number of centiseconds from 10 ms to 40.95 s.
    pub fn from_duration(value: Duration) -> Option<Self> {
        let micros = value.as_micros();
        if !micros.is_multiple_of(10_000) {
            return None;
        }
        u16::try_from(micros / 10_000).ok().and_then(Self::from_centiseconds)
    }

    /// The value on the wire.
    pub fn centiseconds(self) -> u16 {
        self.0
    }

    /// As a duration.
    pub fn duration(self) -> Duration {
        Duration::from_millis(u64::from(self.0) * 10)
    }
}

/// Preempt_Mode (RFC 9568 §6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preempt {
    /// A Backup of higher priority takes over from an Active of lower priority.
    #[default]
    Enabled,
    /// An Active stays, whatever the priority of the Backups.
    Disabled,
}
