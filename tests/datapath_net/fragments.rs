//! Datagrams that are larger than the links, there and back through every mode; and fragments that
//! come in any order, twice, or in floods.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use baton::lab::netns::Netns;
use nix::sys::signal::Signal;
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::net::{Net, service};
use crate::packet::Packet;
use crate::pieces::{cut, fix};

const VIPS: [&str; 2] = ["10.77.0.100:80", "[fd77::100]:80"];
const SERVERS: [&str; 2] = ["10.78.0.11:8080", "[fd78::11]:8080"];

fn services(mode: &str, port: u16) -> String {
    let how = format!("{mode}\nprotocol = \"udp\"");
    service("udp4", "front4", 80, &how, &[("b1", &format!("10.78.0.11:{port}"))])
        + &service("udp6", "front6", 80, &how, &[("b1", &format!("[fd78::11]:{port}"))])
}

/// Answers every datagram with itself.
fn serve_echo(netns: &Netns, address: &str) {
    let socket = netns.enter(|| UdpSocket::bind(address).unwrap()).unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

fn client_socket(net: &Net, to: &str) -> UdpSocket {
    let any = if to.starts_with('[') { "[fd77::10]:0" } else { "10.77.0.10:0" };
    let socket = net.node("client").enter(|| UdpSocket::bind(any).unwrap()).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

fn payload(size: usize, salt: usize) -> Vec<u8> {
    (0..size).map(|n| (n * 31 + n / 251 + salt) as u8).collect()
}

/// The datagram comes back as it is; a few tries, since the machine may be busy.
fn echoes(socket: &UdpSocket, sent: &[u8], send: impl Fn() -> io::Result<()>) -> bool {
    let mut buffer = vec![0; 65536];
    for _ in 0..10 {
        send().unwrap();
        while let Ok(length) = socket.recv(&mut buffer) {
            if buffer[..length] == *sent {
                return true;
            }
        }
    }
    false
}

fn set_mtu(net: &Net, mtu: u32) {
    for (node, segment) in [("client", "front"), ("b1", "back")] {
        net.node(node).ip(&format!("link set {segment} mtu {mtu}")).unwrap();
    }
}

fn large_datagrams_come_back(net: &Net) {
    for mtu in [1500, 1280] {
        set_mtu(net, mtu);
        for to in VIPS {
            let socket = client_socket(net, to);
            for size in [1400, 3000, 9000, 60_000] {
                let sent = payload(size, size);
                let send = || socket.send(&sent).map(drop);
                assert!(echoes(&socket, &sent, send), "{size} bytes to {to}, MTU {mtu}");
            }
        }
    }
    // Every fragment found its way at once.
    let drops = net.drops();
    for reason in ["FRAGMENT", "EARLY_FRAGMENT", "TINY_FRAGMENT"] {
        assert_eq!(drops[reason], 0, "{drops:#}");
    }
}

#[test]
fn large_datagrams_through_passthrough_from_the_vip() {
    let mut net = Net::new();
    SERVERS.iter().for_each(|server| serve_echo(&net.node("b1"), server));
    net.start_relay(&services("mode = \"passthrough\"", 8080));
    large_datagrams_come_back(&net);
}

#[test]
fn large_datagrams_through_passthrough_from_the_client() {
    let mut net = client_source();
    net.start_relay(&services("mode = \"passthrough\"\nsource = \"client\"", 8080));
    large_datagrams_come_back(&net);
}

fn client_source() -> Net {
    let net = Net::new();
    let routes = "route replace default via 10.78.0.100\nroute replace ::/0 via fd78::100\n";
    net.node("b1").ip_batch(routes).unwrap();
    SERVERS.iter().for_each(|server| serve_echo(&net.node("b1"), server));
    net
}

#[test]
fn large_datagrams_through_direct_server_return() {
    let mut net = Net::new();
    let b1 = net.node("b1");
    b1.sysctl(&[("net.ipv4.conf.all.arp_ignore", "1"), ("net.ipv4.conf.all.arp_announce", "2")])
        .unwrap();
    b1.ip_batch("addr add 10.77.0.100/32 dev lo\naddr add fd77::100/128 dev lo nodad\n").unwrap();
    VIPS.iter().for_each(|vip| serve_echo(&b1, vip));
    net.start_relay(&services("mode = \"dsr\"", 80));
    large_datagrams_come_back(&net);
}

/// A socket for whole frames on an interface.
struct Wire(Socket);

impl Wire {
    fn on(netns: &Netns, interface: &str) -> Self {
        let open = || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, None).unwrap();
            let index = nix::net::if_::if_nametoindex(interface).unwrap();
            let mut storage = SockAddrStorage::zeroed();
            // SAFETY: sockaddr_ll is the form of address of this family, fits into the storage,
            // and any bytes are a value of it.
            let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_ifindex = index as i32;
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: as many bytes were written as it says.
            socket.bind(&unsafe { SockAddr::new(storage, length) }).unwrap();
            Self(socket)
        };
        netns.enter(open).unwrap()
    }

    /// The fragments of a datagram, in the order given.
    fn send(&self, fragments: &[Vec<u8>], order: &[usize]) -> io::Result<()> {
        for nth in order {
            self.0.send(&fragments[*nth])?;
            // They come one by one, so that none waits in the same batch as the first.
            thread::sleep(Duration::from_micros(300));
        }
        Ok(())
    }
}

