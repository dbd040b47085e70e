//! Client, two relays, two Dante servers and a web server, configured by docs/dante.md.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use baton::lab::netns::{Netns, run};
use baton::lab::process::Lifetime;
use baton::lab::topology::Links;
use baton::lab::{Lab, LabOptions, Mode, Servers, Software};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

pub(crate) const CLIENT: &str = "10.77.0.10";
pub(crate) const VIP: &str = "10.77.0.100:1080";
pub(crate) const WEB: &str = "10.78.0.1:80";
pub(crate) const RELAYS: [&str; 2] = ["relay1", "relay2"];
/// The servers' nodes and addresses.
pub(crate) const SERVERS: [(&str, &str); 2] =
    [("backend1", "10.78.0.11"), ("backend2", "10.78.0.12")];

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

/// The text of the first block of that kind in docs/dante.md.
pub(crate) fn documented(kind: &str) -> String {
    let page = include_str!("../../docs/dante.md");
    let (_, rest) = page.split_once(&format!("```{kind}\n")).expect("the page has such a block");
    rest.split_once("```").expect("blocks end").0.to_owned()
}

/// The whole of it; everything goes when it is dropped.
pub(crate) struct Pool {
    servers: Vec<Option<Server>>,
    lab: Lab,
}

impl Pool {
    /// With this `danted.conf`, the relays running, and every server up on each.
    pub(crate) fn new(danted: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let lab = Lab::build(
            LabOptions {
                name: format!("bt-dante-{}-{count}", std::process::id()),
                relays: RELAYS.len(),
                links: Links::Two,
                binary: env!("CARGO_BIN_EXE_baton").into(),
                software: Software::Baton,
                mode: Mode::Proxy,
                servers: Servers::Echo,
                advert_interval: Duration::from_millis(100),
                heartbeat: baton::lab::HEARTBEAT,
                many: None,
                lifetime: Lifetime::WithParent,
            },
            &mut |_| {},
        )
        .expect("a lab (needs root)");
        std::fs::write(lab.dir.join("danted.conf"), danted).expect("a file");
        for (relay, text) in RELAYS.into_iter().zip(relay_files()) {
            let control = lab.dir.join(format!("{relay}.sock"));
            let text = text.replacen(
                "[node]\n",
                &format!(
                    "[node]\ncontrol = \"{}\"\nstate_dir = \"{}\"\n",
                    control.display(),
                    lab.dir.join(relay).display()
                ),
                1,
            );
            std::fs::write(lab.dir.join(format!("{relay}.toml")), text).expect("a file");
        }
        serve_web(&lab.netns("switch"));
        let mut pool = Self { servers: vec![None, None], lab };
        for server in 0..SERVERS.len() {
            pool.start_server(server);
        }
        pool.lab.start_relays().expect("relays");
        for relay in RELAYS {
            eventually(&format!("{relay} answers"), || {
                UnixStream::connect(pool.lab.dir.join(format!("{relay}.sock"))).is_ok()
            });
            for (server, (_, address)) in SERVERS.into_iter().enumerate() {
                eventually(&format!("{address} is up on {relay}"), || {
                    pool.health(relay, server).0 == "up"
                });
            }
        }
        pool
    }

    pub(crate) fn documented() -> Self {
        Self::new(&documented("conf"))
    }

    pub(crate) fn netns(&self, node: &str) -> Netns {
        self.lab.netns(node)
    }

    pub(crate) fn start_server(&mut self, server: usize) {
        let (node, _) = SERVERS[server];
        let conf = self.lab.dir.join("danted.conf").display().to_string();
        let pid = self.lab.dir.join(format!("{node}.pid")).display().to_string();
        let log = File::create(self.log(server)).expect("a log");
        let child = self
            .netns(node)
            .command("danted")
            .args(["-f", &conf, "-p", &pid])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("danted starts");
        self.servers[server] = Some(Server { child });
    }

    /// Sends a signal to every process of a server.
    pub(crate) fn signal(&self, server: usize, signal: Signal) {
        let running = self.servers[server].as_ref().expect("it runs");
        killpg(running.group(), signal).expect("it runs");
    }

    fn log(&self, server: usize) -> std::path::PathBuf {
        self.lab.dir.join(format!("{}-danted.log", SERVERS[server].0))
    }

    pub(crate) fn log_text(&self, server: usize) -> String {
        std::fs::read_to_string(self.log(server)).expect("a log")
    }

    /// What a relay's `baton status` says of a server: health and why.
    pub(crate) fn health(&self, relay: &str, server: usize) -> (String, String) {
        let status = self.baton(relay, &["status", "--json"]);
        let status: Value = serde_json::from_str(&status).expect("JSON");
        let service = &status["services"][0];
        assert_eq!(service["name"], "socks");
        let backend = &service["backends"][server];
        let text = |key: &str| backend[key].as_str().expect("text").to_owned();
        (text("health"), text("reason"))
    }

    /// Runs a command of Baton's on a relay; what it prints.
    pub(crate) fn baton(&self, relay: &str, args: &[&str]) -> String {
        let socket = self.lab.dir.join(format!("{relay}.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
        printed(command.args(args).env("BATON_SOCKET", socket))
    }

    /// What a command on a node prints.
    pub(crate) fn on(&self, node: &str, line: &str) -> String {
        let mut words = line.split_whitespace();
        printed(self.netns(node).command(words.next().expect("a program")).args(words))
    }

    /// Does something inside the client.
    pub(crate) fn as_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns("client").enter(work).expect("the client's namespace")
    }
}

fn printed(command: &mut Command) -> String {
    String::from_utf8(run(command).expect("it works").stdout).expect("text")
}

/// The page has the first relay's file and says how the second's differs.
fn relay_files() -> [String; 2] {
    let first = documented("toml");
    let mut second = first.clone();
    for (from, to) in [
        ("[node]\nname = \"relay1\"", "[node]\nname = \"relay2\""),
        ("[[cluster.peers]]\nname = \"relay2\"", "[[cluster.peers]]\nname = \"relay1\""),
        ("[\"10.77.0.3\", \"10.78.0.3\"]", "[\"10.77.0.2\", \"10.78.0.2\"]"),
        ("priority = 200", "priority = 150"),
    ] {
        assert!(second.contains(from), "the page has {from}");
        second = second.replacen(from, to, 1);
    }
    [first, second]
}

/// A web server that says who came: the Dante server. Its threads end with the test.
fn serve_web(switch: &Netns) {
    for address in [WEB, "[fd78::1]:80"] {
        let listener = switch.enter(|| TcpListener::bind(address)).expect("the switch");
        let listener = listener.expect("a port");
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || answer(stream.expect("a connection")));
            }
        });
    }
}

fn answer(mut stream: TcpStream) {
    let Ok(peer) = stream.peer_addr() else { return };
    // Health checks ask for nothing.
    let mut request = [0; 4096];
    if matches!(stream.read(&mut request), Ok(1..)) {
        let text = format!("HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n{}", peer.ip());
        let _ = stream.write_all(text.as_bytes());
    }
}

/// A danted with its children; ends when dropped.
pub(crate) struct Server {
    child: Child,
}

impl Server {
    fn group(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Not waited for yet, so the number is still its own.
        let _ = killpg(self.group(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

pub(crate) fn ip(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

pub(crate) fn socket(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The server that has this address.
pub(crate) fn server_of(address: IpAddr) -> usize {
    let found = SERVERS.iter().position(|(_, server)| address == IpAddr::V4(ip(server)));
    found.unwrap_or_else(|| panic!("{address} is no server's"))
}
