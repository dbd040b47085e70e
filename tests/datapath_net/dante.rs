//! Real Dante servers behind passthrough, in both source modes, chosen by the client's address. The
//! relay carries the control connections; datagrams of UDP ASSOCIATE go straight from the client
//! to the server that it was sent to, and back.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};
use std::thread;

use baton::lab::netns::{Netns, run};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use crate::net::{Net, PATIENCE, service};

const VIP: &str = "10.77.0.100:1080";
const WEB: &str = "10.78.0.1:80";
const SERVERS: [&str; 2] = ["10.78.0.11", "10.78.0.12"];
/// Addresses of the client besides its first.
const SOURCES: std::ops::Range<u8> = 20..36;

/// A danted with its children; ends when dropped.
struct Dante(Child);

impl Dante {
    fn start(netns: &Netns, folder: &std::path::Path, node: &str) -> Self {
        let conf = folder.join(format!("{node}.conf"));
        std::fs::write(
            &conf,
            "logoutput: stderr\ninternal: back port = 1080\nexternal: back\n\
             clientmethod: none\nsocksmethod: none\n\
             user.privileged: root\nuser.unprivileged: nobody\n\
             client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n\
             socks pass { from: 0.0.0.0/0 to: 0.0.0.0/0\n\
             command: bind connect udpassociate bindreply udpreply\n log: connect }\n",
        )
        .unwrap();
        let mut command = netns.command("danted");
        command.arg("-f").arg(&conf).arg("-p").arg(folder.join(format!("{node}.pid")));
        let log = std::fs::File::create(folder.join(format!("{node}.log"))).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self(command.process_group(0).spawn().unwrap())
    }
}

impl Drop for Dante {
    fn drop(&mut self) {
        // Not waited for yet, so the number is still its own.
        let _ = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// A web server behind the backends' gateway, which says who came: a Dante server.
fn serve_web(net: &Net) {
    let listener = net.node("switch").enter(|| TcpListener::bind(WEB).unwrap()).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let from = stream.peer_addr().map(|peer| peer.ip());
            let mut request = [0; 4096];
            if let (Ok(from), Ok(1..)) = (from, stream.read(&mut request)) {
                let text = format!("HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n{from}");
                let _ = stream.write_all(text.as_bytes());
            }
        }
    });
}

struct Pool {
    _servers: [Dante; 2],
    net: Net,
    folder: tempfile::TempDir,
}

impl Pool {
    fn new(source: &str) -> Self {
        let mut net = Net::new();
        let folder = tempfile::tempdir().unwrap();
        serve_web(&net);
        for host in SOURCES {
            net.node("client").ip(&format!("addr add 10.77.0.{host}/24 dev front")).unwrap();
        }
        let servers = ["b1", "b2"].map(|node| {
            let netns = net.node(node);
            if source == "client" {
                // What comes from the service's port goes back through the relay, and nothing
                // else: datagrams and what Dante fetches take the straight way.
                netns.ip("route add default via 10.78.0.100 table 80").unwrap();
                netns.ip("rule add ipproto tcp sport 1080 lookup 80").unwrap();
            }
            Dante::start(&netns, folder.path(), node)
        });
        let how = format!(
            "mode = \"passthrough\"\nsource = \"{source}\"\nscheduler = \"source-hash\"\ncheck = \"socks\""
        );
        let check = format!(
            "[checks.socks]\ntype = \"socks5\"\ntarget = \"{WEB}\"\ninterval = \"200ms\"\ntimeout = \"190ms\"\n"
        );
        let backends = SERVERS.map(|server| format!("{server}:1080"));
        let backends = [("b1", backends[0].as_str()), ("b2", backends[1].as_str())];
        net.start_relay(&(check + &service("socks", "front4", 1080, &how, &backends)));
        net.until("both servers are up", || {
            let status = net.status();
            let backends = status["services"][0]["backends"].as_array().unwrap();
            backends.iter().all(|backend| backend["health"] == "up")
        });
        Self { _servers: servers, net, folder }
    }

    /// A control connection from this address, greeted (RFC 1928).
    fn greet(&self, source: Ipv4Addr) -> TcpStream {
        let connect = || {
            let control = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            control.bind(&SocketAddr::from((source, 0)).into()).unwrap();
            let vip: SocketAddr = VIP.parse().unwrap();
            control.connect_timeout(&vip.into(), PATIENCE).unwrap();
            TcpStream::from(control)
        };
        let mut control = self.net.node("client").enter(connect).unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        control.write_all(&[5, 1, 0]).unwrap();
        let mut method = [0; 2];
        control.read_exact(&mut method).unwrap();
        assert_eq!(method, [5, 0]);
        control
    }

