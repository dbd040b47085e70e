//! What the client does to the relay: iperf3 and wrk, and what they say of it.

use std::net::Ipv4Addr;

use crate::lab::netns::run;
use crate::lab::topology::HTTP_PORT;
use crate::lab::{Doing, Lab, LabError};

/// Where the backends' iperf3 listens.
pub(super) const IPERF_PORT: u16 = 5201;

/// Connections that wrk keeps busy.
const WRK_CONNECTIONS: u32 = 64;
/// Connections that iperf3 sends over.
const IPERF_CONNECTIONS: u32 = 4;

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// iperf3 from client to backend: bytes.
    Upload,
    /// iperf3 from backend to client: bytes.
    Download,
    /// wrk over connections that are kept: requests.
    Requests,
    /// wrk with a connection for each request: connections.
    Connections,
}

/// What a load came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Carried {
    /// Bytes, requests or connections.
    pub(super) amount: f64,
    /// The same for each second.
    pub(super) rate: f64,
    /// Requests that failed.
    pub(super) errors: u64,
}

impl Load {
    pub(super) const ALL: [Self; 4] =
        [Self::Upload, Self::Download, Self::Requests, Self::Connections];

    /// Puts it on what is at that address for so long.
    pub(super) fn put(
        self,
        lab: &Lab,
        address: Ipv4Addr,
        seconds: u32,
    ) -> Result<Carried, LabError> {
        let (host, url) = (address.to_string(), format!("http://{address}:{HTTP_PORT}/"));
        let time = seconds.to_string();
        let (port, parallel) = (IPERF_PORT.to_string(), IPERF_CONNECTIONS.to_string());
        let iperf = ["-c", &host, "-p", &port, "-P", &parallel, "-t", &time, "-J"];
        let connections = WRK_CONNECTIONS.to_string();
        let wrk = ["-t", "1", "-c", &connections, "-d", &time];
        let (program, args) = match self {
            Self::Upload => ("iperf3", iperf.to_vec()),
            Self::Download => ("iperf3", [&iperf[..], &["-R"]].concat()),
            Self::Requests => ("wrk", [&wrk[..], &[&url]].concat()),
            Self::Connections => ("wrk", [&wrk[..], &["-H", "Connection: close", &url]].concat()),
        };
        let output = run(lab.netns("client").command(program).args(args)).doing("putting load")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let carried = match self {
            Self::Upload | Self::Download => parse_iperf(&text),
            Self::Requests | Self::Connections => parse_wrk(&text),
        };
        carried.ok_or_else(|| LabError::Io {
            doing: format!("reading what {program} says"),
            source: std::io::Error::other(text.into_owned()),
        })
    }
}

fn parse_iperf(json: &str) -> Option<Carried> {
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    let sum = value.get("end")?.get("sum_received")?;
    let amount = sum.get("bytes")?.as_f64()?;
    let rate = sum.get("bits_per_second")?.as_f64()? / 8.0;
    Some(Carried { amount, rate, errors: 0 })
}

fn parse_wrk(text: &str) -> Option<Carried> {
    let mut carried = Carried { amount: 0.0, rate: f64::NAN, errors: 0 };
    for line in text.lines().map(str::trim) {
        if let Some((requests, _)) = line.split_once(" requests in ") {
            carried.amount = requests.parse().ok()?;
        } else if let Some(rate) = line.strip_prefix("Requests/sec:") {
            carried.rate = rate.trim().parse().ok()?;
        } else if let Some(errors) = line.strip_prefix("Socket errors: ") {
            let numbers = errors.split(", ").filter_map(|part| part.rsplit(' ').next());
            carried.errors += numbers.filter_map(|number| number.parse::<u64>().ok()).sum::<u64>();
        } else if let Some(bad) = line.strip_prefix("Non-2xx or 3xx responses: ") {
            carried.errors += bad.parse::<u64>().ok()?;
        }
    }
    (!carried.rate.is_nan()).then_some(carried)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_understood() {
        let text = "Running 4s test @ http://10.77.0.2/\n  1 threads and 64 connections\n  \
                    158860 requests in 4.00s, 23.03MB read\n  \
                    Socket errors: connect 1, read 20, write 300, timeout 4000\n  \
                    Non-2xx or 3xx responses: 50000\nRequests/sec:  39715.09\n\
                    Transfer/sec:      5.76MB\n";
        let due = Carried { amount: 158_860.0, rate: 39_715.09, errors: 54_321 };
        assert_eq!(parse_wrk(text), Some(due));
        assert_eq!(parse_wrk("unable to connect"), None);
    }

    #[test]
    fn iperf_is_understood() {
        let json = r#"{"end":{"sum_received":{"bytes":2669000000,"bits_per_second":5.32e9}}}"#;
        let due = Carried { amount: 2.669e9, rate: 6.65e8, errors: 0 };
        assert_eq!(parse_iperf(json), Some(due));
        assert_eq!(parse_iperf(r#"{"error":"unable to connect"}"#), None);
    }
}
