//! The programs around the datapath's (`bpf/packets.bpf.c`), and what one batch of frames takes.

use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::Duration;

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{Link, MapCore as _, MapFlags, ProgramInput, ProgramMut};

use super::skeleton::{PacketsSkel, PacketsSkelBuilder};
use crate::lab::bench::other;
use crate::lab::{Doing as _, LabError};

/// Flows of one address, and the port of its first: as in `bpf/packets.bpf.c`.
pub(super) const PORTS: u32 = 16384;
const FIRST_PORT: u16 = 1024;

/// Bytes of a frame: Ethernet, IPv4, TCP and ten bytes of data.
pub(super) const FRAME: usize = 64;
const ETHERNET: usize = 14;
const CHECKSUM: usize = 24;
const SOURCE: usize = 26;
const DESTINATION: usize = 30;
const SOURCE_PORT: usize = 34;
const DESTINATION_PORT: usize = 36;

/// BPF_F_TEST_XDP_LIVE_FRAMES of linux/bpf.h.
const LIVE_FRAMES: u32 = 1 << 1;
/// TC_ACT_SHOT of linux/pkt_cls.h.
const SHOT: u32 = 2;
/// How often a batch is tried of which frames are lost.
const TRIES: usize = 5;
/// How long the far end may take for the last frames of a batch.
const PATIENCE_MS: usize = 200;

/// A hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    Xdp,
    Tc,
}

/// What runs on every frame of a batch.
#[derive(Clone, Copy)]
pub(super) enum Runs<'a> {
    /// Nothing but XDP_TX, on frames as they are.
    Bare,
    /// The frame written anew, and nothing else: XDP_TX or an empty TC program.
    Written,
    /// The frame written anew, its flow found in the datapath's table, and nothing else: XDP alone.
    Found,
    /// The frame written anew, and this program of the datapath.
    Program(BorrowedFd<'a>),
}

/// A TCP segment, of which one port and the source address differ by flow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// The source of the first flow; the others follow, every 16,384 flows one.
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
    /// The port at the end that does not differ.
    pub(super) port: u16,
    /// Whether the port that differs is the source's; else the destination's.
    pub(super) from_client: bool,
}

impl Segment {
    fn bytes(&self) -> [u8; FRAME] {
        let mut frame = [0; FRAME];
        frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        frame[12..ETHERNET].copy_from_slice(&[8, 0]);
        let length = (FRAME - ETHERNET) as u16;
        frame[ETHERNET..ETHERNET + 4].copy_from_slice(&[0x45, 0, 0, length as u8]);
        // Don't fragment; TTL 64; TCP.
        frame[ETHERNET + 6..ETHERNET + 10].copy_from_slice(&[0x40, 0, 64, 6]);
        frame[SOURCE..SOURCE + 4].copy_from_slice(&self.source.octets());
        frame[DESTINATION..DESTINATION + 4].copy_from_slice(&self.destination.octets());
        let fixed = if self.from_client { DESTINATION_PORT } else { SOURCE_PORT };
        frame[fixed..fixed + 2].copy_from_slice(&self.port.to_be_bytes());
        // Twenty bytes of header, ACK, a window.
        frame[SOURCE_PORT + 12..SOURCE_PORT + 16].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]);
        frame
    }
}

/// The programs, loaded; the far end's attached.
pub(super) struct Track {
    skeleton: PacketsSkel<'static>,
    /// Takes the far end's program away when dropped.
    _sink: Link,
    ifindex: u32,
    handed: u64,
}

impl Track {
    /// Frames come by interface `ifindex` and leave by it, to `far_end`; their flows are in the
    /// map `flows`. In this thread's network namespace.
    pub(super) fn new(ifindex: u32, far_end: u32, flows: BorrowedFd<'_>) -> Result<Self, LabError> {
        let loading = || "loading the bench's programs";
        // The skeleton borrows the place of its object: a word, once in a bench.
        let place = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut open = PacketsSkelBuilder::default().open(place).map_err(other).doing(loading())?;
        open.maps.flows.reuse_fd(flows).map_err(other).doing(loading())?;
        let skeleton = open.load().map_err(other).doing(loading())?;
        let sink = skeleton.progs.bench_xdp_sink.attach_xdp(far_end as i32);
        let sink = sink.map_err(other).doing("attaching the sink to the far end")?;
        Ok(Self { skeleton, _sink: sink, ifindex, handed: 0 })
    }

