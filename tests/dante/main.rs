//! Dante's case as docs/dante.md has it: its two files, run by two relays and two real Dante
//! servers in the lab, with curl and a SOCKS client that knows BIND and UDP ASSOCIATE.

mod commands;
mod failures;
mod pool;
mod rules;
mod socks;
