//! Source and receivers in a world that goes wrong, by seed: changes, slow links, sessions that
//! end, receivers that restart with or without their tables, lost events, tables that change
//! without anybody's doing. Whatever happened, once it is quiet the tables are the same, and both
//! ends know it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::frame::{BucketSum, Frame, Name, Scope};
use super::receiver::{self, Receiver};
use super::source::{self, Source};
use super::{Affinity, BATCH, BUCKETS, BucketSet, Change, Flow, FlowKey};
use crate::channel::hello::BootId;

/// A small generator (xorshift64*), so that a seed is all there is to a run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn flow(n: u64, backend: u16) -> Flow {
    let client = std::net::Ipv4Addr::from_bits(0xc000_0200 + (n as u32 & 0xff)).into();
    let key = FlowKey { service: 1, client, port: (n >> 8) as u16 };
    Flow { key, backend, nat_port: 7, flags: 0, reply_flags: 0, idle_ms: 0, age_s: 0 }
}

/// What the source's clients keep to; told apart by their ages.
const AFFINITIES: u32 = 900;

fn affinity(n: u32) -> Affinity {
    Affinity { service: 1, client: [192, 0, 2, 7].into(), backend: 1, age_ms: n }
}

fn identity(flow: &Flow) -> u64 {
    u64::from(flow.key.bucket()) * 0x9e37_79b9
        + u64::from(flow.key.port) * 31
        + u64::from(flow.backend)
}

fn sums<'a>(flows: impl Iterator<Item = &'a Flow>) -> Box<[BucketSum]> {
    let mut sums = vec![BucketSum::default(); BUCKETS].into_boxed_slice();
    for flow in flows {
        let sum = &mut sums[usize::from(flow.key.bucket())];
        sum.flows += 1;
        sum.sum = sum.sum.wrapping_add(identity(flow));
    }
    sums
}

/// A link in one direction.
#[derive(Default)]
struct Link(VecDeque<(Instant, Frame)>);

struct Backup {
    receiver: Receiver,
    table: BTreeMap<FlowKey, (Flow, u8)>,
    /// The last mark, as the kernel would keep it.
    mark: u8,
    connected: bool,
    to: Link,
    from: Link,
    /// A walk under way: first part of the sums, and when the rest is done.
    sum: Option<(u64, Instant, Box<[BucketSum]>)>,
    /// What a walk of the source for it goes on from.
    cursor: Option<FlowKey>,
    /// The same of affinities; and those that it has heard of.
    kept_from: u32,
    kept: BTreeSet<u32>,
}

