//! Real-time priority and locked memory: an advert that waits behind a busy process, or for a
//! page that was swapped out, is an Active taken for dead.

use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};

/// Priority of the driver's thread under SCHED_FIFO, 1–99.
const DRIVER: i32 = 50;
/// Of its netlink thread: the driver goes first.
const NETLINK: i32 = 49;

/// Puts the driver's thread under SCHED_FIFO and locks what the process has in memory now. What
/// it allocates later is not locked: under a limit (`RLIMIT_MEMLOCK`) allocations would fail then.
pub(crate) fn acquire() -> Result<(), String> {
    schedule(DRIVER).map_err(|error| {
        format!(
            "SCHED_FIFO refused ({}): run as root, or give CAP_SYS_NICE or LimitRTPRIO={DRIVER}",
            error.desc()
        )
    })?;
    mlockall(MlockAllFlags::MCL_CURRENT).map_err(|error| {
        format!(
            "locked memory refused ({}): run as root, or give CAP_IPC_LOCK or \
             LimitMEMLOCK=infinity",
            error.desc()
        )
    })
}

/// The same for the netlink thread, once the driver has it.
pub(crate) fn follow() {
    // Refused: claims take a little longer on a busy machine, and the driver has said why.
    let _ = schedule(NETLINK);
}

/// Threads and processes that this thread starts are ordinary again.
fn schedule(priority: i32) -> Result<(), Errno> {
    let parameters = libc::sched_param { sched_priority: priority };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameters live until the call returns; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) }).map(drop)
}
