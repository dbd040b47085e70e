//! The kernel's programs, run on packets of ours (BPF_PROG_TEST_RUN) and in namespaces.

mod bad;
mod collect;
mod flows;
mod golden;
mod kernel;
mod packet;
