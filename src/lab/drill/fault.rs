//! The faults: how each is done, and how it is made good again.

use std::cell::RefCell;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::peers::{self, Cut, Impostor};
use super::report::ms;
use crate::control::{self, Reply, Request};
use crate::lab::netns::Netns;
use crate::lab::process::signal;
use crate::lab::topology::{Segment, VIP_BACK, VIP_FRONT, VIP_FRONT6};
use crate::lab::{Doing, Lab, LabError};

/// How long a relay may take to end after SIGTERM.
const RESTART_PATIENCE: Duration = Duration::from_secs(15);
/// How long a relay may take to do what a command asks; a yield waits for its Backup.
const COMMAND_PATIENCE: Duration = Duration::from_secs(180);

/// How long a relay may take to be in sync after a takeover.
const SYNC_PATIENCE: Duration = Duration::from_secs(20);
/// Between two takeovers.
const BETWEEN: Duration = Duration::from_millis(150);
/// How long a takeover may take to answer whose other end was killed.
const KILLED_PATIENCE: Duration = Duration::from_secs(15);
/// A kill in the middle comes so soon after the command at the latest.
const MIDDLE: Duration = Duration::from_millis(8);

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL of the Active's daemon; started again later.
    Kill,
    /// SIGSTOP of the Active's daemon; SIGCONT after the takeover.
    Pause,
    /// The Active's front link loses its carrier; comes back later.
    LinkDown,
    /// Both links of the Active cut and its processes gone, at once; powered on again later.
    PowerOff,
    /// `baton takeover` on the Backup.
    Takeover,
    /// SIGKILL of the Active's daemon in the middle of `baton takeover` on the Backup; started again
    /// later.
    TakeoverKill,
    /// SIGKILL of the Backup's daemon in the middle of `baton takeover` there; started again later.
    TakeoverKillBackup,
    /// `baton yield` on the Active.
    Yield,
    /// SIGTERM of the Active's daemon; started again at once.
    Restart,
    /// SIGKILL of a backend's server; started again later.
    BackendKill,
    /// SIGSTOP of a backend's server; SIGCONT later.
    BackendHang,
    /// The Active's back link loses its carrier; comes back later.
    BackLinkDown,
    /// The peer channel loses every packet; mended later.
    ChannelCut,
    /// What the Active sends to the Backup is lost, on every path; mended later.
    OneWayOut,
    /// What the Backup sends to the Active is lost, on every path; mended later.
    OneWayIn,
    /// Neither relay hears the other on any path; mended later.
    Partition,
    /// SIGTERM of both daemons; started again at once.
    RestartBoth,
    /// The Backup is killed in the middle of a snapshot of many flows, and started again.
    RestartInSnapshot,
    /// The peer channel is cut while there are more new flows than the journal keeps.
    JournalFull,
    /// The Backup is started with another cluster key; with the right one later.
    KeyChanged,
    /// In the Backup's place there is a node of a version that this one can't speak with.
    OldVersion,
}

/// Who is to have the VIP after a fault, before anything is made good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// Who had it.
    Active,
    /// The other one.
    Backup,
    /// One of the two.
    One,
    /// Both: they can't know of each other.
    Both,
}

