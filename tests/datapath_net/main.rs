//! The datapath end to end, in namespaces with real kernels, offloads on: a client, a relay with
//! `baton run`, two backends, a switch that routes between them.

mod backends;
mod counters;
mod modes;
mod net;
mod restart;
mod server;
