//! What two nodes say to each other on the peer channel when the VIPs are to move.
//!
//! ```text
//! asker (Backup)                      giver (Active)
//!                 <-- Offer           only where the giver is to be rid of the VIPs
//! Ask             -->
//!                 <-- Heard           the asker's flows are brought up to date
//!                 <-- Ready           no packet passes any more; the last delta is on its way
//! Go              -->                 there, and willing
//!                 <-- Give            the delta is acknowledged, the VIPs are released
//! Taken           -->                 announced
//! ```
//!
//! Instead of what comes next, the giver may say [`Handover::Refuse`] until it gives, and the asker
//! [`Handover::Cancel`] until it says [`Handover::Go`].

use std::time::Duration;

use wincode::{SchemaRead, SchemaWrite};

use crate::vrrp::router::Wish;

/// A message. `run` is the asker's number of this transaction, in an [`Handover::Offer`] the
/// giver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Handover {
    /// Giver: I am to be rid of the VIPs; ask for them, if you can carry them.
    Offer {
        /// Of the giver's.
        run: u64,
    },
    /// Asker: I want the VIPs.
    Ask {
        /// Of this transaction.
        run: u64,
        /// Why.
        wish: Wish,
        /// Also if I do not have all your flows.
        force: bool,
    },
    /// Giver: I am at it.
    Heard {
        /// Of this transaction.
        run: u64,
    },
    /// Nothing comes of it; nothing has changed.
    Refuse {
        /// Of this transaction, or of the offer.
        run: u64,
        /// Why.
        why: Why,
    },
    /// Giver: no packet for a VIP passes here any more, and your last delta is on its way.
    Ready {
        /// Of this transaction.
        run: u64,
    },
    /// Asker: I am there, and take what is given.
    Go {
        /// Of this transaction.
        run: u64,
    },
    /// Giver: the VIPs are yours.
    Give {
        /// Of this transaction.
        run: u64,
        /// Of the giver's time of being Active; the asker's is a higher one.
        epoch: u64,
        /// In microseconds: not to be taken any more so long after [`Handover::Go`] was sent, since
        /// the giver then takes the VIPs back.
        valid_us: u32,
        /// Flows, or changes of flows, that the asker has not acknowledged.
        lacking: u64,
        /// What the giver did, when.
        took: Took,
    },
    /// Asker: the VIPs are announced here.
    Taken {
        /// Of this transaction.
        run: u64,
        /// Of the asker's time of being Active.
        epoch: u64,
        /// From the arrival of [`Handover::Give`] to the announcement, in microseconds.
        took_us: u32,
    },
    /// Asker: I no longer want them.
    Cancel {
        /// Of this transaction.
        run: u64,
    },
}

/// Why nothing comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SchemaRead, SchemaWrite, thiserror::Error)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub enum Why {
    /// The giver has nothing to give.
    #[error("it is not Active")]
    NotActive,
    /// A handover is under way already.
    #[error("another handover is under way there")]
    Busy,
    /// The one that was offered the VIPs can't carry them.
    #[error("it can't carry the VIPs")]
    Fault,
    /// The asker does not have the giver's flows.
    #[error(
        "the Backup is not in sync with the Active's flows ({lacking} of {of} not acknowledged)"
    )]
    Behind {
        /// Flows that it has not acknowledged.
        lacking: u64,
        /// Flows that there are.
        of: u64,
    },
    /// The asker did not go on, or its acknowledgement of the last delta did not come in time.
    #[error("the last delta was not acknowledged in time ({lacking} changes)")]
    Late {
        /// Changes that it has not acknowledged.
        lacking: u64,
    },
}

/// When the giver had done what, from the arrival of [`Handover::Ask`], in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
pub struct Took {
    /// The asker had everything but for what is happening now; no packet passes from here on.
    pub caught_up_us: u32,
    /// The last delta was acknowledged.
    pub flushed_us: u32,
    /// The VIPs were released.
    pub released_us: u32,
}

/// Microseconds, as many as fit.
pub(super) fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}
