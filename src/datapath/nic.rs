//! What the kernel says of an interface: its driver, what that can do of XDP, whose port it is.

use std::fs;
use std::io;
use std::mem::zeroed;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

use libbpf_rs::libbpf_sys;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Nic {
    pub(super) name: String,
    /// As `ethtool -i` shows it.
    pub(super) driver: String,
    /// None, too, where the kernel does not tell (before Linux 6.3).
    pub(super) features: Features,
    /// The bond or bridge that it is a port of.
    pub(super) master: Option<String>,
}

/// Bits of `enum netdev_xdp_act` (linux/netdev.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Features(pub(super) u64);

impl Features {
    const BASIC: u64 = 1;
    const REDIRECT: u64 = 2;
    const NDO_XMIT: u64 = 4;
    const NDO_XMIT_SG: u64 = 64;

    /// Whether a program may be attached and may redirect.
    pub(super) fn has_xdp(self) -> bool {
        let needed = Self::BASIC | Self::REDIRECT;
        self.0 & needed == needed
    }

    /// Whether anything is known.
    pub(super) fn are_said(self) -> bool {
        self.0 != 0
    }

    /// Whether frames can be redirected to it.
    pub(super) fn takes_redirected(self) -> bool {
        self.0 & Self::NDO_XMIT != 0
    }

    /// Whether these may be in several buffers.
    pub(super) fn takes_redirected_jumbo(self) -> bool {
        self.0 & Self::NDO_XMIT_SG != 0
    }
}

impl Nic {
    pub(super) fn read(ifindex: u32) -> io::Result<Self> {
        let name = nix::net::if_::if_indextoname(ifindex)?.to_string_lossy().into_owned();
        let driver = driver(&name).unwrap_or_else(|| "(unknown)".to_owned());
        let master = fs::read_link(format!("/sys/class/net/{name}/master")).ok();
        let master = master.as_deref().and_then(|master| master.file_name());
        let master = master.map(|name| name.to_string_lossy().into_owned());
        Ok(Self { name, driver, features: features(ifindex), master })
    }

    /// Whether XDP_TX is enough to send a frame back. It is not on veth, which then wakes its peer
    /// only if that has a program too (`veth_xdp_flush`): the frame waits in the peer's ring.
    pub(super) fn sends_back(&self) -> bool {
        self.driver != "veth"
    }
}

/// The interfaces of this thread's network namespace.
pub(super) fn all() -> io::Result<Vec<u32>> {
    let all = nix::net::if_::if_nameindex()?;
    Ok(all.iter().map(|interface| interface.index()).collect())
}

/// The name of an interface, or its number once it is gone.
pub(super) fn name(ifindex: u32) -> String {
    match nix::net::if_::if_indextoname(ifindex) {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => ifindex.to_string(),
    }
}

/// What the interface's driver can do of XDP at this moment: it changes with offloads, and with a
/// veth's peer.
pub(super) fn features(ifindex: u32) -> Features {
    let mut options = libbpf_sys::bpf_xdp_query_opts {
        sz: size_of::<libbpf_sys::bpf_xdp_query_opts>() as _,
        ..Default::default()
    };
    // SAFETY: options that outlive the call, with their size.
    let done = unsafe { libbpf_sys::bpf_xdp_query(ifindex as i32, 0, &raw mut options) };
    Features(if done == 0 { options.feature_flags } else { 0 })
}

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo` (linux/ethtool.h).
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

/// The name of an interface's driver; `None` where it has none that tells (`lo`).
fn driver(interface: &str) -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    let mut info = DriverInfo { command: ETHTOOL_GDRVINFO, driver: [0; 32], rest: [0; 160] };
    // SAFETY: integers, arrays and pointers only: zeros are a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The name, and its 0, fit: the kernel's names are no longer.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    // SAFETY: the request names a structure of the size that this command fills; both outlive it.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if done < 0 {
        return None;
    }
    let name = info.driver.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(name).into_owned())
}
