//! Stories: sequences of frames and events, as proptest makes them up. A step names what it means
//! ("the answer to that client"); [`crate::held`] makes bytes of it when its turn comes.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::lab::SERVICES_OF_A_FAMILY;
use crate::wire::{ACK, Extension, FIN, RST, SYN};

/// What happens.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Frame(Frame),
    Gate {
        open: bool,
    },
    /// The nth backend of the lab gets the nth of `lab::STATES`.
    State {
        backend: usize,
        state: usize,
    },
    /// The backend of that client's flow gets the nth of `lab::STATES`; no flow: nothing happens.
    StateOf {
        client: Client,
        state: usize,
    },
    /// The nth service's schedule gets those of its backends whose bit is set; none: no schedule.
    Schedule {
        service: usize,
        backends: u8,
    },
    /// Time passes, in jiffies.
    Age(u32),
    /// The collector looks at every flow.
    Collect,
}

/// A frame, before it has addresses.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) way: Way,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledges: Acknowledges,
    pub(crate) ttl: u8,
    pub(crate) payload: usize,
    /// It comes by the other side than it should.
    pub(crate) wrong_side: bool,
    pub(crate) odd: Vec<Odd>,
}

/// Who sends to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Way {
    /// A client to a service.
    In(Client),
    /// The server of that client's flow answers; if there is no such flow, a server of the service
    /// sends to where one might have been.
    Out(Client),
    /// The server that had that client's flow before its state changed answers, whatever has become
    /// of the flow.
    Late(Client),
    /// A server to somewhere: the nth backend, the nth of `held::PLACES`, a port.
    Forged { v6: bool, backend: usize, to: usize, port: u16 },
    /// A client to an address, or a port, that has no service, or a node beside us.
    Stray { client: Client, to: usize },
    /// An IPv6 packet to the IPv4 address of a service, mapped; or from a mapped address.
    Mapped { service: usize, source: bool },
}

/// A client of a service: the nth of `held::CLIENTS`, the nth of `held::PORTS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Client {
    pub(crate) v6: bool,
    pub(crate) service: usize,
    pub(crate) host: usize,
    pub(crate) port: usize,
}

/// What TCP acknowledges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Acknowledges {
    /// A number.
    This(u32),
    /// What follows the backend's SYN+ACK, and so much more.
    SynAck(i32),
}

/// What is unusual about a frame, right or wrong; done one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Odd {
    Options(usize),
    Extension(Extension),
    Fragment(u16),
    Tag(u16, u16),
    /// The other protocol of the two.
    OtherProtocol,
    // From here on, done to the bytes.
    Cut(usize),
    /// Cut, and the network header's length is what is left.
    Short(usize),
    Pad(usize),
    Version(u8),
    HeaderWords(u8),
    Length(i16),
    IpChecksum(u16),
    Checksum(u16),
    NoChecksum,
    UdpLength(i16),
    UdpLengthIs(u16),
    DataOffset(u8),
    Protocol(u8),
    /// Any byte from the network header on.
    Flip(usize, u8),
}

/// No sum of a few of them comes near a timeout of `lab`.
pub(crate) const AGES: [u32; 4] = [7_000, 23_000, 61_000, 207_000];

pub(crate) fn story() -> impl Strategy<Value = Vec<Step>> {
    vec(scene(), 1..24).prop_map(|scenes| scenes.into_iter().flatten().collect())
}

fn scene() -> impl Strategy<Value = Vec<Step>> {
    prop_oneof![
        8 => frame().prop_map(|frame| vec![Step::Frame(frame)]),
        5 => conversation(),
        1 => event().prop_map(|event| vec![event]),
        1 => flood(),
        2 => fragments(),
        2 => ageing(),
        2 => moving(),
    ]
}

/// A handshake and what may follow, or a datagram and its answer; perhaps not all of it, perhaps
/// with an event in the middle.
fn conversation() -> impl Strategy<Value = Vec<Step>> {
    let end = vec((any::<bool>(), tcp_flags()), 0..4);
    let state = prop::option::weighted(0.3, (1..6_usize, 0..4_usize));
    let event = prop::option::weighted(0.3, (0..6_usize, event()));
    (client(), 0..4_usize, near(), end, event, state).prop_map(
        |(client, missing, more, end, event, state)| {
            let isn = 5000;
            let (to, back) = (Way::In(client), Way::Out(client));
            let mut steps = handshake(client, more);
            steps.extend(end.into_iter().map(|(inward, flags)| match inward {
                true => plain(to.clone(), flags, 1001, Acknowledges::SynAck(0)),
                false => plain(back.clone(), flags, isn + 1, Acknowledges::This(1001)),
            }));
            // Mostly nothing is missing.
            if missing < 3 && steps.len() > 5 {
                steps.remove(missing);
            }
            if let Some((at, state)) = state {
                steps.insert(at.min(steps.len()), Step::StateOf { client, state });
            }
            if let Some((at, event)) = event {
                steps.insert(at.min(steps.len()), event);
            }
            steps
        },
    )
}

