//! The network of a test: made, and always removed.
//!
//! ```text
//!   client .10 ── front 10.77.0.0/24, fd77::/64 ──┬── relay .2 ──┬── back 10.78.0.0/24, fd78::/64 ── b1 .11
//!                                                 └── switch .1 ─┘                              └── b2 .12
//! ```

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use baton::datapath::bpffs;
use baton::datapath::skeleton::types;
use baton::lab::netns::Netns;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Generous: the machine may be busy. Whoever waits polls.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

const NODES: [&str; 5] = ["switch", "client", "relay", "b1", "b2"];

pub(crate) struct Net {
    prefix: String,
    folder: tempfile::TempDir,
    relay: Option<Child>,
    /// `[datapath] hook`.
    hook: &'static str,
    /// Room in the flow table; for the next start of the relay.
    pub(crate) flows: u32,
    /// Between two adverts; its lease is 2¾ times as long.
    pub(crate) interval: Duration,
    /// Seconds for which the kernel keeps a VIP that is not refreshed, if not the usual ones.
    pub(crate) valid_lft: Option<u32>,
    /// Seconds by which the relay's monotonic clock is ahead, in a time namespace of its own.
    pub(crate) time_offset: Option<&'static str>,
}

/// The hooks that tests of packets are run on.
pub(crate) const HOOKS: [&str; 2] = ["tc", "xdp"];

impl Net {
    /// The network, with a relay that is not running yet.
    pub(crate) fn new() -> Self {
        Self::on("auto")
    }

    /// The same with this hook, and with what it needs of the links.
    pub(crate) fn on(hook: &'static str) -> Self {
        let mut net = Self::wired();
        net.set_hook(hook);
        net
    }

    /// The hook of the next start or reload; for XDP the links are made as on real networks:
    /// checksums and segments are whole when they leave a host, and a frame that XDP redirects to
    /// a veth needs NAPI at its peer.
    pub(crate) fn set_hook(&mut self, hook: &'static str) {
        self.hook = hook;
        if hook != "xdp" {
            return;
        }
        let off = ["tx", "off", "tso", "off", "gso", "off"];
        for (node, interfaces) in [
            ("client", &["front"][..]),
            ("b1", &["back"]),
            ("b2", &["back"]),
            ("switch", &["relay-front", "relay-back"]),
        ] {
            for interface in interfaces {
                self.ethtool(node, interface, &off);
            }
        }
        for interface in ["relay-front", "relay-back"] {
            self.ethtool("switch", interface, &["gro", "on"]);
        }
    }

    pub(crate) fn ethtool(&self, node: &str, interface: &str, features: &[&str]) {
        let mut ethtool = self.node(node).command("ethtool");
        let output = ethtool.args(["-K", interface]).args(features).output().unwrap();
        assert!(output.status.success(), "{node} {interface} {features:?}: {output:?}");
    }

    fn wired() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix =
            format!("bt-dp{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // Here, so that it is not gone with the mount namespace of `ip netns exec`.
        bpffs::mount_bpffs().expect("a bpffs");
        let folder = tempfile::tempdir().unwrap();
        let interval = Duration::from_millis(200);
        let (hook, flows, valid_lft, time_offset) = ("auto", 4096, None, None);
        let net =
            Self { prefix, folder, relay: None, hook, flows, interval, valid_lft, time_offset };
        for node in NODES {
            let netns = Netns::create(&net.name(node)).expect("a namespace");
            // Usable at once.
            netns
                .sysctl(&[
                    ("net.ipv6.conf.all.accept_dad", "0"),
                    ("net.ipv6.conf.default.accept_dad", "0"),
                    ("net.ipv4.conf.all.rp_filter", "0"),
                    ("net.ipv4.conf.default.rp_filter", "0"),
                ])
                .unwrap();
        }
        net.wire();
        net
    }

    fn name(&self, node: &str) -> String {
        format!("{}-{node}", self.prefix)
    }

    pub(crate) fn node(&self, node: &str) -> Netns {
        Netns::existing(&self.name(node))
    }

