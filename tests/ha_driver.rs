//! The HA driver in namespaces: real sockets, real addresses, real clocks.

mod ha_support;

use std::thread;
use std::time::{Duration, Instant};

use baton_ha::driver::Refused;
use baton_ha::vrrp::router::{Reason, State};
use ha_support::*;
use nix::sys::signal::Signal;

#[test]
#[ignore = "what the other tests start as a process of its own"]
fn child_process() {
    ha_support::child_process();
}

#[test]
fn one_of_two_nodes_is_active_and_the_other_takes_over_when_it_dies() {
    let _alone = alone();
    for paths in ["4m6m", "4u6u", "4m", "6m", "6u"] {
        let vips: Vec<&str> = [("4", VIP4), ("6", VIP6)]
            .into_iter()
            .filter(|(family, _)| paths.contains(family))
            .map(|(_, vip)| vip)
            .collect();
        let lab = Lab::new(2);
        let spec = Spec { paths, ..Spec::new(200, 10) };
        let active = lab.spawn(0, &spec);
        lab.wait_for_holder(0, &vips, seconds(5));
        let backup = lab.start(1, &Spec { paths, ..Spec::new(100, 10) });
        stays(seconds(1), "one holder", || vips.iter().all(|vip| lab.holders(vip) == [0]));
        assert_eq!(backup.state(), State::Backup, "{paths}");
        assert_eq!(backup.view().active.unwrap().priority.value(), 200);
        active.abort();
        backup.wait_for(State::Active, seconds(2));
        assert_eq!(backup.view().reason, Reason::ActiveDown);
        // The kernel of the dead node drops the VIPs by itself.
        lab.wait_for_holder(1, &vips, seconds(spec.valid_lft + 2));
    }
}

#[test]
fn higher_priority_preempts_only_where_it_may() {
    let _alone = alone();
    for preempt in [true, false] {
        let lab = Lab::new(2);
        let low = lab.start(0, &Spec::new(100, 5));
        low.wait_for(State::Active, seconds(3));
        let high = lab.start(1, &Spec { preempt, ..Spec::new(200, 5) });
        if preempt {
            lab.wait_for_holder(1, &[VIP4, VIP6], seconds(3));
            assert_eq!(high.view().reason, Reason::Preempted);
            assert_eq!((low.state(), low.view().reason), (State::Backup, Reason::Outranked));
        } else {
            stays(seconds(1), "the first stays", || lab.holders(VIP4) == [0]);
            assert_eq!((low.state(), high.state()), (State::Active, State::Backup));
        }
    }
}

#[test]
fn of_equal_priorities_the_greater_address_wins() {
    let _alone = alone();
    let lab = Lab::new(3);
    let nodes: Vec<Running> =
        (0..3).map(|node| lab.start(node, &Spec { paths: "4m", ..Spec::new(100, 5) })).collect();
    until(seconds(5), "one is Active", || {
        nodes.iter().filter(|node| node.state() == State::Active).count() == 1
    });
    let active = nodes.iter().position(|node| node.state() == State::Active).unwrap();
    lab.wait_for_holder(active, &[VIP4], seconds(1));
    // The tie is between Actives: let all claim at once, deaf to each other, and then hear.
    for node in 0..3 {
        lab.switch.ip(&format!("link set {} nomaster", Lab::port(node, "front"))).unwrap();
    }
    until(seconds(5), "all are Active", || nodes.iter().all(|node| node.state() == State::Active));
    for node in 0..3 {
        lab.switch.ip(&format!("link set {} master front", Lab::port(node, "front"))).unwrap();
    }
    lab.wait_for_holder(2, &[VIP4], seconds(3));
}

#[test]
fn vips_of_two_interfaces_move_together_when_one_loses_its_cable() {
    let _alone = alone();
    let lab = Lab::new(2);
    let spec = |priority| Spec { back: true, ..Spec::new(priority, 10) };
    let first = lab.start(0, &spec(200));
    lab.wait_for_holder(0, &[VIP4, VIP6, BACK], seconds(5));
    let second = lab.start(1, &spec(100));
    second.wait_for(State::Backup, seconds(1));
    for round in 0..2 {
        // Two changes within a second: the kernel delays what it tells about the second one.
        lab.switch.ip(&format!("link set {} down", Lab::port(0, "back"))).unwrap();
        let cut = Instant::now();
        first.wait_for(State::Initialize, seconds(1));
        println!("round {round}: cut cable found after {:?}", cut.elapsed());
        assert_eq!(first.view().reason, Reason::Fault);
        lab.wait_for_holder(1, &[VIP4, VIP6, BACK], seconds(2));
        println!("round {round}: the other one holds all after {:?}", cut.elapsed());
        lab.switch.ip(&format!("link set {} up", Lab::port(0, "back"))).unwrap();
        lab.wait_for_holder(0, &[VIP4, VIP6, BACK], seconds(5));
    }
}