/// Datagrams in fragments: firsts and later ones, whose identification is the same all along; some
/// are at the end of their TTL, and the gate may close in between.
fn fragments() -> impl Strategy<Value = Vec<Step>> {
    let place = prop_oneof![2 => Just((0, true)), 3 => (1..40_u16, any::<bool>())];
    let ttl = prop_oneof![5 => Just(64_u8), 1 => Just(1)];
    let gate = prop::option::weighted(0.1, any::<bool>());
    (client(), vec((place, ttl, any::<bool>(), gate), 2..6)).prop_map(|(client, all)| {
        let mut steps = vec![];
        for ((offset, more), ttl, inward, gate) in all {
            steps.extend(gate.map(|open| Step::Gate { open }));
            let place = offset | if more { 0x2000 } else { 0 };
            let odd = match client.v6 {
                true => Odd::Extension(Extension::Fragment(offset, more)),
                false => Odd::Fragment(place),
            };
            let way = if inward { Way::In(client) } else { Way::Out(client) };
            let mut step = plain(way, SYN, 1000, Acknowledges::This(0));
            if let Step::Frame(frame) = &mut step {
                (frame.ttl, frame.odd) = (ttl, vec![odd]);
            }
            steps.push(step);
        }
        steps
    })
}

/// A connection, what may end it, time, the collector, and a packet more.
fn ageing() -> impl Strategy<Value = Vec<Step>> {
    let end = vec((any::<bool>(), prop_oneof![Just(FIN | ACK), Just(RST | ACK), Just(ACK)]), 0..3);
    (client(), end, vec(0..AGES.len(), 1..3)).prop_map(|(client, end, ages)| {
        let mut steps = handshake(client, 0);
        // Without bytes, so that each follows on the one before.
        steps.extend(end.into_iter().map(|(inward, flags)| match inward {
            true => plain(Way::In(client), flags, 1006, Acknowledges::SynAck(0)),
            false => plain(Way::Out(client), flags, 5006, Acknowledges::This(1006)),
        }));
        steps.extend(ages.into_iter().map(|age| Step::Age(AGES[age])));
        steps.extend([Step::Collect, plain(Way::In(client), ACK, 1006, Acknowledges::SynAck(0))]);
        steps
    })
}

/// A flow whose backend leaves before it has answered; its answer, late, of where it was then.
fn moving() -> impl Strategy<Value = Vec<Step>> {
    (client(), 1..4_usize).prop_map(|(client, state)| {
        let to = || plain(Way::In(client), SYN, 1000, Acknowledges::This(0));
        let late = plain(Way::Late(client), SYN | ACK, 5000, Acknowledges::This(1001));
        let back = plain(Way::Out(client), SYN | ACK, 6000, Acknowledges::This(1001));
        vec![to(), Step::StateOf { client, state }, to(), late, back, to()]
    })
}

fn handshake(client: Client, more: i32) -> Vec<Step> {
    vec![
        plain(Way::In(client), SYN, 1000, Acknowledges::This(0)),
        plain(Way::Out(client), SYN | ACK, 5000, Acknowledges::This(1001)),
        plain(Way::In(client), ACK, 1001, Acknowledges::SynAck(more)),
    ]
}

/// SYNs, each of a client of its own as far as there are any.
fn flood() -> impl Strategy<Value = Vec<Step>> {
    (client(), 1..12_usize).prop_map(|(first, count)| {
        let nth = |n: usize| Client { host: n % 3, port: first.port + n / 3, ..first };
        (0..count).map(|n| plain(Way::In(nth(n)), SYN, 1, Acknowledges::This(0))).collect()
    })
}

fn plain(way: Way, flags: u8, sequence: u32, acknowledges: Acknowledges) -> Step {
    Step::Frame(Frame {
        way,
        flags,
        sequence,
        acknowledges,
        ttl: 64,
        payload: 5,
        wrong_side: false,
        odd: vec![],
    })
}

fn event() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => any::<bool>().prop_map(|open| Step::Gate { open }),
        4 => (0..46_usize, 0..4_usize).prop_map(|(backend, state)| Step::State { backend, state }),
        2 => (0..2 * SERVICES_OF_A_FAMILY, 0..8_u8)
            .prop_map(|(service, backends)| Step::Schedule { service, backends }),
        2 => (0..AGES.len()).prop_map(|age| Step::Age(AGES[age])),
        2 => Just(Step::Collect),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    let sequence = prop_oneof![Just(5000), Just(0xffff_fff0), any::<u32>()];
    let ttl =
        prop_oneof![8 => Just(64_u8), 1 => Just(0_u8), 1 => Just(1), 1 => Just(2), 1 => Just(255)];
    let payload = prop_oneof![8 => 0..64_usize, 1 => 64..1300_usize];
    let odd = prop_oneof![2 => vec(odd(), 0..1), 3 => vec(odd(), 1..2), 1 => vec(odd(), 2..9)];
    let wrong_side = prop::bool::weighted(0.05);
    (way(), tcp_flags(), sequence, acknowledges(), ttl, payload, wrong_side, odd).prop_map(
        |(way, flags, sequence, acknowledges, ttl, payload, wrong_side, odd)| Frame {
            way,
            flags,
            sequence,
            acknowledges,
            ttl,
            payload,
            wrong_side,
            odd,
        },
    )
}

