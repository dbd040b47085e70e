//! Ctrl-C, SIGTERM and SIGHUP end a drill in order: every wait of a drill looks here.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::lab::LabError;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// How often a wait looks at the flag.
const GRAIN: Duration = Duration::from_millis(20);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on, signals that ask to end are noted instead of ending the process.
///
/// # Errors
/// None that this program can cause.
pub(super) fn install() -> Result<(), LabError> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.map_err(|errno| LabError::Io {
            doing: format!("catching {signal}"),
            source: errno.into(),
        })?;
    }
    Ok(())
}

/// [`LabError::Interrupted`] once a signal came.
pub(super) fn check() -> Result<(), LabError> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(LabError::Interrupted) } else { Ok(()) }
}

/// Sleeps, unless a signal comes.
pub(super) fn sleep(duration: Duration) -> Result<(), LabError> {
    let end = Instant::now() + duration;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(GRAIN));
    }
}

/// Waits until `done` says so; `false` if it did not by `patience`.
pub(super) fn wait_until(
    patience: Duration,
    mut done: impl FnMut() -> Result<bool, LabError>,
) -> Result<bool, LabError> {
    let end = Instant::now() + patience;
    while !done()? {
        if Instant::now() > end {
            return Ok(false);
        }
        sleep(GRAIN)?;
    }
    Ok(true)
}
