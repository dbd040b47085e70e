//! SOCKS5: greeting and method (RFC 1928 §3), username and password where the server asks for
//! them (RFC 1929), and CONNECT through the server to a target (§4–§6), so that a server that
//! still listens but no longer forwards is found.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncWrite};

use super::{ProbeError, Progress, Talk};
use crate::service::SocksTarget;

/// The version of every message but those of RFC 1929, which have [`AUTH_VERSION`].
const VERSION: u8 = 5;
const AUTH_VERSION: u8 = 1;
const NO_AUTHENTICATION: u8 = 0;
const USERNAME_PASSWORD: u8 = 2;
const NO_ACCEPTABLE_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// Bytes read of all answers together: method, authentication, and the longest reply to CONNECT.
const ANSWERS: usize = 2 + 2 + (4 + 1 + 255 + 2);

/// Goes as far as a client does before it sends data.
pub(super) async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    target: &SocksTarget,
    credentials: Option<&(String, String)>,
    progress: &Progress,
) -> Result<(), ProbeError> {
    let mut talk = Talk::new(stream, progress, ANSWERS);
    talk.send(greeting(credentials.is_some()), "connected, greeting sent").await?;
    match (method(talk.receive().await?)?, credentials) {
        (Method::None, _) => {}
        (Method::UsernamePassword, Some((username, password))) => {
            let login = login(username, password)?;
            talk.send(&login, "connected, username and password sent").await?;
            login_accepted(talk.receive().await?)?;
        }
        (Method::UsernamePassword, None) => {
            return Err(answer("socks5: the server chose a method that was not offered"));
        }
    }
    talk.send(&request(target)?, "connected, greeting answered, connect to the target sent")
        .await?;
    // The address says nothing about the server's health; it is read so that the reply is known
    // to be complete and the server sees an orderly close.
    match granted(talk.receive().await?)? {
        Address::V4 => talk.receive::<{ 4 + 2 }>().await.map(drop),
        Address::V6 => talk.receive::<{ 16 + 2 }>().await.map(drop),
        Address::Name => {
            let [length] = talk.receive().await?;
            for _ in 0..usize::from(length) + 2 {
                talk.receive::<1>().await?;
            }
            Ok(())
        }
    }
}

fn answer(text: &str) -> ProbeError {
    ProbeError::Answer(text.to_owned())
}

