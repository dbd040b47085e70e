//! A seeded simulation of 2–5 virtual routers in virtual time: storms (loss, delay, duplication,
//! reordering, one-way loss, partitions, pauses, crashes, commands) and calms, in which there must
//! be exactly one Active, and the right one.
//!
//! `BATON_SIM_SEEDS=5000 cargo test -p baton-ha --test simulation` runs more seeds,
//! `BATON_SIM_SEED=17 …` one of them, with its whole journal.

mod network;
mod random;
mod scenario;
mod world;

/// Enough for about ten seconds of a debug build.
const DEFAULT_SEEDS: u64 = 600;

#[test]
fn one_active_and_the_right_one() {
    if let Some(seed) = variable("BATON_SIM_SEED") {
        let world = scenario::run(seed);
        println!("{}", world.journal());
        return;
    }
    let seeds = variable("BATON_SIM_SEEDS").unwrap_or(DEFAULT_SEEDS);
    let mut total = world::Tally::default();
    for seed in 0..seeds {
        total.add(scenario::run(seed).tally());
    }
    println!("{seeds} seeds: {total:?}");
    // A simulation in which nothing happens proves nothing.
    assert!(total.claims > seeds && total.takeovers > seeds / 4 && total.stalls > 0, "{total:?}");
    assert!(total.lost > seeds && total.duplicated > seeds && total.overlaps > 0, "{total:?}");
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}
