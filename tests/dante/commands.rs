//! CONNECT, BIND and UDP ASSOCIATE through the relay, and what does not go through it.

use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream, UdpSocket};

use crate::pool::*;
use crate::socks::*;

fn web() -> SocketAddrV4 {
    WEB.parse().expect("an address")
}

#[test]
fn connect_with_curl_over_both_families() {
    let pool = Pool::new(&documented("conf").replace("log: error", "log: connect error"));
    let curl = "curl -sS --max-time 60 --socks5";
    let server = pool.on("client", &format!("{curl} {VIP} http://{WEB}/"));
    let server = server_of(server.parse().expect("an address"));
    let server6 = pool.on("client", &format!("{curl} [fd77::100]:1080 http://[fd78::1]/"));
    assert!(["fd78::11", "fd78::12"].contains(&server6.as_str()), "{server6}");

    // Dante knows the relay, not the client.
    let log = pool.log_text(server);
    assert!(log.contains(": tcp/connect [: 10.78.0.2."), "{log}");
    assert!(!log.contains(CLIENT), "{log}");
}

#[test]
fn bind_gets_both_replies_through_the_relay_and_the_peer_comes_straight() {
    let pool = Pool::documented();
    let mut control = pool.as_client(|| greet(ip(CLIENT)).expect("a greeting"));
    let expected = SocketAddrV4::new(*web().ip(), 0);
    let bound = request(&mut control, BIND, expected).expect("a reply").expect("it binds");
    server_of((*bound.ip()).into());

    let relay_forwards =
        relays_count(&pool, &format!("tcp dport {0}; tcp sport {0}", bound.port()));
    let mut peer = pool
        .netns("switch")
        .enter(|| TcpStream::connect(SocketAddr::V4(bound)))
        .expect("the switch")
        .expect("the Dante server waits where it said");
    let came = reply(&mut control).expect("a second reply").expect("a connection");
    assert_eq!(SocketAddr::V4(came), peer.local_addr().expect("an address"));

    peer.write_all(b"from the peer").expect("it is open");
    let mut text = [0; 13];
    control.read_exact(&mut text).expect("what the peer sent");
    assert_eq!(&text, b"from the peer");
    control.write_all(b"from the client").expect("it is open");
    control.shutdown(std::net::Shutdown::Write).expect("it is open");
    let mut text = Vec::new();
    peer.read_to_end(&mut text).expect("what the client sent");
    assert_eq!(text, b"from the client");
    assert_eq!(relay_forwards.seen(&pool), [0, 0], "the peer's connection passes no relay");
}

#[test]
fn udp_goes_straight_and_ends_with_the_control_connection() {
    let pool = Pool::documented();
    let counted = relays_count(&pool, "meta l4proto udp");
    let any = SocketAddrV4::new([0, 0, 0, 0].into(), 0);
    for says_its_address in [true, false] {
        let (udp, mut control) = pool.as_client(|| {
            (UdpSocket::bind((CLIENT, 0)).expect("a port"), greet(ip(CLIENT)).expect("a greeting"))
        });
        udp.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        let SocketAddr::V4(own) = udp.local_addr().expect("an address") else { unreachable!() };
        let named = if says_its_address { own } else { any };
        let bound = request(&mut control, UDP_ASSOCIATE, named).expect("a reply");
        let bound = bound.expect("it associates");
        let other = 1 - server_of((*bound.ip()).into());
        // To the echo server on the other server's node.
        let echo = SocketAddrV4::new(ip(SERVERS[other].1), 7);
        for number in 0..200u32 {
            let sent = datagram(echo, &number.to_be_bytes());
            udp.send_to(&sent, bound).expect("it is sent");
            let mut answer = [0; 100];
            let (length, from) = udp.recv_from(&mut answer).expect("an answer");
            assert_eq!(from, SocketAddr::V4(bound), "straight from the Dante server");
            assert_eq!(&answer[..length], sent);
        }
        assert_eq!(counted.seen(&pool), [0, 0], "no datagram passes a relay");

        drop(control);
        udp.connect(bound).expect("an address");
        eventually("the association has ended", || {
            // The port is closed: what is sent comes back as an error.
            udp.send(&datagram(echo, b"?")).is_err() || {
                let short = std::time::Duration::from_millis(50);
                udp.set_read_timeout(Some(short)).expect("a socket option");
                let received = udp.recv(&mut [0; 100]);
                received.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
            }
        });
    }
    // The counter does count.
    pool.as_client(|| {
        let udp = UdpSocket::bind((CLIENT, 0)).expect("a port");
        udp.send_to(b"?", "10.77.0.2:9").expect("it is sent");
    });
    eventually("a datagram to the relay is counted", || counted.seen(&pool)[0] > 0);
}

/// Counters of packets that a relay receives, forwards or sends.
struct Counted;

fn relays_count(pool: &Pool, matches: &str) -> Counted {
    let rules: String =
        matches.split("; ").map(|one| format!("  {one} counter\n")).collect::<Vec<_>>().concat();
    let chain = |hook: &str| {
        format!(" chain {hook} {{\n  type filter hook {hook} priority 0\n{rules} }}\n")
    };
    let text = format!("table inet t {{\n{}{}}}\n", chain("prerouting"), chain("output"));
    for relay in RELAYS {
        let netns = pool.netns(relay);
        let mut nft = netns.command("nft");
        baton::lab::netns::run_with_input(nft.args(["-f", "-"]), &text).expect("rules");
    }
    Counted
}

impl Counted {
    fn seen(&self, pool: &Pool) -> [u64; 2] {
        RELAYS.map(|relay| {
            let rules = pool.on(relay, "nft list table inet t");
            let mut words = rules.split_whitespace();
            let mut sum = 0;
            while let Some(word) = words.next() {
                if word == "packets" {
                    sum += words.next().and_then(|n| n.parse::<u64>().ok()).expect("a number");
                }
            }
            assert!(rules.contains("packets"), "{rules}");
            sum
        })
    }
}
