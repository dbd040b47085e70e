//! A table of the file under its schema: which keys it has, and how each is read.
//!
//! `toml`'s serde face stops at the first thing that does not fit. This one reports it with its
//! place and goes on, so that one run of `baton check` tells everything that is wrong.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::problem::Report;
use super::value::Complaint;

/// A table's title, as errors call it, and its keys.
#[derive(Debug)]
pub(super) struct Schema {
    pub(super) title: &'static str,
    /// What one of a list is called, with its name: `service "socks"`.
    pub(super) one: &'static str,
    pub(super) keys: &'static [&'static str],
}

pub(super) const ROOT: Schema = Schema {
    title: "the file",
    one: "",
    keys: &["node", "cluster", "election", "vips", "datapath", "services", "checks"],
};
pub(super) const NODE: Schema = Schema {
    title: "[node]",
    one: "",
    keys: &["name", "control", "state_dir", "shutdown_grace", "workers", "log"],
};
pub(super) const CLUSTER: Schema = Schema {
    title: "[cluster]",
    one: "",
    keys: &["name", "channel", "key_file", "heartbeat", "peers"],
};
pub(super) const PEER: Schema =
    Schema { title: "[[cluster.peers]]", one: "peer", keys: &["name", "addresses", "channel"] };
pub(super) const ELECTION: Schema = Schema {
    title: "[election]",
    one: "",
    keys: &[
        "vrid",
        "priority",
        "preempt",
        "preempt_wait",
        "startup_hold",
        "advert_interval",
        "transport",
        "checksum",
        "interfaces",
        "valid_lft",
        "realtime",
        "sick_after",
        "announce",
    ],
};
pub(super) const ANNOUNCE: Schema = Schema {
    title: "[election.announce]",
    one: "",
    keys: &["schedule", "refresh", "rival_interval"],
};
pub(super) const VIP: Schema =
    Schema { title: "[[vips]]", one: "VIP", keys: &["name", "address", "interface"] };
pub(super) const DATAPATH: Schema = Schema {
    title: "[datapath]",
    one: "",
    keys: &["flows", "half_open_flows", "affinities", "hook"],
};
pub(super) const SERVICE: Schema = Schema {
    title: "[[services]]",
    one: "service",
    keys: &[
        "name",
        "vip",
        "port",
        "listen",
        "protocol",
        "mode",
        "source",
        "dsr",
        "scheduler",
        "check",
        "max_connections",
        "max_connections_per_source",
        "connect_timeout",
        "connect_retries",
        "idle_timeout",
        "half_close_timeout",
        "affinity",
        "half_open_timeout",
        "closed_timeout",
        "on_down",
        "proxy_protocol",
        "backends",
    ],
};
pub(super) const BACKEND: Schema = Schema {
    title: "[[services.backends]]",
    one: "backend",
    keys: &["name", "address", "weight", "max_connections"],
};
pub(super) const CHECK: Schema = Schema {
    title: "[checks.NAME]",
    one: "",
    keys: &[
        "type",
        "interval",
        "timeout",
        "rise",
        "fall",
        "port",
        "method",
        "path",
        "host",
        "status",
        "target",
        "username",
        "password",
        "send",
        "send_hex",
        "expect",
        "expect_hex",
        "command",
    ],
};

/// Every table, to tell where a misplaced key belongs, and to hold documents and samples against.
pub(super) const SCHEMAS: &[&Schema] = &[
    &ROOT, &NODE, &CLUSTER, &PEER, &ELECTION, &ANNOUNCE, &VIP, &DATAPATH, &SERVICE, &BACKEND,
    &CHECK,
];

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) span: Range<usize>,
}

/// A table of the file.
#[derive(Debug, Clone)]
pub(super) struct Section<'d> {
    /// As errors call it: the schema's title, with the name where it has one.
    pub(super) title: String,
    /// Where it begins: its header, or all of it where it is inline.
    pub(super) span: Range<usize>,
    pub(super) report: &'d Report,
    table: &'d DeTable<'d>,
}

impl<'d> Section<'d> {
    /// A table that should follow a schema; the keys that don't are reported.
    pub(super) fn new(
        schema: &Schema,
        table: &'d DeTable<'d>,
        span: Range<usize>,
        report: &'d Report,
    ) -> Self {
        let named = table.iter().find(|(key, _)| key.get_ref() == "name");
        let title = match named.and_then(|(_, value)| value.get_ref().as_str()) {
            Some(name) if !schema.one.is_empty() => format!("{} {:?}", schema.one, shorten(name)),
            _ => schema.title.to_owned(),
        };
        Self::titled(title, schema, table, span, report)
    }

