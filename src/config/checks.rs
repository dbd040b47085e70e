//! `[checks.NAME]`: how backends are checked.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::section::{At, CHECK, Section};
use super::value::{self, Read, complain};
use crate::service::{Check, Probe, SocksTarget};

const INTERVAL: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(24 * 3600);
/// Longest text that a send-expect check sends or looks for, in bytes.
const LONGEST_TEXT: usize = 4096;
/// Most words of a script's command line.
const MOST_WORDS: usize = 64;

/// A check, and where the file names it.
pub(super) struct Named {
    pub(super) name: At<String>,
    /// `None` where it is wrong: who refers to it is not to blame.
    pub(super) check: Option<Arc<Check>>,
}

/// The kinds of check, as `type` calls them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Http,
    Socks5,
    SendExpect,
    Icmp,
    Script,
}

const KINDS: &[(&str, Kind)] = &[
    ("tcp", Kind::Tcp),
    ("http", Kind::Http),
    ("socks5", Kind::Socks5),
    ("send-expect", Kind::SendExpect),
    ("icmp", Kind::Icmp),
    ("script", Kind::Script),
];

/// The keys that only some kinds have.
const KEYS_OF_KINDS: &[(&str, &[Kind])] = &[
    ("port", &[Kind::Tcp, Kind::Http, Kind::Socks5, Kind::SendExpect, Kind::Script]),
    ("method", &[Kind::Http]),
    ("path", &[Kind::Http]),
    ("host", &[Kind::Http]),
    ("status", &[Kind::Http]),
    ("target", &[Kind::Socks5]),
    ("username", &[Kind::Socks5]),
    ("password", &[Kind::Socks5]),
    ("send", &[Kind::SendExpect]),
    ("send_hex", &[Kind::SendExpect]),
    ("expect", &[Kind::SendExpect]),
    ("expect_hex", &[Kind::SendExpect]),
    ("command", &[Kind::Script]),
];

/// The checks in the order of the file; what is wrong is reported.
pub(super) fn read(root: &Section<'_>) -> Vec<Named> {
    root.named_sections("checks", &CHECK)
        .into_iter()
        .map(|(name, section)| {
            if !value::is_name(&name.value) {
                section.report.error(
                    &name.span,
                    format!("{:?} is no name", super::section::shorten(&name.value)),
                    "write 1 to 63 letters, digits, '-', '_' or '.'",
                );
            }
            let check = check(&name.value, &section).map(Arc::new);
            Named { name, check }
        })
        .collect()
}

fn check(name: &str, section: &Section<'_>) -> Option<Check> {
    let kind = section.require("type", "\"tcp\"", value::choice(KINDS));
    let interval = section.take("interval", value::duration(INTERVAL));
    let timeout = section.take("timeout", value::duration(INTERVAL));
    let rise = section.take("rise", value::integer(1..=100_u32));
    let fall = section.take("fall", value::integer(1..=100_u32));
    let port = section.take("port", value::integer(1..=u16::MAX));

    let every = interval.as_ref().map_or(Duration::from_secs(2), |at| at.value);
    if let Some(timeout) = timeout.as_ref().filter(|timeout| timeout.value > every) {
        let (long, short) = (super::show_duration(timeout.value), super::show_duration(every));
        section.report.error(
            &timeout.span,
            format!("`timeout` {long} is longer than the interval of {short}"),
            format!("write at most \"{short}\", or a longer `interval`"),
        );
    }

    let kind = kind?.value;
    let word = KINDS.iter().find(|(_, other)| *other == kind).map_or("", |(word, _)| word);
    for (key, kinds) in KEYS_OF_KINDS.iter().filter(|(_, kinds)| !kinds.contains(&kind)) {
        if let Some(span) = section.key_span(key) {
            let theirs: Vec<_> = KINDS
                .iter()
                .filter(|(_, kind)| kinds.contains(kind))
                .map(|(word, _)| format!("{word:?}"))
                .collect();
            section.report.error(
                &span,
                format!("a check of type {word:?} has no `{key}`"),
                format!("remove the line; it goes with {}", theirs.join(", ")),
            );
        }
    }
    let probe = match kind {
        Kind::Tcp => Probe::Tcp,
        Kind::Http => http(section),
        Kind::Socks5 => socks5(section)?,
        Kind::SendExpect => send_expect(section)?,
        Kind::Icmp => Probe::Icmp,
        Kind::Script => Probe::Script {
            command: section.require("command", "[\"/usr/local/bin/check\"]", command)?.value,
        },
    };
    Some(Check {
        name: name.to_owned(),
        probe,
        interval: every,
        timeout: timeout.map_or(every.min(Duration::from_secs(1)), |at| at.value),
        rise: rise.map_or(2, |at| at.value),
        fall: fall.map_or(3, |at| at.value),
        port: port.map(|at| at.value),
    })
}

fn http(section: &Section<'_>) -> Probe {
    let method = section.take("method", |value| {
        let method = value::text(value)?;
        match (1..=16).contains(&method.len()) && method.bytes().all(|b| b.is_ascii_uppercase()) {
            true => Ok(method),
            false => complain(format!("is {method:?}"), "\"GET\" or \"HEAD\""),
        }
    });
    let path = section.take("path", |value| {
        let path = value::text(value)?;
        let plain = path.len() <= 2048 && path.bytes().all(|byte| byte.is_ascii_graphic());
        match path.starts_with('/') && plain {
            true => Ok(path),
            false => complain(
                "is no request target",
                "what follows the host in a URL, beginning with '/', spaces as %20: \"/health\"",
            ),
        }
    });
    let host = section.take("host", |value| {
        let host = value::text(value)?;
        let plain = host.bytes().all(|byte| byte.is_ascii_graphic());
        match (1..=255).contains(&host.len()) && plain {
            true => Ok(host),
            false => complain("is no host", "a host such as \"www.example.org\""),
        }
    });
    let status = section.take("status", statuses);
    Probe::Http {
        method: method.map_or_else(|| "GET".into(), |at| at.value),
        path: path.map_or_else(|| "/".into(), |at| at.value),
        host: host.map(|at| at.value),
        status: status.map_or(200..=399, |at| at.value),
    }
}

