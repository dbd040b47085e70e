//! Schedulers: what share each backend gets, and who moves when one leaves.
//!
//! Where the choice is random, shares are held to Hoeffding's bound: of `n` independent draws, the
//! number that come to a backend is further than `sqrt(n * ln(2 / e) / 2)` from what is expected
//! with probability `e` at most, here one in a thousand million.

use baton::datapath::skeleton::types::{self, backend_state, drop_reason, forward_mode, select_by};
use baton::{maglev, scheduler, turns};

use crate::kernel::{Kernel, UDP};
use crate::packet::Packet;

const VIP: &str = "10.77.0.100:80";

/// Backends of these weights, under ids from 1 on.
fn entries(weights: &[u16]) -> Vec<maglev::Entry> {
    let key = |n| scheduler::backend_key(format!("10.78.0.{n}:80").parse().unwrap());
    let entry = |(id, &weight)| maglev::Entry { id, key: key(id), weight };
    (1..).zip(weights).map(entry).collect()
}

fn kernel(select: select_by, weights: &[u16]) -> Kernel {
    let mut kernel = Kernel::with_room(8192, 8192);
    let addresses: Vec<_> = (1..=weights.len()).map(|n| format!("10.78.0.{n}:80")).collect();
    let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
    let mode = forward_mode::MODE_DSR_L2;
    let ids = kernel.service(1, mode, (VIP, UDP), "10.78.0.100", &addresses);
    for (&id, &weight) in ids.iter().zip(weights) {
        kernel.edit_backend(id, |backend| backend.weight = weight.into());
    }
    kernel.edit_service(1, |service| service.select = select.0 as u8);
    kernel.schedule(select, &entries(weights));
    kernel
}

impl Kernel {
    fn schedule(&self, select: select_by, entries: &[maglev::Entry]) {
        let turns = select == select_by::SELECT_TURN;
        let slots = if turns { turns::round(entries) } else { maglev::table(entries) };
        self.maps.schedules.set(1, &slots).unwrap();
    }

    /// The backend that a client has come to with its first packet.
    fn choice(&self, client: u32) -> u16 {
        self.choice_of(&format!("10.80.{}.{}:4000", client >> 8, client & 0xff))
    }

    fn choice_of(&self, client: &str) -> u16 {
        let packet = Packet::udp(client, VIP);
        self.sent(&packet);
        let key = types::flow_key {
            client: packet.from.ip().into(),
            port: packet.from.port().to_be(),
            service: 1,
        };
        let flow = self.maps.half_flows.find(&key).unwrap();
        flow.or_else(|| self.maps.flows.find(&key).unwrap()).unwrap().backend
    }

    /// How many of `clients` each backend gets.
    fn tally(&self, clients: u32, backends: usize) -> Vec<u32> {
        let mut tally = vec![0; backends];
        for client in 0..clients {
            tally[usize::from(self.choice(client)) - 1] += 1;
        }
        tally
    }
}

fn hold_to_shares(tally: &[u32], weights: &[u16]) {
    let n: u32 = tally.iter().sum();
    let total: u32 = weights.iter().map(|&weight| u32::from(weight)).sum();
    // A slot more or less, which is what a Maglev table's shares are off by.
    let bound = (f64::from(n) * (2e9_f64).ln() / 2.0).sqrt() + f64::from(n) / 65537.0;
    for (&got, &weight) in tally.iter().zip(weights) {
        let due = f64::from(n) * f64::from(weight) / f64::from(total);
        assert!((f64::from(got) - due).abs() <= bound, "{tally:?} of {weights:?}, {bound}");
    }
}

#[test]
fn shares_follow_the_weights() {
    let weights = [1, 2, 5];
    for select in [select_by::SELECT_FLOW, select_by::SELECT_SOURCE, select_by::SELECT_RANDOM] {
        hold_to_shares(&kernel(select, &weights).tally(4000, 3), &weights);
    }
}

