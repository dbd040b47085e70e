//! What ends or refuses a TCP session: limits, timeouts, backends that refuse, hang or vanish.

mod proxy_support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use baton::pool::{Health, Member};
use baton::service::Protocol;
use proxy_support::*;
use socket2::{Domain, Socket, Type};

/// A listener that answers no SYN: its queue is full. Keeps its sockets in the answer.
fn blackhole() -> (SocketAddr, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let filler = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        let _ = filler.connect(&address);
        sockets.push(filler);
    }
    thread::sleep(Duration::from_millis(50));
    (address.as_socket().unwrap(), sockets)
}

fn failed(member: &Member) -> u64 {
    member.failed.load(Ordering::Relaxed)
}

#[test]
fn a_backend_that_refuses_is_left_for_another() {
    let running = Running::tcp(&[refused(), backend("127.0.0.1:0", say("b"))]);
    for _ in 0..4 {
        assert_eq!(read_all(&mut running.connect()).unwrap(), b"b");
    }
    let counters = &running.pool.counters;
    assert_eq!((failed(&running.pool.members[0]), count(&counters.connect_retried)), (2, 2));
    assert_eq!(count(&counters.connect_failed), 0);
}

#[test]
fn a_backend_that_does_not_answer_is_left_after_the_connect_timeout() {
    let (address, _sockets) = blackhole();
    let mut service = service(Protocol::Tcp, &[address, backend("127.0.0.1:0", echo)]);
    service.limits.connect_timeout = Duration::from_millis(300);
    let running = Running::new(service);
    for _ in 0..2 {
        let mut client = running.connect();
        // What the client says before there is a backend is kept.
        write_pattern(&mut client, 1, 1 << 16).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(check_pattern(&mut client, 1).unwrap(), 1 << 16);
    }
    assert_eq!(failed(&running.pool.members[0]), 1);
}

#[test]
fn a_client_is_reset_once_the_retries_are_used_up() {
    let mut service = service(Protocol::Tcp, &[refused(), refused(), refused(), refused()]);
    service.limits.connect_retries = 2;
    let running = Running::new(service);
    assert!(is_reset(&mut running.connect()));
    let attempts: u64 = running.pool.members.iter().map(|member| failed(member)).sum();
    assert_eq!(attempts, 3);
    running.wait_until_empty();
    assert_eq!(count(&running.pool.counters.connect_failed), 1);
    assert_eq!(count(&running.pool.counters.connect_retried), 2);
}

#[test]
fn an_attempt_with_nowhere_else_to_go_is_no_retry() {
    let running = Running::tcp(&[refused()]);
    assert!(is_reset(&mut running.connect()));
    running.wait_until_empty();
    assert_eq!(count(&running.pool.counters.connect_failed), 1);
    assert_eq!(count(&running.pool.counters.connect_retried), 0);
}

#[test]
fn a_backend_found_down_while_it_is_tried_is_left_at_once() {
    let (address, _sockets) = blackhole();
    let mut service = service(Protocol::Tcp, &[address, backend("127.0.0.1:0", say("b"))]);
    service.limits.connect_timeout = Duration::from_secs(60);
    let running = Running::new(service);
    running.pool.members[1].set_health(Health::Down, "test");
    let mut client = running.connect();
    wait_until("it is tried", || running.pool.members[0].connections.load(Ordering::Relaxed) == 1);
    running.pool.members[1].set_health(Health::Up, "test");
    running.down(0);
    assert_eq!(read_all(&mut client).unwrap(), b"b");
}

#[test]
fn a_client_that_leaves_while_its_backend_is_tried_is_forgotten() {
    let (address, _sockets) = blackhole();
    let mut service = service(Protocol::Tcp, &[address]);
    service.limits.connect_timeout = Duration::from_secs(60);
    let running = Running::new(service);
    let client = running.connect();
    wait_until("it is tried", || running.connections() == 1);
    reset(client);
    running.wait_until_empty();
}

