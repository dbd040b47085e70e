//! ICMP errors of flows: whoever sent the quoted packet gets them, in words that it knows.

use std::net::{IpAddr, SocketAddr};

use baton::datapath::skeleton::types::{drop_reason, forward_mode};

use crate::golden::{LABS, Lab, MODES};
use crate::icmp::Message;
use crate::kernel::{Fate, Kernel, TCP, UDP};
use crate::packet::{ACK, ETHERNET, Packet, SYN, Transport};

/// What a router may say, and the word that goes with it.
const SAYS: [[((u8, u8), u32); 5]; 2] = [
    [((3, 1), 0), ((3, 3), 0), ((3, 4), 1300), ((11, 0), 0), ((12, 0), 0x0500_0000)],
    [((1, 0), 0), ((1, 4), 0), ((2, 0), 1300), ((3, 0), 0), ((4, 1), 6)],
];

/// What may be said of a packet of a flow, in one direction.
struct Error {
    what: String,
    /// Those who may report it.
    reporters: [IpAddr; 2],
    /// The packet on its way from the relay (or the backend, where that answers by itself).
    reported: Packet,
    /// As the receiver of the error has sent it; `None`: nothing is translated.
    sent: Option<Packet>,
    /// Whom the error seems to come from, where that is not the reporter.
    from: Option<IpAddr>,
}

fn ip(address: &str) -> IpAddr {
    address.parse::<SocketAddr>().unwrap().ip()
}

/// Begins a flow of a service of its own, whose ports are so far from the lab's.
fn errors_of(
    kernel: &mut Kernel,
    nth: u16,
    (mode_name, mode): (&str, forward_mode),
    lab: &Lab,
    protocol: u8,
) -> Vec<Error> {
    let moved = |address: &str| {
        let mut address: SocketAddr = address.parse().unwrap();
        address.set_port(address.port() + nth);
        address.to_string()
    };
    let (vip, backend) = (moved(lab.vip), moved(lab.backend));
    kernel.service(nth.into(), mode, (&vip, protocol), lab.nat, &[&backend]);
    let (request, transport) = match protocol {
        TCP => {
            let transport = Transport::Tcp { flags: SYN | ACK, sequence: 5, acknowledgement: 1001 };
            (Packet::tcp(lab.client, &vip, SYN, 1000, 0), transport)
        }
        _ => (Packet::udp(lab.client, &vip), Transport::Udp),
    };
    let toward = kernel.sent(&request);
    let about = format!("{mode_name} {} {protocol}", lab.name);
    let router = |network: &str| match lab.name {
        "IPv4" => format!("10.{network}.0.1").parse().unwrap(),
        _ => format!("fd{network}::1").parse().unwrap(),
    };
    // What the backend sends, and what of it is on its way to the client.
    let (answer, back) = match mode {
        forward_mode::MODE_NAT | forward_mode::MODE_DNAT => {
            let answer = toward.answer(transport);
            let back = kernel.sent(&answer);
            (Some(answer), back)
        }
        forward_mode::MODE_DSR_NAT => {
            let back = request.answer(transport);
            let answer = Packet { from: backend.parse().unwrap(), ..back.clone() };
            (Some(answer), Packet { ttl: 63, ..back })
        }
        _ => (None, request.answer(transport)),
    };
    let mut errors = vec![Error {
        what: format!("{about}, to the backend"),
        reporters: [router("77"), ip(lab.client)],
        reported: back,
        sent: answer,
        from: (mode == forward_mode::MODE_NAT).then(|| lab.nat.parse().unwrap()),
    }];
    if mode == forward_mode::MODE_NAT || mode == forward_mode::MODE_DNAT {
        errors.push(Error {
            what: format!("{about}, to the client"),
            reporters: [router("78"), ip(lab.backend)],
            reported: toward,
            sent: Some(request),
            from: Some(ip(lab.vip)),
        });
    }
    errors
}

/// Of every mode, family and protocol.
fn all_errors() -> (Kernel, Vec<Error>) {
    let mut kernel = Kernel::new();
    let mut errors = Vec::new();
    let mut nth = 0;
    for mode in MODES {
        for lab in &LABS {
            for protocol in [TCP, UDP] {
                nth += 1;
                errors.extend(errors_of(&mut kernel, nth, mode, lab, protocol));
            }
        }
    }
    (kernel, errors)
}

