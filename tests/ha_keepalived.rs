//! Baton and keepalived as nodes of one virtual router, in both roles, both families.

mod ha_support;

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use baton_ha::vrrp::router::{Reason, State};
use ha_support::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
#[ignore = "what the other tests start as a process of its own"]
fn child_process() {
    ha_support::child_process();
}

/// keepalived in the foreground, its log in a file of the same name.
struct Keepalived {
    process: Process,
    children: Vec<Pid>,
    _files: Files,
}

/// Its configuration, log and process ids; the log is shown if the test fails.
struct Files([PathBuf; 4]);

impl Files {
    fn new() -> Self {
        Self(["keepalived.conf", "keepalived.log", "keepalived.pid", "vrrp.pid"].map(scratch))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(&self.0[1]).unwrap_or_default());
        }
        for file in &self.0 {
            let _ = fs::remove_file(file);
        }
    }
}

impl Keepalived {
    /// Node 1 of the lab, with the VIPs of `spec`.
    fn start(lab: &Lab, spec: &Spec) -> Self {
        let files = Files::new();
        let [conf, log, pid, vrrp_pid] = &files.0;
        fs::write(conf, Self::config(spec)).unwrap();
        let child = lab.nodes[1]
            .command("keepalived")
            .args(["-n", "-l", "-D", "-P", "-f", conf.to_str().unwrap()])
            .args(["-p", pid.to_str().unwrap(), "-r", vrrp_pid.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(fs::File::create(log).unwrap())
            .spawn()
            .unwrap();
        let pid = child.id();
        let process = Process::new(child);
        let mut children = Vec::new();
        until(seconds(5), "keepalived's VRRP process", || {
            let path = format!("/proc/{pid}/task/{pid}/children");
            let text = fs::read_to_string(path).unwrap_or_default();
            children =
                text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).collect();
            !children.is_empty()
        });
        Self { process, children, _files: files }
    }

    fn config(spec: &Spec) -> String {
        let interval = f64::from(spec.centiseconds) / 100.0;
        let mut instances = String::new();
        let mut names = String::new();
        for kind in spec.paths.as_bytes().chunks(2) {
            let (name, vip, ours, theirs) = match kind[0] {
                b'4' => ("V4", format!("{VIP4}/24"), "10.77.0.3", "10.77.0.2"),
                _ => ("V6", format!("{VIP6}/64"), "fd77::3", "fd77::2"),
            };
            let unicast = if kind[1] == b'u' {
                format!("unicast_src_ip {ours}\n unicast_peer {{\n {theirs}\n }}\n")
            } else {
                String::new()
            };
            names += &format!("{name}\n");
            instances += &format!(
                "vrrp_instance {name} {{\n state BACKUP\n interface front\n version 3\n \
                 virtual_router_id {VRID}\n priority {}\n advert_int {interval}\n {unicast} \
                 virtual_ipaddress {{\n {vip} dev front\n }}\n}}\n",
                spec.priority
            );
        }
        // Without `vrrp_rt_priority`: with it, keepalived has 10 ms of CPU time for a change of
        // state, and is killed by its own limit on a busy machine.
        format!(
            "{instances}\
             vrrp_sync_group G {{\n group {{\n {names} }}\n}}\n"
        )
    }

    /// As if its power was cut: without a last advert.
    fn abort(self) {
        // The parent would start its child anew, the child would yield when its parent is gone.
        self.process.signal(Signal::SIGSTOP);
        for child in self.children {
            kill(child, Signal::SIGKILL).unwrap();
        }
        self.process.abort();
    }
}

/// keepalived 2.2 takes no IPv4 advert whose checksum is without the pseudo-header.
fn spec(priority: u8, centiseconds: u16, paths: &'static str) -> Spec {
    Spec { paths, pseudo_header: true, ..Spec::new(priority, centiseconds) }
}

fn vips(spec: &Spec) -> Vec<&'static str> {
    let families = [("4", VIP4), ("6", VIP6)];
    families.into_iter().filter(|(f, _)| spec.paths.contains(f)).map(|(_, vip)| vip).collect()
}