#[test]
fn turns_are_exact_and_do_not_burst() {
    let weights = [5, 1, 1];
    let kernel = kernel(select_by::SELECT_TURN, &weights);
    let choices: Vec<u16> = (0..700).map(|client| kernel.choice(client)).collect();
    for (n, round) in choices.chunks(7).enumerate() {
        let count = |id| round.iter().filter(|&&choice| choice == id).count();
        assert_eq!([count(1), count(2), count(3)], [5, 1, 1], "round {n}: {round:?}");
        assert_eq!(round, &choices[..7], "each round is like the first");
    }
    let longest = choices.chunk_by(|one, other| one == other).map(<[u16]>::len).max();
    assert!(longest <= Some(5), "{choices:?}");
    // Those who can't have a flow are passed over, and the others take turns on.
    kernel.set_state(1, backend_state::BACKEND_DRAINED);
    assert!((700..800).all(|client| kernel.choice(client) != 1));
}

/// `n` flows, established and kept.
fn establish(kernel: &Kernel, n: u32) {
    for client in 0..n {
        let packet = Packet::udp(&format!("10.80.{}.{}:4000", client >> 8, client & 0xff), VIP);
        // In DSR the second packet establishes.
        kernel.sent(&packet);
        kernel.sent(&packet);
    }
}

fn live(kernel: &Kernel, backends: u32) -> Vec<u32> {
    let live = |id| kernel.maps.backend_live.find(&id).unwrap().unwrap();
    (1..=backends).map(|id| baton::datapath::live::flows(&live(id))).collect()
}

/// With two choices nobody is more than a few flows above the mean, however many flows there are
/// (Azar and others; Berenbrink and others for many more balls than bins); at random alone, the
/// fullest of ten is some twenty above a mean of two hundred.
#[test]
fn two_choices_keep_backends_level() {
    let kernel = kernel(select_by::SELECT_LEAST, &[1; 10]);
    establish(&kernel, 2000);
    let counts = live(&kernel, 10);
    assert_eq!(counts.iter().sum::<u32>(), 2000);
    assert!(counts.iter().all(|count| count.abs_diff(200) <= 8), "{counts:?}");
}

#[test]
fn two_choices_follow_weights_and_what_is_there() {
    let kernel = kernel(select_by::SELECT_LEAST, &[1, 2, 5]);
    establish(&kernel, 1600);
    let counts = live(&kernel, 3);
    for (count, weight) in counts.iter().zip([1, 2, 5]) {
        assert!((count / weight).abs_diff(200) <= 12, "{counts:?}");
    }
    // One that is full of something else gets nothing until the others have caught up.
    let mut record = kernel.maps.backend_live.find(&3).unwrap().unwrap();
    record.begun += 100_000;
    kernel.maps.backend_live.set(&3, &record).unwrap();
    let choices: Vec<_> = (2000..2100).map(|client| kernel.choice(client)).collect();
    let wrong = choices.iter().filter(|&&choice| choice == 3).count();
    // Six draws of it in a row: (5/8)^6 of the time, 6 of 100; Hoeffding adds 33.
    assert!(wrong <= 39, "{choices:?}");
}

#[test]
fn a_backend_that_leaves_moves_its_own_clients_and_hardly_any_other() {
    for select in [select_by::SELECT_FLOW, select_by::SELECT_SOURCE] {
        let before = kernel(select, &[1; 5]);
        let chose: Vec<u16> = (0..2000).map(|client| before.choice(client)).collect();
        let after = kernel(select, &[1; 5]);
        let mut left = entries(&[1; 5]);
        left.remove(2);
        after.schedule(select, &left);
        let now: Vec<u16> = (0..2000).map(|client| after.choice(client)).collect();
        assert!(!now.contains(&3));
        let moved = chose.iter().zip(&now).filter(|(was, is)| **was != 3 && was != is).count();
        // The same clients and the same table each time: nothing here is random.
        println!("{select:?}: {moved} of 1600 moved without need");
        assert!(moved <= 40, "{moved} moved");
        // Flows that are known stay, whatever becomes of the schedule.
        before.schedule(select, &left);
        for (client, was) in (0..2000).zip(&chose) {
            assert_eq!(before.choice(client), *was);
        }
    }
}

