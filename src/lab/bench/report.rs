//! What was measured: figures of a round, medians, ratios, tables; on the terminal and in
//! docs/performance.md.

use std::fmt;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::contender::Contender;
use super::footprint::Footprint;
use super::load::{Carried, Load};
use super::packets::Cost;
use super::race::Course;
use super::{BenchOptions, quartiles};
use crate::table::Table;

/// A bench's report. Figures of every round and their medians; stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where it was measured.
    pub machine: Machine,
    /// How long each load lasted.
    pub seconds: u32,
    /// Rounds.
    pub runs: usize,
    /// What a packet costs.
    pub packets: Vec<Cost>,
    /// What the datapath takes of memory and time.
    pub footprint: Option<Footprint>,
    /// What was measured side by side.
    pub races: Vec<Race>,
}

/// Where a bench ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Cores that client, relays and backends share.
    pub cores: usize,
    /// Kernel release.
    pub kernel: String,
    /// TCP congestion control in force.
    pub congestion_control: String,
    /// Load average of the last minute before the bench.
    pub load_before: f64,
}

/// Contenders side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Race {
    /// `passthrough-two-links`, `passthrough-one-link` or `proxy`.
    pub name: &'static str,
    /// The same for people.
    pub title: &'static str,
    /// Whom the ratios are to.
    pub yardstick: &'static str,
    /// Whether the processor time of the relay's processes says something.
    pub by_processes: bool,
    /// What was measured of each.
    pub relays: Vec<Relay>,
}

/// What was measured of one contender.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Relay {
    /// `baton`, `nftables`, `plain-routing`, `haproxy`, `haproxy-splice`, `nginx-stream`, or
    /// `no-relay`: client and backend with only the switch between them.
    pub name: &'static str,
    /// Medians of the rounds.
    pub median: Sample,
    /// Half of what lies between the quartiles, in hundredths of the median.
    pub spread: Sample,
    /// Of each round the ratio to the yardstick in it; medians of these.
    pub ratio: Sample,
    /// Each round.
    pub rounds: Vec<Sample>,
}

/// The figures of one contender in one round.
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
    pub(super) fn look(congestion: Option<&str>) -> Self {
        let default = || first_word("/proc/sys/net/ipv4/tcp_congestion_control");
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: first_word("/proc/sys/kernel/osrelease"),
            congestion_control: congestion.map_or_else(default, str::to_owned),
            load_before: load_average(),
        }
    }
}

/// Load average of the last minute.
fn load_average() -> f64 {
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
        Self::merge(samples, |figures| quartiles(figures)[1])
    }

    /// Half of what lies between the quartiles, in hundredths of the median.
    fn spread(samples: &[Self]) -> Self {
        Self::merge(samples, |figures| match quartiles(figures) {
            [low, median, high] if median > 0.0 => (high - low) / 2.0 / median * 100.0,
            _ => 0.0,
        })
    }

    /// 0 where it would be of 0.
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
    /// An empty one.
    pub(super) fn new(machine: Machine, options: &BenchOptions) -> Self {
        let (seconds, runs) = (options.seconds, options.runs);
        Self { machine, seconds, runs, packets: Vec::new(), footprint: None, races: Vec::new() }
    }
}

impl Race {
    /// Of the samples of each contender, in the order of the course, as many of each.
    pub(super) fn new(course: &Course, samples: Vec<(Contender, Vec<Sample>)>) -> Self {
        let yardstick = samples.iter().find(|(contender, _)| *contender == course.yardstick);
        let yardstick = yardstick.expect("the yardstick takes part").1.clone();
        let relay = |(contender, rounds): (Contender, Vec<Sample>)| {
            let ratios: Vec<_> =
                rounds.iter().zip(&yardstick).map(|(one, other)| one.ratio(other)).collect();
            Relay {
                name: contender.name(),
                median: Sample::median(&rounds),
                spread: Sample::spread(&rounds),
                ratio: Sample::median(&ratios),
                rounds,
            }
        };
        Self {
            name: course.name,
            title: course.title,
            yardstick: course.yardstick.name(),
            by_processes: course.by_processes,
            relays: samples.into_iter().map(relay).collect(),
        }
    }
}

