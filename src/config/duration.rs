//! Durations as the file writes them: a number and its unit, `"250ms"`, `"1.5s"`, `"10m"`.

use std::time::Duration;

/// Reads a duration; the error says what is wrong with the text, after its key: ``has no unit``.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(match text.starts_with('-') {
            true => "is negative".to_owned(),
            false => format!("is {text:?}, which is no duration"),
        });
    }
    let unit_millis: u64 = match unit.trim_start() {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "" => return Err("has no unit".to_owned()),
        other => return Err(format!("has the unknown unit {other:?}")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // Nine digits of either part are more than any key takes, and never overflow.
    if whole.is_empty() || number.ends_with('.') || fraction.contains('.') {
        return Err(format!("is {text:?}, which is no duration"));
    }
    if whole.len() > 9 || fraction.len() > 9 {
        return Err("has more than nine digits".to_owned());
    }
    let whole: u64 = whole.parse().expect("one to nine digits");
    let scale = 10_u64.pow(fraction.len() as u32);
    let fraction: u64 = if fraction.is_empty() { 0 } else { fraction.parse().expect("digits") };
    if !(fraction * unit_millis).is_multiple_of(scale) {
        return Err("is finer than a millisecond".to_owned());
    }
    Ok(Duration::from_millis(whole * unit_millis + fraction * unit_millis / scale))
}

/// A duration as the file would write it: in the greatest unit that needs no fraction; with
/// milliseconds from ten seconds on, in seconds (`40.95s`).
pub fn show(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        0 => "0s".to_owned(),
        _ if millis.is_multiple_of(3_600_000) => format!("{}h", millis / 3_600_000),
        _ if millis.is_multiple_of(60_000) => format!("{}m", millis / 60_000),
        _ if millis.is_multiple_of(1000) => format!("{}s", millis / 1000),
        1..10_000 => format!("{millis}ms"),
        _ => {
            format!("{}s", format!("{}.{:03}", millis / 1000, millis % 1000).trim_end_matches('0'))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_a_number_and_a_unit() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("250ms", ms(250)),
            ("1.5s", ms(1500)),
            ("2 s", ms(2000)),
            ("10m", ms(600_000)),
            ("10min", ms(600_000)),
            ("1h", ms(3_600_000)),
            ("0s", ms(0)),
            ("0.01s", ms(10)),
            ("40.95s", ms(40_950)),
            ("999999999h", ms(999_999_999 * 3_600_000)),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_reason() {
        for (text, expected) in [
            ("2", "has no unit"),
            ("-2s", "is negative"),
            ("", "is \"\", which is no duration"),
            ("s", "is \"s\", which is no duration"),
            (".5s", "is \".5s\", which is no duration"),
            ("1.s", "is \"1.s\", which is no duration"),
            ("1.2.3s", "is \"1.2.3s\", which is no duration"),
            ("2sec", "has the unknown unit \"sec\""),
            ("2s ", "has the unknown unit \"s \""),
            ("0.5ms", "is finer than a millisecond"),
            ("1234567890s", "has more than nine digits"),
        ] {
            assert_eq!(parse(text), Err(expected.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for millis in
            [0, 1, 999, 1000, 1500, 9_999, 10_010, 40_950, 60_000, 90_000, 3_600_000, 7_260_000]
        {
            let duration = Duration::from_millis(millis);
            assert_eq!(parse(&show(duration)), Ok(duration));
        }
    }
}
