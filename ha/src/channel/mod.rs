//! The peer channel: one authenticated, encrypted connection between each two nodes.
//!
//! * [`key`]: the cluster key and its file.
//! * [`hello`]: what each side says before anything is encrypted: who it is and which versions of
//!   the protocol it speaks.
//! * [`message`]: what is said on it.
//! * [`wire`]: how values are written.
//! * [`session`]: from bytes to messages and back: the two hellos, the Noise handshake, then
//!   encrypted messages. Pure.
//!
//! The handshake is `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`: who does not have the cluster key can
//! neither speak nor listen, and a recording is of no use later, since both sides bring a fresh
//! key to each connection. Both hellos go into the prologue, so nobody can talk two nodes into an
//! older version. Within a session the nonces of Noise count the messages: one that is repeated,
//! left out or out of place ends it. No clock is asked.

pub mod hello;
pub mod key;
pub mod message;
pub mod session;
pub mod wire;