    fn wire(&self) {
        let switch = self.node("switch");
        for (bridge, network) in [("front", 77), ("back", 78)] {
            switch
                .ip_batch(&format!(
                    "link add {bridge} type bridge forward_delay 0 mcast_snooping 0\n\
                     addr add 10.{network}.0.1/24 dev {bridge}\n\
                     addr add fd{network}::1/64 dev {bridge} nodad\nlink set {bridge} up\n"
                ))
                .unwrap();
        }
        switch
            .sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])
            .unwrap();
        for (node, segment, network, host) in [
            ("client", "front", 77, 10),
            ("relay", "front", 77, 2),
            ("relay", "back", 78, 2),
            ("b1", "back", 78, 11),
            ("b2", "back", 78, 12),
        ] {
            let netns = self.name(node);
            switch
                .ip_batch(&format!(
                    "link add {node}-{segment} type veth peer name {segment} netns {netns}\n\
                     link set {node}-{segment} master {segment} up\n"
                ))
                .unwrap();
            self.node(node)
                .ip_batch(&format!(
                    "addr add 10.{network}.0.{host}/24 dev {segment}\n\
                     addr add fd{network}::{host}/64 dev {segment} nodad\nlink set {segment} up\n"
                ))
                .unwrap();
        }
        // The client reaches the backends' network through the switch, as the backends reach the
        // client's unless a test says otherwise.
        for (node, network) in [("client", 77), ("b1", 78), ("b2", 78)] {
            self.node(node)
                .ip_batch(&format!(
                    "route add default via 10.{network}.0.1\nroute add ::/0 via fd{network}::1\n"
                ))
                .unwrap();
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// The relay's configuration file.
    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("baton.toml")
    }

    pub(crate) fn write_config(&self, services: &str) -> PathBuf {
        let text = format!(
            "[node]\nname = \"relay\"\ncontrol = \"{}\"\nstate_dir = \"{}\"\nworkers = 1\n\
             [election]\nvrid = 51\npriority = 255\nadvert_interval = \"{}ms\"\n{}\
             [datapath]\nflows = {}\nhalf_open_flows = 1024\nhook = \"{}\"\n{VIPS}{services}",
            self.socket().display(),
            self.folder.path().display(),
            self.interval.as_millis(),
            self.valid_lft.map_or(String::new(), |s| format!("valid_lft = \"{s}s\"\n")),
            self.flows,
            self.hook
        );
        let file = self.config();
        std::fs::write(&file, text).unwrap();
        file
    }

    /// Runs a command against the relay, which must succeed.
    pub(crate) fn baton(&self, args: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        let output = command.args(args).arg("--socket").arg(self.socket()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
    }

    /// The relay's process.
    pub(crate) fn pid(&self) -> u32 {
        self.relay.as_ref().expect("it runs").id()
    }

    /// Asks for other services, whatever comes of it.
    pub(crate) fn try_reload(&self, services: &str) -> Output {
        self.write_config(services);
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        command.arg("reload").arg("--socket").arg(self.socket()).output().unwrap()
    }

    /// Runs another daemon in the relay's namespace until it ends by itself.
    pub(crate) fn second_relay(&self, services: &str) -> Output {
        let file = self.folder.path().join("second.toml");
        let text = std::fs::read_to_string(self.write_config(services)).unwrap();
        std::fs::write(&file, text.replace("control.sock", "second.sock")).unwrap();
        let mut command = self.node("relay").command(env!("CARGO_BIN_EXE_baton"));
        command.args(["run", "-c"]).arg(&file).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let end = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() >= end {
                let _ = child.kill();
                panic!("it goes on: {:?}", child.wait_with_output());
            }
            thread::sleep(Duration::from_millis(20));
        }
        child.wait_with_output().unwrap()
    }

    /// Gives the relay other services.
    pub(crate) fn reload(&self, services: &str) {
        self.write_config(services);
        self.baton(&["reload"]);
    }

    /// Starts the relay with these services and waits until it holds its VIPs.
    pub(crate) fn start_relay(&mut self, services: &str) {
        let socket = self.socket();
        let file = self.write_config(services);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let relay = self.node("relay");
        let mut command = match self.time_offset {
            None => relay.command(env!("CARGO_BIN_EXE_baton")),
            Some(offset) => {
                // The process that unshares is not in it: its child is, and dies with it.
                let mut command = relay.command("unshare");
                command.args(["--time", "--monotonic", offset, "--fork", "--kill-child"]);
                command.arg(env!("CARGO_BIN_EXE_baton"));
                command
            }
        };
        let child = command
            .args(["run", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.relay = Some(child);
        self.until("the relay is Active and holds its VIPs", || {
            let status = Command::new(env!("CARGO_BIN_EXE_baton"))
                .args(["status", "--json", "--socket"])
                .arg(&socket)
                .output()
                .unwrap();
            let Ok(status) = serde_json::from_slice::<serde_json::Value>(&status.stdout) else {
                return false;
            };
            let held = status["election"]["vips"]
                .as_array()
                .is_some_and(|vips| vips.iter().all(|vip| vip["held"].as_bool().unwrap_or(false)));
            status["election"]["state"] == "active" && held
        });
    }

    /// Ends the relay with that signal and waits for its end.
    pub(crate) fn end_relay(&mut self, signal: Signal) {
        let mut child = self.relay.take().expect("it runs");
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn until(&self, what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}; log:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Folders of pins that the relay's namespace has.
    pub(crate) fn pins(&self) -> PathBuf {
        self.node("relay").enter(|| bpffs::folder().unwrap()).unwrap()
    }

    /// What `baton status --json` says.
    pub(crate) fn status(&self) -> serde_json::Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        let output = command.args(["status", "--json", "--socket"]).arg(self.socket()).output();
        serde_json::from_slice(&output.unwrap().stdout).unwrap()
    }

    /// What was dropped, by reason.
    pub(crate) fn drops(&self) -> serde_json::Value {
        let mut command = self.node("relay").command(env!("CARGO_BIN_EXE_baton"));
        let output = command.args(["counters", "--json"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let mut counters: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        counters["drops"].take()
    }

    /// Does something while the relay is cut off from both networks.
    pub(crate) fn without_the_relay(&self, work: impl FnOnce()) {
        let set = |state: &str| {
            for port in ["relay-front", "relay-back"] {
                self.node("switch").ip(&format!("link set {port} {state}")).unwrap();
            }
        };
        set("down");
        work();
        set("up");
    }

    /// Opens the gate of a relay whose daemon has gone, for good.
    pub(crate) fn open_gate(&self) {
        let map = MapHandle::from_pinned_path(self.pins().join("gate")).unwrap();
        let (open_until, open_until_ns) = (u64::MAX / 4, u64::MAX / 4);
        let gate = types::gate { open_until, open_until_ns, ..Default::default() };
        let types::gate { open_until, epoch, open_until_ns, adopt_until } = gate;
        let words = [open_until, epoch, open_until_ns, adopt_until];
        let bytes = words.map(u64::to_ne_bytes).concat();
        map.update(&0_u32.to_ne_bytes(), &bytes, MapFlags::ANY).unwrap();
    }

    pub(crate) fn unload(&self) {
        let netns = self.node("relay");
        let output = netns.command(env!("CARGO_BIN_EXE_baton")).arg("unload").output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

impl Net {
    /// Takes away what `backend-setup` has left outside of the namespace: its number will be
    /// another's.
    fn forget_backend(&self, node: &str) {
        use std::os::unix::fs::MetadataExt as _;
        let inode = self.node(node).enter(|| std::fs::metadata("/proc/thread-self/ns/net"));
        if let Ok(Ok(inode)) = inode.map(|metadata| metadata.map(|metadata| metadata.ino())) {
            let _ = std::fs::remove_dir_all(format!("/run/baton/bpf/backend-net-{inode}"));
            let _ = std::fs::remove_file(format!("/run/baton/backend/net-{inode}.json"));
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Some(mut child) = self.relay.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if self.node("relay").exists() {
            let _ = self.node("relay").command(env!("CARGO_BIN_EXE_baton")).arg("unload").output();
        }
        for node in NODES {
            if self.node(node).exists() {
                self.forget_backend(node);
                let _ = self.node(node).remove();
            }
        }
        if thread::panicking() {
            eprintln!("log of the relay:\n{}", self.log());
        }
    }
}

const VIPS: &str = "
[[vips]]
name = \"front4\"
address = \"10.77.0.100/24\"
interface = \"front\"
[[vips]]
name = \"front6\"
address = \"fd77::100/64\"
interface = \"front\"
[[vips]]
name = \"back4\"
address = \"10.78.0.100/24\"
interface = \"back\"
[[vips]]
name = \"back6\"
address = \"fd78::100/64\"
interface = \"back\"
";

/// A service for the file.
pub(crate) fn service(
    name: &str,
    vip: &str,
    port: u16,
    how: &str,
    backends: &[(&str, &str)],
) -> String {
    let mut text =
        format!("[[services]]\nname = \"{name}\"\nvip = \"{vip}\"\nport = {port}\n{how}\n");
    for (name, address) in backends {
        text += &format!("[[services.backends]]\nname = \"{name}\"\naddress = \"{address}\"\n");
    }
    text
}