#[test]
fn an_interface_that_is_made_anew_is_used_again() {
    let _alone = alone();
    let lab = Lab::new(2);
    let first = lab.start(0, &Spec::new(200, 5));
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    let second = lab.start(1, &Spec::new(100, 5));
    second.wait_for(State::Backup, seconds(1));
    lab.switch.ip(&format!("link del {}", Lab::port(0, "front"))).unwrap();
    first.wait_for(State::Initialize, seconds(1));
    let usable = &first.view().paths[0].usable;
    assert!(usable.as_ref().unwrap_err().contains("no interface `front`"), "{usable:?}");
    lab.wait_for_holder(1, &[VIP4, VIP6], seconds(2));
    lab.connect(0, "front");
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    assert!(first.view().paths.iter().all(|path| path.usable.is_ok()));
}

#[test]
fn a_node_without_its_interface_waits_for_it() {
    let _alone = alone();
    let lab = Lab::new(1);
    lab.switch.ip(&format!("link del {}", Lab::port(0, "front"))).unwrap();
    let node = lab.start(0, &Spec::new(100, 5));
    stays(Duration::from_millis(500), "waits", || node.state() == State::Initialize);
    assert_eq!(node.view().reason, Reason::Fault);
    let refused = node.block(async |handle| handle.takeover(false).await).unwrap_err();
    assert!(matches!(&refused, Refused::Fault(why) if why.contains("`front`")), "{refused}");
    lab.connect(0, "front");
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
}

#[test]
fn duplicate_address_detection_is_waited_for() {
    let _alone = alone();
    let lab = Lab::new(1);
    run_sysctl(&lab, 0, "net.ipv6.conf.front.accept_dad=1");
    run_sysctl(&lab, 0, "net.ipv6.conf.all.accept_dad=1");
    lab.nodes[0].ip("link set front down").unwrap();
    lab.nodes[0].ip("link set front up").unwrap();
    let node = lab.start(0, &Spec { paths: "6m", ..Spec::new(100, 5) });
    assert_eq!((node.state(), node.view().reason), (State::Initialize, Reason::Fault));
    node.wait_for(State::Active, seconds(8));
    assert!(lab.has(0, VIP6));
}

#[test]
fn a_vip_that_something_else_removes_is_put_back() {
    let _alone = alone();
    let lab = Lab::new(1);
    let node = lab.start(0, &Spec::new(100, 10));
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    for (place, vip, prefix) in [(0, VIP4, 24), (1, VIP6, 64)] {
        for times in 1..=3 {
            lab.nodes[0].ip(&format!("addr del {vip}/{prefix} dev front")).unwrap();
            let removed = Instant::now();
            until(seconds(1), "put back", || {
                node.view().vips[place].restored == times && lab.has(0, vip)
            });
            println!("{vip} back after {:?}", removed.elapsed());
        }
    }
    assert_eq!(node.counter("vip_restored"), 6);
    assert_eq!(node.state(), State::Active);
}

#[test]
fn the_vips_are_no_sources_and_their_networks_stay_when_they_go() {
    let _alone = alone();
    let lab = Lab::new(2);
    let node = lab.start(0, &Spec::new(200, 10));
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    let source = |to: &str| {
        let shown = lab.nodes[0].ip(&format!("-o route get {to}")).unwrap();
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        text.split_once(" src ").unwrap().1.split_whitespace().next().unwrap().to_owned()
    };
    // Near by address, so that the longest match would be the VIP.
    assert_eq!(
        (source("10.77.0.101"), source("fd77::101")),
        ("10.77.0.2".into(), "fd77::2".into())
    );
    let routes = || {
        ["route show 10.77.0.0/24 dev front", "-6 route show fd77::/64 dev front"].map(|show| {
            lab.nodes[0].ip(show).unwrap().stdout.iter().filter(|b| **b == b'\n').count()
        })
    };
    assert_eq!(routes(), [1, 1]);
    // The network's route is another address's: the VIP neither makes nor removes it.
    let shown = lab.nodes[0].ip("-o addr show dev front").unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for vip in [VIP4, VIP6] {
        let line = shown.lines().find(|line| line.contains(vip)).unwrap();
        assert!(line.contains("noprefixroute"), "{line}");
    }
    node.shutdown();
    assert!(!lab.has(0, VIP4) && !lab.has(0, VIP6));
    assert_eq!(routes(), [1, 1]);
}

