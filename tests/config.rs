//! The samples in config/ load, what is wrong with a file is told exactly, and no file panics.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use baton::config::Config;
use baton::config::system::System;
use baton::lab::netns::Netns;
use baton::service::{Dsr, Mode};
use proptest::prelude::*;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn samples() -> Vec<PathBuf> {
    let mut samples: Vec<_> = fs::read_dir(root().join("config"))
        .expect("config/ is there")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    samples.sort();
    samples
}

#[test]
fn every_sample_loads_without_a_warning() {
    let samples = samples();
    assert!(samples.len() >= 5, "{samples:?}");
    for path in samples {
        match Config::load(&path) {
            Ok(config) => assert_eq!(config.warnings, [], "{}", path.display()),
            Err(errors) => panic!("{errors}"),
        }
    }
}

/// A case of errors.txt: a change of the base file, and what is said of it.
struct Case {
    name: String,
    remove: Vec<String>,
    add: Vec<String>,
    expected: String,
}

fn cases(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            let (remove, add, expected) = (Vec::new(), Vec::new(), String::new());
            cases.push(Case { name: name.to_owned(), remove, add, expected });
        } else if let Some(case) = cases.last_mut() {
            let rest = line.get(1..).unwrap_or_default();
            let rest = rest.strip_prefix(' ').unwrap_or(rest).to_owned();
            match line.chars().next() {
                Some('-') => case.remove.push(rest),
                Some('+') => case.add.push(rest),
                Some('>') => writeln!(case.expected, "{rest}").expect("a String"),
                None => {}
                Some(_) => panic!("errors.txt: {line}"),
            }
        }
    }
    cases
}

impl Case {
    fn file(&self, base: &str) -> String {
        let add: String = self.add.iter().fold(String::new(), |text, line| text + line + "\n");
        if self.remove.is_empty() {
            return format!("{base}{add}");
        }
        let remove = self.remove.iter().fold(String::new(), |text, line| text + line + "\n");
        assert!(base.contains(&remove), "{}: base.toml has no\n{remove}", self.name);
        base.replacen(&remove, &add, 1)
    }
}

#[test]
fn what_is_wrong_is_told_exactly() {
    let folder = root().join("tests/config");
    let base = fs::read_to_string(folder.join("base.toml")).expect("base.toml");
    let golden = fs::read_to_string(folder.join("errors.txt")).expect("errors.txt");
    let (mut blessed, mut wrong) = (String::new(), String::new());
    for line in golden.lines().take_while(|line| line.starts_with('#') && !line.starts_with("##")) {
        writeln!(blessed, "{line}").expect("a String");
    }
    let cases = cases(&golden);
    assert!(cases.len() > 100, "{} cases", cases.len());
    for case in cases {
        let told = match Config::parse(Path::new("f.toml"), &case.file(&base)) {
            Ok(config) => config.warnings.iter().map(|warning| format!("{warning}\n")).collect(),
            Err(errors) => format!("{errors}\n"),
        };
        assert!(!told.is_empty(), "nothing is wrong with {:?}", case.name);
        writeln!(blessed, "\n## {}", case.name).expect("a String");
        for (mark, lines) in [("-", &case.remove), ("+", &case.add)] {
            for line in lines {
                writeln!(blessed, "{}", format!("{mark} {line}").trim_end()).expect("a String");
            }
        }
        for line in told.lines() {
            writeln!(blessed, "{}", format!("> {line}").trim_end()).expect("a String");
        }
        if told.lines().map(str::trim_end).ne(case.expected.lines().map(str::trim_end)) {
            let Case { name, expected, .. } = case;
            writeln!(wrong, "## {name}\nexpected:\n{expected}told:\n{told}").expect("a String");
        }
    }
    if std::env::var_os("BATON_BLESS").is_some() {
        fs::write(folder.join("errors.txt"), blessed).expect("errors.txt can be written");
    } else {
        assert!(wrong.is_empty(), "{wrong}");
    }
}

