//! The choice among eligible backends, pure: round-robin, source-hash, least-connections, random.
