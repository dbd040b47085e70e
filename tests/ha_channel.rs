//! The peer channel of the HA driver in namespaces: real sockets, two daemons' threads.

mod ha_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use baton_ha::channel::key::ClusterKey;
use baton_ha::config::{ChannelConfig, HaConfig};
use baton_ha::driver::{PeerEvent, PeerPort, Refused, Report, start};
use baton_ha::sync::Frame;
use baton_ha::vrrp::router::{Reason, State};
use ha_support::*;
use nix::sys::signal::Signal;

#[test]
#[ignore = "what the other tests start as a process of its own"]
fn child_process() {
    ha_support::child_process();
}

fn spec(priority: u8, centiseconds: u16) -> Spec {
    Spec { back: true, channel: true, ..Spec::new(priority, centiseconds) }
}

fn run(lab: &Lab, node: usize, config: HaConfig) -> (Running, PeerPort) {
    let (handle, port) = lab.nodes[node].enter(|| start(config, None)).unwrap().unwrap();
    (Running { handle }, port.unwrap())
}

fn is_up(running: &Running) -> bool {
    running.view().peers[0].up.is_ok()
}

#[test]
fn two_nodes_meet_and_carry_frames_in_order() {
    let _alone = alone();
    let lab = Lab::new(2);
    let (one, mut port_one) = run(&lab, 0, spec(200, 10).config(0));
    // Before there is anybody: said, and gone on with.
    until(seconds(5), "the first says that nobody is there", || {
        one.view().peers[0].up.as_ref().is_err_and(|why| why.contains("10.78.0.3:8112"))
    });
    let (two, mut port_two) = run(&lab, 1, spec(100, 10).config(1));
    until(seconds(5), "both are up", || is_up(&one) && is_up(&two));
    let peer = one.view().peers[0].up.clone().unwrap();
    assert_eq!((peer.node.as_str(), peer.version), ("n1", 1));
    assert!(matches!(port_one.events.blocking_recv(), Some(PeerEvent::Up { place: 0, .. })));
    assert!(matches!(port_two.events.blocking_recv(), Some(PeerEvent::Up { place: 0, .. })));
    for frames in 0..500 {
        port_one.to[0].blocking_send(PeerPort::encode(Frame::Ack { frames })).unwrap();
        // Read as they come: who does not loses the connection.
        let Some(PeerEvent::Frame { frame, .. }) = port_two.events.blocking_recv() else {
            panic!("the connection was lost at {frames}");
        };
        assert_eq!(frame, Frame::Ack { frames });
    }
    drop((port_one, port_two));
}

#[test]
fn heartbeats_keep_a_backup_quiet_where_adverts_are_lost() {
    let _alone = alone();
    let lab = Lab::new(2);
    let (active, _port) = run(&lab, 0, spec(200, 10).config(0));
    active.wait_for(State::Active, seconds(5));
    let (backup, _other) = run(&lab, 1, spec(100, 10).config(1));
    until(seconds(5), "the channel is up", || is_up(&active) && is_up(&backup));
    // No advert gets through on any path; TCP does.
    let rules = "table inet t { chain c { type filter hook input priority 0; \
                 meta l4proto 112 drop; }; }";
    let nft = lab.nodes[1].command("nft").arg(rules).output().unwrap();
    assert!(nft.status.success(), "{nft:?}");
    stays(seconds(2), "the Backup stays", || backup.state() == State::Backup);
    let heard = backup.view().active.unwrap();
    assert_eq!(heard.priority.value(), 200);
}

#[test]
fn a_dead_daemon_is_known_at_once_by_its_closed_connection() {
    let _alone = alone();
    let lab = Lab::new(2);
    // Without that word a Backup of priority 100 would wait for 3.6 s.
    let active = lab.spawn(0, &spec(200, 100));
    lab.wait_for_holder(0, &[VIP4], seconds(8));
    let (backup, _port) = run(&lab, 1, spec(100, 100).config(1));
    until(seconds(5), "the channel is up", || is_up(&backup));
    until(seconds(5), "it has heard the Active", || backup.view().active.is_some());
    active.abort();
    backup.wait_for(State::Active, seconds(2));
    assert_eq!(backup.view().reason, Reason::ActiveGone);
}

