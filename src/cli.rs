//! One clap tree, and what each command prints.
//!
//! Exit codes, the same for every command: see [`Exit`].

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use baton_ha::channel::key::ClusterKey;
use clap::{Args, Parser, Subcommand};

use crate::backend;
use crate::config::system::System;
use crate::config::{self, Config};
use crate::control::{self, Reply, Request};
use crate::datapath::counters::Counters;
use crate::datapath::sessions::{Ended, Sessions, Wanted};
use crate::explain::cli::ExplainArgs;
use crate::guard;
use crate::lab;
use crate::pool::Admin;
use crate::status::{Status, ago, word};
use crate::table::Table;

/// Where the commands find the daemon unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/baton/control.sock";

/// Where `baton keygen` writes unless told otherwise.
const DEFAULT_KEY: &str = "/etc/baton/cluster.key";

/// How long a command waits for the daemon: more than the longest Active_Down_Interval
/// (4 × 40.95 s), which a `yield` may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// Exit codes of every command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// The daemon or the system refused, or something failed on the way.
    Failed = 1,
    /// Wrong arguments, or a configuration that is wrong.
    Usage = 2,
    /// No daemon answers on the control socket.
    Unreachable = 3,
    /// A handover did not come about and nothing was changed; `--force` would do it.
    Unready = 4,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused or failed; the reason is on standard error
  2  wrong arguments, or a configuration file that is wrong
  3  no daemon answers on the control socket";

const HANDOVER_EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused or failed; the reason is on standard error
  2  wrong arguments
  3  no daemon answers on the control socket
  4  the other node did not answer in time, or is not in sync: nothing was changed; see --force";

const EXAMPLES: &str = "\
First steps:
  baton lab up                       a relay pair with real SOCKS servers, in namespaces
  baton lab exec relay1 -- baton status
  baton drill kill                   kill the Active under load: what did clients see?
  baton check --offline -c FILE      what a configuration file means

Exit codes:
  0  done
  1  refused or failed; the reason is on standard error
  2  wrong arguments, or a configuration file that is wrong
  3  no daemon answers on the control socket";

const EXPLAIN: &str = "\
Why did it fail over at 03:12?
  baton explain --since 03:10        on both nodes, in UTC
  baton explain --last 1             the last decision
  baton explain --json | jq 'select(.what.kind == \"transition\")'
  baton explain --file /mnt/var/lib/baton/relay1/journal.jsonl

Exit codes:
  0  done
  1  there is no journal, or it can't be read; the reason is on standard error
  2  wrong arguments, or a configuration file that is wrong";