    /// What is written into every frame from now on, and of how many flows of this service.
    pub(super) fn set(&mut self, segment: &Segment, flows: u32, service: u32) {
        let bytes = segment.bytes();
        let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let header = (ETHERNET..DESTINATION + 4).step_by(2);
        let summed = header.filter(|at| !(CHECKSUM..DESTINATION).contains(at));
        let template = &mut self.bss().template;
        for (to, from) in template.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *to = u64::from_ne_bytes(from.try_into().expect("chunks of eight"));
        }
        template.source = segment.source.to_bits();
        template.sum = summed.map(|at| u32::from(word(at))).sum();
        template.from_client = segment.from_client.into();
        template.flows = flows;
        template.service = service;
    }

    /// The mean of what so many frames take at a hook. Every frame must come out at the far end:
    /// what is dropped on the way costs less. On a busy machine the far end may be too slow for
    /// once.
    pub(super) fn batch(
        &mut self,
        hook: Hook,
        runs: Runs<'_>,
        frames: u32,
    ) -> Result<Duration, LabError> {
        for _ in 0..TRIES {
            if let Some(took) = self.try_batch(hook, runs, frames)? {
                return Ok(took);
            }
        }
        Err(other("frames are lost, again and again")).doing("running programs on frames of ours")
    }

    fn try_batch(
        &mut self,
        hook: Hook,
        runs: Runs<'_>,
        frames: u32,
    ) -> Result<Option<Duration>, LabError> {
        let mut frame = [0; FRAME];
        frame[12] = 8;
        let doing = "running programs on frames of ours";
        let programs = &self.skeleton.progs;
        let (next, program, nothing) = match hook {
            Hook::Xdp => {
                (&self.skeleton.maps.xdp_next, &programs.bench_xdp, &programs.bench_xdp_tx)
            }
            Hook::Tc => (&self.skeleton.maps.tc_next, &programs.bench_tc, &programs.bench_tc_empty),
        };
        let program = match runs {
            Runs::Bare => nothing,
            Runs::Written | Runs::Found | Runs::Program(_) => program,
        };
        let target = match runs {
            Runs::Bare | Runs::Written => nothing.as_fd(),
            Runs::Found => programs.bench_xdp_find.as_fd(),
            Runs::Program(fd) => fd,
        };
        let fd = target.as_raw_fd().to_ne_bytes();
        next.update(&0_u32.to_ne_bytes(), &fd, MapFlags::ANY).map_err(other).doing(doing)?;
        if let Runs::Program(_) = runs {
            self.handed += u64::from(frames);
        }
        match hook {
            Hook::Tc => run_tc(program, &frame, frames).map(Some),
            Hook::Xdp => {
                let before = self.arrived();
                run_xdp(program, &frame, frames, self.ifindex)
                    .map(|took| self.comes_out(before + u64::from(frames)).then_some(took))
            }
        }
        .map_err(other)
        .doing(doing)
    }

    /// Whether so many frames have come out at the far end, or do soon.
    fn comes_out(&self, expected: u64) -> bool {
        let arrived = |_| {
            let all = self.arrived() == expected;
            if !all {
                std::thread::sleep(Duration::from_millis(1));
            }
            all
        };
        (0..PATIENCE_MS).any(arrived)
    }

    /// Frames that programs of the datapath were given.
    pub(super) fn handed(&self) -> u64 {
        self.handed
    }

    fn arrived(&self) -> u64 {
        let bss = self.skeleton.maps.bss_data.as_ref().expect("the object has variables");
        // SAFETY: mapped for as long as the skeleton lives; the kernel writes it, one aligned word.
        unsafe { (&raw const bss.arrived).read_volatile() }
    }

    fn bss(&mut self) -> &mut super::skeleton::types::bss {
        self.skeleton.maps.bss_data.as_mut().expect("the object has variables")
    }
}

fn run_tc(program: &ProgramMut<'_>, frame: &[u8], repeat: u32) -> libbpf_rs::Result<Duration> {
    let input = ProgramInput { data_in: Some(frame), repeat, ..Default::default() };
    let output = program.test_run(input)?;
    if output.return_value == SHOT {
        return Err(std::io::Error::other("the last frame was dropped").into());
    }
    Ok(output.duration)
}

fn run_xdp(
    program: &ProgramMut<'_>,
    frame: &[u8],
    repeat: u32,
    ifindex: u32,
) -> libbpf_rs::Result<Duration> {
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
    let context = [0, FRAME as u32, 0, ifindex, 0, 0];
    let mut context: Vec<u8> = context.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let input = ProgramInput {
        context_in: Some(&mut context),
        data_in: Some(frame),
        flags: LIVE_FRAMES,
        repeat,
        ..Default::default()
    };
    program.test_run(input).map(|output| output.duration)
}

/// How far a flow's address is from that of the first, and its port, as the program counts them.
pub(super) fn end_of(flow: u32) -> (u32, u16) {
    (flow / PORTS, FIRST_PORT + (flow % PORTS) as u16)
}
