//! The end of the Active node: it has the journal, and sends each peer what it lacks.
//!
//! Pure: [`Source::handle_input`], [`Source::handle_timeout`], [`Source::poll_timeout`],
//! [`Source::poll_output`]. What a slow peer can hold is bounded: [`WINDOW`] frames on their way,
//! and the journal, which forgets what is too old; then that peer is out of sync and begins anew.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::frame::{BucketSum, Compared, Frame, Name, Position, Scope};
use super::journal::Journal;
use super::{Affinity, BATCH, BUCKETS, BucketSet, Change, Flow, WINDOW};
use crate::channel::hello::BootId;

/// How often the tables are compared, unless a test wants it otherwise.
pub const DIGEST_INTERVAL: Duration = Duration::from_secs(2);
/// A walk may take this share of the time at most.
const DIGEST_SHARE: u32 = 20;
/// How soon after a snapshot has begun the next may begin, for the same peer.
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// Sums in one frame, so that it is not longer than a frame may be.
const PIECE: usize = 1024;
/// Frames that may be on their way where more of a digest is sent: it is in no hurry.
const DIGEST_WINDOW: u64 = 4;

/// A peer, by its place in the configuration.
pub type PeerId = usize;

/// What happens.
#[derive(Debug)]
pub enum Input {
    /// This node is Active from now on; the number of that time.
    Active(u64),
    /// It is no longer.
    Passive,
    /// What numbers mean, from now on.
    Names(Vec<Name>),
    /// A flow was established, used, or ended.
    Changed(Change),
    /// Changes were lost; nobody knows which.
    Lost,
    /// There is a session with a peer.
    Connected(PeerId),
    /// There is none any more.
    Disconnected(PeerId),
    /// A peer's frame: of those that a receiver sends.
    Frame(PeerId, Frame),
    /// What [`Output::Walk`] asked for.
    Slice {
        /// For whom.
        peer: PeerId,
        /// As it was asked for.
        run: u64,
        /// Some flows, [`BATCH`] at most.
        flows: Vec<Flow>,
        /// Whether the walk is over.
        last: bool,
    },
    /// What [`Output::WalkAffinities`] asked for.
    Affinities {
        /// For whom.
        peer: PeerId,
        /// As it was asked for.
        run: u64,
        /// Some of them, [`BATCH`] at most.
        affinities: Vec<Affinity>,
        /// Whether the walk is over.
        last: bool,
    },
    /// What [`Output::Sum`] asked for. Every change that came before the end of that walk was given
    /// before this.
    Summed {
        /// As it was asked for.
        run: u64,
        /// A sum for each bucket.
        sums: Box<[BucketSum]>,
    },
}

/// What the source wants done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a frame.
    Send(PeerId, Frame),
    /// Go on with a walk of the table, or begin one; answered by one [`Input::Slice`], sent at once:
    /// changes that come later must come after it.
    Walk {
        /// For whom: each peer has a walk of its own.
        peer: PeerId,
        /// To be handed back: an answer to an older question is none.
        run: u64,
        /// From the beginning.
        anew: bool,
    },
    /// The same of the table of affinities; answered by one [`Input::Affinities`].
    WalkAffinities {
        /// For whom.
        peer: PeerId,
        /// To be handed back.
        run: u64,
        /// From the beginning.
        anew: bool,
    },
    /// Sum the table up; answered by [`Input::Summed`].
    Sum {
        /// To be handed back.
        run: u64,
    },
}

/// How a peer stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// Whether it has everything but for the lag.
    pub in_sync: bool,
    /// Changes that it has not acknowledged.
    pub lag_changes: u64,
    /// How old the oldest of these is.
    pub lag: Duration,
    /// How often it was sent a snapshot.
    pub snapshots: u64,
    /// Flows of the snapshot that is on its way.
    pub snapshot_flows: Option<u64>,
    /// What the last comparison came to.
    pub compared: Option<Compared>,
}

/// The source.
#[derive(Debug)]
pub struct Source {
    boot: BootId,
    digest_interval: Duration,
    epoch: u64,
    active: bool,
    journal: Journal,
    /// Places before this one can't be gone on from: changes were lost then.
    valid_from: u64,
    names: Vec<Name>,
    peers: BTreeMap<PeerId, Peer>,
    digest: Digest,
    /// Of the last question.
    run: u64,
    outputs: VecDeque<Output>,
}