impl Fault {
    /// Its name, as written on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::LinkDown => "link-down",
            Self::PowerOff => "power-off",
            Self::Takeover => "takeover",
            Self::TakeoverKill => "takeover-kill",
            Self::TakeoverKillBackup => "takeover-kill-backup",
            Self::Yield => "yield",
            Self::Restart => "restart",
            Self::BackendKill => "backend-kill",
            Self::BackendHang => "backend-hang",
            Self::BackLinkDown => "back-link-down",
            Self::ChannelCut => "channel-cut",
            Self::OneWayOut => "one-way-out",
            Self::OneWayIn => "one-way-in",
            Self::Partition => "partition",
            Self::RestartBoth => "restart-both",
            Self::RestartInSnapshot => "restart-in-snapshot",
            Self::JournalFull => "journal-full",
            Self::KeyChanged => "key-changed",
            Self::OldVersion => "old-version",
        }
    }

    /// Who is to have the VIP afterwards.
    pub(super) fn holder(self) -> Holder {
        match self {
            Self::Kill
            | Self::Pause
            | Self::LinkDown
            | Self::PowerOff
            | Self::Takeover
            | Self::TakeoverKill
            | Self::Yield
            | Self::Restart
            | Self::BackLinkDown => Holder::Backup,
            Self::BackendKill
            | Self::BackendHang
            | Self::TakeoverKillBackup
            | Self::ChannelCut
            | Self::OneWayIn
            | Self::RestartInSnapshot
            | Self::JournalFull
            | Self::KeyChanged
            | Self::OldVersion => Holder::Active,
            Self::OneWayOut | Self::RestartBoth => Holder::One,
            Self::Partition => Holder::Both,
        }
    }

    /// Whether it is one of replication: it needs a peer channel, and afterwards the Backup takes
    /// over, to show that it has every flow.
    pub fn is_of_replication(self) -> bool {
        matches!(
            self,
            Self::ChannelCut
                | Self::RestartInSnapshot
                | Self::JournalFull
                | Self::KeyChanged
                | Self::OldVersion
        )
    }

    /// Whether it takes more flows than clients of the lab make.
    pub(super) fn needs_many(self) -> bool {
        matches!(self, Self::RestartInSnapshot | Self::JournalFull)
    }

    fn hits_backend(self) -> bool {
        matches!(self, Self::BackendKill | Self::BackendHang)
    }

    /// Whether it is a command of Baton's, which keepalived has not.
    pub fn is_command(self) -> bool {
        matches!(self, Self::Takeover | Self::TakeoverKill | Self::TakeoverKillBackup | Self::Yield)
    }

    /// Whether the old Active is left as it is, VIP and all, so that only the kernel can take
    /// the VIP away from it.
    pub fn leaves_vip(self) -> bool {
        matches!(
            self,
            Self::Kill
                | Self::Pause
                | Self::PowerOff
                | Self::TakeoverKill
                | Self::TakeoverKillBackup
        )
    }

    /// Whether there is anything to make good afterwards.
    fn heals(self) -> bool {
        !matches!(
            self,
            Self::Takeover
                | Self::Yield
                | Self::Restart
                | Self::RestartBoth
                | Self::RestartInSnapshot
        )
    }
}

/// Whom a fault concerns.
#[derive(Debug, Clone)]
pub(super) struct Cast {
    /// The relay that is Active.
    pub(super) active: String,
    /// The relay that is to take over.
    pub(super) backup: String,
    /// The backend for faults of backends.
    pub(super) backend: String,
}

/// Something that was done to the lab.
#[derive(Debug, Clone)]
pub(super) struct Deed {
    /// Just before it was done.
    pub(super) at: Instant,
    /// When it was done.
    pub(super) done: Instant,
    /// The node.
    pub(super) node: String,
    /// What.
    pub(super) what: String,
    /// Where it was planned takeovers: when each was asked for, and how long it took.
    pub(super) takeovers: Vec<(Instant, Duration)>,
}

impl Deed {
    fn new(at: Instant, node: &str, what: impl Into<String>) -> Self {
        let (node, what) = (node.to_owned(), what.into());
        Self { at, done: Instant::now(), node, what, takeovers: Vec::new() }
    }
}

/// The means to do it without delay: made before the canaries start.
pub(super) struct Hand {
    cast: Cast,
    switch: Ports,
    /// While there is one.
    impostor: RefCell<Option<Impostor>>,
}

impl Hand {
    /// Gets ready.
    pub(super) fn new(lab: &Lab, cast: Cast) -> Result<Self, LabError> {
        let switch = Ports::open(&lab.netns("switch")).doing("entering the switch")?;
        Ok(Self { cast, switch, impostor: RefCell::default() })
    }

    /// Whom it concerns.
    pub(super) fn cast(&self) -> &Cast {
        &self.cast
    }

