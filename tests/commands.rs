//! The commands against a real daemon on loopback: what they print, their exit codes, and what
//! they do to real connections. A node without VIPs is enough for these; takeovers are in the
//! drills.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const BATON: &str = env!("CARGO_BIN_EXE_baton");

/// Generous: the machine may be busy. Whoever waits polls, so nothing is slower for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with its folder; ended when dropped.
struct Daemon {
    folder: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    /// Starts a daemon with this configuration (without `[node]`) and waits until it answers.
    fn start(grace: &str, rest: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = configuration(&folder.path().join("control.sock"), grace, rest);
        std::fs::write(folder.path().join("baton.toml"), text).unwrap();
        let child = run(folder.path());
        let daemon = Self { folder, child };
        daemon.until("it answers", || daemon.ask(&["status"]).status.success());
        daemon
    }

    /// Kills it, has something happen to its folder, and starts it again.
    fn kill_and_start_again(&mut self, meanwhile: impl FnOnce(&Path)) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        meanwhile(self.folder.path());
        self.child = run(self.folder.path());
        self.until("it answers", || self.ask(&["status"]).status.success());
    }

    /// Sets something, until it is on the disk: the machine may be busy.
    fn have_kept(&self, args: &[&str]) {
        self.until("kept", || {
            let output = self.ask(args);
            assert!(output.status.success(), "{output:?}");
            !text(&output.stdout).contains("not on this node's disk")
        });
    }

    /// What is set about the first backend of the first service: whether it is used, and its weight.
    fn set(&self) -> (String, u64) {
        let backend = &self.status()["services"][0]["backends"][0];
        (backend["admin"].as_str().unwrap().to_owned(), backend["weight"].as_u64().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// Runs a command against it.
    fn ask(&self, args: &[&str]) -> Output {
        Command::new(BATON).args(args).arg("--socket").arg(self.socket()).output().unwrap()
    }

    fn status(&self) -> Value {
        let output = self.ask(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn rewrite(&self, rest: &str) {
        let text = configuration(&self.socket(), "10s", rest);
        std::fs::write(self.folder.path().join("baton.toml"), text).unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}; log:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(folder: &Path) -> Child {
    Command::new(BATON)
        .args(["run", "-c"])
        .arg(folder.join("baton.toml"))
        .stderr(std::fs::File::create(folder.join("log")).unwrap())
        .spawn()
        .unwrap()
}

fn configuration(socket: &Path, grace: &str, rest: &str) -> String {
    let (socket, state) = (socket.display(), socket.with_file_name("state").display().to_string());
    format!(
        "[node]\nname = \"n1\"\ncontrol = \"{socket}\"\nstate_dir = \"{state}\"\n\
         shutdown_grace = \"{grace}\"\nworkers = 1\n{rest}"
    )
}

/// A TCP server that greets each connection with its name and then echoes.
fn server(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let _ = stream.write_all(name.as_bytes());
                let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
            });
        }
    });
    address
}

/// A port on which nobody listens just now.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn service(name: &str, listen: SocketAddr, backends: &[(&str, SocketAddr)]) -> String {
    let mut text = format!("[[services]]\nname = \"{name}\"\nlisten = \"{listen}\"\n");
    for (name, address) in backends {
        text += &format!("[[services.backends]]\nname = \"{name}\"\naddress = \"{address}\"\n");
    }
    text
}

/// A connection through the service, and the backend that greeted it.
fn connect(listen: SocketAddr) -> Option<(TcpStream, String)> {
    let mut stream = TcpStream::connect(listen).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut name = [0; 1];
    stream.read_exact(&mut name).ok()?;
    Some((stream, String::from_utf8_lossy(&name).into_owned()))
}

/// Whether the connection still carries a byte there and back.
fn alive(stream: &mut TcpStream) -> bool {
    let mut byte = [0; 1];
    stream.write_all(b"x").is_ok() && matches!(stream.read(&mut byte), Ok(1))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn without_a_daemon_every_command_says_so_and_exits_3() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("none.sock");
    for command in [
        &["status"][..],
        &["takeover"],
        &["yield"],
        &["reload"],
        &["drain", "b"],
        &["enable", "b"],
        &["disable", "b"],
    ] {
        let output =
            Command::new(BATON).args(command).arg("--socket").arg(&socket).output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{command:?}");
        let error = text(&output.stderr);
        assert!(error.contains("no daemon answers on"), "{error}");
        assert!(error.contains("is `baton run` running"), "{error}");
        assert_eq!(text(&output.stdout), "");
    }
}

