//! The eBPF program on backends (`backend.bpf.c`): loaded, attached to interfaces, told of services,
//! and taken away. It is pinned beside the relay's, under a folder of its own.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::Context as _;
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{
    MapCore as _, MapFlags, MapHandle, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook, TcHookBuilder,
};

use super::skeleton::{BackendSkel, BackendSkelBuilder};
use crate::datapath::bpffs;
use crate::service::Protocol;

/// Our filters among those of an interface; the relay's has others.
const TC_HANDLE: u32 = 0xba71;
const TC_PRIORITY: u32 = 0xba71;
/// Ethernet, in /sys/class/net/IF/type.
const ARPHRD_ETHER: &str = "1";

/// An entry of a map: what one service needs of the program.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Entry {
    map: String,
    key: Vec<u8>,
    value: Vec<u8>,
}

impl Entry {
    /// What comes to `backend` in a tunnel for `vip` is taken out of it.
    pub(super) fn tunnel(backend: IpAddr, vip: IpAddr) -> Self {
        let key = [mapped(backend), mapped(vip)].concat();
        Self { map: "tunnels".into(), key, value: 1_u32.to_ne_bytes().into() }
    }

    /// A server behind `vip` offers its clients an MSS of `most` at most.
    pub(super) fn clamp(vip: SocketAddr, most: u32) -> Self {
        let key = name(vip, Protocol::Tcp);
        Self { map: "clamps".into(), key, value: most.to_ne_bytes().into() }
    }

    /// A server's replies go out as `vip`: in flows that the relay has marked, or in `all`.
    pub(super) fn face(server: SocketAddr, vip: SocketAddr, protocol: Protocol, all: bool) -> Self {
        let mut value = mapped(vip.ip()).to_vec();
        value.extend(vip.port().to_be_bytes());
        value.extend(u16::from(all).to_ne_bytes());
        Self { map: "faces".into(), key: name(server, protocol), value }
    }

    /// Whether both are about the same thing.
    pub(super) fn collides(&self, other: &Self) -> bool {
        self.map == other.map && self.key == other.key && self.value != other.value
    }
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// `struct service_key` and `struct server_key`, which are alike.
fn name(address: SocketAddr, protocol: Protocol) -> Vec<u8> {
    let mut key = mapped(address.ip()).to_vec();
    key.extend(address.port().to_be_bytes());
    key.extend([protocol.number(), 0]);
    key
}

/// Whether the program can run on these interfaces.
pub(super) fn check(interfaces: &[String]) -> anyhow::Result<()> {
    for interface in interfaces {
        let kind = fs::read_to_string(format!("/sys/class/net/{interface}/type"));
        let kind = kind.with_context(|| format!("there is no interface {interface}"))?;
        if kind.trim() != ARPHRD_ETHER {
            anyhow::bail!("interface {interface} is no Ethernet, which the program needs");
        }
    }
    Ok(())
}

/// Has the program run on these interfaces with exactly these entries. What it has learnt of flows
/// stays.
pub(super) fn install(interfaces: &[String], entries: &[Entry]) -> anyhow::Result<()> {
    bpffs::mount_bpffs().with_context(|| format!("mount {}", bpffs::ROOT))?;
    let folder = folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let skeleton = match load(&folder) {
        // The pins may be another version's.
        Err(_) => {
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
            fs::create_dir_all(&folder)?;
            load(&folder).context("load the program, which needs CAP_BPF and CAP_NET_ADMIN")?
        }
        Ok(skeleton) => skeleton,
    };
    for map in ["tunnels", "clamps", "faces"] {
        fill(&folder.join(map), entries.iter().filter(|entry| entry.map == map))?;
    }
    for interface in interfaces {
        let ifindex = crate::datapath::routes::interface_named(interface)?;
        for (program, point) in [
            (&skeleton.progs.baton_backend_ingress, TC_INGRESS),
            (&skeleton.progs.baton_backend_egress, TC_EGRESS),
        ] {
            let mut hook = TcHookBuilder::new(program.as_fd())
                .ifindex(ifindex as i32)
                .replace(true)
                .handle(TC_HANDLE)
                .priority(TC_PRIORITY)
                .hook(point);
            let attached = hook.create().and_then(|mut hook| hook.attach());
            attached.with_context(|| format!("attach to interface {interface}"))?;
        }
    }
    Ok(())
}

/// Takes the program off an interface, if it is there.
pub(super) fn detach(interface: &str) -> anyhow::Result<()> {
    // An interface that has gone has taken its filters along.
    let Ok(ifindex) = crate::datapath::routes::interface_named(interface) else { return Ok(()) };
    for point in [TC_INGRESS, TC_EGRESS] {
        let mut hook = bare_hook(ifindex, point);
        if hook.query().is_ok() {
            hook.detach().with_context(|| format!("detach from interface {interface}"))?;
        }
    }
    Ok(())
}

/// Whether the program is on an interface.
pub(super) fn is_attached(interface: &str) -> bool {
    let Ok(ifindex) = crate::datapath::routes::interface_named(interface) else { return false };
    [TC_INGRESS, TC_EGRESS].into_iter().all(|point| bare_hook(ifindex, point).query().is_ok())
}

/// Removes the pins; nothing must be attached any more.
pub(super) fn unpin() -> anyhow::Result<()> {
    let folder = folder()?;
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn bare_hook(ifindex: u32, point: TcAttachPoint) -> TcHook {
    crate::datapath::load::quiet();
    // The descriptor matters to attaching alone; any will do.
    let standard_input = io::stdin();
    let mut builder = TcHookBuilder::new(standard_input.as_fd());
    builder.ifindex(ifindex as i32).handle(TC_HANDLE).priority(TC_PRIORITY);
    builder.hook(point)
}

/// Where the pins of this network namespace are.
fn folder() -> anyhow::Result<PathBuf> {
    let inode = fs::metadata("/proc/thread-self/ns/net")?.ino();
    Ok(PathBuf::from(bpffs::ROOT).join(format!("backend-net-{inode}")))
}

fn load(folder: &std::path::Path) -> libbpf_rs::Result<BackendSkel<'static>> {
    crate::datapath::load::quiet();
    // The skeleton borrows the place of its object. Once in the life of a command.
    let place = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = BackendSkelBuilder::default().open(place)?;
    let maps = &mut open.maps;
    // Of the relay's, which come with its headers: large, and not used by what is taken of those.
    // (`drops` is; nobody reads it here.)
    for map in [&mut maps.service_traffic, &mut maps.backend_traffic] {
        map.set_autocreate(false)?;
    }
    for (name, map) in [
        ("tunnels", &mut maps.tunnels),
        ("clamps", &mut maps.clamps),
        ("faces", &mut maps.faces),
        ("relayed", &mut maps.relayed),
        ("sent_fragments", &mut maps.sent_fragments),
        ("counts", &mut maps.backend_counts),
    ] {
        map.set_pin_path(folder.join(name))?;
    }
    open.load()
}

/// Gives a map these entries and no other.
fn fill<'e>(
    path: &std::path::Path,
    entries: impl Iterator<Item = &'e Entry> + Clone,
) -> anyhow::Result<()> {
    let failed = || format!("write {}", path.display());
    let map = MapHandle::from_pinned_path(path).with_context(failed)?;
    for entry in entries.clone() {
        map.update(&entry.key, &entry.value, MapFlags::ANY).with_context(failed)?;
    }
    let gone: Vec<_> =
        map.keys().filter(|key| !entries.clone().any(|entry| entry.key == *key)).collect();
    for key in gone {
        map.delete(&key).with_context(failed)?;
    }
    Ok(())
}
