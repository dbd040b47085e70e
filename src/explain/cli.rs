//! `baton explain`.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;

use super::read::{Now, Since, read};
use super::{FILE, STATE, path, text};
use crate::config::{self, Config};

/// Decisions that are shown unless told otherwise.
const LAST: usize = 20;

/// Arguments of `baton explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Only since then: a span (10m, 2h), a time of day (03:12), or a date with a time
    /// ("2026-11-23 03:12"), all in UTC.
    #[arg(long, value_name = "SPAN|TIME", value_parser = since)]
    since: Option<Since>,
    /// The last N of these; without --since the last 20.
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Print JSON, one object on a line, as the journal has it.
    #[arg(long)]
    json: bool,
    /// The journal; otherwise that of the node in the configuration file.
    #[arg(long, value_name = "PATH", env = "BATON_JOURNAL")]
    file: Option<PathBuf>,
    /// The configuration file, which says where the journal is.
    #[arg(short, long = "config", value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

impl ExplainArgs {
    /// What is to be printed; what is to be said beside it goes to standard error.
    pub fn run(self) -> anyhow::Result<String> {
        let (now, since) = (Now::here(), self.since);
        let file = self.journal()?;
        let journal = read(&file).with_context(|| {
            format!(
                "read {}: is this the node's journal (see --file), and has its daemon ever run?",
                file.display()
            )
        })?;
        let entries = journal.entries;
        let from = since.map_or(0, |since| {
            entries.iter().position(|entry| now.is_since(entry, since)).unwrap_or(entries.len())
        });
        let last = self.last.unwrap_or(if since.is_some() { usize::MAX } else { LAST });
        let from = from.max(entries.len().saturating_sub(last));
        let shown = &entries[from..];
        if journal.bad > 0 {
            let lines = if journal.bad == 1 { "line" } else { "lines" };
            eprintln!(
                "{} {lines} of {} left out: cut short or damaged",
                journal.bad,
                file.display()
            );
        }
        if self.json {
            let lines = shown.iter().map(serde_json::to_string);
            let lines: Vec<String> = lines.collect::<Result<_, _>>()?;
            return Ok(lines.iter().map(|line| format!("{line}\n")).collect());
        }
        Ok(match (shown.is_empty(), since) {
            (false, _) => text::render(shown),
            (true, Some(_)) => "nothing was decided since then\n".to_owned(),
            (true, None) => "the journal is empty\n".to_owned(),
        })
    }

    /// Where the journal is: as told, as configured, or the only one that there is.
    fn journal(&self) -> anyhow::Result<PathBuf> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        if self.config.exists() {
            return Ok(path(&Config::load(&self.config)?.node.state_dir));
        }
        let folders = std::fs::read_dir(STATE).into_iter().flatten().flatten();
        let found: Vec<PathBuf> =
            folders.map(|folder| folder.path().join(FILE)).filter(|file| file.exists()).collect();
        match &found[..] {
            [one] => Ok(one.clone()),
            [] => bail!(
                "there is no configuration file {} and no journal in {STATE}: say where it is \
                 with --file",
                self.config.display()
            ),
            more => bail!(
                "there is more than one journal, say which with --file: {}",
                more.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

fn since(text: &str) -> Result<Since, String> {
    Now::here().since(text)
}
