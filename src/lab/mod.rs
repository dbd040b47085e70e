//! The lab: network namespaces joined by veths, and the drills that run in it.

pub mod netns;