/// Tells how long the bench has been running with every step.
pub(super) struct Progress<'a> {
    begun: Instant,
    tell: &'a mut dyn FnMut(&str),
}

impl<'a> Progress<'a> {
    pub(super) fn new(tell: &'a mut dyn FnMut(&str)) -> Self {
        Self { begun: Instant::now(), tell }
    }

    pub(super) fn say(&mut self, step: &str) {
        let (seconds, load) = (self.begun.elapsed().as_secs(), load_average());
        (self.tell)(&format!("{seconds:4} s, load {load:.1}: {step}"));
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

/// A part of the report, by the name that docs/performance.md marks its place with.
pub(super) struct Section {
    pub(super) name: &'static str,
    pub(super) text: String,
}

/// The report as text that explains its figures.
pub fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut text =
        format!("\nKernel {}, load average {} before.\n", machine.kernel, machine.load_before);
    for section in sections(report) {
        text += &format!("\n{}", section.text);
    }
    text
}

/// `document` with the report's sections in the places that it marks for them: after
/// `<!-- bench NAME -->`, before the next `<!-- end -->`. Sections that were not measured, and what
/// is around them, stay.
///
/// # Errors
/// The name of a section that the document has no place for.
pub fn write_into(report: &Report, document: &str) -> Result<String, &'static str> {
    place(sections(report), document)
}

/// `document` with these sections in their places.
pub(super) fn place(sections: Vec<Section>, document: &str) -> Result<String, &'static str> {
    let mut document = document.to_owned();
    for Section { name, text } in sections {
        let mark = format!("<!-- bench {name} -->\n");
        let start = document.find(&mark).ok_or(name)? + mark.len();
        let length = document[start..].find("<!-- end -->").ok_or(name)?;
        document.replace_range(start..start + length, &format!("```\n{text}```\n"));
    }
    Ok(document)
}

fn sections(report: &Report) -> Vec<Section> {
    let mut sections = Vec::new();
    if !report.packets.is_empty() {
        sections.push(Section { name: "packets", text: packets(report) });
    }
    if let Some(footprint) = &report.footprint {
        sections.push(Section { name: "footprint", text: self::footprint(footprint) });
    }
    let race = |race: &Race| Section { name: race.name, text: self::race(report, race) };
    sections.extend(report.races.iter().map(race));
    sections
}

fn packets(report: &Report) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "What a packet costs, in nanoseconds on one core (64-byte TCP segments, each of the next flow of \
         so many):\nmedians of {} rounds, ± half of what lies between the quartiles, kernel {}, load \
         average {}.\nlookup: what a bare look into the flow table adds to XDP_TX, part of \"+ baton\".\n\
         speed: bare XDP_TX by what the packet takes, 1 is as fast as bare.\n\n",
        super::packets::rounds(report.runs),
        machine.kernel,
        machine.load_before
    );
    let mut table = Table::new(&[
        "packet", "flows", "of", "XDP_TX", "+ baton", "±", "lookup", "speed", "empty TC",
        "+ baton", "±",
    ]);
    for Cost { packet, flows, busy, xdp, found, tc, speed } in &report.packets {
        let mut row = vec![(*packet).to_owned(), busy.to_string(), flows.to_string()];
        row.extend([xdp.bare, xdp.added, xdp.spread()].map(|value| format!("{value:.0}")));
        row.push(found.map_or("-".to_owned(), |found| format!("{found:.0}")));
        row.push(format!("{speed:.2}"));
        let tc = tc.map(|tc| [tc.bare, tc.added, tc.spread()].map(|value| format!("{value:.0}")));
        row.extend(tc.unwrap_or_default());
        table.row(row);
    }
    text += &table.to_string();
    text
}

