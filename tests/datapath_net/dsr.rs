//! Direct server return over any network, with what `baton backend-setup` does on the backends: b1
//! is in a network of the relay's, b2 (also) in one behind the router.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::process::{Command, Output};

use serde_json::Value;

use crate::modes::carries;
use crate::net::{HOOKS, Net, PATIENCE, service};
use crate::server::{ask, connect, serve};

const SERVICES: [&str; 4] = ["tcp4", "udp4", "tcp6", "udp6"];
const BACKENDS: [&str; 2] = ["b1", "b2"];
const HUGE: usize = 100_000_000;

/// b2 gets a leg in a network of its own; its replies leave by the other one.
fn move_b2_away(net: &Net) {
    let b2 = net.node("b2").name().to_owned();
    let switch = net.node("switch");
    switch
        .ip_batch(&format!(
            "link add b2-far type veth peer name far netns {b2}\n\
             addr add 10.79.0.1/24 dev b2-far\naddr add fd79::1/64 dev b2-far nodad\n\
             link set b2-far up\n"
        ))
        .unwrap();
    net.node("b2")
        .ip_batch(
            "addr add 10.79.0.12/24 dev far\naddr add fd79::12/64 dev far nodad\n\
             link set far up\n",
        )
        .unwrap();
    net.node("relay")
        .ip_batch("route add 10.79.0.0/24 via 10.78.0.1\nroute add fd79::/64 via fd78::1\n")
        .unwrap();
}

fn services(dsr: &str, backends4: [&str; 2], backends6: [&str; 2]) -> String {
    let mut text = String::new();
    for (family, vip, addresses) in [("4", "front4", backends4), ("6", "front6", backends6)] {
        for protocol in ["tcp", "udp"] {
            let how = format!("mode = \"dsr\"\ndsr = \"{dsr}\"\nprotocol = \"{protocol}\"");
            let backends = [("b1", addresses[0]), ("b2", addresses[1])];
            text += &service(&format!("{protocol}{family}"), vip, 80, &how, &backends);
        }
    }
    text
}

fn run(net: &Net, node: &str, service: &str, args: &[&str]) -> Output {
    let mut command = net.node(node).command(env!("CARGO_BIN_EXE_baton"));
    command.args(["backend-setup", service, "-c"]).arg(net.config());
    command.args(args).output().unwrap()
}