#[test]
fn nobody_is_handed_to_a_backend_that_is_down() {
    let running = Running::tcp(&[backend("127.0.0.1:0", say("a")), refused()]);
    running.down(0);
    for _ in 0..3 {
        assert!(is_reset(&mut running.connect()));
    }
    running.down(1);
    assert!(is_reset(&mut running.connect()));
    assert_eq!(running.pool.members[0].total.load(Ordering::Relaxed), 0);
    assert_eq!(count(&running.pool.counters.refused_no_backend), 1);
}

#[test]
fn a_session_without_a_byte_ends_and_one_with_does_not() {
    let mut service = service(Protocol::Tcp, &[backend("127.0.0.1:0", echo)]);
    service.limits.idle_timeout = Duration::from_millis(600);
    let running = Running::new(service);
    let mut busy = running.connect();
    let mut idle = running.connect();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) {
        busy.write_all(b"x").unwrap();
        busy.read_exact(&mut [0; 1]).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    assert!(is_reset(&mut idle));
    busy.write_all(b"x").unwrap();
    busy.read_exact(&mut [0; 1]).unwrap();
    assert_eq!(count(&running.pool.counters.idle_closed), 1);
}

#[test]
fn a_half_closed_session_without_a_byte_ends_sooner() {
    let mut service = service(Protocol::Tcp, &[backend("127.0.0.1:0", hold)]);
    service.limits.half_close_timeout = Duration::from_millis(300);
    let running = Running::new(service);
    let mut client = running.connect();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(is_reset(&mut client));
    running.wait_until_empty();
    assert_eq!(count(&running.pool.counters.idle_closed), 1);
}

#[test]
fn the_services_limit_refuses_and_lets_in_again() {
    let mut service = service(Protocol::Tcp, &[backend("127.0.0.1:0", echo)]);
    service.limits.max_connections = 3;
    let running = Running::new(service);
    let mut clients: Vec<TcpStream> = (0..3).map(|_| running.connect()).collect();
    wait_until("all are in", || running.connections() == 3);
    assert!(is_reset(&mut running.connect()));
    drop(clients.pop());
    wait_until("one has left", || running.connections() == 2);
    let mut client = running.connect();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0; 1]).unwrap();
    assert_eq!(count(&running.pool.counters.refused_service_limit), 1);
}

#[test]
fn the_limit_per_source_leaves_other_sources_alone() {
    let mut service = service(Protocol::Tcp, &[backend("127.0.0.1:0", echo)]);
    service.limits.max_connections_per_source = 2;
    let running = Running::new(service);
    let _clients = [running.connect(), running.connect()];
    wait_until("both are in", || running.connections() == 2);
    assert!(is_reset(&mut running.connect()));
    let other = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    other.bind(&"127.0.2.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    other.connect(&running.pool.service.listen.into()).unwrap();
    let mut other = TcpStream::from(other);
    other.write_all(b"x").unwrap();
    other.read_exact(&mut [0; 1]).unwrap();
    assert_eq!(count(&running.pool.counters.refused_source_limit), 1);
}

#[test]
fn a_full_backend_passes_clients_on_and_a_full_pool_resets_them() {
    let mut service =
        service(Protocol::Tcp, &[backend("127.0.0.1:0", hold), backend("127.0.0.1:0", hold)]);
    service.backends[0].max_connections = 1;
    service.backends[1].max_connections = 2;
    let running = Running::new(service);
    let _clients: Vec<TcpStream> = (0..3).map(|_| running.connect()).collect();
    let places = |member: &Member| member.connections.load(Ordering::Relaxed);
    wait_until("all have a place", || {
        running.pool.members.iter().map(|member| places(member)).sum::<u32>() == 3
    });
    assert!(is_reset(&mut running.connect()));
    assert_eq!((places(&running.pool.members[0]), places(&running.pool.members[1])), (1, 2));
    assert_eq!(count(&running.pool.counters.refused_no_backend), 1);
}
