//! The hooks of an interface: which one packets are taken at, attaching, replacing, detaching.
//!
//! TC's filter is on every interface, since XDP hands over to it what it can't send on; those that
//! have VIPs have one on egress too, which keeps the stack silent without a lease. XDP's
//! program is on those where it is chosen, by a link that is pinned, so that it outlives the
//! daemon; the next one replaces the program in the link, and no packet goes by in between.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use libbpf_rs::query::{LinkInfo, LinkTypeInfo};
use libbpf_rs::{TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook, TcHookBuilder, libbpf_sys};
use serde::{Deserialize, Serialize};

use super::bpffs;
use super::load::{Error, Loaded, quiet};
use super::nic::{self, Nic};

/// Our filter among those of an interface: by this handle and priority it is found again, and
/// replaced in one step, whoever attached it. Each layout has a priority of its own, the newest comes
/// first: an older version's flows are left to its filter behind ours.
const TC_HANDLE: u32 = 0xba70;
const TC_PRIORITY: u32 = 0xba70;
/// Layouts that are looked for, newer ones too.
const LAYOUTS: std::ops::Range<u32> = 1..bpffs::LAYOUT + 16;

/// What the configuration asks for: `[datapath] hook`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// XDP where the driver does it well, TC elsewhere.
    #[default]
    Auto,
    /// TC everywhere.
    Tc,
    /// XDP everywhere, or not at all.
    Xdp,
}

impl Choice {
    /// As the configuration has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tc => "tc",
            Self::Xdp => "xdp",
        }
    }
}

/// A hook that packets come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// The clsact qdisc's ingress.
    Tc,
    /// XDP in driver mode; what it can't send on goes to TC.
    Xdp,
}

/// The hook of an interface, and why it is that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub hook: Hook,
    /// In words, with the driver's name.
    pub why: String,
}

/// The hooks that this process has attached: its programs are the ones that run there.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    choice: Choice,
    attached: HashMap<u32, Chosen>,
    egress: HashSet<u32>,
}

impl Hooks {
    pub(super) fn new(choice: Choice) -> Self {
        Self { choice, ..Self::default() }
    }

    /// Follows the configuration, on each interface that has a hook. Where one refuses, everything
    /// is as it was.
    pub(super) fn choose(&mut self, loaded: &Loaded, choice: Choice) -> Result<(), Error> {
        if self.choice == choice {
            return Ok(());
        }
        let interfaces: Vec<u32> = self.attached.keys().copied().collect();
        let before = std::mem::replace(&mut self.choice, choice);
        let attach_all = |hooks: &mut Self| {
            hooks.attached.clear();
            interfaces.iter().try_for_each(|&ifindex| hooks.attach(loaded, ifindex))
        };
        let done = attach_all(self);
        if done.is_err() {
            self.choice = before;
            attach_all(self)?;
        }
        done
    }

    /// Sees to it that our programs are on the interface, at the hook that is its.
    pub(super) fn attach(&mut self, loaded: &Loaded, ifindex: u32) -> Result<(), Error> {
        if let Some(chosen) = self.attached.get(&ifindex) {
            let xdp = chosen.hook == Hook::Tc || has_xdp(ifindex);
            if xdp && has_tc(ifindex) {
                return Ok(());
            }
        }
        let nic = Nic::read(ifindex).map_err(Error::io("look at an interface"))?;
        let mut chosen = choose(self.choice, &nic);
        // First, since XDP hands over to it.
        attach_filter(loaded.tc().as_fd(), ifindex, TC_INGRESS)?;
        if chosen.hook == Hook::Xdp {
            match attach_xdp(loaded, ifindex) {
                Ok(()) => {}
                Err(error) if self.choice == Choice::Auto => {
                    chosen.hook = Hook::Tc;
                    chosen.why = format!("driver {}: {}", nic.driver, refusal(&error));
                    detach_xdp(ifindex)?;
                }
                Err(error) => {
                    let Nic { name, driver, .. } = nic;
                    return Err(Error::Refused {
                        name,
                        driver,
                        why: refusal(&error),
                        source: error,
                    });
                }
            }
        } else {
            detach_xdp(ifindex)?;
        }
        tracing::info!(
            interface = nic.name,
            hook = ?chosen.hook,
            why = chosen.why,
            "datapath attached"
        );
        self.attached.insert(ifindex, chosen);
        Ok(())
    }

