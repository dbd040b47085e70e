//! SOCKS5 against real Dante servers: what they answer, and how one that stops leaves its pool.

use std::time::Duration;

use baton::pool::Health;
use baton::service::{Check, Probe, SocksTarget};
use nix::sys::signal::Signal;

use crate::support::*;

fn conf(address: &str, method: &str) -> String {
    format!(
        "logoutput: stderr
         internal: {address} port = 1080
         external: lo
         external.rotation: route
         clientmethod: none
         socksmethod: {method}
         user.privileged: root
         user.unprivileged: nobody
         client pass {{ from: 0/0 to: 0/0 }}
         client pass {{ from: ::/0 to: ::/0 }}
         socks block {{ from: 0/0 to: 10.78.0.99/32 }}
         socks pass {{ from: 0/0 to: 0/0 }}
         socks pass {{ from: ::/0 to: ::/0 }}
         "
    )
}

fn danted(space: &Space, name: &str, address: &str, method: &str) -> Server {
    let file = space.file(name, &conf(address, method));
    let at = match address.contains(':') {
        true => format!("[{address}]:1080"),
        false => format!("{address}:1080"),
    };
    let line = format!("danted -f {} -p {}.pid", file.display(), file.display());
    space.serve(&line, &[&at])
}

fn through_to(target: &str) -> Probe {
    let target = match target.parse() {
        Ok(address) => SocksTarget::Address(address),
        Err(_) => {
            let (name, port) = target.rsplit_once(':').expect("name:port");
            SocksTarget::Name(name.into(), port.parse().expect("a port"))
        }
    };
    Probe::Socks5 { target, credentials: None }
}

/// Something to connect to.
fn target(space: &Space, address: &str) -> Server {
    let (host, port) = address.rsplit_once(':').expect("address:port");
    let family = if host.starts_with('[') { "TCP6" } else { "TCP4" };
    let line = format!("socat {family}-LISTEN:{port},bind={host},fork,reuseaddr /dev/null");
    space.serve(&line, &[address])
}

#[test]
fn dante_forwards_or_says_why_not() {
    let space = Space::new(&[
        "10.78.0.11/32",
        "10.78.0.20/32",
        "10.78.0.99/32",
        "fd78::11/128",
        "fd78::20/128",
    ]);
    let _target = target(&space, "10.78.0.20:80");
    let _local = target(&space, "127.0.0.1:82");
    let _target6 = target(&space, "[fd78::20]:80");
    let _danted = danted(&space, "v4.conf", "10.78.0.11", "none");
    let _danted6 = danted(&space, "v6.conf", "fd78::11", "none");
    let server = "10.78.0.11:1080";
    assert_eq!(space.verdict(through_to("10.78.0.20:80"), server), up());
    assert_eq!(space.verdict(through_to("localhost:82"), server), up());
    assert_eq!(space.verdict(through_to("[fd78::20]:80"), "[fd78::11]:1080"), up());
    assert_eq!(
        space.verdict(through_to("10.78.0.20:81"), server),
        down("socks5 reply 5: connection refused by target")
    );
    assert_eq!(
        space.verdict(through_to("10.78.0.99:80"), server),
        down("socks5 reply 2: not allowed by the server's rules")
    );
}

#[test]
fn a_dante_that_accepts_but_cannot_forward_is_down() {
    let space = Space::new(&["10.78.0.11/32", "10.78.0.20/32"]);
    let _target = target(&space, "10.78.0.20:80");
    let _danted = danted(&space, "danted.conf", "10.78.0.11", "none");
    let server = "10.78.0.11:1080";
    assert_eq!(space.verdict(through_to("10.78.0.20:80"), server), up());
    let target = "ip daddr 10.78.0.20 tcp dport 80";
    space.filter("output", &format!("{target} drop"));
    assert_eq!(space.verdict(Probe::Tcp, server), up(), "it still listens");
    assert_eq!(
        space.verdict(through_to("10.78.0.20:80"), server),
        down("no answer within 2s (connected, greeting answered, connect to the target sent)")
    );
    space.filter("output", &format!("{target} reject with icmpx type host-unreachable"));
    assert_eq!(
        space.verdict(through_to("10.78.0.20:80"), server),
        down("socks5 reply 4: target unreachable")
    );
}

