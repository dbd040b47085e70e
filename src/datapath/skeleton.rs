//! What libbpf-cargo generates from the C: the object, its maps and programs, and its types
//! (through BTF, so that no struct is copied by hand). [`super::record`] makes bytes of the types.

#![allow(missing_docs, missing_debug_implementations, unreachable_pub, dead_code)]
#![allow(unsafe_op_in_unsafe_fn, clippy::all, clippy::undocumented_unsafe_blocks)]

include!(concat!(env!("OUT_DIR"), "/datapath.skel.rs"));