#[test]
fn files_that_are_none_are_refused_with_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("baton.toml");
    let told = |path: &Path| {
        let errors = Config::load(path).expect_err("no file").to_string();
        errors.replace(&folder.path().display().to_string(), "DIR")
    };
    assert_eq!(
        told(&path),
        "DIR/baton.toml: error: there is no such file\n  \
         write one, beginning from a sample in config/, or name another with -c FILE"
    );
    assert_eq!(
        told(folder.path()),
        "DIR: error: this is a directory\n  name the file in it: -c DIRECTORY/FILE"
    );
    fs::write(&path, "#".repeat((1 << 20) + 1)).expect("written");
    assert_eq!(
        told(&path),
        "DIR/baton.toml: error: is longer than 1 MiB, so it is hardly a configuration\n  \
         name another file with -c FILE"
    );
    fs::write(&path, b"# one\n# two \xff\n").expect("written");
    assert_eq!(
        told(&path),
        "DIR/baton.toml: error: line 2 is not valid UTF-8\n  \
         save the file in UTF-8, the encoding of TOML"
    );
    fs::write(&path, "").expect("written");
    assert!(told(&path).contains("the file has no [node]"), "{}", told(&path));
}

#[test]
fn a_hundred_problems_are_told_and_the_rest_counted() {
    let text: String = (0..250).map(|number| format!("x{number} = 1\n")).collect();
    let errors = Config::parse(Path::new("f.toml"), &text).expect_err("unknown keys");
    assert_eq!(errors.problems().len(), 100);
    assert_eq!(errors.left_out(), 152, "250 unknown keys, no node, no services");
    assert!(errors.to_string().ends_with("\n… and 152 more"));
}

