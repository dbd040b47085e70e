//! Values of the file as types: each reader takes a TOML value and gives what it means, or a
//! [`Complaint`].

use std::net::{IpAddr, SocketAddr};
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::duration;
use super::section::{At, article, nearest, shorten};

/// What is wrong with a value.
#[derive(Debug)]
pub(super) struct Complaint {
    /// Continues the key: `is 300, outside 1 to 255`.
    pub(super) what: String,
    /// Continues `write`: `a number from 1 to 255`.
    pub(super) write: String,
    /// The part of the value that is wrong, where it isn't all of it.
    pub(super) span: Option<Range<usize>>,
}

/// What a reader gives.
pub(super) type Read<T> = Result<T, Complaint>;

/// A complaint about all of a value.
pub(super) fn complain<T>(what: impl Into<String>, write: impl Into<String>) -> Read<T> {
    Err(Complaint { what: what.into(), write: write.into(), span: None })
}

/// Any string.
pub(super) fn text(value: &Spanned<DeValue<'_>>) -> Read<String> {
    match value.get_ref() {
        DeValue::String(text) => Ok(text.to_string()),
        other => complain(format!("is {}", article(other)), "a string in quotes"),
    }
}

/// A name of a node, service, backend, VIP or check: what fits in a table and in a command.
pub(super) fn name(value: &Spanned<DeValue<'_>>) -> Read<String> {
    let name = text(value)?;
    if is_name(&name) {
        return Ok(name);
    }
    complain(
        format!("is {:?}, which is no name", shorten(&name)),
        "1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit",
    )
}

/// Whether a word can be a name.
pub(super) fn is_name(word: &str) -> bool {
    (1..=63).contains(&word.len())
        && word.starts_with(|c: char| c.is_ascii_alphanumeric())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// A network interface's name.
pub(super) fn interface(value: &Spanned<DeValue<'_>>) -> Read<String> {
    let name = text(value)?;
    // IFNAMSIZ is 16 with the closing NUL; the other rules are the kernel's dev_valid_name.
    let plain = name.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
    if (1..=15).contains(&name.len()) && plain && name != "." && name != ".." {
        return Ok(name);
    }
    complain(
        format!("is {:?}, which no interface can be called", shorten(&name)),
        "the name of an interface as `ip link` shows it",
    )
}

/// `true` or `false`.
pub(super) fn boolean(value: &Spanned<DeValue<'_>>) -> Read<bool> {
    match value.get_ref() {
        DeValue::Boolean(value) => Ok(*value),
        other => complain(format!("is {}", article(other)), "true or false, without quotes"),
    }
}

/// A whole number within bounds.
pub(super) fn integer<T>(bounds: RangeInclusive<T>) -> impl Fn(&Spanned<DeValue<'_>>) -> Read<T>
where
    T: TryFrom<i64> + PartialOrd + std::fmt::Display,
{
    move |value| {
        let write = || format!("a number from {} to {}", bounds.start(), bounds.end());
        let DeValue::Integer(number) = value.get_ref() else {
            return complain(format!("is {}", article(value.get_ref())), write());
        };
        let parsed = i64::from_str_radix(number.as_str(), number.radix()).ok();
        match parsed.and_then(|number| T::try_from(number).ok()) {
            Some(number) if bounds.contains(&number) => Ok(number),
            _ => complain(
                format!(
                    "is {}, outside {} to {}",
                    shorten(&number.to_string()),
                    bounds.start(),
                    bounds.end()
                ),
                write(),
            ),
        }
    }
}

/// A duration within bounds.
pub(super) fn duration(
    bounds: RangeInclusive<Duration>,
) -> impl Fn(&Spanned<DeValue<'_>>) -> Read<Duration> {
    move |value| {
        let (least, most) = (duration::show(*bounds.start()), duration::show(*bounds.end()));
        let range = format!("a duration from \"{least}\" to \"{most}\"");
        let text = match value.get_ref() {
            DeValue::String(text) => text,
            DeValue::Integer(number) => {
                return complain(
                    "has no unit",
                    format!("\"{number}s\" or \"{number}ms\": {range}"),
                );
            }
            other => return complain(format!("is {}", article(other)), range),
        };
        let parsed = match duration::parse(text) {
            Ok(parsed) => parsed,
            Err(what) => {
                return complain(shorten(&what), format!("{range}, with the unit ms, s, m or h"));
            }
        };
        if bounds.contains(&parsed) {
            return Ok(parsed);
        }
        complain(format!("is {text:?}, outside \"{least}\" to \"{most}\""), range)
    }
}

/// One word of several.
pub(super) fn choice<T: Copy>(
    choices: &'static [(&'static str, T)],
) -> impl Fn(&Spanned<DeValue<'_>>) -> Read<T> {
    move |value| {
        let words = |between: &str| {
            choices.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(between)
        };
        let DeValue::String(text) = value.get_ref() else {
            return complain(format!("is {}", article(value.get_ref())), words(" or "));
        };
        if let Some((_, choice)) = choices.iter().find(|(word, _)| word == text) {
            return Ok(*choice);
        }
        let what = format!("is {:?}, which is unknown", shorten(text));
        match nearest(text, choices.iter().map(|(word, _)| *word)) {
            Some(near) => complain(what, format!("{near:?}; known are {}", words(", "))),
            None => complain(what, words(" or ")),
        }
    }
}

