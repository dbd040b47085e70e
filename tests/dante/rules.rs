//! What docs/dante.md says of Dante's rules and of the PROXY protocol.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream, UdpSocket};
use std::time::Duration;

use crate::pool::*;
use crate::socks::*;

#[test]
fn with_rules_for_the_relays_alone_udp_is_refused_or_ended() {
    let rule = "    from: 10.77.0.0/24 to: 0.0.0.0/0\n    command: udpassociate\n";
    let conf = documented("conf");
    assert!(conf.contains(rule));
    let pool = Pool::new(&conf.replace(rule, &rule.replace("10.77.0.0/24", "10.78.0.2/31")));
    let (udp, mut control) = pool.as_client(|| {
        (UdpSocket::bind((CLIENT, 0)).expect("a port"), greet(ip(CLIENT)).expect("a greeting"))
    });
    let std::net::SocketAddr::V4(own) = udp.local_addr().expect("an address") else {
        unreachable!()
    };
    assert_eq!(request(&mut control, UDP_ASSOCIATE, own).expect("a reply"), Err(2));

    let mut control = pool.as_client(|| greet(ip(CLIENT)).expect("a greeting"));
    let open = SocketAddrV4::new([0, 0, 0, 0].into(), 0);
    let bound = request(&mut control, UDP_ASSOCIATE, open).expect("a reply").expect("granted");
    let echo = SocketAddrV4::new(ip(SERVERS[0].1), 7);
    udp.send_to(&datagram(echo, b"?"), bound).expect("it is sent");
    assert_eq!(control.read(&mut [0]).expect("an orderly end"), 0, "ended at the first datagram");
}

#[test]
fn without_a_rule_for_the_request_udp_is_refused() {
    let conf = documented("conf").replace("connect bind udpassociate", "connect bind");
    let pool = Pool::new(&conf);
    let mut control = pool.as_client(|| greet(ip(CLIENT)).expect("a greeting"));
    let open = SocketAddrV4::new([0, 0, 0, 0].into(), 0);
    assert_eq!(request(&mut control, UDP_ASSOCIATE, open).expect("a reply"), Err(2));
}

#[test]
fn clients_cannot_go_around_the_relays() {
    let pool = Pool::documented();
    let straight = format!("{}:1080", SERVERS[0].1);
    let greeted = pool.as_client(|| {
        let mut control = TcpStream::connect(&straight).expect("it listens");
        control.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        // It may be closed before this arrives.
        let _ = control.write_all(&[5, 1, 0]);
        control.read_exact(&mut [0; 2]).is_ok()
    });
    assert!(!greeted, "`client pass` knows the relays only");
}

#[test]
fn dante_closes_on_a_proxy_header() {
    let pool = Pool::documented();
    let answer = pool.netns("relay1").enter(|| {
        let mut control = TcpStream::connect(format!("{}:1080", SERVERS[0].1)).expect("it listens");
        control.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket option");
        control
            .write_all(b"PROXY TCP4 10.77.0.10 10.77.0.100 5000 1080\r\n\x05\x01\x00")
            .expect("it is sent");
        let mut answer = Vec::new();
        // Closed, in order or by a reset: what was sent is not read to its end.
        let end = control.read_to_end(&mut answer);
        (end.map_err(|error| error.kind()), answer)
    });
    match answer.expect("the relay") {
        (Ok(_) | Err(std::io::ErrorKind::ConnectionReset), answer) => assert_eq!(answer, b""),
        (other, answer) => panic!("{other:?} {answer:?}"),
    }
}