    fn titled(
        title: String,
        schema: &Schema,
        table: &'d DeTable<'d>,
        span: Range<usize>,
        report: &'d Report,
    ) -> Self {
        for key in table.keys().filter(|key| !schema.keys.contains(&key.get_ref().as_ref())) {
            let (what, hint) = unknown(&title, schema, key.get_ref());
            report.error(&key.span(), what, hint);
        }
        Self { title, span, report, table }
    }

    /// Where a key's value stands.
    pub(super) fn value_span(&self, key: &str) -> Option<Range<usize>> {
        self.get(key).map(|(_, value)| value.span())
    }

    /// Where a key stands.
    pub(super) fn key_span(&self, key: &str) -> Option<Range<usize>> {
        self.get(key).map(|(span, _)| span)
    }

    /// Whether a list of tables is not there, or there without a table.
    pub(super) fn is_absent_or_empty(&self, key: &str) -> bool {
        let items = self.get(key).map(|(_, value)| value.get_ref().as_array());
        items.is_none_or(|items| items.is_some_and(|items| items.is_empty()))
    }

    /// A value that is a string, whatever else may be wrong with it.
    pub(super) fn peek(&self, key: &str) -> Option<&'d str> {
        self.get(key).and_then(|(_, value)| value.get_ref().as_str())
    }

    /// A value; `None` where it is absent, and where it is wrong, which is reported.
    pub(super) fn take<T>(
        &self,
        key: &str,
        read: impl FnOnce(&toml::Spanned<DeValue<'d>>) -> Result<T, Complaint>,
    ) -> Option<At<T>> {
        let (_, value) = self.get(key)?;
        match read(value) {
            Ok(read) => Some(At { value: read, span: value.span() }),
            Err(complaint) => {
                let span = complaint.span.unwrap_or_else(|| value.span());
                let what = format!("`{key}` {}", complaint.what);
                self.report.error(&span, what, format!("write {}", complaint.write));
                None
            }
        }
    }

    /// A value that must be there; `example` is what could be written.
    pub(super) fn require<T>(
        &self,
        key: &str,
        example: &str,
        read: impl FnOnce(&toml::Spanned<DeValue<'d>>) -> Result<T, Complaint>,
    ) -> Option<At<T>> {
        if self.get(key).is_none() {
            self.missing(key, example);
        }
        self.take(key, read)
    }

    /// Reports that a key is not there.
    pub(super) fn missing(&self, key: &str, example: &str) {
        let what = format!("{} has no `{key}`", self.title);
        self.report.error(&self.span, what, format!("write `{key} = {example}`"));
    }

    /// A table in it.
    pub(super) fn section(&self, key: &str, schema: &Schema) -> Option<Section<'d>> {
        let (_, value) = self.get(key)?;
        match value.get_ref() {
            DeValue::Table(table) => Some(Section::new(schema, table, value.span(), self.report)),
            other => {
                let what = format!("`{key}` is {}, not a table", article(other));
                self.report.error(&value.span(), what, format!("write {}", schema.title));
                None
            }
        }
    }

    /// The tables of an array in it, in the order of the file.
    pub(super) fn sections(&self, key: &str, schema: &Schema) -> Vec<Section<'d>> {
        let Some((_, value)) = self.get(key) else { return Vec::new() };
        let hint = format!("write {}", schema.title);
        let DeValue::Array(items) = value.get_ref() else {
            let what = match value.get_ref() {
                DeValue::Table(_) => format!("`{key}` is one table, not a list of tables"),
                other => format!("`{key}` is {}, not a list of tables", article(other)),
            };
            self.report.error(&value.span(), what, hint);
            return Vec::new();
        };
        let mut sections = Vec::with_capacity(items.len());
        for item in items.iter() {
            match item.get_ref() {
                DeValue::Table(table) => {
                    sections.push(Section::new(schema, table, item.span(), self.report));
                }
                other => {
                    let what = format!("`{key}` holds {}, not a table", article(other));
                    self.report.error(&item.span(), what, hint.clone());
                }
            }
        }
        sections
    }

    /// The tables `[KEY.NAME]` in it with their names, in the order of the file.
    pub(super) fn named_sections(
        &self,
        key: &str,
        schema: &Schema,
    ) -> Vec<(At<String>, Section<'d>)> {
        let Some((_, value)) = self.get(key) else { return Vec::new() };
        let DeValue::Table(named) = value.get_ref() else {
            let what = format!("`{key}` is {}, not a table", article(value.get_ref()));
            self.report.error(&value.span(), what, format!("write {}", schema.title));
            return Vec::new();
        };
        let mut sections = Vec::with_capacity(named.len());
        for (name, value) in named.iter() {
            let DeValue::Table(table) = value.get_ref() else {
                let what = format!(
                    "`{key}.{}` is {}, not a table",
                    name.get_ref(),
                    article(value.get_ref())
                );
                self.report.error(&value.span(), what, format!("write {}", schema.title));
                continue;
            };
            let title = schema.title.replace("NAME", &shorten(name.get_ref()));
            let section = Section::titled(title, schema, table, value.span(), self.report);
            sections.push((At { value: name.get_ref().to_string(), span: name.span() }, section));
        }
        sections.sort_by_key(|(name, _)| name.span.start);
        sections
    }

    fn get(&self, key: &str) -> Option<(Range<usize>, &'d toml::Spanned<DeValue<'d>>)> {
        let (found, value) = self.table.get_key_value(key)?;
        Some((found.span(), value))
    }
}

