//! The advert on the wire: golden packets both ways, each reason to reject, and properties.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use baton_ha::config::ChecksumForm;
use baton_ha::vrrp::packet::{
    DecodeError, EncodeError, Ends, Envelope, Message, Received, Receiver, decode, open_ipv4,
};
use baton_ha::vrrp::{AdverInterval, Priority, Vrid};
use proptest::prelude::*;

/// What keepalived 2.2.7 sent as it stopped, with its IPv4 header: VRID 51, `advert_int 0.1`,
/// 10.77.0.100 and .101 from 10.77.0.2.
const KEEPALIVED_V4: &str = "45c00024003a0000ff70d00e0a4d0002e0000012\
                             31330002000ace7b0a4d00640a4d0065";

/// The same advert without pseudo-header, summed by hand:
/// 3133 + 0002 + 000a + 0a4d + 0064 + 0a4d + 0065 = 46a2, of which b95d is the complement.
const PLAIN_V4: &str = "31330002000ab95d0a4d00640a4d0065";

/// What keepalived 2.2.7 sent as Active: VRID 52, priority 101, `advert_int 1`, fe80::5:1 and
/// fd77::100 from fe80::e82e:77ff:fe26:3f56.
const KEEPALIVED_V6: &str = "313465020064d08c\
                             fe800000000000000000000000050001fd770000000000000000000000000100";

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn ends(source: &str, destination: &str) -> Ends {
    Ends::new(source.parse().unwrap(), destination.parse().unwrap()).unwrap()
}

fn v4() -> Ends {
    ends("10.77.0.2", "224.0.0.18")
}

fn v6() -> Ends {
    ends("fe80::e82e:77ff:fe26:3f56", "ff02::12")
}

fn addresses(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

fn receiver(vrid: u8) -> Receiver<'static> {
    Receiver { vrid: Vrid::new(vrid).unwrap(), own: &[] }
}

fn decode_on_link<'a>(bytes: &'a [u8], ends: Ends, vrid: u8) -> Result<Received<'a>, DecodeError> {
    decode(bytes, &Envelope { ends, ttl: 255 }, &receiver(vrid))
}

#[test]
fn keepalived_ipv4_is_read() {
    let datagram = bytes(KEEPALIVED_V4);
    let (envelope, payload) = open_ipv4(&datagram).unwrap();
    assert_eq!(envelope, Envelope { ends: v4(), ttl: 255 });
    let advert = decode(payload, &envelope, &receiver(51)).unwrap();
    assert_eq!(advert.priority, Priority::YIELD);
    assert_eq!(advert.interval, AdverInterval::from_centiseconds(10).unwrap());
    assert_eq!(advert.checksum, ChecksumForm::PseudoHeader);
    let listed: Vec<_> = advert.addresses.iter().collect();
    assert_eq!(listed, addresses(&["10.77.0.100", "10.77.0.101"]));
}

#[test]
fn ipv4_is_written_in_both_forms_and_both_are_read() {
    let list = addresses(&["10.77.0.100", "10.77.0.101"]);
    let message = Message {
        vrid: Vrid::new(51).unwrap(),
        priority: Priority::YIELD,
        interval: AdverInterval::from_centiseconds(10).unwrap(),
        addresses: &list,
    };
    let with = message.encode(&v4(), ChecksumForm::PseudoHeader).unwrap();
    assert_eq!(with, bytes(KEEPALIVED_V4)[20..]);
    let without = message.encode(&v4(), ChecksumForm::Plain).unwrap();
    assert_eq!(without, bytes(PLAIN_V4));
    for (written, form) in [(with, ChecksumForm::PseudoHeader), (without, ChecksumForm::Plain)] {
        assert_eq!(decode_on_link(&written, v4(), 51).unwrap().checksum, form);
    }
}

