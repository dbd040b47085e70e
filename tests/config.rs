//! The samples in config/ load, and what is wrong with a file is told exactly.

use std::fs;
use std::path::{Path, PathBuf};

use baton::config::Config;

fn samples() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut samples: Vec<_> = fs::read_dir(folder)
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
    assert!(samples.len() >= 3, "{samples:?}");
    for path in samples {
        match Config::load(&path) {
            Ok(config) => assert_eq!(config.warnings, [], "{}", path.display()),
            Err(errors) => panic!("{errors}"),
        }
    }
}