/// A layer-4 load balancer that is never a single point of failure.
#[derive(Debug, Parser)]
#[command(name = "baton", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node in the foreground.
    ///
    /// SIGTERM or SIGINT yields the VIPs first (priority 0), then ends. SIGHUP reads the
    /// configuration again, as `baton reload` does. The log goes to standard error; its filter is
    /// `log` in `[node]` or the environment variable BATON_LOG (`info`, `baton_ha=debug`, …).
    #[command(after_help = EXIT_CODES)]
    Run {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Say what a configuration file means, or everything that is wrong with it.
    #[command(after_help = EXIT_CODES)]
    Check {
        #[command(flatten)]
        config: ConfigFile,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Don't look at this machine's interfaces.
        #[arg(long)]
        offline: bool,
    },
    /// Show this node and what it knows of the others.
    ///
    /// State, reason, since when; VIPs; services; backends with their health and why.
    #[command(after_help = EXIT_CODES)]
    Status {
        #[command(flatten)]
        socket: SocketPath,
        /// Print JSON (docs/operations.md says what is in it).
        #[arg(long)]
        json: bool,
        /// Show it again every SECONDS until Ctrl-C.
        #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
              value_parser = seconds)]
        watch: Option<Duration>,
    },
    /// Make this node Active now.
    ///
    /// With a peer channel it asks the node that is: that one brings this node's flows up to date,
    /// stops forwarding, has the last of them acknowledged, and gives the VIPs; each step is printed
    /// with its time. Where it does not answer, or this node is not in sync, nothing is changed, and
    /// --force decides. Without a peer channel, and with --force where it must, this node claims by
    /// adverts alone. It stays Active, whatever the priorities, until it yields, fails, or another
    /// node is told to take over.
    #[command(after_help = HANDOVER_EXIT_CODES)]
    Takeover(HandoverArgs),
    /// Stop being Active now, and give the VIPs to another node.
    ///
    /// With a peer channel to the first Backup that has this node's flows, as `takeover` there would.
    /// Without one, and with --force where there is no such Backup, to whoever claims them: if
    /// nobody does within Active_Down_Interval, this node takes them back and the command fails;
    /// until then nobody has them.
    #[command(after_help = HANDOVER_EXIT_CODES)]
    Yield(HandoverArgs),
    /// Give a backend no new connections; those it has end by themselves.
    ///
    /// On all nodes, whichever is told, until `baton enable`: a takeover or a restart does not undo
    /// it. A node that can't be reached learns it when it is back.
    #[command(after_help = EXIT_CODES)]
    Drain(BackendArgs),
    /// Use a backend again.
    ///
    /// On all nodes, whichever is told. Also of a backend that is no longer in the file, by
    /// address and port, as `baton status` lists it.
    #[command(after_help = EXIT_CODES)]
    Enable(BackendArgs),
    /// Give a backend no new connections and reset those it has.
    ///
    /// On all nodes, as `drain`.
    #[command(after_help = EXIT_CODES)]
    Disable(BackendArgs),
    /// Give a backend another weight than the file does, or, without WEIGHT, the file's again.
    ///
    /// On all nodes, as `drain`.
    #[command(after_help = EXIT_CODES)]
    Weight(WeightArgs),
    /// Read the configuration file again.
    ///
    /// Services, backends and checks change at once; connections to what stays go on. A file that
    /// is wrong, or that changes what needs a restart, changes nothing.
    #[command(after_help = EXIT_CODES)]
    Reload {
        #[command(flatten)]
        asked: Asked,
    },
    /// Started by `baton run`: removes the VIPs when the daemon no longer can.
    #[command(hide = true)]
    Guard(guard::GuardArgs),
    /// Take the datapath out of the kernel: programs, tables, and with them every flow.
    ///
    /// What `baton run` leaves there when it ends, so that the next one finds its flows. Run it
    /// when no `baton run` is to follow, in the network namespace where it ran.
    #[command(after_help = EXIT_CODES)]
    Unload,
    /// Make the key of a cluster, once, to be copied to each of its nodes.
    ///
    /// Who has it is a node of the cluster, so only its owner may read the file (mode 0600). A file
    /// that is there already is left alone.
    #[command(after_help = EXIT_CODES)]
    Keygen {
        /// The file, as `key_file` in `[cluster]` names it.
        #[arg(value_name = "FILE", default_value = DEFAULT_KEY)]
        file: PathBuf,
    },
    /// List the flows of passthrough and dsr services, or end them (`sessions kill`).
    ///
    /// In no order; those for which everything that is given is so. docs/operations.md says what is
    /// in the JSON.
    #[command(after_help = EXIT_CODES, args_conflicts_with_subcommands = true)]
    Sessions(SessionsArgs),
    /// Show what the datapath in the kernel has dropped, and why, and its traffic.
    ///
    /// Read from the kernel, so it works without a daemon too; in the network namespace where
    /// `baton run` runs or ran. docs/counters.md explains each.
    #[command(after_help = EXIT_CODES)]
    Counters {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Show drop reasons that never came, too.
        #[arg(long)]
        all: bool,
    },
    /// Say why this node did what it did: its decisions, and what it knew at each.
    ///
    /// Read from the node's journal, so it works without a daemon too. On the node that failed it
    /// tells the one half, on the node that took over the other. Ages are those of the moment of the
    /// decision. docs/operations.md says what is in the JSON.
    #[command(after_help = EXPLAIN)]
    Explain(ExplainArgs),
    /// What the backends of a dsr service need: print it, do it, or undo it.
    ///
    /// Prints a shell script for each backend. With --apply, run as root on a backend, does it
    /// there: VIP, ARP, decapsulation, source of replies. docs/operations.md explains each step.
    #[command(after_help = EXIT_CODES)]
    BackendSetup(BackendSetupArgs),
    /// A relay pair with real SOCKS servers in network namespaces on this machine.
    #[command(subcommand)]
    Lab(lab::cli::LabCommand),
    /// Break something in a lab of its own, under load, and show what clients saw.
    Drill(lab::cli::DrillArgs),
}

