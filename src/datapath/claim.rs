//! One daemon at a time: two that serve one network namespace would write the same maps. The claim
//! is a lock on a file, which the kernel lets go of when its holder ends, however it ends; so a
//! restarted daemon is never kept out by the one before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::bpffs;
use super::load::Error;

/// How long one that is ending may take, when it has been killed a moment ago.
const PATIENCE: Duration = Duration::from_secs(3);

/// The right to the datapath of this network namespace, for as long as it lives.
#[derive(Debug)]
pub(super) struct Claim {
    _file: Flock<File>,
}

impl Claim {
    /// Takes it; gives up when somebody keeps it.
    pub(super) fn take() -> Result<Self, Error> {
        let path = bpffs::lock_file().map_err(Error::io("find the lock"))?;
        let end = Instant::now() + PATIENCE;
        loop {
            match try_lock(&path) {
                Ok(Some(file)) => return Ok(Self { _file: file }),
                Ok(None) => {
                    let holder = holder(&path);
                    // This process does not end while it waits for itself.
                    if Instant::now() >= end || holder == Some(std::process::id()) {
                        return Err(Error::Taken { holder });
                    }
                    thread::sleep(Duration::from_millis(50));
                }
                Err(error) => {
                    return Err(Error::io(format!("lock {}", path.display()))(error));
                }
            }
        }
    }

    /// The same for whoever may also be the holder: `None` where this process is.
    pub(super) fn take_or_own() -> Result<Option<Self>, Error> {
        match Self::take() {
            Ok(claim) => Ok(Some(claim)),
            Err(Error::Taken { holder: Some(pid) }) if pid == std::process::id() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The lock, with our number in the file; `None`: somebody has it.
fn try_lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => file,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, error)) => return Err(error.into()),
    };
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())?;
    Ok(Some(file))
}

/// Who wrote its number into the file.
fn holder(path: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(path).ok()?.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_and_the_next_gets_it_when_that_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/lock");
        let first = try_lock(&path).unwrap();
        assert!(first.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        assert_eq!(holder(&path), Some(std::process::id()));
        drop(first);
        assert!(try_lock(&path).unwrap().is_some());
    }
}