#[test]
fn another_key_or_cluster_is_refused_and_both_sides_say_so() {
    let _alone = alone();
    let other = ClusterKey::from_bytes([8; 32]);
    for (key, cluster, here, there) in [
        (other, "lab", "its cluster key is another one", "this node's cluster key is another one"),
        (KEY, "office", "belongs to another cluster", "belongs to cluster `lab`"),
    ] {
        let lab = Lab::new(2);
        let (one, _port) = run(&lab, 0, spec(200, 10).config(0));
        let (two, _other) = run(&lab, 1, {
            let config = spec(100, 10).config(1);
            let channel = config.channel.clone().unwrap();
            let channel = ChannelConfig { key, cluster: cluster.into(), ..channel };
            HaConfig { channel: Some(channel), ..config }
        });
        let says = |running: &Running, words: &str| {
            running.view().peers[0].up.as_ref().is_err_and(|why| why.contains(words))
        };
        // n0 connects, n1 accepts: either may be the one to find out.
        until(seconds(8), here, || says(&one, here) || says(&one, there));
        until(seconds(8), there, || says(&two, there) || says(&two, here));
        // The election goes on by adverts.
        one.wait_for(State::Active, seconds(5));
        until(seconds(3), "the other is Backup", || two.state() == State::Backup);
        let refused = |running: &Running| {
            let counters = running.view().counters;
            counters.iter().any(|(name, count)| *name == "peer_refused" && *count > 0)
        };
        assert!(refused(&one) && refused(&two));
    }
}

/// Rules for what a node hears and says, in the place of those before.
fn rules(lab: &Lab, node: usize, drop: &str) {
    let chain =
        |hook: &str| format!("chain {hook} {{ type filter hook {hook} priority 0; {drop} }};");
    let text = format!(
        "table inet t; delete table inet t; table inet t {{ {} {} }}",
        chain("input"),
        chain("output")
    );
    let nft = lab.nodes[node].command("nft").arg(text).output().unwrap();
    assert!(nft.status.success(), "{nft:?}");
}

#[test]
fn of_two_that_were_apart_the_one_that_became_active_later_counts() {
    let _alone = alone();
    let lab = Lab::new(2);
    let one = Spec { preempt: false, ..spec(200, 10) };
    let (older, _port) = run(&lab, 0, one.config(0));
    older.wait_for(State::Active, seconds(5));
    let (newer, _other) = run(&lab, 1, spec(100, 10).config(1));
    until(seconds(5), "the channel is up", || is_up(&older) && is_up(&newer));
    until(seconds(5), "the epoch is known", || newer.view().epoch == older.view().epoch);
    rules(&lab, 1, "drop;");
    newer.wait_for(State::Active, seconds(5));
    assert_eq!(older.state(), State::Active, "it has not heard of that");
    until(seconds(8), "the channel is down", || !is_up(&older) && !is_up(&newer));
    // Heartbeats get through; adverts, which decide by priority where they come first, do not.
    rules(&lab, 0, "meta l4proto 112 drop;");
    rules(&lab, 1, "");
    older.wait_for(State::Backup, seconds(5));
    assert_eq!(older.view().reason, Reason::Deposed);
    stays(seconds(1), "the newer one stays", || newer.state() == State::Active);
    assert_eq!((newer.view().takeovers, newer.view().epoch), (1, older.view().epoch));
}

/// Two nodes whose flows are replicated, as far as the driver is told; the first is Active.
fn replicating(lab: &Lab, priorities: [u8; 2], wait: Duration) -> [(Running, Sync); 2] {
    let node = |node: usize| {
        let spec = Spec { preempt: true, ..spec(priorities[node], 10) };
        let mut config = HaConfig { preempt_wait: wait, ..spec.config(node) };
        config.channel.as_mut().unwrap().replicates = true;
        let (running, port) = run(lab, node, config);
        (running, Sync::serve(port))
    };
    let first = node(0);
    first.0.wait_for(State::Active, seconds(5));
    let second = node(1);
    until(seconds(5), "both are up", || is_up(&first.0) && is_up(&second.0));
    [first, second]
}

/// What replication answers.
struct Sync {
    in_sync: Arc<AtomicBool>,
}

