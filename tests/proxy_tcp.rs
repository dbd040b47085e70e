//! TCP through the proxy, over real sockets on the loopback: bytes, ends, resets.

mod proxy_support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use baton::pool::{Admin, Pool};
use baton::service::{Protocol, Scheduler};
use proxy_support::*;
use socket2::{Domain, SockRef, Socket, Type};

const LARGE: usize = 100 << 20;

#[test]
fn a_hundred_megabytes_arrive_whole_in_both_directions_at_once() {
    let (sender, received) = mpsc::channel();
    let address = backend("127.0.0.1:0", move |mut stream| {
        let mut reading = stream.try_clone().unwrap();
        let check = thread::spawn(move || check_pattern(&mut reading, 1).unwrap());
        write_pattern(&mut stream, 2, LARGE).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        sender.send(check.join().unwrap()).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    let mut writing = client.try_clone().unwrap();
    let write = thread::spawn(move || {
        write_pattern(&mut writing, 1, LARGE).unwrap();
        writing.shutdown(Shutdown::Write).unwrap();
    });
    assert_eq!(check_pattern(&mut client, 2).unwrap(), LARGE);
    write.join().unwrap();
    assert_eq!(received.recv().unwrap(), LARGE);
    running.wait_until_empty();
    assert_eq!(count(&running.pool.counters.bytes_in), LARGE as u64);
    assert_eq!(count(&running.pool.counters.bytes_out), LARGE as u64);
}

#[test]
fn a_request_after_the_end_of_the_clients_half_is_answered() {
    let address = backend("127.0.0.1:0", |mut stream| {
        let request = read_all(&mut stream).unwrap();
        thread::sleep(Duration::from_millis(50));
        stream.write_all(&request).unwrap();
        write_pattern(&mut stream, 3, 4 << 20).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    client.write_all(b"request!").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut request = [0; 8];
    client.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request!");
    assert_eq!(check_pattern(&mut client, 3).unwrap(), 4 << 20);
    running.wait_until_empty();
}

#[test]
fn a_client_may_go_on_after_the_end_of_the_backends_half() {
    let (sender, received) = mpsc::channel();
    let address = backend("127.0.0.1:0", move |mut stream| {
        stream.write_all(b"go on").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        sender.send(check_pattern(&mut stream, 4).unwrap()).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    assert_eq!(read_all(&mut client).unwrap(), b"go on");
    thread::sleep(Duration::from_millis(50));
    write_pattern(&mut client, 4, 4 << 20).unwrap();
    drop(client);
    assert_eq!(received.recv().unwrap(), 4 << 20);
    running.wait_until_empty();
}

#[test]
fn a_reset_by_the_backend_is_a_reset_to_the_client() {
    let address = backend("127.0.0.1:0", |mut stream| {
        stream.read_exact(&mut [0; 1]).unwrap();
        reset(stream);
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    client.write_all(b"x").unwrap();
    assert!(is_reset(&mut client), "a clean end would pass for a whole answer");
    running.wait_until_empty();
}

#[test]
fn a_reset_by_the_client_is_a_reset_to_the_backend() {
    let (sender, received) = mpsc::channel();
    let address = backend("127.0.0.1:0", move |mut stream| {
        stream.write_all(b"x").unwrap();
        sender.send(is_reset(&mut stream)).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    client.read_exact(&mut [0; 1]).unwrap();
    reset(client);
    assert!(received.recv_timeout(Duration::from_secs(20)).unwrap());
    running.wait_until_empty();
}

#[test]
fn a_reset_by_a_client_that_the_backend_does_not_read_is_seen_at_once() {
    let running = Running::tcp(&[backend("127.0.0.1:0", hold)]);
    let mut client = running.connect();
    // Until nothing moves any more.
    client.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    while client.write(&[0; 1 << 16]).is_ok() {}
    assert_eq!(running.connections(), 1);
    reset(client);
    running.wait_until_empty();
}

#[test]
fn a_reset_by_a_backend_after_its_end_is_seen_though_the_client_is_silent() {
    let (sender, reset_now) = mpsc::channel::<()>();
    let reset_now = Mutex::new(reset_now);
    let address = backend("127.0.0.1:0", move |stream| {
        stream.shutdown(Shutdown::Write).unwrap();
        reset_now.lock().unwrap().recv().unwrap();
        reset(stream);
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    assert_eq!(read_all(&mut client).unwrap(), b"");
    sender.send(()).unwrap();
    running.wait_until_empty();
}

#[test]
fn urgent_data_neither_stalls_nor_truncates_what_is_copied_or_spliced() {
    for before in [3, 1 << 18] {
        for end in [false, true] {
            past_urgent_data(before, end);
        }
    }
}

/// `before` bytes, an urgent one, and three more, which arrive together; then the end or silence.
#[track_caller]
fn past_urgent_data(before: usize, end: bool) {
    let sent = [&vec![b'a'; before][..], b"!def"].concat();
    let len = sent.len();
    let (sender, received) = mpsc::channel();
    let address = backend("127.0.0.1:0", move |mut stream| {
        let mut got = vec![0; len];
        let whole = stream.read_exact(&mut got);
        if end {
            stream.read_to_end(&mut got).unwrap();
        }
        sender.send(whole.map(|()| got)).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    let socket = SockRef::from(&client).try_clone().unwrap();
    socket.set_tcp_cork(true).unwrap();
    client.write_all(&sent[..before]).unwrap();
    socket.send_out_of_band(b"!").unwrap();
    client.write_all(b"def").unwrap();
    if end {
        client.shutdown(Shutdown::Write).unwrap();
    }
    socket.set_tcp_cork(false).unwrap();
    let got = received.recv_timeout(Duration::from_secs(20));
    let got = got.unwrap_or_else(|_| panic!("stalled: {before} {end}")).unwrap();
    assert!(got == sent, "{before} {end}");
}

#[test]
fn a_reset_ends_the_session_though_the_other_half_is_closed_already() {
    let (sender, received) = mpsc::channel();
    let address = backend("127.0.0.1:0", move |mut stream| {
        stream.shutdown(Shutdown::Write).unwrap();
        sender.send(is_reset(&mut stream)).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    assert_eq!(read_all(&mut client).unwrap(), b"");
    client.write_all(b"more").unwrap();
    thread::sleep(Duration::from_millis(50));
    reset(client);
    assert!(received.recv_timeout(Duration::from_secs(20)).unwrap());
    running.wait_until_empty();
}

#[test]
fn what_a_client_does_not_take_is_given_up_after_the_session_too() {
    let address = backend("127.0.0.1:0", |mut stream| {
        write_pattern(&mut stream, 5, 1 << 19).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = read_all(&mut stream);
    });
    let mut service = service(Protocol::Tcp, &[address]);
    service.limits.half_close_timeout = Duration::from_secs(1);
    let running = Running::new(service);
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    client.set_recv_buffer_size(16 << 10).unwrap();
    client.connect(&running.pool.service.listen.into()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    wait_until("it is served", || count(&running.pool.counters.bytes_out) == 1 << 19);
    running.wait_until_empty();
    // Connections of the service's port but for the client's own end and the listeners.
    let local = format!(":{:04X} ", running.pool.service.listen.port());
    let kept = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let is_kept = |line: &&str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            format!("{} ", fields[1]).ends_with(&local) && !matches!(fields[3], "0A" | "06")
        };
        table.lines().skip(1).filter(is_kept).count()
    };
    wait_until("the kernel forgets it", || kept() == 0);
    drop(client);
}

#[test]
fn many_small_messages_go_back_and_forth() {
    let running = Running::tcp(&[backend("127.0.0.1:0", echo)]);
    let mut client = running.connect();
    client.set_nodelay(true).unwrap();
    let mut buffer = [0; 64];
    for round in 0..2000_u32 {
        let len = 1 + (round as usize * 7) % 64;
        client.write_all(&vec![round as u8; len]).unwrap();
        client.read_exact(&mut buffer[..len]).unwrap();
        assert!(buffer[..len].iter().all(|&byte| byte == round as u8));
    }
}

#[test]
fn small_messages_to_a_slow_reader_arrive_whole() {
    let (sender, received) = mpsc::channel();
    let address = backend("127.0.0.1:0", move |mut stream| {
        thread::sleep(Duration::from_millis(700));
        sender.send(check_pattern(&mut stream, 7).unwrap()).unwrap();
    });
    let running = Running::tcp(&[address]);
    let mut client = running.connect();
    // Less at once than what is spliced, more in all than the relay's and the reader's buffers.
    let mut pattern = Pattern::new(7);
    let mut message = [0; 8 << 10];
    let messages = (16 << 20) / message.len();
    for _ in 0..messages {
        pattern.fill(&mut message);
        client.write_all(&message).unwrap();
        thread::sleep(Duration::from_micros(20));
    }
    drop(client);
    assert_eq!(received.recv().unwrap(), 16 << 20);
}

#[test]
fn two_thousand_connections_at_once() {
    let running = Running::tcp(&[backend("127.0.0.1:0", |mut stream| {
        // A pattern that is long enough to be spliced, then silence until the end.
        let _ = write_pattern(&mut stream, 5, 1 << 16);
        let _ = stream.read(&mut [0; 1]);
        let _ = stream.write_all(b"bye");
    })]);
    let clients: Vec<TcpStream> = (0..2000)
        .map(|_| {
            let mut client = running.connect();
            let mut got = vec![0; 1 << 16];
            client.read_exact(&mut got).unwrap();
            client
        })
        .collect();
    assert_eq!(running.connections(), 2000);
    for mut client in clients {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut client).unwrap(), b"bye");
    }
    running.wait_until_empty();
}

#[test]
fn ipv6() {
    let running = Running::tcp(&[backend("[::1]:0", echo)]);
    let mut client = running.connect();
    let mut writing = client.try_clone().unwrap();
    let write = thread::spawn(move || {
        write_pattern(&mut writing, 6, 8 << 20).unwrap();
        writing.shutdown(Shutdown::Write).unwrap();
    });
    assert_eq!(check_pattern(&mut client, 6).unwrap(), 8 << 20);
    write.join().unwrap();
}

#[test]
fn source_hash_keeps_a_client_on_its_backend_and_moves_no_other() {
    let names = ["a", "b", "c"];
    let backends: Vec<_> = names.iter().map(|name| backend("127.0.0.1:0", say(name))).collect();
    let mut service = service(Protocol::Tcp, &backends);
    service.scheduler = Scheduler::SourceHash;
    let running = Running::new(service);
    let ask = |n: u8| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.unwrap();
        socket
            .bind(&format!("127.0.1.{n}:0").parse::<std::net::SocketAddr>().unwrap().into())
            .unwrap();
        socket.connect(&running.pool.service.listen.into()).unwrap();
        let mut stream: TcpStream = socket.into();
        String::from_utf8(read_all(&mut stream).unwrap()).unwrap()
    };
    let before: Vec<String> = (1..40).map(ask).collect();
    assert_eq!(before, (1..40).map(ask).collect::<Vec<_>>());
    assert!(names.iter().all(|name| before.iter().any(|got| got == name)), "{before:?}");
    running.down(0);
    for (before, after) in before.iter().zip((1..40).map(ask)) {
        assert!(if before == "a" { after != "a" } else { *before == after });
    }
}

#[test]
fn sessions_of_a_disabled_backend_are_reset_and_those_of_a_drained_one_go_on() {
    let names = Arc::new(Mutex::new(Vec::new()));
    let backends: Vec<_> = (0..2)
        .map(|n| {
            let names = names.clone();
            backend("127.0.0.1:0", move |mut stream| {
                names.lock().unwrap().push(n);
                stream.write_all(&[n]).unwrap();
                echo(stream);
            })
        })
        .collect();
    let running = Running::tcp(&backends);
    let mut clients: Vec<(u8, TcpStream)> = (0..4)
        .map(|_| {
            let mut client = running.connect();
            let mut name = [0];
            client.read_exact(&mut name).unwrap();
            (name[0], client)
        })
        .collect();
    running.pool.members[0].set_admin(Admin::Disabled);
    running.pool.members[1].set_admin(Admin::Drained);
    for (name, client) in &mut clients {
        if *name == 0 {
            assert!(is_reset(client));
        } else {
            client.write_all(b"still").unwrap();
            client.read_exact(&mut [0; 5]).unwrap();
        }
    }
    assert_eq!(count(&running.pool.counters.reset_on_disable), 2);
    // Neither takes a new one.
    assert!(is_reset(&mut running.connect()));
    assert_eq!(count(&running.pool.counters.refused_no_backend), 1);
}

#[test]
fn a_node_that_yields_resets_every_session_and_goes_on_listening() {
    let running = Running::tcp(&[backend("127.0.0.1:0", echo)]);
    let mut clients: Vec<TcpStream> = (0..50).map(|_| running.connect()).collect();
    for client in &mut clients {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
    }
    assert_eq!(block_on(running.proxy.reset_all()), 50);
    assert!(clients.iter_mut().all(is_reset));
    running.wait_until_empty();
    assert_eq!(count(&running.pool.counters.reset_on_yield), 50);
    let mut client = running.connect();
    client.write_all(b"y").unwrap();
    client.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn after_stop_accepting_sessions_end_by_themselves_and_the_rest_is_reset() {
    let running = Running::tcp(&[backend("127.0.0.1:0", echo)]);
    let mut clients = [running.connect(), running.connect()];
    for client in &mut clients {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
    }
    let [mut one, mut two] = clients;
    block_on(running.proxy.stop_accepting());
    wait_until("it refuses", || TcpStream::connect(running.pool.service.listen).is_err());
    one.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut one).unwrap(), b"");
    wait_until("one is left", || block_on(running.proxy.wait_idle(Duration::ZERO)) == 1);
    drop(running.proxy);
    assert!(is_reset(&mut two), "an end would pass for a whole stream");
    assert_eq!(count(&running.pool.counters.reset_on_yield), 1);
}

#[test]
fn a_reload_keeps_sessions_and_listeners() {
    let first = backend("127.0.0.1:0", echo);
    let running = Running::tcp(&[first]);
    let mut kept = running.connect();
    kept.write_all(b"x").unwrap();
    kept.read_exact(&mut [0; 1]).unwrap();

    let mut renewed = (*running.pool.service).clone();
    renewed.backends[0].address = backend("127.0.0.1:0", say("new"));
    let renewed = Arc::new(Pool::renewed(&running.pool, Arc::new(renewed)));
    let added = Arc::new(Pool::new(Arc::new(service(
        Protocol::Tcp,
        &[backend("127.0.0.1:0", say("added"))],
    ))));
    block_on(running.proxy.renew(&[renewed, added.clone()])).unwrap();
    kept.write_all(b"y").unwrap();
    kept.read_exact(&mut [0; 1]).unwrap();
    assert_eq!(read_all(&mut running.connect()).unwrap(), b"new");
    let mut client = TcpStream::connect(added.service.listen).unwrap();
    assert_eq!(read_all(&mut client).unwrap(), b"added");

    // The first service is gone: its session is not.
    block_on(running.proxy.renew(&[added])).unwrap();
    wait_until("it refuses", || TcpStream::connect(running.pool.service.listen).is_err());
    kept.write_all(b"z").unwrap();
    kept.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn a_service_that_cannot_listen_is_named_and_nothing_changes() {
    let running = Running::tcp(&[backend("127.0.0.1:0", say("old"))]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut other = service(Protocol::Tcp, &[refused()]);
    other.name = "taken".into();
    other.listen = taken.local_addr().unwrap();
    let other = Arc::new(Pool::new(Arc::new(other)));
    let error = block_on(running.proxy.renew(&[other])).unwrap_err();
    assert!(error.to_string().starts_with("service taken: can't listen on 127.0.0.1:"), "{error}");
    assert_eq!(read_all(&mut running.connect()).unwrap(), b"old");
}