fn keygen(file: &Path) -> anyhow::Result<()> {
    let failed = || format!("write {}", file.display());
    if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(failed)?;
    }
    match ClusterKey::generate()?.save(file) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => anyhow::bail!(
            "{} is there already: remove it for a new key, which every node then needs",
            file.display()
        ),
        Err(error) => return Err(anyhow::Error::from(error).context(failed())),
    }
    let file = file.display();
    print(&format!("{file} written; copy it to the other nodes, as the same user, mode 0600\n"))?;
    Ok(())
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(short, long = "config", value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Debug, Args)]
struct BackendSetupArgs {
    /// The service's name.
    service: String,
    #[command(flatten)]
    config: ConfigFile,
    /// This backend; otherwise all of them, with --apply those whose address this machine has.
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// Where packets come from relays or leave for clients; otherwise the interface that has the
    /// backend's address and those of the default routes. May be given more than once.
    #[arg(long, value_name = "IF")]
    interface: Vec<String>,
    /// Do it on this machine.
    #[arg(long, conflicts_with = "remove")]
    apply: bool,
    /// Undo on this machine what --apply did for the service. Needs no configuration file.
    #[arg(long)]
    remove: bool,
    /// With --apply: the eBPF program alone, as the printed script has it.
    #[arg(long, requires = "apply")]
    program_only: bool,
    /// dsr = "nat": rewrite all replies of the server's port, where the network does not keep the
    /// DSCP that relays mark packets with. Nobody can then speak to that port without a relay.
    #[arg(long)]
    all_flows: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct SocketPath {
    /// The control socket of the daemon (`control` in `[node]`).
    #[arg(short, long, value_name = "PATH", env = "BATON_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

#[derive(Debug, Args)]
struct Asked {
    #[command(flatten)]
    socket: SocketPath,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct HandoverArgs {
    #[command(flatten)]
    asked: Asked,
    /// Also without the other node's answer, or its flows: connections that it lacks are lost.
    #[arg(long)]
    force: bool,
    /// Wait for the end and print each step; the default.
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Do not wait for the end: `baton status` tells what came of it.
    #[arg(long, conflicts_with = "json")]
    no_wait: bool,
}

impl HandoverArgs {
    fn run(&self, request: &Request) -> anyhow::Result<()> {
        if self.no_wait {
            control::tell(&self.asked.socket.socket, request, PATIENCE)?;
            return print("asked for; `baton status` tells what came of it\n");
        }
        command(&self.asked, request)
    }
}

#[derive(Debug, Args)]
struct SessionsArgs {
    #[command(subcommand)]
    command: Option<SessionsCommand>,
    #[command(flatten)]
    filter: Filter,
    /// At most this many (1 to 10000).
    #[arg(long, value_name = "N", default_value_t = 100,
          value_parser = clap::value_parser!(u16).range(1..=10_000))]
    limit: u16,
    #[command(flatten)]
    asked: Asked,
}

#[derive(Debug, Subcommand)]
enum SessionsCommand {
    /// End flows: both ends of a TCP connection are sent a RST, a UDP flow is forgotten.
    ///
    /// All flows for which everything that is given is so. On the Active node.
    #[command(after_help = EXIT_CODES)]
    Kill(KillArgs),
}

#[derive(Debug, Args)]
struct KillArgs {
    #[command(flatten)]
    filter: Filter,
    /// Whatever they are: instead of --service, --client and --backend.
    #[arg(long, conflicts_with_all = ["service", "client", "backend"],
          required_unless_present_any = ["service", "client", "backend"])]
    all: bool,
    #[command(flatten)]
    asked: Asked,
}

#[derive(Debug, Args)]
struct Filter {
    /// Of this service.
    #[arg(long)]
    service: Option<String>,
    /// Of this client.
    #[arg(long, value_name = "ADDR")]
    client: Option<std::net::IpAddr>,
    /// With this backend.
    #[arg(long)]
    backend: Option<String>,
}

impl Filter {
    fn wanted(self, limit: usize) -> Wanted {
        let Self { service, client, backend } = self;
        Wanted { service, backend, client, limit }
    }
}

#[derive(Debug, Args)]
struct BackendArgs {
    /// BACKEND, or SERVICE/BACKEND; without a service it is meant in every service.
    backend: String,
    #[command(flatten)]
    asked: Asked,
}

