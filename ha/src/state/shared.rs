//! The exchange of settings and views between this node and its peers.
//!
//! Pure: [`Shared::handle_input`], [`Shared::handle_timeout`], [`Shared::poll_timeout`],
//! [`Shared::poll_output`]. What is to be told to a peer is a set of things, not a queue of frames:
//! who changes his mind a hundred times while a peer is slow tells it the last.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::frame::{Frame, SETTINGS, Standing, VIEWS, hash};
use super::settings::{Full, Key, Settings};
use super::{Setting, Target, Value, View};

/// How often a node says where it stands.
pub const TELL: Duration = Duration::from_secs(1);
/// What a peer said is of now for so long after it last said where it stands.
pub const FRESH: Duration = Duration::from_secs(3);
/// Frames that a peer is sent at once, and the pause after them: others use the channel too.
const BURST: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
/// Views that are kept of a peer; more are dropped and counted. As many as a node can have
/// backends.
pub const MOST_VIEWS: usize = 16_384;

/// A peer, by its place in the configuration.
pub type PeerId = usize;

/// What happens.
#[derive(Debug)]
pub enum Input {
    /// There is a session with a peer.
    Connected(PeerId),
    /// There is none any more.
    Disconnected(PeerId),
    /// A peer's frame.
    Frame(PeerId, Frame),
    /// What this node sees and selects by: of all its backends.
    Views(Vec<View>),
    /// Whether this node would take the VIPs if nobody had them.
    StandsBy(bool),
    /// An earlier life of this node knew this.
    Remembered(Vec<Setting>),
}

/// What is to be done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a frame.
    Send(PeerId, Frame),
    /// Settings have changed.
    Settings,
    /// What a peer sees or selects by has.
    Views(PeerId),
}

/// What this node and its peers know.
#[derive(Debug)]
pub struct Shared {
    settings: Settings,
    views: BTreeMap<Target, View>,
    stands_by: bool,
    peers: BTreeMap<PeerId, Peer>,
    dropped_views: u64,
    outputs: VecDeque<Output>,
}

/// A peer with which there is a session.
#[derive(Debug)]
struct Peer {
    /// What it is to be told.
    settings: BTreeSet<Key>,
    views: BTreeSet<Target>,
    /// Whether the next views replace all others.
    anew: bool,
    /// When it is told where this node stands, at the latest; and whether anything was told since.
    tell_at: Instant,
    untold: bool,
    pause: Option<Instant>,
    /// What it has said.
    theirs: BTreeMap<Target, View>,
    /// Whether that is all of it.
    whole: bool,
    stands_by: bool,
    told_at: Option<Instant>,
    /// Since when it and this node have not come to the same.
    differs: Option<Instant>,
}

impl Shared {
    /// Of a node that knows nothing yet.
    pub fn new(node: &str) -> Self {
        Self {
            settings: Settings::new(node),
            views: BTreeMap::new(),
            stands_by: false,
            peers: BTreeMap::new(),
            dropped_views: 0,
            outputs: VecDeque::new(),
        }
    }

    /// Takes in what happened.
    pub fn handle_input(&mut self, now: Instant, input: Input) {
        match input {
            Input::Connected(id) => {
                let mut peer = Peer::new(now);
                peer.tell_everything(&self.settings, &self.views);
                self.peers.insert(id, peer);
            }
            Input::Disconnected(id) => {
                if self.peers.remove(&id).is_some() {
                    self.outputs.push_back(Output::Views(id));
                }
            }
            Input::Frame(id, frame) => self.frame(now, id, frame),
            Input::Views(views) => self.see(views),
            Input::StandsBy(stands_by) => {
                if self.stands_by != stands_by {
                    self.stands_by = stands_by;
                    self.peers.values_mut().for_each(|peer| peer.untold = true);
                }
            }
            Input::Remembered(settings) => self.merge(None, &settings),
        }
        self.pump(now);
    }

    /// An operator sets something here.
    ///
    /// # Errors
    ///
    /// [`Full`].
    pub fn set(&mut self, now: Instant, target: Target, value: Value) -> Result<(), Full> {
        let key = self.settings.set(target, value)?;
        self.news(&[key], None);
        self.pump(now);
        Ok(())
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.pump(now);
    }

    /// When [`Shared::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.peers.values().map(|peer| peer.pause.unwrap_or(peer.tell_at)).min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What operators have set.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What a peer has said of its backends, if that is all of it and of now.
    pub fn views_of(&self, now: Instant, id: PeerId) -> Option<&BTreeMap<Target, View>> {
        let peer = self.peers.get(&id)?;
        let fresh = peer.told_at.is_some_and(|at| now < at + FRESH);
        (peer.whole && fresh).then_some(&peer.theirs)
    }

    /// Whether a peer would take the VIPs if nobody had them, as far as it has said.
    pub fn stands_by(&self, id: PeerId) -> bool {
        self.peers.get(&id).is_some_and(|peer| peer.stands_by)
    }

    /// Whether a peer has come to the same settings as this node.
    pub fn agrees(&self, id: PeerId) -> bool {
        let told = |peer: &&Peer| peer.settings.is_empty() && peer.told_at.is_some();
        self.peers.get(&id).filter(told).is_some_and(|peer| peer.differs.is_none())
    }

