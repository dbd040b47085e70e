//! Composition root of `baton run`.