#[test]
fn known_flows_stay_with_every_scheduler() {
    for select in 0..=4 {
        let kernel = kernel(select_by(select), &[1, 1, 1]);
        establish(&kernel, 60);
        let chose: Vec<u16> = (0..60).map(|client| kernel.choice(client)).collect();
        kernel.set_state(1, backend_state::BACKEND_DRAINED);
        kernel.schedule(select_by(select), &entries(&[1, 1, 1])[1..]);
        let now: Vec<u16> = (0..60).map(|client| kernel.choice(client)).collect();
        assert_eq!(chose, now, "{select}");
        assert!((100..160).all(|client| kernel.choice(client) != 1), "{select}");
    }
}

#[test]
fn one_with_room_is_always_found() {
    for select in 0..=4 {
        // 255 of 256 slots belong to one that is full.
        let kernel = kernel(select_by(select), &[255, 1]);
        kernel.edit_backend(1, |backend| backend.max_flows = 1);
        let full = types::live { begun: 1, ..Default::default() };
        kernel.maps.backend_live.set(&1, &full).unwrap();
        assert!((0..50).all(|client| kernel.choice(client) == 2), "{select}");
        kernel.edit_backend(2, |backend| backend.max_flows = 1);
        kernel.maps.backend_live.set(&2, &full).unwrap();
        let refused = || kernel.refused(&Packet::udp("10.81.0.1:4000", VIP));
        assert_eq!(refused(), drop_reason::DROP_BACKEND_FULL, "{select}");
        kernel.set_state(1, backend_state::BACKEND_DRAINED);
        kernel.set_state(2, backend_state::BACKEND_DOWN);
        assert_eq!(refused(), drop_reason::DROP_NO_BACKEND, "{select}");
    }
}

#[test]
fn a_client_with_affinity_keeps_to_its_backend_for_its_time() {
    for select in 0..=4 {
        let kernel = kernel(select_by(select), &[1; 8]);
        kernel.edit_service(1, |service| service.affinity = 1000);
        let flow = |port: u16| kernel.choice_of(&format!("10.80.0.1:{port}"));
        // Flows that begin together, none of them established yet.
        let first = flow(4000);
        assert!((4001..4020).all(|port| flow(port) == first), "{select}");
        // Established, and half-open clients forgotten: it still does.
        flow(4000);
        for (key, _) in kernel.maps.half_affinities.slices(64).unwrap().collect::<Vec<_>>() {
            kernel.maps.half_affinities.remove(&key).unwrap();
        }
        assert!((4020..4040).all(|port| flow(port) == first), "{select}");
        // Other clients go their own ways: 40 to one of eight has a chance of 8^-39.
        assert!((100..140).any(|client| kernel.choice(client) != first), "{select}");

        // When its time is over, the scheduler decides.
        for table in [&kernel.maps.affinities, &kernel.maps.half_affinities] {
            for (key, mut affinity) in table.slices(64).unwrap().collect::<Vec<_>>() {
                affinity.since = affinity.since.wrapping_sub(1001);
                // Of a backend that would be kept to by what begins now.
                table.set(&key, &affinity).unwrap();
            }
        }
        kernel.set_state(first, backend_state::BACKEND_DRAINED);
        let second = flow(5000);
        assert_ne!(second, first, "{select}");
        // Established there: when the first is back, the client stays where it is.
        flow(5000);
        kernel.set_state(first, backend_state::BACKEND_UP);
        assert!((5001..5020).all(|port| flow(port) == second), "{select}");
    }
}

#[test]
fn affinity_ends_after_its_time() {
    let kernel = kernel(select_by::SELECT_TURN, &[1, 1]);
    kernel.edit_service(1, |service| service.affinity = 1000);
    let flow = |port: u16| kernel.choice_of(&format!("10.80.0.1:{port}"));
    let first = flow(4000);
    let age = |jiffies: u32| {
        let now = kernel.jiffies() as u32;
        for (key, mut affinity) in
            kernel.maps.half_affinities.slices(64).unwrap().collect::<Vec<_>>()
        {
            affinity.since = now.wrapping_sub(jiffies);
            kernel.maps.half_affinities.set(&key, &affinity).unwrap();
        }
    };
    age(500);
    assert_eq!(flow(4001), first);
    // It goes on from the last flow, not from the first.
    age(1001);
    assert_ne!(flow(4002), first, "the other one's turn");
}