#[test]
fn ipv6_is_what_keepalived_says_whatever_form_is_asked_for() {
    let list = addresses(&["fe80::5:1", "fd77::100"]);
    let message = Message {
        vrid: Vrid::new(52).unwrap(),
        priority: Priority::new(101),
        interval: AdverInterval::from_centiseconds(100).unwrap(),
        addresses: &list,
    };
    for form in [ChecksumForm::Plain, ChecksumForm::PseudoHeader] {
        assert_eq!(message.encode(&v6(), form).unwrap(), bytes(KEEPALIVED_V6));
    }
    let golden = bytes(KEEPALIVED_V6);
    let advert = decode_on_link(&golden, v6(), 52).unwrap();
    assert_eq!(
        (advert.priority, advert.checksum),
        (Priority::new(101), ChecksumForm::PseudoHeader)
    );
    assert!(advert.addresses.iter().eq(list));
}

#[test]
fn an_ipv6_checksum_without_pseudo_header_is_bad() {
    let mut golden = bytes(KEEPALIVED_V6);
    golden[6..8].copy_from_slice(&[0, 0]);
    let sum = pnet_packet::util::checksum(&golden, 3);
    golden[6..8].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(decode_on_link(&golden, v6(), 52), Err(DecodeError::Checksum));
}

#[test]
fn each_fault_has_its_error() {
    // The golden packet with one byte changed, and its checksum put right.
    let changed = |at: usize, value: u8| {
        let mut packet = bytes(PLAIN_V4);
        packet[at] = value;
        let sum = pnet_packet::util::checksum(&packet, 3);
        packet[6..8].copy_from_slice(&sum.to_be_bytes());
        decode_on_link(&packet, v4(), 51).map(|advert| advert.interval.centiseconds())
    };
    assert_eq!(changed(0, 0x21), Err(DecodeError::Version(2)));
    assert_eq!(changed(0, 0x32), Err(DecodeError::Type(2)));
    assert_eq!(changed(1, 50), Err(DecodeError::OtherVrid(50)));
    assert_eq!(changed(3, 0), Err(DecodeError::NoAddresses));
    assert_eq!(changed(3, 1), Err(DecodeError::Length { expected: 12, have: 16 }));
    assert_eq!(changed(3, 255), Err(DecodeError::Length { expected: 1028, have: 16 }));
    assert_eq!(changed(5, 0), Err(DecodeError::Interval));
    assert_eq!(changed(4, 0xf0), Ok(10), "the reserved bits are ignored");
    assert_eq!(changed(4, 0x0f), Ok(0x0f0a));

    let golden = bytes(PLAIN_V4);
    let mut bad = golden.clone();
    bad[6] ^= 1;
    assert_eq!(decode_on_link(&bad, v4(), 51), Err(DecodeError::Checksum));
    let other = decode_on_link(&bad, ends("10.77.0.3", "224.0.0.18"), 51);
    assert_eq!(other, Err(DecodeError::Checksum));
    assert_eq!(decode_on_link(&golden[..7], v4(), 51), Err(DecodeError::Truncated(7)));
    for ttl in [0, 1, 254] {
        let read = decode(&golden, &Envelope { ends: v4(), ttl }, &receiver(51));
        assert_eq!(read, Err(DecodeError::Ttl(ttl)));
    }
    let own = addresses(&["10.77.0.9", "10.77.0.2"]);
    let receiver = Receiver { own: &own, ..receiver(51) };
    let read = decode(&golden, &Envelope { ends: v4(), ttl: 255 }, &receiver);
    assert_eq!(read, Err(DecodeError::OwnSource));
}

#[test]
fn another_virtual_router_is_told_apart_from_garbage() {
    // VRRPv2 of VRID 7, as older routers send it.
    let version_2 = bytes("2107640100016f4a0a4d0001");
    assert_eq!(decode_on_link(&version_2, v4(), 51), Err(DecodeError::OtherVrid(7)));
    assert_eq!(decode_on_link(&version_2, v4(), 7), Err(DecodeError::Version(2)));
}

