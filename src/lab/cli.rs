//! `baton lab …` and `baton drill …`: arguments, progress and tables.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};

use super::bench::ha::{self, HaOptions, HaSuite};
use super::bench::{self, BenchOptions, Suite};
use super::drill::{self, DrillOptions, fault::Fault};
use super::process::Lifetime;
use super::topology::{Links, VIP_FRONT};
use super::{LabOptions, LabStatus, Mode, Servers, Software, Up};

/// The lab that commands mean unless told otherwise.
pub const DEFAULT_NAME: &str = "baton";

/// Exit code of a drill in which something expected did not happen.
const UNMET: u8 = 1;
/// Exit code of a drill that can't be run as asked.
const USAGE: u8 = 2;
/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// `baton lab …`
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Make the lab and start everything in it; does nothing if it is up.
    ///
    /// A client, a switch, relays that run `baton run`, and two backends with echo (port 7), web
    /// (80) and SOCKS (1080, Debian's danted) servers, each a network namespace.
    Up {
        /// Which lab.
        #[command(flatten)]
        name: LabName,
        /// How many relays.
        #[arg(long, value_name = "N", default_value_t = 2,
              value_parser = clap::value_parser!(u8).range(1..=8))]
        relays: u8,
        /// How the relays forward.
        #[arg(long, value_enum, default_value_t = Mode::Proxy)]
        mode: Mode,
        /// How often the Active advertises, such as 100ms or 1s (a multiple of 10ms).
        #[arg(long, value_name = "D", default_value = "100ms", value_parser = interval)]
        advert_interval: Duration,
        /// Between two heartbeats on the peer channel, 1ms to 1s; not in mode proxy, which has none.
        #[arg(long, value_name = "D", default_value = "10ms", value_parser = heartbeat)]
        heartbeat: Duration,
        /// What runs on the relays.
        #[arg(long, value_enum, default_value_t = Software::Baton)]
        software: Software,
        /// The baton program that the lab runs; this one unless given.
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },
    /// Remove the lab: every process, namespace and file of it.
    Down {
        /// Which lab.
        #[command(flatten)]
        name: LabName,
        /// Every lab on this machine, and what killed drills have left.
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Show nodes, addresses, processes and who is Active.
    Status {
        /// Which lab.
        #[command(flatten)]
        name: LabName,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a command on a node: `baton lab exec client -- curl http://10.77.0.100/`
    Exec {
        /// Which lab.
        #[command(flatten)]
        name: LabName,
        /// The node: client, switch, relay1, relay2, …, backend1, backend2.
        node: String,
        /// The command and its arguments.
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Drill reports as one Markdown table; scripts/failover-figures.sh uses it.
    #[command(hide = true)]
    Figures {
        /// The reports.
        #[arg(required = true, value_name = "FILE")]
        reports: Vec<PathBuf>,
    },
    /// Measure Baton beside nftables, plain routing, HAProxy and nginx stream, and what a packet
    /// costs; `make bench` runs it.
    #[command(hide = true)]
    Bench {
        /// What of it; all of it unless given.
        #[arg(value_enum)]
        suites: Vec<Suite>,
        /// Seconds that each load lasts.
        #[arg(long, value_name = "N", default_value_t = 1,
              value_parser = clap::value_parser!(u32).range(1..=600))]
        seconds: u32,
        /// Rounds, of which medians are taken.
        #[arg(long, value_name = "N", default_value_t = 5,
              value_parser = clap::value_parser!(u8).range(1..=99))]
        runs: u8,
        /// Flows in the table that packets are measured with, in rising order.
        #[arg(long, value_name = "N,…", value_delimiter = ',',
              default_values_t = [1, 1000, 100_000, 1_000_000],
              value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        flows: Vec<u32>,
        /// TCP congestion control, such as cubic or bbr; this machine's unless given.
        #[arg(long, value_name = "NAME")]
        congestion: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Where the report goes.
        #[arg(long, value_name = "FILE", default_value = "reports/bench.json")]
        report: PathBuf,
        /// A document that has marked places for the figures, such as docs/performance.md.
        #[arg(long, value_name = "FILE")]
        document: Option<PathBuf>,
    },
    /// Measure failover and replication, beside keepalived with conntrackd; `make bench-ha` runs it.
    #[command(hide = true)]
    BenchHa(BenchHaArgs),
    /// The echo server of the backends.
    #[command(hide = true)]
    ServeEcho {
        /// TCP and UDP port.
        #[arg(long)]
        port: u16,
        /// Answer datagrams to this address from it too, though it is not that of an interface
        /// towards the client.
        #[arg(long)]
        also: Vec<std::net::IpAddr>,
    },
}