/// What a peer was sent and has acknowledged.
#[derive(Debug)]
struct Peer {
    subscribed: bool,
    in_sync: bool,
    /// Frames.
    sent: u64,
    acked: u64,
    /// Where the journal was after each frame that is on its way.
    on_their_way: VecDeque<u64>,
    /// The next change to send, and the first that is not acknowledged.
    cursor: u64,
    acked_seq: u64,
    /// Names that are still to be sent, from here on.
    names: usize,
    transfer: Option<Transfer>,
    /// The slice that was asked for and has not come.
    walking: Option<u64>,
    snapshots: u64,
    snapshot_at: Option<Instant>,
    /// The next piece of the digest.
    piece: Option<usize>,
    compared: Option<Compared>,
}

/// A snapshot, or a repair.
#[derive(Debug)]
struct Transfer {
    scope: Scope,
    only: Option<BucketSet>,
    /// Not before: snapshots keep a distance.
    not_before: Option<Instant>,
    step: Step,
    flows: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Begin,
    Walk {
        anew: bool,
    },
    Affinities {
        anew: bool,
    },
    End,
    /// Acknowledged when this frame is.
    Ended(u64),
}

#[derive(Debug)]
struct Digest {
    next_at: Option<Instant>,
    /// The walk that is awaited, and since when.
    awaited: Option<(u64, Instant)>,
    sums: Option<Box<[BucketSum]>>,
    /// Buckets that have changed since the walk began.
    touched: BucketSet,
}

impl Source {
    /// A source that is not Active yet, with room for so many changes in its journal.
    /// Tables are compared every `digest_interval`, where a walk is quick.
    pub fn new(boot: BootId, journal: usize, digest_interval: Duration) -> Self {
        Self {
            boot,
            digest_interval,
            epoch: 0,
            active: false,
            journal: Journal::new(journal),
            valid_from: 0,
            names: Vec::new(),
            peers: BTreeMap::new(),
            digest: Digest {
                next_at: None,
                awaited: None,
                sums: None,
                touched: BucketSet::empty(),
            },
            run: 0,
            outputs: VecDeque::new(),
        }
    }