    /// Breaks it.
    pub(super) fn inject(
        &self,
        lab: &mut Lab,
        fault: Fault,
        times: usize,
    ) -> Result<Deed, LabError> {
        if fault == Fault::Takeover && times > 1 {
            return self.back_and_forth(lab, times);
        }
        let Cast { active, backup, .. } = &self.cast;
        let pids = self.victims(lab, fault)?;
        let ports = self.ports(lab);
        let at = Instant::now();
        let (node, what) = match fault {
            Fault::Kill => {
                send(&pids, Signal::SIGKILL)?;
                (active, "daemon killed (SIGKILL)".to_owned())
            }
            Fault::Pause => {
                send(&pids, Signal::SIGSTOP)?;
                (active, "daemon stopped (SIGSTOP)".to_owned())
            }
            Fault::LinkDown => {
                self.switch.set(&ports[0], false).doing("cutting a link")?;
                (active, "front link cut".to_owned())
            }
            Fault::PowerOff => {
                // Frozen first: a machine without power neither notices that its links go, nor
                // says goodbye to its clients.
                send(&pids, Signal::SIGSTOP)?;
                for port in &ports {
                    self.switch.set(port, false).doing("cutting a link")?;
                }
                send(&pids, Signal::SIGKILL)?;
                (active, "powered off: both links cut, processes gone".to_owned())
            }
            Fault::Takeover => self.ask(lab, backup, &Request::Takeover { force: false })?,
            Fault::TakeoverKill | Fault::TakeoverKillBackup => {
                let victim = if fault == Fault::TakeoverKill { active } else { backup };
                (victim, self.kill_in_the_middle(lab, &pids)?)
            }
            Fault::Yield => self.ask(lab, active, &Request::Yield { force: false })?,
            Fault::Restart => self.restart(lab)?,
            Fault::BackendKill => {
                send(&pids, Signal::SIGKILL)?;
                (&self.cast.backend, "echo server killed (SIGKILL)".to_owned())
            }
            Fault::BackendHang => {
                send(&pids, Signal::SIGSTOP)?;
                (&self.cast.backend, "echo server stopped (SIGSTOP)".to_owned())
            }
            Fault::BackLinkDown => {
                self.switch.set(&ports[1], false).doing("cutting a link")?;
                (active, "back link cut".to_owned())
            }
            Fault::ChannelCut => self.cut(lab, Cut::Channel, "peer channel cut")?,
            Fault::OneWayOut => self.cut(lab, Cut::Sent, "all that it sends to the other lost")?,
            Fault::OneWayIn => self.cut(lab, Cut::Heard, "all that the other sends it lost")?,
            Fault::Partition => self.cut(lab, Cut::All, "nothing heard between the relays")?,
            Fault::RestartBoth => {
                peers::restart_both(lab, &self.cast)?;
                (active, "both daemons ended (SIGTERM) and started again".to_owned())
            }
            Fault::RestartInSnapshot => {
                peers::restart_in_snapshot(lab, &self.cast)?;
                (backup, "killed in the middle of a snapshot, started again".to_owned())
            }
            Fault::JournalFull => {
                peers::fill_journal(lab, &self.cast)?;
                (active, "peer channel cut, and more new flows than the journal keeps".to_owned())
            }
            Fault::KeyChanged => {
                peers::change_key(lab, &self.cast)?;
                (backup, "started again with another cluster key".to_owned())
            }
            Fault::OldVersion => {
                *self.impostor.borrow_mut() = Some(Impostor::start(lab, &self.cast)?);
                (backup, "a node of another version in its place".to_owned())
            }
        };
        Ok(Deed::new(at, node, what))
    }

