//! A takeover or a yield on its way: its steps, and when it has come to an end.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::{Heard, Outcome, Refused, Step};

/// How long a takeover may take until the VIPs are announced: the kernel was asked and is slow.
const TAKEOVER: Duration = Duration::from_secs(10);

/// The command that is waiting for its end; one at a time.
pub(super) struct Pending {
    pub(super) kind: Kind,
    started: Instant,
    pub(super) deadline: Instant,
    steps: Vec<Step>,
    pub(super) lacking: Option<u64>,
    advertised: bool,
    answer: oneshot::Sender<Result<Outcome, Refused>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Takeover,
    Yield,
}

impl Pending {
    pub(super) fn takeover(
        now: Instant,
        answer: oneshot::Sender<Result<Outcome, Refused>>,
    ) -> Self {
        let deadline = now + TAKEOVER;
        Self {
            kind: Kind::Takeover,
            started: now,
            deadline,
            steps: Vec::new(),
            lacking: None,
            advertised: false,
            answer,
        }
    }

    /// `patience`: how long another node may take to claim the VIPs.
    pub(super) fn yielding(
        now: Instant,
        patience: Duration,
        answer: oneshot::Sender<Result<Outcome, Refused>>,
    ) -> Self {
        let deadline = now + patience;
        Self {
            kind: Kind::Yield,
            started: now,
            deadline,
            steps: Vec::new(),
            lacking: None,
            advertised: false,
            answer,
        }
    }

    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }

    /// Whether the advert that is being sent is the first since the command: the claim goes out
    /// several times.
    pub(super) fn is_first_advert(&mut self) -> bool {
        !std::mem::replace(&mut self.advertised, true)
    }

    pub(super) fn step(&mut self, now: Instant, what: impl Into<String>) {
        self.step_by(None, now, what.into());
    }

    /// A step of a peer's, which is known later than it was done.
    pub(super) fn step_by(&mut self, peer: Option<String>, at: Instant, what: String) {
        let at = at.saturating_duration_since(self.started);
        let place = self.steps.partition_point(|step| step.at <= at);
        self.steps.insert(place, Step { at, peer, what });
    }

    /// It came about; `active` is the node that is Active now, `None` for this one.
    pub(super) fn succeed(self, epoch: u64, active: Option<Heard>) {
        let Self { steps, lacking, .. } = self;
        let _ = self.answer.send(Ok(Outcome { steps, lacking, epoch, active }));
    }

    pub(super) fn refuse(self, why: Refused) {
        let _ = self.answer.send(Err(why));
    }
}