impl Sync {
    fn serve(mut port: PeerPort) -> Self {
        let in_sync = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&in_sync);
        std::thread::spawn(move || {
            while let Some(event) = port.events.blocking_recv() {
                let report = match event {
                    PeerEvent::CatchUp { run, .. } if told.load(Ordering::Relaxed) => {
                        Report::CaughtUp { run }
                    }
                    PeerEvent::CatchUp { run, .. } => Report::Behind { run, lacking: 59, of: 100 },
                    PeerEvent::Flush { run, .. } => Report::Flushed { run, lacking: 0 },
                    _ => continue,
                };
                let _ = port.reports.blocking_send(report);
            }
        });
        Self { in_sync }
    }

    fn set(&self) {
        self.in_sync.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_node_of_higher_priority_comes_back_when_it_is_in_sync_and_shows_what_it_waits_for() {
    let _alone = alone();
    let lab = Lab::new(2);
    let [(low, sync), (high, _sync)] = replicating(&lab, [100, 200], seconds(60));
    until(seconds(5), "it says how far it is", || {
        high.view().waiting.is_some_and(|waiting| waiting.flows == Some((41, 100)))
    });
    stays(seconds(1), "it waits", || high.state() == State::Backup);
    let epoch = low.view().epoch;
    sync.set();
    high.wait_for(State::Active, seconds(5));
    until(seconds(5), "the other gave", || low.view().reason == Reason::HandedOver);
    let view = high.view();
    assert_eq!((view.reason, view.waiting), (Reason::Preempted, None));
    assert!(view.epoch > epoch, "{} after {epoch}", view.epoch);
    lab.wait_for_holder(1, &[VIP4], seconds(5));
}

#[test]
fn a_node_that_is_not_in_sync_gives_up_and_the_operator_decides() {
    let _alone = alone();
    let lab = Lab::new(2);
    let [(low, _sync), (high, _other)] = replicating(&lab, [100, 200], seconds(1));
    until(seconds(5), "it leaves the Active alone", || {
        high.view().waiting.is_some_and(|waiting| waiting.until.is_none())
    });
    stays(seconds(1), "it stays", || high.state() == State::Backup);
    let refused = high.block(async |handle| handle.takeover(false).await).unwrap_err();
    let Refused::Unready(why) = refused else { panic!("{refused}") };
    assert!(why.contains("59 of 100 not acknowledged"), "{why}");
    assert_eq!((low.state(), high.state()), (State::Active, State::Backup));
    let outcome = high.block(async |handle| handle.takeover(true).await).unwrap();
    assert_eq!(outcome.lacking, Some(59));
    high.wait_for(State::Active, seconds(5));
    // And back, as the giver wants it: nobody holds then, and it is not in sync here either.
    let refused = high.block(async |handle| handle.yield_now(false).await).unwrap_err();
    assert!(matches!(refused, Refused::Unready(_)), "{refused}");
    high.block(async |handle| handle.yield_now(true).await).unwrap();
    low.wait_for(State::Active, seconds(5));
}

#[test]
fn a_frozen_active_is_not_taken_over_from_unless_the_operator_insists() {
    let _alone = alone();
    let lab = Lab::new(2);
    // Adverts every 2 s: the election itself is in no hurry.
    let active = lab.spawn(0, &spec(200, 200));
    lab.wait_for_holder(0, &[VIP4], seconds(12));
    let (backup, _port) = run(&lab, 1, spec(100, 200).config(1));
    until(seconds(5), "the channel is up", || is_up(&backup));
    until(seconds(5), "it has heard the Active", || backup.view().active.is_some());
    active.signal(Signal::SIGSTOP);
    let refused = backup.block(async |handle| handle.takeover(false).await).unwrap_err();
    let Refused::Unready(why) = refused else { panic!("{refused}") };
    assert!(why.contains("n0 did not answer within 500 ms"), "{why}");
    assert_eq!(backup.state(), State::Backup);
    let outcome = backup.block(async |handle| handle.takeover(true).await).unwrap();
    assert!(outcome.steps.iter().any(|step| step.what.contains("claiming all the same")));
    backup.wait_for(State::Active, seconds(5));
    active.signal(Signal::SIGCONT);
    lab.wait_for_holder(1, &[VIP4], seconds(5));
}
