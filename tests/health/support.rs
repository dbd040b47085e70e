//! What the tests share: namespaces and servers that go away with them, and verdicts.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use baton::health::Checks;
use baton::lab::netns::{Netns, run};
use baton::pool::{Health, Member, Pool};
use baton::service::{
    Backend, Check, FlowPolicy, Limits, Mode, Probe, Protocol, ProxyProtocol, Scheduler, Service,
};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Longer than anything here takes, on a machine as busy as can be.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until it is so.
pub(crate) fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A namespace of the test's own with a directory; both go with it.
pub(crate) struct Space {
    pub(crate) ns: Netns,
    pub(crate) dir: tempfile::TempDir,
}

impl Space {
    /// With these addresses on its loopback, besides the usual ones.
    pub(crate) fn new(addresses: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bt-health-{}-{count}", std::process::id());
        let space = Self {
            ns: Netns::create(&name).expect("a namespace (needs root)"),
            dir: tempfile::tempdir().expect("a directory"),
        };
        for address in addresses {
            space.ns.ip(&format!("addr add {address} dev lo nodad")).expect("an address");
        }
        space
    }

    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).expect("a file");
        path
    }

    /// Runs a command to its end in the namespace.
    pub(crate) fn run(&self, line: &str) {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a program");
        run(self.ns.command(program).args(words)).expect("it works");
    }

    /// Filters packets at a hook by these rules, in place of those before.
    pub(crate) fn filter(&self, hook: &str, rules: &str) {
        let text = format!(
            "table inet t\ndelete table inet t\ntable inet t {{\n chain c {{\n  type filter hook {hook} priority 0\n  {rules}\n }}\n}}\n"
        );
        let file = self.file("rules.nft", &text);
        self.run(&format!("nft -f {}", file.display()));
    }

    /// A file that programs of the namespace see in /etc.
    pub(crate) fn etc(&self, name: &str, content: &str) {
        let dir = self.etc_dir();
        std::fs::create_dir_all(&dir).expect("a directory");
        std::fs::write(dir.join(name), content).expect("a file");
    }

    fn etc_dir(&self) -> PathBuf {
        Path::new("/etc/netns").join(self.ns.name())
    }

    /// Starts a server and waits until it accepts connections.
    pub(crate) fn serve(&self, line: &str, at: &[&str]) -> Server {
        let mut words = line.split_whitespace();
        let log = std::fs::File::create(self.dir.path().join("log")).expect("a log");
        let child = self
            .ns
            .command(words.next().expect("a program"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("the server starts");
        let mut server = Server { child };
        for address in at {
            let address: SocketAddr = address.parse().expect("an address");
            let start = Instant::now();
            while self.ns.enter(|| TcpStream::connect(address).is_err()).expect("the namespace") {
                let ended = server.child.try_wait().expect("a child").is_some();
                let log = std::fs::read_to_string(self.dir.path().join("log")).expect("a log");
                assert!(!ended && start.elapsed() < PATIENCE, "{line}: {address}: {log}");
                thread::sleep(Duration::from_millis(20));
            }
        }
        server
    }

    /// The verdict on this backend, probed from within.
    pub(crate) fn verdict(&self, probe: Probe, address: &str) -> (Health, String) {
        let address = address.parse().expect("an address");
        let row = vec![(probe, address)];
        self.ns.enter(|| verdicts(row)).expect("the namespace").remove(0)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // Most have none.
        let _ = std::fs::remove_dir_all(self.etc_dir());
        if let Err(error) = self.ns.remove() {
            eprintln!("{}: {error}", self.ns.name());
        }
    }
}

/// A process group that ends with it.
pub(crate) struct Server {
    child: Child,
}

impl Server {
    /// Sends a signal to every process of the server.
    pub(crate) fn signal(&self, signal: Signal) {
        killpg(Pid::from_raw(self.child.id().cast_signed()), signal).expect("it runs");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Not waited for yet, so the number is still its own.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// What a made-up server does with each connection, after it has read something where it says
/// something.
#[derive(Clone)]
pub(crate) enum Does {
    Nothing,
    Says(Vec<u8>),
    SaysAndCloses(Vec<u8>),
    SaysForEver(Vec<u8>),
    Resets,
}

/// A made-up server on the loopback; its thread ends with the test.
pub(crate) fn fake(does: Does) -> SocketAddr {
    counted(does).0
}

/// And the number of connections it has had.
pub(crate) fn counted(does: Does) -> (SocketAddr, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let does = does.clone();
            counter.fetch_add(1, Ordering::Relaxed);
            thread::spawn(move || behave(stream.expect("a connection"), does));
        }
    });
    (address, count)
}

