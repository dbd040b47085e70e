//! The bench: proxy mode beside HAProxy and nginx stream, in turn on the same relay of one lab,
//! under the same load; and the load without a relay.
//!
//! Client, relay and backends share this machine's cores, so figures compare within one run only,
//! and the processor time of the relay's own processes says more than the rates. Each round takes
//! every contender in turn, so that what else the machine does falls on all of them; medians of
//! the rounds are reported.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

mod contender;
mod load;
mod report;

use contender::Contender;
use load::{IPERF_PORT, Load};
use report::{Machine, Sample};
pub use report::{Report, render};

use super::build::{READY_PATIENCE, accepts};
use super::drill::check_signals;
use super::process::{Daemon, Lifetime};
use super::topology::HTTP_PORT;
use super::{Doing, Lab, LabError, LabOptions, Servers, Software};

/// What a bench is to do.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// How long each load lasts, in seconds.
    pub seconds: u32,
    /// Rounds; medians are of so many.
    pub runs: usize,
    /// TCP congestion control in every namespace; `None`: this machine's.
    pub congestion: Option<String>,
    /// The `baton` program.
    pub binary: PathBuf,
}

/// The node that the contenders run on.
const RELAY: &str = "relay1";
/// How long a contender may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Runs the bench. `say` is told of every step; signals end it in order once
/// [`super::drill::catch_signals`] was called.
///
/// # Errors
/// The lab could not be made, a contender or a load failed, or a signal came. The lab is gone in
/// any case.
pub fn run(options: &BenchOptions, say: &mut dyn FnMut(&str)) -> Result<Report, LabError> {
    let load_before = report::load_average();
    let mut lab = Lab::build(lab_options(options), say)?;
    if let Some(name) = &options.congestion {
        say(&format!("congestion control: {name}"));
        set_congestion(&lab, name)?;
    }
    let machine = Machine::look(load_before, options.congestion.as_deref());
    for node in ["backend1", "backend2"] {
        let port = IPERF_PORT.to_string();
        lab.start(node, &Daemon::new("iperf3", "iperf3", ["-s", "-p", &port]))?;
    }
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); Contender::ALL.len()];
    for round in 1..=options.runs {
        for (contender, samples) in Contender::ALL.iter().zip(&mut samples) {
            say(&format!("round {round} of {}: {}", options.runs, contender.name()));
            let sample = measure(&mut lab, *contender, options.seconds)?;
            say(&format!("  {sample}"));
            samples.push(sample);
        }
    }
    drop(lab);
    Ok(Report::new(machine, options, &samples))
}

/// By the routes of every node: the sysctl of a namespace takes only what the host's administrator
/// allows to everyone.
fn set_congestion(lab: &Lab, name: &str) -> Result<(), LabError> {
    for node in &lab.topology.nodes {
        for link in &node.links {
            let (network, interface) = (link.segment.v4(0), link.segment.interface());
            let scope = format!("dev {interface} proto kernel scope link src {}", link.v4);
            lab.netns(&node.name)
                .ip(&format!("route change {network}/24 {scope} congctl {name}"))
                .doing("setting the congestion control")?;
        }
    }
    Ok(())
}

fn lab_options(options: &BenchOptions) -> LabOptions {
    LabOptions {
        name: format!("drill-bench-{}", std::process::id()),
        relays: 1,
        binary: options.binary.clone(),
        software: Software::Baton,
        servers: Servers::All,
        advert_interval: Duration::from_millis(100),
        lifetime: Lifetime::WithParent,
    }
}

/// One contender under every load.
fn measure(lab: &mut Lab, contender: Contender, seconds: u32) -> Result<Sample, LabError> {
    if let Some(daemon) = contender.daemon(lab)? {
        lab.start(RELAY, &daemon)?;
    }
    let address = contender.address(&lab.topology);
    await_listening(lab, contender, address)?;
    let mut sample = Sample::default();
    for load in Load::ALL {
        check_signals()?;
        let before = cpu_seconds(lab)?;
        let carried = load.put(lab, address, seconds)?;
        sample.add(load, carried, cpu_seconds(lab)? - before);
    }
    if let Some(process) = lab.process(RELAY, contender.name()) {
        process.terminate(END_PATIENCE).doing(format!("ending {}", contender.name()))?;
    }
    // Its port is free for the next once its last process is gone.
    let netns = lab.netns(RELAY);
    let deadline = Instant::now() + END_PATIENCE;
    while !netns.pids().doing("listing processes")?.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(sample)
}

fn await_listening(lab: &mut Lab, contender: Contender, address: Ipv4Addr) -> Result<(), LabError> {
    let client = lab.netns("client");
    let deadline = Instant::now() + READY_PATIENCE;
    let web = SocketAddr::new(address.into(), HTTP_PORT);
    while !client.enter(|| accepts(web)).doing("entering the client")? {
        lab.check_daemon(RELAY, contender.name())?;
        check_signals()?;
        if Instant::now() > deadline {
            return Err(lab.daemon_error(RELAY, contender.name(), "does not listen".into()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Processor time that all processes on the relay have used, in seconds: theirs and the kernel's
/// on their behalf, all threads.
fn cpu_seconds(lab: &Lab) -> Result<f64, LabError> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let mut total = 0;
    for pid in lab.netns(RELAY).pids().doing("listing processes")? {
        let path = format!("/proc/{pid}/stat");
        // A process that has just ended has no file any more.
        total += std::fs::read_to_string(path).ok().and_then(|stat| cpu_ticks(&stat)).unwrap_or(0);
    }
    Ok(total as f64 / ticks.unwrap_or(100) as f64)
}

/// `utime` and `stime` of proc_pid_stat(5), fields 14 and 15; the name in field 2 may hold
/// anything, so they are counted from its closing parenthesis.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let utime: u64 = fields.next()?.parse().ok()?;
    let stime: u64 = fields.next()?.parse().ok()?;
    Some(utime + stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "42 (a ) b (c) S 1 42 42 0 -1 4194560 1 0 0 0 250 75 9 9 20 0 3 0 77 1 1";
        assert_eq!(cpu_ticks(stat), Some(325));
        assert_eq!(cpu_ticks("42 (x) S 1"), None);
    }
}
