//! The journal's file: lines are appended, and when it is full it becomes the old one and a new one
//! is begun, so that both together never take more than twice the limit.
//!
//! A line is one write, at the end of the file: of a daemon that is killed, what was written stays,
//! and what was not is one line cut short, which the next daemon ends.

use std::fs::{self, File as OpenFile, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the file; of this and the old one together, twice that.
pub const LIMIT: u64 = 4 << 20;

/// The file before this one.
pub fn old(path: &Path) -> PathBuf {
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    old.into()
}

/// A file that lines are appended to.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    limit: u64,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: OpenFile,
    size: u64,
    /// The last line has no end.
    torn: bool,
}

impl File {
    /// The file at a path; nothing is done before the first line.
    pub fn new(path: PathBuf, limit: u64) -> Self {
        Self { path, limit, open: None }
    }

    /// Appends a line, which has no newline in it.
    ///
    /// # Errors
    ///
    /// The system's. The next line tries everything anew.
    pub fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let appended = self.try_append(line);
        if appended.is_err() {
            self.open = None;
        }
        appended
    }

    fn try_append(&mut self, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64 + 2;
        if self.open.as_ref().is_none_or(|open| !open.is_at(&self.path)) {
            self.open = Some(Open::at(&self.path)?);
        }
        if self.open.as_ref().is_some_and(|open| open.size > 0 && open.size + length > self.limit) {
            fs::rename(&self.path, old(&self.path))?;
            self.open = Some(Open::at(&self.path)?);
        }
        let open = self.open.as_mut().expect("opened above");
        let mut bytes = Vec::with_capacity(line.len() + 2);
        if open.torn {
            bytes.push(b'\n');
        }
        bytes.extend_from_slice(line);
        bytes.push(b'\n');
        open.torn = true;
        open.file.write_all(&bytes)?;
        open.torn = false;
        open.size += bytes.len() as u64;
        Ok(())
    }

    /// Waits until the disk has what was appended.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn sync(&mut self) -> io::Result<()> {
        self.open.as_ref().map_or(Ok(()), |open| open.file.sync_data())
    }
}

impl Open {
    fn at(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o640);
        let mut file = options.custom_flags(libc::O_NOFOLLOW).open(path)?;
        let size = file.metadata()?.len();
        let mut last = *b"\n";
        if size > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        Ok(Self { file, size, torn: last != *b"\n" })
    }

    /// Whether it is still the one that has the name: it may have been removed or moved.
    fn is_at(&self, path: &Path) -> bool {
        let same = |ours: fs::Metadata, theirs: fs::Metadata| {
            (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino())
        };
        match (self.file.metadata(), fs::symlink_metadata(path)) {
            (Ok(ours), Ok(theirs)) => same(ours, theirs),
            (_, _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn it_never_takes_more_than_twice_the_limit_and_the_newest_lines_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/journal.jsonl");
        let mut file = File::new(path.clone(), 1000);
        for n in 0..500 {
            file.append(format!("line {n:04}").as_bytes()).unwrap();
            let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
            assert!(size(&path) <= 1000 && size(&old(&path)) <= 1000, "at {n}");
        }
        let all: Vec<_> = lines(&old(&path)).into_iter().chain(lines(&path)).collect();
        assert!(all.len() > 90, "{}", all.len());
        let expected: Vec<_> = (500 - all.len()..500).map(|n| format!("line {n:04}")).collect();
        assert_eq!(all, expected, "the newest, in their order");
    }

    #[test]
    fn a_line_cut_short_is_ended_by_the_next_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        fs::write(&path, "whole\nha").unwrap();
        let mut file = File::new(path.clone(), 1000);
        file.append(b"next").unwrap();
        file.append(b"and next").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole\nha\nnext\nand next\n");
    }

    #[test]
    fn a_file_that_was_removed_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let mut file = File::new(path.clone(), 1000);
        file.append(b"one").unwrap();
        fs::remove_file(&path).unwrap();
        file.append(b"two").unwrap();
        assert_eq!(lines(&path), ["two"]);
    }

    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        fs::write(folder.path().join("precious"), "").unwrap();
        std::os::unix::fs::symlink(folder.path().join("precious"), &path).unwrap();
        File::new(path, 1000).append(b"one").unwrap_err();
        assert_eq!(fs::read_to_string(folder.path().join("precious")).unwrap(), "");
    }
}
