//! What was measured: figures of a round, medians, ratios, the table.

use std::fmt;

use serde::Serialize;

use super::BenchOptions;
use super::contender::Contender;
use super::load::{Carried, Load};
use crate::table::Table;

/// A bench's report. Rates and processor times of every round and their medians; stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// How long each load lasted.
    pub seconds: u32,
    /// Rounds.
    pub runs: usize,
    /// What was measured of each proxy.
    pub relays: Vec<Relay>,
}

/// Where a bench ran.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// Cores that client, relay and backends share.
    pub cores: usize,
    /// Kernel release.
    pub kernel: String,
    /// TCP congestion control in force.
    pub congestion_control: String,
    /// Load average of the last minute before the bench.
    pub load_before: f64,
}

/// What was measured of one proxy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Relay {
    /// `baton`, `haproxy`, `haproxy-splice`, `nginx-stream`, or `no-relay`: client and backend
    /// with only the switch between them.
    pub name: &'static str,
    /// Medians of the rounds.
    pub median: Sample,
    /// `median` divided by that of `haproxy`.
    pub ratio: Sample,
    /// Each round.
    pub rounds: Vec<Sample>,
}

/// The figures of one proxy in one round.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Sample {
    /// Client to backend, 10⁹ bits a second.
    pub upload_gbit_per_s: f64,
    /// Backend to client, 10⁹ bits a second.
    pub download_gbit_per_s: f64,
    /// Requests a second over kept connections.
    pub requests_per_s: f64,
    /// Connections a second, a request each.
    pub connections_per_s: f64,
    /// Processor seconds of the relay's processes for 10⁹ bytes uploaded.
    pub cpu_s_per_gb_up: f64,
    /// The same for 10⁹ bytes downloaded.
    pub cpu_s_per_gb_down: f64,
    /// Processor microseconds of the relay's processes for a request.
    pub cpu_us_per_request: f64,
    /// Processor microseconds of the relay's processes for a connection.
    pub cpu_us_per_connection: f64,
    /// Requests that failed.
    pub errors: f64,
}

impl Machine {
    /// This machine, with a congestion control that isn't its own where one was asked for.
    pub(super) fn look(load_before: f64, congestion: Option<&str>) -> Self {
        let default = || first_word("/proc/sys/net/ipv4/tcp_congestion_control");
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: first_word("/proc/sys/kernel/osrelease"),
            congestion_control: congestion.map_or_else(default, str::to_owned),
            load_before,
        }
    }
}

/// Load average of the last minute.
pub(super) fn load_average() -> f64 {
    first_word("/proc/loadavg").parse().unwrap_or(0.0)
}

fn first_word(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().next().unwrap_or_default().to_owned()
}

impl Sample {
    /// Adds what a load came to and the processor seconds that it took.
    pub(super) fn add(&mut self, load: Load, carried: Carried, cpu: f64) {
        let each = cpu / carried.amount.max(1.0);
        self.errors += carried.errors as f64;
        let (rate, cost) = match load {
            Load::Upload => (&mut self.upload_gbit_per_s, &mut self.cpu_s_per_gb_up),
            Load::Download => (&mut self.download_gbit_per_s, &mut self.cpu_s_per_gb_down),
            Load::Requests => (&mut self.requests_per_s, &mut self.cpu_us_per_request),
            Load::Connections => (&mut self.connections_per_s, &mut self.cpu_us_per_connection),
        };
        (*rate, *cost) = match load {
            Load::Upload | Load::Download => (carried.rate * 8.0 / 1e9, each * 1e9),
            Load::Requests | Load::Connections => (carried.rate, each * 1e6),
        };
    }

    /// Every figure of all of them made into one.
    fn merge(samples: &[Self], make: impl Fn(&mut Vec<f64>) -> f64) -> Self {
        let each = |figure: fn(&Self) -> f64| make(&mut samples.iter().map(figure).collect());
        Self {
            upload_gbit_per_s: each(|sample| sample.upload_gbit_per_s),
            download_gbit_per_s: each(|sample| sample.download_gbit_per_s),
            requests_per_s: each(|sample| sample.requests_per_s),
            connections_per_s: each(|sample| sample.connections_per_s),
            cpu_s_per_gb_up: each(|sample| sample.cpu_s_per_gb_up),
            cpu_s_per_gb_down: each(|sample| sample.cpu_s_per_gb_down),
            cpu_us_per_request: each(|sample| sample.cpu_us_per_request),
            cpu_us_per_connection: each(|sample| sample.cpu_us_per_connection),
            errors: each(|sample| sample.errors),
        }
    }

    fn median(samples: &[Self]) -> Self {
        Self::merge(samples, |figures| {
            figures.sort_by(f64::total_cmp);
            figures.get(figures.len() / 2).copied().unwrap_or(0.0)
        })
    }

    fn ratio(&self, to: &Self) -> Self {
        Self::merge(&[*self, *to], |figures| match figures[..] {
            [one, other] if other > 0.0 => one / other,
            _ => 0.0,
        })
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} Gbit/s up, {:.2} down, {:.0} requests/s, {:.0} connections/s",
            self.upload_gbit_per_s,
            self.download_gbit_per_s,
            self.requests_per_s,
            self.connections_per_s
        )?;
        if self.errors > 0.0 { write!(f, ", {} errors", self.errors) } else { Ok(()) }
    }
}

