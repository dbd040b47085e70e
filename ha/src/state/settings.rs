//! What operators have set, as a map that any two nodes can merge: of two settings of the same
//! thing the one with the greater version stays, so every node comes to the same, in whatever order
//! and however often it hears of them.
//!
//! A version is a counter that is greater than any its writer knew of, and the writer's name; no
//! clock. What two operators set on either side of a partition has versions too, and one of them is
//! the greater.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use wincode::{SchemaRead, SchemaWrite};

use super::{Admin, Target};
use crate::channel::hello::LONGEST_NAME;

/// Settings that are kept. An operator's that finds no room is refused, a peer's is dropped and
/// counted; before that, one that says what the file says makes room.
pub const MOST_SETTINGS: usize = 4096;
/// No counter is greater: by one step at a time nobody gets here.
const LAST_COUNT: u64 = 1 << 62;

/// What can be set about a backend. Each kind is a setting of its own.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    SchemaRead,
    SchemaWrite,
)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
#[serde(rename_all = "lowercase")]
pub enum Value {
    /// Whether it is used.
    Admin(Admin),
    /// Its weight, 1–256; `None`: what the file says.
    Weight(Option<u16>),
}

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// [`Value::Admin`].
    Admin,
    /// [`Value::Weight`].
    Weight,
}

/// What a setting is of.
pub type Key = (Target, Kind);

/// How settings of the same thing are ordered: by their fields, the counter first.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, SchemaRead, SchemaWrite,
)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
#[serde(deny_unknown_fields)]
pub struct Version {
    /// One more than any that the writer knew of.
    pub count: u64,
    /// The writer.
    pub node: String,
}

/// A setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, SchemaRead, SchemaWrite)]
#[cfg_attr(test, derive(bincode::Encode, bincode::Decode))]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// Of which backend.
    pub target: Target,
    /// What.
    pub value: Value,
    /// Which of several this is.
    pub version: Version,
}

/// There is no room for one more setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MOST_SETTINGS} backends are drained, disabled or weighted by operators, which is the most: \
     enable some (`baton status` lists them), or write it into the file"
)]
pub struct Full;

/// All of them.
#[derive(Debug, Clone)]
pub struct Settings {
    node: String,
    all: BTreeMap<Key, (Value, Version)>,
    /// The greatest counter that was ever seen.
    count: u64,
    /// Set here before anything was heard of the others: see [`Settings::learned`].
    provisional: BTreeMap<Key, Value>,
    learned: bool,
    /// Settings of peers that found no room, or that nobody can have set.
    dropped: u64,
}

impl Value {
    /// Which kind it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Admin(_) => Kind::Admin,
            Self::Weight(_) => Kind::Weight,
        }
    }

    /// Whether it says what holds without any setting.
    pub fn is_default(&self) -> bool {
        matches!(self, Self::Admin(Admin::Enabled) | Self::Weight(None))
    }

    fn is_sane(&self) -> bool {
        !matches!(self, Self::Weight(Some(weight)) if !(1..=256).contains(weight))
    }
}

impl Setting {
    /// What it is of.
    pub fn key(&self) -> Key {
        (self.target, self.value.kind())
    }

    fn is_sane(&self) -> bool {
        let Version { count, node } = &self.version;
        *count <= LAST_COUNT && (1..=LONGEST_NAME).contains(&node.len()) && self.value.is_sane()
    }
}

impl Settings {
    /// None yet, on the node of this name.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            all: BTreeMap::new(),
            count: 0,
            provisional: BTreeMap::new(),
            learned: false,
            dropped: 0,
        }
    }

    /// An operator sets something here.
    ///
    /// # Errors
    ///
    /// [`Full`].
    pub fn set(&mut self, target: Target, value: Value) -> Result<Key, Full> {
        let key = (target, value.kind());
        if !self.has_room(&key) {
            return Err(Full);
        }
        if !self.learned {
            self.provisional.insert(key, value);
        }
        self.stamp(key, value);
        Ok(key)
    }

    fn stamp(&mut self, key: Key, value: Value) {
        self.count += 1;
        self.all.insert(key, (value, Version { count: self.count, node: self.node.clone() }));
    }

    /// A peer's setting; whether it is news.
    pub fn merge(&mut self, setting: &Setting) -> bool {
        if !setting.is_sane() {
            self.dropped += 1;
            return false;
        }
        let (key, new) = (setting.key(), (&setting.version, &setting.value));
        if self.all.get(&key).is_some_and(|(value, version)| (version, value) >= new) {
            return false;
        }
        if !self.has_room(&key) {
            self.dropped += 1;
            return false;
        }
        self.count = self.count.max(setting.version.count);
        self.all.insert(key, (setting.value, setting.version.clone()));
        true
    }

    /// A peer has told everything: what was set here before counts as set after that. Else what an
    /// operator tells a node that has just been started would be undone by what others knew. What
    /// has a new version now.
    pub fn learned(&mut self) -> Vec<Key> {
        self.learned = true;
        let early: Vec<_> = std::mem::take(&mut self.provisional).into_iter().collect();
        early.iter().for_each(|(key, value)| self.stamp(*key, *value));
        early.into_iter().map(|(key, _)| key).collect()
    }

    /// Whether a peer has told everything that it knows.
    pub fn has_learned(&self) -> bool {
        self.learned
    }

    /// What is set of a thing.
    pub fn find(&self, key: &Key) -> Option<(Value, &Version)> {
        self.all.get(key).map(|(value, version)| (*value, version))
    }

    /// A setting as it is told.
    pub fn setting(&self, key: &Key) -> Option<Setting> {
        let (value, version) = self.all.get(key)?;
        Some(Setting { target: key.0, value: *value, version: version.clone() })
    }

    /// What each is of.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.all.keys()
    }

    /// All of them, in the order of what they are of.
    pub fn each(&self) -> impl Iterator<Item = Setting> {
        self.all.keys().filter_map(|key| self.setting(key))
    }

    /// Settings of peers that found no room, or that nobody can have set.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The same number wherever the same is set.
    pub fn sum(&self) -> u64 {
        sum(self.each())
    }

    /// Whether a setting has room; the oldest one that says nothing makes it.
    fn has_room(&mut self, key: &Key) -> bool {
        if self.all.len() < MOST_SETTINGS || self.all.contains_key(key) {
            return true;
        }
        let idle = self.all.iter().filter(|(_, (value, _))| value.is_default());
        let oldest = idle.min_by_key(|(_, (_, version))| version).map(|(key, _)| *key);
        oldest.is_some_and(|key| self.all.remove(&key).is_some())
    }
}