#[test]
fn a_node_that_cannot_hold_every_vip_leaves_them_to_another() {
    let _alone = alone();
    let lab = Lab::new(2);
    run_sysctl(&lab, 0, "net.ipv6.conf.front.disable_ipv6=1");
    let broken = lab.start(0, &Spec::new(200, 10));
    until(seconds(3), "gave up", || broken.view().reason == Reason::Fault);
    assert!(broken.counter("configure_failed") >= 3);
    assert_eq!(lab.holders(VIP4), [0; 0], "all together or none");
    let other = lab.start(1, &Spec::new(100, 10));
    other.wait_for(State::Active, seconds(3));
    lab.wait_for_holder(1, &[VIP4, VIP6], seconds(1));
    let refused = broken.block(async |handle| handle.takeover(false).await).unwrap_err();
    assert!(refused.to_string().contains(VIP6), "{refused}");
}

#[test]
fn vips_that_a_node_does_not_own_are_removed_at_its_start_and_later() {
    let _alone = alone();
    let lab = Lab::new(2);
    let active = lab.start(0, &Spec::new(200, 10));
    active.wait_for(State::Active, seconds(5));
    for (vip, prefix) in [(VIP4, 24), (VIP4, 32), (VIP6, 64)] {
        lab.nodes[1].ip(&format!("addr add {vip}/{prefix} dev front")).unwrap();
    }
    let backup = lab.start(1, &Spec::new(100, 10));
    assert_eq!((lab.holders(VIP4), lab.holders(VIP6)), (vec![0], vec![0]));
    until(seconds(1), "counted", || backup.counter("stray_vip") == 3);
    lab.nodes[1].ip(&format!("addr add {VIP4}/24 dev front")).unwrap();
    lab.wait_for_holder(0, &[VIP4], seconds(1));
    assert_eq!(backup.state(), State::Backup);
}

#[test]
fn the_kernel_drops_the_vips_of_a_daemon_that_is_gone_and_keeps_those_of_one_that_lives() {
    let _alone = alone();
    let lab = Lab::new(1);
    let spec = Spec { valid_lft: 1, ..Spec::new(100, 10) };
    let node = lab.spawn(0, &spec);
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    stays(seconds(4), "refreshed", || lab.has(0, VIP4) && lab.has(0, VIP6));
    node.abort();
    let killed = Instant::now();
    until(seconds(3), "dropped", || !lab.has(0, VIP4) && !lab.has(0, VIP6));
    println!("valid_lft 1: gone {:?} after kill -9", killed.elapsed());
}

#[test]
fn a_node_that_was_stopped_lets_go_before_it_speaks() {
    let _alone = alone();
    let lab = Lab::new(2);
    let spec = Spec { valid_lft: 60, ..Spec::new(200, 10) };
    let sleeper = lab.spawn(0, &spec);
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    let other = lab.start(1, &Spec { preempt: false, ..Spec::new(150, 10) });
    until(seconds(2), "heard", || other.view().active.is_some());
    sleeper.signal(Signal::SIGSTOP);
    other.wait_for(State::Active, seconds(2));
    thread::sleep(seconds(2));
    assert_eq!(lab.holders(VIP4), [0, 1], "a stopped daemon holds on");
    let dump = tcpdump(&lab.nodes[0], "front", "-Q out (proto 112 or ip6 proto 112 or arp)");
    let awake = Instant::now();
    sleeper.signal(Signal::SIGCONT);
    lab.wait_for_holder(1, &[VIP4, VIP6], Duration::from_millis(300));
    println!("let go {:?} after SIGCONT", awake.elapsed());
    until(seconds(1), "said so", || sleeper.said("state Backup") == 2);
    until(seconds(1), "counted", || sleeper.said("stalled 1") == 1);
    // It wins by priority, and preempts by the book: after Active_Down_Interval, 322 ms.
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(3));
    until(seconds(1), "adverts again", || dump.said("vrid 51") > 0);
    let (first, line) = dump.lines.lock().unwrap()[0].clone();
    assert!(first - awake >= Duration::from_millis(300), "{line}");
}

