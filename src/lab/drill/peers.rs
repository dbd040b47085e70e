//! What goes wrong between relays: paths that lose packets, and replication's own troubles. The
//! client has no part in it, and must not notice.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use baton_ha::channel::key::ClusterKey;
use nix::sys::signal::Signal;

use super::canary::{Stop, Worker};
use super::fault::{Cast, Fault};
use super::interrupt;
use crate::lab::build::READY_PATIENCE;
use crate::lab::files::CHANNEL_PORT;
use crate::lab::many::{Copies, Source};
use crate::lab::netns::{run, run_with_input};
use crate::lab::process::{signal, socket};
use crate::lab::topology::{Node, Segment};
use crate::lab::{Doing as _, Lab, LabError, state};

/// Flows that a snapshot is made of: it takes a while.
const SNAPSHOT_FLOWS: u64 = 150_000;
/// More than the journal keeps.
const JOURNAL_FLOWS: u64 = 160_000;
/// Between two batches of these, so that the kernel's ring is not what is full.
const PAUSE: Duration = Duration::from_millis(4);
/// Room in the tables of drills that make flows.
pub(super) const ROOM: u32 = 1 << 18;
/// How long a relay may take to end.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Where all relays listen to adverts.
const GROUPS: [&str; 2] = ["224.0.0.18", "ff02::12"];

/// What a relay's own nftables drop, of what it exchanges with another relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// The peer channel.
    Channel,
    /// What it sends, on all paths.
    Sent,
    /// What it would hear, on all paths.
    Heard,
    /// Both.
    All,
}

/// Drops it on the Active.
pub(super) fn cut(lab: &Lab, cast: &Cast, cut: Cut) -> Result<(), LabError> {
    let other = lab.topology.node(&cast.backup).expect("the Backup is one of the lab's");
    let rules = rules(other, cut);
    let netns = lab.netns(&cast.active);
    run_with_input(netns.command("nft").args(["-f", "-"]), &rules).doing("cutting a path")?;
    Ok(())
}

/// Drops nothing any more.
pub(super) fn mend(lab: &Lab, cast: &Cast) -> Result<(), LabError> {
    let netns = lab.netns(&cast.active);
    let mut nft: Command = netns.command("nft");
    run(nft.args(["delete", "table", "inet", "drill"])).map(drop).doing("mending a path")
}

fn rules(other: &Node, cut: Cut) -> String {
    let link_local = other.links.iter().map(|link| IpAddr::V6(link.link_local()));
    let addresses: Vec<IpAddr> = other.addresses().chain(link_local).collect();
    let groups = GROUPS.iter().filter_map(|group| group.parse().ok());
    let from = addresses.iter().map(|address| drop_rule(*address, "saddr"));
    let to = addresses.iter().copied().chain(groups).map(|address| drop_rule(address, "daddr"));
    let channel = || format!("tcp dport {CHANNEL_PORT} drop; tcp sport {CHANNEL_PORT} drop;");
    let (input, output) = match cut {
        Cut::Channel => (channel(), channel()),
        Cut::Sent => (String::new(), to.collect()),
        Cut::Heard => (from.collect(), String::new()),
        Cut::All => (from.collect(), to.collect()),
    };
    format!(
        "table inet drill {{\n  chain heard {{ type filter hook input priority -300; {input} }}\n  \
         chain sent {{ type filter hook output priority -300; {output} }}\n}}\n"
    )
}

fn drop_rule(address: IpAddr, side: &str) -> String {
    let family = if address.is_ipv4() { "ip" } else { "ip6" };
    format!("{family} {side} {address} drop; ")
}

/// Ends both daemons and starts them again.
pub(super) fn restart_both(lab: &mut Lab, cast: &Cast) -> Result<(), LabError> {
    let nodes = [&cast.active, &cast.backup];
    for node in nodes {
        let process = lab.process(node, "relay").expect("every relay was started");
        signal(process.pid(), Signal::SIGTERM).doing("ending a relay")?;
    }
    for node in nodes {
        end(lab, node)?;
    }
    nodes.into_iter().try_for_each(|node| lab.start_relay(node))
}

