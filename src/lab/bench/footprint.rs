//! What the datapath takes: kernel memory for a flow, and time from `baton run` to the first
//! packet that it forwards.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{BenchOptions, other, quartiles};
use crate::datapath::{
    self,
    load::{Loaded, Sizes},
};
use crate::lab::drill::check_signals;
use crate::lab::process::Daemon;
use crate::lab::topology::{ECHO_PORT, Segment, VIP_BACK, VIP_FRONT};
use crate::lab::{Doing as _, Lab, LabError};

/// The node that `baton run` is started on.
const RELAY: &str = "relay1";
/// Sizes of the table, of 2ⁿ, so that there are as many buckets; the smaller is subtracted.
const FEW: u32 = 1 << 10;
const MANY: u32 = 1 << 18;
/// Half-open flows in both.
const HALF_OPEN: u32 = 1024;
/// How long the first packet may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two datagrams of the client.
const STEP: Duration = Duration::from_micros(200);
/// How long a daemon may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Footprint {
    /// Flows that the tables had room for.
    pub flows: u32,
    /// Bytes for a flow in `flows`, as the kernel reckons its map (`memlock` of its fdinfo).
    pub flow_bytes: f64,
    /// The same in `replies`, the other direction.
    pub reply_bytes: f64,
    /// Bytes for a flow that the machine's VmallocUsed grew by, both directions: not reckoned, but
    /// shared with whatever else the machine does meanwhile.
    pub vmalloc_bytes: f64,
    /// Milliseconds from the start of `baton run` to the first answer through it, median.
    pub first_packet_ms: f64,
    /// Each of them.
    pub first_packets_ms: Vec<f64>,
}

/// Measures it on the first relay of a lab.
pub(super) fn run(
    lab: &mut Lab,
    options: &BenchOptions,
    say: &mut dyn FnMut(&str),
) -> Result<Footprint, LabError> {
    let (few, many) = (memory(FEW)?, memory(MANY)?);
    let each = |many: u64, few: u64| (many as f64 - few as f64) / f64::from(MANY - FEW);
    let mut first_packets_ms = Vec::new();
    for _ in 0..options.runs {
        check_signals()?;
        first_packets_ms.push(first_packet(lab)?.as_secs_f64() * 1e3);
    }
    let [_, first_packet_ms, _] = quartiles(&mut first_packets_ms.clone());
    let footprint = Footprint {
        flows: MANY,
        flow_bytes: each(many.flows, few.flows),
        reply_bytes: each(many.replies, few.replies),
        vmalloc_bytes: each(many.vmalloc, few.vmalloc),
        first_packet_ms,
        first_packets_ms,
    };
    say(&format!(
        "  {:.0} + {:.0} bytes a flow, first packet after {:.0} ms",
        footprint.flow_bytes, footprint.reply_bytes, footprint.first_packet_ms
    ));
    Ok(footprint)
}

struct Memory {
    flows: u64,
    replies: u64,
    /// What the whole machine's grew by.
    vmalloc: u64,
}

/// What tables for so many flows take.
fn memory(flows: u32) -> Result<Memory, LabError> {
    let before = vmalloc_used()?;
    let doing = "loading the datapath";
    let loaded = Loaded::unpinned(Sizes { flows, half_open_flows: HALF_OPEN, affinities: 256 });
    let maps = loaded.and_then(|loaded| loaded.maps()).map_err(other).doing(doing)?;
    let vmalloc = vmalloc_used()?.saturating_sub(before);
    let of = |memory: libbpf_rs::Result<Option<u64>>| {
        let memory = memory.map_err(other).doing("asking what a map takes")?;
        memory.ok_or_else(|| other("not told")).doing("asking what a map takes")
    };
    Ok(Memory { flows: of(maps.flows.memory())?, replies: of(maps.replies.memory())?, vmalloc })
}

/// In bytes.
fn vmalloc_used() -> Result<u64, LabError> {
    let text = std::fs::read_to_string("/proc/meminfo").doing("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmallocUsed:"));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kilobytes.unwrap_or(0) * 1024)
}

/// Starts `baton run` and takes the time until an answer comes through it. The client knows the
/// relay's hardware address and asks all the time, so nothing else is waited for.
fn first_packet(lab: &mut Lab) -> Result<Duration, LabError> {
    let relay = lab.topology.node(RELAY).expect("every lab has a first relay");
    let mac = relay.link(Segment::Front).expect("it has a link to the front").mac;
    let text = configuration(lab);
    let file = lab.write("bench-footprint.toml", &text)?;
    lab.netns("client")
        .ip(&format!("neigh replace {VIP_FRONT} lladdr {mac} dev front nud permanent"))
        .doing("setting the VIP's neighbour")?;
    let daemon = Daemon::new("baton", lab.options.binary.clone(), ["run", "-c", &file]);
    let begun = Instant::now();
    lab.start(RELAY, &daemon)?;
    let answered =
        lab.netns("client").enter(|| await_answer(begun)).doing("entering the client")?;
    if let Some(process) = lab.process(RELAY, "baton") {
        process.terminate(END_PATIENCE).doing("ending baton")?;
    }
    let unloaded = lab.netns(RELAY).enter(datapath::unload).doing("entering the relay")?;
    unloaded.map_err(other).doing("unloading the datapath")?;
    match answered.doing("asking through the relay")? {
        Some(time) => Ok(time),
        None => Err(lab.daemon_error(RELAY, "baton", "forwards nothing".into())),
    }
}

/// `None`: none within [`PATIENCE`].
fn await_answer(begun: Instant) -> std::io::Result<Option<Duration>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(SocketAddr::from((VIP_FRONT, ECHO_PORT)))?;
    // A read with a timeout would wait for whole jiffies.
    socket.set_nonblocking(true)?;
    while begun.elapsed() < PATIENCE {
        // Refused or unreachable until it is there.
        let _ = socket.send(b"baton?");
        std::thread::sleep(STEP);
        if socket.recv(&mut [0; 64]).is_ok() {
            return Ok(Some(begun.elapsed()));
        }
    }
    Ok(None)
}

fn configuration(lab: &Lab) -> String {
    let backend = lab.topology.node("backend1").expect("every lab has backends").links[0].v4;
    let dir = lab.dir.display();
    format!(
        "[node]\nname = \"{RELAY}\"\ncontrol = \"{dir}/bench-footprint.sock\"\nstate_dir = \"{dir}\"\nlog = \"warn\"\n\
         [election]\nvrid = 77\npriority = 255\n\
         [[vips]]\nname = \"front\"\naddress = \"{VIP_FRONT}/24\"\ninterface = \"front\"\n\
         [[vips]]\nname = \"back\"\naddress = \"{VIP_BACK}/24\"\ninterface = \"back\"\n\
         [[services]]\nname = \"echo\"\nvip = \"front\"\nport = {ECHO_PORT}\nprotocol = \"udp\"\n\
         mode = \"passthrough\"\n\
         [[services.backends]]\nname = \"b1\"\naddress = \"{backend}:{ECHO_PORT}\"\n"
    )
}