#[test]
fn takeover_and_yield_say_what_they_came_to() {
    let _alone = alone();
    let lab = Lab::new(2);
    let first = lab.start(0, &Spec::new(200, 10));
    first.wait_for(State::Active, seconds(5));
    let second = lab.start(1, &Spec::new(100, 10));
    second.wait_for(State::Backup, seconds(1));
    until(seconds(1), "heard", || second.view().active.is_some());

    let outcome = second.block(async |handle| handle.takeover(false).await).unwrap();
    println!("takeover: {:#?}", outcome.steps);
    assert!(outcome.active.is_none());
    assert!(outcome.steps.iter().any(|step| step.what.contains("announced")), "{outcome:?}");
    lab.wait_for_holder(1, &[VIP4, VIP6], Duration::from_millis(500));
    // It is held, although the other one has the higher priority.
    stays(seconds(1), "held", || lab.holders(VIP4) == [1]);
    assert_eq!(second.view().priority.value(), 254);

    let refused = first.block(async |handle| handle.yield_now(false).await).unwrap_err();
    assert!(matches!(refused, Refused::NotActive), "{refused}");
    let outcome = second.block(async |handle| handle.yield_now(false).await).unwrap();
    println!("yield: {:#?}", outcome.steps);
    assert_eq!(outcome.active.unwrap().name.as_deref(), Some("n0"));
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(1));

    second.shutdown();
    let refused = first.block(async |handle| handle.yield_now(false).await).unwrap_err();
    assert!(matches!(refused, Refused::Unclaimed(_)), "{refused}");
    assert_eq!(first.state(), State::Active);
    assert!(second.block(async |handle| handle.takeover(false).await).is_err());
}

#[test]
fn shutdown_yields_within_the_skew_time() {
    let _alone = alone();
    let lab = Lab::new(2);
    // At an interval of a second, Active_Down_Interval is more than three.
    let first = lab.start(0, &Spec::new(200, 100));
    first.wait_for(State::Active, seconds(6));
    let second = lab.start(1, &Spec::new(199, 100));
    until(seconds(2), "heard", || second.view().active.is_some());
    first.shutdown();
    assert_eq!(lab.holders(VIP4), [0; 0], "removed when it returns");
    let ended = Instant::now();
    second.wait_for(State::Active, seconds(2));
    println!("claimed {:?} after the yield; Skew_Time is 223 ms", ended.elapsed());
    assert_eq!(second.view().reason, Reason::ActiveYielded);
}

#[test]
fn the_claim_is_announced_in_every_form_and_again_against_a_rival() {
    let _alone = alone();
    let lab = Lab::new(2);
    let dump = tcpdump(&lab.switch, "front", "arp or icmp6 or vrrp or proto 112");
    let node = lab.start(0, &Spec::new(100, 10));
    node.wait_for(State::Active, seconds(5));
    let text = || {
        let lines = dump.lines.lock().unwrap();
        lines.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n")
    };
    let link = lab.nodes[0].ip("-o link show front").unwrap();
    let link = String::from_utf8_lossy(&link.stdout).into_owned();
    let mac = link.split_once("link/ether ").unwrap().1.split_whitespace().next().unwrap();
    let forms = [
        format!("Request who-has {VIP4} tell {VIP4}"),
        format!("Reply {VIP4} is-at {mac}"),
        format!("neighbor advertisement, length 32, tgt is {VIP6}, Flags [override]"),
    ];
    let count = || forms.each_ref().map(|form| text().matches(form).count());
    // At 0, 20, 100, 300, 1000 and 3000 ms; then not for half a minute.
    until(seconds(6), "announcements", || count() == [6, 6, 6]);
    // A rival: another MAC says that it has the VIP.
    let frames = gratuitous_arps(&lab, 1, 5);
    assert_eq!(frames, 5);
    until(seconds(2), "evidence", || node.counter("rival_arp") == 5);
    // One at once, and one for all that came within 100 ms.
    until(seconds(2), "announced again", || count() == [8, 8, 8]);
    stays(seconds(1), "no more than that", || count() == [8, 8, 8]);
    // The VIP's MAC changes: neighbors must know.
    lab.nodes[0].ip("link set front address 02:00:00:00:00:55").unwrap();
    until(seconds(2), "the new MAC", || {
        text().contains(&format!("Reply {VIP4} is-at 02:00:00:00:00:55"))
    });
    assert_eq!(node.state(), State::Active);
}

/// Sends gratuitous ARPs from a node's own MAC for the VIP.
fn gratuitous_arps(lab: &Lab, node: usize, count: usize) -> usize {
    use baton_ha::announce::{ArpOperation, gratuitous_arp};
    let mac = [2, 0, 0, 0, 0, 0x66];
    let frame = gratuitous_arp(mac, VIP4.parse().unwrap(), ArpOperation::Reply);
    send_frames(lab, node, &vec![frame.to_vec(); count])
}

fn run_sysctl(lab: &Lab, node: usize, setting: &str) {
    baton::lab::netns::run(lab.nodes[node].command("sysctl").args(["-qw", setting])).unwrap();
}
