//! A race: contenders that do the same, each on a relay of its own, under every load in turn.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::BenchOptions;
use super::contender::Contender;
use super::load::{IPERF_PORT, Load};
use super::report::{Race, Sample};
use crate::lab::build::{READY_PATIENCE, accepts};
use crate::lab::drill::check_signals;
use crate::lab::process::Daemon;
use crate::lab::topology::{HTTP_PORT, Links};
use crate::lab::{Doing as _, Lab, LabError, Servers};

/// Who takes part, and where.
#[derive(Debug)]
pub(super) struct Course {
    /// Its name in reports.
    pub(super) name: &'static str,
    /// What is raced, for people.
    pub(super) title: &'static str,
    pub(super) links: Links,
    pub(super) contenders: &'static [Contender],
    /// Whom the ratios are to.
    pub(super) yardstick: Contender,
    /// Whether the relay's processes do the work, so that their processor time says something.
    pub(super) by_processes: bool,
}

const IN_KERNEL: &[Contender] = &[
    Contender::Passthrough,
    Contender::Nftables,
    Contender::Routing,
    Contender::Haproxy,
    Contender::Nginx,
];

/// Passthrough on relays between two networks.
pub(super) const TWO_LINKS: Course = Course {
    name: "passthrough-two-links",
    title: "Passthrough, `source = \"vip\"`, on a relay with two links",
    links: Links::Two,
    contenders: IN_KERNEL,
    yardstick: Contender::Nftables,
    by_processes: false,
};

/// Passthrough on relays that packets leave by where they came.
pub(super) const ONE_LINK: Course = Course {
    name: "passthrough-one-link",
    title: "Passthrough, `source = \"vip\"`, on a relay with one link",
    links: Links::One,
    ..TWO_LINKS
};

/// Proxy mode.
pub(super) const PROXY: Course = Course {
    name: "proxy",
    title: "Proxy mode",
    links: Links::Two,
    contenders: &[
        Contender::Proxy,
        Contender::Haproxy,
        Contender::HaproxySplice,
        Contender::Nginx,
        Contender::Direct,
    ],
    yardstick: Contender::Haproxy,
    by_processes: true,
};

/// How long a contender may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// A contender with its relay.
struct Lane {
    contender: Contender,
    relay: String,
    address: Ipv4Addr,
    samples: Vec<Sample>,
}

/// Runs a race. The order in a round is load by load, contender by contender.
pub(super) fn run(
    course: &Course,
    options: &BenchOptions,
    say: &mut dyn FnMut(&str),
) -> Result<Race, LabError> {
    say(course.title);
    let relays = course.contenders.len();
    let mut lab = super::lab(options, relays, course.links, Servers::All, say)?;
    if let Some(name) = &options.congestion {
        set_congestion(&lab, name)?;
    }
    for node in ["backend1", "backend2"] {
        let port = IPERF_PORT.to_string();
        lab.start(node, &Daemon::new("iperf3", "iperf3", ["-s", "-p", &port]))?;
    }
    let mut lanes = Vec::new();
    for (number, contender) in (1..).zip(course.contenders) {
        let relay = format!("relay{number}");
        contender.prepare(&lab, &relay, options.congestion.as_deref())?;
        lanes.push(enter(&mut lab, *contender, relay)?);
    }
    for round in 1..=options.runs {
        for lane in &mut lanes {
            lane.samples.push(Sample::default());
        }
        for load in Load::ALL {
            for lane in &mut lanes {
                check_signals()?;
                lane.put(&lab, load, options.seconds)?;
            }
        }
        say(&format!("  round {round} of {}", options.runs));
        for lane in &lanes {
            let sample = lane.samples.last().expect("one for each round");
            say(&format!("    {}: {sample}", lane.contender.name()));
        }
    }
    for lane in &lanes {
        if let Some(process) = lab.process(&lane.relay, lane.contender.name()) {
            process.terminate(END_PATIENCE).doing(format!("ending {}", lane.contender.name()))?;
        }
    }
    drop(lab);
    let samples = lanes.into_iter().map(|lane| (lane.contender, lane.samples)).collect();
    Ok(Race::new(course, samples))
}

/// Starts a contender on its relay, and waits until it lets the client through.
fn enter(lab: &mut Lab, contender: Contender, relay: String) -> Result<Lane, LabError> {
    if let Some(daemon) = contender.daemon(lab, &relay)? {
        lab.start(&relay, &daemon)?;
    }
    let address = contender.address(&lab.topology, &relay);
    let client = lab.netns("client");
    let deadline = Instant::now() + READY_PATIENCE;
    let web = SocketAddr::new(address.into(), HTTP_PORT);
    while !client.enter(|| accepts(web)).doing("entering the client")? {
        lab.check_daemon(&relay, contender.name())?;
        check_signals()?;
        if Instant::now() > deadline {
            return Err(lab.daemon_error(&relay, contender.name(), "does not forward".into()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Lane { contender, relay, address, samples: Vec::new() })
}

impl Lane {
    /// Puts a load on it.
    fn put(&mut self, lab: &Lab, load: Load, seconds: u32) -> Result<(), LabError> {
        let before = cpu_seconds(lab, &self.relay)?;
        let carried = load.put(lab, self.address, seconds)?;
        let cpu = cpu_seconds(lab, &self.relay)? - before;
        self.samples.last_mut().expect("one for each round").add(load, carried, cpu);
        Ok(())
    }
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

/// Processor time that all processes on a relay have used, in seconds: theirs and the kernel's
/// on their behalf, all threads.
pub(super) fn cpu_seconds(lab: &Lab, relay: &str) -> Result<f64, LabError> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let mut total = 0;
    for pid in lab.netns(relay).pids().doing("listing processes")? {
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
