//! What libbpf-cargo generates from `backend.bpf.c`, as [`crate::datapath::skeleton`] of the relay's.

#![allow(missing_docs, missing_debug_implementations, unreachable_pub, dead_code)]
#![allow(unsafe_op_in_unsafe_fn, clippy::all, clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/backend.skel.rs"));
