//! The truth table of docs/failover.md, held against two nodes in virtual time.
//!
//! Every combination of what can be lost is tried; the first row that matches it says who is
//! Active once that has settled. Whatever the row: two nodes never have the VIPs together while a
//! word of one can reach the other, but for the moment that [`bound`] allows.
//!
//! `BATON_TRUTH="ok ok lost lost ok ok ok ok" cargo test -p baton-ha --test truth_table -- --nocapture`
//! shows what happens in the combinations of one situation.

mod pair;
mod situation;
mod table;

use std::collections::BTreeMap;
use std::time::Duration;

use pair::{Pair, Setup};
use situation::{Combination, Situation};
use table::Row;

/// Before a fault, long enough for an Active that is settled.
const BEFORE: Duration = Duration::from_secs(2);
/// After a fault, until everything is decided.
const SETTLING: Duration = Duration::from_secs(5);
/// And then nothing changes.
const QUIET: Duration = Duration::from_secs(1);

/// Node `a` is Active before the fault: by its priority, or because it was first.
const SETUPS: [Setup; 4] = [
    Setup { interval_cs: 10, priorities: [200, 100], preempt: true, heartbeat_ms: 100 },
    Setup { interval_cs: 10, priorities: [100, 200], preempt: false, heartbeat_ms: 100 },
    Setup { interval_cs: 1, priorities: [200, 100], preempt: true, heartbeat_ms: 100 },
    Setup { interval_cs: 10, priorities: [100, 200], preempt: false, heartbeat_ms: 2 },
];

fn rows() -> Vec<Row> {
    table::parse(include_str!("../../../docs/failover.md"))
}

#[test]
fn every_combination_has_a_row_and_every_row_a_combination() {
    let rows = rows();
    let mut matched = vec![0; rows.len()];
    assert_eq!(Combination::all().count(), 612, "docs/failover.md names the number");
    for combination in Combination::all() {
        let situation = combination.situation();
        let row = table::row_of(&rows, &situation);
        matched[row.unwrap_or_else(|| panic!("no row for {situation}"))] += 1;
    }
    for (row, matched) in rows.iter().zip(matched) {
        assert!(matched > 0, "nothing matches this row that rows above do not: {row:?}");
    }
}

#[test]
fn the_table_tells_what_happens() {
    let rows = rows();
    let only = std::env::var("BATON_TRUTH").ok();
    let mut wrong: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for combination in Combination::all() {
        let situation = combination.situation();
        if only.as_ref().is_some_and(|only| *only != situation.to_string()) {
            continue;
        }
        let row = &rows[table::row_of(&rows, &situation).expect("every situation has a row")];
        for setup in SETUPS {
            let outcome = try_out(setup, &combination, row);
            if only.is_some() {
                println!("{combination:?}\n{setup:?}: {outcome:?}");
            }
            if let Err(why) = outcome {
                let entry = wrong.entry(situation.to_string()).or_default();
                entry.0 += 1;
                entry.1 = format!("{why}, {setup:?}, {combination:?}");
            }
        }
    }
    for (situation, (times, last)) in &wrong {
        println!("{situation}: {times} times, at last: {last}");
    }
    assert!(wrong.is_empty(), "{} situations are not as the table says", wrong.len());
}

/// `Err` says what was not as the row says.
fn try_out(setup: Setup, combination: &Combination, row: &Row) -> Result<(), String> {
    let mut pair = Pair::new(setup);
    pair.run_for(BEFORE);
    if pair.actives() != [true, false] {
        return Err(format!("before the fault {:?} are Active", pair.actives()));
    }
    pair.lose(combination);
    let situation = combination.situation();
    for (time, situation) in [
        (pair::CHANNEL_SILENCE, situation.clone()),
        (SETTLING - pair::CHANNEL_SILENCE, situation.with_channel_given_up()),
    ] {
        let before = pair.together();
        pair.run_for(time);
        let together = pair.together() - before;
        if bound(setup, &situation).is_some_and(|bound| together > bound) {
            return Err(format!("both were Active for {together:?}"));
        }
    }
    let (found, transitions) = (pair.actives(), pair.transitions());
    pair.run_for(QUIET);
    if std::env::var_os("BATON_TRUTH").is_some() {
        println!("{}", pair.journal());
    }
    if found != row.actives {
        return Err(format!("Active are {found:?}"));
    }
    if pair.actives() != found || pair.transitions() != transitions {
        return Err("it does not come to rest".to_owned());
    }
    Ok(())
}

/// For how long both may have the VIPs; `None` where neither can know of the other.
fn bound(setup: Setup, situation: &Situation) -> Option<Duration> {
    let interval = setup.interval();
    if situation.b_hears() {
        Some(Duration::ZERO)
    } else if situation.beats_to_a() {
        // Told before the claim; where b claims by quick heartbeats, with it.
        Some(if setup.is_quick() { pair::DELAY } else { Duration::ZERO })
    } else if situation.adverts_to_a() {
        // Two intervals of answers, and the next advert of the deaf one; it comes in an instant.
        Some(3 * interval + pair::DELAY)
    } else {
        None
    }
}
