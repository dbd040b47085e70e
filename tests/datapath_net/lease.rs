//! Silence when the lease is over: what is on the wire from a relay whose daemon is frozen or dead,
//! with its guard, so that nobody removes the addresses: ARP, Neighbor Advertisements, packets of
//! passthrough, dsr and proxy services.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton::lab::netns::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{Net, PATIENCE, service};
use crate::server::{connect, serve};

const VIP4: &str = "10.77.0.100";
const VIP6: &str = "fd77::100";
const PASSTHROUGH: &str = "mode = \"passthrough\"\nsource = \"vip\"\nprotocol = \"udp\"";
const PROXY: &str = "mode = \"proxy\"";

/// How late the wire may be by the clock of who listens there, on a busy machine.
const BUSY: f64 = 0.1;

/// A relay with services that the stack sees and one that it does not, and who uses them.
fn net() -> (Net, Traffic) {
    let mut net = Net::new();
    serve(&net.node("b1"), "b1", "10.78.0.11:8080");
    serve(&net.node("b1"), "b1", "[fd78::11]:8080");
    net.valid_lft = Some(20);
    net.start_relay(&services());
    let traffic = Traffic::start(&net.node("client"));
    (net, traffic)
}

fn services() -> String {
    let backend = &[("b1", "10.78.0.11:8080")];
    service("kernel", "front4", 80, PASSTHROUGH, backend)
        + &service("proxy", "front4", 81, PROXY, backend)
}

/// Asks all the time: by ARP and ND, by datagrams, over a session of the proxy.
struct Traffic {
    stop: Arc<AtomicBool>,
    asking: Vec<Child>,
}

impl Traffic {
    fn start(client: &Netns) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let udp = client.enter(|| UdpSocket::bind("10.77.0.10:0").unwrap()).unwrap();
        let to = (VIP4, 80);
        let asked = Arc::clone(&stop);
        thread::spawn(move || {
            while !asked.load(Ordering::Relaxed) {
                let _ = udp.send_to(b"?", to);
                thread::sleep(Duration::from_millis(2));
            }
        });
        // What the proxy echoes is under way all the time, so that there is something to repeat.
        let session = connect(client, "10.77.0.100:81", PATIENCE).unwrap();
        let mut writer = session.stream.try_clone().unwrap();
        thread::spawn(move || while writer.write_all(&[7; 4096]).is_ok() {});
        let mut reader = session.stream;
        thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        let ask = |args: &[&str]| {
            let mut command = client.command(args[0]);
            command.args(&args[1..]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        };
        let loop_of = |line: &str| format!("while :; do {line}; sleep 0.02; done");
        let arp = loop_of(&format!("arping -c 1 -w 1 -I front {VIP4}"));
        let arp = ask(&["sh", "-c", &arp]);
        let nd = loop_of(&format!(
            "ip -6 neigh flush dev front to {VIP6}; ping -6 -c 1 -W 1 -I front {VIP6}"
        ));
        let nd = ask(&["sh", "-c", &nd]);
        Self { stop, asking: vec![arp, nd] }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for child in &mut self.asking {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What comes from the VIPs to the client's network: when, and what.
struct Wire {
    child: Child,
    lines: thread::JoinHandle<Vec<(f64, String)>>,
}

impl Wire {
    fn listen(client: &Netns) -> Self {
        let mut child = client
            .command("tcpdump")
            .args(["-i", "front", "-n", "-tt", "-l", "--immediate-mode"])
            .arg(format!("src host {VIP4} or src host {VIP6}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert_ne!(said.read_line(&mut line).unwrap(), 0, "tcpdump has ended");
        }
        thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let out = BufReader::new(child.stdout.take().unwrap());
        let lines = thread::spawn(move || {
            let lines = out.lines().map_while(Result::ok);
            lines
                .filter_map(|line| {
                    let (at, what) = line.split_once(' ')?;
                    Some((at.parse().ok()?, what.to_owned()))
                })
                .collect()
        });
        Self { child, lines }
    }

    fn end(self) -> Vec<(f64, String)> {
        // With what it has in its hands.
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT).unwrap();
        let mut child = self.child;
        child.wait().unwrap();
        self.lines.join().unwrap()
    }
}

/// As the wire's timestamps are.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// The daemon, its guard, and what it was started by.
fn processes(net: &Net) -> Vec<Pid> {
    let mut all = vec![net.pid() as i32];
    let mut next = 0;
    while let Some(parent) = all.get(next) {
        let children = Command::new("pgrep").args(["-P", &parent.to_string()]).output().unwrap();
        let children = String::from_utf8(children.stdout).unwrap();
        all.extend(children.split_whitespace().map(|pid| pid.parse::<i32>().unwrap()));
        next += 1;
    }
    assert!(all.len() > 1, "no guard");
    all.into_iter().map(Pid::from_raw).collect()
}

fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _ = kill(*pid, signal);
    }
}

/// Whether every thread has stopped, or is no more.
fn stands(pids: &[Pid]) -> bool {
    pids.iter().all(|pid| {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['T', 't', 'Z', 'X']))
        })
    })
}

