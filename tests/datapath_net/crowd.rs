//! Ten thousand connections at once.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::bulk::Running;
use crate::net::{Net, PATIENCE, service};

const CONNECTIONS: usize = 10_000;
/// What else a process has open, at most.
const OTHER_FILES: u64 = 2000;

#[test]
fn ten_thousand_connections_at_once() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let files = CONNECTIONS as u64 + OTHER_FILES;
    assert!(hard >= files, "needs {files} open files (ulimit -Hn)");
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(files), hard).unwrap();
    let mut net = Net::new();
    net.flows = 16_384;
    let baton = env!("CARGO_BIN_EXE_baton");
    let echo = ["lab", "serve-echo", "--port", "8080"];
    let _servers = ["b1", "b2"].map(|node| Running::start(&net.node(node), baton, &echo));
    let how = "mode = \"passthrough\"\nmax_connections = 20000\nmax_connections_per_source = 20000";
    net.start_relay(
        &(service("four", "front4", 80, how, &[("b1", "10.78.0.11:8080")])
            + &service("six", "front6", 80, how, &[("b2", "[fd78::12]:8080")])),
    );
    let client = net.node("client");
    let to: [SocketAddr; 2] =
        ["10.77.0.100:80".parse().unwrap(), "[fd77::100]:80".parse().unwrap()];
    let open = || {
        (0..CONNECTIONS)
            .map(|nth| {
                let mut stream = TcpStream::connect_timeout(&to[nth % 2], PATIENCE);
                // The servers may not listen yet.
                for _ in 0..100 {
                    if nth > 1 || stream.is_ok() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                    stream = TcpStream::connect_timeout(&to[nth % 2], PATIENCE);
                }
                let stream = stream.unwrap_or_else(|error| panic!("connection {nth}: {error}"));
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream
            })
            .collect::<Vec<_>>()
    };
    let mut streams = client.enter(open).unwrap();
    // All of them at once, and each gets its own back.
    for round in 0..2_usize {
        let text = |nth: usize| format!("{round} of {nth:5}");
        for (nth, stream) in streams.iter_mut().enumerate() {
            stream.write_all(text(nth).as_bytes()).unwrap();
        }
        for (nth, stream) in streams.iter_mut().enumerate() {
            let mut answer = vec![0; text(nth).len()];
            stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("{nth}: {error}"));
            assert_eq!(answer, text(nth).as_bytes());
        }
    }
    let flows = || {
        let status = net.status();
        status["datapath"]["flows"].as_u64().unwrap()
    };
    net.until("the relay counts them", || flows() == CONNECTIONS as u64);
}
