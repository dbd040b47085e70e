//! Bulk traffic by programs that are not ours: curl and nginx, iperf3.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use baton::lab::netns::{Netns, run};
use serde_json::Value;

use crate::net::{Net, service};

/// A server; ends when dropped.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(netns: &Netns, program: &str, args: &[&str]) -> Self {
        let mut command = netns.command(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn printed(command: &mut Command) -> String {
    String::from_utf8(run(command).unwrap().stdout).unwrap()
}

/// One process and no master, so that ending it ends all of it.
fn nginx(dir: &Path) -> String {
    let dir = dir.display();
    let mut text = format!(
        "daemon off; master_process off; user root; pid {dir}/pid; error_log stderr warn;\n\
         events {{}}\nhttp {{ access_log off; sendfile on;\n"
    );
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        text += &format!("{kind}_temp_path {dir}/{kind};\n");
    }
    text + &format!("server {{ listen 8080; listen [::]:8080; root {dir}/www; }} }}\n")
}

#[test]
fn a_hundred_megabytes_by_curl_arrive_as_they_are() {
    let mut net = Net::new();
    let dir = tempfile::tempdir().unwrap();
    let www = dir.path().join("www");
    std::fs::create_dir(&www).unwrap();
    std::fs::write(dir.path().join("conf"), nginx(dir.path())).unwrap();
    let mut number = 0x2545_f491_4f6c_dd1d_u64;
    let mut data = Vec::with_capacity(100_000_000);
    while data.len() < 100_000_000 {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        data.extend(number.to_le_bytes());
    }
    std::fs::write(www.join("data"), &data).unwrap();
    drop(data);
    let sum = |path: &Path| {
        let text = printed(Command::new("sha256sum").arg(path));
        text.split_whitespace().next().unwrap().to_owned()
    };
    let conf = dir.path().join("conf").display().to_string();
    let _nginx = Running::start(&net.node("b1"), "nginx", &["-e", "stderr", "-c", &conf]);
    let how = "mode = \"passthrough\"";
    net.start_relay(
        &(service("web4", "front4", 80, how, &[("b1", "10.78.0.11:8080")])
            + &service("web6", "front6", 80, how, &[("b1", "[fd78::11]:8080")])),
    );
    let expected = sum(&www.join("data"));
    for url in ["http://10.77.0.100/data", "http://[fd77::100]/data"] {
        let to = dir.path().join("got");
        let mut curl = net.node("client").command("curl");
        curl.args(["-sS", "--fail", "--max-time", "60", "--retry", "10", "--retry-connrefused"]);
        run(curl.arg("-o").arg(&to).arg(url)).unwrap();
        assert_eq!(sum(&to), expected, "{url}");
    }
}

#[test]
fn iperf3_in_both_directions() {
    let mut net = Net::new();
    let _server = Running::start(&net.node("b1"), "iperf3", &["-s", "-p", "5201"]);
    let mut text = String::new();
    for protocol in ["tcp", "udp"] {
        let how = format!("mode = \"passthrough\"\nprotocol = \"{protocol}\"");
        text += &service(protocol, "front4", 5201, &how, &[("b1", "10.78.0.11:5201")]);
    }
    net.start_relay(&text);
    let client = net.node("client");
    let measured = |args: &[&str]| -> Value {
        for _ in 0..20 {
            let mut command = client.command("iperf3");
            command.args(["-c", "10.77.0.100", "-J", "-t", "1"]).args(args);
            let output = command.output().unwrap();
            let result: Value = serde_json::from_slice(&output.stdout).unwrap();
            // It exits with 0, and an empty end, where the server was busy with another.
            if output.status.success() && result["end"]["streams"].is_array() {
                return result["end"].clone();
            }
            // It serves one at a time, and may not listen yet.
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("iperf3 {args:?} does not work");
    };
    for direction in [&[][..], &["-R"]] {
        let end = measured(&[&["-P", "4"], direction].concat());
        assert_eq!(end["streams"].as_array().unwrap().len(), 4, "{end:#}");
        for stream in end["streams"].as_array().unwrap() {
            assert!(stream["receiver"]["bytes"].as_u64().unwrap() > 100_000, "{end:#}");
        }
        // Datagrams of several fragments too.
        for length in ["1200", "8000"] {
            let how = ["-u", "-b", "20M", "-l", length];
            let end = measured(&[&how, direction].concat());
            let sum = &end["sum"];
            let (packets, lost) =
                (sum["packets"].as_f64().unwrap(), sum["lost_packets"].as_f64().unwrap());
            assert!(packets > 50.0 && lost < packets / 2.0, "{end:#}");
        }
    }
}