const KINDS: [(&str, &str); 4] = [
    ("ARP", "Reply 10.77.0.100 is-at"),
    ("ND", "neighbor advertisement, tgt is fd77::100"),
    ("passthrough", "IP 10.77.0.100.80 >"),
    ("proxy", "IP 10.77.0.100.81 >"),
];

/// What the wire says, from one moment on: how long after it each kind was last seen, if it was.
fn last(heard: &[(f64, String)], from: f64) -> Vec<(&'static str, Option<f64>)> {
    let last = |pattern: &str| {
        let times = heard.iter().filter(|(at, what)| *at >= from && what.contains(pattern));
        times.map(|(at, _)| at - from).reduce(f64::max)
    };
    KINDS.map(|(kind, pattern)| (kind, last(pattern))).to_vec()
}

fn silent_within_the_lease(net: &Net, how: Signal) {
    let lease = baton_ha::lease::length(net.interval).as_secs_f64();
    let wire = Wire::listen(&net.node("client"));
    let began = now();
    thread::sleep(Duration::from_millis(500));
    let pids = processes(net);
    signal(&pids, how);
    net.until("all of it stands", || stands(&pids));
    let stopped = now();
    thread::sleep(Duration::from_secs_f64(lease + 1.5));
    let addresses = net.node("relay").ip("-br addr show dev front").unwrap().stdout;
    let addresses = String::from_utf8_lossy(&addresses).into_owned();
    let heard = wire.end();
    assert!(
        addresses.contains(VIP4) && addresses.contains(VIP6),
        "they are still there: {addresses}"
    );
    for (kind, seen) in last(&heard, began) {
        assert!(seen.is_some(), "{kind} never came: the test shows nothing");
    }
    eprintln!(
        "{how:?}: lease {lease:.4} s; last heard after it stood: {:?}",
        last(&heard, stopped)
    );
    let late: Vec<_> = heard.iter().filter(|(at, _)| *at > stopped + lease + BUSY).collect();
    assert!(late.is_empty(), "{} too late: {:?}", late.len(), &late[..late.len().min(20)]);
}

#[test]
fn a_frozen_daemon_is_silent_within_its_lease_and_lets_go_when_it_wakes() {
    let (net, _traffic) = net();
    silent_within_the_lease(&net, Signal::SIGSTOP);
    // Its own stack would have spoken.
    let drops = net.drops();
    for reason in ["ARP_NO_LEASE", "ND_NO_LEASE", "GATE_CLOSED"] {
        assert!(drops[reason].as_u64().unwrap() > 0, "{reason}: {drops}");
    }
    let wire = Wire::listen(&net.node("client"));
    let pids = processes(&net);
    signal(&pids, Signal::SIGCONT);
    net.until("it has found out that it slept", || net.log().contains("this node slept"));
    net.until("it is Active once more", || {
        net.status()["election"]["reason"] != "stalled"
            && net.status()["election"]["state"] == "active"
    });
    drop(wire.end());
    // Once who asked in vain asks again.
    let again = || connect(&net.node("client"), "10.77.0.100:81", Duration::from_secs(1)).is_ok();
    net.until("it serves again", again);
}

#[test]
fn a_dead_daemon_without_a_guard_is_silent_within_its_lease() {
    let (net, _traffic) = net();
    silent_within_the_lease(&net, Signal::SIGKILL);
}

/// The monotonic clock of a process in a time namespace is not the kernel's.
#[test]
fn the_lease_holds_by_whatever_monotonic_clock() {
    for offset in ["100000", "-2000"] {
        let mut net = Net::new();
        serve(&net.node("b1"), "b1", "10.78.0.11:8080");
        net.valid_lft = Some(20);
        net.time_offset = Some(offset);
        net.start_relay(&services());
        let traffic = Traffic::start(&net.node("client"));
        silent_within_the_lease(&net, Signal::SIGSTOP);
        drop(traffic);
        signal(&processes(&net), Signal::SIGKILL);
    }
}