    /// Which server the web server sees when this client fetches something by CONNECT.
    fn server_for(&self, source: Ipv4Addr) -> IpAddr {
        let mut control = self.greet(source);
        request(&mut control, 1, WEB.parse().unwrap());
        control.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        control.read_to_string(&mut text).unwrap();
        let body = text.rsplit("\r\n").next().unwrap();
        body.parse().unwrap_or_else(|_| panic!("{text}"))
    }
}

/// Sends a request; the address that is bound for it.
fn request(control: &mut TcpStream, command: u8, address: SocketAddrV4) -> SocketAddrV4 {
    control.write_all(&[&[5, command, 0, 1], &destination(address)[..]].concat()).unwrap();
    let mut bytes = [0; 10];
    control.read_exact(&mut bytes).unwrap();
    let [5, 0, 0, 1, a, b, c, d, high, low] = bytes else { panic!("{bytes:?}") };
    SocketAddrV4::new([a, b, c, d].into(), u16::from_be_bytes([high, low]))
}

fn destination(address: SocketAddrV4) -> Vec<u8> {
    [&address.ip().octets()[..], &address.port().to_be_bytes()].concat()
}

/// `seen`: who the servers take the client 10.77.0.20 for.
fn serves(source: &str, seen: &str) {
    let pool = Pool::new(source);
    // Every client has its server, and both have clients.
    let mut servers = HashSet::new();
    for host in SOURCES {
        let from = Ipv4Addr::new(10, 77, 0, host);
        let server = pool.server_for(from);
        for _ in 0..3 {
            assert_eq!(pool.server_for(from), server, "{from}");
        }
        servers.insert(server.to_string());
    }
    assert_eq!(servers, HashSet::from(SERVERS.map(str::to_owned)));
    let logs = ["b1", "b2"]
        .map(|node| std::fs::read_to_string(pool.folder.path().join(format!("{node}.log"))));
    let logs = logs.map(Result::unwrap).concat();
    assert!(logs.contains(&format!(": tcp/connect [: {seen}.")), "{seen}: {logs}");
    assert!(seen == "10.77.0.20" || !logs.contains("10.77.0.20."), "{logs}");
    let mut curl = pool.net.node("client").command("curl");
    curl.args(["-sS", "--max-time", "30", "--socks5", VIP, &format!("http://{WEB}/")]);
    let seen = String::from_utf8(run(&mut curl).unwrap().stdout).unwrap();
    assert!(SERVERS.contains(&seen.as_str()), "{seen}");

    // Datagrams: to the server itself, whatever the relay does, and back from there.
    let client = Ipv4Addr::new(10, 77, 0, 10);
    let mut control = pool.greet(client);
    let udp = pool.net.node("client").enter(|| UdpSocket::bind((client, 0)).unwrap()).unwrap();
    udp.set_read_timeout(Some(PATIENCE)).unwrap();
    let bound = request(&mut control, 3, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    assert!(SERVERS.contains(&bound.ip().to_string().as_str()), "{bound}");
    let echo = pool.net.node("switch").enter(|| UdpSocket::bind("10.78.0.1:7").unwrap()).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..length], from);
        }
    });
    pool.net.without_the_relay(|| {
        for number in 0..100_u32 {
            let head = destination("10.78.0.1:7".parse().unwrap());
            let sent = [&[0, 0, 0, 1], &head[..], &number.to_be_bytes()].concat();
            udp.send_to(&sent, bound).unwrap();
            let mut answer = [0; 100];
            let (length, from) = udp.recv_from(&mut answer).unwrap();
            assert_eq!((from, &answer[..length]), (bound.into(), &sent[..]));
        }
    });
    // The association lives as long as its control connection, which has outlived that too.
    control.set_nonblocking(true).unwrap();
    assert_eq!(
        control.read(&mut [0]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock,
        "the control connection is open"
    );
}

#[test]
fn dante_sees_the_vip() {
    serves("vip", "10.78.0.100");
}

#[test]
fn dante_sees_the_client() {
    serves("client", "10.77.0.20");
}