/// [`Settings::sum`] of these.
pub fn sum(settings: impl IntoIterator<Item = Setting>) -> u64 {
    let one = |setting| super::frame::hash(&setting);
    settings.into_iter().map(one).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn target(n: u16) -> Target {
        Target {
            vip: [10, 77, 0, 100].into(),
            port: 1080,
            protocol: 6,
            backend: [10, 78, 0, 11].into(),
            backend_port: n,
        }
    }

    fn admin(settings: &Settings, n: u16) -> Option<Value> {
        settings.find(&(target(n), Kind::Admin)).map(|(value, _)| value)
    }

    const DRAINED: Value = Value::Admin(Admin::Drained);
    const ENABLED: Value = Value::Admin(Admin::Enabled);

    #[test]
    fn the_later_setting_stays_wherever_two_meet() {
        let (mut one, mut two) = (Settings::new("n1"), Settings::new("n2"));
        let key = one.set(target(1), DRAINED).unwrap();
        assert!(two.merge(&one.setting(&key).unwrap()));
        assert!(!two.merge(&one.setting(&key).unwrap()), "no news");
        // The second knew of the first.
        two.learned();
        two.set(target(1), ENABLED).unwrap();
        assert!(one.merge(&two.setting(&key).unwrap()));
        assert_eq!(admin(&one, 1), Some(ENABLED));
        // Neither knows of the other: one wins, on both.
        one.learned();
        one.set(target(1), DRAINED).unwrap();
        two.set(target(1), Value::Admin(Admin::Disabled)).unwrap();
        let (of_one, of_two) = (one.setting(&key).unwrap(), two.setting(&key).unwrap());
        assert_ne!(one.merge(&of_two), two.merge(&of_one));
        assert_eq!(one.setting(&key), two.setting(&key));
        assert_eq!(one.sum(), two.sum());
    }

    #[test]
    fn kinds_are_settings_of_their_own() {
        let mut one = Settings::new("n1");
        one.set(target(1), DRAINED).unwrap();
        one.set(target(1), Value::Weight(Some(3))).unwrap();
        one.set(target(1), Value::Weight(None)).unwrap();
        assert_eq!(admin(&one, 1), Some(DRAINED));
        assert_eq!(one.each().count(), 2);
    }

    #[test]
    fn what_a_node_is_told_before_it_knows_anything_counts_after_what_it_hears() {
        let mut old = Settings::new("n9");
        for _ in 0..5 {
            old.set(target(1), DRAINED).unwrap();
        }
        let mut fresh = Settings::new("n1");
        let key = fresh.set(target(1), ENABLED).unwrap();
        assert!(fresh.merge(&old.setting(&key).unwrap()));
        assert_eq!(admin(&fresh, 1), Some(DRAINED), "not yet");
        assert_eq!(fresh.learned(), [key]);
        assert_eq!(admin(&fresh, 1), Some(ENABLED));
        assert!(old.merge(&fresh.setting(&key).unwrap()));
        assert_eq!(fresh.learned(), [], "once");
    }

    #[test]
    fn nothing_that_a_peer_sends_grows_or_blocks_it() {
        let mut settings = Settings::new("n1");
        let setting = |count, node: &str, value| Setting {
            target: target(1),
            value,
            version: Version { count, node: node.to_owned() },
        };
        for wrong in [
            setting(u64::MAX, "n2", DRAINED),
            setting(1, "", DRAINED),
            setting(1, &"x".repeat(65), DRAINED),
            setting(1, "n2", Value::Weight(Some(0))),
            setting(1, "n2", Value::Weight(Some(257))),
        ] {
            assert!(!settings.merge(&wrong), "{wrong:?}");
        }
        assert_eq!((settings.dropped(), settings.each().count()), (5, 0));
        // Full of what says something: an operator is refused. What says nothing makes room.
        for n in 0..MOST_SETTINGS as u16 {
            settings.set(target(n), DRAINED).unwrap();
        }
        assert_eq!(settings.set(target(5000), DRAINED), Err(Full));
        let more = Setting { target: target(5000), ..setting(1 << 20, "n2", DRAINED) };
        assert!(!settings.merge(&more));
        settings.set(target(7), ENABLED).unwrap();
        assert!(settings.merge(&more));
        assert_eq!((admin(&settings, 7), settings.each().count()), (None, MOST_SETTINGS));
    }
}
