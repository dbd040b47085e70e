//! The changes of flows in their order, as many as there is room for. What is older is forgotten;
//! who needs it has to begin with a snapshot.

use std::collections::VecDeque;
use std::time::Instant;

use super::flow::Change;

/// The journal.
#[derive(Debug)]
pub struct Journal {
    changes: VecDeque<(Instant, Change)>,
    /// Sequence number of the oldest.
    first: u64,
    capacity: usize,
}

impl Journal {
    /// An empty one with room for so many changes, all of it reserved now.
    pub fn new(capacity: usize) -> Self {
        Self { changes: VecDeque::with_capacity(capacity), first: 0, capacity }
    }

    /// Takes a change in; the oldest makes room.
    pub fn append(&mut self, now: Instant, change: Change) {
        if self.changes.len() == self.capacity {
            self.changes.pop_front();
            self.first += 1;
        }
        self.changes.push_back((now, change));
    }

    /// The number that the next change will have.
    pub fn head(&self) -> u64 {
        self.first + self.changes.len() as u64
    }

    /// Changes from a number on, at most so many; `None` if they are forgotten, or not yet there.
    pub fn from(&self, seq: u64, most: usize) -> Option<impl Iterator<Item = Change>> {
        let skip = self.place(seq)?;
        Some(self.changes.iter().skip(skip).take(most).map(|(_, change)| *change))
    }

    /// Whether changes from this number on are known.
    pub fn knows(&self, seq: u64) -> bool {
        self.place(seq).is_some()
    }

    /// When the change with that number came in.
    pub fn time_of(&self, seq: u64) -> Option<Instant> {
        self.changes.get(self.place(seq)?).map(|(at, _)| *at)
    }

    fn place(&self, seq: u64) -> Option<usize> {
        let place = usize::try_from(seq.checked_sub(self.first)?).ok()?;
        (place <= self.changes.len()).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::FlowKey;

    fn change(port: u16) -> Change {
        Change::End(FlowKey { service: 1, client: [192, 0, 2, 1].into(), port })
    }

    fn ports(journal: &Journal, seq: u64, most: usize) -> Option<Vec<u16>> {
        Some(journal.from(seq, most)?.map(|change| change.key().port).collect())
    }

    #[test]
    fn it_keeps_the_newest_under_their_numbers() {
        let mut journal = Journal::new(3);
        let now = Instant::now();
        assert_eq!((journal.head(), ports(&journal, 0, 9)), (0, Some(vec![])));
        (0..5).for_each(|port| journal.append(now, change(port)));
        assert_eq!(journal.head(), 5);
        assert_eq!(ports(&journal, 2, 9), Some(vec![2, 3, 4]));
        assert_eq!(ports(&journal, 3, 1), Some(vec![3]));
        assert_eq!(ports(&journal, 5, 9), Some(vec![]));
        assert_eq!(ports(&journal, 1, 9), None, "forgotten");
        assert_eq!(ports(&journal, 6, 9), None, "not there yet");
        assert_eq!((journal.time_of(4), journal.time_of(5)), (Some(now), None));
    }
}