fn client() -> impl Strategy<Value = Client> {
    let host = prop_oneof![12 => 0..4_usize, 1 => 0..12_usize];
    let port = prop_oneof![8 => 0..3_usize, 1 => 0..8_usize];
    (any::<bool>(), 0..SERVICES_OF_A_FAMILY, host, port)
        .prop_map(|(v6, service, host, port)| Client { v6, service, host, port })
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![
        10 => client().prop_map(Way::In),
        6 => client().prop_map(Way::Out),
        2 => (any::<bool>(), 0..23_usize, 0..6_usize, any::<u16>())
            .prop_map(|(v6, backend, to, port)| Way::Forged { v6, backend, to, port }),
        1 => (client(), 0..4_usize).prop_map(|(client, to)| Way::Stray { client, to }),
        1 => (0..SERVICES_OF_A_FAMILY, any::<bool>())
            .prop_map(|(service, source)| Way::Mapped { service, source }),
    ]
}

fn tcp_flags() -> impl Strategy<Value = u8> {
    prop_oneof![
        4 => Just(SYN),
        6 => Just(ACK),
        3 => Just(SYN | ACK),
        4 => Just(FIN | ACK),
        2 => Just(RST),
        2 => Just(RST | ACK),
        2 => any::<u8>(),
    ]
}

fn acknowledges() -> impl Strategy<Value = Acknowledges> {
    prop_oneof![
        1 => any::<u32>().prop_map(Acknowledges::This),
        3 => near().prop_map(Acknowledges::SynAck),
    ]
}

/// More than what follows the SYN+ACK: at the edges of what confirms it.
fn near() -> impl Strategy<Value = i32> {
    prop_oneof![
        8 => Just(0),
        1 => Just(-1),
        1 => Just(1),
        1 => Just(65535),
        1 => Just(65536),
    ]
}

fn extension() -> impl Strategy<Value = Extension> {
    prop_oneof![
        2 => Just(Extension::Options(0, 0)),
        3 => (0..20_u8).prop_map(|units| Extension::Options(60, units)),
        1 => (any::<u8>(), 0..3_u8).prop_map(|(kind, units)| Extension::Options(kind, units)),
        2 => prop_oneof![3 => Just(0_u8), 1 => any::<u8>()].prop_map(Extension::Routing),
        2 => (prop_oneof![Just(0_u16), 0..64_u16], any::<bool>())
            .prop_map(|(offset, more)| Extension::Fragment(offset, more)),
    ]
}

fn odd() -> impl Strategy<Value = Odd> {
    let tag = prop_oneof![Just(0x8100_u16), Just(0x88a8)];
    let few = prop_oneof![-44..44_i16, any::<i16>()];
    let fragment = prop_oneof![Just(0x2000_u16), Just(0x4000), 1..0x3fff_u16, any::<u16>()];
    prop_oneof![
        2 => (1..11_usize).prop_map(Odd::Options),
        8 => extension().prop_map(Odd::Extension),
        2 => fragment.prop_map(Odd::Fragment),
        1 => (tag, any::<u16>()).prop_map(|(kind, tag)| Odd::Tag(kind, tag)),
        1 => Just(Odd::OtherProtocol),
        2 => (0..120_usize).prop_map(Odd::Cut),
        3 => (0..120_usize).prop_map(Odd::Short),
        1 => (1..20_usize).prop_map(Odd::Pad),
        1 => any::<u8>().prop_map(Odd::Version),
        1 => (0..16_u8).prop_map(Odd::HeaderWords),
        2 => few.clone().prop_map(Odd::Length),
        1 => (1..=u16::MAX).prop_map(Odd::IpChecksum),
        3 => (1..=u16::MAX).prop_map(Odd::Checksum),
        2 => Just(Odd::NoChecksum),
        1 => few.prop_map(Odd::UdpLength),
        1 => (0..10_u16).prop_map(Odd::UdpLengthIs),
        1 => (0..16_u8).prop_map(Odd::DataOffset),
        1 => any::<u8>().prop_map(Odd::Protocol),
        2 => (0..120_usize, 1..=u8::MAX).prop_map(|(at, bits)| Odd::Flip(at, bits)),
    ]
}