fn quote(packet: &Packet, length: usize) -> Vec<u8> {
    let bytes = packet.bytes();
    bytes[ETHERNET..(packet.transport_at() + length).min(bytes.len())].to_vec()
}

/// What a reporter says of a packet, of whose transport so much is quoted.
fn report(error: &Error, reporter: usize, says: ((u8, u8), u32), length: usize) -> Message {
    Message {
        from: error.reporters[reporter],
        to: error.reported.from.ip(),
        ttl: 60,
        says: says.0,
        rest: says.1,
        quote: quote(&error.reported, length),
    }
}

#[test]
fn errors_reach_whoever_sent_the_packet_in_words_that_it_knows() {
    let (kernel, errors) = all_errors();
    for error in &errors {
        let family = usize::from(error.reported.from.is_ipv6());
        for says in SAYS[family] {
            // Without TCP's checksum, with it, all.
            for length in [8, 13, 16, 18, 20, 2000] {
                for reporter in [0, 1] {
                    let message = report(error, reporter, says, length);
                    let about = format!("{}, {message:?}", error.what);
                    let out = match kernel.fate_of_bytes(&message.bytes()) {
                        Fate::Told(out) => out,
                        other => panic!("{about}: {other:?}"),
                    };
                    let expected = match &error.sent {
                        // Put into a tunnel, or before the backend: as it is.
                        None => Message { ttl: out_ttl(&out), ..message },
                        Some(sent) => Message {
                            from: error.from.unwrap_or(message.from),
                            to: sent.from.ip(),
                            ttl: 59,
                            quote: quote(
                                &Packet { ttl: error.reported.ttl, ..sent.clone() },
                                length,
                            ),
                            ..message
                        },
                    };
                    assert_eq!(Message::read(&out), expected, "{about}");
                    assert_eq!(out, expected.bytes(), "{about}");
                }
            }
        }
    }
}

/// Of what is carried in a tunnel one is taken, of what goes to the backend directly none.
fn out_ttl(out: &[u8]) -> u8 {
    let ttl = Message::read(out).ttl;
    assert!([59, 60].contains(&ttl));
    ttl
}

#[test]
fn a_quoted_datagram_without_a_checksum_stays_so() {
    let (kernel, errors) = all_errors();
    for error in errors.iter().filter(|error| error.what.starts_with("passthrough/vip IPv4 17")) {
        let mut message = report(error, 0, SAYS[0][0], 2000);
        message.quote[26..28].fill(0);
        let Fate::Told(out) = kernel.fate_of_bytes(&message.bytes()) else { panic!() };
        assert_eq!(Message::read(&out).quote[26..28], [0, 0]);
    }
}

/// An error begins no flow, keeps none alive and ends none.
#[test]
fn errors_leave_flows_as_they_are() {
    let (kernel, errors) = all_errors();
    let entries = || {
        let half: Vec<_> = kernel.maps.half_flows.slices(256).unwrap().collect();
        let replies: Vec<_> = kernel.maps.half_replies.slices(256).unwrap().collect();
        format!("{half:?} {:?} {replies:?}", kernel.flows())
    };
    let before = entries();
    std::thread::sleep(std::time::Duration::from_millis(10));
    for error in &errors {
        let family = usize::from(error.reported.from.is_ipv6());
        for says in SAYS[family] {
            kernel.fate_of_bytes(&report(error, 0, says, 8).bytes());
        }
    }
    assert_eq!(entries(), before);
}

#[test]
fn errors_of_no_flow_are_dropped() {
    let (kernel, errors) = all_errors();
    for error in &errors {
        let family = usize::from(error.reported.from.is_ipv6());
        let message = report(error, 0, SAYS[family][0], 8);
        let at = message.quote.len() - 8;
        // Another port of either end.
        for port in [0, 2] {
            let mut other = message.clone();
            other.quote[at + port] ^= 0x55;
            let fate = kernel.fate_of_bytes(&other.bytes());
            let ours = !error.what.starts_with("passthrough/client")
                || error.what.ends_with("to the backend");
            // Not of a service, not of a server: the stack knows better. So does it where the
            // client's own address is the receiver's.
            let may_pass = !ours
                || (port == 0) == error.what.ends_with("to the backend")
                || port == 2 && error.what.ends_with("to the client");
            match fate {
                Fate::Dropped(reason) => {
                    assert_eq!(reason, drop_reason::DROP_ICMP_NO_FLOW, "{}", error.what);
                }
                Fate::Passed => assert!(may_pass, "{}, {port}", error.what),
                other => panic!("{}: {other:?}", error.what),
            }
        }
    }
}