impl Report {
    /// The report of the samples of each contender, in the order of [`Contender::ALL`].
    pub(super) fn new(machine: Machine, options: &BenchOptions, samples: &[Vec<Sample>]) -> Self {
        let medians: Vec<Sample> = samples.iter().map(|rounds| Sample::median(rounds)).collect();
        let yardstick = Contender::ALL
            .iter()
            .position(|contender| *contender == Contender::Haproxy)
            .expect("HAProxy is one of them");
        let relay = |(contender, rounds): (&Contender, &Vec<Sample>)| {
            let median = Sample::median(rounds);
            let ratio = median.ratio(&medians[yardstick]);
            Relay { name: contender.name(), median, ratio, rounds: rounds.clone() }
        };
        let relays = Contender::ALL.iter().zip(samples).map(relay).collect();
        let (seconds, runs) = (options.seconds, options.runs);
        Self { machine, seconds, runs, relays }
    }
}

/// A figure of the table: heading, what is read, decimals.
type Column = (&'static str, fn(&Sample) -> f64, usize);

const RATES: [Column; 4] = [
    ("Gbit/s up", |sample| sample.upload_gbit_per_s, 2),
    ("Gbit/s down", |sample| sample.download_gbit_per_s, 2),
    ("requests/s", |sample| sample.requests_per_s, 0),
    ("connections/s", |sample| sample.connections_per_s, 0),
];

const COSTS: [Column; 4] = [
    ("s/GB up", |sample| sample.cpu_s_per_gb_up, 2),
    ("s/GB down", |sample| sample.cpu_s_per_gb_down, 2),
    ("µs/request", |sample| sample.cpu_us_per_request, 1),
    ("µs/connection", |sample| sample.cpu_us_per_connection, 0),
];

/// The report as text that explains its figures.
pub fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "\nProxy mode beside HAProxy and nginx stream: medians of {} rounds of {} s a load, {} \
         cores shared by all,\nkernel {}, {}, load average {} before. × is to haproxy.\n\n\
         More is better:\n",
        report.runs,
        report.seconds,
        machine.cores,
        machine.kernel,
        machine.congestion_control,
        machine.load_before
    );
    text += &table(report, &RATES);
    text += "\nProcessor time of the relay's processes, less is better:\n";
    text + &table(report, &COSTS)
}

fn table(report: &Report, columns: &[Column]) -> String {
    let headings: Vec<&str> = std::iter::once("relay")
        .chain(columns.iter().flat_map(|(heading, ..)| [*heading, "×"]))
        .collect();
    let mut table = Table::new(&headings);
    for relay in &report.relays {
        let figures = columns.iter().flat_map(|&(_, figure, decimals)| {
            let (value, ratio) = (figure(&relay.median), figure(&relay.ratio));
            [format!("{value:.decimals$}"), format!("{ratio:.2}")]
        });
        table.row(std::iter::once(relay.name.to_owned()).chain(figures));
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rate: f64, cpu: f64) -> Sample {
        let mut sample = Sample::default();
        for load in Load::ALL {
            let carried = Carried { amount: rate * 4.0, rate, errors: 0 };
            sample.add(load, carried, cpu);
        }
        sample
    }

    #[test]
    fn figures_have_the_units_that_they_name() {
        let one = sample(1.25e9, 2.0);
        assert_eq!((one.upload_gbit_per_s, one.cpu_s_per_gb_up), (10.0, 0.4));
        assert_eq!((one.download_gbit_per_s, one.cpu_s_per_gb_down), (10.0, 0.4));
        let one = sample(1000.0, 2.0);
        assert_eq!((one.requests_per_s, one.cpu_us_per_request), (1000.0, 500.0));
        assert_eq!((one.connections_per_s, one.cpu_us_per_connection), (1000.0, 500.0));
    }

    #[test]
    fn medians_and_ratios_are_those_of_the_rounds() {
        let machine = Machine::look(0.0, None);
        let options =
            BenchOptions { seconds: 4, runs: 3, congestion: None, binary: "baton".into() };
        let of = |rates: [f64; 3]| rates.map(|rate| sample(rate, 1.0)).to_vec();
        let samples =
            [of([9.0, 6.0, 1.0]), of([3.0, 1.0, 9.0]), of([1.0; 3]), of([1.0; 3]), of([1.0; 3])];
        let report = Report::new(machine, &options, &samples);
        assert_eq!(report.relays[0].median.requests_per_s, 6.0);
        assert_eq!(report.relays[0].ratio.requests_per_s, 2.0);
        assert_eq!(report.relays[0].ratio.cpu_us_per_connection, 0.5);
        assert_eq!(report.relays[1].ratio.upload_gbit_per_s, 1.0);
        let text = render(&report);
        assert!(text.contains("haproxy-splice") && text.contains("2.00"), "{text}");
    }
}