#[test]
fn dante_asks_for_a_username_and_a_password() {
    let space = Space::new(&["10.78.0.11/32", "10.78.0.20/32"]);
    // A user that exists in this namespace only.
    let hash = printed(std::process::Command::new("openssl").args(["passwd", "-6", "secret"]));
    let read = |name| std::fs::read_to_string(format!("/etc/{name}")).expect("a file");
    space.etc("passwd", &format!("{}probe:x:4242:4242::/:/bin/false\n", read("passwd")));
    space.etc("shadow", &format!("{}probe:{hash}:19000:0:99999:7:::\n", read("shadow")));
    let _target = target(&space, "10.78.0.20:80");
    let _danted = danted(&space, "danted.conf", "10.78.0.11", "username");
    let probe = |credentials: Option<(&str, &str)>| {
        let Probe::Socks5 { target, .. } = through_to("10.78.0.20:80") else { unreachable!() };
        let credentials = credentials.map(|(user, pass)| (user.to_owned(), pass.to_owned()));
        space.verdict(Probe::Socks5 { target, credentials }, "10.78.0.11:1080")
    };
    assert_eq!(probe(Some(("probe", "secret"))), up());
    assert_eq!(probe(Some(("probe", "wrong"))), down("socks5: username or password refused"));
    assert_eq!(probe(None), down("socks5: the server accepts none of the methods offered"));
}

#[test]
fn a_stopped_dante_is_out_within_its_time_and_back_after() {
    let space = Space::new(&["10.78.0.11/32", "10.78.0.12/32", "10.78.0.20/32"]);
    let _target = target(&space, "10.78.0.20:80");
    let addresses = ["10.78.0.11", "10.78.0.12"];
    let _steady = danted(&space, "a.conf", addresses[0], "none");
    let mut shaky = danted(&space, "b.conf", addresses[1], "none");
    let second = Duration::from_secs(1);
    let check = Check { interval: second, timeout: second, ..check(through_to("10.78.0.20:80")) };
    let backends = addresses.map(|address| format!("{address}:1080").parse().expect("an address"));
    // Two failures in a row: up to an interval until the next probe, then two timeouts.
    let bound = check.interval + check.timeout * check.fall;
    let space = &space;
    space
        .ns
        .enter(move || {
            with_checks(&[pool("socks", &check, &backends)], |pools| {
                let [steady, member] = &pools[0].members[..] else { panic!("two members") };
                assert_eq!(first_verdict(steady), up());
                assert_eq!(first_verdict(member), up());

                shaky.signal(Signal::SIGSTOP);
                let out = becomes(member, Health::Down);
                // Its listening socket still takes connections.
                let reason = member.report().reason;
                assert_eq!(reason, "no answer within 1s (connected, greeting sent)");
                shaky.signal(Signal::SIGCONT);
                let back = becomes(member, Health::Up);
                println!("stopped: out after {out:?}, back after {back:?}");
                assert!(out < bound + SLACK && back < bound + SLACK);

                shaky.signal(Signal::SIGKILL);
                let out = becomes(member, Health::Down);
                assert_eq!(member.report().reason, "connect: connection refused");
                shaky = danted(space, "b.conf", addresses[1], "none");
                let back = becomes(member, Health::Up);
                println!("killed: out after {out:?}, back after {back:?}");
                assert!(out < bound + SLACK && back < bound + SLACK);
                assert_eq!(steady.health(), Health::Up);
            });
        })
        .expect("the namespace");
}

/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(10);