#[derive(Debug, Args)]
struct WeightArgs {
    /// BACKEND, or SERVICE/BACKEND; without a service it is meant in every service.
    backend: String,
    /// Its share beside the others' (1 to 256).
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    weight: Option<u16>,
    #[command(flatten)]
    asked: Asked,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "write a number of seconds from 0.1 to 3600".into())
}

impl Cli {
    /// Does what the command line says; errors are printed.
    pub fn run(self) -> ExitCode {
        match self.command.run() {
            Ok(code) => code,
            Err(error) if broken_pipe(&error) => Exit::Done.into(),
            Err(error) => {
                match error.downcast_ref::<config::Errors>() {
                    // Each of them says that it is an error, and where.
                    Some(errors) => eprintln!("{errors}"),
                    None => eprintln!("{} {error:#}", red("error:")),
                }
                exit_of(&error).into()
            }
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Whoever reads our output has enough (`baton status | head`).
fn broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<config::Errors>() {
        Exit::Usage
    } else if matches!(error.downcast_ref(), Some(control::AskError::Unreachable { .. })) {
        Exit::Unreachable
    } else if error.is::<Unready>() {
        Exit::Unready
    } else {
        Exit::Failed
    }
}

impl Command {
    fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Command::Run { config } => crate::balancer::run(&config.config)?,
            Command::Check { config, json, offline } => check(&config.config, json, offline)?,
            Command::Status { socket, json, watch: None } => show_status(&socket.socket, json)?,
            Command::Status { socket, json, watch: Some(every) } => {
                watch_status(&socket.socket, json, every)?;
            }
            Command::Takeover(args) => args.run(&Request::Takeover { force: args.force })?,
            Command::Yield(args) => args.run(&Request::Yield { force: args.force })?,
            Command::Drain(args) => args.set(Admin::Drained)?,
            Command::Enable(args) => args.set(Admin::Enabled)?,
            Command::Disable(args) => args.set(Admin::Disabled)?,
            Command::Weight(WeightArgs { backend, weight, asked }) => {
                command(&asked, &Request::SetWeight { backend, weight })?;
            }
            Command::Reload { asked } => command(&asked, &Request::Reload)?,
            Command::Guard(guard) => guard.stand()?,
            Command::Unload => {
                crate::datapath::unload()?;
                print("the datapath is out of the kernel\n")?;
            }
            Command::Keygen { file } => keygen(&file)?,
            Command::Sessions(args) => args.run()?,
            Command::Counters { json, all } => counters(json, all)?,
            Command::Explain(args) => print(&args.run()?)?,
            Command::BackendSetup(args) => args.run()?,
            Command::Lab(lab) => return lab.run(),
            Command::Drill(drill) => return drill.run(),
        }
        Ok(Exit::Done.into())
    }
}

impl BackendSetupArgs {
    fn run(self) -> anyhow::Result<()> {
        if self.remove {
            let report = backend::remove(&self.service)?;
            return print(&if self.json { report.json() } else { report.to_string() });
        }
        let config = Config::load(&self.config.config)?;
        let options = backend::Options {
            backend: self.backend,
            interfaces: self.interface,
            program_only: self.program_only,
            all_flows: self.all_flows,
        };
        if self.apply {
            let report = backend::apply(&config, &self.service, &options)?;
            return print(&if self.json { report.json() } else { report.to_string() });
        }
        let scripts = backend::scripts(&config, &self.config.config, &self.service, &options)?;
        print(&if self.json { scripts.json() } else { scripts.to_string() })
    }
}

impl SessionsArgs {
    fn run(self) -> anyhow::Result<()> {
        match self.command {
            Some(SessionsCommand::Kill(kill)) => kill.run(),
            None => self.list(),
        }
    }

