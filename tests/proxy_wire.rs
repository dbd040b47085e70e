//! The proxy beside other people's programs and on addresses that come and go: HAProxy as the
//! reader of the PROXY protocol, network namespaces for the VIP.

mod proxy_support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use baton::lab::netns::Netns;
use baton::pool::Pool;
use baton::proxy::Proxy;
use baton::service::{Protocol, ProxyProtocol, Service};
use proxy_support::*;

/// A child process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port(host: &str) -> SocketAddr {
    TcpListener::bind(format!("{host}:0")).unwrap().local_addr().unwrap()
}

/// HAProxy that takes a PROXY header and answers with the addresses that it found in it.
fn haproxy(binds: &[SocketAddr]) -> (Process, tempfile::TempDir) {
    let mut config = String::from(
        "defaults\n mode http\n timeout client 10s\n timeout server 10s\n timeout connect 1s\n\
         frontend f\n",
    );
    for bind in binds {
        config += &format!(" bind {bind} accept-proxy\n");
    }
    config += " http-request return status 200 content-type text/plain \
               lf-string \"%[src] %[src_port] %[dst] %[dst_port]\"\n";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("haproxy.cfg");
    std::fs::write(&path, config).unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
    let child = Process(command.spawn().expect("haproxy is installed"));
    for bind in binds {
        wait_until("HAProxy listens", || TcpStream::connect(bind).is_ok());
    }
    (child, folder)
}

#[test]
fn haproxy_reads_who_the_client_is_from_our_header() {
    let binds = [free_port("127.0.0.1"), free_port("[::1]")];
    let _haproxy = haproxy(&binds);
    for bind in binds {
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            let mut service = service(Protocol::Tcp, &[bind]);
            service.proxy_protocol = version;
            let running = Running::new(service);
            let mut client = running.connect();
            client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            let (us, vip) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let answer = String::from_utf8(read_all(&mut client).unwrap()).unwrap();
            let told = format!("{} {} {} {}", us.ip(), us.port(), vip.ip(), vip.port());
            assert!(answer.ends_with(&told), "{version:?}: {told:?} in {answer}");
        }
    }
}

/// A client and a relay on one link; removed when dropped.
struct Link {
    client: Netns,
    relay: Netns,
}

const VIPS: [&str; 2] = ["10.77.0.100", "fd77::100"];

impl Link {
    fn new(tag: &str) -> Self {
        let name = |role: &str| format!("bt-px{tag}{}-{role}", std::process::id());
        let link = Self {
            client: Netns::create(&name("c")).unwrap(),
            relay: Netns::create(&name("r")).unwrap(),
        };
        let peer = format!("link add eth0 type veth peer name eth0 netns {}", link.relay.name());
        link.client.ip(&peer).unwrap();
        for (node, host) in [(&link.client, 10), (&link.relay, 2)] {
            node.ip(&format!("addr add 10.77.0.{host}/24 dev eth0")).unwrap();
            node.ip(&format!("addr add fd77::{host}/64 dev eth0 nodad")).unwrap();
            node.ip("link set eth0 up").unwrap();
        }
        link
    }

    fn vip(&self, what: &str, vip: &str) {
        let (prefix, nodad) = if vip.contains(':') { (128, "nodad") } else { (32, "") };
        let nodad = if what == "add" { nodad } else { "" };
        self.relay.ip(&format!("addr {what} {vip}/{prefix} dev eth0 {nodad}")).unwrap();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.client.remove();
        let _ = self.relay.remove();
    }
}

/// A service at a VIP with its backend on the relay's own loopback.
fn at_vip(link: &Link, protocol: Protocol, vip: &str) -> (Arc<Pool>, Proxy) {
    link.relay
        .enter(|| {
            let address = match protocol {
                Protocol::Tcp => backend("[::1]:0", echo),
                Protocol::Udp => udp_echo("[::1]:0"),
            };
            let service = Service {
                listen: SocketAddr::new(vip.parse().unwrap(), 1080),
                ..service(protocol, &[address])
            };
            let pool = Arc::new(Pool::new(Arc::new(service)));
            let proxy = Proxy::start(std::slice::from_ref(&pool), 2).unwrap();
            (pool, proxy)
        })
        .unwrap()
}

fn udp_echo(at: &str) -> SocketAddr {
    let socket = UdpSocket::bind(at).unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    address
}

