//! Proxy mode: accept, connect, splice, half-close; UDP sessions.
