//! New flows in a running datapath, as many and as fast as wanted: TCP handshakes, frame by frame,
//! through the program that is attached to a relay's interface (`bench/bpf/handshake.bpf.c`); and a
//! look at what another relay has of them.
//!
//! They are of a service of their own, which a lab has if it is asked for ([`service`]); nothing is
//! ever sent to its backend.

use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapFlags, ProgramInput};
use nix::net::if_::if_nametoindex;

mod skeleton;

use super::netns::Netns;
use super::topology::{Role, Topology, VIP_FRONT};
use super::{Doing as _, Lab, LabError, drill};
use crate::datapath::hooks;
use crate::datapath::maps::{Table, pinned};
use crate::datapath::skeleton::types;
use skeleton::{HandshakeSkel, HandshakeSkelBuilder};

/// The service's port, and its backend's.
const PORT: u16 = 9000;
/// The first client; the others follow, every 16,384 flows one.
const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);
/// Flows of one client address, and the port of its first: as in `handshake.bpf.c`.
const PORTS: u64 = 16_384;
const FIRST_PORT: u64 = 1024;
/// Flows that one call makes at most: as many may be half-open at a time.
pub(super) const BATCH: u32 = 512;
const FRAME: usize = 64;
/// Sequence numbers with which client and server begin.
const CLIENT_FIRST: u32 = 1000;
const SERVER_FIRST: u32 = 5000;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// TC_ACT_REDIRECT of linux/pkt_cls.h.
const REDIRECT: u32 = 7;

fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> std::io::Error {
    std::io::Error::other(error)
}

/// What a relay's file needs for so many flows.
pub(super) fn service(topology: &Topology, flows: u32) -> String {
    let server = server(topology);
    format!(
        "\n[[services]]\nname = \"many\"\nvip = \"front\"\nport = {PORT}\n\
         mode = \"passthrough\"\nsource = \"client\"\n\
         [[services.backends]]\nname = \"b1\"\naddress = \"{server}\"\n\
         [datapath]\nflows = {flows}\n"
    )
}

fn server(topology: &Topology) -> SocketAddrV4 {
    let node = topology.role(Role::Backend).next().expect("every lab has backends");
    SocketAddrV4::new(node.links[0].v4, PORT)
}

/// A step of the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Syn,
    SynAck,
    /// The flow is established by it.
    Ack,
}

impl Step {
    const ALL: [Self; 3] = [Self::Syn, Self::SynAck, Self::Ack];
}

/// A relay in whose kernel flows are made.
pub(super) struct Source {
    netns: Netns,
    program: OwnedFd,
    server: SocketAddrV4,
}

impl Source {
    /// A relay that runs.
    pub(super) fn on(lab: &Lab, relay: &str) -> Result<Self, LabError> {
        let netns = lab.netns(relay);
        let program = netns.enter(|| {
            let front = if_nametoindex("front").map_err(std::io::Error::from)?;
            hooks::running_tc(front).map_err(other)
        });
        let program = program.and_then(|program| program);
        let program = program.doing("opening the program of a relay's datapath")?;
        Ok(Self { netns, program, server: server(&lab.topology) })
    }

    /// Its network namespace, in which handshakes are made.
    pub(super) fn netns(&self) -> &Netns {
        &self.netns
    }

    /// To be called, and used, in its namespace.
    pub(super) fn handshakes(&self) -> Result<Handshakes, LabError> {
        Handshakes::new(&self.program, self.server)
    }

    /// Establishes the first so many flows, with a pause after each [`BATCH`] of them.
    pub(super) fn fill(&self, flows: u64, pause: Duration) -> Result<(), LabError> {
        let filled = self.netns.enter(|| {
            let mut hands = self.handshakes()?;
            (0..flows).step_by(BATCH as usize).try_for_each(|first| {
                drill::check_signals()?;
                std::thread::sleep(pause);
                hands.make(first, u64::from(BATCH).min(flows - first) as u32)
            })
        });
        filled.doing("entering a relay")?
    }
}

/// Takes flows through handshakes.
pub(super) struct Handshakes {
    skeleton: HandshakeSkel<'static>,
    server: SocketAddrV4,
}

impl Handshakes {
    fn new(program: &OwnedFd, server: SocketAddrV4) -> Result<Self, LabError> {
        let loading = || "loading the program that makes handshakes";
        // The skeleton borrows the place of its object: a word, a few times in a bench.
        let place = Box::leak(Box::new(MaybeUninit::uninit()));
        let open = HandshakeSkelBuilder::default().open(place).map_err(other).doing(loading())?;
        let skeleton = open.load().map_err(other).doing(loading())?;
        let fd = program.as_raw_fd().to_ne_bytes();
        let next = &skeleton.maps.datapath;
        next.update(&0_u32.to_ne_bytes(), &fd, MapFlags::ANY).map_err(other).doing(loading())?;
        Ok(Self { skeleton, server })
    }

