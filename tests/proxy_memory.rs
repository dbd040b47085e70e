//! What slow and hostile clients can hold. One test: it looks at the memory and the files of the
//! whole process.

mod proxy_support;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use baton::service::Protocol;
use proxy_support::*;

/// A backend that keeps its connections without a thread for each.
fn keeping() -> (SocketAddr, Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, kept) = channel();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let _ = sender.send(stream);
        }
    });
    (address, kept)
}

/// The most bytes that can be between a writer and a reader who does not read: two connections'
/// buffers, which the kernel sizes by itself up to its own limits, and what Baton holds itself, a
/// pipe of at most 1 MiB and what is in its hands.
fn most_on_their_way() -> usize {
    let most = |name: &str| -> usize {
        let limits = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap();
        limits.split_whitespace().nth(2).unwrap().parse().unwrap()
    };
    2 * (most("tcp_wmem") + most("tcp_rmem")) + (2 << 20)
}

/// Writes to all of them until none has taken anything for a while, or one has taken more than it
/// may; the most that one took.
fn write_until_stuck(streams: &mut [TcpStream], most: usize) -> usize {
    let buffer = vec![7; 1 << 16];
    let mut taken = vec![0; streams.len()];
    let mut quiet = 0;
    while quiet < 20 && taken.iter().all(|&taken| taken <= most) {
        quiet += 1;
        for (stream, taken) in streams.iter_mut().zip(&mut taken) {
            stream.set_nonblocking(true).unwrap();
            match stream.write(&buffer) {
                Ok(written) => {
                    *taken += written;
                    quiet = 0;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        }
        if quiet > 0 {
            thread::sleep(Duration::from_millis(25));
        }
    }
    taken.into_iter().max().unwrap()
}

#[test]
fn slow_and_hostile_clients_hold_little() {
    let (address, kept) = keeping();
    let mut service = service(Protocol::Tcp, &[address]);
    service.limits.idle_timeout = Duration::from_secs(600);
    let running = Running::new(service);

    // Clients that send a byte now and then, and nothing more.
    let before = resident();
    let files = open_files();
    let mut slow: Vec<TcpStream> = (0..1000).map(|_| running.connect()).collect();
    for client in &mut slow {
        client.write_all(b"G").unwrap();
    }
    let mut backends: Vec<TcpStream> = slow.iter().map(|_| kept.recv().unwrap()).collect();
    for backend in &mut backends {
        backend.read_exact(&mut [0; 1]).unwrap();
    }
    let held = resident().saturating_sub(before) / slow.len();
    println!("an idle session holds {held} bytes");
    assert!(held < 16 << 10, "an idle session holds {held} bytes");
    // Client and backend have one each in this process, the proxy two.
    assert_eq!((open_files() - files) / slow.len(), 4);

    // Clients that ask for a lot and read none of it.
    let before = resident();
    let most = most_on_their_way();
    let taken = write_until_stuck(&mut backends[..30], most);
    println!("at most {taken} bytes are on their way to a client that doesn't read");
    assert!(taken <= most, "{taken} bytes are on their way to a client that doesn't read");
    // Clients that send to backends that read none of it.
    let taken = write_until_stuck(&mut slow[100..130], most);
    println!("at most {taken} bytes are on their way to a backend that doesn't read");
    assert!(taken <= most, "{taken} bytes are on their way to a backend that doesn't read");
    let held = resident().saturating_sub(before);
    println!("sixty stuck sessions hold {held} bytes");
    assert!(held < 60 * (32 << 10), "sixty stuck sessions hold {held} bytes");
    // A lent pipe each, at most.
    assert!(open_files() - files <= 4 * slow.len() + 60 * 2 + 16);

    drop((slow, backends));
    running.wait_until_empty();
    wait_until("the pipes are closed", || open_files() < files + 80);
}
