//! UDP through the proxy, over real sockets on the loopback.

mod proxy_support;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use baton::pool::{Admin, Health, Pool};
use baton::service::{Protocol, Scheduler};
use proxy_support::*;

/// A backend that answers each datagram with its name and the datagram.
fn udp_echo(at: &str, name: u8) -> SocketAddr {
    let socket = UdpSocket::bind(at).unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let (len, from) = socket.recv_from(&mut buffer[1..]).unwrap();
            buffer[0] = name;
            let _ = socket.send_to(&buffer[..len + 1], from);
        }
    });
    address
}

fn client(running: &Running) -> UdpSocket {
    let any = if running.pool.service.listen.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    // Connected: only what leaves with the VIP as its source is received.
    socket.connect(running.pool.service.listen).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

fn ask(socket: &UdpSocket, question: &[u8]) -> io::Result<u8> {
    socket.send(question)?;
    let mut answer = vec![0; 1 << 16];
    let len = socket.recv(&mut answer)?;
    assert_eq!(&answer[1..len], question);
    Ok(answer[0])
}

/// Asks until there is an answer: datagrams may be lost, here to an ICMP error on its way.
fn ask_until_answered(socket: &UdpSocket) -> u8 {
    (0..20).find_map(|_| ask(socket, b"again").ok()).expect("an answer in twenty attempts")
}

fn running(backends: &[SocketAddr]) -> Running {
    Running::new(service(Protocol::Udp, backends))
}

#[test]
fn datagrams_go_there_and_back_and_stay_with_one_backend() {
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let running = running(&[udp_echo(at, 1), udp_echo(at, 2)]);
        let clients: Vec<UdpSocket> = (0..10).map(|_| client(&running)).collect();
        let names: Vec<u8> = clients.iter().map(|client| ask(client, b"who?").unwrap()).collect();
        assert_eq!(names.iter().filter(|&&name| name == 1).count(), 5);
        for _ in 0..20 {
            for (client, name) in clients.iter().zip(&names) {
                assert_eq!(ask(client, b"still you?").unwrap(), *name);
            }
        }
        assert_eq!(running.connections(), 10);
        assert_eq!(count(&running.pool.counters.accepted), 10);
    }
}

#[test]
fn the_empty_and_the_largest_datagram_pass() {
    let running = running(&[udp_echo("127.0.0.1:0", 1)]);
    let client = client(&running);
    assert_eq!(ask(&client, b"").unwrap(), 1);
    // One byte is the name in the answer.
    assert_eq!(ask(&client, &vec![7; 65_506]).unwrap(), 1);
}

#[test]
fn an_idle_session_ends() {
    let mut service = service(Protocol::Udp, &[udp_echo("127.0.0.1:0", 1)]);
    service.limits.idle_timeout = Duration::from_millis(200);
    let running = Running::new(service);
    let client = client(&running);
    ask(&client, b"x").unwrap();
    assert_eq!(running.connections(), 1);
    running.wait_until_empty();
    assert_eq!(count(&running.pool.counters.idle_closed), 1);
    ask(&client, b"y").unwrap();
    assert_eq!(count(&running.pool.counters.accepted), 2);
}

#[test]
fn sessions_are_bounded_by_service_and_source() {
    let mut bounded = service(Protocol::Udp, &[udp_echo("127.0.0.1:0", 1)]);
    bounded.limits.max_connections = 3;
    let running = Running::new(bounded);
    let clients: Vec<UdpSocket> = (0..3).map(|_| client(&running)).collect();
    clients.iter().for_each(|client| assert!(ask(client, b"x").is_ok()));
    assert!(ask(&client(&running), b"x").is_err());
    clients.iter().for_each(|client| assert!(ask(client, b"x").is_ok()));
    assert_eq!(running.connections(), 3);
    assert_eq!(count(&running.pool.counters.refused_service_limit), 1);
    assert_eq!(count(&running.pool.counters.datagrams_dropped), 1);

    let mut bounded = service(Protocol::Udp, &[udp_echo("127.0.0.1:0", 1)]);
    bounded.limits.max_connections_per_source = 1;
    let running = Running::new(bounded);
    let first = client(&running);
    assert!(ask(&first, b"x").is_ok());
    assert!(ask(&client(&running), b"x").is_err());
    assert_eq!(count(&running.pool.counters.refused_source_limit), 1);
}

#[test]
fn a_backend_that_refuses_is_left_for_another() {
    let refusing = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let running = running(&[refusing, udp_echo("127.0.0.1:0", 2)]);
    // Round robin: one of two begins with the one that refuses.
    for _ in 0..2 {
        assert_eq!(ask_until_answered(&client(&running)), 2);
    }
    assert!(running.pool.members[0].failed.load(Ordering::Relaxed) >= 1);
}

