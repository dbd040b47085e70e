//! Clients stay where they are; a server that stops is out of the pool, and back after.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::pool::*;
use crate::socks::fetch;

/// Of the documented check.
const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(1);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(5);

/// Clients of many addresses.
fn clients(pool: &Pool) -> Vec<Ipv4Addr> {
    let clients: Vec<_> = (20..52).map(|host| Ipv4Addr::new(10, 77, 0, host)).collect();
    let lines: String =
        clients.iter().map(|client| format!("addr add {client}/24 dev front\n")).collect();
    pool.netns("client").ip_batch(&lines).expect("addresses");
    clients
}

/// Which server each client gets.
fn servers(pool: &Pool, clients: &[Ipv4Addr]) -> BTreeMap<Ipv4Addr, usize> {
    let web = WEB.parse().expect("an address");
    pool.as_client(|| {
        clients
            .iter()
            .map(|client| (*client, server_of(fetch(*client, web).expect("it answers"))))
            .collect()
    })
}

fn becomes(pool: &Pool, relay: &str, server: usize, health: &str) -> Duration {
    let start = Instant::now();
    eventually(&format!("{server} is {health} on {relay}"), || {
        pool.health(relay, server).0 == health
    });
    start.elapsed()
}

#[test]
fn a_client_stays_on_its_server_through_all_that_happens_to_others() {
    let mut pool = Pool::documented();
    let clients = clients(&pool);
    let before = servers(&pool, &clients);
    let share = before.values().filter(|server| **server == 0).count();
    assert!((4..=28).contains(&share), "{share} of 32 on the first");
    for _ in 0..5 {
        assert_eq!(servers(&pool, &clients), before, "every connection of a client alike");
    }

    pool.signal(1, Signal::SIGKILL);
    for relay in RELAYS {
        becomes(&pool, relay, 1, "down");
    }
    assert!(servers(&pool, &clients).values().all(|server| *server == 0));
    pool.start_server(1);
    for relay in RELAYS {
        becomes(&pool, relay, 1, "up");
    }
    assert_eq!(servers(&pool, &clients), before, "those that had moved are back");

    // The other relay chooses alike.
    assert_eq!(pool.on("relay1", "ip -o addr show to 10.77.0.100").lines().count(), 1);
    pool.baton("relay2", &["takeover"]);
    assert_eq!(pool.on("relay1", "ip -o addr show to 10.77.0.100").lines().count(), 0);
    assert_eq!(servers(&pool, &clients), before, "through the other relay too");
}

#[test]
fn a_stopped_server_is_out_within_an_interval_and_back_after() {
    let mut pool = Pool::documented();

    pool.signal(0, Signal::SIGSTOP);
    let out = becomes(&pool, "relay1", 0, "down");
    assert_eq!(pool.health("relay1", 0).1, "no answer within 1s (connected, greeting sent)");
    let clients = clients(&pool);
    assert!(servers(&pool, &clients).values().all(|server| *server == 1));
    pool.signal(0, Signal::SIGCONT);
    let back = becomes(&pool, "relay1", 0, "up");
    println!("SIGSTOP: out after {out:?}, back after {back:?}");
    assert!(out < INTERVAL + TIMEOUT + SLACK && back < INTERVAL * 2 + TIMEOUT + SLACK);

    pool.signal(0, Signal::SIGKILL);
    // At once: the relay tries the other server where one refuses.
    assert!(servers(&pool, &clients).values().all(|server| *server == 1));
    let out = becomes(&pool, "relay1", 0, "down");
    assert_eq!(pool.health("relay1", 0).1, "connect: connection refused");
    pool.start_server(0);
    let back = becomes(&pool, "relay1", 0, "up");
    println!("SIGKILL: out after {out:?}, back after {back:?}");
    assert!(out < INTERVAL + SLACK && back < INTERVAL * 2 + SLACK);
    assert!(servers(&pool, &clients).values().any(|server| *server == 0));
}