/// Which lab is meant.
#[derive(Debug, Args)]
pub struct LabName {
    /// The lab's name; its namespaces are called NAME-NODE.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_NAME)]
    name: String,
}

impl LabCommand {
    /// Does it.
    ///
    /// # Errors
    /// What [`super::LabError`] says.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Up { name, relays, mode, advert_interval, heartbeat, software, binary } => {
                up(&LabOptions {
                    name: name.name,
                    relays: relays.into(),
                    links: Links::Two,
                    binary: program(binary)?,
                    software,
                    mode,
                    servers: Servers::All,
                    advert_interval,
                    heartbeat,
                    many: None,
                    lifetime: Lifetime::Detached,
                })?
            }
            Self::Down { all: true, .. } => return Ok(down_all()),
            Self::Down { name, all: false } => match super::down(&name.name)? {
                true => eprintln!("lab '{}' is gone", name.name),
                false => eprintln!("there is no lab '{}'; nothing to do", name.name),
            },
            Self::Status { name, json } => status(&name.name, json)?,
            Self::Exec { name, node, command } => {
                match super::exec(&name.name, &node, &command)? {}
            }
            Self::Figures { reports } => figures(&reports)?,
            Self::Bench {
                suites,
                seconds,
                runs,
                mut flows,
                congestion,
                json,
                report,
                document,
            } => {
                let suites = if suites.is_empty() { Suite::ALL.to_vec() } else { suites };
                let (runs, binary) = (runs.into(), program(None)?);
                flows.sort_unstable();
                let options = BenchOptions { suites, seconds, runs, flows, congestion, binary };
                return bench(&options, json, &report, document.as_deref());
            }
            Self::BenchHa(args) => return args.run(),
            Self::ServeEcho { port, also } => super::echo::serve(port, &also)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn bench(
    options: &BenchOptions,
    json: bool,
    path: &Path,
    document: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    drill::catch_signals()?;
    let report = match bench::run(options, &mut |step| eprintln!("bench: {step}")) {
        Err(super::LabError::Interrupted) => {
            eprintln!("bench: interrupted; the lab is gone");
            return Ok(ExitCode::from(INTERRUPTED));
        }
        report => report?,
    };
    let text = serde_json::to_string_pretty(&report)? + "\n";
    write_report(path, &text)?;
    if let Some(document) = document {
        write_places(document, |before| bench::write_into(&report, before))?;
    }
    let shown = if json { text } else { bench::render(&report) };
    std::io::stdout().write_all(shown.as_bytes())?;
    eprintln!("bench: report in {}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// Puts figures into the places that a document marks for them.
fn write_places(
    path: &Path,
    write_into: impl Fn(&str) -> Result<String, &'static str>,
) -> anyhow::Result<()> {
    let before = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let after = write_into(&before).map_err(|section| {
        anyhow::anyhow!("{} has no `<!-- bench {section} -->`", path.display())
    })?;
    write_report(path, &after)
}

/// `baton lab bench-ha`
#[derive(Debug, Args)]
pub struct BenchHaArgs {
    /// What of it; all of it unless given.
    #[arg(value_enum)]
    suites: Vec<HaSuite>,
    /// Faults whose outage is measured.
    #[arg(long, value_enum, value_name = "FAULT,…", value_delimiter = ',',
          default_values_t = [Fault::PowerOff, Fault::Kill, Fault::Takeover, Fault::Restart])]
    faults: Vec<Fault>,
    /// Runs of each drill.
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u8).range(1..=99))]
    runs: u8,
    /// New connections a second that are held while the power goes.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1000, 3000],
          value_parser = clap::value_parser!(u32).range(1..=9000))]
    churn: Vec<u32>,
    /// New flows a second that are replicated.
    #[arg(long, value_name = "N,…", value_delimiter = ',',
          default_values_t = [10_000, 50_000, 100_000, 150_000],
          value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    rates: Vec<u32>,
    /// Seconds that each of these lasts.
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Flows that a joiner is sent.
    #[arg(long, value_name = "N", default_value_t = 1_000_000,
          value_parser = clap::value_parser!(u64).range(1000..=4_000_000))]
    flows: u64,
    /// Add to what the report has of the same drills.
    #[arg(long)]
    add: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Where the report goes.
    #[arg(long, value_name = "FILE", default_value = "reports/bench-ha.json")]
    report: PathBuf,
    /// A document that has marked places for the figures, such as docs/failover.md.
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
}

