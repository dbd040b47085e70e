//! The cluster key: 32 random bytes that every node of a cluster has in a file, and nobody else.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// What the one line of a key file begins with; the key follows as 64 hexadecimal digits.
const PREFIX: &str = "baton-key-1:";
/// A key file is not longer than this, however it is ended.
const LONGEST: u64 = 256;

/// The key of a cluster. It never shows in a log: its `Debug` says only that it is one.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey([u8; 32]);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file can't be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Others may read it.
    #[error("its mode is {mode:04o}, so that others can read or change it: `chmod 600` it")]
    Mode {
        /// Its permissions.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("it belongs to user {owner}, who could change it: `chown` it to user {expected}")]
    Owner {
        /// Whose it is.
        owner: u32,
        /// Who this program runs as.
        expected: u32,
    },
    /// It is no key.
    #[error(
        "it is not a key: one line `{PREFIX}` and 64 hexadecimal digits, as `baton keygen` writes it"
    )]
    Format,
}

impl ClusterKey {
    /// A new key, from the kernel's random numbers.
    ///
    /// # Errors
    ///
    /// The kernel's, where `/dev/urandom` can't be read.
    pub fn generate() -> io::Result<Self> {
        random().map(Self)
    }

    /// A key that is known, for tests.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(crate) const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key in a file that belongs to the user this runs as, or to root, and that nobody else
    /// may read.
    ///
    /// # Errors
    ///
    /// [`KeyError`], without the file's name.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(KeyError::Format);
        }
        let mode = metadata.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Mode { mode });
        }
        let (owner, expected) = (metadata.uid(), nix::unistd::geteuid().as_raw());
        if owner != expected && owner != 0 {
            return Err(KeyError::Owner { owner, expected });
        }
        let mut text = String::new();
        (&mut file).take(LONGEST).read_to_string(&mut text).map_err(|error| {
            match error.kind() {
                io::ErrorKind::InvalidData => KeyError::Format,
                _ => KeyError::Io(error),
            }
        })?;
        Self::parse(text.trim()).ok_or(KeyError::Format)
    }

    /// Writes the key to a new file, mode 0600.
    ///
    /// # Errors
    ///
    /// The kernel's; a file that is there already is left alone.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let written = writeln!(file, "{}", self.text()).and_then(|()| file.sync_all());
        if written.is_err() {
            // Half a key is worse than none.
            let _ = std::fs::remove_file(path);
        }
        written
    }

    /// The line of a key file.
    pub fn text(&self) -> String {
        let digits = self.0.iter().map(|byte| format!("{byte:02x}"));
        digits.fold(PREFIX.to_owned(), |text, digits| text + &digits)
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey")
    }
}

/// Random bytes of the kernel's.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn scratch(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("baton-key-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[test]
    fn a_saved_key_is_read_back_and_nobody_else_can() {
        let path = scratch("saved");
        let key = ClusterKey::generate().unwrap();
        key.save(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(ClusterKey::load(&path).unwrap(), key);
        assert_eq!(key.save(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        for mode in [0o640, 0o604, 0o660] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            assert!(
                matches!(ClusterKey::load(&path), Err(KeyError::Mode { mode: m }) if m == mode)
            );
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn two_keys_differ_and_none_shows() {
        let (one, other) = (ClusterKey::generate().unwrap(), ClusterKey::generate().unwrap());
        assert_ne!(one, other);
        assert_eq!(format!("{one:?}"), "ClusterKey");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let path = scratch("broken");
        let good = ClusterKey::from_bytes([7; 32]).text();
        for text in ["", "baton-key-1:", &good[..good.len() - 1], &format!("{good}0"), "\u{e4}"] {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            assert!(matches!(ClusterKey::load(&path), Err(KeyError::Format)), "{text}");
        }
        std::fs::write(&path, [0xff; 1000]).unwrap();
        assert!(matches!(ClusterKey::load(&path), Err(KeyError::Format)));
        std::fs::remove_file(path).unwrap();
    }
}
