//! Every part of the bench runs to its end, on the smallest scale, and leaves nothing. How fast
//! anything is, is not looked at: the machine may be busy.

mod lab_support;

use std::process::Stdio;

use lab_support::{Guard, baton, text, traces};
use serde_json::Value;

fn bench(suite: &str) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    let document = dir.path().join("document.md");
    let sections =
        ["packets", "footprint", "passthrough-two-links", "passthrough-one-link", "proxy"];
    let places = sections.map(|name| format!("<!-- bench {name} -->\n<!-- end -->\n"));
    std::fs::write(&document, places.concat()).unwrap();
    let mut command = baton(&[
        "lab",
        "bench",
        suite,
        "--json",
        "--seconds=1",
        "--runs=1",
        "--flows=1,5000",
        "--congestion=cubic",
        &format!("--report={}", report.display()),
        &format!("--document={}", document.display()),
    ]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lab = format!("drill-bench-{}", child.id());
    let _guard = Guard(lab.clone());
    let output = child.wait_with_output().unwrap();
    assert_eq!(traces(&lab), Vec::<String>::new());
    assert!(output.status.success(), "{}", text(&output));
    let document = std::fs::read_to_string(&document).unwrap();
    assert!(document.contains("\n```\n"), "{document}");
    serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap()
}

/// Every contender has carried every load.
fn assert_carried(report: &Value, races: &[&str]) {
    let names: Vec<_> =
        report["races"].as_array().unwrap().iter().map(|race| &race["name"]).collect();
    assert_eq!(names, races);
    for race in report["races"].as_array().unwrap() {
        assert_eq!(race["relays"].as_array().unwrap().len(), 5, "{race}");
        for relay in race["relays"].as_array().unwrap() {
            for figure in
                ["upload_gbit_per_s", "download_gbit_per_s", "requests_per_s", "connections_per_s"]
            {
                assert!(relay["median"][figure].as_f64().unwrap() > 0.0, "{figure}: {relay}");
            }
        }
    }
}

#[test]
fn packets_are_measured() {
    let report = bench("packets");
    for cost in report["packets"].as_array().unwrap() {
        for hook in ["xdp", "tc"].iter().filter(|hook| !cost[**hook].is_null()) {
            assert!(cost[hook]["bare"].as_f64().unwrap() > 0.0, "{cost}");
        }
    }
    assert_eq!(report["packets"][1]["flows"], 5000);
    assert_eq!(report["packets"][1]["busy"], 1000);
    assert_eq!(report["packets"][2]["busy"], 5000);
}

#[test]
fn memory_and_start_are_measured() {
    let footprint = &bench("footprint")["footprint"];
    let bytes =
        footprint["flow_bytes"].as_f64().unwrap() + footprint["reply_bytes"].as_f64().unwrap();
    // No measurement, but the kernel's reckoning: docs/decisions/datapath.md says what it is of.
    assert!(bytes > 100.0 && bytes < 256.0, "{footprint}");
    assert!(footprint["first_packet_ms"].as_f64().unwrap() > 0.0, "{footprint}");
}

#[test]
fn passthrough_races() {
    assert_carried(&bench("datapath"), &["passthrough-two-links", "passthrough-one-link"]);
}

#[test]
fn proxies_race() {
    assert_carried(&bench("proxy"), &["proxy"]);
}

fn bench_ha(arguments: &[&str], section: &str) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    let document = dir.path().join("document.md");
    std::fs::write(&document, format!("<!-- bench {section} -->\n<!-- end -->\n")).unwrap();
    let files =
        [format!("--report={}", report.display()), format!("--document={}", document.display())];
    let mut command = baton(&["lab", "bench-ha"]);
    command.args(arguments).args(files);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let labs = ["drill-ha", "drill"].map(|kind| format!("{kind}-{}", child.id()));
    let _guards = labs.clone().map(Guard);
    let output = child.wait_with_output().unwrap();
    for lab in &labs {
        assert_eq!(traces(lab), Vec::<String>::new());
    }
    assert!(output.status.success(), "{}", text(&output));
    let document = std::fs::read_to_string(&document).unwrap();
    assert!(document.contains("\n```\n"), "{document}");
    serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap()
}

#[test]
fn replication_is_measured_from_outside() {
    let arguments = ["replication", "--rates=500", "--seconds=1", "--flows=5000"];
    let replication = &bench_ha(&arguments, "replication")["replication"];
    let rate = &replication["rates"][0];
    assert!(rate["samples"].as_u64().unwrap() > 0, "{rate}");
    assert!(rate["lag_p99_ms"].as_f64().unwrap() > 0.0, "{rate}");
    assert_eq!((&rate["lacking"], &rate["missed"]), (&0.into(), &0.into()), "{rate}");
    let join = &replication["join"];
    assert_eq!((&join["flows"], &join["lacking"]), (&5000.into(), &0.into()), "{join}");
    assert!(join["wire_bytes"].as_f64().unwrap() > 10.0, "{join}");
}

/// Both contenders, and that what is held is counted.
#[test]
fn churn_is_measured_beside_conntrackd() {
    let report = bench_ha(&["churn", "--churn=50", "--runs=1"], "churn");
    let churns = report["churns"].as_array().unwrap();
    let relays: Vec<_> = churns.iter().map(|report| &report["relays"]).collect();
    assert_eq!(relays, ["baton", "conntrackd"]);
    for report in churns {
        let churn = &report["runs"][0]["churn"];
        // 50 a second for 5 seconds, on a machine that may be busy.
        assert!(churn["established"].as_u64().unwrap() > 100, "{churn}");
        let sum = churn["survived"].as_u64().unwrap() + churn["lost"].as_u64().unwrap();
        assert_eq!(churn["established"], sum, "{churn}");
    }
}