/// `200`, `"200"` or `"200-399"`.
fn statuses(value: &Spanned<DeValue<'_>>) -> Read<RangeInclusive<u16>> {
    let text = match value.get_ref() {
        DeValue::Integer(number) => number.to_string(),
        _ => value::text(value)?,
    };
    let (first, last) = text.split_once('-').unwrap_or((&text, &text));
    match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
        (Ok(first), Ok(last)) if 100 <= first && first <= last && last <= 599 => Ok(first..=last),
        _ => complain(
            format!("is {:?}, which is no range of status codes", super::section::shorten(&text)),
            "codes from 100 to 599, such as 204 or \"200-399\"",
        ),
    }
}

fn socks5(section: &Section<'_>) -> Option<Probe> {
    let part = |value: &Spanned<DeValue<'_>>| {
        let part = value::text(value)?;
        match part.len() {
            1..=255 => Ok(part),
            bytes => complain(format!("has {bytes} bytes"), "1 to 255 bytes (RFC 1929)"),
        }
    };
    let target = section.require("target", "\"10.78.0.1:80\"", socks_target);
    let username = section.take("username", part);
    let password = section.take("password", part);
    for (key, other) in [("username", "password"), ("password", "username")] {
        if let (Some(span), None) = (section.key_span(key), section.key_span(other)) {
            let what = format!("`{key}` is there without `{other}`");
            section.report.error(&span, what, format!("write `{other} = \"…\"` beside it"));
        }
    }
    let credentials = username.zip(password).map(|(name, word)| (name.value, word.value));
    Some(Probe::Socks5 { target: target?.value, credentials })
}

fn socks_target(value: &Spanned<DeValue<'_>>) -> Read<SocksTarget> {
    let text = value::text(value)?;
    if let Ok(address) = text.parse::<SocketAddr>()
        && address.port() != 0
        && !address.ip().is_unspecified()
    {
        return Ok(SocksTarget::Address(address));
    }
    let named = text.rsplit_once(':').and_then(|(host, port)| {
        let port = port.parse::<u16>().ok().filter(|port| *port != 0)?;
        // Digits and dots alone would be a misspelt address.
        let letters = host.contains(|c: char| c.is_ascii_alphabetic());
        let plain = host.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        ((1..=255).contains(&host.len()) && letters && plain)
            .then(|| SocksTarget::Name(host.to_owned(), port))
    });
    match named {
        Some(target) => Ok(target),
        None => complain(
            format!("is {:?}, not a host and port", super::section::shorten(&text)),
            "what the server is asked to connect to, such as \"10.78.0.1:80\", \"[fd78::1]:80\" \
             or \"www.example.org:80\"",
        ),
    }
}

fn send_expect(section: &Section<'_>) -> Option<Probe> {
    let send = either(section, "send", "send_hex");
    let expect = either(section, "expect", "expect_hex");
    if section.key_span("expect").or(section.key_span("expect_hex")).is_none() {
        section.missing("expect", "\"220 \"");
    }
    let expect = expect?;
    if expect.value.is_empty() {
        section.report.error(
            &expect.span,
            "any answer contains the empty text",
            "write what the answer must contain, or `type = \"tcp\"`",
        );
    }
    Some(Probe::SendExpect {
        send: send.map(|at| at.value).unwrap_or_default(),
        expect: expect.value,
    })
}

/// Bytes as text or in hexadecimal, under two keys of which one may be there.
fn either(section: &Section<'_>, key: &str, hex_key: &str) -> Option<At<Vec<u8>>> {
    if let (Some(_), Some(span)) = (section.key_span(key), section.key_span(hex_key)) {
        let what = format!("`{hex_key}` is there beside `{key}`");
        section.report.error(&span, what, "write one of the two");
    }
    let bounded = |bytes: Vec<u8>| match bytes.len() {
        0..=LONGEST_TEXT => Ok(bytes),
        long => complain(format!("has {long} bytes"), format!("at most {LONGEST_TEXT}")),
    };
    section
        .take(key, |value| value::text(value).map(String::into_bytes).and_then(bounded))
        .or_else(|| section.take(hex_key, |value| hex(&value::text(value)?).and_then(bounded)))
}

fn hex(text: &str) -> Read<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .filter(|c| !c.is_ascii_whitespace())
        .map(|c| c.to_digit(16).map(|digit| digit as u8))
        .collect();
    match digits {
        Some(digits) if digits.len().is_multiple_of(2) => {
            Ok(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
        }
        _ => complain(
            "is not hexadecimal",
            "two hexadecimal digits for each byte, with spaces where you like: \"05 01 00\"",
        ),
    }
}

fn command(value: &Spanned<DeValue<'_>>) -> Read<Vec<String>> {
    let words = value::list(MOST_WORDS, |word| {
        let word = value::text(word)?;
        match word.contains('\0') {
            true => complain("holds a NUL", "text without it"),
            false => Ok(word),
        }
    })(value)?;
    match &words[0] {
        program if !program.value.starts_with('/') => Err(super::value::Complaint {
            what: format!("begins with {:?}, not an absolute path", program.value),
            write: "the program's absolute path, then its arguments: \
                    [\"/usr/local/bin/check\", \"--fast\"]"
                .into(),
            span: Some(program.span.clone()),
        }),
        _ => Ok(words.into_iter().map(|word| word.value).collect()),
    }
}
