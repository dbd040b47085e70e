//! A lab in hand: made, held against other processes, and removed with everything it left.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use baton_ha::channel::key::ClusterKey;
use baton_ha::vrrp::router::State;

use super::netns::{Netns, run};
use super::process::{self, Daemon, Lifetime, Process, Started};
use super::topology::{
    ECHO_PORT, HTTP_PORT, Node, Role, SOCKS_PORT, Segment, Topology, VIP_FRONT, VIP_FRONT6,
};
use super::{
    Doing, LabError, LabOptions, Mode, STATE, Servers, Software, check_name, check_root, drill,
    files, state, wiring,
};
use crate::datapath::bpffs;
use crate::status::FromActive;

/// How long servers may take to listen, and the first relay to become Active.
pub(super) const READY_PATIENCE: Duration = Duration::from_secs(10);

/// A lab in hand. While it exists, no other process can take the lab down or rebuild it. If its
/// lifetime is [`Lifetime::WithParent`], dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    /// What it is to be.
    pub options: LabOptions,
    /// What it consists of.
    pub topology: Topology,
    /// Its directory: configuration, logs, control sockets.
    pub dir: PathBuf,
    processes: Vec<Process>,
    _held: UnixListener,
}

/// What `lab.json` says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) topology: Topology,
    pub(super) software: Software,
    /// Set once everything runs.
    pub(super) complete: bool,
    pub(super) processes: Vec<Started>,
}

impl Lab {
    /// Makes the namespaces and starts the servers, but not the relays. Remains of a lab of that
    /// name are removed first.
    pub fn build(options: LabOptions, say: &mut dyn FnMut(&str)) -> Result<Self, LabError> {
        check_root()?;
        check_name(&options.name)?;
        let held = hold(&options.name)?;
        Self::build_held(options, held, say)
    }