    /// Sees to it that what leaves an interface that has VIPs is looked at.
    pub(super) fn attach_egress(&mut self, loaded: &Loaded, ifindex: u32) -> Result<(), Error> {
        // One of an earlier daemon is replaced: its gate may be another.
        if self.egress.contains(&ifindex) && has_filter(ifindex, bpffs::LAYOUT, TC_EGRESS) {
            return Ok(());
        }
        attach_filter(loaded.egress().as_fd(), ifindex, TC_EGRESS)?;
        self.egress.insert(ifindex);
        Ok(())
    }

    /// What is attached in this network namespace, by number of the interface.
    pub(super) fn read(&self) -> Result<BTreeMap<u32, Chosen>, Error> {
        let found = attached()?.into_iter().map(|(ifindex, hook)| {
            let known = self.attached.get(&ifindex).filter(|known| known.hook == hook).cloned();
            let why = || "an earlier daemon attached it".to_owned();
            (ifindex, known.unwrap_or_else(|| Chosen { hook, why: why() }))
        });
        Ok(found.collect())
    }

    /// Whether XDP is anywhere: then it needs its ways.
    pub(super) fn need_ways(&self) -> bool {
        self.attached.values().any(|chosen| chosen.hook == Hook::Xdp)
    }
}

/// Drivers that pass packets between virtual machines or namespaces and leave checksums and
/// segments for the last hop: XDP sees them unfinished, or has the driver finish all of them.
const VIRTUAL: &[(&str, &str)] = &[
    ("veth", "XDP breaks partial checksums and large segments there"),
    ("virtio_net", "XDP takes its checksum and segment offloads away"),
    ("tun", "XDP sees unfinished checksums and large segments there"),
    ("hv_netvsc", "XDP takes its segment offloads away"),
    ("vif", "XDP takes its segment offloads away"),
    ("vmxnet3", "XDP takes its segment offloads away"),
    ("bonding", "XDP would have to be on each of its ports"),
    ("team", "XDP would have to be on each of its ports"),
    ("bridge", "XDP would have to be on each of its ports"),
    ("802.1Q VLAN Support", "tags are taken off behind XDP"),
    ("macvlan", "XDP would have to be on the interface below"),
    ("ipvlan", "XDP would have to be on the interface below"),
];

/// Drivers of network cards that are known to do XDP in the receive path, redirection included.
const GOOD: &[&str] = &[
    "atlantic",
    "bnxt_en",
    "dpaa2-eth",
    "ena",
    "fbnic",
    "fec",
    "fsl_dpa",
    "fsl_enetc",
    "gve",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "lan966x-switch",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mtk_soc_eth",
    "mvneta",
    "mvpp2",
    "nfp",
    "nicvf",
    "octeontx2-nicpf",
    "qede",
    "rvu_nicpf",
    "rvu_nicvf",
    "sfc",
    "st_gmac",
    "stmmaceth",
    "tsnep",
];

