//! Which view of the backends a node selects by: its own, or that of the Active before it.
//!
//! * The Active selects by what its own checks say. What others see changes nothing about that, so
//!   a Backup that can't reach the backends does no harm.
//! * A Backup selects nothing yet, but holds what the Active selects by, as long as the Active says
//!   so and for a while after it has fallen silent. So at its takeover the tables are those of the
//!   Active before it: no connection goes to a backend that was known to be down, and nobody is
//!   moved to another. But not of a service of which the Active sees every backend down: nothing
//!   can go on there, and it may be the Active that sees wrong, and gives way for that.
//! * After the takeover that lasts, backend by backend, until the node's own checks have had their
//!   say: they say the same, or as many probes have ended since then as it takes to turn a verdict
//!   round (the greater of rise and fall). From then on its own verdict is one of this node as
//!   Active, whatever it was before.
//!
//! Pure, like everything here; it is asked for each backend, and holds what it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::{Health, Target, View};

/// What this node's own checks say of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    /// Their verdict.
    pub sees: Health,
    /// Probes that have ended with a result, ever.
    pub probes: u64,
    /// Results in a row that turn any verdict round; 0: nothing checks it.
    pub say: u32,
}

/// The view that selects.
#[derive(Debug)]
pub struct Selection {
    keep: Duration,
    /// What the Active selects by, and when it last said so.
    held: BTreeMap<Target, Health>,
    held_at: Option<Instant>,
    /// As Active: what was held at the takeover, and the probes that had ended by then; `None`: on
    /// a Backup.
    inherited: Option<BTreeMap<Target, (Health, u64)>>,
}

impl Selection {
    /// On a Backup that has heard of nobody. What the Active said is held for so long after it has
    /// fallen silent: longer than a takeover takes.
    pub fn new(keep: Duration) -> Self {
        Self { keep, held: BTreeMap::new(), held_at: None, inherited: None }
    }

    /// The Active says what it selects by: all of it.
    pub fn hold(&mut self, now: Instant, views: &BTreeMap<Target, View>) {
        if self.inherited.is_none() {
            let service = |target: &Target| (target.service(), target.protocol);
            let usable = views.values().filter(|view| view.selects != Health::Down);
            let served: BTreeSet<_> = usable.map(|view| service(&view.target)).collect();
            let held = views.values().filter(|view| served.contains(&service(&view.target)));
            self.held = held.map(|view| (view.target, view.selects)).collect();
            self.held_at = Some(now);
        }
    }

    /// This node is Active from now on, with these backends.
    pub fn activate(&mut self, now: Instant, own: impl Iterator<Item = (Target, Own)>) {
        if self.inherited.is_none() {
            let inherited = own.filter_map(|(target, own)| {
                Some((target, (self.held_for(now, &target)?, own.probes)))
            });
            self.inherited = Some(inherited.collect());
            self.held.clear();
            self.held_at = None;
        }
    }

    /// It no longer is.
    pub fn resign(&mut self) {
        self.inherited = None;
    }

    /// What selects instead of this node's own checks; `None`: they do.
    pub fn lead(&mut self, now: Instant, target: &Target, own: Own) -> Option<Health> {
        if own.say == 0 {
            return None;
        }
        let Some(inherited) = &mut self.inherited else { return self.held_for(now, target) };
        let (health, before) = inherited.get_mut(target)?;
        // Its checks have begun anew, with another configuration.
        *before = (*before).min(own.probes);
        if own.sees == *health || own.probes - *before >= u64::from(own.say) {
            inherited.remove(target);
            return None;
        }
        Some(*health)
    }

    /// How many backends are selected by what was said before the takeover.
    pub fn inherited(&self) -> usize {
        self.inherited.as_ref().map_or(0, BTreeMap::len)
    }

