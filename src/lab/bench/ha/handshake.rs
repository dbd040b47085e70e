//! New flows in a running datapath, as many and as fast as wanted: TCP handshakes, frame by frame,
//! through the program that is attached to a relay's interface (`bpf/handshake.bpf.c`).

use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapFlags, ProgramInput};

use super::skeleton::{HandshakeSkel, HandshakeSkelBuilder};
use crate::datapath::skeleton::types;
use crate::lab::bench::other;
use crate::lab::{Doing as _, LabError};

/// Flows of one client address, and the port of its first: as in `bpf/handshake.bpf.c`.
const PORTS: u64 = 16_384;
const FIRST_PORT: u64 = 1024;
const FRAME: usize = 64;
/// Sequence numbers with which client and server begin.
const CLIENT_FIRST: u32 = 1000;
const SERVER_FIRST: u32 = 5000;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Between whom.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    /// The first client; the others follow, every 16,384 flows one.
    pub(super) clients: Ipv4Addr,
    pub(super) service: SocketAddrV4,
    pub(super) server: SocketAddrV4,
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
    pub(super) const ALL: [Self; 3] = [Self::Syn, Self::SynAck, Self::Ack];
}

/// Makes flows. In the relay's network namespace.
pub(super) struct Handshakes {
    skeleton: HandshakeSkel<'static>,
    ends: Ends,
}

impl Handshakes {
    /// Through that program of the datapath's.
    pub(super) fn new(program: &OwnedFd, ends: Ends) -> Result<Self, LabError> {
        let loading = || "loading the bench's programs";
        // The skeleton borrows the place of its object: a word, a few times in a bench.
        let place = Box::leak(Box::new(MaybeUninit::uninit()));
        let open = HandshakeSkelBuilder::default().open(place).map_err(other).doing(loading())?;
        let skeleton = open.load().map_err(other).doing(loading())?;
        let fd = program.as_raw_fd().to_ne_bytes();
        let next = &skeleton.maps.datapath;
        next.update(&0_u32.to_ne_bytes(), &fd, MapFlags::ANY).map_err(other).doing(loading())?;
        Ok(Self { skeleton, ends })
    }

    /// Takes so many flows, from a number on, through all of it: they are established.
    pub(super) fn make(&mut self, first: u64, count: u32) -> Result<(), LabError> {
        Step::ALL.into_iter().try_for_each(|step| self.step(step, first, count))
    }

    /// Takes so many flows, from a number on, through a step.
    pub(super) fn step(&mut self, which: Step, first: u64, count: u32) -> Result<(), LabError> {
        let bytes = frame(&self.ends, which);
        let from_client = which != Step::SynAck;
        let bss = self.skeleton.maps.bss_data.as_mut().expect("the object has variables");
        let step = &mut bss.step;
        for (to, from) in step.words.iter_mut().zip(bytes.chunks_exact(8)) {
            *to = u64::from_ne_bytes(from.try_into().expect("chunks of eight"));
        }
        let word = |at: usize| u32::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        // The client's address is still zero there, and so is the checksum.
        step.sum = (14..34).step_by(2).map(word).sum();
        step.client = self.ends.clients.to_bits();
        step.from_client = from_client.into();
        step.flow = first;
        let input =
            ProgramInput { data_in: Some(&bytes), repeat: count, ..ProgramInput::default() };
        let doing = "making flows";
        let run =
            self.skeleton.progs.bench_handshake.test_run(input).map_err(other).doing(doing)?;
        /// TC_ACT_REDIRECT of linux/pkt_cls.h.
        const REDIRECT: u32 = 7;
        if run.return_value != REDIRECT {
            let what = format!("the datapath does not forward a {which:?}: {}", run.return_value);
            return Err(other(what)).doing(doing);
        }
        Ok(())
    }
}

impl Ends {
    /// A flow's key in a table, where the service has this number.
    pub(super) fn key(&self, flow: u64, service: u16) -> types::flow_key {
        let client = Ipv4Addr::from_bits(self.clients.to_bits() + (flow / PORTS) as u32);
        let port = (FIRST_PORT + flow % PORTS) as u16;
        types::flow_key { client: IpAddr::V4(client).into(), port: port.to_be(), service }
    }
}

/// The frame of a step, with nothing where the client's address and port belong.
fn frame(ends: &Ends, step: Step) -> [u8; FRAME] {
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
    let end = if step == Step::SynAck { ends.server } else { ends.service };
    frame[address..address + 4].copy_from_slice(&end.ip().octets());
    frame[port..port + 2].copy_from_slice(&end.port().to_be_bytes());
    frame[38..42].copy_from_slice(&sequence.to_be_bytes());
    frame[42..46].copy_from_slice(&acknowledgement.to_be_bytes());
    // Twenty bytes of header, a window.
    frame[46..50].copy_from_slice(&[0x50, flags, 0xff, 0xff]);
    frame
}
