//! What we write, read by Debian's tcpdump: a decoder that is not ours.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;

use baton_ha::announce::{ArpOperation, Mac, RouterFlag, gratuitous_arp, unsolicited_na};
use baton_ha::config::ChecksumForm;
use baton_ha::vrrp::packet::{Ends, GROUP_V4, GROUP_V6, Message, PROTOCOL, TTL};
use baton_ha::vrrp::{AdverInterval, Priority, Vrid};

const MAC: Mac = [2, 0, 0, 0, 0, 0xa1];

/// What `tcpdump -nn -v -e` prints for these frames. A tcpdump that is missing fails the test.
fn tcpdump(name: &str, frames: &[Vec<u8>]) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("{name}-{}.pcap", std::process::id()));
    let mut pcap = Vec::new();
    pcap.extend(0xa1b2_c3d4_u32.to_le_bytes());
    pcap.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    pcap.extend(65_535_u32.to_le_bytes());
    pcap.extend(1_u32.to_le_bytes());
    for frame in frames {
        let length = u32::try_from(frame.len()).unwrap().to_le_bytes();
        pcap.extend([0; 8]);
        pcap.extend(length);
        pcap.extend(length);
        pcap.extend(frame);
    }
    std::fs::File::create(&path).unwrap().write_all(&pcap).unwrap();
    let output = Command::new("tcpdump")
        .args(["-nn", "-v", "-e", "-t", "-r"])
        .arg(&path)
        .output()
        .expect("tcpdump runs: apt-get install tcpdump");
    std::fs::remove_file(&path).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn advert(ends: &Ends, form: ChecksumForm, list: &[&str]) -> Vec<u8> {
    let addresses: Vec<IpAddr> = list.iter().map(|address| address.parse().unwrap()).collect();
    let message = Message {
        vrid: Vrid::new(51).unwrap(),
        priority: Priority::new(203),
        interval: AdverInterval::from_centiseconds(4095).unwrap(),
        addresses: &addresses,
    };
    message.encode(ends, form).unwrap()
}

/// The advert as a frame to its group.
fn frame(ends: &Ends, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    match ends {
        Ends::V4 { source, destination } => {
            frame.extend([1, 0, 0x5e, 0, 0, 0x12]);
            frame.extend(MAC);
            frame.extend([8, 0, 0x45, 0xc0]);
            frame.extend((20 + payload.len() as u16).to_be_bytes());
            frame.extend([0, 0, 0, 0, TTL, PROTOCOL, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
            let checksum = pnet_packet::util::checksum(&frame[14..34], 5);
            frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        Ends::V6 { source, destination } => {
            frame.extend([0x33, 0x33, 0, 0, 0, 0x12]);
            frame.extend(MAC);
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((payload.len() as u16).to_be_bytes());
            frame.extend([PROTOCOL, TTL]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
    }
    frame.extend(payload);
    frame
}

fn v4() -> Ends {
    Ends::V4 { source: Ipv4Addr::new(10, 77, 0, 2), destination: GROUP_V4 }
}

fn v6() -> Ends {
    let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
    Ends::V6 { source, destination: GROUP_V6 }
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn ipv4_adverts_are_read() {
    for (form, name) in [(ChecksumForm::PseudoHeader, "pseudo"), (ChecksumForm::Plain, "plain")] {
        let payload = advert(&v4(), form, &["10.77.0.100", "10.78.0.100"]);
        let text = tcpdump(name, &[frame(&v4(), &payload)]);
        assert_says(&text, &["VRRPv3, Advertisement, vrid 51, prio 203, intvl 4095cs"]);
        assert_says(&text, &["addrs(2): 10.77.0.100,10.78.0.100"]);
        assert_says(&text, &["ttl 255", "10.77.0.2 > 224.0.0.18"]);
        match form {
            ChecksumForm::PseudoHeader => {
                assert!(!text.contains("bad"), "{text}");
                assert_corruption_is_seen("pseudo-corrupt", &v4(), &payload);
            }
            // tcpdump 4.99 goes by RFC 5798 and calls the form of RFC 9568 bad.
            ChecksumForm::Plain => {}
        }
    }
}

#[test]
fn ipv6_adverts_are_read() {
    let payload = advert(&v6(), ChecksumForm::Plain, &["fe80::100", "fd77::100"]);
    let text = tcpdump("v6", &[frame(&v6(), &payload)]);
    assert_says(&text, &["VRRPv3, Advertisement, vrid 51, prio 203, intvl 4095cs"]);
    assert_says(&text, &["addrs(2): fe80::100,fd77::100"]);
    assert_says(&text, &["hlim 255", "fe80::2 > ff02::12"]);
    assert!(!text.contains("bad"), "{text}");
    assert_corruption_is_seen("v6-corrupt", &v6(), &payload);
}

/// That "bad" is absent means something only if tcpdump does check.
fn assert_corruption_is_seen(name: &str, ends: &Ends, payload: &[u8]) {
    let mut corrupt = payload.to_vec();
    corrupt[2] ^= 1;
    assert_says(&tcpdump(name, &[frame(ends, &corrupt)]), &["bad vrrp cksum"]);
}

#[test]
fn announcements_are_read() {
    let vip4 = Ipv4Addr::new(10, 77, 0, 100);
    let vip6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100);
    let text = tcpdump(
        "announce",
        &[
            gratuitous_arp(MAC, vip4, ArpOperation::Request).to_vec(),
            gratuitous_arp(MAC, vip4, ArpOperation::Reply).to_vec(),
            unsolicited_na(MAC, vip6, vip6, RouterFlag::Host).to_vec(),
        ],
    );
    assert_says(
        &text,
        &["02:00:00:00:00:a1 > ff:ff:ff:ff:ff:ff", "Request who-has 10.77.0.100 tell 10.77.0.100"],
    );
    assert_says(&text, &["Reply 10.77.0.100 is-at 02:00:00:00:00:a1"]);
    assert_says(&text, &["02:00:00:00:00:a1 > 33:33:00:00:00:01", "hlim 255"]);
    assert_says(
        &text,
        &["[icmp6 sum ok] ICMP6, neighbor advertisement", "tgt is fd77::100, Flags [override]"],
    );
    assert_says(&text, &["destination link-address option (2), length 8 (1): 02:00:00:00:00:a1"]);
}
