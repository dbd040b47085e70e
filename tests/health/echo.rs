//! ICMP and ICMPv6 echo against the kernel, over both kinds of sockets.

use baton::service::Probe;

use crate::support::*;

const ADDRESSES: [&str; 2] = ["10.78.0.11:80", "[fd78::11]:80"];

#[test]
fn echo_over_raw_and_ping_sockets() {
    let space = Space::new(&["10.78.0.11/32", "fd78::11/128"]);
    for (group_range, raw_sends) in [("1 0", true), ("0 0", false)] {
        let mut sysctl = space.ns.command("sysctl");
        printed(sysctl.args(["-qw", &format!("net.ipv4.ping_group_range={group_range}")]));
        for address in ADDRESSES {
            assert_eq!(space.verdict(Probe::Icmp, address), up(), "{address} {group_range}");
        }
        // A raw socket needs a capability, which the other kind goes without.
        let privileged = space.ns.enter(|| {
            use socket2::{Domain, Protocol, Socket, Type};
            Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)).is_err()
        });
        assert_eq!(privileged.expect("the namespace"), raw_sends);
    }
}

#[test]
fn silence_and_other_answers_are_no_echo() {
    let space = Space::new(&["10.78.0.11/32", "fd78::11/128"]);
    space.filter("output", "icmp type echo-reply drop; icmpv6 type echo-reply drop");
    for address in ADDRESSES {
        let verdict = space.verdict(Probe::Icmp, address);
        assert_eq!(verdict, down("no answer within 2s (echo sent)"), "{address}");
    }
    space.ns.ip("route add unreachable 10.79.0.0/24").expect("a route");
    assert_eq!(space.verdict(Probe::Icmp, "10.79.0.1:80"), down("echo: no route to host"));
}