    /// Takes in what happened. Changes wait for [`Source::handle_timeout`], so that those that come
    /// together go together.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        match input {
            Input::Active(epoch) => self.activate(now, epoch),
            Input::Passive => self.passivate(),
            Input::Names(names) => {
                self.names = names;
                self.peers.values_mut().for_each(|peer| peer.names = 0);
            }
            Input::Changed(change) => return self.changed(now, change),
            Input::Lost => self.lost(now),
            Input::Connected(id) => drop(self.peers.insert(id, Peer::new())),
            Input::Disconnected(id) => drop(self.peers.remove(&id)),
            Input::Frame(id, frame) => self.frame(now, id, frame),
            Input::Slice { peer, run, flows, last } => self.slice(peer, run, flows, last),
            Input::Affinities { peer, run, affinities, last } => {
                self.affinities(peer, run, affinities, last);
            }
            Input::Summed { run, sums } => self.summed(now, run, sums),
        }
        self.pump(now);
    }

    /// Does what is due. To be called at [`Source::poll_timeout`] and after changes, and never
    /// harmful before.
    pub fn handle_timeout(&mut self, now: Instant) {
        let wanted = self.peers.values().any(|peer| peer.in_sync);
        if self.active
            && wanted
            && self.digest.awaited.is_none()
            && self.digest.next_at.is_some_and(|at| at <= now)
        {
            self.digest.next_at = None;
            self.run += 1;
            self.digest.awaited = Some((self.run, now));
            self.digest.sums = None;
            self.digest.touched.clear();
            self.peers.values_mut().for_each(|peer| peer.piece = None);
            self.outputs.push_back(Output::Sum { run: self.run });
        }
        self.pump(now);
    }

    /// When [`Source::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.active {
            return None;
        }
        let digest = self.digest.next_at.filter(|_| self.peers.values().any(|peer| peer.in_sync));
        let held = self.peers.values().filter(|peer| peer.sent - peer.acked < WINDOW);
        let transfers = held.filter_map(|peer| {
            peer.transfer.as_ref().filter(|transfer| transfer.step == Step::Begin)?.not_before
        });
        transfers.chain(digest).min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Where the journal is.
    pub fn position(&self) -> Position {
        self.position_of(self.journal.head())
    }

    /// Whether a peer has acknowledged all that there is.
    pub fn is_flushed(&self, id: PeerId) -> bool {
        self.peers.get(&id).is_some_and(|peer| {
            peer.in_sync && peer.acked_seq == self.journal.head() && peer.transfer.is_none()
        })
    }

    /// Changes that the slowest peer was not sent yet.
    pub fn backlog(&self) -> u64 {
        let behind = |peer: &Peer| self.journal.head().saturating_sub(peer.cursor);
        self.peers.values().filter(|peer| peer.subscribed).map(behind).max().unwrap_or(0)
    }

    /// Whether anybody is to be sent changes.
    pub fn has_peers(&self) -> bool {
        self.active && self.peers.values().any(|peer| peer.subscribed)
    }

    /// How a peer stands; `None` without a session with it, or without a subscription.
    pub fn standing(&self, now: Instant, id: PeerId) -> Option<Standing> {
        let peer = self.peers.get(&id).filter(|peer| peer.subscribed)?;
        let oldest = self.journal.time_of(peer.acked_seq);
        Some(Standing {
            in_sync: peer.in_sync,
            lag_changes: self.journal.head() - peer.acked_seq.min(self.journal.head()),
            lag: oldest.map_or(Duration::ZERO, |at| now.saturating_duration_since(at)),
            snapshots: peer.snapshots,
            snapshot_flows: peer.transfer.as_ref().map(|transfer| transfer.flows),
            compared: peer.compared,
        })
    }

    fn position_of(&self, seq: u64) -> Position {
        Position { boot: self.boot, epoch: self.epoch, seq }
    }

    fn activate(&mut self, now: Instant, epoch: u64) {
        self.active = true;
        self.epoch = epoch;
        self.valid_from = self.journal.head();
        self.digest.next_at = Some(now + self.digest_interval);
    }

    fn passivate(&mut self) {
        self.active = false;
        self.digest.next_at = None;
        self.digest.awaited = None;
        self.digest.sums = None;
        for (&id, peer) in &mut self.peers {
            if peer.subscribed {
                *peer = Peer::new();
                self.outputs.push_back(Output::Send(id, Frame::NotActive));
            }
        }
    }

    fn changed(&mut self, now: Instant, change: Change) {
        if !self.active {
            return;
        }
        self.digest.touched.insert(change.key().bucket());
        self.journal.append(now, change);
    }

    fn lost(&mut self, now: Instant) {
        self.valid_from = self.journal.head();
        for peer in self.peers.values_mut().filter(|peer| peer.subscribed) {
            peer.snapshot(now);
        }
    }

    fn frame(&mut self, now: Instant, id: PeerId, frame: Frame) {
        if !self.peers.contains_key(&id) {
            return;
        }
        match frame {
            Frame::Subscribe { run, have } => self.subscribe(now, id, run, have),
            Frame::Ack { frames } => self.acked(id, frames),
            Frame::Repair(buckets) => {
                let peer = self.peers.get_mut(&id).expect("looked for above");
                if peer.subscribed && peer.transfer.is_none() {
                    let only = Some(BucketSet::of(&buckets));
                    peer.transfer = Some(Transfer::new(Scope::Buckets(buckets), only));
                }
            }
            Frame::Compared(compared) => {
                let peer = self.peers.get_mut(&id).expect("looked for above");
                peer.compared = Some(compared);
            }
            // Of a source: two that take themselves for Active. The election's business.
            Frame::NotActive
            | Frame::Subscribed { .. }
            | Frame::Names(_)
            | Frame::Delta { .. }
            | Frame::Begin(_)
            | Frame::Slice(_)
            | Frame::Affinities(_)
            | Frame::End { .. }
            | Frame::Digest { .. } => {}
        }
    }

    fn subscribe(&mut self, now: Instant, id: PeerId, run: u64, have: Option<Position>) {
        if !self.active {
            self.outputs.push_back(Output::Send(id, Frame::NotActive));
            return;
        }
        let (boot, epoch, head) = (self.boot, self.epoch, self.journal.head());
        let known = have.filter(|have| {
            have.boot == boot
                && have.epoch == epoch
                && have.seq >= self.valid_from
                && self.journal.knows(have.seq)
        });
        let peer = self.peers.get_mut(&id).expect("only peers with a session subscribe");
        // Whatever else was on its way concerns an older subscription.
        let (snapshots, at) = (peer.snapshots, peer.snapshot_at);
        *peer = Peer { subscribed: true, snapshots, snapshot_at: at, ..Peer::new() };
        self.outputs.push_back(Output::Send(id, Frame::Subscribed { run }));
        peer.cursor = known.map_or(head, |have| have.seq);
        peer.acked_seq = peer.cursor;
        match known {
            Some(_) => peer.in_sync = true,
            None => peer.snapshot(now),
        }
    }

    fn acked(&mut self, id: PeerId, frames: u64) {
        let peer = self.peers.get_mut(&id).expect("looked for by the caller");
        // Frames that were never sent can't be acknowledged.
        let frames = frames.min(peer.sent);
        while peer.acked < frames {
            peer.acked += 1;
            let seq = peer.on_their_way.pop_front().unwrap_or(peer.acked_seq);
            peer.acked_seq = peer.acked_seq.max(seq);
        }
        if let Some(Transfer { step: Step::Ended(frame), .. }) = peer.transfer
            && peer.acked >= frame
        {
            peer.transfer = None;
            peer.in_sync = true;
        }
    }

    fn slice(&mut self, id: PeerId, run: u64, mut flows: Vec<Flow>, last: bool) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.walking.take_if(|walking| *walking == run).is_none() {
            return;
        }
        let Some(transfer) = &mut peer.transfer else { return };
        // Begun anew while the slice was on its way.
        if transfer.step != (Step::Walk { anew: false }) {
            return;
        }
        if let Some(only) = &transfer.only {
            flows.retain(|flow| only.contains(flow.key.bucket()));
        }
        if last {
            transfer.step = match transfer.scope {
                Scope::All => Step::Affinities { anew: true },
                Scope::Buckets(_) => Step::End,
            };
        }
        if !flows.is_empty() {
            transfer.flows += flows.len() as u64;
            self.outputs.push_back(peer.send(id, peer.cursor, Frame::Slice(flows)));
        }
    }

    fn affinities(&mut self, id: PeerId, run: u64, affinities: Vec<Affinity>, last: bool) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.walking.take_if(|walking| *walking == run).is_none() {
            return;
        }
        let Some(transfer) = &mut peer.transfer else { return };
        if transfer.step != (Step::Affinities { anew: false }) {
            return;
        }
        if last {
            transfer.step = Step::End;
        }
        if !affinities.is_empty() {
            self.outputs.push_back(peer.send(id, peer.cursor, Frame::Affinities(affinities)));
        }
    }

    fn summed(&mut self, now: Instant, run: u64, sums: Box<[BucketSum]>) {
        debug_assert_eq!(sums.len(), BUCKETS, "one sum for each bucket");
        let Some((_, since)) = self.digest.awaited.take_if(|(awaited, _)| *awaited == run) else {
            return;
        };
        let took = now.saturating_duration_since(since);
        self.digest.next_at = Some(now + self.digest_interval.max(took * DIGEST_SHARE));
        self.digest.sums = Some(sums);
        for peer in self.peers.values_mut() {
            peer.piece = (peer.in_sync && peer.transfer.is_none()).then_some(0);
        }
    }

    /// Sends what can be sent.
    fn pump(&mut self, now: Instant) {
        if !self.active {
            return;
        }
        let mut peers = std::mem::take(&mut self.peers);
        for (&id, peer) in peers.iter_mut().filter(|(_, peer)| peer.subscribed) {
            while peer.sent - peer.acked < WINDOW {
                let Some(output) = self.next(now, id, peer) else { break };
                self.outputs.push_back(output);
            }
        }
        self.peers = peers;
    }

    /// What a peer gets next.
    fn next(&mut self, now: Instant, id: PeerId, peer: &mut Peer) -> Option<Output> {
        let head = self.journal.head();
        if peer.names < self.names.len() {
            let names: Vec<_> = self.names.iter().skip(peer.names).take(BATCH).copied().collect();
            peer.names += names.len();
            return Some(peer.send(id, peer.cursor, Frame::Names(names)));
        }
        if !self.journal.knows(peer.cursor) {
            peer.snapshot(now);
        }
        if peer.is_to_begin() {
            // What came before is in the walk that follows.
            let transfer = peer.transfer.as_mut()?;
            if transfer.not_before.is_some_and(|at| at > now) {
                return None;
            }
            transfer.step = Step::Walk { anew: true };
            let scope = transfer.scope.clone();
            if scope == Scope::All {
                peer.snapshots += 1;
                peer.snapshot_at = Some(now);
                peer.cursor = head;
            }
            return Some(peer.send(id, peer.cursor, Frame::Begin(scope)));
        }
        if peer.cursor < head {
            let changes: Vec<_> = self.journal.from(peer.cursor, BATCH)?.collect();
            let first = self.position_of(peer.cursor);
            peer.cursor += changes.len() as u64;
            return Some(peer.send(id, peer.cursor, Frame::Delta { first, changes }));
        }
        match peer.transfer.as_mut().map(|transfer| &mut transfer.step) {
            Some(Step::Walk { anew }) if peer.walking.is_none() => {
                self.run += 1;
                let output = Output::Walk { peer: id, run: self.run, anew: *anew };
                *anew = false;
                peer.walking = Some(self.run);
                Some(output)
            }
            Some(Step::Affinities { anew }) if peer.walking.is_none() => {
                self.run += 1;
                let output = Output::WalkAffinities { peer: id, run: self.run, anew: *anew };
                *anew = false;
                peer.walking = Some(self.run);
                Some(output)
            }
            Some(step @ Step::End) => {
                *step = Step::Ended(peer.sent + 1);
                let at = self.position_of(peer.cursor);
                Some(peer.send(id, peer.cursor, Frame::End { at }))
            }
            Some(_) => None,
            None => self.next_piece(id, peer),
        }
    }

    fn next_piece(&self, id: PeerId, peer: &mut Peer) -> Option<Output> {
        let piece = peer.piece.filter(|_| peer.sent - peer.acked < DIGEST_WINDOW)?;
        let first = piece * PIECE;
        let sums = self.digest.sums.as_ref()?.get(first..first + PIECE)?;
        peer.piece = Some(piece + 1).filter(|next| next * PIECE < BUCKETS);
        let first = u16::try_from(first).expect("there are 2^16 buckets");
        let sums = (first..=u16::MAX)
            .zip(sums)
            .map(|(bucket, sum)| (!self.digest.touched.contains(bucket)).then_some(*sum))
            .collect();
        Some(peer.send(id, peer.cursor, Frame::Digest { first, sums }))
    }
}

