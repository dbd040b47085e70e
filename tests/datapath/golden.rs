//! Golden packets: what goes in and what comes out, byte by byte, for each mode, family and
//! protocol. `BATON_BLESS=1` writes the file anew.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use baton::datapath::skeleton::types::forward_mode;

use crate::kernel::{Kernel, TCP, UDP};
use crate::packet::{ACK, FIN, Packet, SYN, Transport};

pub(crate) struct Lab {
    pub(crate) name: &'static str,
    pub(crate) client: &'static str,
    pub(crate) vip: &'static str,
    pub(crate) nat: &'static str,
    pub(crate) backend: &'static str,
}

pub(crate) const LABS: [Lab; 2] = [
    Lab {
        name: "IPv4",
        client: "10.77.0.10:40000",
        vip: "10.77.0.100:80",
        nat: "10.78.0.100",
        backend: "10.78.0.11:8080",
    },
    Lab {
        name: "IPv6",
        client: "[fd77::10]:40000",
        vip: "[fd77::100]:80",
        nat: "fd78::100",
        backend: "[fd78::11]:8080",
    },
];

pub(crate) const MODES: [(&str, forward_mode); 5] = [
    ("passthrough/vip", forward_mode::MODE_NAT),
    ("passthrough/client", forward_mode::MODE_DNAT),
    ("dsr/l2", forward_mode::MODE_DSR_L2),
    ("dsr/ipip", forward_mode::MODE_DSR_IPIP),
    ("dsr/nat", forward_mode::MODE_DSR_NAT),
];

#[test]
fn packets_come_out_byte_by_byte() {
    let mut text = String::new();
    for (mode_name, mode) in MODES {
        for lab in &LABS {
            for (protocol_name, protocol) in [("TCP", TCP), ("UDP", UDP)] {
                let mut kernel = Kernel::new();
                let listen = (lab.vip, protocol);
                kernel.service(1, mode, listen, lab.nat, &[lab.backend]);
                writeln!(text, "## {mode_name} {} {protocol_name}", lab.name).unwrap();
                for (what, packet) in conversation(lab, protocol, mode, &kernel) {
                    let bytes = packet.bytes();
                    let (verdict, out) = kernel.run(&bytes);
                    let came = Packet::read(&out);
                    writeln!(text, "{what}: {} > {}", packet.from, packet.to).unwrap();
                    writeln!(text, "  in  {}", hex(&bytes)).unwrap();
                    writeln!(text, "  out {} ({verdict})", hex(&out)).unwrap();
                    writeln!(text, "      {} > {}", came.from, came.to).unwrap();
                }
            }
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/datapath/golden.txt");
    if std::env::var_os("BATON_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap();
    for (line, (is, should)) in text.lines().zip(golden.lines()).enumerate() {
        assert_eq!(is, should, "golden.txt:{}", line + 1);
    }
    assert_eq!(text.lines().count(), golden.lines().count());
}

/// A client's first packets and the backend's answers, each made from what came out before, sent
/// through `kernel` once to find out where the backend answers to.
pub(crate) fn conversation(
    lab: &Lab,
    protocol: u8,
    mode: forward_mode,
    kernel: &Kernel,
) -> Vec<(&'static str, Packet)> {
    let replies = mode == forward_mode::MODE_NAT || mode == forward_mode::MODE_DNAT;
    if protocol == UDP {
        let first = Packet::udp(lab.client, lab.vip);
        let answer = kernel.sent(&first).answer(Transport::Udp);
        let all = [("datagram", first.clone()), ("answer", answer), ("datagram", first)];
        return all.into_iter().filter(|(what, _)| replies || *what != "answer").collect();
    }
    let tcp = |flags, sequence, acknowledgement| {
        Packet::tcp(lab.client, lab.vip, flags, sequence, acknowledgement)
    };
    let syn = tcp(SYN, 1000, 0);
    let toward = kernel.sent(&syn);
    let back = |flags, sequence, acknowledgement| {
        toward.answer(Transport::Tcp { flags, sequence, acknowledgement })
    };
    [
        ("SYN", syn),
        ("SYN+ACK", back(SYN | ACK, 5000, 1001)),
        ("ACK", tcp(ACK, 1001, 5001)),
        ("data", back(ACK, 5001, 1006)),
        ("FIN", tcp(FIN | ACK, 1006, 5007)),
        ("FIN back", back(FIN | ACK, 5007, 1007)),
        ("last ACK", tcp(ACK, 1007, 5008)),
    ]
    .into_iter()
    .filter(|(what, _)| replies || !["SYN+ACK", "data", "FIN back"].contains(what))
    .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
