//! Frames from scratch: how they are put together, and the sums over all of their bytes. Nothing
//! here is incremental, so that it can tell whether what is incremental in the kernel is right.

use std::net::IpAddr;

pub(crate) const ETHERNET: usize = 14;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// The sum of 16-bit words in network order; an odd byte at the end is the high half of one.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | word.get(1).map_or(0, |&b| b.into())).sum()
}

/// The checksum field that makes a sum (taken with the field 0) come out right: RFC 1071.
pub(crate) fn checksum(sum: u64) -> u16 {
    // Ones' complement: 0 and 0xffff are the same number, and ~0xffff is how it is written.
    ((65535 - sum % 65535) % 65535) as u16
}

/// Whether a sum over a checksum too, and all that it covers, is as it must be.
pub(crate) fn comes_out(sum: u64) -> bool {
    sum.is_multiple_of(65535)
}

/// The sum of the pseudo-header: RFC 9293 §3.1, RFC 8200 §8.1.
pub(crate) fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u64 {
    sum(&octets(source)) + sum(&octets(destination)) + u64::from(protocol) + length as u64
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Where a transport header's checksum is.
pub(crate) fn checksum_at(protocol: u8) -> usize {
    if protocol == TCP { 16 } else { 6 }
}

/// An IPv6 extension header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Extension {
    /// Hop-by-hop or destination options, or another of the same form: type, 8-byte units after
    /// the first.
    Options(u8, u8),
    /// Routing, with that many segments left.
    Routing(u8),
    /// Fragment: offset in units of 8 bytes, and whether more follow.
    Fragment(u16, bool),
}

impl Extension {
    fn kind(&self) -> u8 {
        match self {
            Self::Options(kind, _) => *kind,
            Self::Routing(_) => 43,
            Self::Fragment(..) => 44,
        }
    }

    fn bytes(&self, next: u8, identification: u16) -> Vec<u8> {
        match *self {
            // PadN (RFC 8200 §4.2) over all of it.
            Self::Options(_, units) => {
                let mut bytes = vec![0; 8 * (usize::from(units) + 1)];
                let pad = bytes.len() - 4;
                bytes[..4].copy_from_slice(&[next, units, 1, pad.min(255) as u8]);
                bytes
            }
            Self::Routing(left) => vec![next, 0, 4, left, 0, 0, 0, 0],
            Self::Fragment(offset, more) => {
                let place = (offset << 3 | u16::from(more)).to_be_bytes();
                let [high, low] = identification.to_be_bytes();
                vec![next, 0, place[0], place[1], 0, 0, high, low]
            }
        }
    }
}

/// What a frame is built from.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub(crate) source: (IpAddr, u16),
    pub(crate) destination: (IpAddr, u16),
    pub(crate) protocol: u8,
    /// Of TCP: flags, sequence, acknowledgement.
    pub(crate) tcp: (u8, u32, u32),
    pub(crate) ttl: u8,
    /// Of IPv4, and of an IPv6 fragment.
    pub(crate) identification: u16,
    pub(crate) payload: usize,
    /// Tag protocol and tag, the outermost first.
    pub(crate) tags: Vec<(u16, u16)>,
    /// Of IPv4: 32-bit words of options. Of TCP too.
    pub(crate) option_words: usize,
    /// Of IPv4: flags and offset.
    pub(crate) fragment: u16,
    /// Of IPv6.
    pub(crate) extensions: Vec<Extension>,
}

/// Where the layers of a built frame begin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layers {
    pub(crate) network: usize,
    pub(crate) transport: usize,
}

impl Parts {
    /// The frame, every length and checksum right.
    pub(crate) fn build(&self) -> (Vec<u8>, Layers) {
        let (source, destination) = (self.source.0, self.destination.0);
        let mut transport = self.transport();
        let whole = pseudo(source, destination, self.protocol, transport.len()) + sum(&transport);
        let mut check = checksum(whole);
        if self.protocol == UDP && check == 0 {
            check = 0xffff;
        }
        let at = checksum_at(self.protocol);
        transport[at..at + 2].copy_from_slice(&check.to_be_bytes());
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for (protocol, tag) in &self.tags {
            frame.extend(protocol.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        let ethertype: u16 = if source.is_ipv4() { 0x0800 } else { 0x86dd };
        frame.extend(ethertype.to_be_bytes());
        let network = frame.len();
        frame.extend(match source {
            IpAddr::V4(_) => self.ipv4(transport.len()),
            IpAddr::V6(_) => self.ipv6(transport.len()),
        });
        let layers = Layers { network, transport: frame.len() };
        frame.extend(transport);
        (frame, layers)
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.1.to_be_bytes());
        bytes.extend(self.destination.1.to_be_bytes());
        if self.protocol == TCP {
            let (flags, sequence, acknowledgement) = self.tcp;
            bytes.extend(sequence.to_be_bytes());
            bytes.extend(acknowledgement.to_be_bytes());
            let words = 5 + self.option_words.min(10);
            bytes.extend([(words as u8) << 4, flags, 3, 0xe8, 0, 0, 0, 0]);
            // No-operation (RFC 9293 §3.2).
            bytes.resize(words * 4, 1);
        } else {
            bytes.extend((8 + self.payload as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend((0..self.payload).map(|n| (n * 37 + 11) as u8));
        bytes
    }

    fn ipv4(&self, transport: usize) -> Vec<u8> {
        let words = 5 + self.option_words.min(10);
        let mut ip = vec![0x40 | words as u8, 0];
        ip.extend(((words * 4 + transport) as u16).to_be_bytes());
        ip.extend(self.identification.to_be_bytes());
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([self.ttl, self.protocol, 0, 0]);
        ip.extend(octets(self.source.0));
        ip.extend(octets(self.destination.0));
        ip.resize(words * 4, 1);
        seal_ipv4(&mut ip);
        ip
    }

    fn ipv6(&self, transport: usize) -> Vec<u8> {
        let kinds = self.extensions.iter().map(Extension::kind).chain([self.protocol]);
        let mut next = kinds.skip(1);
        let headers: Vec<u8> = self
            .extensions
            .iter()
            .flat_map(|extension| extension.bytes(next.next().unwrap(), self.identification))
            .collect();
        let first = self.extensions.first().map_or(self.protocol, Extension::kind);
        let mut ip = vec![0x60, 0, 0, 0];
        ip.extend(((headers.len() + transport) as u16).to_be_bytes());
        ip.extend([first, self.ttl]);
        ip.extend(octets(self.source.0));
        ip.extend(octets(self.destination.0));
        ip.extend(headers);
        ip
    }
}

/// Puts an IPv4 header's checksum right.
pub(crate) fn seal_ipv4(header: &mut [u8]) {
    header[10..12].fill(0);
    let words = usize::from(header[0] & 15) * 4;
    let right = checksum(sum(&header[..words.clamp(12, header.len())]));
    header[10..12].copy_from_slice(&right.to_be_bytes());
}
