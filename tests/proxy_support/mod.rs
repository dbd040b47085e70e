//! What the proxy's tests share: services on loopback addresses, and backends of a few kinds.

#![allow(dead_code, missing_docs, unreachable_pub)]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use baton::pool::{Health, Pool};
use baton::proxy::Proxy;
use baton::service::{
    Backend, FlowPolicy, Limits, Mode, Protocol, ProxyProtocol, Scheduler, Service,
};
use socket2::SockRef;

/// A service on a free port of the loopback.
pub fn service(protocol: Protocol, backends: &[SocketAddr]) -> Service {
    let host =
        if backends.first().is_some_and(SocketAddr::is_ipv6) { "[::1]" } else { "127.0.0.1" };
    let listen = match protocol {
        Protocol::Tcp => {
            TcpListener::bind(format!("{host}:0")).and_then(|socket| socket.local_addr())
        }
        Protocol::Udp => {
            std::net::UdpSocket::bind(format!("{host}:0")).and_then(|socket| socket.local_addr())
        }
    };
    let backend = |(n, &address): (usize, &SocketAddr)| Backend {
        name: format!("b{n}"),
        address,
        weight: 1,
        max_connections: 10_000,
    };
    Service {
        name: "test".into(),
        listen: listen.unwrap(),
        protocol,
        mode: Mode::Proxy,
        scheduler: Scheduler::RoundRobin,
        backends: backends.iter().enumerate().map(backend).collect(),
        check: None,
        limits: Limits {
            max_connections: 10_000,
            max_connections_per_source: 10_000,
            connect_timeout: Duration::from_secs(2),
            connect_retries: 2,
            idle_timeout: Duration::from_secs(60),
            half_close_timeout: Duration::from_secs(60),
            affinity: None,
        },
        flows: FlowPolicy::of(Protocol::Tcp),
        proxy_protocol: ProxyProtocol::Off,
    }
}

/// A running proxy of one service.
pub struct Running {
    pub pool: Arc<Pool>,
    pub proxy: Proxy,
}

impl Running {
    pub fn new(service: Service) -> Self {
        let pool = Arc::new(Pool::new(Arc::new(service)));
        let proxy = Proxy::start(std::slice::from_ref(&pool), 2).unwrap();
        Self { pool, proxy }
    }

    /// A TCP service with default limits.
    pub fn tcp(backends: &[SocketAddr]) -> Self {
        Self::new(service(Protocol::Tcp, backends))
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.pool.service.listen).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    pub fn down(&self, member: usize) {
        self.pool.members[member].set_health(Health::Down, "test");
    }

    /// Waits until no connection is left, here and on every member.
    pub fn wait_until_empty(&self) {
        wait_until("all places are given back", || {
            self.pool.connections.load(Ordering::Relaxed) == 0
                && self
                    .pool
                    .members
                    .iter()
                    .all(|member| member.connections.load(Ordering::Relaxed) == 0)
        });
    }

    pub fn connections(&self) -> u32 {
        self.pool.connections.load(Ordering::Relaxed)
    }
}

pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

pub fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Waits, generously, for what must come about.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "never came about: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A backend that hands each connection to `serve` on a thread of its own.
pub fn backend(at: &str, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind(at).unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Sends back what it gets, and the end.
pub fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
}

/// Says its name and ends.
pub fn say(name: &'static str) -> impl Fn(TcpStream) + Send + Sync + 'static {
    move |mut stream| {
        let _ = stream.write_all(name.as_bytes());
    }
}

/// Holds the connection open, says and reads nothing.
pub fn hold(stream: TcpStream) {
    thread::sleep(Duration::from_secs(120));
    drop(stream);
}

/// An address that nobody listens on.
pub fn refused() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Reads to the end or to an error.
pub fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).map(|_| all)
}

/// Whether the next read finds the connection reset.
pub fn is_reset(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(1..) => {}
            Ok(0) => return false,
            Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

/// A stream of bytes that shows every loss, doubling and swap; cheap to make and to check.
pub struct Pattern(u64);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            chunk.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// Writes `len` bytes of the pattern (a multiple of 64 KiB).
pub fn write_pattern(stream: &mut impl Write, seed: u64, len: usize) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; 1 << 16];
    for _ in 0..len >> 16 {
        pattern.fill(&mut buffer);
        stream.write_all(&buffer)?;
    }
    Ok(())
}

/// Reads to the end and checks that it is the pattern; how many bytes came.
pub fn check_pattern(stream: &mut impl Read, seed: u64) -> io::Result<usize> {
    let mut pattern = Pattern::new(seed);
    let (mut got, mut due) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut total = 0;
    loop {
        let mut filled = 0;
        while filled < got.len() {
            match stream.read(&mut got[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        pattern.fill(&mut due);
        if got[..filled] != due[..filled] {
            return Err(io::Error::other(format!("wrong bytes after {total}")));
        }
        total += filled;
        if filled < got.len() {
            return Ok(total);
        }
    }
}

/// Resident memory of this process, in bytes.
pub fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

/// Open files of this process.
pub fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}