impl BenchHaArgs {
    fn run(self) -> anyhow::Result<ExitCode> {
        let Self { suites, faults, runs, churn, mut rates, seconds, flows, .. } = self;
        rates.sort_unstable();
        let options = HaOptions {
            suites: if suites.is_empty() { HaSuite::ALL.to_vec() } else { suites },
            faults,
            runs: runs.into(),
            churn,
            rates,
            seconds,
            flows,
            binary: program(None)?,
        };
        let earlier = match std::fs::read_to_string(&self.report) {
            Ok(text) if self.add => Some(serde_json::from_str(&text).context("the report")?),
            _ => None,
        };
        drill::catch_signals()?;
        let report = match ha::run(&options, earlier, &mut |step| eprintln!("bench: {step}")) {
            Err(super::LabError::Interrupted) => {
                eprintln!("bench: interrupted; the lab is gone");
                return Ok(ExitCode::from(INTERRUPTED));
            }
            report => report?,
        };
        let text = serde_json::to_string_pretty(&report)? + "\n";
        write_report(&self.report, &text)?;
        if let Some(document) = &self.document {
            write_places(document, |before| ha::write_into(&report, before))?;
        }
        let shown = if self.json { text } else { ha::render(&report) };
        std::io::stdout().write_all(shown.as_bytes())?;
        eprintln!("bench: report in {}", self.report.display());
        Ok(ExitCode::SUCCESS)
    }
}

fn write_report(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The program that the lab runs: this one.
fn program(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path.canonicalize().with_context(|| path.display().to_string())?,
        None => std::env::current_exe().context("finding this program")?,
    };
    Ok(path)
}

fn up(options: &LabOptions) -> anyhow::Result<()> {
    let made = super::up(options, &mut |step| eprintln!("lab: {step}"))?;
    let flag = match options.name.as_str() {
        DEFAULT_NAME => String::new(),
        name => format!(" --name {name}"),
    };
    match made {
        Up::Already => eprintln!(
            "lab: '{}' is up already, as it was made; `baton lab down{flag}` first to change it",
            options.name
        ),
        Up::Made { active } => eprintln!("lab: '{}' is up, {active} is Active", options.name),
    }
    eprintln!(
        "\
Next:
  baton lab status{flag}
  baton lab exec{flag} client -- curl --socks5 {VIP_FRONT}:1080 http://10.78.0.1/
  baton lab exec{flag} relay1 -- baton status
  baton lab exec{flag} relay2 -- baton takeover
  baton drill kill
  baton lab down{flag}"
    );
    Ok(())
}