    /// `baton takeover` on each of the two in turn, as soon as it is in sync.
    fn back_and_forth(&self, lab: &Lab, times: usize) -> Result<Deed, LabError> {
        let Cast { active, backup, .. } = &self.cast;
        let begun = Instant::now();
        let mut takeovers = Vec::new();
        for number in 0..times {
            let node = if number % 2 == 0 { backup } else { active };
            let deadline = Instant::now() + SYNC_PATIENCE;
            let socket = crate::lab::process::socket(&lab.dir, node);
            loop {
                let at = Instant::now();
                let request = Request::Takeover { force: false };
                let why = match control::ask(&socket, &request, COMMAND_PATIENCE) {
                    Ok(Reply::Ok(_)) => {
                        takeovers.push((at, at.elapsed()));
                        break;
                    }
                    // Not in sync yet: nothing has changed.
                    Ok(Reply::Unready(_)) if Instant::now() < deadline => None,
                    Ok(Reply::Unready(why) | Reply::Error(why)) => Some(why),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(why) = why {
                    let doing = format!("takeover {} of {times}, on {node}", number + 1);
                    return Err(io::Error::other(why)).doing(doing);
                }
                super::interrupt::sleep(Duration::from_millis(20))?;
            }
            super::interrupt::sleep(BETWEEN)?;
        }
        let what = format!("`baton takeover`, then on the other relay, {times} times in all");
        Ok(Deed { takeovers, ..Deed::new(begun, backup, what) })
    }

    /// Kills while a takeover is on its way; a handover takes a few milliseconds.
    fn kill_in_the_middle(&self, lab: &Lab, pids: &[i32]) -> Result<String, LabError> {
        let socket = crate::lab::process::socket(&lab.dir, &self.cast.backup);
        let begun = Instant::now();
        let asking = std::thread::spawn(move || {
            control::ask(&socket, &Request::Takeover { force: false }, KILLED_PATIENCE)
        });
        // The clock is as good a die as any.
        let jitter = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let jitter = jitter.unwrap_or_default().subsec_micros() % MIDDLE.as_micros() as u32;
        std::thread::sleep(Duration::from_micros(jitter.into()));
        send(pids, Signal::SIGKILL)?;
        let killed = ms(begun.elapsed());
        let came_of_it = match asking.join().expect("it does not panic") {
            Ok(Reply::Ok(_)) => "it reports success".to_owned(),
            Ok(Reply::Unready(why) | Reply::Error(why)) => format!("it reports: {why}"),
            Err(error) => format!("no answer: {error}"),
        };
        Ok(format!("daemon killed (SIGKILL) {killed} ms after `baton takeover`; {came_of_it}"))
    }

    /// Makes it good. `None`: there is nothing to be made good.
    pub(super) fn heal(&self, lab: &mut Lab, fault: Fault) -> Result<Option<Deed>, LabError> {
        if !fault.heals() {
            return Ok(None);
        }
        let active = &self.cast.active;
        let pids = self.victims(lab, fault)?;
        let ports = self.ports(lab);
        let at = Instant::now();
        let (node, what) = match fault {
            Fault::Kill | Fault::TakeoverKill => {
                lab.start_relay(active)?;
                (active, "daemon started again")
            }
            Fault::TakeoverKillBackup => {
                lab.start_relay(&self.cast.backup)?;
                (&self.cast.backup, "daemon started again")
            }
            Fault::Pause => {
                send(&pids, Signal::SIGCONT)?;
                (active, "daemon goes on (SIGCONT)")
            }
            Fault::LinkDown => {
                self.switch.set(&ports[0], true).doing("mending a link")?;
                (active, "front link back")
            }
            Fault::PowerOff => {
                forget_vips(&lab.netns(active));
                for port in &ports {
                    self.switch.set(port, true).doing("mending a link")?;
                }
                lab.start_relay(active)?;
                (active, "powered on")
            }
            Fault::BackendKill => {
                lab.start_echo(&self.cast.backend)?;
                (&self.cast.backend, "echo server started again")
            }
            Fault::BackendHang => {
                send(&pids, Signal::SIGCONT)?;
                (&self.cast.backend, "echo server goes on (SIGCONT)")
            }
            Fault::BackLinkDown => {
                self.switch.set(&ports[1], true).doing("mending a link")?;
                (active, "back link back")
            }
            Fault::ChannelCut
            | Fault::OneWayOut
            | Fault::OneWayIn
            | Fault::Partition
            | Fault::JournalFull => {
                peers::mend(lab, &self.cast)?;
                (active, "all that was lost goes through again")
            }
            Fault::KeyChanged => {
                peers::restore_key(lab, &self.cast)?;
                (&self.cast.backup, "started again with the cluster's key")
            }
            Fault::OldVersion => {
                if let Some(impostor) = self.impostor.take() {
                    impostor.end(lab, &self.cast)?;
                }
                (&self.cast.backup, "back in its place")
            }
            Fault::Takeover
            | Fault::Yield
            | Fault::Restart
            | Fault::RestartBoth
            | Fault::RestartInSnapshot => return Ok(None),
        };
        Ok(Some(Deed::new(at, node, what)))
    }

    /// The processes that a fault hits. Everything of a relay's namespace is its daemon's, but
    /// Baton is one process: what else there is are commands and checks.
    fn victims(&self, lab: &mut Lab, fault: Fault) -> Result<Vec<i32>, LabError> {
        let (node, name) = match fault {
            _ if fault.hits_backend() => (&self.cast.backend, "echo"),
            Fault::TakeoverKillBackup => (&self.cast.backup, "relay"),
            _ => (&self.cast.active, "relay"),
        };
        let everything = fault == Fault::PowerOff || !lab.options.software.is_baton();
        if !fault.hits_backend() && everything {
            return lab.netns(node).pids().doing("listing the relay's processes");
        }
        Ok(lab.process(node, name).map(|process| process.pid()).into_iter().collect())
    }

    fn cut<'a>(
        &'a self,
        lab: &Lab,
        cut: Cut,
        what: &str,
    ) -> Result<(&'a String, String), LabError> {
        peers::cut(lab, &self.cast, cut)?;
        Ok((&self.cast.active, what.to_owned()))
    }