#[test]
fn an_ipv4_datagram_is_opened_with_care() {
    let golden = bytes(KEEPALIVED_V4);
    let changed = |at: usize, value: u8| {
        let mut datagram = golden.clone();
        datagram[at] = value;
        open_ipv4(&datagram).map(|(_, payload)| payload.len())
    };
    assert_eq!(open_ipv4(&[]), Err(DecodeError::IpHeader(0)));
    assert_eq!(open_ipv4(&golden[..19]), Err(DecodeError::IpHeader(19)));
    assert_eq!(changed(0, 0x65), Err(DecodeError::IpVersion(6)));
    assert_eq!(changed(0, 0x44), Err(DecodeError::IpHeader(36)), "ihl below 5");
    assert_eq!(changed(0, 0x4f), Err(DecodeError::IpHeader(36)), "ihl past the end");
    assert_eq!(changed(3, 37), Err(DecodeError::IpLength { claimed: 37, have: 36 }));
    assert_eq!(changed(3, 19), Err(DecodeError::IpLength { claimed: 19, have: 36 }));
    assert_eq!(changed(6, 0x20), Err(DecodeError::Fragment), "more fragments");
    assert_eq!(changed(7, 1), Err(DecodeError::Fragment), "offset");
    assert_eq!(changed(6, 0x40), Ok(16), "don't fragment");
    assert_eq!(changed(9, 17), Err(DecodeError::Protocol(17)));

    // Router alert as an option, and Ethernet padding behind the total length.
    let mut options = golden.clone();
    options[0] = 0x46;
    options[3] = 40;
    options.splice(20..20, [0x94, 4, 0, 0]);
    options.extend([0; 10]);
    let (envelope, payload) = open_ipv4(&options).unwrap();
    assert_eq!(decode(payload, &envelope, &receiver(51)).unwrap().priority, Priority::YIELD);
}

#[test]
fn another_address_list_is_a_fact_and_no_fault() {
    let golden = bytes(PLAIN_V4);
    let listed = decode_on_link(&golden, v4(), 51).unwrap().addresses;
    assert!(listed.same_as(&addresses(&["10.77.0.100", "10.77.0.101"])));
    assert!(listed.same_as(&addresses(&["10.77.0.101", "10.77.0.100"])), "order does not count");
    assert!(!listed.same_as(&addresses(&["10.77.0.100"])));
    assert!(!listed.same_as(&addresses(&["10.77.0.100", "10.77.0.100"])));
    assert!(!listed.same_as(&addresses(&["10.77.0.100", "10.77.0.102"])));
    assert!(!listed.same_as(&addresses(&["10.77.0.100", "10.77.0.101", "10.77.0.102"])));
}

#[test]
fn what_cannot_be_written_is_refused() {
    let message = |addresses| Message {
        vrid: Vrid::new(1).unwrap(),
        priority: Priority::new(1),
        interval: AdverInterval::from_centiseconds(1).unwrap(),
        addresses,
    };
    let form = ChecksumForm::Plain;
    assert_eq!(message(&[]).encode(&v4(), form), Err(EncodeError::Count(0)));
    let many = vec![IpAddr::V4(Ipv4Addr::LOCALHOST); 256];
    assert_eq!(message(&many).encode(&v4(), form), Err(EncodeError::Count(256)));
    assert_eq!(message(&many[..255]).encode(&v4(), form).unwrap().len(), 8 + 255 * 4);
    let mixed = [many[0], IpAddr::V6(Ipv6Addr::LOCALHOST)];
    assert_eq!(message(&mixed).encode(&v4(), form), Err(EncodeError::Family(mixed[1])));
    assert_eq!(message(&mixed).encode(&v6(), form), Err(EncodeError::Family(mixed[0])));
    assert_eq!(Ends::new(mixed[0], mixed[1]), None);
}

