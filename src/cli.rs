//! One clap tree.