/// An IP address.
pub(super) fn address(value: &Spanned<DeValue<'_>>) -> Read<IpAddr> {
    let text = text(value)?;
    match text.parse() {
        Ok(address) => usable(address).map(|()| address),
        Err(_) => complain(
            format!("is {:?}, which is no IP address", shorten(&text)),
            "an address such as \"10.77.0.3\" or \"fd77::3\" (names are not looked up)",
        ),
    }
}

/// An IP address and a port.
pub(super) fn socket_address(value: &Spanned<DeValue<'_>>) -> Read<SocketAddr> {
    let text = text(value)?;
    if let Ok(address) = text.parse::<SocketAddr>() {
        return match address.port() {
            0 => complain("has port 0", "a port from 1 to 65535 after the address"),
            _ => Ok(address),
        };
    }
    match text.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => complain("has no port", format!("\"{address}:PORT\"")),
        Ok(IpAddr::V6(address)) => complain("has no port", format!("\"[{address}]:PORT\"")),
        Err(_) => complain(
            format!("is {:?}, which is no address and port", shorten(&text)),
            "an address and a port such as \"10.78.0.11:1080\" or \"[fd78::11]:1080\" \
             (names are not looked up)",
        ),
    }
}

/// Refuses what no host can have as its own address; loopback is left to the caller.
pub(super) fn usable(address: IpAddr) -> Read<()> {
    let kind = match address {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => "an address of \"this network\"",
        IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
        IpAddr::V4(v4) if v4.octets()[0] >= 240 => "a reserved address",
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "an IPv4 address in IPv6 clothes",
        ip if ip.is_multicast() => "a multicast address",
        ip if ip.is_unspecified() => "the unspecified address",
        _ => return Ok(()),
    };
    let write = match address {
        IpAddr::V6(v6) if let Some(v4) = v6.to_ipv4_mapped() => format!("\"{v4}\""),
        _ => "the address of one host".to_owned(),
    };
    complain(format!("is {address}, {kind}"), write)
}

/// A list that isn't empty; `item` reads each of its values.
pub(super) fn list<T>(
    most: usize,
    item: impl Fn(&Spanned<DeValue<'_>>) -> Read<T>,
) -> impl Fn(&Spanned<DeValue<'_>>) -> Read<Vec<At<T>>> {
    move |value| {
        let DeValue::Array(items) = value.get_ref() else {
            return complain(
                format!("is {}, not a list", article(value.get_ref())),
                "a list in square brackets",
            );
        };
        if items.is_empty() {
            return complain("is empty", "at least one entry");
        }
        if items.len() > most {
            return complain(format!("has {} entries", items.len()), format!("at most {most}"));
        }
        items
            .iter()
            .map(|value| match item(value) {
                Ok(read) => Ok(At { value: read, span: value.span() }),
                Err(complaint) => Err(Complaint {
                    what: format!("holds an entry that {}", complaint.what),
                    span: complaint.span.or_else(|| Some(value.span())),
                    ..complaint
                }),
            })
            .collect()
    }
}