/// A file of the greatest size that is wrong in each of its keys is told of in good time.
#[test]
fn a_great_file_does_not_take_long() {
    let text: String = (0..60_000).map(|number| format!("x{number} = [1]\n")).collect();
    let start = std::time::Instant::now();
    assert!(Config::parse(Path::new("f.toml"), &text).is_err());
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

/// What is true of every file, right or wrong.
fn hold(text: &str) {
    let config = match Config::parse(Path::new("f.toml"), text) {
        Ok(config) => config,
        Err(errors) => {
            assert!(!errors.problems().is_empty());
            for problem in errors.problems() {
                assert!(!problem.what.is_empty() && !problem.hint.is_empty(), "{problem:?}");
                let place = problem.place.as_ref().expect("a place in the text");
                assert!(place.line >= 1 && place.column >= 1, "{problem:?}");
                assert!(place.line <= text.lines().count().max(1) + 1, "{problem:?}");
                assert!(!place.caret.is_empty(), "{problem:?}");
                assert!(place.caret.end <= place.text.chars().count().max(place.caret.start) + 1);
            }
            assert!(!errors.to_string().contains('\u{1b}'), "a terminal's escape gets through");
            return;
        }
    };
    assert!(!config.services.is_empty());
    for service in &config.services {
        assert!(!service.backends.is_empty());
        for backend in &service.backends {
            if service.mode != (Mode::Dsr { kind: Dsr::Ipip }) {
                assert_eq!(backend.address.is_ipv4(), service.listen.is_ipv4());
            }
            assert!(backend.weight >= 1 && backend.max_connections >= 1);
        }
        if let Some(check) = &service.check {
            assert!(check.timeout <= check.interval && !check.timeout.is_zero());
        }
        assert!(service.limits.max_connections_per_source <= service.limits.max_connections);
    }
    if let Some(ha) = &config.ha {
        assert!(!ha.vips.is_empty() && !ha.paths.is_empty());
        assert_eq!(ha.vips.len(), config.vip_names.len());
        assert!(ha.valid_lft.as_secs() >= 1 && ha.valid_lft.subsec_nanos() == 0);
        assert_eq!(ha.announce.schedule.first(), Some(&std::time::Duration::ZERO));
        for path in &ha.paths {
            assert!((1..=255).contains(&path.addresses.len()));
            for address in &path.addresses {
                assert_eq!(baton_ha::config::Family::of(*address), path.family);
            }
        }
    }
    let described = baton::config::describe(&config);
    assert!(!described.is_empty() && !described.contains('\u{1b}'), "{described}");
    assert!(baton::config::describe_json(&config).is_object());
    assert_eq!(baton::config::reload_blockers(&config, &config), Vec::<String>::new());
}

/// The lines of every sample.
fn lines() -> Vec<String> {
    samples()
        .iter()
        .flat_map(|path| {
            let text = fs::read_to_string(path).expect("a sample");
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect()
}

/// Values of every kind, to be put where others belong.
const VALUES: &[&str] = &[
    "0",
    "-1",
    "1",
    "65536",
    "9999999999999999999999",
    "0x7fffffffffffffff",
    "1.5",
    "nan",
    "true",
    "\"\"",
    "\"0s\"",
    "\"-1s\"",
    "\"99999999999s\"",
    "\"0.000000001h\"",
    "\"\\u001b[31m\"",
    "[]",
    "[[]]",
    "[\"\"]",
    "{}",
    "{ name = 1 }",
    "1979-05-27",
    "\"::\"",
    "\"0.0.0.0:1\"",
    "\"[::]:80\"",
    "\"255.255.255.255/32\"",
    "\"10.77.0.100/0\"",
    "\"fe80::1/64\"",
    "\"fe80::1%lo\"",
    "\"é\"",
];

#[test]
fn a_sample_with_a_line_left_out_or_twice_is_told_of() {
    for path in samples() {
        let text = fs::read_to_string(&path).expect("a sample");
        let lines: Vec<&str> = text.lines().collect();
        for at in 0..lines.len() {
            let mut fewer = lines.clone();
            fewer.remove(at);
            hold(&fewer.join("\n"));
            let mut more = lines.clone();
            more.insert(at, lines[at]);
            hold(&more.join("\n"));
        }
    }
}

#[test]
fn a_sample_with_any_value_replaced_is_told_of() {
    for path in samples() {
        let text = fs::read_to_string(&path).expect("a sample");
        let lines: Vec<&str> = text.lines().collect();
        for at in 0..lines.len() {
            let Some((key, _)) = lines[at].split_once(" = ") else { continue };
            for value in VALUES {
                let changed = format!("{key} = {value}");
                let mut lines = lines.clone();
                lines[at] = &changed;
                hold(&lines.join("\n"));
            }
        }
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_told_of(text in "\\PC{0,200}|[\\x00-\\x7f]{0,200}") {
        hold(&text);
    }

    #[test]
    fn any_lines_of_the_samples_are_read_or_told_of(
        order in proptest::collection::vec(any::<proptest::sample::Index>(), 0..60),
    ) {
        let lines = lines();
        let text: Vec<&str> = order.iter().map(|at| at.get(&lines).as_str()).collect();
        hold(&text.join("\n"));
    }

    #[test]
    fn a_sample_with_bytes_changed_is_read_or_told_of(
        which in any::<proptest::sample::Index>(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<char>()), 1..6),
    ) {
        let samples = samples();
        let text = fs::read_to_string(which.get(&samples)).expect("a sample");
        let mut chars: Vec<char> = text.chars().collect();
        for (at, change) in changes {
            let at = at.index(chars.len());
            chars[at] = change;
        }
        hold(&chars.into_iter().collect::<String>());
    }
}

#[test]
fn a_pairs_file_is_described() {
    let config = Config::load(&root().join("config/relay1.toml")).expect("correct");
    let expected = "\
node      relay1: one worker per core, control /run/baton/control.sock
          after SIGTERM connections on own addresses have 10s to end, those on VIPs none
          decisions are written down in /var/lib/baton/relay1/journal.jsonl
cluster   lab with relay2 (10.77.0.3, 10.78.0.3)
election  VRID 51, priority 200: takes over from a lower priority
          adverts every 100ms on front, IPv4: multicast
          adverts every 100ms on back, IPv4: multicast
          IPv4 checksum: pseudo-header
          Active_Down_Interval 321.9ms: as Backup it claims this long after the last advert
          the kernel removes a VIP 2s after its last refresh
          VIPs are announced 0s, 20ms, 100ms, 300ms, 1s, 3s after the claim,
          then every 30s, and at a rival, at most every 100ms

VIP    ADDRESS         INTERFACE  SERVICES
socks  10.77.0.100/24  front      socks

SERVICE  LISTENS ON            MODE   SCHEDULER    CHECK  CONNECTIONS  PER SOURCE  IDLE  AFFINITY  PROXY HEADER
socks    10.77.0.100:1080/tcp  proxy  source-hash  socks        10000        1000  1h    -         off

SERVICE  BACKEND  ADDRESS          WEIGHT  CONNECTIONS
socks    dante1   10.78.0.11:1080       1        10000
socks    dante2   10.78.0.12:1080       1        10000

CHECK  EVERY  TIMEOUT  UP AFTER  DOWN AFTER  PROBE
socks  2s     1s              2           3  socks5 CONNECT 10.78.0.1:80
";
    assert_eq!(baton::config::describe(&config), expected);
}

#[test]
fn the_backup_waits_longer_by_its_skew() {
    let config = Config::load(&root().join("config/relay2.toml")).expect("correct");
    let ha = config.ha.as_ref().expect("VIPs");
    assert_eq!(baton::config::active_down_interval(ha).as_micros(), 360_937);
    let json = baton::config::describe_json(&config);
    assert_eq!(json["election"]["active_down_interval_us"], 360_937);
    assert_eq!(json["vips"][0]["name"], "socks");
    assert_eq!(json["services"][0]["vip"], "socks");
    assert_eq!(json["services"][0]["backends"][1]["address"], "10.78.0.12:1080");
    assert_eq!(json["checks"][0]["probe"]["type"], "socks5");
}

#[test]
fn a_password_is_never_printed() {
    let config = Config::load(&root().join("config/full.toml")).expect("correct");
    let text = baton::config::describe(&config);
    let json = baton::config::describe_json(&config).to_string();
    assert!(text.contains("as probe") && json.contains("\"username\":\"probe\""));
    assert!(!text.contains("secret") && !json.contains("secret"));
}

#[test]
fn a_standalone_file_has_no_election() {
    let config = Config::load(&root().join("config/standalone.toml")).expect("correct");
    assert!(config.ha.is_none());
    let text = baton::config::describe(&config);
    assert!(text.contains("election  none: no VIPs"), "{text}");
    assert!(baton::config::describe_json(&config)["election"].is_null());
}

/// A namespace that is removed when the test is over, however it ends.
struct Namespace(Netns);

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("{}: {error}", self.0.name());
        }
    }
}