/// What a value is, for errors: `a string`.
pub(super) fn article(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn unknown(title: &str, schema: &Schema, key: &str) -> (String, String) {
    let what = format!("{title} has no key `{}`", shorten(key));
    let near = nearest(key, schema.keys.iter().copied());
    let elsewhere = || SCHEMAS.iter().find(|other| other.keys.contains(&key));
    let hint = match (near, elsewhere()) {
        (Some(near), _) => format!("did you mean `{near}`? write `{near}`, or remove the line"),
        (None, Some(other)) => {
            format!("`{key}` belongs to {}: write it there, or remove the line", other.title)
        }
        (None, None) => format!("write one of: {}", schema.keys.join(", ")),
    };
    (what, hint)
}

/// The candidate that differs least from `word`, if it differs little.
pub(super) fn nearest<'c>(
    word: &str,
    candidates: impl Iterator<Item = &'c str>,
) -> Option<&'c str> {
    let most = (word.chars().count() / 3).clamp(1, 3);
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that make one word of the other
/// (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) =
        (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut before = vec![0; b.len() + 1];
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replace = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replace.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

/// A word of the file as an error repeats it: no longer than a name may be.
pub(super) fn shorten(word: &str) -> String {
    match word.char_indices().nth(63) {
        Some((at, _)) => format!("{}…", &word[..at]),
        None => word.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_near() {
        let near = |word| nearest(word, ["priority", "preempt", "vrid"].into_iter());
        assert_eq!(near("priorty"), Some("priority"));
        assert_eq!(near("preemtp"), Some("preempt"), "a swap is one change");
        assert_eq!(near("vird"), Some("vrid"));
        assert_eq!(near("v"), None);
        assert_eq!(near("weight"), None);
        assert_eq!(near(""), None);
        assert_eq!(near(&"é".repeat(10_000)), None);
    }

    /// Whether `text` has `key = …` or `[key]`, `[[key]]` under any table.
    fn has(text: &str, key: &str) -> bool {
        text.lines().any(|line| {
            let header = line.trim_matches(['[', ']']);
            line.split_once(" = ").is_some_and(|(left, _)| left == key)
                || line.starts_with('[') && header.split('.').any(|part| part == key)
        })
    }

    #[test]
    fn the_full_sample_has_every_key() {
        let full = include_str!("../../config/full.toml");
        for schema in SCHEMAS {
            for key in schema.keys {
                assert!(has(full, key), "config/full.toml has no `{key}` of {}", schema.title);
            }
        }
    }

    #[test]
    fn the_reference_has_every_key_under_its_table() {
        let reference = include_str!("../../docs/config.md");
        for schema in SCHEMAS.iter().filter(|schema| schema.title.starts_with('[')) {
            let heading = format!("\n## `{}`", schema.title);
            let (_, part) = reference
                .split_once(&heading)
                .unwrap_or_else(|| panic!("docs/config.md has no {heading:?}"));
            let part = part.split("\n## ").next().unwrap_or(part);
            for key in schema.keys {
                let is_table = SCHEMAS.iter().any(|other| {
                    other.title.trim_matches(['[', ']']).split('.').any(|part| part == *key)
                });
                assert!(
                    is_table || part.contains(&format!("| `{key}` |")),
                    "docs/config.md has no `{key}` under {heading:?}"
                );
            }
        }
    }
}