#[test]
fn a_session_that_leaves_a_backend_makes_room_for_its_next() {
    let refusing = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut bounded = service(Protocol::Udp, &[refusing, udp_echo("127.0.0.1:0", 2)]);
    bounded.limits.max_connections = 1;
    let running = Running::new(bounded);
    let client = client(&running);
    for _ in 0..50 {
        // Those after the first find out from the socket that the backend refuses.
        for _ in 0..20 {
            let _ = client.send(b"again");
        }
        assert_eq!(ask_until_answered(&client), 2);
        block_on(running.proxy.reset_all());
    }
    assert!(running.pool.members[0].failed.load(Ordering::Relaxed) > 0);
    assert_eq!(count(&running.pool.counters.refused_service_limit), 0);
}

#[test]
fn sessions_leave_a_backend_that_is_down_or_disabled_and_stay_with_a_drained_one() {
    let mut service =
        service(Protocol::Udp, &[udp_echo("127.0.0.1:0", 0), udp_echo("127.0.0.1:0", 1)]);
    service.scheduler = Scheduler::SourceHash;
    let running = Running::new(service);
    let client = client(&running);
    let first = ask(&client, b"x").unwrap();
    let other = 1 - first;
    let [at_first, at_other] =
        [first, other].map(|name| running.pool.members[usize::from(name)].clone());

    at_first.set_admin(Admin::Drained);
    assert_eq!(ask(&client, b"x").unwrap(), first);
    at_first.set_health(Health::Down, "test");
    wait_until("its session ends", || at_first.connections.load(Ordering::Relaxed) == 0);
    assert_eq!(ask(&client, b"x").unwrap(), other);
    at_first.set_health(Health::Up, "test");
    at_first.set_admin(Admin::Enabled);
    assert_eq!(ask(&client, b"x").unwrap(), other);
    at_other.set_admin(Admin::Disabled);
    wait_until("its session ends", || at_other.connections.load(Ordering::Relaxed) == 0);
    assert_eq!(ask(&client, b"x").unwrap(), first);
}

#[test]
fn a_probe_every_millisecond_sees_no_gap() {
    let running = running(&[udp_echo("127.0.0.1:0", 1), udp_echo("127.0.0.1:0", 2)]);
    let client = client(&running);
    let receiving = client.try_clone().unwrap();
    let receive = thread::spawn(move || {
        let mut seen = vec![false; 1000];
        let mut answer = [0; 5];
        while receiving.recv(&mut answer).is_ok() {
            seen[u32::from_le_bytes(answer[1..].try_into().unwrap()) as usize] = true;
        }
        seen
    });
    for n in 0..1000_u32 {
        client.send(&n.to_le_bytes()).unwrap();
        if n == 500 {
            // Half way the backend that it is at goes down.
            let used =
                |member: &&Arc<baton::pool::Member>| member.connections.load(Ordering::Relaxed) > 0;
            let member = running.pool.members.iter().find(used).unwrap();
            member.set_health(Health::Down, "test");
        }
        thread::sleep(Duration::from_millis(1));
    }
    let lost = receive.join().unwrap().iter().filter(|&&seen| !seen).count();
    // What the old backend still had when its session ended may be lost.
    assert!(lost <= 2, "{lost} of 1000 lost");
}

#[test]
fn a_node_that_yields_ends_its_sessions_and_one_that_stops_opens_none() {
    let running = running(&[udp_echo("127.0.0.1:0", 1)]);
    let known = client(&running);
    ask(&known, b"x").unwrap();
    assert_eq!(block_on(running.proxy.reset_all()), 1);
    running.wait_until_empty();
    ask(&known, b"x").unwrap();
    block_on(running.proxy.stop_accepting());
    assert!(ask(&client(&running), b"x").is_err());
    assert!(ask(&known, b"x").is_ok());
}

#[test]
fn sessions_leave_a_backend_that_a_reload_removed() {
    let before = service(Protocol::Udp, &[udp_echo("127.0.0.1:0", 1), udp_echo("127.0.0.1:0", 2)]);
    let mut after = before.clone();
    after.backends.remove(0);
    let running = Running::new(before);
    let clients: Vec<UdpSocket> = (0..2).map(|_| client(&running)).collect();
    for client in &clients {
        ask(client, b"x").unwrap();
    }
    let renewed = Arc::new(Pool::renewed(&running.pool, Arc::new(after)));
    block_on(running.proxy.renew(&[Arc::clone(&renewed)])).unwrap();
    let gone = &running.pool.members[0];
    wait_until("its session ends", || gone.connections.load(Ordering::Relaxed) == 0);
    assert_eq!(renewed.members[0].connections.load(Ordering::Relaxed), 1, "the other goes on");
    for client in &clients {
        assert_eq!(ask_until_answered(client), 2);
    }
}