/// The fragments of a datagram as frames for the relay.
fn frames(net: &Net, from: SocketAddr, to: SocketAddr, data: &[u8], id: u32) -> Vec<Vec<u8>> {
    let side = if from.to_string().contains("77") { "front" } else { "back" };
    let mut frame =
        Packet { payload: data.to_vec(), ..Packet::udp(&from.to_string(), &to.to_string()) }
            .bytes();
    let link = net.node("relay").ip(&format!("-br link show dev {side}")).unwrap().stdout;
    let link = String::from_utf8(link).unwrap();
    let mac = link.split_whitespace().nth(2).unwrap().split(':');
    for (byte, text) in frame.iter_mut().zip(mac) {
        *byte = u8::from_str_radix(text, 16).unwrap();
    }
    cut(&frame, id, 1200)
}

const ORDERS: [&[usize]; 5] =
    [&[0, 1, 2, 3], &[3, 2, 1, 0], &[1, 0, 2, 3], &[2, 3, 0, 1], &[1, 1, 3, 0, 2, 3, 0]];

/// Client and server send fragments by hand, in every order, to each other.
fn any_order_arrives(net: &Net) {
    let (front, back) = (Wire::on(&net.node("client"), "front"), Wire::on(&net.node("b1"), "back"));
    for (vip, server) in VIPS.into_iter().zip(SERVERS) {
        let client = client_socket(net, vip);
        let server: SocketAddr = server.parse().unwrap();
        let listen = || UdpSocket::bind((server.ip(), 9090)).unwrap();
        let listener = net.node("b1").enter(listen).unwrap();
        listener.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut id = 77;
        for order in ORDERS {
            // A few tries: on a busy machine the daemon may not get its turn in time.
            let mut tries = 0;
            loop {
                id += 1;
                tries += 1;
                let data = payload(4000, id as usize);
                let to_server =
                    frames(net, client.local_addr().unwrap(), vip.parse().unwrap(), &data, id);
                assert_eq!(to_server.len(), 4);
                front.send(&to_server, order).unwrap();
                let mut buffer = vec![0; 65536];
                let Ok((length, seen)) = listener.recv_from(&mut buffer) else {
                    assert!(tries < 10, "{vip} {order:?}; {:#}", net.drops());
                    continue;
                };
                assert!(buffer[..length] == data, "{vip} {order:?}");
                let to_client = frames(net, listener.local_addr().unwrap(), seen, &data, id);
                back.send(&to_client, order).unwrap();
                match client.recv(&mut buffer) {
                    Ok(length) => {
                        assert!(buffer[..length] == data, "{vip} {order:?} back");
                        break;
                    }
                    Err(_) => {
                        assert!(tries < 10, "{vip} {order:?} back; {:#}", net.drops());
                    }
                }
            }
        }
    }
}

#[test]
fn fragments_in_any_order_through_passthrough_from_the_vip() {
    let mut net = Net::new();
    net.start_relay(&services("mode = \"passthrough\"", 9090));
    any_order_arrives(&net);
}

#[test]
fn fragments_in_any_order_through_passthrough_from_the_client() {
    let mut net = client_source();
    net.start_relay(&services("mode = \"passthrough\"\nsource = \"client\"", 9090));
    any_order_arrives(&net);
}

/// Later fragments without end, of datagrams that have no first: nothing else notices, the daemon
/// lives, and each is counted.
#[test]
fn a_flood_of_fragments_without_a_first_harms_nobody() {
    let mut net = Net::new();
    SERVERS.iter().for_each(|server| serve_echo(&net.node("b1"), server));
    net.start_relay(&services("mode = \"passthrough\"", 8080));
    let client = client_socket(&net, VIPS[0]);
    let sent = payload(9000, 1);
    assert!(echoes(&client, &sent, || client.send(&sent).map(drop)));
    let wire = Wire::on(&net.node("client"), "front");
    // Not from where the answers are asked for: its datagrams' numbers are of the kernel's choice,
    // and a fragment with one of those is forwarded.
    let from = "10.77.0.66:6666".parse().unwrap();
    let mut second = frames(&net, from, VIPS[0].parse().unwrap(), &[0; 1500], 1).remove(1);
    for id in 0..20_000 {
        fix(&mut second, |ip| ip.set_identification(id));
        wire.0.send(&second).unwrap();
        // The answer comes after what was sent before it: never more is on its way than the
        // kernel's backlog of a thousand holds, which would lose some before they are counted.
        if id % 200 == 199 {
            assert!(echoes(&client, &sent, || client.send(&sent).map(drop)), "{:#}", net.drops());
        }
    }
    let all = 20_000;
    net.until("every fragment of the flood is counted", || {
        let drops = net.drops();
        let counted = |reason: &str| drops[reason].as_u64().unwrap();
        counted("FRAGMENT") + counted("EARLY_FRAGMENT") == all && counted("FRAGMENT") > 0
    });
}

/// Those in order go on; of the others each is counted.
#[test]
fn without_a_daemon_fragments_in_order_still_arrive() {
    let mut net = Net::new();
    SERVERS.iter().for_each(|server| serve_echo(&net.node("b1"), server));
    net.start_relay(&services("mode = \"passthrough\"", 8080));
    let client = client_socket(&net, VIPS[0]);
    let sent = payload(9000, 1);
    assert!(echoes(&client, &sent, || client.send(&sent).map(drop)));
    let wire = Wire::on(&net.node("client"), "front");
    let data = payload(4000, 5);
    let fragments =
        frames(&net, client.local_addr().unwrap(), VIPS[0].parse().unwrap(), &data, 4711);
    net.end_relay(Signal::SIGKILL);
    net.open_gate();
    assert!(echoes(&client, &sent, || client.send(&sent).map(drop)));
    let before = net.drops()["EARLY_FRAGMENT"].as_u64().unwrap();
    wire.send(&fragments, &[3, 2, 1, 0]).unwrap();
    net.until("they are counted", || net.drops()["EARLY_FRAGMENT"].as_u64().unwrap() == before + 3);
}
