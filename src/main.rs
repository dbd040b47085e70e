//! Arguments, tracing, cli; nothing else.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    baton::cli::Cli::parse().run()
}
