//! HTTP/1.1 (RFC 9112): one request, and the status line of the answer to it. The status decides;
//! the rest of the answer is not read.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use tokio::io::{AsyncRead, AsyncWrite};

use super::{ProbeError, Progress, Talk, printable};

/// Bytes read of an answer: the status line, and the heads of interim answers (1xx) before it.
const ANSWER: usize = 16 * 1024;

/// Bytes of a status line.
const STATUS_LINE: usize = 1024;

/// The request; the backend's address is the host where none is named.
pub(super) fn request(
    method: &str,
    path: &str,
    host: Option<&str>,
    address: SocketAddr,
) -> Result<Vec<u8>, ProbeError> {
    let host = host.map_or_else(|| address.to_string(), str::to_owned);
    // The configuration holds no such thing; a request that says two things must not get out.
    for (what, text) in [("method", method), ("path", path), ("host", host.as_str())] {
        if text.is_empty() || text.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err(ProbeError::Answer(format!(
                "the {what} of the check is empty or has a space or control character"
            )));
        }
    }
    Ok(format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: baton/{}\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    )
    .into_bytes())
}

/// Sends the request and judges the status of the final answer.
pub(super) async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    request: &[u8],
    accepted: &RangeInclusive<u16>,
    progress: &Progress,
) -> Result<(), ProbeError> {
    let mut talk = Talk::new(stream, progress, ANSWER);
    talk.send(request, "connected, request sent").await?;
    let mut answer = Vec::new();
    loop {
        match parse(&answer)? {
            Parsed::Status(status) if accepted.contains(&status) => return Ok(()),
            Parsed::Status(status) => {
                let (first, last) = (accepted.start(), accepted.end());
                let wanted =
                    if first == last { first.to_string() } else { format!("{first} to {last}") };
                return Err(ProbeError::Answer(format!("http status {status}, not {wanted}")));
            }
            Parsed::Interim { length } => drop(answer.drain(..length)),
            Parsed::Incomplete => talk.receive_some(&mut answer).await?,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    /// The status of the final answer.
    Status(u16),
    /// An answer before the final one (RFC 9110 §15.2), this long.
    Interim { length: usize },
    /// More is needed.
    Incomplete,
}

fn parse(answer: &[u8]) -> Result<Parsed, ProbeError> {
    let start = &answer[..answer.len().min(STATUS_LINE)];
    let Some(line) = start.split_inclusive(|byte| *byte == b'\n').next() else {
        return Ok(Parsed::Incomplete);
    };
    if !line.starts_with(&b"HTTP/1."[..line.len().min(7)]) {
        return Err(not_http(line));
    }
    if !line.ends_with(b"\n") {
        return if line.len() < STATUS_LINE { Ok(Parsed::Incomplete) } else { Err(not_http(line)) };
    }
    // HTTP-version SP status-code SP [ reason-phrase ] (RFC 9112 §4); the last space is often
    // left out.
    let [_, _, _, _, _, _, _, b'0'..=b'9', b' ', a, b, c, b' ' | b'\r' | b'\n', ..] = *line else {
        return Err(not_http(line));
    };
    if ![a, b, c].iter().all(u8::is_ascii_digit) {
        return Err(not_http(line));
    }
    let status = [a, b, c].iter().fold(0, |status, digit| status * 10 + u16::from(digit - b'0'));
    if !(100..200).contains(&status) || status == 101 {
        return Ok(Parsed::Status(status));
    }
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    Ok(end.map_or(Parsed::Incomplete, |end| Parsed::Interim { length: end + 4 }))
}

fn not_http(line: &[u8]) -> ProbeError {
    ProbeError::Answer(format!("not an http answer: {}", printable(line)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Canned, at_once};
    use super::*;
    use proptest::prelude::*;

    fn judge(answer: &[u8], piece: usize) -> (Result<(), String>, usize) {
        let mut canned = Canned::new(answer, piece);
        let progress = Progress::default();
        let result = at_once(converse(&mut canned, b"GET", &(200..=299), &progress));
        (result.map_err(|error| error.to_string()), canned.read)
    }

    #[test]
    fn the_status_decides_however_it_comes() {
        let table: &[(&[u8], Result<(), &str>)] = &[
            (b"HTTP/1.1 200 OK\r\n", Ok(())),
            (b"HTTP/1.0 204\r\n", Ok(())),
            (b"HTTP/1.1 204 \r\nServer: x\r\n\r\nbody", Ok(())),
            (b"HTTP/1.1 200 OK\n", Ok(())),
            (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", Ok(())),
            (
                b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 503 No\r\n",
                Err("http status 503, not 200 to 299"),
            ),
            (b"HTTP/1.1 302 Found\r\n", Err("http status 302, not 200 to 299")),
            (b"HTTP/1.1 101 Switching\r\n", Err("http status 101, not 200 to 299")),
            (
                b"HTTP/1.1 20",
                Err("closed before the answer was complete (connected, request sent)"),
            ),
            (b"", Err("closed before the answer was complete (connected, request sent)")),
            (b"HTTP/2 200\r\n", Err(r#"not an http answer: "HTTP/2 200\r\n""#)),
            (b"HTTP/1.1 2000 OK\r\n", Err(r#"not an http answer: "HTTP/1.1 2000 OK\r\n""#)),
            (b"HTTP/1.1 2x0 OK\r\n", Err(r#"not an http answer: "HTTP/1.1 2x0 OK\r\n""#)),
            (b"\r\n", Err(r#"not an http answer: "\r\n""#)),
        ];
        for (answer, expected) in table {
            for piece in [1, 5, 4096] {
                let row = format!("{} in {piece}", printable(answer));
                match (judge(answer, piece).0, expected) {
                    // It is seen as soon as it can be, so how much is shown depends on the pieces.
                    (Err(error), Err(strange)) if strange.starts_with("not an http") => {
                        assert!(error.starts_with("not an http answer: \""), "{row}: {error}");
                    }
                    (result, expected) => {
                        assert_eq!(result, expected.map_err(str::to_owned), "{row}");
                    }
                }
            }
            assert_eq!(judge(answer, 4096).0, expected.map_err(str::to_owned));
        }
        assert!(judge(b"SSH-2.0-OpenSSH", 1).0.expect_err("no http").contains("\"S\""));
    }

    #[test]
    fn an_endless_answer_is_left_at_the_bound() {
        let line = [&b"HTTP/1.1 200 "[..], &[b'a'; 2 * ANSWER]].concat();
        assert!(judge(&line, 4096).0.expect_err("no end").contains("not an http answer"));
        let head = [&b"HTTP/1.1 103 Early\r\n"[..], &[b'a'; 2 * ANSWER]].concat();
        let (result, read) = judge(&head, 4096);
        assert!(result.expect_err("no end").contains("without an end"));
        assert_eq!(read, ANSWER);
        let interim = b"HTTP/1.1 103 Early\r\n\r\n".repeat(ANSWER);
        assert_eq!(judge(&interim, 4096).1, ANSWER);
    }

    #[test]
    fn a_request_names_the_host_and_says_one_thing() {
        let address = "[fd78::11]:8080".parse().expect("an address");
        let text = String::from_utf8(request("GET", "/x", None, address).expect("a request"));
        assert!(text.expect("text").starts_with("GET /x HTTP/1.1\r\nHost: [fd78::11]:8080\r\n"));
        for path in ["", "/a b", "/\r\nX: y"] {
            request("GET", path, Some("host"), address).expect_err(path);
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_too_strange(
            start in prop::sample::select(vec!["", "HTTP/1.1 ", "HTTP/1.1 103 x\r\n"]),
            rest in prop::collection::vec(any::<u8>(), 0..3000),
            repeat in 1usize..20,
            piece in 1usize..5000,
        ) {
            let answer = [start.as_bytes(), &rest].concat().repeat(repeat);
            prop_assert!(judge(&answer, piece).1 <= ANSWER);
        }
    }
}
