//! What is not ours, or not right: counted, logged at a bounded rate, and nothing changes.

mod ha_support;

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use baton_ha::announce::{ArpOperation, RouterFlag, gratuitous_arp, unsolicited_na};
use baton_ha::config::ChecksumForm;
use baton_ha::vrrp::packet::{Ends, GROUP_V4, GROUP_V6, Message};
use baton_ha::vrrp::router::State;
use baton_ha::vrrp::{AdverInterval, Priority, Vrid};
use ha_support::*;
use pnet_packet::util;

const SENDER4: &str = "10.77.0.3";
const SENDER6: &str = "fd77::3";
const SENDER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];

/// The VRRP message of a rival that would win, if it were right.
fn advert(source: IpAddr, vrid: u8, addresses: &[&str]) -> Vec<u8> {
    let destination = match source {
        IpAddr::V4(_) => IpAddr::from(GROUP_V4),
        IpAddr::V6(_) => IpAddr::from(GROUP_V6),
    };
    let addresses: Vec<IpAddr> = addresses.iter().map(|address| ip(address)).collect();
    Message {
        vrid: Vrid::new(vrid).unwrap(),
        priority: Priority::new(254),
        interval: AdverInterval::from_centiseconds(10).unwrap(),
        addresses: &addresses,
    }
    .encode(&Ends::new(source, destination).unwrap(), ChecksumForm::Plain)
    .unwrap()
}

/// An Ethernet frame with an IPv4 packet to the VRRP group.
fn frame_v4(source: &str, ttl: u8, message: &[u8]) -> Vec<u8> {
    frame_v4_to(GROUP_V4, source, ttl, message)
}

/// An Ethernet multicast frame with an IPv4 packet.
fn frame_v4_to(destination: Ipv4Addr, source: &str, ttl: u8, message: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0xc0];
    header.extend(u16::try_from(20 + message.len()).unwrap().to_be_bytes());
    header.extend([0, 1, 0, 0, ttl, 112, 0, 0]);
    header.extend(source.parse::<Ipv4Addr>().unwrap().octets());
    header.extend(destination.octets());
    let checksum = util::checksum(&header, 5);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = vec![1, 0, 0x5e, 0, 0, 18];
    frame.extend(SENDER_MAC);
    frame.extend([8, 0]);
    frame.extend(header);
    frame.extend(message);
    frame
}

/// An Ethernet frame with an IPv6 packet to the VRRP group.
fn frame_v6(source: &str, hops: u8, message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 0x12];
    frame.extend(SENDER_MAC);
    frame.extend([0x86, 0xdd, 0x6c, 0, 0, 0]);
    frame.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend([112, hops]);
    frame.extend(source.parse::<std::net::Ipv6Addr>().unwrap().octets());
    frame.extend(GROUP_V6.octets());
    frame.extend(message);
    frame
}

/// Changes one byte.
fn with(mut message: Vec<u8>, place: usize, value: u8) -> Vec<u8> {
    message[place] = value;
    message
}

#[test]
fn malformed_adverts_are_counted_and_change_nothing() {
    let _alone = alone();
    let lab = Lab::new(2);
    let active = lab.start(0, &Spec::new(100, 10));
    lab.wait_for_holder(0, &[VIP4, VIP6], seconds(5));
    let good4 = || advert(ip(SENDER4), VRID, &[VIP4]);
    let good6 = || advert(ip(SENDER6), VRID, &[VIP6]);
    let v4 = |message: Vec<u8>| frame_v4(SENDER4, 255, &message);
    let v6 = |message: Vec<u8>| frame_v6(SENDER6, 255, &message);
    let own6 = {
        let link_local = active.view().paths[1].primary.unwrap().to_string();
        frame_v6(&link_local, 255, &good6())
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("advert_truncated", v4(good4()[..5].to_vec())),
        ("advert_truncated", v6(Vec::new())),
        ("advert_length", v4(good4()[..10].to_vec())),
        ("advert_length", v6([good6(), vec![0; 7]].concat())),
        ("advert_version", v4(with(good4(), 0, 0x21))),
        ("advert_type", v4(with(good4(), 0, 0x32))),
        ("advert_no_addresses", v4(with(good4(), 3, 0))),
        ("advert_checksum", v4(with(good4(), 2, 253))),
        ("advert_checksum", v6(with(good6(), 2, 253))),
        ("advert_other_vrid", v4(advert(ip(SENDER4), VRID + 1, &[VIP4]))),
        ("advert_ttl", frame_v4(SENDER4, 254, &good4())),
        ("advert_ttl", frame_v6(SENDER6, 1, &good6())),
        ("advert_own_source", frame_v4("10.77.0.2", 255, &advert(ip("10.77.0.2"), VRID, &[VIP4]))),
        ("advert_own_source", own6),
    ];
    // The checks of the kernel itself: a martian source, an own address, from outside.
    run_sysctl(&lab, 0, "net.ipv4.conf.all.accept_local=1");
    run_sysctl(&lab, 0, "net.ipv4.conf.front.accept_local=1");
    run_sysctl(&lab, 0, "net.ipv4.conf.all.rp_filter=0");
    run_sysctl(&lab, 0, "net.ipv4.conf.front.rp_filter=0");
    for (counter, frame) in cases {
        let before = active.counter(counter);
        assert_eq!(send_frames(&lab, 1, &vec![frame.clone(); 10]), 10);
        until(seconds(3), counter, || active.counter(counter) == before + 10);
        assert_eq!(active.state(), State::Active, "{counter}");
    }
    assert_eq!(active.counter("advert_received"), 0);
    assert!(active.view().heard.is_empty());
    assert!(lab.has(0, VIP4) && lab.has(0, VIP6));
    // And the same advert without a fault would have done it: these cases can fail.
    send_frames(&lab, 1, &[v4(good4())]);
    active.wait_for(State::Backup, seconds(1));
}