/// Which hook an interface gets.
fn choose(choice: Choice, nic: &Nic) -> Chosen {
    let driver = &nic.driver;
    let tc = |why: String| Chosen { hook: Hook::Tc, why };
    match choice {
        Choice::Tc => return tc(format!("driver {driver}; hook = \"tc\"")),
        Choice::Xdp => {
            return Chosen { hook: Hook::Xdp, why: format!("driver {driver}; hook = \"xdp\"") };
        }
        Choice::Auto => {}
    }
    if let Some((_, why)) = VIRTUAL.iter().find(|(name, _)| name == driver) {
        return tc(format!("driver {driver}: {why}"));
    }
    if let Some(master) = &nic.master {
        return tc(format!("driver {driver}: it is a port of {master}"));
    }
    let known = GOOD.contains(&driver.as_str());
    match (known, nic.features.has_xdp()) {
        // Where nothing is said the kernel is asked by trying.
        (true, has) if has || !nic.features.are_said() => Chosen {
            hook: Hook::Xdp,
            why: format!("driver {driver} does XDP and leaves checksums whole"),
        },
        (_, false) => tc(format!("driver {driver} has no XDP that redirects")),
        _ => tc(format!("driver {driver} is not known to do XDP well; hook = \"xdp\" tries")),
    }
}

/// Whether frames that came by another interface can be sent out of this one from XDP.
pub(super) fn takes_redirected(nic: &Nic) -> bool {
    let unsaid = !nic.features.are_said() && GOOD.contains(&nic.driver.as_str());
    nic.features.takes_redirected() || unsaid
}

/// What a driver's refusal means to the operator.
fn refusal(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "it has no XDP in driver mode".into(),
        Some(libc::EBUSY | libc::EEXIST) => {
            "another XDP program is attached (`ip link show` has its number)".into()
        }
        Some(libc::EINVAL | libc::ERANGE | libc::ENOSPC | libc::E2BIG | libc::ENOMEM) => {
            format!(
                "it refuses XDP ({error}): often an MTU too large, large receive offload \
                 (`ethtool -K … lro off`) or too few queues; the kernel's log may say which"
            )
        }
        _ => format!("it refuses XDP ({error})"),
    }
}

/// What has our programs in this network namespace: TC's filter, and XDP's link over it.
pub(super) fn attached() -> Result<BTreeMap<u32, Hook>, Error> {
    let interfaces = nic::all().map_err(Error::io("list the interfaces"))?;
    let mut found = BTreeMap::new();
    for ifindex in interfaces {
        if has_xdp(ifindex) {
            found.insert(ifindex, Hook::Xdp);
        } else if layouts(ifindex).next().is_some() {
            found.insert(ifindex, Hook::Tc);
        }
    }
    Ok(found)
}

