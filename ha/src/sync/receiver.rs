//! The end of a Backup: it applies what the Active sends, acknowledges it, and compares digests.
//!
//! Pure. It holds no flow: its outputs are carried out in their order, so that an acknowledgement
//! goes out after what it acknowledges is in the table.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::frame::{BucketSum, Compared, Frame, Name, Position, Scope};
use super::{Affinity, BUCKETS, BucketSet, Change};

/// More buckets than these that differ are not worth a repair: everything is sent again.
pub const MOST_REPAIRED: usize = 2048;
/// A receiver that the Active refuses asks again after this.
pub const RETRY: Duration = Duration::from_millis(200);

/// What happens.
#[derive(Debug)]
pub enum Input {
    /// There is a session with the node that is Active.
    Connected,
    /// There is none any more, or that node is no longer Active.
    Disconnected,
    /// A frame of its.
    Frame(Frame),
    /// What [`Output::Sum`] asked for.
    Summed {
        /// As it was asked for.
        run: u64,
        /// A sum for each bucket.
        sums: Box<[BucketSum]>,
    },
}

/// What the receiver wants done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a frame.
    Send(Frame),
    /// What the source's numbers mean, from now on.
    Names(Vec<Name>),
    /// Bring the table in line. What is put is marked with the generation.
    Apply {
        /// The changes, in their order.
        changes: Vec<Change>,
        /// The mark.
        generation: u8,
    },
    /// These clients keep to these backends, unless the table has something later.
    Keep(Vec<Affinity>),
    /// Remove every flow of that scope that is not marked with the generation.
    Sweep {
        /// The mark.
        generation: u8,
        /// Of all flows, or of some buckets.
        scope: Scope,
    },
    /// Sum the table up; answered by [`Input::Summed`].
    Sum {
        /// To be handed back: an answer to an older question is none.
        run: u64,
    },
    /// End the session: the other end breaks the protocol.
    Abort(&'static str),
}

/// How the receiver stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It has nothing that is known to be right.
    Nothing,
    /// A snapshot is on its way; flows that have come so far.
    Snapshot {
        /// Flows.
        flows: u64,
    },
    /// It has everything, but for the lag.
    InSync,
    /// It had, until the session ended.
    Stale,
}

/// The receiver.
#[derive(Debug)]
pub struct Receiver {
    connected: bool,
    /// Where the table stands; only where it is whole.
    have: Option<Position>,
    /// While a snapshot is on its way: where the deltas are.
    at: Option<Position>,
    transfer: Option<Scope>,
    transfer_flows: u64,
    generation: u8,
    /// The last subscription, and whether the source has answered it: what comes before that is of
    /// an older one.
    subscription: u64,
    subscribed: bool,
    /// Of that subscription.
    frames: u64,
    /// When the first frame came that is not acknowledged.
    unacknowledged: Option<Instant>,
    retry_at: Option<Instant>,
    digest: Option<Digest>,
    /// Of the last question.
    run: u64,
    compared: Option<Compared>,
    outputs: VecDeque<Output>,
}

/// A comparison under way.
#[derive(Debug)]
struct Digest {
    theirs: Vec<Option<BucketSum>>,
    ours: Option<Box<[BucketSum]>>,
    /// Buckets that have changed since it began.
    touched: BucketSet,
}

impl Receiver {
    /// One that has nothing. `generation` is the last mark that the table may hold.
    pub fn new(generation: u8) -> Self {
        Self {
            connected: false,
            have: None,
            at: None,
            transfer: None,
            transfer_flows: 0,
            generation,
            subscription: 0,
            subscribed: false,
            frames: 0,
            unacknowledged: None,
            retry_at: None,
            digest: None,
            run: 0,
            compared: None,
            outputs: VecDeque::new(),
        }
    }

