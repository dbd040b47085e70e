//! The property: whatever happens, the kernel does what the model does.

use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::held::in_a_relay;
use crate::story::story;

/// Stories, unless `PROPTEST_CASES` says otherwise: a few thousand frames, in seconds.
const STORIES: u32 = 200;

#[test]
fn the_kernel_does_what_the_model_does() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let stories = number("PROPTEST_CASES").unwrap_or(STORIES.into());
    let seed: u64 = number("BATON_SEED").unwrap_or(1);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    in_a_relay(|held| {
        for nth in 0..stories {
            let story = story().new_tree(&mut runner).expect("a story").current();
            if held.hold(&story).is_err() {
                let (story, differs) = held.cut_down(&story);
                panic!("story {nth} of seed {seed}, cut down to\n{story:#?}\n{differs}");
            }
        }
    });
}