fn end(lab: &mut Lab, node: &str) -> Result<(), LabError> {
    let process = lab.process(node, "relay").expect("every relay was started");
    process.terminate(END_PATIENCE).map(drop).doing("ending a relay")
}

fn kill(lab: &mut Lab, node: &str) -> Result<(), LabError> {
    let process = lab.process(node, "relay").expect("every relay was started");
    signal(process.pid(), Signal::SIGKILL).doing("killing a relay")?;
    let deadline = Instant::now() + END_PATIENCE;
    while process.ended().doing("killing a relay")?.is_none() && Instant::now() < deadline {
        interrupt::sleep(Duration::from_millis(1))?;
    }
    Ok(())
}

/// Kills the Backup, fills the Active's table, starts the Backup, and kills it again when a part of
/// the table has come.
pub(super) fn restart_in_snapshot(lab: &mut Lab, cast: &Cast) -> Result<(), LabError> {
    kill(lab, &cast.backup)?;
    Source::on(lab, &cast.active)?.fill(SNAPSHOT_FLOWS, Duration::ZERO)?;
    lab.start_relay(&cast.backup)?;
    let copies = Copies::on(lab, &cast.backup)?;
    let sampled = || (0..SNAPSHOT_FLOWS).step_by(SNAPSHOT_FLOWS as usize / 200);
    let deadline = Instant::now() + READY_PATIENCE;
    loop {
        // The one before has ended; its table is empty of these.
        let there = sampled().map(|flow| copies.has(flow)).filter(|has| !matches!(has, Ok(false)));
        let there = there.collect::<Result<Vec<_>, _>>()?.len();
        if there > 0 && there < sampled().count() {
            break;
        }
        if there > 0 || Instant::now() > deadline {
            let what = std::io::Error::other("the snapshot was not caught in the middle");
            return Err(what).doing("killing the Backup in a snapshot");
        }
        interrupt::sleep(Duration::from_millis(1))?;
    }
    kill(lab, &cast.backup)?;
    lab.start_relay(&cast.backup)
}

/// Cuts the peer channel and makes more flows than the journal keeps.
pub(super) fn fill_journal(lab: &Lab, cast: &Cast) -> Result<(), LabError> {
    cut(lab, cast, Cut::Channel)?;
    Source::on(lab, &cast.active)?.fill(JOURNAL_FLOWS, PAUSE)
}

/// Starts the Backup again with a key of its own.
pub(super) fn change_key(lab: &mut Lab, cast: &Cast) -> Result<(), LabError> {
    let other = lab.dir.join("other.key");
    let made = ClusterKey::generate().and_then(|key| key.save(&other));
    made.doing("making another key")?;
    replace_key(lab, cast, "cluster.key", "other.key")
}

/// Starts the Backup again with the cluster's key.
pub(super) fn restore_key(lab: &mut Lab, cast: &Cast) -> Result<(), LabError> {
    replace_key(lab, cast, "other.key", "cluster.key")
}

fn replace_key(lab: &mut Lab, cast: &Cast, from: &str, to: &str) -> Result<(), LabError> {
    let file = lab.dir.join(format!("{}.toml", cast.backup));
    let text = std::fs::read_to_string(&file).doing("reading a configuration")?;
    std::fs::write(&file, text.replace(from, to)).doing("writing a configuration")?;
    end(lab, &cast.backup)?;
    lab.start_relay(&cast.backup)
}

/// A node of another version of Baton in the Backup's place: it listens where that did, and speaks
/// a peer protocol that this version doesn't.
pub(super) struct Impostor(Worker<()>);

