//! The unix socket: commands in, snapshots out.
