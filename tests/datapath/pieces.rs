//! Frames cut into fragments.

use pnet_packet::ipv4::{self, MutableIpv4Packet};

use crate::packet::{ETHERNET, IPV4, IPV6};

/// The protocol number of IPv6's fragment header.
const FRAGMENT_HEADER: u8 = 44;

/// A frame cut into fragments that carry `size` bytes each (a multiple of 8).
pub(crate) fn cut(frame: &[u8], id: u32, size: usize) -> Vec<Vec<u8>> {
    assert_eq!(size % 8, 0);
    let ipv4 = frame[12..14] == [8, 0];
    let l4 = ETHERNET + if ipv4 { IPV4 } else { IPV6 };
    let chunks: Vec<_> = frame[l4..].chunks(size).collect();
    let last = chunks.len() - 1;
    let fragment = |(nth, chunk): (usize, &&[u8])| {
        let place = (nth * size) as u16;
        let mut bytes = frame[..l4].to_vec();
        if ipv4 {
            bytes.extend(*chunk);
            fix(&mut bytes, |ip| {
                ip.set_identification(id as u16);
                ip.set_total_length((IPV4 + chunk.len()) as u16);
                ip.set_fragment_offset(place / 8);
                ip.set_flags(u8::from(nth != last));
            });
        } else {
            bytes.extend([frame[ETHERNET + 6], 0]);
            bytes.extend((place | u16::from(nth != last)).to_be_bytes());
            bytes.extend(id.to_be_bytes());
            bytes.extend(*chunk);
            bytes[ETHERNET + 6] = FRAGMENT_HEADER;
            let length = (8 + chunk.len()) as u16;
            bytes[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&length.to_be_bytes());
        }
        bytes
    };
    chunks.iter().enumerate().map(fragment).collect()
}

/// Changes an IPv4 header and puts its checksum right.
pub(crate) fn fix(frame: &mut [u8], change: impl FnOnce(&mut MutableIpv4Packet<'_>)) {
    let mut ip = MutableIpv4Packet::new(&mut frame[ETHERNET..]).unwrap();
    change(&mut ip);
    let checksum = ipv4::checksum(&ip.to_immutable());
    ip.set_checksum(checksum);
}
