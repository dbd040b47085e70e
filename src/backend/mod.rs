//! What a backend of a dsr service needs on its own machine: printed as a script, done, undone.
//!
//! * `setup`: service and backends → what is needed (`state::Need`), and the script.
//! * `state`: what was done on this machine, in a file; and bringing the machine in line with it.
//! * `system`: addresses, kernel parameters, interfaces. `program`, `skeleton`: the eBPF program.
//!
//! It works without a daemon, and never runs on a relay. The relay's side is in
//! [`crate::datapath`].

mod program;
mod setup;
#[allow(unreachable_pub)]
mod skeleton;
mod state;
mod system;

pub use self::setup::{Options, Scripts, scripts};
pub use self::state::Report;

use crate::config::Config;

/// Does on this machine what the service's backends on it need.
///
/// # Errors
/// Not root; the service is no dsr one; this machine has none of its backends; a step fails. What
/// was done until then stays, and [`remove`] undoes it.
pub fn apply(config: &Config, service: &str, options: &Options) -> anyhow::Result<Report> {
    must_be_root()?;
    let need = setup::need(config, service, options)?;
    program::check(&need.interfaces)?;
    state::change(service, |state| {
        state.check(service, &need)?;
        state.services.insert(service.to_owned(), need);
        Ok(())
    })
}

/// Undoes what [`apply`] did on this machine for the service.
///
/// # Errors
/// Not root, or a step fails.
pub fn remove(service: &str) -> anyhow::Result<Report> {
    must_be_root()?;
    state::change(service, |state| {
        state.services.remove(service);
        Ok(())
    })
}

fn must_be_root() -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    anyhow::bail!(
        "changing this machine needs root: run it with sudo, or without --apply to see what it \
         would do"
    )
}