    fn list(self) -> anyhow::Result<()> {
        let Self { command: _, filter, limit, asked } = self;
        let wanted = filter.wanted(limit.into());
        let value = ask(&asked.socket.socket, &Request::Sessions(wanted))?;
        if asked.json {
            return print(&format!("{value:#}\n"));
        }
        let Sessions { sessions, more } = serde_json::from_value(value)?;
        let headings = ["SERVICE", "CLIENT", "BACKEND", "NAT", "STATE", "AGE", "IDLE"];
        let mut table = Table::new(&headings);
        for session in &sessions {
            table.row([
                format!("{}/{}", session.service, word(&session.protocol)),
                session.client.to_string(),
                format!("{} {}", session.backend, session.backend_address),
                session.nat.map_or("-".into(), |nat| nat.to_string()),
                word(&session.state),
                ago(session.age_s),
                ago(session.idle_s),
            ]);
        }
        let more = if more { "There are more: see --limit.\n" } else { "" };
        print(&format!("{table}{more}"))
    }
}

impl KillArgs {
    fn run(self) -> anyhow::Result<()> {
        let Self { filter, all: _, asked } = self;
        let value = ask(&asked.socket.socket, &Request::EndSessions(filter.wanted(usize::MAX)))?;
        if asked.json {
            return print(&format!("{value:#}\n"));
        }
        let Ended { established, half_open, told } = serde_json::from_value(value)?;
        print(&format!(
            "{} sessions ended ({half_open} of them half-open); both ends of {told} were sent a RST\n",
            established + half_open
        ))
    }
}

impl BackendArgs {
    fn set(self, admin: Admin) -> anyhow::Result<()> {
        command(&self.asked, &Request::SetBackend { backend: self.backend, admin })
    }
}

fn check(path: &Path, json: bool, offline: bool) -> anyhow::Result<()> {
    let checked = Config::load(path).map_err(anyhow::Error::from).and_then(|config| {
        let here =
            if offline { Vec::new() } else { config.check_system(&System::read(&config)?)? };
        Ok((config, here))
    });
    if json
        && let Err(error) = &checked
        && let Some(errors) = error.downcast_ref::<config::Errors>()
    {
        print(&format!("{:#}\n", errors.json()))?;
    }
    let (config, here) = checked?;
    for warning in config.warnings.iter().chain(&here) {
        eprintln!("{warning}");
    }
    if json {
        print(&format!("{:#}\n", config::describe_json(&config)))
    } else {
        print(&config::describe(&config))
    }
}

fn ask(socket: &Path, request: &Request) -> anyhow::Result<serde_json::Value> {
    match control::ask(socket, request, PATIENCE)? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(why) => Err(anyhow::anyhow!(why)),
        Reply::Unready(why) => Err(Unready(why).into()),
    }
}

/// What `--force` would have done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unready(String);

/// Asks, and prints each step of the answer (or the answer itself as JSON).
fn command(asked: &Asked, request: &Request) -> anyhow::Result<()> {
    let value = ask(&asked.socket.socket, request)?;
    if asked.json {
        return print(&format!("{value:#}\n"));
    }
    let done: crate::balancer::Done = serde_json::from_value(value)?;
    print(&done.to_string())
}

fn show_status(socket: &Path, json: bool) -> anyhow::Result<()> {
    let value = ask(socket, &Request::Status)?;
    if json {
        return print(&format!("{value:#}\n"));
    }
    print(&serde_json::from_value::<Status>(value)?.render())
}

fn counters(json: bool, all: bool) -> anyhow::Result<()> {
    let counters = Counters::read()?.ok_or_else(|| {
        anyhow::anyhow!(
            "no datapath is loaded in this network namespace: `baton run` loads it where a \
             service is passthrough or dsr; run this in the same namespace"
        )
    })?;
    if json {
        return print(&format!("{:#}\n", serde_json::to_value(&counters)?));
    }
    print(&counters.render(all))
}

/// On a terminal each status replaces the one before; elsewhere they follow each other. A daemon
/// that is away for a while is said so and asked again.
fn watch_status(socket: &Path, json: bool, every: Duration) -> anyhow::Result<()> {
    let clear = if io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
    loop {
        print(clear)?;
        if let Err(error) = show_status(socket, json) {
            if broken_pipe(&error) {
                return Err(error);
            }
            print(&format!("{error:#}\n"))?;
        }
        std::thread::sleep(every);
    }
}

/// Prints to standard output; `println!` would panic on a closed pipe.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Red only on a terminal, and not where NO_COLOR is set (no-color.org).
fn red(text: &str) -> String {
    let wanted = io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted { format!("\x1b[1;31m{text}\x1b[0m") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn watch_takes_seconds_within_reason() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["", "0", "-1", "NaN", "inf", "1e9", "soon"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
