//! Baton: a layer-4 load balancer that is never a single point of failure.
//!
//! The packet's way: client → VIP → [`datapath`], in the kernel → backend; or client → VIP →
//! [`proxy`] → [`pool`] (which backend) → backend.
//! The event's way: socket or timer → [`baton_ha::driver`] → state, address, announcement;
//! probe → [`health`] → [`pool`]; command → [`control`] → [`balancer`].
//!
//! Modules in reading order:
//!
//! * [`service`]: the words: service, backend, mode, scheduler.
//! * [`config`]: TOML → raw → [`config::Config`]; a `Config` in hand is correct.
//! * [`pool`]: the backends of a service as they are now, and the choice among them.
//! * [`scheduler`]: the choice, pure; [`sources`]: connections per source address.
//! * [`maglev`], [`turns`]: tables of backends; [`datapath`]: passthrough and dsr in the kernel.
//! * [`backend`]: what the backends of dsr services need, on their machines.
//! * [`cluster`]: what operators set and nodes see, between the nodes and the pools.
//! * [`replication`]: flows, from the kernel's tables to the other nodes and back.
//! * [`proxy`]: accept, connect, splice, half-close; UDP sessions.
//! * [`health`]: rise/fall machine and the probes.
//! * [`balancer`]: composition root.
//! * [`control`]: the unix socket.
//! * [`explain`]: the journal of decisions, and `baton explain`.
//! * [`guard`]: the process that removes the VIPs when the daemon no longer can.
//! * [`lab`]: network namespaces and drills.
//! * [`table`]: aligned tables for the terminal.
//! * [`cli`]: one clap tree.

pub mod backend;
pub mod balancer;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod control;
pub mod datapath;
pub mod explain;
pub mod guard;
pub mod health;
pub mod lab;
pub mod maglev;
pub mod pool;
pub mod proxy;
pub mod replication;
pub mod scheduler;
pub mod service;
pub mod sources;
pub mod status;
pub mod table;
pub mod turns;
