//! Compiles the programs for the kernel with clang and generates their Rust skeletons: the datapath
//! and the program on backends (`src/datapath/bpf`), and what the bench runs around it (`src/lab/bench/bpf`).

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libbpf_cargo::SkeletonBuilder;

/// Folder, and the object's name in it.
const SOURCES: [(&str, &str); 4] = [
    ("src/datapath/bpf", "datapath"),
    ("src/datapath/bpf", "backend"),
    ("src/lab/bench/bpf", "packets"),
    ("src/lab/bench/bpf", "handshake"),
];

fn main() -> ExitCode {
    for (folder, _) in SOURCES {
        // Cargo looks at every file in it.
        println!("cargo::rerun-if-changed={folder}");
    }
    println!("cargo::rerun-if-env-changed=CLANG");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    if let Err(error) = Command::new(&clang).arg("--version").output() {
        return Err(format!(
            "the kernel datapath is C that clang compiles for eBPF, and `{clang}` does not run: \
             {error}\ninstall it with `make setup` (Debian: apt-get install clang llvm), or name \
             another in the environment variable CLANG"
        ));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    SOURCES.into_iter().try_for_each(|(folder, name)| compile(folder, name, &clang, &arch, &out))
}

fn compile(folder: &str, name: &str, clang: &str, arch: &str, out: &Path) -> Result<(), String> {
    SkeletonBuilder::new()
        .source(Path::new(folder).join(format!("{name}.bpf.c")))
        .clang(clang)
        // v3: atomic operations that return a value, 32-bit arithmetic; in every kernel since
        // 5.12. The folder has asm/types.h, which Debian keeps apart for each architecture.
        .clang_args([
            "-mcpu=v3".to_owned(),
            "-Wall".to_owned(),
            "-Werror".to_owned(),
            format!("-I/usr/include/{arch}-linux-gnu"),
        ])
        .reference_obj(true)
        .build_and_generate(out.join(format!("{name}.skel.rs")))
        .map_err(|error| format!("{folder}/{name}.bpf.c does not compile: {error:#}"))
}