fn footprint(footprint: &Footprint) -> String {
    let Footprint { flows, flow_bytes, reply_bytes, vmalloc_bytes, first_packet_ms, .. } =
        footprint;
    format!(
        "Kernel memory for a flow, tables for {flows}:\n\
         {flow_bytes:4.0} bytes for its direction from the client\n\
         {reply_bytes:4.0} bytes for that from the backend\n\
         {:4.0} bytes for both, as the kernel reckons its maps; the machine's VmallocUsed grew by \
         {vmalloc_bytes:.0}\n\
         From `baton run` to the first answer through it: {first_packet_ms:.0} ms (median)\n",
        flow_bytes + reply_bytes
    )
}

fn race(report: &Report, race: &Race) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "{}: medians of {} rounds of {} s a load,\n{} cores shared by all, kernel {}, {}, load \
         average {}.\n× is to {}, ± half of what lies between the quartiles in %. More is better:\n\n",
        race.title,
        report.runs,
        report.seconds,
        machine.cores,
        machine.kernel,
        machine.congestion_control,
        machine.load_before,
        race.yardstick
    );
    text += &table(race, &RATES);
    if race.by_processes {
        text += "\nProcessor time of the relay's processes, less is better:\n\n";
        text += &table(race, &COSTS);
    }
    let failed: f64 = race.relays.iter().flat_map(|relay| &relay.rounds).map(|r| r.errors).sum();
    if failed > 0.0 {
        text += &format!("\nRequests that failed, of all together: {failed}\n");
    }
    text
}

fn table(race: &Race, columns: &[Column]) -> String {
    let headings: Vec<&str> = std::iter::once("relay")
        .chain(columns.iter().flat_map(|(heading, ..)| [*heading, "×", "±"]))
        .collect();
    let mut table = Table::new(&headings);
    for relay in &race.relays {
        let figures = columns.iter().flat_map(|&(_, figure, decimals)| {
            let (value, ratio) = (figure(&relay.median), figure(&relay.ratio));
            let spread = figure(&relay.spread);
            [format!("{value:.decimals$}"), format!("{ratio:.2}"), format!("{spread:.0}")]
        });
        table.row(std::iter::once(relay.name.to_owned()).chain(figures));
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::super::{Suite, race};
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

    fn report() -> Report {
        let options = BenchOptions {
            suites: Suite::ALL.to_vec(),
            seconds: 4,
            runs: 3,
            flows: vec![1],
            congestion: None,
            binary: "baton".into(),
        };
        let of = |rates: [f64; 3]| rates.map(|rate| sample(rate, 1.0)).to_vec();
        let rates = [[9.0, 6.0, 1.0], [3.0, 1.0, 9.0], [1.0; 3], [1.0; 3], [1.0; 3]];
        let samples = race::PROXY.contenders.iter().copied().zip(rates.map(of)).collect();
        let mut report = Report::new(Machine::look(None), &options);
        report.races.push(Race::new(&race::PROXY, samples));
        report
    }

    #[test]
    fn medians_are_of_the_rounds_and_ratios_within_each() {
        let report = report();
        let relays = &report.races[0].relays;
        assert_eq!(relays[0].median.requests_per_s, 6.0);
        assert_eq!(relays[0].ratio.requests_per_s, 3.0);
        assert!((relays[0].ratio.cpu_us_per_connection - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(relays[0].spread.requests_per_s, 4.0 / 6.0 * 100.0);
        assert_eq!(relays[1].ratio.upload_gbit_per_s, 1.0);
        let text = render(&report);
        assert!(text.contains("haproxy-splice") && text.contains("3.00"), "{text}");
    }

    #[test]
    fn sections_go_where_the_document_has_them() {
        let document = "a\n<!-- bench packets -->\nold\n<!-- end -->\nb\n<!-- bench proxy -->\n\
                        older\n<!-- end -->\nc\n";
        let written = write_into(&report(), document).unwrap();
        assert!(written.starts_with("a\n<!-- bench packets -->\nold\n<!-- end -->\nb\n"));
        assert!(written.ends_with("```\n<!-- end -->\nc\n"), "{written}");
        assert!(written.contains("nginx-stream") && !written.contains("older"), "{written}");
        assert_eq!(write_into(&report(), &written), Ok(written.clone()));
        assert_eq!(write_into(&report(), "a"), Err("proxy"));
    }
}