#[test]
fn a_real_machine_is_looked_at() {
    let netns = Netns::create(&format!("bt-config-{}", std::process::id())).expect("a namespace");
    let Namespace(netns) = &Namespace(netns);
    let config = Config::load(&root().join("config/relay1.toml")).expect("correct");
    let whats = || {
        let read = netns.enter(|| System::read(&config)).expect("entered");
        match config.check_system(&read.expect("interfaces")) {
            Ok(warnings) => warnings,
            Err(errors) => errors.problems().to_vec(),
        }
        .into_iter()
        .map(|problem| problem.what)
        .collect::<Vec<_>>()
    };
    let missing = |name: &str| format!("this machine has no interface {name:?}");
    assert_eq!(whats(), [missing("back"), missing("front")]);

    netns.ip("link add front type veth peer name back").expect("a veth pair");
    assert_eq!(
        whats(),
        [
            "\"back\" has no IPv4 address to send adverts from",
            "\"front\" has no IPv4 address of its own, so it can't carry 10.77.0.100",
        ]
    );

    // An interface that is down has its addresses too.
    netns.ip("addr add 10.77.0.2/24 dev front").expect("an address");
    netns.ip("addr add 10.78.0.2/24 dev back").expect("an address");
    assert_eq!(whats(), Vec::<String>::new());

    let vip = "addr add 10.77.0.100/24 dev front valid_lft 60 preferred_lft 60";
    netns.ip(vip).expect("the VIP");
    assert_eq!(whats(), Vec::<String>::new(), "on the Active node");

    // The VIP goes with the first address of its network.
    netns.ip("addr del 10.77.0.2/24 dev front").expect("removed");
    netns.ip(vip).expect("the VIP");
    assert_eq!(whats().len(), 1, "the VIP alone is no address to send adverts from");
}