    fn held_for(&self, now: Instant, target: &Target) -> Option<Health> {
        self.held_at.filter(|at| now < *at + self.keep)?;
        self.held.get(target).copied().filter(|health| *health != Health::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Health::{Down, Unknown, Up};

    const KEEP: Duration = Duration::from_secs(10);

    fn target(n: u8) -> Target {
        Target::new(
            "10.77.0.100:80".parse().unwrap(),
            6,
            std::net::SocketAddr::from(([10, 78, 0, n], 80)),
        )
    }

    fn said(healths: &[Health]) -> BTreeMap<Target, View> {
        let view = |(n, &selects): (usize, &Health)| {
            let target = target(n as u8);
            (target, View { target, sees: Up, selects })
        };
        healths.iter().enumerate().map(view).collect()
    }

    fn own(sees: Health, probes: u64) -> Own {
        Own { sees, probes, say: 3 }
    }

    #[test]
    fn a_backup_holds_what_the_active_selects_by() {
        let now = Instant::now();
        let mut selection = Selection::new(KEEP);
        assert_eq!(selection.lead(now, &target(0), own(Up, 9)), None, "nobody has said anything");
        selection.hold(now, &said(&[Down, Unknown]));
        let late = now + KEEP - Duration::from_millis(1);
        assert_eq!(selection.lead(late, &target(0), own(Up, 9)), Some(Down));
        assert_eq!(selection.lead(late, &target(1), own(Up, 9)), None, "the Active does not know");
        assert_eq!(selection.lead(late, &target(2), own(Up, 9)), None, "it is not in its file");
        assert_eq!(selection.lead(now + KEEP, &target(0), own(Up, 9)), None, "long ago");
        assert_eq!(
            selection.lead(now, &target(0), Own { say: 0, ..own(Up, 0) }),
            None,
            "unchecked"
        );
    }

    #[test]
    fn after_a_takeover_it_lasts_until_own_probes_have_had_their_say() {
        // What was said, what this node sees before and after so many probes → what leads then.
        for (held, sees, after, expected) in [
            (Down, Up, 0, Some(Down)),
            (Down, Up, 2, Some(Down)),
            (Down, Up, 3, None),
            (Down, Down, 0, None),
            (Up, Down, 2, Some(Up)),
            (Up, Down, 3, None),
            (Up, Unknown, 0, Some(Up)),
            (Unknown, Down, 0, None),
        ] {
            let now = Instant::now();
            let mut selection = Selection::new(KEEP);
            selection.hold(now, &said(&[held, Up]));
            selection.activate(now, [(target(0), own(sees, 40))].into_iter());
            // However long it takes.
            let late = now + KEEP * 100;
            let lead = selection.lead(late, &target(0), own(sees, 40 + after));
            assert_eq!(lead, expected, "{held} {sees} {after}");
            assert_eq!(selection.inherited(), usize::from(expected.is_some()), "{held} {sees}");
        }
    }

    #[test]
    fn an_active_that_sees_no_backend_of_a_service_leads_nobody_there() {
        let now = Instant::now();
        let mut selection = Selection::new(KEEP);
        let mut views = said(&[Down, Down]);
        let other = Target { port: 81, ..target(0) };
        views.insert(other, View { target: other, sees: Up, selects: Up });
        selection.hold(now, &views);
        assert_eq!(selection.lead(now, &target(0), own(Up, 9)), None);
        assert_eq!(selection.lead(now, &other, own(Down, 9)), Some(Up), "another service");
        selection.activate(now, [(target(0), own(Up, 9)), (target(1), own(Down, 9))].into_iter());
        assert_eq!(selection.inherited(), 0);
        assert_eq!(selection.lead(now, &target(0), own(Up, 9)), None);
    }

    #[test]
    fn once_agreed_it_does_not_come_back() {
        let now = Instant::now();
        let mut selection = Selection::new(KEEP);
        selection.hold(now, &said(&[Up]));
        selection.activate(now, [(target(0), own(Up, 4))].into_iter());
        assert_eq!(selection.lead(now, &target(0), own(Up, 4)), None);
        assert_eq!(selection.lead(now, &target(0), own(Down, 5)), None, "its own view selects");
    }

    #[test]
    fn nobody_changes_what_an_active_selects_by() {
        let now = Instant::now();
        let mut selection = Selection::new(KEEP);
        selection.activate(now, [(target(0), own(Up, 4))].into_iter());
        selection.hold(now, &said(&[Down]));
        assert_eq!(selection.lead(now, &target(0), own(Up, 4)), None);
        selection.resign();
        assert_eq!(selection.lead(now, &target(0), own(Up, 4)), None, "held by nobody");
        selection.hold(now, &said(&[Down, Up]));
        assert_eq!(selection.lead(now, &target(0), own(Up, 4)), Some(Down));
    }

    #[test]
    fn checks_that_begin_anew_have_their_say_too() {
        let now = Instant::now();
        let mut selection = Selection::new(KEEP);
        selection.hold(now, &said(&[Down, Up]));
        selection.activate(now, [(target(0), own(Up, 40))].into_iter());
        assert_eq!(selection.lead(now, &target(0), own(Up, 1)), Some(Down));
        assert_eq!(selection.lead(now, &target(0), own(Up, 4)), None);
    }
}
