//! `[node]`: this process.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::Node;
use super::section::{NODE, Section};
use super::value::{self, Read, complain};
use crate::explain;

/// Where the control socket is unless the file says otherwise.
const CONTROL: &str = "/run/baton/control.sock";
/// `sun_path` of a unix socket address, without the closing NUL.
const LONGEST_SOCKET_PATH: usize = 107;
const LONGEST_GRACE: Duration = Duration::from_secs(3600);
const MOST_WORKERS: usize = 1024;

/// `[node]`; `None` where it has no usable name, which is reported.
pub(super) fn read(root: &Section<'_>) -> Option<Node> {
    let Some(node) = root.section("node", &NODE) else {
        if root.key_span("node").is_none() {
            let hint = "write [node] with `name = \"relay1\"` under it";
            root.report.error(&root.span, "the file has no [node]", hint);
        }
        return None;
    };
    let name = node.require("name", "\"relay1\"", value::name);
    let control = node.take("control", socket_path);
    let state_dir = node.take("state_dir", folder);
    let grace = node.take("shutdown_grace", value::duration(Duration::ZERO..=LONGEST_GRACE));
    let workers = node.take("workers", value::integer(0..=MOST_WORKERS));
    let log = node.take("log", log_filter);
    let name = name?.value;
    Some(Node {
        state_dir: state_dir.map_or_else(|| explain::state_dir(&name), |at| at.value),
        name,
        control: control.map_or_else(|| CONTROL.into(), |at| at.value),
        shutdown_grace: grace.map_or(Duration::from_secs(10), |at| at.value),
        workers: workers.map_or(0, |at| at.value),
        log: log.map_or_else(|| "info".into(), |at| at.value),
    })
}

fn socket_path(value: &toml::Spanned<toml::de::DeValue<'_>>) -> Read<PathBuf> {
    let path = value::text(value)?;
    let write = format!("an absolute path such as {CONTROL:?}");
    if !path.starts_with('/') || path.ends_with('/') {
        return complain(format!("is {path:?}, not the absolute path of a socket"), write);
    }
    if path.contains(char::is_control) {
        return complain("holds a control character", write);
    }
    if path.len() > LONGEST_SOCKET_PATH {
        return complain(
            format!(
                "has {} bytes; a unix socket's path has at most {LONGEST_SOCKET_PATH}",
                path.len()
            ),
            "a shorter path",
        );
    }
    Ok(path.into())
}

fn folder(value: &toml::Spanned<toml::de::DeValue<'_>>) -> Read<PathBuf> {
    let path = value::text(value)?;
    let write = format!("an absolute path such as {:?}", explain::state_dir("relay1"));
    if !path.starts_with('/') {
        return complain(format!("is {path:?}, not the absolute path of a folder"), write);
    }
    if path.contains(char::is_control) {
        return complain("holds a control character", write);
    }
    Ok(path.into())
}

fn log_filter(value: &toml::Spanned<toml::de::DeValue<'_>>) -> Read<String> {
    let filter = value::text(value)?;
    match EnvFilter::builder().parse(&filter) {
        Ok(_) if !filter.is_empty() => Ok(filter),
        _ => complain(
            format!("is {filter:?}, which is no log filter"),
            "\"error\", \"warn\", \"info\", \"debug\" or \"trace\", or a filter such as \
             \"info,baton_ha=debug\"",
        ),
    }
}