#[test]
fn errors_that_quote_what_their_receiver_never_sent_are_dropped() {
    let (kernel, errors) = all_errors();
    for error in errors.iter().filter(|error| error.what.ends_with("to the backend")) {
        let forged = if error.reported.from.is_ipv4() { "10.77.0.99" } else { "fd77::99" };
        let family = usize::from(error.reported.from.is_ipv6());
        let message = report(error, 0, SAYS[family][0], 8);
        let mut quoted = error.reported.clone();
        quoted.from.set_ip(forged.parse().unwrap());
        let message = Message { quote: quote(&quoted, 8), ..message };
        let fate = kernel.fate_of_bytes(&message.bytes());
        assert_eq!(fate, Fate::Dropped(drop_reason::DROP_ICMP_FORGED));
    }
}

#[test]
fn what_is_cut_off_is_not_sent_on() {
    let (kernel, errors) = all_errors();
    for error in &errors {
        let family = usize::from(error.reported.from.is_ipv6());
        let whole = report(error, 0, SAYS[family][2], 8);
        let bytes = whole.bytes();
        // Cut on the way: its length lies. Without a network header the kernel won't take it.
        for length in error.reported.transport_at()..bytes.len() {
            not_sent(&kernel, &bytes[..length], &error.what);
        }
        // Quoted too little.
        for length in 0..whole.quote.len() {
            let message = Message { quote: whole.quote[..length].to_vec(), ..whole.clone() };
            not_sent(&kernel, &message.bytes(), &error.what);
        }
    }
}

fn not_sent(kernel: &Kernel, bytes: &[u8], about: &str) {
    match kernel.fate_of_bytes(bytes) {
        Fate::Passed => {}
        Fate::Dropped(reason) => assert!(
            [drop_reason::DROP_TRUNCATED, drop_reason::DROP_BAD_LENGTH].contains(&reason),
            "{about}: {reason:?}"
        ),
        other => panic!("{about}: {other:?}"),
    }
}

#[test]
fn what_is_no_error_or_of_no_service_goes_up_the_stack() {
    let (kernel, errors) = all_errors();
    for error in errors.iter().filter(|error| error.what.ends_with("6, to the backend")) {
        kernel.open_gate();
        let family = usize::from(error.reported.from.is_ipv6());
        let message = report(error, 0, SAYS[family][0], 8);
        let passes = |message: &Message| {
            assert_eq!(kernel.fate_of_bytes(&message.bytes()), Fate::Passed, "{message:?}");
        };
        // Echo and its answer, a redirect, neighbour discovery.
        for kind in [[8, 0, 5], [128, 129, 135]][family] {
            passes(&Message { says: (kind, 0), ..message.clone() });
        }
        // For the node's own address, about its own packets.
        let (node, other) = if family == 0 {
            ("10.77.0.2:22", "10.77.0.10:40000")
        } else {
            ("[fd77::2]:22", "[fd77::10]:40000")
        };
        let own = Packet::tcp(node, other, ACK, 1, 1);
        passes(&Message { to: own.from.ip(), quote: quote(&own, 8), ..message.clone() });
        // For the VIP, about a packet of a port that is no service of the kernel's.
        let mut proxied = error.reported.clone();
        proxied.from.set_port(8443);
        passes(&Message { quote: quote(&proxied, 8), ..message.clone() });
        // The gate is closed: nothing for an address of ours.
        kernel.gate.close();
        for message in [message.clone(), Message { says: ([8, 128][family], 0), ..message.clone() }]
        {
            let fate = kernel.fate_of_bytes(&message.bytes());
            assert_eq!(fate, Fate::Dropped(drop_reason::DROP_GATE_CLOSED));
        }
    }
}

#[test]
fn an_error_is_never_answered() {
    let (kernel, errors) = all_errors();
    for error in &errors {
        let family = usize::from(error.reported.from.is_ipv6());
        let message = Message { ttl: 1, ..report(error, 0, SAYS[family][0], 8) };
        let fate = kernel.fate_of_bytes(&message.bytes());
        assert_eq!(fate, Fate::Dropped(drop_reason::DROP_TTL), "{}", error.what);
    }
}
