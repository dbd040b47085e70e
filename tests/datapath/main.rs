//! The kernel's programs, run on packets of ours (BPF_PROG_TEST_RUN) and in namespaces.

mod adopt;
mod answers;
mod bad;
mod collect;
mod cost;
mod encap;
mod errors;
mod flows;
mod fragments;
mod golden;
mod hostile;
mod icmp;
mod kernel;
mod lease;
mod leave;
mod limits;
mod live;
mod numbers;
mod packet;
mod pieces;
mod select;
mod xdp;

#[test]
fn every_drop_reason_is_explained() {
    let (header, docs) =
        (include_str!("../../src/datapath/bpf/counters.h"), include_str!("../../docs/counters.md"));
    let list = header.split_once("enum drop_reason {").unwrap().1.split_once('}').unwrap().0;
    let names: Vec<_> = list
        .split(',')
        .filter_map(|name| name.split('=').next()?.trim().strip_prefix("DROP_"))
        .filter(|name| *name != "REASONS")
        .collect();
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        assert!(docs.contains(&format!("| `{name}` |")), "docs/counters.md has no {name}");
    }
}
