//! What the verifier thinks of the programs: whether this kernel takes them, and how far they are
//! from its limits. Growth shows here before it hurts.

use std::os::fd::{AsFd as _, AsRawFd as _};

use baton::datapath::load::{Loaded, Sizes};
use libbpf_rs::libbpf_sys;

/// The verifier gives up after a million instructions; one that needs more than this is on its
/// way there.
const MOST: u32 = 700_000;

/// Instructions that the verifier looked at.
fn processed(program: &libbpf_rs::ProgramMut<'_>) -> u32 {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of_val(&info) as u32;
    let fd = program.as_fd().as_raw_fd();
    // SAFETY: the record and its length are ours for the time of the call, and no array is asked
    // for.
    let error = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(fd, &mut info, &mut length) };
    assert_eq!(error, 0);
    info.verified_insns
}

#[test]
fn the_verifier_takes_them_with_room_to_spare() {
    let loaded =
        Loaded::unpinned(Sizes { flows: 16, half_open_flows: 64, affinities: 64 }).unwrap();
    for (name, program) in [("tc", loaded.tc()), ("xdp", loaded.xdp())] {
        let processed = processed(program);
        println!("{name}: {processed} instructions processed by the verifier");
        assert!(processed > 1000, "{name}: {processed}, which can't be");
        assert!(processed < MOST, "{name}: {processed} instructions, more than {MOST}");
    }
}