fn down_all() -> ExitCode {
    let names = super::names();
    if names.is_empty() {
        eprintln!("there are no labs; nothing to do");
    }
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match super::down(&name) {
            Ok(_) => eprintln!("lab '{name}' is gone"),
            Err(error) => {
                eprintln!("{error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

fn figures(files: &[PathBuf]) -> anyhow::Result<()> {
    let read = |path: &PathBuf| -> anyhow::Result<_> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| format!("{}: no report", path.display()))
    };
    let reports: Vec<_> = files.iter().map(read).collect::<anyhow::Result<_>>()?;
    std::io::stdout().write_all(drill::figures::table(&reports).as_bytes())?;
    Ok(())
}

fn status(name: &str, json: bool) -> anyhow::Result<()> {
    let status = super::status(name)?;
    let text = if json { serde_json::to_string_pretty(&status)? + "\n" } else { table(&status) };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn table(status: &LabStatus) -> String {
    let mut text = format!(
        "lab '{}' ({}, files in {})\n{:<9} {:<10} {:<5} {:<42} {}\n",
        status.name,
        status.software.title(),
        status.dir.display(),
        "NODE",
        "STATE",
        "VIP",
        "ADDRESSES",
        "PROCESSES",
    );
    for node in &status.nodes {
        let vip = match node.holds_vip {
            Some(true) => "held",
            Some(false) => "-",
            None => "",
        };
        let state = node.state.as_deref().unwrap_or_default();
        let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        let daemons: Vec<String> = node
            .daemons
            .iter()
            .map(|(name, pid, runs)| match runs {
                true => format!("{name} ({pid})"),
                false => format!("{name} (ended)"),
            })
            .collect();
        let row = format!(
            "{:<9} {state:<10} {vip:<5} {:<42} {}",
            node.node,
            addresses.join(" "),
            daemons.join(", ")
        );
        text += row.trim_end();
        text.push('\n');
    }
    text
}

/// `baton drill FAULT`
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
  0    the drill ran and everything expected happened
  1    something expected did not happen, or the drill could not be run; see standard error
  2    wrong arguments, or a combination that does not exist (yet)
  130  interrupted; the lab is gone

Form of the report: docs/drills.md")]
pub struct DrillArgs {
    /// What is broken.
    #[arg(value_enum)]
    fault: Fault,
    /// How the relays forward.
    #[arg(long, value_enum, default_value_t = Mode::Proxy)]
    mode: Mode,
    /// How often the Active advertises, such as 10ms, 100ms or 1s (a multiple of 10ms).
    #[arg(long, value_name = "D", default_value = "100ms", value_parser = interval)]
    advert_interval: Duration,
    /// Between two heartbeats on the peer channel, 1ms to 1s; not in mode proxy, which has none.
    #[arg(long, value_name = "D", default_value = "10ms", value_parser = heartbeat)]
    heartbeat: Duration,
    /// New TCP connections a second.
    #[arg(long, value_name = "NEW_PER_S", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=2000))]
    rate: u32,
    /// Long-lived TCP connections.
    #[arg(long, value_name = "N", default_value_t = 20,
          value_parser = clap::value_parser!(u32).range(0..=1000))]
    connections: u32,
    /// New TCP connections a second that are opened for 5 s before the fault and 1 s after it, and
    /// held: how many of them survive. Not in mode proxy, where none can.
    #[arg(long, value_name = "NEW_PER_S", value_parser = clap::value_parser!(u32).range(1..=9000))]
    churn: Option<u32>,
    /// `takeover`: how often, back and forth.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    times: u32,
    /// How often the drill is run, each time in a new lab.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// What runs on the relays.
    #[arg(long, value_enum, default_value_t = Software::Baton)]
    relays: Software,
    /// Where the report goes; reports/drill-FAULT-RELAYS[-MODE]-INTERVAL.json unless given.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The baton program that the lab runs; this one unless given.
    #[arg(long, value_name = "FILE", hide = true)]
    binary: Option<PathBuf>,
}

impl DrillArgs {
    /// Runs the drill, prints and writes its report.
    ///
    /// # Errors
    /// What [`super::LabError`] says, or the report could not be written.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(why) = self.impossible() {
            eprintln!("error: {why}");
            return Ok(ExitCode::from(USAGE));
        }
        let options = DrillOptions {
            fault: self.fault,
            software: self.relays,
            mode: self.mode,
            advert_interval: self.advert_interval,
            heartbeat: self.heartbeat,
            rate: self.rate,
            churn: self.churn,
            connections: self.connections as usize,
            times: self.times as usize,
            runs: self.runs as usize,
            binary: program(self.binary.clone())?,
        };
        drill::catch_signals()?;
        let outcome = match drill::run(&options, &mut |step| eprintln!("drill: {step}")) {
            Err(super::LabError::Interrupted) => {
                eprintln!("drill: interrupted; the lab is gone");
                return Ok(ExitCode::from(INTERRUPTED));
            }
            outcome => outcome?,
        };
        self.publish(&outcome)?;
        Ok(ExitCode::from(if outcome.failures.is_empty() { 0 } else { UNMET }))
    }

    fn impossible(&self) -> Option<String> {
        if self.fault.is_of_replication() && (!self.relays.is_baton() || self.mode == Mode::Proxy) {
            let fault = self.fault.name();
            return Some(format!(
                "'{fault}' is of Baton's peer channel, which modes of the kernel have: write --mode \
                 passthrough or --mode dsr"
            ));
        }
        if self.churn.is_some() && self.relays.is_baton() && self.mode == Mode::Proxy {
            return Some("a proxy's connections end with it: write --mode passthrough".into());
        }
        if !self.relays.is_baton() && self.mode != Mode::Proxy {
            return Some("keepalived forwards by nftables: leave --mode out".into());
        }
        if !self.relays.is_baton() && self.fault.is_command() {
            let fault = self.fault.name();
            return Some(format!(
                "keepalived has no command for '{fault}': write --relays baton, or another fault"
            ));
        }
        if self.times > 1 && self.fault != Fault::Takeover {
            return Some("--times is for takeover: write --runs to do the drill again".into());
        }
        None
    }

    fn publish(&self, outcome: &drill::Outcome) -> anyhow::Result<()> {
        let json = serde_json::to_string_pretty(&outcome.report)? + "\n";
        let path = self.report.clone().unwrap_or_else(|| self.default_report());
        write_report(&path, &json)?;
        let mut stdout = std::io::stdout();
        if self.json {
            stdout.write_all(json.as_bytes())?;
            outcome.failures.iter().for_each(|failure| eprintln!("FAILED {failure}"));
        } else {
            let colour = stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none();
            let relays = self.relays.title();
            let text = drill::render(&outcome.report, relays, &outcome.failures, colour);
            stdout.write_all(text.as_bytes())?;
        }
        eprintln!("drill: report in {}", path.display());
        Ok(())
    }

    fn default_report(&self) -> PathBuf {
        let relays = match self.mode {
            Mode::Proxy => self.relays.name().to_owned(),
            mode => format!("{}-{}", self.relays.name(), mode.name()),
        };
        let interval = self.advert_interval.as_millis();
        PathBuf::from(format!("reports/drill-{}-{relays}-{interval}ms.json", self.fault.name()))
    }
}

