//! What a packet costs in the TC program, for people to read: `cargo test --release --test datapath
//! -- --ignored --nocapture cost`.
//!
//! BPF_PROG_TEST_RUN with `repeat` hands the program the packet as the run before left it, so a
//! packet that is rewritten once is no longer for the VIP. Here it always is: two services are
//! each other's backend, and a packet goes to and fro between them until its TTL ends. Route and
//! neighbour, which `bpf_redirect_neigh` looks up afterwards, are not part of it.

use std::time::Duration;

use baton::datapath::skeleton::types::{self, forward_mode};

use crate::kernel::{Kernel, TCP, UDP};
use crate::packet::{ACK, Packet};

/// From a TTL of 255, each run takes one.
const REPEAT: u32 = 250;
const ROUNDS: usize = 2000;

/// The median of what a run took.
fn cost(kernel: &Kernel, packets: &[Packet]) -> Duration {
    median(kernel, &packets.iter().map(Packet::bytes).collect::<Vec<_>>())
}

fn median(kernel: &Kernel, bytes: &[Vec<u8>]) -> Duration {
    let mut all: Vec<_> =
        (0..ROUNDS).map(|n| kernel.time(&bytes[n % bytes.len()], REPEAT)).collect();
    all.sort();
    all[ROUNDS / 2]
}

/// Two services in that mode, each other's backend, with so many established flows.
fn to_and_fro(mode: forward_mode, [one, other]: [&str; 2], protocol: u8, flows: u32) -> Kernel {
    let mut kernel = Kernel::with_room(2 * flows.max(256), 256);
    for (id, listen, backend) in [(1, one, other), (2, other, one)] {
        let backends = kernel.service(id, mode, (listen, protocol), "10.99.0.1", &[backend]);
        for n in 0..flows {
            let key = types::flow_key {
                client: std::net::IpAddr::from([10, 80, (n >> 8) as u8, n as u8]).into(),
                port: (1024 + (n >> 16) as u16).to_be(),
                service: id as u16,
            };
            let flow = types::flow {
                backend: backends[0],
                nat_port: key.port,
                seen: kernel.jiffies_at_start(),
                ..Default::default()
            };
            kernel.maps.flows.set(&key, &flow).unwrap();
        }
    }
    kernel
}

#[test]
#[ignore = "prints figures; nothing can fail"]
fn cost_per_packet() {
    let mut kernel = Kernel::new();
    let mut arp = vec![0; 60];
    arp[12..14].copy_from_slice(&[8, 6]);
    println!("ARP                                   {:?}", median(&kernel, &[arp]));
    let foreign = Packet { ttl: 255, ..Packet::udp("10.77.0.10:4000", "10.77.0.2:80") };
    println!(
        "no service at all, another's packet   {:?}",
        cost(&kernel, std::slice::from_ref(&foreign))
    );
    kernel.service(
        1,
        forward_mode::MODE_NAT,
        ("10.77.0.100:80", TCP),
        "10.78.0.100",
        &["10.78.0.11:80"],
    );
    println!("a service, another's packet           {:?}", cost(&kernel, &[foreign]));
    for (name, mode) in [
        ("dsr/l2", forward_mode::MODE_DSR_L2),
        ("rewritten (passthrough)", forward_mode::MODE_DNAT),
    ] {
        for flows in [1_u32, 100_000] {
            let ends = ["10.77.0.100:80", "10.77.0.101:80"];
            for (protocol_name, protocol) in [("UDP", UDP), ("TCP", TCP)] {
                let kernel = to_and_fro(mode, ends, protocol, flows);
                let packets: Vec<_> = (0..flows.min(1000))
                    .map(|n| {
                        // Spread over all of them.
                        let n = n * (flows / flows.min(1000));
                        let client =
                            format!("10.80.{}.{}:{}", n >> 8 & 0xff, n & 0xff, 1024 + (n >> 16));
                        let packet = match protocol {
                            TCP => Packet::tcp(&client, ends[0], ACK, 1, 1),
                            _ => Packet::udp(&client, ends[0]),
                        };
                        Packet { ttl: 255, ..packet }
                    })
                    .collect();
                let cost = cost(&kernel, &packets);
                println!("{name:24} {protocol_name} {flows:9} flows   {cost:?}");
            }
        }
    }
}
