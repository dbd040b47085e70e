//! The kernel datapath.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::undocumented_unsafe_blocks, unsafe_op_in_unsafe_fn, dead_code)]
pub mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/datapath.skel.rs"));
}