fn setup(net: &Net, node: &str, service: &str, args: &[&str]) -> Value {
    let output = run(net, node, service, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{node} {service} {args:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn apply_everywhere(net: &Net) {
    for node in BACKENDS {
        for service in SERVICES {
            setup(net, node, service, &["--apply"]);
        }
    }
}

/// All of a machine's network that a setup may touch.
fn look(net: &Net, node: &str) -> String {
    let netns = net.node(node);
    let mut text = String::new();
    for words in ["addr show dev lo", "-6 addr show dev lo"] {
        text += &String::from_utf8(netns.ip(words).unwrap().stdout).unwrap();
    }
    for interface in ["back", "far"] {
        for what in ["qdisc show dev", "filter show ingress dev", "filter show egress dev"] {
            let mut tc = Command::new("tc");
            tc.args(["-n", netns.name()]).args(what.split(' ')).arg(interface);
            text += &format!("{interface} {what}: {:?}\n", tc.output().unwrap().stdout);
        }
    }
    let sysctls = netns.enter(|| {
        let mut text = String::new();
        for interface in fs::read_dir("/proc/sys/net/ipv4/conf").unwrap() {
            let folder = interface.unwrap().path();
            for name in ["arp_ignore", "arp_announce", "rp_filter"] {
                let path = folder.join(name);
                text += &format!("{} {}", path.display(), fs::read_to_string(&path).unwrap());
            }
        }
        text
    });
    text + &sysctls.unwrap()
}

/// Pins and the note of what was done.
fn traces(net: &Net, node: &str) -> bool {
    let inode = net.node(node).enter(|| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
    });
    let inode = inode.unwrap();
    let note = fs::read_to_string(format!("/run/baton/backend/net-{inode}.json"));
    fs::exists(format!("/run/baton/bpf/backend-net-{inode}")).unwrap()
        || note.is_ok_and(|text| !text.is_empty())
}

/// The segment size that a client's connection uses.
fn segment(stream: &std::net::TcpStream) -> u32 {
    let (mut size, mut length) = (0_u32, 4);
    // SAFETY: both pointers are to locals of the size that is given.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_MAXSEG,
            (&raw mut size).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    size
}

#[test]
fn in_a_tunnel_to_any_network() {
    let mut net = Net::new();
    move_b2_away(&net);
    // What stands in the way of clients' packets that come from the relay.
    net.node("b2").sysctl(&[("net.ipv4.conf.far.rp_filter", "1")]).unwrap();
    let before = BACKENDS.map(|node| look(&net, node));
    net.start_relay(&services(
        "ipip",
        ["10.78.0.11:80", "10.79.0.12:80"],
        ["[fd78::11]:80", "[fd79::12]:80"],
    ));
    apply_everywhere(&net);
    for node in BACKENDS {
        serve(&net.node(node), node, "10.77.0.100:80");
        serve(&net.node(node), node, "[fd77::100]:80");
    }
    carries(&net, ["10.77.0.10", "fd77::10"]);
    // With 12 bytes of timestamps: without the backend's program, 1448 and 1428.
    for (vip, most) in [("10.77.0.100:80", 1428), ("[fd77::100]:80", 1388)] {
        let mut session = connect(&net.node("client"), vip, PATIENCE).unwrap();
        assert_eq!(segment(&session.stream), most, "{vip}");
        session.echo(HUGE);
    }
    // Once more, it finds all done.
    for service in SERVICES {
        let again = setup(&net, "b2", service, &["--apply"]);
        let steps = again["steps"].as_array().unwrap();
        assert!(steps.iter().all(|step| step["result"] == "unchanged"), "{again:#}");
    }
    for (node, before) in BACKENDS.into_iter().zip(before) {
        for service in SERVICES {
            assert!(traces(&net, node));
            setup(&net, node, service, &["--remove"]);
        }
        assert_eq!(look(&net, node), before);
        assert!(!traces(&net, node));
    }
}

/// What a router on the way to the tunnel's end has to say of packets too long, it says to the relay,
/// whose the outer header is: the relay tells the client.
#[test]
fn a_narrow_link_on_the_way_of_a_tunnel() {
    for hook in HOOKS {
        let mut net = Net::on(hook);
        move_b2_away(&net);
        net.node("switch").ip("link set b2-far mtu 1400").unwrap();
        let how = "mode = \"dsr\"\ndsr = \"ipip\"";
        let text = service("tcp4", "front4", 80, how, &[("b2", "10.79.0.12:80")])
            + &service("tcp6", "front6", 80, how, &[("b2", "[fd79::12]:80")]);
        net.start_relay(&text);
        for name in ["tcp4", "tcp6"] {
            setup(&net, "b2", name, &["--apply"]);
        }
        for vip in ["10.77.0.100:80", "[fd77::100]:80"] {
            serve(&net.node("b2"), "b2", vip);
            connect(&net.node("client"), vip, PATIENCE).unwrap().echo(2_000_000);
        }
        for (vip, left) in [("10.77.0.100", 1400 - 20), ("fd77::100", 1400 - 40)] {
            let route = net.node("client").ip(&format!("route get {vip}")).unwrap().stdout;
            let route = String::from_utf8_lossy(&route).into_owned();
            assert!(route.contains(&format!("mtu {left}")), "{hook} {route}");
        }
    }
}

/// Whether anybody on the backends' network says that an address is his.
fn is_answered_for(net: &Net, address: &str) -> bool {
    let switch = net.node("switch");
    let family = if address.contains(':') { "-6 " } else { "" };
    switch.ip(&format!("{family}route replace {address} dev back")).unwrap();
    // Somebody has to ask; that it goes unanswered for a while is what is waited for.
    let _ = switch.enter(|| {
        let to = std::net::SocketAddr::new(address.parse().unwrap(), 9);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = std::net::UdpSocket::bind(any).unwrap();
        let _ = socket.send_to(b"who", to);
    });
    let neighbour = || {
        let out = switch.ip(&format!("{family}neigh show {address} dev back")).unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    net.until("an answer, or none", || {
        let neighbour = neighbour();
        neighbour.contains("lladdr") || neighbour.contains("FAILED")
    });
    let answered = neighbour().contains("lladdr");
    let _ = switch.ip(&format!("{family}neigh flush dev back"));
    let _ = switch.ip(&format!("{family}route del {address} dev back"));
    answered
}

#[test]
fn nobody_hears_of_the_vip_from_a_backend() {
    let net = Net::new();
    net.write_config(&services(
        "l2",
        ["10.78.0.11:80", "10.78.0.12:80"],
        ["[fd78::11]:80", "[fd78::12]:80"],
    ));
    // As it would be by hand and without care.
    net.node("b1").ip("addr add 10.77.0.100/32 dev lo").unwrap();
    assert!(is_answered_for(&net, "10.77.0.100"));
    net.node("b1").ip("addr del 10.77.0.100/32 dev lo").unwrap();
    let before = look(&net, "b1");
    setup(&net, "b1", "tcp4", &["--apply"]);
    setup(&net, "b1", "tcp6", &["--apply"]);
    assert!(!is_answered_for(&net, "10.77.0.100"));
    assert!(!is_answered_for(&net, "fd77::100"));
    // Its own addresses are.
    assert!(is_answered_for(&net, "10.78.0.11"));
    // Two services with one VIP: it stays with the other.
    setup(&net, "b1", "udp4", &["--apply"]);
    setup(&net, "b1", "tcp4", &["--remove"]);
    assert!(look(&net, "b1").contains("10.77.0.100"));
    setup(&net, "b1", "udp4", &["--remove"]);
    setup(&net, "b1", "tcp6", &["--remove"]);
    assert_eq!(look(&net, "b1"), before);
}

/// The script alone, as it is printed, does what `--apply` does.
#[test]
fn the_script_can_be_run() {
    let mut net = Net::new();
    net.start_relay(&services(
        "ipip",
        ["10.78.0.11:80", "10.78.0.12:80"],
        ["[fd78::11]:80", "[fd78::12]:80"],
    ));
    let folder = std::path::Path::new(env!("CARGO_BIN_EXE_baton")).parent().unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    for node in BACKENDS {
        for service in SERVICES {
            let script = setup(&net, "relay", service, &["--backend", node]);
            let script = script["backends"][0]["script"].as_str().unwrap();
            let mut shell = net.node(node).command("sh");
            let output = shell.args(["-c", script]).env("PATH", &path).output().unwrap();
            assert!(output.status.success(), "{script}\n{output:?}");
        }
        serve(&net.node(node), node, "10.77.0.100:80");
        serve(&net.node(node), node, "[fd77::100]:80");
    }
    carries(&net, ["10.77.0.10", "fd77::10"]);
}

/// b1 with the printed nftables rules instead of the program, b2 with a network that clears marks.
#[test]
fn rewritten_without_the_program_or_the_mark() {
    let mut net = Net::new();
    for (node, host) in BACKENDS.into_iter().zip([11, 12]) {
        serve(&net.node(node), node, &format!("10.78.0.{host}:8080"));
        serve(&net.node(node), node, &format!("[fd78::{host}]:8080"));
    }
    net.start_relay(&services(
        "nat",
        ["10.78.0.11:8080", "10.78.0.12:8080"],
        ["[fd78::11]:8080", "[fd78::12]:8080"],
    ));
    let bleach = "table inet bleach {\nchain arriving {\ntype filter hook prerouting priority -300\n\
                  ip dscp set 0\nip6 dscp set 0\n}\n}\n";
    for service in SERVICES {
        let script = setup(&net, "relay", service, &["--backend", "b1"]);
        let script = script["backends"][0]["script"].as_str().unwrap();
        let rules = script.split_once("<<'END'\n").unwrap().1.split_once("#   END").unwrap().0;
        let rules: String =
            rules.lines().map(|line| format!("{}\n", line.trim_start_matches('#'))).collect();
        let output = net.node("b1").command("nft").arg(&rules).output().unwrap();
        assert!(output.status.success(), "{rules}{output:?}");
        setup(&net, "b2", service, &["--apply", "--all-flows"]);
    }
    let output = net.node("b2").command("nft").arg(bleach).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    carries(&net, ["10.77.0.10", "fd77::10"]);
    // A check of the server itself still works where marks are looked at.
    assert_eq!(connect(&net.node("relay"), "10.78.0.11:8080", PATIENCE).unwrap().backend, "b1");
}

#[test]
fn what_cannot_be_set_up_is_said() {
    let net = Net::new();
    net.write_config(
        &(service("proxied", "front4", 81, "", &[("b1", "10.78.0.11:80")])
            + &services(
                "nat",
                ["10.78.0.11:80", "10.78.0.12:80"],
                ["[fd78::11]:80", "[fd78::12]:80"],
            )),
    );
    for (node, service, args, why) in [
        ("b1", "nothing", &["--apply"][..], "dsr services are: tcp4, udp4, tcp6, udp6"),
        ("b1", "proxied", &["--apply"], "is proxy"),
        ("b1", "tcp4", &["--backend", "b3"], "it has: b1, b2"),
        ("client", "tcp4", &["--apply"], "run it on the backend"),
        ("b1", "tcp4", &["--apply", "--interface", "lo"], "is no Ethernet"),
        ("b1", "tcp4", &["--apply", "--interface", "none"], "none"),
    ] {
        let output = run(&net, node, service, args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{service} {args:?}: {said}");
        assert!(said.contains(why), "{service} {args:?}: {said}");
    }
    assert!(!traces(&net, "b1"));
    // There is nothing to undo, which is no error.
    setup(&net, "b1", "tcp4", &["--remove"]);
    let usage = run(&net, "b1", "tcp4", &["--apply", "--remove"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_tunnel_of_the_other_family() {
    let mut net = Net::new();
    net.start_relay(&services(
        "ipip",
        ["[fd78::11]:80", "[fd78::12]:80"],
        ["10.78.0.11:80", "10.78.0.12:80"],
    ));
    apply_everywhere(&net);
    for node in BACKENDS {
        serve(&net.node(node), node, "10.77.0.100:80");
        serve(&net.node(node), node, "[fd77::100]:80");
    }
    carries(&net, ["10.77.0.10", "fd77::10"]);
}

#[test]
fn rewritten_to_any_network_and_port() {
    let mut net = Net::new();
    move_b2_away(&net);
    let before = BACKENDS.map(|node| look(&net, node));
    for (node, network) in BACKENDS.into_iter().zip([78, 79]) {
        let host = if node == "b1" { 11 } else { 12 };
        serve(&net.node(node), node, &format!("10.{network}.0.{host}:8080"));
        serve(&net.node(node), node, &format!("[fd{network}::{host}]:8080"));
    }
    net.start_relay(&services(
        "nat",
        ["10.78.0.11:8080", "10.79.0.12:8080"],
        ["[fd78::11]:8080", "[fd79::12]:8080"],
    ));
    apply_everywhere(&net);
    carries(&net, ["10.77.0.10", "fd77::10"]);
    let client = net.node("client");
    for vip in ["10.77.0.100:80", "[fd77::100]:80"] {
        connect(&client, vip, PATIENCE).unwrap().echo(HUGE);
    }
    // The server's own address is still its own, to the client and to the relay's checks.
    for address in ["10.78.0.11:8080", "[fd78::11]:8080"] {
        for node in ["client", "relay"] {
            let mut session = connect(&net.node(node), address, PATIENCE).expect(address);
            assert_eq!(session.backend, "b1");
            session.echo(10);
            assert_eq!(ask(&net.node(node), address).unwrap().0, "b1");
        }
    }
    for (node, before) in BACKENDS.into_iter().zip(before) {
        for service in SERVICES {
            setup(&net, node, service, &["--remove"]);
        }
        assert_eq!(look(&net, node), before);
        assert!(!traces(&net, node));
    }
}

#[test]
fn on_the_same_network_with_what_the_setup_does() {
    let mut net = Net::new();
    let before = look(&net, "b1");
    net.start_relay(&services(
        "l2",
        ["10.78.0.11:80", "10.78.0.12:80"],
        ["[fd78::11]:80", "[fd78::12]:80"],
    ));
    apply_everywhere(&net);
    for node in BACKENDS {
        serve(&net.node(node), node, "10.77.0.100:80");
        serve(&net.node(node), node, "[fd77::100]:80");
    }
    carries(&net, ["10.77.0.10", "fd77::10"]);
    for service in SERVICES {
        setup(&net, "b1", service, &["--remove"]);
    }
    assert_eq!(look(&net, "b1"), before);
}