    /// Takes so many flows, from a number on, through all of it: they are established.
    pub(super) fn make(&mut self, first: u64, count: u32) -> Result<(), LabError> {
        Step::ALL.into_iter().try_for_each(|step| self.step(step, first, count))
    }

    /// Takes so many flows, from a number on, through a step.
    pub(super) fn step(&mut self, which: Step, first: u64, count: u32) -> Result<(), LabError> {
        let bytes = frame(self.server, which);
        let bss = self.skeleton.maps.bss_data.as_mut().expect("the object has variables");
        let step = &mut bss.step;
        for (to, from) in step.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *to = u64::from_ne_bytes(from.try_into().expect("chunks of eight"));
        }
        let word = |at: usize| u32::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        // The client's address is still zero there, and so is the checksum.
        step.sum = (14..34).step_by(2).map(word).sum();
        step.client = CLIENTS.to_bits();
        step.from_client = (which != Step::SynAck).into();
        step.flow = first;
        let input =
            ProgramInput { data_in: Some(&bytes), repeat: count, ..ProgramInput::default() };
        let doing = "making flows";
        let run =
            self.skeleton.progs.bench_handshake.test_run(input).map_err(other).doing(doing)?;
        if run.return_value != REDIRECT {
            let what = format!("the datapath does not forward a {which:?}: {}", run.return_value);
            return Err(other(what)).doing(doing);
        }
        Ok(())
    }
}

/// The frame of a step, with nothing where the client's address and port belong.
fn frame(server: SocketAddrV4, step: Step) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    // IPv4; twenty bytes of header, forty in all; don't fragment; TTL 64; TCP.
    frame[12..18].copy_from_slice(&[8, 0, 0x45, 0, 0, 40]);
    frame[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
    let (address, port, sequence, acknowledgement, flags) = match step {
        Step::Syn => (30, 36, CLIENT_FIRST, 0, SYN),
        Step::SynAck => (26, 34, SERVER_FIRST, CLIENT_FIRST + 1, SYN | ACK),
        Step::Ack => (30, 36, CLIENT_FIRST + 1, SERVER_FIRST + 1, ACK),
    };
    let end = if step == Step::SynAck { server } else { SocketAddrV4::new(VIP_FRONT, PORT) };
    frame[address..address + 4].copy_from_slice(&end.ip().octets());
    frame[port..port + 2].copy_from_slice(&end.port().to_be_bytes());
    frame[38..42].copy_from_slice(&sequence.to_be_bytes());
    frame[42..46].copy_from_slice(&acknowledgement.to_be_bytes());
    // Twenty bytes of header, a window.
    frame[46..50].copy_from_slice(&[0x50, flags, 0xff, 0xff]);
    frame
}

/// The table of established flows of a relay, whoever put them there.
pub(super) struct Copies {
    flows: Table<types::flow_key, types::flow>,
    /// The service's number on that relay.
    service: u16,
}

impl Copies {
    /// Of a relay that has run.
    pub(super) fn on(lab: &Lab, relay: &str) -> Result<Self, LabError> {
        let doing = "opening a relay's table of flows";
        let namespace = lab.netns(relay).path();
        let services: Table<types::service_key, u32> =
            pinned(&namespace, "services").map_err(other).doing(doing)?;
        let mut slices = services.slices(64).map_err(other).doing(doing)?;
        let found = slices.find(|(key, _)| key.port == PORT.to_be());
        let (_, service) = found.ok_or_else(|| other("no such service")).doing(doing)?;
        let flows = pinned(&namespace, "flows").map_err(other).doing(doing)?;
        Ok(Self { flows, service: service as u16 })
    }

    /// Whether the flow with that number is there.
    pub(super) fn has(&self, flow: u64) -> Result<bool, LabError> {
        let client = Ipv4Addr::from_bits(CLIENTS.to_bits() + (flow / PORTS) as u32);
        let port = (FIRST_PORT + flow % PORTS) as u16;
        let client = IpAddr::V4(client).into();
        let key = types::flow_key { client, port: port.to_be(), service: self.service };
        let found = self.flows.find(&key).map_err(other).doing("looking for a flow")?;
        Ok(found.is_some())
    }

    /// Whether there are any flows, of whatever service.
    pub(super) fn any(&self) -> Result<bool, LabError> {
        let mut slices = self.flows.slices(64).map_err(other).doing("reading a table of flows")?;
        Ok(slices.next().is_some())
    }

    /// How many there are.
    pub(super) fn count(&self) -> Result<u64, LabError> {
        let slices = self.flows.slices(4096).map_err(other).doing("reading a table of flows")?;
        Ok(slices.filter(|(key, _)| key.service == self.service).count() as u64)
    }
}
