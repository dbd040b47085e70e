//! The peer channel of the HA driver in namespaces: real sockets, two daemons' threads.

mod ha_support;

use baton_ha::channel::key::ClusterKey;
use baton_ha::config::{ChannelConfig, HaConfig};
use baton_ha::driver::{PeerEvent, PeerPort, start};
use baton_ha::sync::Frame;
use baton_ha::vrrp::router::{Reason, State};
use ha_support::*;

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
