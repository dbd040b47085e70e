//! What it costs the kernel to verify the programs, each time that one is loaded.

use std::os::fd::AsFd as _;

use baton::datapath::load::{Loaded, Sizes};
use libbpf_rs::query::ProgInfoIter;
use libbpf_rs::{Program, ProgramMut};

/// Instructions that the verifier may follow; it refuses at 1,000,000. Some 30,000 take 50 ms. What
/// drives them up are steps that are followed anew for each way to them: work.h says how not to.
const MOST: u32 = 60_000;

fn verified(program: &ProgramMut<'_>) -> u32 {
    let id = Program::id_from_fd(program.as_fd()).expect("an id");
    let info = ProgInfoIter::default().find(|info| info.id == id).expect("what the kernel knows");
    info.verified_insns
}

#[test]
fn verification_stays_cheap() {
    let sizes = Sizes { flows: 1024, half_open_flows: 256, affinities: 64 };
    let loaded = Loaded::unpinned(sizes).expect("loaded");
    for (name, program) in [("TC", loaded.tc()), ("XDP", loaded.xdp())] {
        let instructions = verified(program);
        assert!(instructions > 1000, "{name}: {instructions} can't be all of it");
        assert!(instructions <= MOST, "{name}: {instructions} instructions");
    }
}