    /// Has the Backup take over, to see that it can.
    pub(super) fn prove(&self, lab: &Lab) -> Result<Deed, LabError> {
        let at = Instant::now();
        let request = Request::Takeover { force: false };
        let (node, what) = self.ask(lab, &self.cast.backup, &request)?;
        Ok(Deed::new(at, node, what))
    }

    /// The switch's ports of the Active, front first.
    fn ports(&self, lab: &Lab) -> Vec<String> {
        let node = lab.topology.node(&self.cast.active).expect("the Active is one of the lab's");
        Segment::ALL.iter().filter_map(|side| node.link(*side)).map(|l| l.port.clone()).collect()
    }

    /// Has the relay's daemon do what `baton takeover` and `baton yield` ask for.
    fn ask<'a>(
        &self,
        lab: &Lab,
        node: &'a String,
        request: &Request,
    ) -> Result<(&'a String, String), LabError> {
        let begun = Instant::now();
        let yields = matches!(request, Request::Yield { .. });
        let command = if yields { "yield" } else { "takeover" };
        let socket = crate::lab::process::socket(&lab.dir, node);
        let answer = match control::ask(&socket, request, COMMAND_PATIENCE) {
            Ok(Reply::Ok(_)) => Ok(()),
            Ok(Reply::Error(why) | Reply::Unready(why)) => Err(why),
            Err(error) => Err(error.to_string()),
        };
        answer.map_err(io::Error::other).doing(format!("`baton {command}` on {node}"))?;
        let took = ms(begun.elapsed());
        Ok((node, format!("`baton {command}`, which reports success after {took} ms")))
    }

    fn restart(&self, lab: &mut Lab) -> Result<(&String, String), LabError> {
        let active = &self.cast.active;
        let process = lab.process(active, "relay").expect("every relay was started");
        let took = process.terminate(RESTART_PATIENCE).doing("ending a relay")?;
        lab.start_relay(active)?;
        let took = took.as_millis();
        Ok((active, format!("daemon ended (SIGTERM, took {took} ms) and started again")))
    }
}

fn send(pids: &[i32], which: Signal) -> Result<(), LabError> {
    for pid in pids {
        signal(*pid, which).doing(format!("sending {which} to process {pid}"))?;
    }
    Ok(())
}

/// A machine that boots has no VIP; a namespace that stayed may still have one.
fn forget_vips(netns: &Netns) {
    for vip in [
        format!("{VIP_FRONT}/24 dev front"),
        format!("{VIP_BACK}/24 dev back"),
        format!("{VIP_FRONT6}/64 dev front"),
    ] {
        // Mostly it is gone already.
        let _ = netns.ip(&format!("addr del {vip}"));
    }
}

/// The switch's ports, moved by one system call each.
struct Ports {
    /// Any socket of the switch's namespace.
    socket: UdpSocket,
}

impl Ports {
    fn open(switch: &Netns) -> io::Result<Self> {
        Ok(Self { socket: switch.enter(|| UdpSocket::bind("127.0.0.1:0"))?? })
    }

    /// Sets a port up or down (`man 7 netdevice`).
    fn set(&self, port: &str, up: bool) -> io::Result<()> {
        // SAFETY: a zeroed ifreq is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if port.len() >= request.ifr_name.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in request.ifr_name.iter_mut().zip(port.bytes()) {
            *to = from as libc::c_char;
        }
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has filled in this field of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let bit = libc::IFF_UP as libc::c_short;
        request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
    }

    fn ioctl(&self, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: both requests take an ifreq, which outlives the call.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), number as _, request) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}