#[test]
fn wrong_arguments_and_wrong_files_exit_2() {
    for args in [&["statsu"][..], &["drain"], &["status", "--watch=never"], &["drill", "nothing"]] {
        let output = Command::new(BATON).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("baton.toml");
    std::fs::write(&file, "[node]\nnmae = \"n1\"\n").unwrap();
    for command in ["check", "run"] {
        let output = Command::new(BATON).args([command, "-c"]).arg(&file).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{command}");
        assert!(text(&output.stderr).contains("baton.toml:2:1"), "{}", text(&output.stderr));
    }
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused_and_harms_nothing() {
    let listen = free();
    let daemon = Daemon::start("10s", &service("s", listen, &[("a", server("a"))]));
    let (mut stream, _) = connect(listen).unwrap();
    let second = Command::new(BATON)
        .args(["run", "-c"])
        .arg(daemon.folder.path().join("baton.toml"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("another baton already runs"), "{second:?}");
    assert!(alive(&mut stream));
    assert!(daemon.ask(&["status"]).status.success());
}

#[test]
fn status_shows_services_backends_and_counters() {
    let listen = free();
    let daemon = Daemon::start("10s", &service("s", listen, &[("a", server("a"))]));
    let held = connect(listen).unwrap();
    daemon
        .until("the connection is counted", || daemon.status()["services"][0]["connections"] == 1);
    let status = daemon.status();
    assert_eq!(status["node"], "n1");
    assert_eq!(status["election"], Value::Null);
    let service = &status["services"][0];
    assert_eq!(service["name"], "s");
    assert_eq!(service["counters"]["accepted"], 1);
    assert_eq!(service["backends"][0]["connections"], 1);
    assert_eq!(service["backends"][0]["health"], "up");
    let shown = text(&daemon.ask(&["status"]).stdout);
    assert!(shown.contains("n1 of cluster"), "{shown}");
    assert!(shown.contains("BACKEND"), "{shown}");
    assert!(!shown.contains('\x1b'), "colours only on a terminal: {shown}");
    drop(held);
    daemon.until("the connection is gone", || daemon.status()["services"][0]["connections"] == 0);
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let daemon = Daemon::start("10s", &service("s", free(), &[("a", server("a"))]));
    let mut watch = Command::new(BATON)
        .args(["status", "--watch", "0.1", "--socket"])
        .arg(daemon.socket())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    watch.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = watch.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn drained_backends_keep_their_connections_and_disabled_ones_lose_them() {
    let listen = free();
    let backends = [("a", server("a")), ("b", server("b"))];
    let daemon = Daemon::start("10s", &service("s", listen, &backends));
    let mut held: Vec<_> = (0..4).map(|_| connect(listen).unwrap()).collect();
    assert!(held.iter().any(|(_, name)| name == "a"));

    let drained = daemon.ask(&["drain", "s/a"]);
    assert!(drained.status.success(), "{drained:?}");
    assert!(text(&drained.stdout).contains("s/a: enabled → drained"), "{drained:?}");
    for _ in 0..6 {
        assert_eq!(connect(listen).unwrap().1, "b");
    }
    assert!(held.iter_mut().all(|(stream, _)| alive(stream)), "drained connections go on");

    assert!(daemon.ask(&["disable", "a"]).status.success());
    for (stream, name) in &mut held {
        if name == "a" {
            let end = stream.read(&mut [0; 1]);
            assert!(
                matches!(&end, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset),
                "a connection to a disabled backend is reset: {end:?}"
            );
        } else {
            assert!(alive(stream), "connections to other backends go on");
        }
    }

    assert!(daemon.ask(&["enable", "a"]).status.success());
    let names: Vec<_> = (0..4).map(|_| connect(listen).unwrap().1).collect();
    assert!(names.iter().any(|name| name == "a"), "{names:?}");

    let unknown = daemon.ask(&["drain", "nobody"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("there are s/a, s/b"), "{unknown:?}");
}

#[test]
fn what_an_operator_set_outlives_a_lone_daemon_that_is_killed() {
    let listen = free();
    let mut daemon =
        Daemon::start("10s", &service("s", listen, &[("a", server("a")), ("b", server("b"))]));
    daemon.have_kept(&["weight", "s/a", "7"]);
    daemon.have_kept(&["drain", "s/a"]);
    daemon.kill_and_start_again(|_| {});
    assert_eq!(daemon.set(), ("drained".to_owned(), 7));
    for _ in 0..6 {
        assert_eq!(connect(listen).unwrap().1, "b");
    }
    // What is undone is so for good, too.
    daemon.have_kept(&["enable", "s/a"]);
    daemon.kill_and_start_again(|_| {});
    assert_eq!(daemon.set(), ("enabled".to_owned(), 7));
}

#[test]
fn a_damaged_file_of_settings_is_said_and_keeps_no_daemon_from_serving() {
    let listen = free();
    let mut daemon = Daemon::start("10s", &service("s", listen, &[("a", server("a"))]));
    daemon.have_kept(&["drain", "s/a"]);
    let file = daemon.folder.path().join("state/settings.json");
    daemon.kill_and_start_again(|_| {
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    });
    assert_eq!(daemon.set(), ("enabled".to_owned(), 1));
    assert!(connect(listen).is_some());
    assert!(daemon.log().contains("it is damaged"), "{}", daemon.log());
    let told = daemon.ask(&["status"]);
    assert!(text(&told.stdout).contains("! what operators set is not kept"), "{told:?}");
    // It is replaced by what is set next.
    daemon.have_kept(&["disable", "s/a"]);
    assert_eq!(daemon.status()["settings"]["trouble"], Value::Null);
    daemon.kill_and_start_again(|_| {});
    assert_eq!(daemon.set().0, "disabled");
}

#[test]
fn where_nothing_can_be_written_settings_hold_and_are_said_not_to_be_kept() {
    let mut daemon = Daemon::start("10s", &service("s", free(), &[("a", server("a"))]));
    // A folder that can't be made, by root neither: there is a file in its place.
    daemon.kill_and_start_again(|folder| {
        let _ = std::fs::remove_dir_all(folder.join("state"));
        std::fs::write(folder.join("state"), "").unwrap();
    });
    let drained = daemon.ask(&["drain", "s/a"]);
    assert!(drained.status.success(), "{drained:?}");
    assert!(text(&drained.stdout).contains("it is not on this node's disk"), "{drained:?}");
    assert_eq!(daemon.set().0, "drained");
    let why = daemon.status()["settings"]["trouble"].as_str().unwrap().to_owned();
    assert!(why.contains("can't be written"), "{why}");
    // And where it can again, they are, without being said again.
    std::fs::remove_file(daemon.folder.path().join("state")).unwrap();
    daemon.until("kept", || daemon.status()["settings"]["trouble"].is_null());
    daemon.kill_and_start_again(|_| {});
    assert_eq!(daemon.set().0, "drained");
}

#[test]
fn reload_applies_what_it_can_and_a_wrong_file_changes_nothing() {
    let (listen, other) = (free(), free());
    let (a, b) = (server("a"), server("b"));
    let daemon = Daemon::start("10s", &service("s", listen, &[("a", a)]));
    let (mut held, _) = connect(listen).unwrap();

    // A wrong file, by command and by signal.
    daemon.rewrite("[[services]]\nnmae = \"s\"\n");
    let refused = daemon.ask(&["reload"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("nothing was changed"), "{refused:?}");
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    daemon.until("SIGHUP is refused", || daemon.log().contains("SIGHUP: nothing was changed"));
    assert!(alive(&mut held));
    assert_eq!(connect(listen).unwrap().1, "a");

    // A changed and a new service; the connection through the changed one goes on.
    daemon.rewrite(&(service("s", listen, &[("b", b)]) + &service("t", other, &[("a", a)])));
    let applied = daemon.ask(&["reload"]);
    assert!(applied.status.success(), "{applied:?}");
    let shown = text(&applied.stdout);
    assert!(shown.contains("s: changed") && shown.contains("t: new"), "{shown}");
    assert_eq!(connect(listen).unwrap().1, "b");
    assert_eq!(connect(other).unwrap().1, "a");
    assert!(alive(&mut held), "the connection to the backend that left ends by itself");

    assert_eq!(daemon.log().matches("proxy started").count(), 1, "{}", daemon.log());

    // A removed service stops listening.
    daemon.rewrite(&service("s", listen, &[("b", b)]));
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    daemon.until("the removed service is closed", || TcpStream::connect(other).is_err());
    assert_eq!(connect(listen).unwrap().1, "b");

    // What needs a restart is named, and nothing is applied.
    let renamed = configuration(&daemon.socket(), "10s", &service("s", listen, &[("a", a)]))
        .replace("name = \"n1\"", "name = \"n2\"");
    std::fs::write(daemon.folder.path().join("baton.toml"), renamed).unwrap();
    let blocked = daemon.ask(&["reload"]);
    assert_eq!(blocked.status.code(), Some(1));
    assert!(text(&blocked.stderr).contains("need a restart: node.name: n1 → n2"), "{blocked:?}");
    assert_eq!(connect(listen).unwrap().1, "b");
}

#[test]
fn a_service_that_gets_another_name_keeps_its_connections_and_its_operators_word() {
    let listen = free();
    let backends = [("a", server("a")), ("b", server("b"))];
    let daemon = Daemon::start("10s", &service("s", listen, &backends));
    let mut held: Vec<_> = (0..2).map(|_| connect(listen).unwrap()).collect();
    assert!(daemon.ask(&["drain", "s/a"]).status.success());

    daemon.rewrite(&service("t", listen, &backends));
    let applied = daemon.ask(&["reload"]);
    assert!(applied.status.success(), "{applied:?}");
    let service = &daemon.status()["services"][0];
    assert_eq!(service["name"], "t");
    assert_eq!(service["connections"], 2);
    assert_eq!(service["backends"][0]["admin"], "drained");
    assert!(held.iter_mut().all(|(stream, _)| alive(stream)));

    assert!(daemon.ask(&["disable", "t/a"]).status.success());
    let (of_a, _) = held.iter_mut().find(|(_, name)| name == "a").unwrap();
    let end = of_a.read(&mut [0; 1]);
    assert!(end.is_err(), "a connection to a disabled backend is reset: {end:?}");
}

#[test]
fn a_backend_is_no_longer_down_when_its_check_is_gone_but_not_if_the_reload_fails() {
    let (listen, a) = (free(), server("a"));
    let check = "[checks.never]\ntype = \"send-expect\"\nexpect = \"never\"\n\
                 interval = \"100ms\"\ntimeout = \"100ms\"\nrise = 1\nfall = 1\n";
    let unchecked = service("s", listen, &[("a", a)]);
    let checked = unchecked.replace("[[services.b", "check = \"never\"\n[[services.b");
    let daemon = Daemon::start("10s", &(check.to_owned() + &checked));
    let backend = || daemon.status()["services"][0]["backends"][0].clone();
    daemon.until("it is down", || backend()["health"] == "down");

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let blocked = service("t", taken.local_addr().unwrap(), &[("a", a)]);
    daemon.rewrite(&(unchecked.clone() + &blocked));
    let refused = daemon.ask(&["reload"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("nothing was changed"), "{refused:?}");
    assert_eq!(backend()["health"], "down");
    assert!(!daemon.log().contains("backend is up"), "{}", daemon.log());

    daemon.rewrite(&unchecked);
    assert!(daemon.ask(&["reload"]).status.success());
    assert_eq!(backend()["health"], "up");
    assert_eq!(connect(listen).unwrap().1, "a");
}

#[test]
fn sigterm_lets_connections_end_within_the_grace() {
    let listen = free();
    let mut daemon = Daemon::start("10s", &service("s", listen, &[("a", server("a"))]));
    let (mut held, _) = connect(listen).unwrap();
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.until("it stops accepting", || TcpStream::connect(listen).is_err());
    assert!(alive(&mut held), "what is open goes on");
    assert!(daemon.child.try_wait().unwrap().is_none(), "it waits for the connection");

    // Nor does it begin to accept anywhere else.
    let other = free();
    daemon.rewrite(&service("s", other, &[("a", server("a"))]));
    let refused = daemon.ask(&["reload"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("this node is stopping"), "{refused:?}");
    assert!(TcpStream::connect(other).is_err());
    drop(held);
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
    assert!(!daemon.socket().exists(), "the control socket is removed");
}

#[test]
fn sigterm_resets_what_is_left_when_the_grace_is_over() {
    let listen = free();
    let mut daemon = Daemon::start("300ms", &service("s", listen, &[("a", server("a"))]));
    let (mut held, _) = connect(listen).unwrap();
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    let end = held.read(&mut [0; 1]);
    assert!(end.is_err(), "reset, not closed as if all had been said: {end:?}");
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
    assert!(daemon.log().contains("the grace is over"), "{}", daemon.log());
}

#[test]
fn a_second_sigterm_ends_at_once() {
    let listen = free();
    let mut daemon = Daemon::start("1h", &service("s", listen, &[("a", server("a"))]));
    let _held = connect(listen).unwrap();
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.until("it stops accepting", || TcpStream::connect(listen).is_err());
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
}

#[test]
fn garbage_on_the_control_socket_changes_nothing() {
    let listen = free();
    let daemon = Daemon::start("10s", &service("s", listen, &[("a", server("a"))]));
    let mut long = vec![b'{'; 200_000];
    long.push(b'\n');
    for garbage in [&b"\n"[..], b"\x00\xff\xfe\n", b"\"shutdown\"\n", b"{}", &long] {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        // It may close before it has read all of it.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.is_empty() || answer.contains("not a request"), "{answer}");
    }
    // Clients that say nothing hold a place each, and no more than there are.
    let _silent: Vec<_> = (0..20).map(|_| UnixStream::connect(daemon.socket()).unwrap()).collect();
    assert!(daemon.ask(&["status"]).status.success());
    assert_eq!(connect(listen).unwrap().1, "a");
}

#[test]
fn what_is_wrong_with_a_file_is_json_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("baton.toml");
    std::fs::write(&file, "[node]\nname = \"a\"\n[[vips]\n").unwrap();
    let output = Command::new(BATON).args(["check", "--json", "-c"]).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let problem = &json["problems"][0];
    assert_eq!((&problem["severity"], &problem["line"]), (&"error".into(), &3.into()));
    assert!(problem["hint"].as_str().unwrap().contains("[[vips]]"), "{problem}");
    assert!(String::from_utf8(output.stderr).unwrap().contains(":3:"));
}
