//! The HA driver in namespaces: real sockets, real addresses, real clocks.

mod ha_support;

use baton_ha::vrrp::router::State;
use ha_support::*;

#[test]
#[ignore = "what the other tests start as a process of its own"]
fn child_process() {
    ha_support::child_process();
}

#[test]
fn one_of_two_nodes_is_active_and_the_other_takes_over_when_it_dies() {
    let _alone = alone();
    let lab = Lab::new(2);
    let spec = Spec::new(200, 10);
    let active = lab.spawn(0, &spec);
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    let backup = lab.start(1, &Spec::new(100, 10));
    stays(seconds(1), "one holder", || lab.holders(VIP4) == [0] && lab.holders(VIP6) == [0]);
    assert_eq!(backup.state(), State::Backup);
    active.abort();
    backup.wait_for(State::Active, seconds(2));
    // The kernel of the dead node drops the VIPs by itself.
    lab.wait_for_holder(1, &[VIP4, VIP6], seconds(spec.valid_lft + 2));
}