impl Peer {
    fn new() -> Self {
        Self {
            subscribed: false,
            in_sync: false,
            sent: 0,
            acked: 0,
            on_their_way: VecDeque::with_capacity(WINDOW as usize + 1),
            cursor: 0,
            acked_seq: 0,
            names: 0,
            transfer: None,
            walking: None,
            snapshots: 0,
            snapshot_at: None,
            piece: None,
            compared: None,
        }
    }

    /// It is out of sync, and gets everything from the beginning.
    fn snapshot(&mut self, now: Instant) {
        self.in_sync = false;
        self.piece = None;
        let earliest = self.snapshot_at.map(|at| at + SNAPSHOT_INTERVAL).filter(|at| *at > now);
        self.transfer = Some(Transfer { not_before: earliest, ..Transfer::new(Scope::All, None) });
    }

    fn is_to_begin(&self) -> bool {
        self.transfer.as_ref().is_some_and(|transfer| transfer.step == Step::Begin)
    }

    /// Counts a frame that stands for the journal up to `seq`.
    fn send(&mut self, id: PeerId, seq: u64, frame: Frame) -> Output {
        self.sent += 1;
        self.on_their_way.push_back(seq);
        Output::Send(id, frame)
    }
}

impl Transfer {
    fn new(scope: Scope, only: Option<BucketSet>) -> Self {
        Self { scope, only, not_before: None, step: Step::Begin, flows: 0 }
    }
}
