//! `[datapath]`: the tables in the kernel.

use super::Datapath;
use super::section::{DATAPATH, Section};
use super::value;
use crate::datapath::hooks::Choice;

/// Each flow takes some 230 bytes of kernel memory, so this is 15 GB.
pub(super) const MOST_FLOWS: u32 = 1 << 26;
const FEWEST_FLOWS: u32 = 256;

const HOOKS: &[(&str, Choice)] =
    &[("auto", Choice::Auto), ("tc", Choice::Tc), ("xdp", Choice::Xdp)];

/// `[datapath]`, with defaults for what is not there.
pub(super) fn read(root: &Section<'_>) -> Datapath {
    let default = Datapath::default();
    let Some(section) = root.section("datapath", &DATAPATH) else { return default };
    let count = || value::integer(FEWEST_FLOWS..=MOST_FLOWS);
    let flows = section.take("flows", count());
    let half_open = section.take("half_open_flows", count());
    let hook = section.take("hook", value::choice(HOOKS));
    let affinities = section.take("affinities", count());
    Datapath {
        hook: hook.map_or(default.hook, |at| at.value),
        flows: flows.map_or(default.flows, |at| at.value),
        half_open_flows: half_open.map_or(default.half_open_flows, |at| at.value),
        affinities: affinities.map_or(default.affinities, |at| at.value),
    }
}