    pub(super) fn build_held(
        options: LabOptions,
        held: UnixListener,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, LabError> {
        if remove_remains(&options.name)? {
            say("removed the remains of a lab that was killed");
        }
        let topology = Topology::with_links(&options.name, options.relays, options.links);
        let dir = Path::new(STATE).join(&options.name);
        std::fs::create_dir_all(&dir).doing(format!("making {}", dir.display()))?;
        let mut lab = Self { options, topology, dir, processes: Vec::new(), _held: held };
        let outcome = lab.furnish(say);
        if let Err(error) = outcome {
            // A lab that outlives its maker stays for a look at its logs only if it got far
            // enough to be called one: here it did not.
            let keep_logs = matches!(error, LabError::Daemon { .. });
            if !keep_logs || lab.options.lifetime == Lifetime::WithParent {
                let _ = remove_remains(&lab.options.name);
            }
            return Err(error);
        }
        Ok(lab)
    }

    fn furnish(&mut self, say: &mut dyn FnMut(&str)) -> Result<(), LabError> {
        self.record(false)?;
        say("wiring client, switch, relays and backends as network namespaces");
        wiring::build(&self.topology).doing("building the namespaces")?;
        self.prepare_mode()?;
        match self.options.servers {
            Servers::All => say("starting echo, web (nginx) and SOCKS (danted) servers"),
            Servers::Echo => say("starting the echo servers"),
        }
        for node in self.nodes(Role::Backend) {
            self.start_echo(&node.name)?;
        }
        if self.options.servers == Servers::All {
            for node in self.nodes(Role::Switch) {
                self.start_nginx(&node)?;
            }
            for node in self.nodes(Role::Backend) {
                self.start_nginx(&node)?;
                self.start_danted(&node)?;
            }
        }
        self.await_servers()?;
        for (index, node) in self.nodes(Role::Relay).iter().enumerate() {
            self.prepare_relay(index, node)?;
        }
        self.record(false)
    }

    /// What forwarding in the kernel needs besides the relays' configuration.
    fn prepare_mode(&self) -> Result<(), LabError> {
        if self.options.mode != Mode::Proxy {
            // In here, so that pins outlive the mount namespaces of the daemons.
            bpffs::mount_bpffs().doing("mounting a bpffs")?;
        }
        let key = files::key(&self.dir);
        if files::replicates(self.options.mode) && !key.exists() {
            let new = ClusterKey::generate().and_then(|new| new.save(&key));
            new.doing("making the cluster's key")?;
        }
        if self.options.mode == Mode::Dsr {
            for backend in self.nodes(Role::Backend) {
                let netns = self.netns(&backend.name);
                netns.sysctl(files::DSR_SYSCTLS).doing("kernel parameters of a backend")?;
                netns.ip_batch(&files::dsr_addresses()).doing("giving a backend the VIP")?;
            }
        }
        Ok(())
    }

    fn nodes(&self, role: Role) -> Vec<Node> {
        self.topology.role(role).cloned().collect()
    }

    /// The namespace of a node.
    pub fn netns(&self, node: &str) -> Netns {
        Netns::existing(&self.topology.namespace(node))
    }

    pub(super) fn start(&mut self, node: &str, daemon: &Daemon) -> Result<(), LabError> {
        let process = daemon
            .start(&self.netns(node), node, &self.dir, self.options.lifetime)
            .doing(format!("{node}: starting {}", daemon.name))?;
        let again = |old: &Process| {
            old.started.node == process.started.node && old.started.name == process.started.name
        };
        for mut old in self.processes.extract_if(.., |old| again(old)) {
            // What is started again has ended; this reaps it.
            let _ = old.ended();
        }
        self.processes.push(process);
        Ok(())
    }

    pub(super) fn write(&self, file: &str, text: &str) -> Result<String, LabError> {
        let path = self.dir.join(file);
        process::write(&path, text).doing("writing a configuration")?;
        Ok(path.display().to_string())
    }

    fn start_nginx(&mut self, node: &Node) -> Result<(), LabError> {
        let name = &node.name;
        let conf = self.write(&format!("{name}-nginx.conf"), &files::nginx(node, &self.dir))?;
        self.start(name, &Daemon::new("nginx", "nginx", ["-e", "stderr", "-c", &conf]))
    }

    fn start_danted(&mut self, node: &Node) -> Result<(), LabError> {
        let conf = self.write(
            &format!("{}-danted.conf", node.name),
            &files::danted(node, self.options.mode),
        )?;
        self.start(&node.name, &Daemon::new("danted", "danted", ["-f", &conf]))
    }

    /// Starts the echo server of a backend.
    pub fn start_echo(&mut self, node: &str) -> Result<(), LabError> {
        let port = ECHO_PORT.to_string();
        let mut args = vec!["lab".to_owned(), "serve-echo".into(), "--port".into(), port];
        if self.options.mode == Mode::Dsr {
            for vip in [VIP_FRONT.to_string(), VIP_FRONT6.to_string()] {
                args.extend(["--also".to_owned(), vip]);
            }
        }
        self.start(node, &Daemon::new("echo", self.options.binary.clone(), args))
    }

    /// Waits until every server accepts connections, as the client sees it.
    fn await_servers(&mut self) -> Result<(), LabError> {
        let ports: &[(u16, &str)] = match self.options.servers {
            Servers::All => &[(ECHO_PORT, "echo"), (HTTP_PORT, "nginx"), (SOCKS_PORT, "danted")],
            Servers::Echo => &[(ECHO_PORT, "echo")],
        };
        let client = self.netns("client");
        for node in self.nodes(Role::Backend) {
            for (port, name) in ports {
                let address = SocketAddr::new(node.links[0].v4.into(), *port);
                let deadline = Instant::now() + READY_PATIENCE;
                while !client.enter(|| accepts(address)).doing("entering the client")? {
                    self.check_daemon(&node.name, name)?;
                    drill::check_signals()?;
                    if Instant::now() > deadline {
                        return Err(self.daemon_error(&node.name, name, "does not listen".into()));
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        Ok(())
    }

    fn prepare_relay(&self, index: usize, node: &Node) -> Result<(), LabError> {
        let interval = self.options.advert_interval;
        let name = &node.name;
        match self.options.software {
            Software::Baton => {
                let text = files::baton(&self.topology, index, &self.options, &self.dir);
                self.write(&format!("{name}.toml"), &text)?;
            }
            software @ (Software::Keepalived | Software::Conntrackd) => {
                let shares = software == Software::Conntrackd;
                let notify = shares.then(|| files::notify(node, &self.dir));
                let text = files::keepalived(node, index, interval, notify.as_deref());
                self.write(&format!("{name}-keepalived.conf"), &text)?;
                if shares {
                    let text = files::conntrackd(&self.topology, node, &self.dir);
                    self.write(&format!("{name}-conntrackd.conf"), &text)?;
                    self.write(
                        &format!("{name}-notify.sh"),
                        &files::notify_script(node, &self.dir),
                    )?;
                }
                let rules = files::nftables(&self.topology, software);
                let rules = self.write("relays.nft", &rules)?;
                let netns = self.netns(name);
                run(netns.command("nft").args(["-f", &rules])).doing("loading nftables rules")?;
                netns.sysctl(files::KEEPALIVED_SYSCTLS).doing("kernel parameters of a relay")?;
            }
        }
        Ok(())
    }

    /// Starts the daemon of a relay.
    pub fn start_relay(&mut self, node: &str) -> Result<(), LabError> {
        let daemon = match self.options.software {
            Software::Baton => {
                let file = self.dir.join(format!("{node}.toml")).display().to_string();
                Daemon::new("relay", self.options.binary.clone(), ["run", "-c", &file])
            }
            Software::Keepalived | Software::Conntrackd => {
                if self.options.software == Software::Conntrackd {
                    self.start_conntrackd(node)?;
                }
                let file = |suffix: &str| self.dir.join(format!("{node}-keepalived.{suffix}"));
                let [conf, pid, vrrp] =
                    ["conf", "pid", "vrrp.pid"].map(|suffix| file(suffix).display().to_string());
                // A killed keepalived leaves its pid files, and would not start over them.
                for stale in [&pid, &vrrp] {
                    let _ = std::fs::remove_file(stale);
                }
                let args = ["-n", "-l", "-D", "-P", "-f", &conf, "-p", &pid, "-r", &vrrp];
                Daemon::new("relay", "keepalived", args)
            }
        };
        self.start(node, &daemon)
    }

    /// Before keepalived, whose scripts speak to it.
    fn start_conntrackd(&mut self, node: &str) -> Result<(), LabError> {
        let dir = self.dir.clone();
        let file = |suffix: &str| dir.join(format!("{node}-conntrackd.{suffix}"));
        // A killed conntrackd leaves them, and would not start over them.
        for stale in ["lock", "ctl"] {
            let _ = std::fs::remove_file(file(stale));
        }
        let conf = file("conf").display().to_string();
        self.start(node, &Daemon::new("conntrackd", "conntrackd", ["-C", &conf]))?;
        let deadline = Instant::now() + READY_PATIENCE;
        while !file("ctl").exists() {
            self.check_daemon(node, "conntrackd")?;
            drill::check_signals()?;
            if Instant::now() > deadline {
                return Err(self.daemon_error(node, "conntrackd", "opens no socket".into()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts the first relay, waits until it holds the VIP, then starts the others, so that the
    /// same one is Active in every lab; says which.
    pub fn start_relays(&mut self) -> Result<String, LabError> {
        let relays: Vec<String> = self.nodes(Role::Relay).into_iter().map(|n| n.name).collect();
        let (first, others) = relays.split_first().expect("a lab has at least one relay");
        self.start_relay(first)?;
        self.await_holder(first)?;
        for relay in others {
            self.start_relay(relay)?;
        }
        if self.options.software == Software::Baton {
            others.iter().try_for_each(|relay| self.await_backup(relay))?;
        }
        self.record(false)?;
        Ok(first.clone())
    }

    fn await_holder(&mut self, relay: &str) -> Result<(), LabError> {
        let patience = READY_PATIENCE + self.options.advert_interval * 8;
        let deadline = Instant::now() + patience;
        while self.holders()? != [relay] {
            self.check_daemon(relay, "relay")?;
            if Instant::now() > deadline {
                let what = format!("does not claim {VIP_FRONT} within {patience:?}");
                return Err(self.daemon_error(relay, "relay", what));
            }
            drill::check_signals()?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until a relay is Backup, and has the Active's flows where they are replicated.
    pub(super) fn await_backup(&mut self, relay: &str) -> Result<(), LabError> {
        let deadline = Instant::now() + READY_PATIENCE;
        let socket = process::socket(&self.dir, relay);
        loop {
            let status = state::ask(&socket);
            let election = status.as_ref().and_then(|status| status.election.as_ref());
            let backup = election.is_some_and(|election| election.state == State::Backup);
            let flows = status.as_ref().and_then(|status| status.replication.as_ref()?.from);
            if backup
                && (!files::replicates(self.options.mode) || flows == Some(FromActive::InSync))
            {
                return Ok(());
            }
            self.check_daemon(relay, "relay")?;
            if Instant::now() > deadline {
                let what = format!("is no Backup that could take over within {READY_PATIENCE:?}");
                return Err(self.daemon_error(relay, "relay", what));
            }
            drill::check_signals()?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The relays on whose interface the VIP is, asked of their kernels.
    pub fn holders(&self) -> Result<Vec<String>, LabError> {
        holders(&self.topology)
    }

    /// The daemon of that name on a node.
    pub fn process(&mut self, node: &str, name: &str) -> Option<&mut Process> {
        self.processes.iter_mut().find(|p| p.started.node == node && p.started.name == name)
    }

    pub(super) fn check_daemon(&mut self, node: &str, name: &str) -> Result<(), LabError> {
        let Some(process) = self.process(node, name) else { return Ok(()) };
        match process.ended().doing("looking after a daemon")? {
            None => Ok(()),
            Some(status) => Err(self.daemon_error(node, name, format!("ended: {status}"))),
        }
    }

    pub(super) fn daemon_error(&mut self, node: &str, name: &str, what: String) -> LabError {
        let log = self.process(node, name).map(|process| process.started.log.clone());
        let log = log.unwrap_or_default();
        LabError::Daemon {
            node: node.to_owned(),
            name: name.to_owned(),
            what,
            tail: process::tail(&log),
            log: log.display().to_string(),
        }
    }

    pub(super) fn record(&self, complete: bool) -> Result<(), LabError> {
        let record = Record {
            topology: self.topology.clone(),
            software: self.options.software,
            complete,
            processes: self.processes.iter().map(|process| process.started.clone()).collect(),
        };
        let text = serde_json::to_string_pretty(&record).expect("plain data is JSON");
        // In one step: `down` must never read half a record.
        let (path, new) = (self.dir.join("lab.json"), self.dir.join("lab.json.new"));
        process::write(&new, &text).doing("writing the lab's record")?;
        std::fs::rename(&new, &path).doing("writing the lab's record")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.options.lifetime == Lifetime::WithParent {
            if let Err(error) = remove_remains(&self.options.name) {
                eprintln!("baton: {error}; `baton lab down --name {}`", self.options.name);
            }
            for process in &mut self.processes {
                // Killed with its namespace; this only reaps it.
                let _ = process.ended();
            }
        }
    }
}

pub(super) fn accepts(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok()
}

/// Takes the lab of that name into this process's hands until the listener is dropped. An
/// abstract socket, so that nothing is left when the process is killed.
pub(super) fn hold(name: &str) -> Result<UnixListener, LabError> {
    let address = std::os::unix::net::SocketAddr::from_abstract_name(format!("baton-lab-{name}"))
        .doing("making an abstract socket address")?;
    UnixListener::bind_addr(&address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => LabError::Busy(name.to_owned()),
        _ => LabError::Io { doing: "binding an abstract socket".into(), source },
    })
}

pub(super) fn holders(topology: &Topology) -> Result<Vec<String>, LabError> {
    let mut holders = Vec::new();
    for relay in topology.role(Role::Relay) {
        let netns = Netns::existing(&topology.namespace(&relay.name));
        let interface = Segment::Front.interface();
        let output = netns
            .ip(&format!("-o addr show dev {interface} to {VIP_FRONT}"))
            .doing(format!("{}: listing addresses", relay.name))?;
        if !output.stdout.is_empty() {
            holders.push(relay.name.clone());
        }
    }
    Ok(holders)
}

pub(super) fn read_record(name: &str) -> Option<Record> {
    let text = std::fs::read_to_string(Path::new(STATE).join(name).join("lab.json")).ok()?;
    serde_json::from_str(&text).ok()
}

/// Removes every process, namespace and file of a lab; `false` if there was nothing.
pub(super) fn remove_remains(name: &str) -> Result<bool, LabError> {
    let dir = Path::new(STATE).join(name);
    if !dir.exists() {
        return Ok(false);
    }
    if let Some(record) = read_record(name) {
        // Relays and client before the switch, so that nothing notices a link going down.
        for node in record.topology.nodes.iter().rev() {
            let netns = Netns::existing(&record.topology.namespace(&node.name));
            if netns.exists() {
                let pins = bpffs::of(&netns.path());
                netns.remove().doing(format!("removing namespace {}", netns.name()))?;
                // Of a datapath that was attached in there.
                pins.and_then(|pins| bpffs::remove_all(&pins)).doing("removing pins")?;
            }
        }
    }
    std::fs::remove_dir_all(&dir).doing(format!("removing {}", dir.display()))?;
    // Fails while there are other labs, as it should.
    let _ = std::fs::remove_dir(STATE);
    Ok(true)
}
