//! Every probe over TCP against every way in which a server can misbehave.

use baton::service::{Probe, SocksTarget};

use crate::support::*;

const GET: &str = "connected, request sent";
const TEXT: &str = "connected, text sent";
const GREETING: &str = "connected, greeting sent";
const CONNECT: &str = "connected, greeting answered, connect to the target sent";

fn http() -> Probe {
    Probe::Http { method: "GET".into(), path: "/".into(), host: None, status: 200..=299 }
}

fn socks() -> Probe {
    let target = SocksTarget::Address("192.0.2.1:80".parse().expect("an address"));
    Probe::Socks5 { target, credentials: None }
}

fn ping() -> Probe {
    Probe::SendExpect { send: b"PING\n".to_vec(), expect: b"+PONG".to_vec() }
}

#[test]
fn each_way_to_misbehave_has_its_words() {
    let says = |text: &[u8]| Does::Says(text.to_vec());
    let closes = |text: &[u8]| Does::SaysAndCloses(text.to_vec());
    let endless = |text: &[u8]| Does::SaysForEver(text.to_vec());
    let no_answer = |reached: &str| down(&format!("no answer within 2s ({reached})"));
    let cut = |reached: &str| down(&format!("closed before the answer was complete ({reached})"));
    let reset = |reached: &str| down(&format!("connection reset by peer ({reached})"));

    let rows = vec![
        (Probe::Tcp, Does::Nothing, up()),
        (Probe::Tcp, Does::Resets, up()),
        (http(), says(b"HTTP/1.1 204 No Content\r\n\r\n"), up()),
        (http(), closes(b"HTTP/1.0 200\r\n\r\nhello"), up()),
        (http(), endless(b"HTTP/1.1 200 OK\r\n"), up()),
        (http(), says(b"HTTP/1.1 503 Busy\r\n\r\n"), down("http status 503, not 200 to 299")),
        (http(), Does::Nothing, no_answer(GET)),
        (http(), says(b"HTTP/1.1 2"), no_answer(GET)),
        (http(), closes(b"HTTP/1.1 2"), cut(GET)),
        (http(), closes(b""), cut(GET)),
        (http(), Does::Resets, reset(GET)),
        (http(), says(b"220 mail ready\r\n"), down(r#"not an http answer: "220 mail ready\r\n""#)),
        (
            http(),
            endless(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
            down(&format!("the answer goes on without an end ({GET})")),
        ),
        (ping(), says(b"+PONG\r\n"), up()),
        (ping(), closes(b"hello +PONG"), up()),
        (ping(), Does::Nothing, no_answer(TEXT)),
        (ping(), says(b"+PO"), no_answer(&format!("{TEXT}, something else was received"))),
        (ping(), closes(b""), cut(TEXT)),
        (ping(), Does::Resets, reset(TEXT)),
        (ping(), closes(b"-ERR"), down(r#""+PONG" is not in the answer, which begins "-ERR""#)),
        (
            ping(),
            endless(b"abcdefgh"),
            down(
                r#""+PONG" is not in the answer, which begins "abcdefghabcdefghabcdefghabcdefghabcdefgh…""#,
            ),
        ),
        (socks(), Does::Nothing, no_answer(GREETING)),
        (socks(), says(&[5]), no_answer(GREETING)),
        (socks(), says(&[5, 0]), no_answer(CONNECT)),
        (socks(), says(&[5, 0, 5, 0]), no_answer(CONNECT)),
        (socks(), closes(&[5]), cut(GREETING)),
        (socks(), Does::Resets, reset(GREETING)),
        (socks(), says(&[5, 0, 5, 0, 0, 1, 192, 0, 2, 9, 0, 80]), up()),
        (socks(), endless(&[5, 0, 5, 0, 0, 1, 192, 0, 2, 9, 0, 80]), up()),
        (
            socks(),
            says(&[5, 0, 5, 5, 0, 1, 0, 0, 0, 0, 0, 0]),
            down("socks5 reply 5: connection refused by target"),
        ),
        (socks(), endless(b"\0"), down("not a socks5 answer: it begins with byte 0")),
    ];
    let (probes, expected): (Vec<_>, Vec<_>) =
        rows.into_iter().map(|(probe, does, expected)| ((probe, fake(does)), expected)).unzip();
    let seen = verdicts(probes.clone());
    for (row, ((probe, seen), expected)) in probes.into_iter().zip(seen).zip(expected).enumerate() {
        match &expected.1 {
            // How much of an endless stream is there at the first look is up to the kernel.
            text if text.ends_with("…\"") => assert!(seen.1.starts_with(&text[..45]), "{seen:?}"),
            _ => assert_eq!(seen, expected, "row {row}: {probe:?}"),
        }
    }
}

#[test]
fn a_refused_connection_is_called_so_by_every_probe() {
    let (address, _socket) = refusing();
    let probes = [Probe::Tcp, http(), ping(), socks()].map(|probe| (probe, address));
    for verdict in verdicts(probes.to_vec()) {
        assert_eq!(verdict, down("connect: connection refused"));
    }
}

#[test]
fn a_connection_that_nobody_answers_is_given_up() {
    let space = Space::new(&["10.78.0.11/32", "fd78::11/128"]);
    space.filter("input", "tcp dport 7 drop");
    for address in ["10.78.0.11:7", "[fd78::11]:7"] {
        assert_eq!(space.verdict(Probe::Tcp, address), down("no answer within 2s (not connected)"));
    }
    space.ns.ip("route add unreachable 10.79.0.0/24").expect("a route");
    assert_eq!(space.verdict(Probe::Tcp, "10.79.0.1:7"), down("connect: no route to host"));
}
