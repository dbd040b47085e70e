//! Out of file descriptors. One test: it changes the limit of the whole process.

mod proxy_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use proxy_support::*;
use socket2::{Domain, Socket, Type};

#[test]
fn without_file_descriptors_accepting_waits_and_then_goes_on() {
    let running = Running::tcp(&[backend("127.0.0.1:0", echo)]);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert_eq!(soft, hard, "the proxy has raised it");
    // The backend has its accept under way, and with it the descriptor for one more.
    let mut first = running.connect();
    first.write_all(b"x").unwrap();
    first.read_exact(&mut [0; 1]).unwrap();
    thread::sleep(Duration::from_millis(100));

    let clients: Vec<Socket> =
        (0..10).map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()).collect();

    // The next descriptor would be one too many.
    let next = std::fs::File::open("/dev/null").unwrap();
    let lowest_free = std::os::fd::AsRawFd::as_raw_fd(&next) as u64;
    drop(next);
    setrlimit(Resource::RLIMIT_NOFILE, lowest_free, hard).unwrap();
    for client in &clients {
        client.connect(&running.pool.service.listen.into()).unwrap();
    }
    thread::sleep(Duration::from_secs(1));
    let failed = count(&running.pool.counters.accept_failed);
    assert!((1..=60).contains(&failed), "{failed} failed accepts in a second");

    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    for client in clients {
        let mut client = TcpStream::from(client);
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
    }
}
