//! The checks of several pools side by side: nothing waits for anything else, equal checks are
//! one, and a change of configuration leaves what stays alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton::health::Checks;
use baton::pool::{Health, Pool};
use baton::service::Probe;

use crate::support::*;

fn often(probe: Probe) -> baton::service::Check {
    let interval = Duration::from_millis(50);
    baton::service::Check { interval, timeout: interval, ..check(probe) }
}

/// Waits for bytes that never come.
fn hanging() -> Probe {
    Probe::SendExpect { send: Vec::new(), expect: b"hello".to_vec() }
}

#[test]
fn a_hanging_probe_delays_no_other() {
    let (silent, _) = counted(Does::Nothing);
    let (good, probes) = counted(Does::Nothing);
    let patient =
        baton::service::Check { interval: PATIENCE * 2, timeout: PATIENCE * 2, ..check(hanging()) };
    let pools = [pool("hangs", &patient, &[silent]), pool("fine", &often(Probe::Tcp), &[good])];
    with_checks(&pools, |pools| {
        eventually("many probes", || probes.load(Ordering::Relaxed) > 20);
        assert_eq!(pools[0].members[0].health(), Health::Unknown, "its first probe still waits");
        assert_eq!(pools[1].members[0].health(), Health::Up);
    });
}

#[test]
fn one_backend_of_a_pool_is_down_alone_and_comes_back_after_rise() {
    let (good, _) = counted(Does::Nothing);
    let (refused, socket) = refusing();
    let pools = [pool("s", &often(Probe::Tcp), &[good, refused])];
    with_checks(&pools, |pools| {
        let [good, refused] = &pools[0].members[..] else { panic!("two members") };
        assert_eq!(first_verdict(good), up());
        assert_eq!(first_verdict(refused), down("connect: connection refused"));
        socket.listen(100).expect("a listener");
        becomes(refused, Health::Up);
        assert_eq!(refused.report().reason, "answers");
        assert_eq!(good.health(), Health::Up);
    });
}

/// With one port to connect from, which the first probe leaves in TIME_WAIT, no other starts.
#[test]
fn what_this_node_is_short_of_is_not_held_against_the_backend() {
    let space = Space::new(&[]);
    let (probes, health) = space
        .ns
        .enter(|| {
            for (key, value) in [("ip_local_port_range", "40000 40000"), ("tcp_tw_reuse", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv4/{key}"), value).expect("a setting");
            }
            let listener = std::net::TcpListener::bind("127.0.0.1:9000").expect("a port");
            let address = listener.local_addr().expect("an address");
            with_checks(&[pool("s", &often(Probe::Tcp), &[address])], |pools| {
                let member = &pools[0].members[0];
                assert_eq!(first_verdict(member), up());
                // So that it is the probe that ends the connection first.
                std::thread::sleep(Duration::from_secs(1));
                listener.set_nonblocking(true).expect("a socket option");
                (listener.incoming().map_while(Result::ok).count(), member.health())
            })
        })
        .expect("the namespace");
    assert_eq!((probes, health), (1, Health::Up));
}

#[test]
fn backends_checked_alike_are_probed_once_for_all_services() {
    let (address, probes) = counted(Does::Nothing);
    let slow = baton::service::Check { interval: PATIENCE * 2, ..check(Probe::Tcp) };
    let other = baton::service::Check { name: "other".into(), ..slow.clone() };
    let pools =
        [pool("a", &slow, &[address]), pool("b", &slow, &[address]), pool("c", &other, &[address])];
    with_checks(&pools, |pools| {
        for pool in pools {
            assert_eq!(first_verdict(&pool.members[0]), up());
        }
        assert_eq!(probes.load(Ordering::Relaxed), 2, "one for a and b, one for c");
    });
}

#[test]
fn a_check_goes_on_through_a_change_of_configuration() {
    let (stays, stayed) = counted(Does::Nothing);
    let (goes, gone) = counted(Does::Nothing);
    let (comes, _) = counted(Does::Nothing);
    let slow = baton::service::Check { interval: PATIENCE * 2, ..check(Probe::Tcp) };
    let quick = often(Probe::Tcp);
    let before = [pool("slow", &slow, &[stays]), pool("quick", &quick, &[goes])];
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut checks = runtime.block_on(async { Checks::start(&before) });
    assert_eq!(first_verdict(&before[0].members[0]), up());
    assert_eq!(first_verdict(&before[1].members[0]), up());

    // Wholly new members: the check that goes on tells them at once what it knows.
    let after: [Arc<Pool>; 2] = [pool("slow", &slow, &[stays]), pool("quick", &quick, &[comes])];
    runtime.block_on(async { checks.apply(&after) });
    assert_eq!(after[0].members[0].health(), Health::Up);
    assert_eq!(first_verdict(&after[1].members[0]), up());
    assert_eq!(stayed.load(Ordering::Relaxed), 1, "not probed anew");

    // One that was on its way may still arrive.
    std::thread::sleep(Duration::from_millis(200));
    let then = gone.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(gone.load(Ordering::Relaxed), then, "what is gone is probed no more");

    // Another timeout is another check.
    let changed = baton::service::Check { timeout: Duration::from_secs(1), ..slow };
    let again = [pool("slow", &changed, &[stays])];
    runtime.block_on(async { checks.apply(&again) });
    assert_eq!(first_verdict(&again[0].members[0]), up());
    // The verdict may overtake the server's own count.
    let counted_by = std::time::Instant::now() + PATIENCE;
    while stayed.load(Ordering::Relaxed) < 2 && std::time::Instant::now() < counted_by {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(stayed.load(Ordering::Relaxed), 2);
}

#[test]
fn the_port_of_the_check_is_probed_where_it_names_one() {
    let (address, probes) = counted(Does::Nothing);
    let (backend, _socket) = refusing();
    let check = baton::service::Check { port: Some(address.port()), ..check(Probe::Tcp) };
    with_checks(&[pool("s", &check, &[backend])], |pools| {
        assert_eq!(first_verdict(&pools[0].members[0]), up());
        assert!(probes.load(Ordering::Relaxed) > 0);
    });
}