/// Takes our programs off every interface. Goes on after a failure, and gives the first.
pub(super) fn detach_all() -> Result<(), Error> {
    let mut failed = None;
    for (ifindex, hook) in attached()? {
        let xdp = detach_xdp(ifindex);
        let tc = layouts(ifindex).map(|layout| detach_layout(ifindex, layout));
        let tc = tc.fold(Ok(()), Result::and);
        match xdp.and(tc) {
            Ok(()) => tracing::info!(interface = nic::name(ifindex), ?hook, "datapath detached"),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    // Of interfaces that have gone: nothing but their pins is left.
    remove_links().map_err(Error::io("remove the pins of XDP links"))?;
    failed.map_or(Ok(()), Err)
}

/// Attaches a TC filter, in the place of the one that is there, if any.
fn attach_filter(program: BorrowedFd<'_>, ifindex: u32, point: TcAttachPoint) -> Result<(), Error> {
    let failed = || Error::bpf(format!("attach to interface {}", nic::name(ifindex)));
    let mut hook = tc_hook(program, ifindex, bpffs::LAYOUT, point);
    hook.create().map_err(failed())?;
    hook.attach().map(drop).map_err(failed())
}

/// Takes our TC filter off an interface; other filters stay.
pub fn detach_tc(ifindex: u32) -> Result<(), Error> {
    detach_layout(ifindex, bpffs::LAYOUT)
}

/// The same of the filters of any layout.
pub(super) fn detach_layout(ifindex: u32, layout: u32) -> Result<(), Error> {
    let failed = || Error::bpf(format!("detach from interface {}", nic::name(ifindex)));
    for point in [TC_INGRESS, TC_EGRESS] {
        if has_filter(ifindex, layout, point) {
            bare_hook(ifindex, layout, point).detach().map_err(failed())?;
        }
    }
    Ok(())
}

/// The layouts whose TC filters the interface has.
fn layouts(ifindex: u32) -> impl Iterator<Item = u32> {
    LAYOUTS.filter(move |&layout| has_layout(ifindex, layout))
}

fn has_tc(ifindex: u32) -> bool {
    has_layout(ifindex, bpffs::LAYOUT)
}

/// The program of our TC filter that runs on an interface, whoever attached it.
pub fn running_tc(ifindex: u32) -> Result<OwnedFd, Error> {
    let failed = || "open the program that runs on an interface";
    let id = bare_hook(ifindex, bpffs::LAYOUT, TC_INGRESS).query().map_err(Error::bpf(failed()))?;
    // SAFETY: a number in, a descriptor of ours or an error out.
    let fd = result(unsafe { libbpf_sys::bpf_prog_get_fd_by_id(id) });
    // SAFETY: it is open, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.map_err(Error::io(failed()))?) })
}

/// Whether packets come to the TC filter of a layout on the interface.
pub(super) fn has_layout(ifindex: u32, layout: u32) -> bool {
    has_filter(ifindex, layout, TC_INGRESS)
}

fn has_filter(ifindex: u32, layout: u32, point: TcAttachPoint) -> bool {
    bare_hook(ifindex, layout, point).query().is_ok()
}

fn bare_hook(ifindex: u32, layout: u32, point: TcAttachPoint) -> TcHook {
    quiet();
    // The descriptor matters to attaching alone; any will do.
    tc_hook(io::stdin().as_fd(), ifindex, layout, point)
}

fn tc_hook(program: BorrowedFd<'_>, ifindex: u32, layout: u32, point: TcAttachPoint) -> TcHook {
    let mut builder = TcHookBuilder::new(program);
    let priority = TC_PRIORITY - layout;
    builder.ifindex(ifindex as i32).replace(true).handle(TC_HANDLE).priority(priority);
    builder.hook(point)
}

/// Attaches the XDP hook in driver mode: into the link that is pinned, if it is there and alive.
fn attach_xdp(loaded: &Loaded, ifindex: u32) -> io::Result<()> {
    quiet();
    let program = loaded.xdp().as_fd();
    let pin = link_pin(ifindex)?;
    if let Some(link) = open_pin(&pin)? {
        if interface_of(&link) == Some(ifindex) {
            // SAFETY: two descriptors that are open; no options.
            let done = unsafe {
                libbpf_sys::bpf_link_update(link.as_raw_fd(), program.as_raw_fd(), std::ptr::null())
            };
            return result(done).map(drop);
        }
        // Its interface has gone; another one has the number.
        fs::remove_file(&pin)?;
    }
    let link = create_link(program, ifindex)?;
    fs::create_dir_all(pin.parent().expect("a pin is in a folder"))?;
    let path = c_path(&pin)?;
    // SAFETY: an open descriptor, and a path that ends in 0.
    result(unsafe { libbpf_sys::bpf_obj_pin(link.as_raw_fd(), path.as_ptr()) }).map(drop)
}

fn create_link(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as _,
        // Never the generic mode, which is slower than TC.
        flags: libbpf_sys::XDP_FLAGS_DRV_MODE,
        ..Default::default()
    };
    // SAFETY: an open descriptor, and options that outlive the call.
    let link = unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            ifindex as RawFd,
            libbpf_sys::BPF_XDP,
            &raw const options,
        )
    };
    // SAFETY: new, and nobody else's.
    result(link).map(|link| unsafe { OwnedFd::from_raw_fd(link) })
}