/// An advert with its ends, of either family.
#[derive(Debug, Clone)]
struct Sample {
    ends: Ends,
    form: ChecksumForm,
    vrid: Vrid,
    priority: Priority,
    interval: AdverInterval,
    addresses: Vec<IpAddr>,
}

impl Sample {
    fn encode(&self) -> Vec<u8> {
        let message = Message {
            vrid: self.vrid,
            priority: self.priority,
            interval: self.interval,
            addresses: &self.addresses,
        };
        message.encode(&self.ends, self.form).unwrap()
    }

    fn decode<'a>(&self, bytes: &'a [u8]) -> Result<Received<'a>, DecodeError> {
        decode_on_link(bytes, self.ends, self.vrid.value())
    }
}

fn sample() -> impl Strategy<Value = Sample> {
    let v4 = (any::<(Ipv4Addr, Ipv4Addr)>(), prop::collection::vec(any::<Ipv4Addr>(), 1..=32))
        .prop_map(|((source, destination), list)| {
            (Ends::V4 { source, destination }, list.into_iter().map(IpAddr::V4).collect())
        });
    let v6 = (any::<(Ipv6Addr, Ipv6Addr)>(), prop::collection::vec(any::<Ipv6Addr>(), 1..=32))
        .prop_map(|((source, destination), list)| {
            (Ends::V6 { source, destination }, list.into_iter().map(IpAddr::V6).collect())
        });
    let form = prop_oneof![Just(ChecksumForm::Plain), Just(ChecksumForm::PseudoHeader)];
    (prop_oneof![v4, v6], form, 1..=255u8, any::<u8>(), 1..=4095u16).prop_map(
        |((ends, addresses), form, vrid, priority, interval): ((_, Vec<_>), _, _, _, _)| Sample {
            ends,
            form,
            vrid: Vrid::new(vrid).unwrap(),
            priority: Priority::new(priority),
            interval: AdverInterval::from_centiseconds(interval).unwrap(),
            addresses,
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(sample in sample()) {
        let bytes = sample.encode();
        let read = sample.decode(&bytes).unwrap();
        prop_assert_eq!(
            (read.vrid, read.priority, read.interval),
            (sample.vrid, sample.priority, sample.interval)
        );
        prop_assert!(read.addresses.iter().eq(sample.addresses.iter().copied()));
        prop_assert!(read.addresses.same_as(&sample.addresses));
    }

    #[test]
    fn every_truncation_is_rejected(sample in sample()) {
        let bytes = sample.encode();
        for length in 0..bytes.len() {
            prop_assert!(sample.decode(&bytes[..length]).is_err(), "{} bytes", length);
        }
    }

    #[test]
    fn a_flipped_bit_is_rejected_or_seen(sample in sample(), at in any::<prop::sample::Index>()) {
        let mut bytes = sample.encode();
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let intact = sample.encode();
        if let Ok(read) = sample.decode(&bytes) {
            prop_assert_ne!(read, sample.decode(&intact).unwrap());
        }
    }

    #[test]
    fn nothing_panics(
        bytes in prop::collection::vec(any::<u8>(), 0..1600),
        source in any::<Ipv6Addr>(),
        destination in any::<Ipv6Addr>(),
        vrid in 1..=255u8,
    ) {
        let _ = open_ipv4(&bytes).map(|(envelope, payload)| {
            decode(payload, &envelope, &receiver(vrid)).map(|read| read.addresses.iter().count())
        });
        let _ = decode_on_link(&bytes, Ends::V6 { source, destination }, vrid);
    }

    /// Bytes that pass the first checks, so that the later ones see something too.
    #[test]
    fn nothing_near_an_advert_panics(
        tail in prop::collection::vec(any::<u8>(), 0..64),
        count in any::<u8>(),
    ) {
        let mut bytes = vec![0x31, 51, 100, count, 0, 10];
        bytes.extend(tail);
        if let Ok(read) = decode_on_link(&bytes, v4(), 51) {
            prop_assert_eq!(read.addresses.iter().count(), usize::from(count));
        }
    }
}