    /// Takes in what happened. An acknowledgement waits for [`Receiver::handle_timeout`], so that
    /// frames that come together have one.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        match input {
            Input::Connected => {
                self.connected = true;
                self.subscribe();
            }
            Input::Disconnected => {
                self.connected = false;
                self.retry_at = None;
                self.digest = None;
                self.drop_transfer();
            }
            Input::Frame(frame) if self.connected => self.frame(now, frame),
            Input::Frame(_) => {}
            Input::Summed { run, sums } => {
                if let Some(digest) = self.digest.as_mut().filter(|_| run == self.run) {
                    digest.ours = Some(sums);
                    self.compare();
                }
            }
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.retry_at.take_if(|at| *at <= now).is_some() && self.connected {
            self.subscribe();
        }
        if self.unacknowledged.take().is_some() && self.connected {
            self.outputs.push_back(Output::Send(Frame::Ack { frames: self.frames }));
        }
    }

    /// When [`Receiver::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.retry_at.into_iter().chain(self.unacknowledged).min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        match (&self.transfer, self.have, self.connected) {
            (Some(Scope::All), ..) => Standing::Snapshot { flows: self.transfer_flows },
            (_, Some(_), true) if self.retry_at.is_none() => Standing::InSync,
            (_, Some(_), _) => Standing::Stale,
            (_, None, _) => Standing::Nothing,
        }
    }

    /// Where the table stands, if it is whole.
    pub fn position(&self) -> Option<Position> {
        self.have
    }

    /// What the last comparison came to.
    pub fn compared(&self) -> Option<Compared> {
        self.compared
    }

    /// The mark of what is put now; never 0, which is that of flows of this node's own.
    pub fn generation(&self) -> u8 {
        self.generation
    }

    /// Another than the source changed the table (this node was Active): what is there stands for
    /// nothing any more.
    pub fn forget(&mut self) {
        self.have = None;
        self.digest = None;
    }

    fn subscribe(&mut self) {
        self.retry_at = None;
        self.digest = None;
        self.drop_transfer();
        self.subscription += 1;
        self.subscribed = false;
        self.unacknowledged = None;
        let (run, have) = (self.subscription, self.have);
        self.outputs.push_back(Output::Send(Frame::Subscribe { run, have }));
    }

    /// What was on its way does not come any more.
    fn drop_transfer(&mut self) {
        if self.transfer.take() == Some(Scope::All) {
            self.have = None;
        }
        self.at = None;
    }

    fn frame(&mut self, now: Instant, frame: Frame) {
        match frame {
            Frame::Subscribed { run } => {
                if run == self.subscription {
                    self.subscribed = true;
                    self.frames = 0;
                    self.retry_at = None;
                }
                return;
            }
            Frame::NotActive => {
                self.digest = None;
                self.drop_transfer();
                self.retry_at = Some(now + RETRY);
                return;
            }
            _ if !self.subscribed => return,
            Frame::Names(names) => self.outputs.push_back(Output::Names(names)),
            Frame::Delta { first, changes } => self.delta(first, changes),
            Frame::Begin(scope) => self.begin(scope),
            Frame::Slice(flows) => {
                if self.transfer.is_none() {
                    return self.abort("a slice of no transfer");
                }
                self.transfer_flows += flows.len() as u64;
                self.apply(flows.into_iter().map(Change::Put).collect());
            }
            Frame::Affinities(_) if self.transfer.is_none() => {
                return self.abort("affinities of no transfer");
            }
            Frame::Affinities(affinities) => self.outputs.push_back(Output::Keep(affinities)),
            Frame::End { at } => self.end(at),
            Frame::Digest { first, sums } => self.digest(first, sums),
            // Of a receiver.
            Frame::Subscribe { .. } | Frame::Repair(_) | Frame::Compared(_) | Frame::Ack { .. } => {
                return;
            }
        }
        self.frames += 1;
        self.unacknowledged.get_or_insert(now);
    }

    fn delta(&mut self, first: Position, changes: Vec<Change>) {
        let in_snapshot = self.transfer == Some(Scope::All);
        let expected = if in_snapshot { self.at } else { self.have };
        if !in_snapshot && expected.is_none() {
            return self.abort("a delta before any snapshot");
        }
        if expected.is_some_and(|expected| expected != first) {
            return self.abort("a delta that does not follow the one before");
        }
        let then = Position { seq: first.seq + changes.len() as u64, ..first };
        *(if in_snapshot { &mut self.at } else { &mut self.have }) = Some(then);
        self.apply(changes);
    }

    fn apply(&mut self, changes: Vec<Change>) {
        if let Some(digest) = &mut self.digest {
            changes.iter().for_each(|change| digest.touched.insert(change.key().bucket()));
        }
        if !changes.is_empty() {
            self.outputs.push_back(Output::Apply { changes, generation: self.generation });
        }
    }

    fn begin(&mut self, scope: Scope) {
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        self.digest = None;
        self.transfer_flows = 0;
        if scope == Scope::All {
            self.have = None;
            self.at = None;
        }
        self.transfer = Some(scope);
    }

    fn end(&mut self, at: Position) {
        let Some(scope) = self.transfer.take() else {
            return self.abort("the end of no transfer");
        };
        let known = if scope == Scope::All { self.at } else { self.have };
        if known.is_some_and(|known| known != at) {
            return self.abort("a transfer ends elsewhere than its deltas");
        }
        self.have = Some(at);
        self.at = None;
        self.outputs.push_back(Output::Sweep { generation: self.generation, scope });
    }

    fn digest(&mut self, first: u16, sums: Vec<Option<BucketSum>>) {
        if self.transfer.is_some() || self.have.is_none() {
            return;
        }
        let first = usize::from(first);
        if first == 0 {
            self.digest =
                Some(Digest { theirs: Vec::new(), ours: None, touched: BucketSet::empty() });
            self.run += 1;
            self.outputs.push_back(Output::Sum { run: self.run });
        }
        let Some(digest) = &mut self.digest else { return };
        if digest.theirs.len() != first || sums.len() > BUCKETS - first {
            self.digest = None;
            return self.abort("a digest with a gap");
        }
        digest.theirs.extend(sums);
        self.compare();
    }

    /// Once both sums are whole.
    fn compare(&mut self) {
        let done = |digest: &mut Digest| digest.ours.is_some() && digest.theirs.len() == BUCKETS;
        let Some(digest) = self.digest.take_if(done) else { return };
        let ours = digest.ours.expect("looked at above");
        let mut compared = Compared::default();
        let mut different = Vec::new();
        for (bucket, (theirs, ours)) in (0..=u16::MAX).zip(digest.theirs.iter().zip(&ours)) {
            let Some(theirs) = theirs.filter(|_| !digest.touched.contains(bucket)) else {
                continue;
            };
            compared.buckets += 1;
            compared.flows += u64::from(theirs.flows);
            if theirs == *ours {
                compared.kept += u64::from(theirs.flows);
            } else {
                different.push(bucket);
            }
        }
        compared.different = different.len() as u32;
        self.compared = Some(compared);
        self.outputs.push_back(Output::Send(Frame::Compared(compared)));
        if different.len() > MOST_REPAIRED {
            self.have = None;
            self.subscribe();
        } else if !different.is_empty() {
            self.outputs.push_back(Output::Send(Frame::Repair(different)));
        }
    }

    /// What the other end sends makes no sense: nothing that it sent is to be relied on.
    fn abort(&mut self, why: &'static str) {
        self.have = None;
        self.transfer = None;
        self.subscribed = false;
        self.outputs.push_back(Output::Abort(why));
    }
}