    /// Peers with which there is a session.
    pub fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.peers.keys().copied()
    }

    /// Views of peers that found no room.
    pub fn dropped_views(&self) -> u64 {
        self.dropped_views
    }

    fn see(&mut self, views: Vec<View>) {
        let new: BTreeMap<_, _> = views.into_iter().map(|view| (view.target, view)).collect();
        let gone = self.views.keys().any(|target| !new.contains_key(target));
        for peer in self.peers.values_mut() {
            if gone {
                peer.anew = true;
                peer.views = new.keys().copied().collect();
            } else {
                let changed =
                    new.iter().filter(|(target, view)| self.views.get(target) != Some(view));
                peer.views.extend(changed.map(|(target, _)| target));
            }
        }
        self.views = new;
    }

    fn frame(&mut self, now: Instant, id: PeerId, frame: Frame) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        match frame {
            Frame::Settings(settings) => self.merge(Some(id), &settings),
            Frame::Views { anew, views } => {
                if anew {
                    peer.theirs.clear();
                    peer.whole = false;
                }
                for view in views {
                    if peer.theirs.len() >= MOST_VIEWS && !peer.theirs.contains_key(&view.target) {
                        self.dropped_views += 1;
                        continue;
                    }
                    peer.theirs.insert(view.target, view);
                }
                self.outputs.push_back(Output::Views(id));
            }
            Frame::Told(standing) => self.told(now, id, standing),
            Frame::Again => peer.tell_everything(&self.settings, &self.views),
        }
    }

    fn told(&mut self, now: Instant, id: PeerId, standing: Standing) {
        if !self.settings.has_learned() {
            let early = self.settings.learned();
            self.news(&early, None);
        }
        let same = self.settings.sum() == standing.settings;
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.told_at = Some(now);
        peer.stands_by = standing.stands_by;
        peer.whole = sum(&peer.theirs) == standing.views;
        self.outputs.push_back(Output::Views(id));
        if same && peer.whole {
            peer.differs = None;
            return;
        }
        // What has just been set is on its way; what is still amiss a while later is not.
        let since = *peer.differs.get_or_insert(now);
        if now >= since + TELL {
            peer.differs = Some(now);
            peer.settings = self.settings.keys().copied().collect();
            self.outputs.push_back(Output::Send(id, Frame::Again));
        }
    }

    /// A peer's settings, or those of an earlier life of this node.
    fn merge(&mut self, from: Option<PeerId>, settings: &[Setting]) {
        let news: Vec<_> = settings
            .iter()
            .filter(|setting| self.settings.merge(setting))
            .map(Setting::key)
            .collect();
        self.news(&news, from);
    }

    /// These settings are others now: all are told but who said so.
    fn news(&mut self, keys: &[Key], from: Option<PeerId>) {
        if keys.is_empty() {
            return;
        }
        for (id, peer) in &mut self.peers {
            if Some(*id) == from {
                // It hears that this node has come to the same.
                peer.untold = true;
            } else {
                peer.settings.extend(keys);
            }
        }
        self.outputs.push_back(Output::Settings);
    }

    fn pump(&mut self, now: Instant) {
        // Summed up once, and only if somebody is to be told.
        let standing = LazyCell::new(|| Standing {
            settings: self.settings.sum(),
            views: sum(&self.views),
            stands_by: self.stands_by,
        });
        for (&id, peer) in &mut self.peers {
            if peer.pause.is_some_and(|until| now < until) {
                continue;
            }
            peer.pause = None;
            for _ in 0..BURST {
                let Some(frame) = peer.next(&self.settings, &self.views) else { break };
                peer.untold = true;
                self.outputs.push_back(Output::Send(id, frame));
            }
            if !peer.settings.is_empty() || !peer.views.is_empty() || peer.anew {
                peer.pause = Some(now + PAUSE);
            } else if peer.untold || peer.tell_at <= now {
                peer.untold = false;
                peer.tell_at = now + TELL;
                self.outputs.push_back(Output::Send(id, Frame::Told(*standing)));
            }
        }
    }
}

impl Peer {
    fn new(now: Instant) -> Self {
        Self {
            settings: BTreeSet::new(),
            views: BTreeSet::new(),
            anew: true,
            tell_at: now,
            untold: true,
            pause: None,
            theirs: BTreeMap::new(),
            whole: false,
            stands_by: false,
            told_at: None,
            differs: None,
        }
    }

    fn tell_everything(&mut self, settings: &Settings, views: &BTreeMap<Target, View>) {
        self.settings = settings.keys().copied().collect();
        self.views = views.keys().copied().collect();
        self.anew = true;
    }

    /// The next frame of what it is to be told.
    fn next(&mut self, settings: &Settings, views: &BTreeMap<Target, View>) -> Option<Frame> {
        if !self.settings.is_empty() {
            let some = std::iter::from_fn(|| self.settings.pop_first()).take(SETTINGS);
            return Some(Frame::Settings(some.filter_map(|key| settings.setting(&key)).collect()));
        }
        if self.views.is_empty() && !self.anew {
            return None;
        }
        let some = std::iter::from_fn(|| self.views.pop_first()).take(VIEWS);
        let views = some.filter_map(|target| views.get(&target).copied()).collect();
        Some(Frame::Views { anew: std::mem::take(&mut self.anew), views })
    }
}

fn sum(views: &BTreeMap<Target, View>) -> u64 {
    views.values().map(hash).fold(0, u64::wrapping_add)
}
