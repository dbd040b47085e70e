//! HTTP and TCP against nginx and HAProxy.

use std::sync::Arc;

use baton::pool::{Health, Pool};
use baton::service::{Probe, ProxyProtocol, Service};

use crate::support::*;

fn http(path: &str, status: std::ops::RangeInclusive<u16>) -> Probe {
    Probe::Http {
        method: "GET".into(),
        path: path.into(),
        host: Some("site.example".into()),
        status,
    }
}

#[test]
fn nginx_answers_for_its_own_sites_over_both_families() {
    let space = Space::new(&["10.78.0.11/32", "fd78::11/128"]);
    let dir = space.dir.path().display();
    let conf = space.file(
        "nginx.conf",
        &format!(
            "daemon off; pid {dir}/pid; error_log {dir}/error.log;
             events {{}}
             http {{
                 access_log {dir}/access.log;
                 server {{ listen 80 default_server; listen [::]:80; return 421; }}
                 server {{
                     listen 80; listen [::]:80; server_name site.example;
                     location /ok {{ return 200 'fine'; }}
                     location /sick {{ return 503; }}
                 }}
             }}"
        ),
    );
    let _nginx =
        space.serve(&format!("nginx -c {}", conf.display()), &["10.78.0.11:80", "[fd78::11]:80"]);
    for address in ["10.78.0.11:80", "[fd78::11]:80"] {
        assert_eq!(space.verdict(Probe::Tcp, address), up());
        assert_eq!(space.verdict(http("/ok", 200..=200), address), up());
        assert_eq!(
            space.verdict(http("/sick", 200..=299), address),
            down("http status 503, not 200 to 299")
        );
        assert_eq!(
            space.verdict(http("/none", 200..=200), address),
            down("http status 404, not 200")
        );
    }
    let unnamed =
        Probe::Http { method: "HEAD".into(), path: "/ok".into(), host: None, status: 200..=399 };
    assert_eq!(space.verdict(unnamed, "10.78.0.11:80"), down("http status 421, not 200 to 399"));
    let log = std::fs::read_to_string(space.dir.path().join("access.log")).expect("a log");
    assert!(log.contains("\"GET /ok HTTP/1.1\" 200") && log.contains("baton/"), "{log}");
}

/// A server that takes nothing without a header: checks bring what the service's clients do.
#[test]
fn haproxy_that_wants_a_proxy_header_is_up() {
    let space = Space::new(&["10.78.0.11/32"]);
    let conf = space.file(
        "haproxy.cfg",
        "defaults
            mode http
            timeout client 5s
            timeout connect 5s
            timeout server 5s
        frontend f
            bind 10.78.0.11:80 accept-proxy
            http-request return status 200
",
    );
    let _haproxy = space.serve(&format!("haproxy -db -f {}", conf.display()), &["10.78.0.11:80"]);
    let address = "10.78.0.11:80".parse().expect("an address");
    let asks = check(http("/", 200..=200));
    let own_port = baton::service::Check { port: Some(80), ..asks.clone() };
    use ProxyProtocol::{Off, V1, V2};
    let pools = [(Off, &asks), (V1, &asks), (V2, &asks), (V2, &own_port)].map(|(header, check)| {
        let service = Service::clone(&pool("s", check, &[address]).service);
        Arc::new(Pool::new(Arc::new(Service { proxy_protocol: header, ..service })))
    });
    let verdicts =
        || with_checks(&pools, |p| p.iter().map(|p| first_verdict(&p.members[0]).0).collect());
    let verdicts: Vec<_> = space.ns.enter(verdicts).expect("the namespace");
    assert_eq!(verdicts, [Health::Down, Health::Up, Health::Up, Health::Down]);
}

#[test]
fn haproxy_answers_as_it_is_told() {
    let space = Space::new(&["10.78.0.11/32"]);
    let conf = space.file(
        "haproxy.cfg",
        "global
            maxconn 100
        defaults
            mode http
            timeout client 5s
            timeout connect 5s
            timeout server 5s
        frontend f
            bind 10.78.0.11:80
            http-request return status 200 if { path /ok }
            default_backend none
        backend none
",
    );
    let _haproxy = space.serve(&format!("haproxy -db -f {}", conf.display()), &["10.78.0.11:80"]);
    assert_eq!(space.verdict(http("/ok", 200..=299), "10.78.0.11:80"), up());
    assert_eq!(
        space.verdict(http("/else", 200..=299), "10.78.0.11:80"),
        down("http status 503, not 200 to 299")
    );
    let hello = Probe::SendExpect {
        send: b"GET /ok HTTP/1.0\r\n\r\n".to_vec(),
        expect: b" 200 OK".to_vec(),
    };
    assert_eq!(space.verdict(hello, "10.78.0.11:80"), up());
}