/// ```text
/// +-----+----------+----------+
/// | VER | NMETHODS | METHODS  |
/// +-----+----------+----------+
/// |  1  |    1     | 1 to 255 |
/// +-----+----------+----------+
/// ```
fn greeting(with_password: bool) -> &'static [u8] {
    if with_password {
        &[VERSION, 2, NO_AUTHENTICATION, USERNAME_PASSWORD]
    } else {
        &[VERSION, 1, NO_AUTHENTICATION]
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Method {
    None,
    UsernamePassword,
}

fn method(bytes: [u8; 2]) -> Result<Method, ProbeError> {
    match bytes {
        [VERSION, NO_AUTHENTICATION] => Ok(Method::None),
        [VERSION, USERNAME_PASSWORD] => Ok(Method::UsernamePassword),
        [VERSION, NO_ACCEPTABLE_METHOD] => {
            Err(answer("socks5: the server accepts none of the methods offered"))
        }
        [VERSION, _] => Err(answer("socks5: the server chose a method that was not offered")),
        [version, _] => Err(not_socks(version)),
    }
}

/// ```text
/// +-----+------+----------+------+----------+
/// | VER | ULEN |  UNAME   | PLEN |  PASSWD  |
/// +-----+------+----------+------+----------+
/// |  1  |  1   | 1 to 255 |  1   | 1 to 255 |
/// +-----+------+----------+------+----------+
/// ```
fn login(username: &str, password: &str) -> Result<Vec<u8>, ProbeError> {
    let mut bytes = vec![AUTH_VERSION];
    for text in [username, password] {
        push_text(&mut bytes, text, "socks5: username or password of the check")?;
    }
    Ok(bytes)
}

fn login_accepted(bytes: [u8; 2]) -> Result<(), ProbeError> {
    match bytes {
        [AUTH_VERSION, 0] => Ok(()),
        [AUTH_VERSION, _] => Err(answer("socks5: username or password refused")),
        [version, _] => Err(not_socks(version)),
    }
}

/// ```text
/// +-----+-----+-------+------+----------+----------+
/// | VER | CMD |  RSV  | ATYP | DST.ADDR | DST.PORT |
/// +-----+-----+-------+------+----------+----------+
/// |  1  |  1  | X'00' |  1   | variable |    2     |
/// +-----+-----+-------+------+----------+----------+
/// ```
fn request(target: &SocksTarget) -> Result<Vec<u8>, ProbeError> {
    let mut bytes = vec![VERSION, CONNECT, 0];
    let port = match target {
        SocksTarget::Address(SocketAddr::V4(address)) => {
            bytes.push(IPV4);
            bytes.extend(address.ip().octets());
            address.port()
        }
        SocksTarget::Address(SocketAddr::V6(address)) => {
            bytes.push(IPV6);
            bytes.extend(address.ip().octets());
            address.port()
        }
        SocksTarget::Name(name, port) => {
            bytes.push(NAME);
            push_text(&mut bytes, name, "socks5: target of the check")?;
            *port
        }
    };
    bytes.extend(port.to_be_bytes());
    Ok(bytes)
}

/// One byte of length, then the text.
fn push_text(bytes: &mut Vec<u8>, text: &str, what: &str) -> Result<(), ProbeError> {
    match u8::try_from(text.len()) {
        Ok(length @ 1..) => {
            bytes.push(length);
            bytes.extend(text.as_bytes());
            Ok(())
        }
        _ => Err(ProbeError::Answer(format!("{what}: must have 1 to 255 bytes"))),
    }
}

/// ```text
/// +-----+-----+-------+------+----------+----------+
/// | VER | REP |  RSV  | ATYP | BND.ADDR | BND.PORT |
/// +-----+-----+-------+------+----------+----------+
/// |  1  |  1  | X'00' |  1   | variable |    2     |
/// +-----+-----+-------+------+----------+----------+
/// ```
fn granted(head: [u8; 4]) -> Result<Address, ProbeError> {
    let [VERSION, reply, _, kind] = head else { return Err(not_socks(head[0])) };
    let meaning = match reply {
        0 => {
            return match kind {
                IPV4 => Ok(Address::V4),
                NAME => Ok(Address::Name),
                IPV6 => Ok(Address::V6),
                _ => Err(ProbeError::Answer(format!(
                    "socks5: the reply has an address of unknown type {kind}"
                ))),
            };
        }
        1 => "general failure of the server",
        2 => "not allowed by the server's rules",
        3 => "network of the target unreachable",
        4 => "target unreachable",
        5 => "connection refused by target",
        6 => "ttl expired on the way to the target",
        7 => "the server does not know connect",
        8 => "the server does not know this type of address",
        _ => "unassigned",
    };
    Err(ProbeError::Answer(format!("socks5 reply {reply}: {meaning}")))
}

/// What follows the head of a reply.
#[derive(Debug, PartialEq, Eq)]
enum Address {
    V4,
    V6,
    Name,
}

fn not_socks(version: u8) -> ProbeError {
    ProbeError::Answer(format!("not a socks5 answer: it begins with byte {version}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Canned, at_once};
    use super::*;
    use proptest::prelude::*;

    fn target() -> SocksTarget {
        SocksTarget::Address("192.0.2.1:80".parse().expect("an address"))
    }

    fn judge(answers: &[u8], credentials: Option<(&str, &str)>) -> (Result<(), String>, usize) {
        let mut canned = Canned::new(answers, 3);
        let credentials = credentials.map(|(user, pass)| (user.to_owned(), pass.to_owned()));
        let progress = Progress::default();
        let result = at_once(converse(&mut canned, &target(), credentials.as_ref(), &progress));
        (result.map_err(|error| error.to_string()), canned.read)
    }

    const CUT: &str = "closed before the answer was complete \
                       (connected, greeting answered, connect to the target sent)";

    #[test]
    fn answers_and_what_is_said_of_them() {
        let me = Some(("me", "secret"));
        type Row<'a> = (&'a [u8], Option<(&'a str, &'a str)>, Result<(), &'a str>);
        let table: &[Row] = &[
            (&[5, 0, 5, 0, 0, 1, 10, 0, 0, 1, 0, 80], None, Ok(())),
            (&[5, 0, 5, 0, 0, 1, 10, 0, 0, 1, 0, 80, 99], me, Ok(())),
            (
                &[5, 2, 1, 0, 5, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 80],
                me,
                Ok(()),
            ),
            (&[5, 0, 5, 0, 0, 3, 2, b'a', b'b', 0, 80], None, Ok(())),
            (&[5, 0, 5, 0, 0, 3, 0, 0, 80], None, Ok(())),
            (&[5, 0, 5, 0, 0, 3, 2, b'a', b'b', 0], None, Err(CUT)),
            (&[5, 0, 5, 0, 0, 1, 10, 0, 0, 1, 0], None, Err(CUT)),
            (&[5, 0, 5, 0, 0, 9], None, Err("socks5: the reply has an address of unknown type 9")),
            (&[5, 2, 1, 1], me, Err("socks5: username or password refused")),
            (&[5, 2, 5, 0], me, Err("not a socks5 answer: it begins with byte 5")),
            (&[5, 2], None, Err("socks5: the server chose a method that was not offered")),
            (&[5, 1], me, Err("socks5: the server chose a method that was not offered")),
            (&[5, 255], None, Err("socks5: the server accepts none of the methods offered")),
            (&[5, 0, 5, 1, 0, 1], None, Err("socks5 reply 1: general failure of the server")),
            (&[5, 0, 5, 2, 0, 1], None, Err("socks5 reply 2: not allowed by the server's rules")),
            (&[5, 0, 5, 5, 0, 1], None, Err("socks5 reply 5: connection refused by target")),
            (&[5, 0, 5, 77, 0, 1], None, Err("socks5 reply 77: unassigned")),
            (&[5, 0, 4, 0, 0, 1], None, Err("not a socks5 answer: it begins with byte 4")),
            (b"HTTP/1.1 400", None, Err("not a socks5 answer: it begins with byte 72")),
            (&[5], None, Err("closed before the answer was complete (connected, greeting sent)")),
            (&[5, 0, 5, 0, 0], None, Err(CUT)),
        ];
        for (answers, credentials, expected) in table {
            assert_eq!(
                judge(answers, *credentials).0,
                expected.map_err(str::to_owned),
                "{answers:?}"
            );
        }
    }

    #[test]
    fn requests_on_the_wire() {
        assert_eq!(request(&target()).expect("fits"), [5, 1, 0, 1, 192, 0, 2, 1, 0, 80]);
        let v6 = SocksTarget::Address("[2001:db8::1]:443".parse().expect("an address"));
        let expected = [&[5, 1, 0, 4, 0x20, 1, 0xd, 0xb8][..], &[0; 11], &[1, 1, 0xbb]].concat();
        assert_eq!(request(&v6).expect("fits"), expected);
        let name = SocksTarget::Name("a.example".into(), 1080);
        let expected = [&[5, 1, 0, 3, 9][..], b"a.example", &[4, 0x38]].concat();
        assert_eq!(request(&name).expect("fits"), expected);
        request(&SocksTarget::Name("n".repeat(256), 80)).expect_err("too long");
        request(&SocksTarget::Name(String::new(), 80)).expect_err("empty");
        assert_eq!(login("me", "pw").expect("fits"), [1, 2, b'm', b'e', 2, b'p', b'w']);
        login("me", &"x".repeat(256)).expect_err("too long");
    }

    proptest! {
        #[test]
        fn no_answer_is_too_strange(
            start in prop::sample::select(vec![
                &[][..], &[5, 0], &[5, 2, 1, 0], &[5, 2, 1, 0, 5, 0], &[5, 0, 5, 0, 0, 3, 200],
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..600),
            credentials in any::<bool>(),
        ) {
            let answers = [start, &rest].concat();
            let (_, read) = judge(&answers, credentials.then_some(("u", "p")));
            prop_assert!(read <= ANSWERS);
        }
    }
}