#[test]
fn on_a_unicast_path_only_peers_are_heard() {
    let _alone = alone();
    let lab = Lab::new(2);
    let active = lab.start(0, &Spec { paths: "4u", ..Spec::new(100, 10) });
    active.wait_for(State::Active, seconds(5));
    let to_it = |source: &str| {
        let message = advert(ip(source), VRID, &[VIP4]);
        frame_v4_to("10.77.0.2".parse().unwrap(), source, 255, &message)
    };
    send_frames(&lab, 1, &vec![to_it("10.77.0.66"); 10]);
    until(seconds(3), "counted", || active.counter("advert_stranger") == 10);
    assert_eq!(active.state(), State::Active);
    assert!(active.view().heard.is_empty());
    // The same from its peer is heard.
    send_frames(&lab, 1, &[to_it(SENDER4)]);
    active.wait_for(State::Backup, seconds(1));
}

#[test]
fn adverts_that_list_other_addresses_count_all_the_same() {
    let _alone = alone();
    let lab = Lab::new(2);
    let active = lab.start(0, &Spec::new(100, 10));
    active.wait_for(State::Active, seconds(5));
    let message = advert(ip(SENDER4), VRID, &["10.77.0.200"]);
    send_frames(&lab, 1, &[frame_v4(SENDER4, 255, &message)]);
    active.wait_for(State::Backup, seconds(1));
    assert_eq!(active.counter("addresses_differ"), 1);
}

#[test]
fn arp_and_na_garbage_changes_nothing() {
    let _alone = alone();
    let lab = Lab::new(2);
    let active = lab.start(0, &Spec::new(100, 10));
    active.wait_for(State::Active, seconds(5));
    let vip6 = VIP6.parse().unwrap();
    let arp = gratuitous_arp(SENDER_MAC, VIP4.parse().unwrap(), ArpOperation::Reply).to_vec();
    let na = unsolicited_na(SENDER_MAC, vip6, vip6, RouterFlag::Host).to_vec();
    // Cut short, with an IPv6 header that says so: a bridge drops what contradicts itself.
    let short_na = with(na[..70].to_vec(), 19, 16);
    let garbage = [
        arp[..30].to_vec(),
        with(arp.clone(), 21, 9),
        with(arp.clone(), 18, 7),
        short_na,
        with(na.clone(), 60, 0xee),
        with(na.clone(), 21, 64),
    ];
    for (case, frame) in garbage.into_iter().enumerate() {
        let before = active.counter("frame_garbage");
        assert_eq!(send_frames(&lab, 1, &vec![frame; 7]), 7);
        until(seconds(3), &format!("case {case}"), || {
            active.counter("frame_garbage") == before + 7
        });
    }
    // Clients ask for the VIP, and say who they are: no evidence of anything.
    let question = {
        let mut frame =
            gratuitous_arp(SENDER_MAC, "10.77.0.10".parse().unwrap(), ArpOperation::Request);
        frame[38..42].copy_from_slice(&[10, 77, 0, 100]);
        frame.to_vec()
    };
    send_frames(&lab, 1, &[question]);
    let sender6 = SENDER6.parse().unwrap();
    send_frames(
        &lab,
        1,
        &[unsolicited_na(SENDER_MAC, sender6, sender6, RouterFlag::Host).to_vec()],
    );
    std::thread::sleep(Duration::from_millis(1200)); // The view shows counters once a second.
    assert_eq!((active.counter("rival_arp"), active.counter("rival_na")), (0, 0));
    // And without a fault they are evidence: these cases can fail.
    send_frames(&lab, 1, &[arp, na]);
    until(seconds(1), "evidence", || {
        active.counter("rival_arp") == 1 && active.counter("rival_na") == 1
    });
    assert_eq!(active.state(), State::Active);
}

#[test]
fn a_flood_does_not_keep_the_active_from_advertising_nor_a_backup_from_hearing() {
    let _alone = alone();
    let lab = Lab::new(3);
    let active = lab.start(0, &Spec { paths: "4m", ..Spec::new(200, 10) });
    active.wait_for(State::Active, seconds(5));
    let backup = lab.start(1, &Spec { paths: "4m", ..Spec::new(100, 10) });
    backup.wait_for(State::Backup, seconds(1));
    let garbage = frame_v4("10.77.0.4", 255, &with(advert(ip("10.77.0.4"), VRID, &[VIP4]), 2, 3));
    let batch = vec![garbage; 50];
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < seconds(2) {
        sent += send_frames(&lab, 2, &batch);
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("{sent} malformed adverts in {:?}", start.elapsed());
    assert_eq!((active.state(), backup.state()), (State::Active, State::Backup));
    assert_eq!((active.view().takeovers, backup.view().takeovers), (1, 0));
}

fn run_sysctl(lab: &Lab, node: usize, setting: &str) {
    baton::lab::netns::run(lab.nodes[node].command("sysctl").args(["-qw", setting])).unwrap();
}
