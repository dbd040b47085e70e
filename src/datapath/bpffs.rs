//! Where pins live: a bpffs of our own under /run/baton, with a folder for each network namespace
//! and layout.
//!
//! `/sys/fs/bpf` would not do: `ip netns exec` mounts a fresh /sys, which hides it. And it gives
//! its command a mount namespace of its own: what is mounted in there is gone with the command, and
//! the pins with it. So the mount is made in the mount namespace of process 1, from where it
//! spreads into the others.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// Where the bpffs is mounted.
pub const ROOT: &str = "/run/baton/bpf";

/// What the maps hold and mean. Whoever changes a record in types.h, or what a map is for, makes
/// it one more: a daemon never reads another layout's maps.
pub const LAYOUT: u32 = 2;

/// The folder of this network namespace, whatever the layout.
fn of_namespace() -> io::Result<PathBuf> {
    of(Path::new("/proc/thread-self/ns/net"))
}

/// The folder of the network namespace that a file stands for, whatever the layout.
pub fn of(namespace: &Path) -> io::Result<PathBuf> {
    let inode = fs::metadata(namespace)?.ino();
    Ok(Path::new(ROOT).join(format!("net-{inode}")))
}

/// The folder of this network namespace's pins in this program's layout; it need not be there.
pub fn folder() -> io::Result<PathBuf> {
    Ok(of_namespace()?.join(format!("layout-{LAYOUT}")))
}

/// The file whose lock is the right to them; not in the bpffs, which holds no files.
pub(super) fn lock_file() -> io::Result<PathBuf> {
    let folder = of_namespace()?;
    let name = folder.file_name().expect("a folder has a name").to_string_lossy().into_owned();
    Ok(Path::new(ROOT).with_file_name(format!("datapath-{name}.lock")))
}

/// The folder of this network namespace's pinned links, which have no layout.
pub(super) fn links() -> io::Result<PathBuf> {
    Ok(of_namespace()?.join("links"))
}

/// Folders of this network namespace with pins of another layout: of an older or newer version.
pub fn other_layouts() -> io::Result<Vec<PathBuf>> {
    let ours = [folder()?, links()?];
    match fs::read_dir(of_namespace()?) {
        Ok(entries) => {
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            paths.filter(|path| path.as_ref().map_or(true, |path| !ours.contains(path))).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The layout that a folder of pins is of; `None` for what is none.
pub(super) fn layout_of(folder: &Path) -> Option<u32> {
    folder.file_name()?.to_str()?.strip_prefix("layout-")?.parse().ok()
}

/// Removes the pins of one layout.
pub(super) fn remove_layout(folder: &Path) -> io::Result<()> {
    fs::remove_dir_all(folder)
}

/// Makes the folder of this network namespace's pins.
pub(super) fn prepare() -> io::Result<PathBuf> {
    let folder = folder()?;
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Mounts the bpffs, unless it is there. Whoever starts daemons through `ip netns exec` calls this
/// before, so that their pins outlive them.
pub fn mount_bpffs() -> io::Result<()> {
    fs::create_dir_all(ROOT)?;
    // Whoever comes at the same moment would mount a second one over it, and hide its pins.
    let file = fs::File::create(Path::new(ROOT).with_extension("lock"))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if is_mounted()? {
        return Ok(());
    }
    if let Err(error) = mount_for_all() {
        tracing::debug!(%error, "can't mount a bpffs in process 1's mount namespace");
    }
    if is_mounted()? {
        return Ok(());
    }
    if !is_namespace_of_parent() {
        tracing::warn!(
            "{ROOT} is mounted in this process's own mount namespace: flows will not outlive it. \
             Before `ip netns exec`, run: mkdir -p {ROOT}; mount -t bpf baton {ROOT}"
        );
    }
    mount_here()
}

/// Removes the pins of this network namespace, of every layout; what is attached still holds its
/// program, and a program its maps.
pub fn remove() -> io::Result<()> {
    remove_all(&of_namespace()?)
}

/// Removes a folder of pins; that it is not there is no error.
pub fn remove_all(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn is_mounted() -> io::Result<bool> {
    Ok(statfs(ROOT)?.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether the mount namespace is that of the process that started us; otherwise it may well end
/// with us. Where it can't be seen, it is taken for it.
fn is_namespace_of_parent() -> bool {
    let inode = |of: &str| fs::metadata(format!("/proc/{of}/ns/mnt")).map(|found| found.ino());
    let parent = nix::unistd::getppid().to_string();
    match (inode("self"), inode(&parent)) {
        (Ok(ours), Ok(theirs)) => ours == theirs,
        _ => true,
    }
}

fn mount_here() -> io::Result<()> {
    let mode = Some("mode=0700");
    mount(Some("baton"), ROOT, Some("bpf"), MsFlags::empty(), mode).map_err(io::Error::from)
}

fn mount_for_all() -> io::Result<()> {
    let namespace = fs::File::open("/proc/1/ns/mnt")?;
    // On a thread of its own: it is lost for everything else.
    std::thread::spawn(move || {
        // Working folder and root are shared between threads, and a mount namespace can't be
        // entered by one that shares them.
        unshare(CloneFlags::CLONE_FS)?;
        setns(&namespace, CloneFlags::CLONE_NEWNS)?;
        fs::create_dir_all(ROOT)?;
        mount_here()
    })
    .join()
    .unwrap_or_else(|_| Err(io::Error::other("the mounting thread has panicked")))
}