struct World {
    now: Instant,
    random: Random,
    source: Source,
    table: BTreeMap<FlowKey, Flow>,
    /// Events that the source has not read yet.
    ring: VecDeque<Change>,
    ring_size: usize,
    lost: bool,
    sum: Option<(u64, Instant, Box<[BucketSum]>)>,
    backups: Vec<Backup>,
    epoch: u64,
    /// Whether tables change without anybody's doing. Where they don't, no comparison may ever
    /// find a difference: it would be one that replication made.
    corrupts: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let now = Instant::now();
        let journal = 16 + random.below(400) as usize;
        let ring_size = 8 + random.below(200) as usize;
        let mut source = Source::new(BootId([1; 16]), journal, Duration::from_millis(150));
        source.handle_input(now, source::Input::Active(1));
        let service =
            Name::Service { number: 1, vip: [192, 0, 2, 1].into(), port: 1080, protocol: 6 };
        source.handle_input(now, source::Input::Names(vec![service]));
        let backups = (0..1 + random.below(3)).map(|_| Backup::new()).collect();
        Self {
            now,
            random,
            source,
            table: BTreeMap::new(),
            ring: VecDeque::new(),
            ring_size,
            lost: false,
            sum: None,
            backups,
            epoch: 1,
            corrupts: seed % 2 == 1,
        }
    }

    /// What packets do to the source's table.
    fn traffic(&mut self) {
        for _ in 0..self.random.below(20) {
            let flow = flow(self.random.below(600), self.random.below(3) as u16);
            let change = match self.table.remove(&flow.key) {
                Some(_) => Change::End(flow.key),
                None => {
                    self.table.insert(flow.key, flow);
                    Change::Put(flow)
                }
            };
            if self.ring.len() < self.ring_size {
                self.ring.push_back(change);
            } else {
                self.lost = true;
            }
        }
    }

    /// The daemon of the source reads events.
    fn drain(&mut self) {
        while let Some(change) = self.ring.pop_front() {
            self.feed(source::Input::Changed(change));
        }
        if std::mem::take(&mut self.lost) {
            self.feed(source::Input::Lost);
        }
    }

    fn feed(&mut self, input: source::Input) {
        self.source.handle_input(self.now, input);
        self.carry_out();
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.source.poll_output() {
            match output {
                source::Output::Send(peer, frame) => {
                    let delay = Duration::from_micros(200 + self.random.below(3000));
                    self.backups[peer].to.push(self.now + delay, frame);
                }
                source::Output::Walk { peer, run, anew } => {
                    // The table may be ahead of the events that were read.
                    if self.random.one_in(3) {
                        self.traffic();
                    }
                    let cursor = &mut self.backups[peer].cursor;
                    if anew {
                        *cursor = None;
                    }
                    let most = 1 + self.random.below(BATCH as u64) as usize;
                    let rest = self.table.iter();
                    let rest: Vec<Flow> = rest
                        .filter(|(key, _)| cursor.is_none_or(|cursor| **key > cursor))
                        .map(|(_, flow)| *flow)
                        .take(most + 1)
                        .collect();
                    let last = rest.len() <= most;
                    let flows: Vec<_> = rest.into_iter().take(most).collect();
                    *cursor = flows.last().map(|flow| flow.key).or(*cursor);
                    self.source
                        .handle_input(self.now, source::Input::Slice { peer, run, flows, last });
                }
                source::Output::WalkAffinities { peer, run, anew } => {
                    let from = if anew { 0 } else { self.backups[peer].kept_from };
                    let most = (from + 1 + self.random.below(BATCH as u64) as u32).min(AFFINITIES);
                    self.backups[peer].kept_from = most;
                    let affinities = (from..most).map(affinity).collect();
                    let last = most == AFFINITIES;
                    let input = source::Input::Affinities { peer, run, affinities, last };
                    self.source.handle_input(self.now, input);
                }
                source::Output::Sum { run } => {
                    let half = sums(self.table.values());
                    let takes = Duration::from_millis(1 + self.random.below(30));
                    self.sum = Some((run, self.now + takes, half));
                }
            }
        }
    }

    /// One step of 1 ms.
    fn step(&mut self, busy: bool) {
        self.now += Duration::from_millis(1);
        if busy {
            if self.random.one_in(3) {
                self.traffic();
            }
            self.faults();
        }
        if self.random.one_in(2) {
            self.drain();
        }
        if let Some((run, _, half)) = self.sum.take_if(|(_, at, _)| *at <= self.now) {
            let mixed = self.mixed(&half, true, 0);
            // Contract: what changed before the walk's end is known before its result.
            self.drain();
            self.feed(source::Input::Summed { run, sums: mixed });
        }
        self.source.handle_timeout(self.now);
        self.carry_out();
        for peer in 0..self.backups.len() {
            self.step_backup(peer);
        }
    }

    /// A walk sees some buckets as they were at its start, others as they are at its end.
    fn mixed(&mut self, half: &[BucketSum], source: bool, peer: usize) -> Box<[BucketSum]> {
        let other = if source {
            sums(self.table.values())
        } else {
            sums(self.backups[peer].table.values().map(|(flow, _)| flow))
        };
        let early: Vec<bool> = (0..64).map(|_| self.random.one_in(2)).collect();
        let pick = |(bucket, (half, other)): (usize, (&BucketSum, &BucketSum))| {
            if early[bucket % 64] { *half } else { *other }
        };
        half.iter().zip(&other).enumerate().map(pick).collect()
    }

    fn faults(&mut self) {
        let peer = self.random.below(self.backups.len() as u64) as usize;
        if self.random.one_in(150) {
            let connected = self.backups[peer].connected;
            self.set_connected(peer, !connected);
        }
        if self.random.one_in(700) {
            // The daemon restarts; its table outlives it, or not.
            self.set_connected(peer, false);
            let backup = &mut self.backups[peer];
            backup.receiver = Receiver::new(backup.mark);
            backup.sum = None;
            if self.random.one_in(2) {
                backup.table.clear();
            }
        }
        if self.random.one_in(900) {
            // The source is Backup for a while: others change its table, and no event says so.
            self.drain();
            self.feed(source::Input::Passive);
            for _ in 0..self.random.below(50) {
                let flow = flow(self.random.below(600), self.random.below(3) as u16);
                if self.table.remove(&flow.key).is_none() {
                    self.table.insert(flow.key, flow);
                }
            }
            self.sum = None;
            self.epoch += 1;
            self.feed(source::Input::Active(self.epoch));
        }
        if self.random.one_in(400) && self.backups[peer].connected {
            // It followed another for a moment; the session stays, with what is on its way.
            self.receive(peer, receiver::Input::Disconnected);
            if self.random.one_in(2) {
                self.backups[peer].receiver.forget();
            }
            self.receive(peer, receiver::Input::Connected);
        }
        if self.corrupts && self.random.one_in(500) {
            // Somebody, or something, changes the table.
            let stray = flow(self.random.below(600), 9);
            let backup = &mut self.backups[peer];
            match backup.table.pop_first() {
                Some(_) if self.random.one_in(2) => {}
                _ => drop(backup.table.insert(stray.key, (stray, backup.mark))),
            }
        }
    }

    fn set_connected(&mut self, peer: usize, connected: bool) {
        if self.backups[peer].connected == connected {
            return;
        }
        let backup = &mut self.backups[peer];
        backup.connected = connected;
        backup.to.0.clear();
        backup.from.0.clear();
        if connected {
            self.feed(source::Input::Connected(peer));
            self.receive(peer, receiver::Input::Connected);
        } else {
            self.feed(source::Input::Disconnected(peer));
            self.receive(peer, receiver::Input::Disconnected);
        }
    }

    fn step_backup(&mut self, peer: usize) {
        while let Some(frame) = self.backups[peer].to.pop(self.now) {
            self.receive(peer, receiver::Input::Frame(frame));
        }
        while let Some(frame) = self.backups[peer].from.pop(self.now) {
            if let Frame::Compared(compared) = &frame
                && !self.corrupts
            {
                assert_eq!(compared.different, 0, "nothing was changed behind its back");
            }
            self.feed(source::Input::Frame(peer, frame));
        }
        let now = self.now;
        if let Some((run, _, half)) = self.backups[peer].sum.take_if(|(_, at, _)| *at <= now) {
            let mixed = self.mixed(&half, false, peer);
            self.receive(peer, receiver::Input::Summed { run, sums: mixed });
        }
        self.backups[peer].receiver.handle_timeout(self.now);
        self.obey(peer);
    }

    fn receive(&mut self, peer: usize, input: receiver::Input) {
        self.backups[peer].receiver.handle_input(self.now, input);
        self.obey(peer);
    }

    fn obey(&mut self, peer: usize) {
        while let Some(output) = self.backups[peer].receiver.poll_output() {
            let delay = Duration::from_micros(200 + self.random.below(3000));
            let takes = Duration::from_millis(1 + self.random.below(30));
            let backup = &mut self.backups[peer];
            match output {
                receiver::Output::Send(frame) => backup.from.push(self.now + delay, frame),
                receiver::Output::Names(names) => assert_eq!(names.len(), 1),
                receiver::Output::Apply { changes, generation } => {
                    backup.mark = generation;
                    for change in changes {
                        match change {
                            Change::Put(flow) => {
                                backup.table.insert(flow.key, (flow, generation));
                            }
                            Change::End(key) => drop(backup.table.remove(&key)),
                        }
                    }
                }
                receiver::Output::Keep(affinities) => {
                    backup.kept.extend(affinities.iter().map(|affinity| affinity.age_ms));
                }
                receiver::Output::Sweep { generation, scope } => {
                    backup.mark = generation;
                    let among = match &scope {
                        Scope::All => None,
                        Scope::Buckets(buckets) => Some(BucketSet::of(buckets)),
                    };
                    backup.table.retain(|key, (_, mark)| {
                        *mark == generation
                            || among.as_ref().is_some_and(|among| !among.contains(key.bucket()))
                    });
                }
                receiver::Output::Sum { run } => {
                    let half = sums(backup.table.values().map(|(flow, _)| flow));
                    backup.sum = Some((run, self.now + takes, half));
                }
                receiver::Output::Abort(why) => panic!("a session was ended: {why}"),
            }
        }
    }

    fn differences(&self, peer: usize) -> usize {
        let theirs: BTreeMap<_, _> =
            self.backups[peer].table.iter().map(|(key, (flow, _))| (*key, flow.backend)).collect();
        let ours: BTreeMap<_, _> =
            self.table.iter().map(|(key, flow)| (*key, flow.backend)).collect();
        let missing = ours.iter().filter(|(key, backend)| theirs.get(key) != Some(backend)).count();
        missing + theirs.keys().filter(|key| !ours.contains_key(key)).count()
    }
}