fn behave(mut stream: TcpStream, does: Does) {
    let mut asked = [0; 4096];
    // What goes wrong here shows in the probe.
    match does {
        Does::Nothing => drop(std::io::copy(&mut stream, &mut std::io::sink())),
        Does::Says(text) => {
            let _ = stream.read(&mut asked);
            let _ = stream.write_all(&text);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
        Does::SaysAndCloses(text) => {
            let _ = stream.read(&mut asked);
            let _ = stream.write_all(&text);
        }
        Does::SaysForEver(text) => {
            let _ = stream.read(&mut asked);
            while stream.write_all(&text).is_ok() {}
        }
        Does::Resets => {
            let _ = stream.read(&mut asked);
            let socket = socket2::Socket::from(stream);
            socket.set_linger(Some(Duration::ZERO)).expect("a socket option");
        }
    }
}

/// A port of the loopback that refuses connections, for as long as the socket lives.
pub(crate) fn refusing() -> (SocketAddr, socket2::Socket) {
    let socket =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    let address = socket.local_addr().expect("an address").as_socket().expect("an ip address");
    (address, socket)
}

pub(crate) fn check(probe: Probe) -> Check {
    Check {
        name: "check".into(),
        probe,
        interval: Duration::from_secs(2),
        timeout: Duration::from_secs(2),
        rise: 2,
        fall: 2,
        port: None,
    }
}

/// A service with these backends, all checked alike.
pub(crate) fn pool(name: &str, check: &Check, backends: &[SocketAddr]) -> Arc<Pool> {
    let backend = |address: &SocketAddr| Backend {
        name: format!("b{}", address.port()),
        address: *address,
        weight: 1,
        max_connections: 100,
    };
    Arc::new(Pool::new(Arc::new(Service {
        name: name.into(),
        listen: "192.0.2.1:80".parse().expect("an address"),
        protocol: Protocol::Tcp,
        mode: Mode::Proxy,
        scheduler: Scheduler::RoundRobin,
        backends: backends.iter().map(backend).collect(),
        check: Some(Arc::new(check.clone())),
        limits: Limits {
            max_connections: 100,
            max_connections_per_source: 100,
            connect_timeout: Duration::from_secs(1),
            connect_retries: 0,
            idle_timeout: Duration::from_secs(1),
            half_close_timeout: Duration::from_secs(1),
            affinity: None,
        },
        flows: FlowPolicy::of(Protocol::Tcp),
        proxy_protocol: ProxyProtocol::Off,
    })))
}

/// Runs the checks of these pools on this thread (and in its namespace) while `work` goes on on
/// another.
pub(crate) fn with_checks<T: Send>(
    pools: &[Arc<Pool>],
    work: impl FnOnce(&[Arc<Pool>]) -> T + Send,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let checks = runtime.block_on(async { Checks::start(pools) });
    let result = thread::scope(|scope| {
        let working = scope.spawn(|| work(pools));
        runtime.block_on(async {
            while !working.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        working.join()
    });
    drop(checks);
    // What the checks leave behind (scripts to be waited for) is done with here.
    runtime.block_on(async { tokio::time::sleep(Duration::from_millis(50)).await });
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The first verdict on each, all probed side by side.
pub(crate) fn verdicts(rows: Vec<(Probe, SocketAddr)>) -> Vec<(Health, String)> {
    let pools: Vec<_> = rows
        .into_iter()
        .enumerate()
        .map(|(row, (probe, address))| pool(&format!("s{row}"), &check(probe), &[address]))
        .collect();
    with_checks(&pools, |pools| pools.iter().map(|pool| first_verdict(&pool.members[0])).collect())
}

pub(crate) fn first_verdict(member: &Member) -> (Health, String) {
    eventually("a verdict", || member.health() != Health::Unknown);
    let report = member.report();
    assert!(report.checked.is_some() && report.took.is_some(), "{report:?}");
    (member.health(), report.reason)
}

pub(crate) fn up() -> (Health, String) {
    (Health::Up, "answers".into())
}

pub(crate) fn down(reason: &str) -> (Health, String) {
    (Health::Down, reason.into())
}

/// Waits until the health is that, and says how long it took.
pub(crate) fn becomes(member: &Member, health: Health) -> Duration {
    let start = Instant::now();
    eventually(&format!("{} is {health}", member.backend.name), || member.health() == health);
    start.elapsed()
}

/// The processes of a process group, zombies included, with their states.
pub(crate) fn group(id: i32) -> Vec<(i32, char)> {
    let processes = Path::new("/proc").read_dir().expect("/proc");
    processes
        .filter_map(|entry| {
            let stat = std::fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
            let pid = stat.split(' ').next()?.parse().ok()?;
            // pid (comm) state ppid pgrp …
            let mut rest = stat.rsplit(") ").next()?.split(' ');
            let state = rest.next()?.chars().next()?;
            let group: i32 = rest.nth(1)?.parse().ok()?;
            (group == id).then_some((pid, state))
        })
        .collect()
}

/// A command's standard output.
pub(crate) fn printed(command: &mut Command) -> String {
    let output = run(command).expect("it works");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
