//! A small lab for the HA driver: nodes on a front and a back bridge in namespaces of their own,
//! and drivers in threads (for their views) or in child processes (to be killed and stopped).
// Each test file uses its part, and none of it is anyone else's.
#![allow(dead_code, unreachable_pub)]

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use baton::lab::netns::{Netns, run};
use baton_ha::channel::key::ClusterKey;
use baton_ha::config::{
    AnnounceConfig, ChannelConfig, ChannelPeer, ChecksumForm, Family, HaConfig, Path, Peer,
    Transport, Vip,
};
use baton_ha::driver::{Handle, View, start};
use baton_ha::vrrp::router::State;
use baton_ha::vrrp::{AdverInterval, Preempt, Priority, Vrid};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub const VRID: u8 = 51;
pub const VIP4: &str = "10.77.0.100";
pub const VIP6: &str = "fd77::100";
pub const BACK: &str = "10.78.0.100";

/// Time is part of these tests: one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("BATON_LOG"))
        .with_test_writer()
        .try_init();
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A switch with two bridges, and nodes with an interface on each.
pub struct Lab {
    pub switch: Netns,
    pub nodes: Vec<Netns>,
}

impl Lab {
    /// Node `i` has the addresses .2+i on front and back.
    pub fn new(nodes: usize) -> Self {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let lab = LABS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("bt-ha{}-{lab}", std::process::id());
        let switch = Netns::create(&format!("{prefix}-sw")).unwrap();
        let mut lab = Self { switch, nodes: Vec::new() };
        for bridge in ["front", "back"] {
            lab.switch
                .ip(&format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0"))
                .unwrap();
            lab.switch.ip(&format!("link set {bridge} up")).unwrap();
        }
        lab.switch.ip("addr add 10.77.0.1/24 dev front").unwrap();
        for node in 0..nodes {
            lab.nodes.push(Netns::create(&format!("{prefix}-n{node}")).unwrap());
            let settings = ["net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0"];
            run(lab.nodes[node].command("sysctl").arg("-qw").args(settings)).unwrap();
            lab.connect(node, "front");
            lab.connect(node, "back");
        }
        lab
    }

    /// Makes the interface of a node on a bridge, with its addresses.
    pub fn connect(&self, node: usize, bridge: &str) {
        let (name, host) = (self.nodes[node].name(), node + 2);
        let port = Self::port(node, bridge);
        self.switch
            .ip(&format!("link add {port} type veth peer name {bridge} netns {name}"))
            .unwrap();
        self.switch.ip(&format!("link set {port} master {bridge} up")).unwrap();
        let net = if bridge == "front" { 77 } else { 78 };
        for address in [format!("10.{net}.0.{host}/24"), format!("fd{net}::{host}/64")] {
            self.nodes[node].ip(&format!("addr add {address} dev {bridge}")).unwrap();
        }
        self.nodes[node].ip(&format!("link set {bridge} up")).unwrap();
    }

    /// The switch's end of a node's cable.
    pub fn port(node: usize, bridge: &str) -> String {
        format!("n{node}-{bridge}")
    }

    /// Whether the kernel of a node has an address.
    pub fn has(&self, node: usize, address: &str) -> bool {
        let shown = self.nodes[node].ip("-o addr show").unwrap();
        let text = String::from_utf8_lossy(&shown.stdout);
        text.lines().any(|line| line.split([' ', '/']).any(|word| word == address))
    }

    /// The nodes that have an address.
    pub fn holders(&self, address: &str) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.has(*node, address)).collect()
    }

    /// Waits until exactly this node has every one of the addresses.
    pub fn wait_for_holder(&self, node: usize, addresses: &[&str], within: Duration) {
        until(within, &format!("{addresses:?} on node {node} only"), || {
            addresses.iter().all(|address| self.holders(address) == [node])
        });
    }

    /// Starts a driver in a thread of this process.
    pub fn start(&self, node: usize, spec: &Spec) -> Running {
        let config = spec.config(node);
        let handle = self.nodes[node].enter(|| start(config, None)).unwrap().unwrap().0;
        Running { handle }
    }

    /// Starts a driver in a process of its own.
    pub fn spawn(&self, node: usize, spec: &Spec) -> Process {
        let child = self.nodes[node]
            .command(std::env::current_exe().unwrap().to_str().unwrap())
            .args(["child_process", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("BATON_HA_CHILD", format!("{node} {}", spec.to_text()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Process::new(child)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for netns in self.nodes.iter().chain([&self.switch]) {
            if let Err(error) = netns.remove() {
                eprintln!("remove {}: {error}", netns.name());
            }
        }
    }
}

/// What a node of a test is configured with.
#[derive(Debug, Clone)]
pub struct Spec {
    pub priority: u8,
    pub centiseconds: u16,
    pub preempt: bool,
    pub pseudo_header: bool,
    pub valid_lft: u64,
    pub realtime: bool,
    /// Of the front: `4`, `6`, or both; each `m`ulticast or `u`nicast between nodes 0 and 1.
    pub paths: &'static str,
    /// Whether there is a VIP on the back too.
    pub back: bool,
    /// Whether nodes 0 and 1 have a peer channel with each other.
    pub channel: bool,
}

/// The key of that channel.
pub const KEY: ClusterKey = ClusterKey::from_bytes([7; 32]);

impl Spec {
    pub fn new(priority: u8, centiseconds: u16) -> Self {
        Self {
            priority,
            centiseconds,
            preempt: true,
            pseudo_header: false,
            valid_lft: 3,
            realtime: true,
            paths: "4m6m",
            back: false,
            channel: false,
        }
    }

    pub fn interval(&self) -> Duration {
        Duration::from_millis(u64::from(self.centiseconds) * 10)
    }

    fn to_text(&self) -> String {
        format!(
            "{} {} {} {} {} {} {} {} {}",
            self.priority,
            self.centiseconds,
            self.preempt,
            self.pseudo_header,
            self.valid_lft,
            self.realtime,
            self.paths,
            self.back,
            self.channel
        )
    }

    fn from_text(text: &str) -> (usize, Self) {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [node, priority, centiseconds, preempt, pseudo, lft, realtime, paths, back, channel] =
            words[..]
        else {
            panic!("not a spec: {text}");
        };
        let spec = Self {
            priority: priority.parse().unwrap(),
            centiseconds: centiseconds.parse().unwrap(),
            preempt: preempt.parse().unwrap(),
            pseudo_header: pseudo.parse().unwrap(),
            valid_lft: lft.parse().unwrap(),
            realtime: realtime.parse().unwrap(),
            paths: String::leak(paths.to_owned()),
            back: back.parse().unwrap(),
            channel: channel.parse().unwrap(),
        };
        (node.parse().unwrap(), spec)
    }

    /// The configuration of a node.
    pub fn config(&self, node: usize) -> HaConfig {
        let other = if node == 0 { 3 } else { 2 };
        let vip = |address: &str, prefix, interface: &str| Vip {
            address: address.parse().unwrap(),
            prefix,
            interface: interface.to_owned(),
        };
        let mut vips = Vec::new();
        let mut paths = Vec::new();
        let path = |family, interface: &str, unicast: Option<String>, address: &str| Path {
            interface: interface.to_owned(),
            family,
            transport: match unicast {
                Some(peer) => Transport::Unicast(vec![peer.parse().unwrap()]),
                None => Transport::Multicast,
            },
            addresses: vec![address.parse().unwrap()],
        };
        for kind in self.paths.as_bytes().chunks(2) {
            let unicast = kind[1] == b'u';
            if kind[0] == b'4' {
                vips.push(vip(VIP4, 24, "front"));
                let peer = unicast.then(|| format!("10.77.0.{other}"));
                paths.push(path(Family::V4, "front", peer, VIP4));
            } else {
                vips.push(vip(VIP6, 64, "front"));
                let peer = unicast.then(|| format!("fd77::{other}"));
                paths.push(path(Family::V6, "front", peer, VIP6));
            }
        }
        if self.back {
            vips.push(vip(BACK, 24, "back"));
            paths.push(path(Family::V4, "back", None, BACK));
        }
        let peer = |node: usize| Peer {
            name: format!("n{node}"),
            addresses: [format!("10.77.0.{}", node + 2), format!("10.78.0.{}", node + 2)]
                .map(|address| address.parse().unwrap())
                .to_vec(),
        };
        HaConfig {
            node: format!("n{node}"),
            vrid: Vrid::new(VRID).unwrap(),
            priority: Priority::new(self.priority),
            advert_interval: AdverInterval::from_centiseconds(self.centiseconds).unwrap(),
            preempt: if self.preempt { Preempt::Enabled } else { Preempt::Disabled },
            startup_hold: Duration::ZERO,
            preempt_wait: Duration::from_secs(60),
            checksum: if self.pseudo_header {
                ChecksumForm::PseudoHeader
            } else {
                ChecksumForm::Plain
            },
            paths,
            vips,
            peers: (0..3).filter(|other| *other != node).map(peer).collect(),
            announce: AnnounceConfig::default(),
            valid_lft: Duration::from_secs(self.valid_lft),
            realtime: self.realtime,
            channel: self.channel.then(|| channel(node)),
        }
    }
}

fn channel(node: usize) -> ChannelConfig {
    let address = |node: usize| format!("10.78.0.{}:8112", node + 2).parse().unwrap();
    let peer = 1 - node;
    ChannelConfig {
        cluster: "lab".into(),
        key: KEY,
        address: address(node),
        peers: vec![ChannelPeer { name: format!("n{peer}"), address: address(peer) }],
        heartbeat: Duration::from_millis(20),
        replicates: false,
    }
}

/// A driver in a thread of this process.
pub struct Running {
    pub handle: Handle,
}

impl Running {
    pub fn view(&self) -> View {
        self.handle.view().borrow().clone()
    }

    pub fn state(&self) -> State {
        self.view().state
    }

    pub fn counter(&self, name: &str) -> u64 {
        let view = self.view();
        view.counters.iter().find(|(counter, _)| *counter == name).expect("a counter").1
    }

    pub fn wait_for(&self, state: State, within: Duration) {
        until(within, &format!("{state:?}"), || self.state() == state);
    }

    /// Waits for something of the async face.
    pub fn block<T>(&self, work: impl AsyncFnOnce(&Handle) -> T) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work(&self.handle))
    }

    pub fn shutdown(&self) {
        self.block(async |handle| handle.shutdown().await);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A process of ours, ended with the test. `ip netns exec` becomes the program that it starts.
pub struct Process {
    child: Child,
    pub lines: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Process {
    pub fn new(mut child: Child) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        if let Some(stdout) = child.stdout.take() {
            let lines = Arc::clone(&lines);
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    lines.lock().unwrap().push((Instant::now(), line));
                }
            });
        }
        Self { child, lines }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// `kill -9`, and gone.
    pub fn abort(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and its end.
    pub fn terminate(mut self) {
        self.signal(Signal::SIGTERM);
        self.child.wait().unwrap();
    }

    pub fn said(&self, what: &str) -> usize {
        self.lines.lock().unwrap().iter().filter(|(_, line)| line.contains(what)).count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What [`Lab::spawn`] runs; to be called from an ignored test named `child_process`. Ends when
/// its parent does.
pub fn child_process() {
    let Ok(text) = std::env::var("BATON_HA_CHILD") else { return };
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let (node, spec) = Spec::from_text(&text);
    let (handle, _port) = start(spec.config(node), None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let mut view = handle.view();
        let mut said = (None, 0);
        loop {
            let (state, stalled) = {
                let view = view.borrow_and_update();
                let stalled = view.counters.iter().find(|(name, _)| *name == "stalled");
                (view.state, stalled.map_or(0, |(_, count)| *count))
            };
            if said.0 != Some(state) {
                println!("state {state:?}");
            }
            if said.1 != stalled {
                println!("stalled {stalled}");
            }
            said = (Some(state), stalled);
            if view.changed().await.is_err() {
                return;
            }
        }
    });
}

/// Waits for something, looking every few milliseconds.
pub fn until(within: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < within, "not within {within:?}: {what}");
        thread::sleep(Duration::from_millis(3));
    }
}

/// Checks for a while that something stays as it is.
pub fn stays(during: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while start.elapsed() < during {
        assert!(holds(), "no longer so after {:?}: {what}", start.elapsed());
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

/// tcpdump in a namespace, its lines as they come.
pub fn tcpdump(netns: &Netns, interface: &str, filter: &str) -> Process {
    let child = netns
        .command("tcpdump")
        .args(["-l", "-nn", "-v", "-e", "--immediate-mode", "-i", interface])
        .args(filter.split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut process = Process::new(child);
    // It says on stderr when it listens.
    let mut stderr = BufReader::new(process.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening on") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "tcpdump ended");
    }
    thread::spawn(move || stderr.lines().for_each(drop));
    process
}

/// Sends Ethernet frames from the front of a node; how many went out.
pub fn send_frames(lab: &Lab, node: usize, frames: &[Vec<u8>]) -> usize {
    use std::os::fd::AsRawFd;
    let open = || {
        let index = nix::net::if_::if_nametoindex("front").unwrap();
        let socket = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, None);
        (socket.unwrap(), index)
    };
    let (socket, index) = lab.nodes[node].enter(open).unwrap();
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: a sockaddr_ll and its length.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    assert_eq!(bound, 0);
    frames.iter().filter(|frame| socket.send(frame).is_ok()).count()
}

/// A file of this process that nobody else has.
pub fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("bt-ha-{}-{name}", std::process::id()))
}

pub fn command_in(netns: &Netns, program: &str) -> Command {
    netns.command(program)
}