impl Backup {
    fn new() -> Self {
        Self {
            receiver: Receiver::new(0),
            table: BTreeMap::new(),
            mark: 0,
            connected: false,
            to: Link::default(),
            from: Link::default(),
            sum: None,
            cursor: None,
            kept_from: 0,
            kept: BTreeSet::new(),
        }
    }
}

impl Link {
    /// In order, as TCP does it.
    fn push(&mut self, at: Instant, frame: Frame) {
        let at = self.0.back().map_or(at, |(last, _)| at.max(*last));
        self.0.push_back((at, frame));
    }

    fn pop(&mut self, now: Instant) -> Option<Frame> {
        self.0.pop_front_if(|(at, _)| *at <= now).map(|(_, frame)| frame)
    }
}

#[test]
fn whatever_happens_the_tables_are_the_same_once_it_is_quiet() {
    let seeds = std::env::var("BATON_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    for seed in 0..seeds.unwrap_or(12) {
        let mut world = World::new(seed);
        (0..world.backups.len()).for_each(|peer| world.set_connected(peer, true));
        for _ in 0..3000 {
            world.step(true);
        }
        (0..world.backups.len()).for_each(|peer| world.set_connected(peer, true));
        // A snapshot, a digest, a repair, and another digest.
        for _ in 0..4_000 {
            world.step(false);
        }
        for peer in 0..world.backups.len() {
            let standing = world.backups[peer].receiver.standing();
            assert_eq!(standing, receiver::Standing::InSync, "seed {seed}, peer {peer}");
            assert_eq!(world.differences(peer), 0, "seed {seed}, peer {peer}");
            assert!(world.backups[peer].kept.iter().copied().eq(0..AFFINITIES), "seed {seed}");
            let seen = world.source.standing(world.now, peer).unwrap();
            assert!(seen.in_sync && seen.lag_changes == 0, "seed {seed}: {seen:?}");
            let compared = seen.compared.unwrap();
            assert_eq!((compared.different, compared.kept), (0, compared.flows), "seed {seed}");
            assert_eq!(compared.flows, world.table.len() as u64, "seed {seed}");
        }
    }
}