/// Takes the XDP hook off; that there is none is no error.
fn detach_xdp(ifindex: u32) -> Result<(), Error> {
    let failed = || Error::io(format!("detach XDP from interface {}", nic::name(ifindex)));
    let pin = link_pin(ifindex).map_err(failed())?;
    if let Some(link) = open_pin(&pin).map_err(failed())? {
        // SAFETY: an open descriptor. Whoever else holds the link holds nothing from here on.
        let detached = result(unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) });
        // Its interface has gone: it is off already.
        if interface_of(&link) == Some(ifindex) {
            detached.map_err(failed())?;
        }
        fs::remove_file(&pin).map_err(failed())?;
    }
    Ok(())
}

fn has_xdp(ifindex: u32) -> bool {
    let link = link_pin(ifindex).and_then(|pin| open_pin(&pin));
    link.ok().flatten().is_some_and(|link| interface_of(&link) == Some(ifindex))
}

/// The interface that a link is attached to; `None` once it is attached to none.
fn interface_of(link: &OwnedFd) -> Option<u32> {
    match LinkInfo::from_fd(link.as_fd()).ok()?.info {
        LinkTypeInfo::Xdp(xdp) if xdp.ifindex != 0 => Some(xdp.ifindex),
        _ => None,
    }
}

/// Where the link of an interface is pinned: apart from the maps, whose layout may change.
fn link_pin(ifindex: u32) -> io::Result<PathBuf> {
    Ok(bpffs::links()?.join(format!("xdp-{ifindex}")))
}

fn open_pin(pin: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(pin)?;
    // SAFETY: a path that ends in 0.
    match result(unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) }) {
        // SAFETY: new, and nobody else's.
        Ok(link) => Ok(Some(unsafe { OwnedFd::from_raw_fd(link) })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_links() -> io::Result<()> {
    match fs::remove_dir_all(bpffs::links()?) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}

/// libbpf gives a negative error number.
fn result(value: i32) -> io::Result<i32> {
    if value < 0 { Err(io::Error::from_raw_os_error(-value)) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::nic::Features;
    use super::*;

    fn nic(driver: &str, features: u64) -> Nic {
        let features = Features(features);
        Nic { name: "eth0".into(), driver: driver.into(), features, master: None }
    }

    const ALL: u64 = 7;

    #[test]
    fn auto_takes_xdp_where_the_driver_does_it_well() {
        for (driver, features, master, hook, why) in [
            ("ixgbe", ALL, None, Hook::Xdp, "driver ixgbe does XDP and leaves checksums whole"),
            ("mlx5_core", 0, None, Hook::Xdp, "driver mlx5_core does XDP"),
            ("ixgbe", ALL, Some("bond0"), Hook::Tc, "driver ixgbe: it is a port of bond0"),
            ("ixgbe", 1, None, Hook::Tc, "driver ixgbe has no XDP that redirects"),
            ("r8169", 0, None, Hook::Tc, "driver r8169 has no XDP that redirects"),
            ("new", ALL, None, Hook::Tc, "driver new is not known to do XDP well"),
            ("veth", ALL, None, Hook::Tc, "driver veth: XDP breaks partial checksums"),
            ("virtio_net", ALL, None, Hook::Tc, "driver virtio_net: XDP takes"),
            ("bonding", ALL, None, Hook::Tc, "driver bonding: XDP would have to be on each"),
        ] {
            let nic = Nic { master: master.map(str::to_owned), ..nic(driver, features) };
            let chosen = choose(Choice::Auto, &nic);
            assert_eq!(chosen.hook, hook, "{driver}: {}", chosen.why);
            assert!(chosen.why.starts_with(why), "{}", chosen.why);
        }
    }

    #[test]
    fn what_the_operator_wants_is_not_weighed() {
        for driver in ["ixgbe", "veth"] {
            assert_eq!(choose(Choice::Xdp, &nic(driver, 0)).hook, Hook::Xdp);
            assert_eq!(choose(Choice::Tc, &nic(driver, ALL)).hook, Hook::Tc);
        }
    }
}
