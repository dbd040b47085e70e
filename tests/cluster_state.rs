//! What nodes know together, with two real daemons in a lab: what operators set outlives a takeover
//! and restarts, and a new Active selects as the one before it did. Needs root.

// Each test file uses its part.
#[allow(dead_code)]
mod lab_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use baton::control::{Reply, Request, ask};
use baton::datapath::sessions::Wanted;
use baton::lab::process::{self, Lifetime, signal};
use baton::lab::topology::Links;
use baton::lab::{Lab, LabOptions, Mode, Servers, Software};
use baton::pool::{Admin, Health};
use baton::status::{BackendStatus, Status};
use baton_ha::vrrp::router::State;
use nix::sys::signal::Signal;

/// A lab, ended with the test.
struct Pair(Lab);

impl Pair {
    /// Both relays run, the first is Active. `edit` changes the file of a relay.
    fn start(name: &str, edit: impl Fn(&str, String) -> String) -> Self {
        let options = LabOptions {
            name: format!("bt-{name}-{}", std::process::id()),
            relays: 2,
            links: Links::Two,
            binary: PathBuf::from(env!("CARGO_BIN_EXE_baton")),
            software: Software::Baton,
            mode: Mode::Passthrough,
            servers: Servers::All,
            advert_interval: Duration::from_millis(100),
            heartbeat: Duration::from_millis(10),
            many: None,
            lifetime: Lifetime::WithParent,
        };
        let mut lab = Lab::build(options, &mut |_| {}).unwrap();
        for relay in ["relay1", "relay2"] {
            let file = lab.dir.join(format!("{relay}.toml"));
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, edit(relay, text)).unwrap();
        }
        assert_eq!(lab.start_relays().unwrap(), "relay1");
        let pair = Self(lab);
        pair.until("all is known to be up", |pair| {
            ["relay1", "relay2"].iter().all(|relay| {
                let backends = pair.status(relay).services;
                backends.iter().flat_map(|service| &service.backends).all(|backend| {
                    (backend.sees, backend.health) == (Health::Up, Health::Up)
                        && backend.seen_by.values().eq([&Health::Up])
                })
            })
        });
        pair
    }

    fn ask(&self, relay: &str, request: Request) -> Result<serde_json::Value, String> {
        let socket = process::socket(&self.0.dir, relay);
        match ask(&socket, &request, Duration::from_secs(30)).map_err(|error| error.to_string())? {
            Reply::Ok(value) => Ok(value),
            Reply::Error(why) | Reply::Unready(why) => Err(why),
        }
    }

    fn status(&self, relay: &str) -> Status {
        serde_json::from_value(self.ask(relay, Request::Status).unwrap()).unwrap()
    }

    /// A backend of the web service, as a relay has it.
    fn web(&self, relay: &str, backend: &str) -> BackendStatus {
        let services = self.status(relay).services;
        let service = services.into_iter().find(|service| service.name == "web").unwrap();
        service.backends.into_iter().find(|known| known.name == backend).unwrap()
    }

    fn set(&self, relay: &str, backend: &str, admin: Admin) -> String {
        let request = Request::SetBackend { backend: backend.into(), admin };
        self.ask(relay, request).unwrap()["summary"].as_str().unwrap().to_owned()
    }

    fn is_active(&self, relay: &str) -> bool {
        self.status(relay).election.unwrap().state == State::Active
    }

    #[track_caller]
    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            if start.elapsed() > Duration::from_secs(30) {
                let read = |log: &str| process::tail(&self.0.dir.join(log));
                panic!("not {what}:\n{}\n{}", read("relay1-relay.log"), read("relay2-relay.log"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL of a relay's daemon; the other is Active when this returns.
    fn kill(&mut self, relay: &str, other: &str) {
        self.signal(relay, "relay", Signal::SIGKILL);
        self.until("taken over", |pair| pair.is_active(other));
    }

    fn signal(&mut self, node: &str, daemon: &str, what: Signal) {
        let pid = self.0.process(node, daemon).unwrap().pid();
        signal(pid, what).unwrap();
    }

    /// Starts it again, and waits until it is the other's Backup.
    fn start_again(&mut self, relay: &str) {
        self.until("ended", |pair| pair.ask(relay, Request::Status).is_err());
        self.0.start_relay(relay).unwrap();
        self.until("Backup again", |pair| {
            let status = pair.ask(relay, Request::Status).ok();
            let status = status.and_then(|value| serde_json::from_value::<Status>(value).ok());
            let backup = status.as_ref().and_then(|status| status.election.as_ref());
            backup.is_some_and(|election| election.state == State::Backup)
                && status.is_some_and(|status| !status.settings.known_to.is_empty())
        });
    }

    /// Which backends so many new connections to the web service go to.
    fn fetch(&self, connections: usize) -> Vec<String> {
        let all = || (0..connections).map(|_| fetch()).collect::<Result<Vec<_>, _>>();
        self.0.netns("client").enter(all).unwrap().unwrap()
    }
}

fn fetch() -> std::io::Result<String> {
    let address = "10.77.0.100:80".parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    let body = page.split("\r\n\r\n").nth(1).unwrap_or_default();
    Ok(body.split(' ').next().unwrap_or_default().to_owned())
}

fn plain(_: &str, text: String) -> String {
    text
}

fn only(backend: &str, fetched: &[String]) -> bool {
    fetched.iter().all(|answered| answered == backend)
}

#[test]
fn what_an_operator_sets_outlives_takeovers_and_restarts() {
    let mut pair = Pair::start("set", plain);
    assert!(!only("backend2", &pair.fetch(40)), "both get connections");
    let summary = pair.set("relay1", "web/backend1", Admin::Drained);
    assert!(!summary.contains("can't be told"), "{summary}");
    let weight = Request::SetWeight { backend: "web/backend2".into(), weight: Some(7) };
    pair.ask("relay1", weight).unwrap();
    let drained = |relay: &'static str| {
        move |pair: &Pair| {
            let (one, two) = (pair.web(relay, "backend1"), pair.web(relay, "backend2"));
            let weights = (two.weight, two.file_weight);
            (one.admin, one.admin_by.as_deref(), weights)
                == (Admin::Drained, Some("relay1"), (7, Some(1)))
        }
    };
    pair.until("told", drained("relay2"));
    pair.kill("relay1", "relay2");
    assert!(only("backend2", &pair.fetch(40)), "drained on the new Active");
    // Who was away learns it; who told it may start anew.
    pair.start_again("relay1");
    pair.until("learnt", drained("relay1"));
    pair.kill("relay2", "relay1");
    assert!(only("backend2", &pair.fetch(40)), "drained after two takeovers");
    // With nobody to tell, it says so; said on a Backup it holds for the Active.
    let summary = pair.set("relay1", "socks/backend1", Admin::Disabled);
    assert!(summary.contains("relay2 can't be told now"), "{summary}");
    pair.start_again("relay2");
    pair.until("learnt by both", |pair| drained("relay2")(pair) && pair.is_active("relay1"));
    pair.set("relay2", "web/backend1", Admin::Enabled);
    pair.until("enabled", |pair| pair.web("relay1", "backend1").admin == Admin::Enabled);
    pair.until("used again", |pair| !only("backend2", &pair.fetch(40)));
}

#[test]
fn a_reload_keeps_what_is_set_about_a_backend_that_it_removes() {
    let pair = Pair::start("gone", plain);
    pair.set("relay1", "web/backend1", Admin::Drained);
    let file = pair.0.dir.join("relay1.toml");
    let before = std::fs::read_to_string(&file).unwrap();
    let lines = "\n[[services.backends]]\nname = \"backend1\"\naddress = \"10.78.0.11:80\"\n";
    assert!(before.contains(lines), "{before}");
    std::fs::write(&file, before.replace(lines, "")).unwrap();
    pair.ask("relay1", Request::Reload).unwrap();
    let status = pair.status("relay1");
    let [set] = &status.settings.elsewhere[..] else { panic!("{:?}", status.settings) };
    assert_eq!((set.backend.to_string(), &*set.set), ("10.78.0.11:80".into(), "drained"));
    assert!(status.render().contains("! 10.78.0.11:80 behind 10.77.0.100:80: drained"));
    // The other node has it still, and does not use it.
    assert_eq!(pair.web("relay2", "backend1").admin, Admin::Drained);
    std::fs::write(&file, &before).unwrap();
    pair.ask("relay1", Request::Reload).unwrap();
    assert_eq!(pair.web("relay1", "backend1").admin, Admin::Drained, "it is back, and drained");
    // By its address an operator ends it, whether it is in the file or not.
    std::fs::write(&file, before.replace(lines, "")).unwrap();
    pair.ask("relay1", Request::Reload).unwrap();
    let refused = Request::SetBackend { backend: "10.78.0.11:80".into(), admin: Admin::Drained };
    assert!(pair.ask("relay1", refused).unwrap_err().contains("there is no backend"));
    pair.set("relay1", "10.78.0.11:80", Admin::Enabled);
    assert!(pair.status("relay1").settings.elsewhere.is_empty());
    pair.until("enabled", |pair| pair.web("relay2", "backend1").admin == Admin::Enabled);
}

#[test]
fn a_new_active_knows_which_backends_are_down_before_it_could_see_it() {
    // The Backup looks once a minute.
    let mut pair = Pair::start("warm", |relay, text| match relay {
        "relay2" => text.replace("interval = \"1s\"", "interval = \"60s\""),
        _ => text,
    });
    pair.signal("backend1", "nginx", Signal::SIGKILL);
    pair.until("known to both", |pair| {
        let [one, two] = ["relay1", "relay2"].map(|relay| pair.web(relay, "backend1"));
        one.health == Health::Down && two.health == Health::Down
    });
    let known = pair.web("relay2", "backend1");
    assert_eq!((known.sees, known.led), (Health::Up, true), "its own checks don't know");
    assert_eq!(pair.web("relay1", "backend1").seen_by["relay2"], Health::Up);
    let text = pair.status("relay1").render();
    assert!(text.contains("! backend1: this node sees it down; it is up for relay2"), "{text}");
    pair.kill("relay1", "relay2");
    assert!(only("backend2", &pair.fetch(60)), "no connection goes to the dead one");
    let known = pair.web("relay2", "backend1");
    assert_eq!((known.sees, known.health, known.led), (Health::Up, Health::Down, true));
}

#[test]
fn an_active_that_sees_fewer_backends_gives_way_unless_nobody_sees_more() {
    let pair = &mut Pair::start("sick", |_, text| {
        text.replace("preempt = false", "sick_after = \"2s\"\npreempt = false")
    });
    // Dead for both: nobody gives way.
    pair.signal("backend2", "nginx", Signal::SIGKILL);
    let down = |pair: &Pair| {
        let seen = ["relay1", "relay2"].map(|relay| pair.web(relay, "backend2").sees);
        seen == [Health::Down; 2]
    };
    pair.until("seen by both", down);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        assert!(pair.is_active("relay1") && pair.status("relay1").gave_way.is_none());
        std::thread::sleep(Duration::from_millis(200));
    }
    // The first node's way to the other backend is cut, and nothing else.
    let rules = "table inet t { chain c { type filter hook output priority 0; \
                 ip daddr 10.78.0.11 drop; }; }";
    let nft = pair.0.netns("relay1").command("nft").arg(rules).output().unwrap();
    assert!(nft.status.success(), "{nft:?}");
    pair.until("given way", |pair| pair.is_active("relay2"));
    pair.until("said so", |pair| pair.status("relay1").gave_way.is_some());
    let status = pair.status("relay1");
    let gave_way = status.gave_way.as_ref().unwrap();
    assert_eq!(gave_way.to, "relay2");
    assert!(gave_way.here < gave_way.there, "{gave_way:?}");
    assert!(status.render().contains("! gave way"), "{}", status.render());
    assert!(only("backend1", &pair.fetch(20)));
    // The other sees no fewer: it stays.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        assert!(pair.is_active("relay2"));
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn clients_keep_to_their_backend_after_takeovers() {
    let mut pair = Pair::start("affine", |_, text| {
        let web = "name = \"web\"\nvip = \"front\"\n";
        assert!(text.contains(web));
        text.replace(web, &format!("{web}affinity = \"1h\"\n"))
    });
    let first = pair.fetch(1).remove(0);
    let keeps = |pair: &Pair| only(&first, &pair.fetch(12));
    assert!(keeps(&pair));
    let counted = |relay: &'static str| {
        move |pair: &Pair| pair.status(relay).datapath.is_some_and(|it| it.affinities == 1)
    };
    pair.until("known to the Backup by its flows", counted("relay2"));
    pair.kill("relay1", "relay2");
    assert!(keeps(&pair), "after a takeover");
    // One that has forgotten everything, and joins when the flows are over, has it by the snapshot.
    pair.until("ended", |pair| pair.ask("relay1", Request::Status).is_err());
    let unload = [env!("CARGO_BIN_EXE_baton"), "unload"];
    let unload = pair.0.netns("relay1").command(unload[0]).arg(unload[1]).output().unwrap();
    assert!(unload.status.success(), "{unload:?}");
    // They are counted every few seconds: what is read now may be of before they began.
    let flows = |pair: &Pair| pair.status("relay2").datapath.map(|datapath| datapath.flows);
    pair.until("flows are counted", |pair| flows(pair) > Some(0));
    // Whose ends the Active did not live to tell of would stay for long.
    let web = Wanted { service: Some("web".into()), backend: None, client: None, limit: 1000 };
    pair.ask("relay2", Request::EndSessions(web)).unwrap();
    pair.until("no flow is left", |pair| flows(pair) == Some(0));
    pair.start_again("relay1");
    pair.until("known to a joiner", counted("relay1"));
    pair.kill("relay2", "relay1");
    assert!(keeps(&pair), "after a restart and another takeover");
}