impl Impostor {
    /// Ends the Backup and takes its place.
    pub(super) fn start(lab: &mut Lab, cast: &Cast) -> Result<Self, LabError> {
        end(lab, &cast.backup)?;
        let node = lab.topology.node(&cast.backup).expect("the Backup is one of the lab's");
        let back = node.link(Segment::Back).expect("relays are on the back").v4;
        let netns = lab.netns(&cast.backup);
        let listener = netns.enter(|| TcpListener::bind((back, CHANNEL_PORT)));
        let listener = listener.and_then(|made| made).doing("listening for the Active")?;
        listener.set_nonblocking(true).doing("listening for the Active")?;
        let hello = hello(&lab.topology.name, &cast.backup);
        let worker = Worker::spawn("impostor", move |stop| answer(&listener, &hello, &stop));
        Ok(Self(worker.doing("starting a thread")?))
    }

    /// Leaves it to the Backup again.
    pub(super) fn end(self, lab: &mut Lab, cast: &Cast) -> Result<(), LabError> {
        self.0.finish();
        lab.start_relay(&cast.backup)
    }
}

/// A hello of versions 0 to 0, with its length before it (`ha/src/channel`): magic, oldest, newest,
/// and the names with their lengths.
fn hello(cluster: &str, node: &str) -> Vec<u8> {
    let mut hello = [&b"BTN\x01"[..], &[0, 0]].concat();
    for name in [cluster, node] {
        hello.push(name.len() as u8);
        hello.extend(name.bytes());
    }
    [&(hello.len() as u16).to_be_bytes()[..], &hello].concat()
}

fn answer(listener: &TcpListener, hello: &[u8], stop: &Stop) {
    while !stop.asked() {
        if let Ok((mut stream, _)) = listener.accept() {
            // Whatever comes of it: the Active closes it, or it tries again.
            let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
            let _ = stream.read(&mut [0; 512]);
            let _ = stream.write_all(hello);
            let _ = stream.read(&mut [0; 512]);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the Active's status has to say meanwhile, and does not.
pub(super) fn judge_meanwhile(lab: &Lab, cast: &Cast, fault: Fault) -> Vec<String> {
    let expected = match fault {
        Fault::KeyChanged => "key",
        Fault::OldVersion => "version",
        _ => return Vec::new(),
    };
    let status = state::ask(&socket(&lab.dir, &cast.active));
    let peers = status.and_then(|status| status.election).map(|election| election.peers);
    let mut channels = peers.unwrap_or_default().into_iter().filter_map(|peer| peer.channel);
    let why = channels.find_map(|channel| channel.why).unwrap_or_default();
    if why.contains(expected) {
        return Vec::new();
    }
    vec![format!("{} says of its peer channel: {why:?}, nothing of a {expected}", cast.active)]
}

/// Waits until the Backup has all of the Active's flows again, and says what it lacks.
pub(super) fn judge_healed(
    lab: &mut Lab,
    cast: &Cast,
    fault: Fault,
) -> Result<Vec<String>, LabError> {
    lab.await_backup(&cast.backup)?;
    // Its own word may be of before it was cut off; the Active's is not.
    let flushed = interrupt::wait_until(READY_PATIENCE, || Ok(has_acknowledged(lab, cast)))?;
    if !flushed {
        return Ok(vec![format!("{} does not say that {} is in sync", cast.active, cast.backup)]);
    }
    lab.await_backup(&cast.backup)?;
    let made = match fault {
        Fault::RestartInSnapshot => SNAPSHOT_FLOWS,
        Fault::JournalFull => JOURNAL_FLOWS,
        _ => return Ok(Vec::new()),
    };
    let copies = Copies::on(lab, &cast.backup)?.count()?;
    if copies == made {
        return Ok(Vec::new());
    }
    Ok(vec![format!("{} is in sync with {copies} flows of {made}", cast.backup)])
}

/// Whether the Active has the Backup's word for all of its flows but the last few.
fn has_acknowledged(lab: &Lab, cast: &Cast) -> bool {
    let status = state::ask(&socket(&lab.dir, &cast.active));
    let replication = status.and_then(|status| status.replication);
    let mut peers = replication.map(|replication| replication.to).unwrap_or_default().into_iter();
    peers.any(|peer| peer.peer == cast.backup && peer.in_sync && peer.lag_changes < 100)
}