#[test]
fn a_vip_that_leaves_takes_no_client_with_it_unnoticed() {
    let link = Link::new("t");
    for vip in VIPS {
        // Bound before the VIP is there.
        let (pool, proxy) = at_vip(&link, Protocol::Tcp, vip);
        link.vip("add", vip);
        let connect = || TcpStream::connect(pool.service.listen).unwrap();
        let mut clients: Vec<TcpStream> =
            link.client.enter(|| (0..10).map(|_| connect()).collect()).unwrap();
        for client in &mut clients {
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            client.write_all(b"x").unwrap();
            client.read_exact(&mut [0; 1]).unwrap();
        }
        link.vip("del", vip);
        assert_eq!(block_on(proxy.reset_all()), 10);
        assert!(clients.iter_mut().all(is_reset), "{vip}: not every client was told");
        // And it is served again when the VIP is back.
        link.vip("add", vip);
        let mut client = link.client.enter(connect).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(b"y").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
    }
}

#[test]
fn only_clients_that_came_to_a_vip_are_reset_when_it_leaves() {
    let link = Link::new("a");
    for (any, vip) in ["0.0.0.0", "::"].into_iter().zip(VIPS) {
        link.vip("add", vip);
        let (_pool, proxy) = at_vip(&link, Protocol::Tcp, any);
        let own = if vip.contains(':') { "fd77::2" } else { "10.77.0.2" };
        let mut clients = [vip, own].map(|address| {
            let address = SocketAddr::new(address.parse().unwrap(), 1080);
            let connect = || TcpStream::connect(address).unwrap();
            let mut client = link.client.enter(connect).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            client.write_all(b"x").unwrap();
            client.read_exact(&mut [0; 1]).unwrap();
            client
        });
        assert_eq!(block_on(proxy.reset([vip.parse().unwrap()])), 1);
        assert!(is_reset(&mut clients[0]));
        clients[1].write_all(b"y").unwrap();
        clients[1].read_exact(&mut [0; 1]).unwrap();
    }
}

#[test]
fn a_killed_daemon_leaves_no_stream_that_looks_whole() {
    let address = backend("127.0.0.1:0", |mut stream| {
        stream.write_all(b"half of it").unwrap();
        hold(stream);
    });
    let service = service(Protocol::Tcp, &[address]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("baton.toml");
    let config = format!(
        "[node]\nname = \"test\"\ncontrol = \"{}/control.sock\"\n\n[[services]]\nname = \"s\"\n\
         listen = \"{}\"\n[[services.backends]]\nname = \"b\"\naddress = \"{address}\"\n",
        folder.path().display(),
        service.listen
    );
    std::fs::write(&path, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["run", "-c"]).arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
    let mut daemon = Process(command.spawn().unwrap());
    wait_until("the daemon listens", || TcpStream::connect(service.listen).is_ok());
    let mut client = TcpStream::connect(service.listen).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    daemon.0.kill().unwrap();
    assert!(is_reset(&mut client));
}

#[test]
fn a_udp_service_on_every_address_answers_from_the_one_that_was_asked() {
    let link = Link::new("w");
    for (any, vip) in ["0.0.0.0", "::"].into_iter().zip(VIPS) {
        link.vip("add", vip);
        let (_pool, _proxy) = at_vip(&link, Protocol::Udp, any);
        let bind = format!("{}:0", if vip.contains(':') { "[::]" } else { any });
        let client = link.client.enter(|| UdpSocket::bind(bind).unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // One client at two of the relay's addresses has two sessions.
        let own = if vip.contains(':') { "fd77::2" } else { "10.77.0.2" };
        for asked in [vip, own, vip] {
            let asked = SocketAddr::new(asked.parse().unwrap(), 1080);
            client.send_to(b"x", asked).unwrap();
            let (_, from) = client.recv_from(&mut [0; 8]).unwrap();
            assert_eq!(from, asked);
        }
    }
}

#[test]
fn replies_to_datagrams_leave_with_the_vip_as_their_source() {
    let link = Link::new("u");
    for vip in VIPS {
        let (pool, _proxy) = at_vip(&link, Protocol::Udp, vip);
        link.vip("add", vip);
        let any = if vip.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
        let client = link.client.enter(|| UdpSocket::bind(any).unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.send_to(b"x", pool.service.listen).unwrap();
        let (_, from) = client.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from, pool.service.listen);
    }
}