/// What a takeover may take: Active_Down_Interval, and what a busy machine adds.
fn bound(spec: &Spec) -> std::time::Duration {
    4 * spec.interval() + seconds(2)
}

#[test]
fn keepalived_backs_up_baton() {
    let _alone = alone();
    for (centiseconds, paths) in [(1, "4m6m"), (10, "4u6u"), (10, "4u"), (10, "6m"), (100, "4m6m")]
    {
        let lab = Lab::new(2);
        let spec = Spec { valid_lft: 1, ..spec(200, centiseconds, paths) };
        println!("{spec:?}");
        let vips = vips(&spec);
        let baton = lab.spawn(0, &spec);
        lab.wait_for_holder(0, &vips, bound(&spec));
        let keepalived = Keepalived::start(&lab, &Spec { priority: 100, ..spec.clone() });
        stays(seconds(1) + 4 * spec.interval(), "Baton is Active", || lab.holders(vips[0]) == [0]);

        baton.abort();
        let killed = Instant::now();
        // Baton's kernel drops them as well: only keepalived is left.
        lab.wait_for_holder(1, &vips, bound(&spec) + seconds(2));
        println!("keepalived holds {vips:?} alone after {:?}", killed.elapsed());

        let baton = lab.start(0, &spec);
        lab.wait_for_holder(0, &vips, bound(&spec));
        assert_eq!(baton.view().reason, Reason::Preempted);
        assert_eq!(baton.view().heard[0].priority.value(), 100);
        for trouble in ["addresses_differ", "interval_differs", "advert_checksum"] {
            assert_eq!(baton.counter(trouble), 0, "{trouble}");
        }

        baton.shutdown();
        let stopped = Instant::now();
        // Skew_Time at priority 100 is 0.61 intervals.
        lab.wait_for_holder(1, &vips, bound(&spec));
        println!("keepalived follows a yield after {:?}", stopped.elapsed());
        if centiseconds == 100 {
            assert!(stopped.elapsed() < seconds(2), "it waited for Active_Down_Interval");
        }
        keepalived.process.terminate();
    }
}

#[test]
fn baton_backs_up_keepalived() {
    let _alone = alone();
    for (centiseconds, paths) in [(1, "4m6m"), (10, "4u6u"), (10, "4m"), (100, "4m6m")] {
        let lab = Lab::new(2);
        let spec = spec(100, centiseconds, paths);
        println!("{spec:?}");
        let vips = vips(&spec);
        let master = Spec { priority: 200, ..spec.clone() };
        let keepalived = Keepalived::start(&lab, &master);
        lab.wait_for_holder(1, &vips, bound(&spec) + seconds(3));
        let baton = lab.start(0, &spec);
        stays(seconds(1) + 4 * spec.interval(), "keepalived is MASTER", || {
            lab.holders(vips[0]) == [1]
        });
        assert_eq!(baton.view().active.unwrap().priority.value(), 200);

        keepalived.process.terminate();
        let stopped = Instant::now();
        lab.wait_for_holder(0, &vips, bound(&spec));
        println!("Baton follows a stop of keepalived after {:?}", stopped.elapsed());
        assert_eq!(baton.view().reason, Reason::ActiveYielded);
        if centiseconds == 100 {
            assert!(stopped.elapsed() < seconds(2), "it waited for Active_Down_Interval");
        }

        let keepalived = Keepalived::start(&lab, &master);
        lab.wait_for_holder(1, &vips, bound(&spec) + seconds(3));
        until(seconds(1), "outranked", || baton.view().reason == Reason::Outranked);

        keepalived.abort();
        let killed = Instant::now();
        baton.wait_for(State::Active, bound(&spec));
        println!("Baton claims {:?} after keepalived is gone", killed.elapsed());
        assert_eq!(baton.view().reason, Reason::ActiveDown);
        until(seconds(1), "VIPs", || vips.iter().all(|vip| lab.has(0, vip)));
    }
}
