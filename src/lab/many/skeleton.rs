//! What libbpf-cargo generates from `../bench/bpf/handshake.bpf.c`.

#![allow(missing_docs, missing_debug_implementations, unreachable_pub, dead_code)]
#![allow(unsafe_op_in_unsafe_fn, clippy::all, clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/handshake.skel.rs"));
