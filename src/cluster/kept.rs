//! What operators set, on this node's disk: the nodes tell each other, and when all of them are
//! gone at once, each begins with what it knew.
//!
//! The file is replaced as a whole (written beside it, synced, renamed), so a daemon that is killed
//! or a machine whose power goes leaves the one before or the new one. What can't be read, or is not
//! what was written, is said and left where it is until there is something new to write; a node
//! without its file serves as ever.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use baton_ha::state::Setting;
use baton_ha::state::settings::{MOST_SETTINGS, sum};
use serde::{Deserialize, Serialize};

/// Its name, in the node's `state_dir`.
pub const FILE: &str = "settings.json";
/// Bytes that are read: more than the most settings take.
const LIMIT: u64 = 4 << 20;
/// Of the file; another is not read.
const FORMAT: u32 = 1;

/// Where a node's settings are kept, and how that goes.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The file.
    pub file: PathBuf,
    /// Why it can't be read or written now.
    pub trouble: Option<String>,
    /// The sum of the settings that are in it.
    sum: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    format: u32,
    /// Of the settings, as nodes compare them.
    sum: u64,
    settings: Vec<Setting>,
}

/// Why a file is not taken.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it is damaged ({0})")]
    Damaged(String),
}

impl Kept {
    /// What the file in that folder says, which may not be there.
    pub fn open(folder: &Path) -> (Self, Vec<Setting>) {
        let file = folder.join(FILE);
        match read(&file) {
            Ok(settings) => {
                let sum = sum(settings.iter().cloned());
                (Self { file, trouble: None, sum }, settings)
            }
            Err(error) => {
                tracing::warn!(
                    file = %file.display(),
                    "what operators set on this node before can't be read: {error}"
                );
                let trouble = Some(format!("can't be read: {error}"));
                (Self { file, trouble, sum: sum([]) }, Vec::new())
            }
        }
    }

    /// Whether settings of that sum are in the file.
    pub fn has(&self, sum: u64) -> bool {
        self.sum == sum
    }

    /// Notes how an attempt to write settings ended.
    pub fn note(&mut self, settings: &[Setting], written: io::Result<()>) {
        match written {
            Ok(()) => {
                self.sum = sum(settings.iter().cloned());
                if self.trouble.take().is_some() {
                    tracing::info!(file = %self.file.display(), "settings are kept again");
                }
            }
            Err(error) => {
                let trouble = format!("can't be written: {error}");
                if self.trouble.as_ref() != Some(&trouble) {
                    tracing::warn!(
                        file = %self.file.display(),
                        "what operators set would not outlive the end of all nodes: {error}"
                    );
                }
                self.trouble = Some(trouble);
            }
        }
    }
}

/// Replaces the file. It waits for the disk.
///
/// # Errors
///
/// The system's; the file is then what it was.
pub fn write(file: &Path, settings: &[Setting]) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    let sum = sum(settings.iter().cloned());
    let content = Content { format: FORMAT, sum, settings: settings.to_vec() };
    let new = file.with_extension("json.new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o640);
    let mut open = options.custom_flags(libc::O_NOFOLLOW).open(&new)?;
    open.write_all(&serde_json::to_vec(&content)?)?;
    open.sync_all()?;
    fs::rename(&new, file)?;
    // The name, too.
    File::open(folder)?.sync_all()
}

/// None if there is no file.
fn read(file: &Path) -> Result<Vec<Setting>, Error> {
    let mut options = OpenOptions::new();
    // Whatever has that name: neither is a link followed, nor a pipe's other end waited for.
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let open = match options.open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        open => open?,
    };
    if !open.metadata()?.is_file() {
        return Err(Error::Damaged("it is no file".to_owned()));
    }
    let mut bytes = Vec::new();
    open.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Err(Error::Damaged(format!("it has more than {LIMIT} bytes")));
    }
    let content: Content =
        serde_json::from_slice(&bytes).map_err(|error| Error::Damaged(error.to_string()))?;
    let Content { format, settings, .. } = content;
    if format != FORMAT {
        return Err(Error::Damaged(format!("format {format} is not {FORMAT}")));
    }
    if settings.len() > MOST_SETTINGS || content.sum != sum(settings.iter().cloned()) {
        return Err(Error::Damaged("its settings are not those that were written".to_owned()));
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use baton_ha::state::settings::Version;
    use baton_ha::state::{Admin, Target, Value};

    use super::*;

    fn settings(many: usize) -> Vec<Setting> {
        let one = |n: usize| Setting {
            target: Target {
                vip: "fd77:1111:2222:3333:4444:5555:6666:100".parse().unwrap(),
                port: 65_535,
                protocol: 255,
                backend: "fd78:1111:2222:3333:4444:5555:6666:7777".parse().unwrap(),
                backend_port: n as u16,
            },
            value: match n % 3 {
                0 => Value::Admin(Admin::Disabled),
                1 => Value::Weight(Some(256)),
                _ => Value::Weight(None),
            },
            version: Version { count: (1 << 62) - n as u64, node: "\u{1}".repeat(64) },
        };
        (0..many).map(one).collect()
    }

    #[test]
    fn what_is_written_is_read_again_also_the_most_there_may_be() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("deep/er");
        let (kept, none) = Kept::open(&deep);
        assert!(none.is_empty() && kept.trouble.is_none() && kept.has(sum([])));
        for many in [3, MOST_SETTINGS, 0] {
            write(&kept.file, &settings(many)).unwrap();
            let (kept, read) = Kept::open(&deep);
            assert_eq!((kept.trouble, read.len()), (None, many));
            assert_eq!(read, settings(many));
        }
    }

    #[test]
    fn a_damaged_file_is_refused_whole_and_stays_until_the_next_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        write(&file, &settings(5)).unwrap();
        let whole = fs::read(&file).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            let (kept, read) = Kept::open(folder.path());
            assert_eq!(fs::read(&file).unwrap(), bytes);
            kept.trouble.is_some() && read.is_empty()
        };
        assert!(!refused(&whole));
        assert!((0..whole.len()).all(|length| refused(&whole[..length])), "cut short");
        let text = String::from_utf8(whole).unwrap();
        for (was, is) in [("256", "255"), ("disabled", "drained"), ("\"format\":1", "\"format\":2")]
        {
            assert!(text.contains(was));
            assert!(refused(text.replacen(was, is, 1).as_bytes()), "{was}");
        }
        assert!(refused(&vec![b' '; LIMIT as usize + 1]));
        assert!(refused(&[0xff; 100]));
        write(&file, &settings(2)).unwrap();
        assert_eq!(Kept::open(folder.path()).1, settings(2));
    }

    #[test]
    fn neither_a_link_nor_a_pipe_nor_a_folder_is_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        let other = folder.path().join("other");
        write(&other, &settings(1)).unwrap();
        symlink(&other, &file).unwrap();
        assert!(Kept::open(folder.path()).0.trouble.is_some(), "a link");
        fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(Kept::open(folder.path()).0.trouble.is_some(), "a pipe");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        let (mut kept, _) = Kept::open(folder.path());
        assert!(kept.trouble.is_some(), "a folder");
        kept.note(&settings(1), write(&kept.file, &settings(1)));
        assert!(kept.trouble.as_ref().unwrap().contains("can't be written"), "{kept:?}");
        assert!(!kept.has(sum(settings(1))));
        fs::remove_dir(&file).unwrap();
        kept.note(&settings(1), write(&kept.file, &settings(1)));
        assert!(kept.trouble.is_none() && kept.has(sum(settings(1))));
    }
}
