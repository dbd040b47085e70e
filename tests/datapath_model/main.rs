//! The datapath held against a plain model of its rules.
//!
//! [`rules`] says in Rust, from the documents (docs/decisions/datapath.md, docs/counters.md, the
//! RFCs), what becomes of a frame. [`story`] makes up sequences of frames and events, good and
//! bad; [`held`] runs them through the kernel's programs (BPF_PROG_TEST_RUN, both hooks) and
//! through the model, and compares each verdict, each byte, and in the end tables and counters.
//!
//! * `wire`: frames, built and summed up from scratch. `reading`: bytes → what they say.
//! * `lab`: the configuration that all of them run with. `rules`, `flows`: the model.
//! * `kernel`: the programs under test. `held`: the comparison; a failing story is cut down to
//!   the steps that it takes, and printed.
//! * `property`: the property test. `regressions`: stories that failed once.
//! * `size`: what the verifier thinks of the programs.
//!
//! `PROPTEST_CASES=100000 BATON_SEED=7 cargo test --test datapath_model property` runs longer,
//! and other stories.

mod flows;
mod held;
mod kernel;
mod lab;
mod property;
mod reading;
mod regressions;
mod rules;
mod size;
mod story;
mod wire;