/// Between two heartbeats: whole milliseconds, as the configuration allows them.
fn heartbeat(text: &str) -> Result<Duration, String> {
    match text.strip_suffix("ms").and_then(|number| number.parse().ok()) {
        Some(value @ 1..=1000) => Ok(Duration::from_millis(value)),
        _ => Err("write 1ms to 1000ms".to_owned()),
    }
}

/// An advertisement interval: `10ms` to `40.95s`, in steps of 10 ms.
fn interval(text: &str) -> Result<Duration, String> {
    let wrong =
        || "write a multiple of 10ms from 10ms to 40s, such as 10ms, 100ms or 1s".to_owned();
    let milliseconds = if let Some(number) = text.strip_suffix("ms") {
        number.parse().ok()
    } else {
        text.strip_suffix('s').and_then(|number| number.parse::<u64>().ok()?.checked_mul(1000))
    };
    match milliseconds {
        Some(value @ 10..=40_000) if value % 10 == 0 => Ok(Duration::from_millis(value)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Lab {
        #[command(subcommand)]
        command: LabCommand,
    }

    #[test]
    fn all_labs_are_meant_only_where_none_is_named() {
        let parse = |args: &[&str]| <Lab as clap::Parser>::try_parse_from(args);
        let all = parse(&["lab", "down", "--all"]).unwrap();
        assert!(matches!(all.command, LabCommand::Down { all: true, .. }));
        let one = parse(&["lab", "down"]).unwrap();
        assert!(
            matches!(one.command, LabCommand::Down { all: false, name } if name.name == "baton")
        );
        parse(&["lab", "down", "--all", "--name", "x"]).unwrap_err();
        parse(&["lab", "exec", "client"]).unwrap_err();
    }

    #[test]
    fn intervals_are_those_that_adverts_can_carry() {
        assert_eq!(interval("10ms"), Ok(Duration::from_millis(10)));
        assert_eq!(interval("1s"), Ok(Duration::from_secs(1)));
        for wrong in ["", "0ms", "15ms", "41s", "10", "-1s", "ms", "99999999999999999999s"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
