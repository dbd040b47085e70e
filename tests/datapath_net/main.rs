//! The datapath end to end, in namespaces with real kernels, offloads on: a client, a relay with
//! `baton run`, two backends, a switch that routes between them.

mod backends;
mod bulk;
mod counters;
mod crowd;
mod dante;
mod dsr;
mod fragments;
mod hooks;
mod lease;
mod leave;
mod load;
mod modes;
mod net;
#[path = "../datapath/packet.rs"]
#[allow(dead_code)]
mod packet;
#[path = "../datapath/pieces.rs"]
#[allow(dead_code)]
mod pieces;
mod pmtu;
mod restart;
mod select;
mod server;
mod under_load;
