//! The PROXY protocol header that tells a backend who the client is (HAProxy's
//! `proxy-protocol.txt`, versions 1 and 2). Pure.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};

use crate::service::ProxyProtocol;

/// A header: at most 107 bytes (version 1, two IPv6 addresses).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    bytes: [u8; 107],
    len: usize,
}

/// What version 2 begins with.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

impl Header {
    /// The header for a TCP connection from `client` to `vip`; empty where it is off.
    pub(crate) fn new(version: ProxyProtocol, client: SocketAddr, vip: SocketAddr) -> Self {
        let mut header = Self { bytes: [0; 107], len: 0 };
        match version {
            ProxyProtocol::Off => {}
            ProxyProtocol::V1 => header.write_v1(client, vip),
            ProxyProtocol::V2 => header.write_v2(client, vip),
        }
        header
    }

    /// The header for a connection of this node's own, a check: it carries no addresses.
    pub(crate) fn local(version: ProxyProtocol) -> Self {
        let mut header = Self { bytes: [0; 107], len: 0 };
        match version {
            ProxyProtocol::Off => {}
            ProxyProtocol::V1 => header.push(b"PROXY UNKNOWN\r\n"),
            // Version 2, command LOCAL; no family, no protocol, nothing behind it.
            ProxyProtocol::V2 => {
                header.push(SIGNATURE);
                header.push(&[0x20, 0, 0, 0]);
            }
        }
        header
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn write_v1(&mut self, client: SocketAddr, vip: SocketAddr) {
        let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
        let mut rest = &mut self.bytes[..];
        let (from, to) = (client.ip(), vip.ip());
        let (from_port, to_port) = (client.port(), vip.port());
        write!(rest, "PROXY {family} {from} {to} {from_port} {to_port}\r\n")
            .expect("107 bytes hold the longest line of the specification");
        self.len = 107 - rest.len();
    }

    /// ```text
    ///  0                                            12    13    14          16
    /// +----------------------------------------------+-----+-----+-----------+
    /// | 0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A          | 2|1 |fam|1| length    |
    /// +----------------------------------------------+-----+-----+-----------+
    /// | source address | destination address | source port | destination port |
    /// +----------------+---------------------+-------------+------------------+
    /// ```
    fn write_v2(&mut self, client: SocketAddr, vip: SocketAddr) {
        self.push(SIGNATURE);
        // Version 2, command PROXY; then family (1: IPv4, 2: IPv6) and protocol (1: stream).
        let (family, length) = if client.is_ipv4() { (0x11, 12_u16) } else { (0x21, 36) };
        self.push(&[0x21, family]);
        self.push(&length.to_be_bytes());
        for address in [client.ip(), vip.ip()] {
            match address {
                IpAddr::V4(address) => self.push(&address.octets()),
                IpAddr::V6(address) => self.push(&address.octets()),
            }
        }
        self.push(&client.port().to_be_bytes());
        self.push(&vip.port().to_be_bytes());
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(version: ProxyProtocol, client: &str, vip: &str) -> Vec<u8> {
        let header = Header::new(version, client.parse().unwrap(), vip.parse().unwrap());
        header.as_bytes().to_vec()
    }

    #[test]
    fn off_is_nothing() {
        assert_eq!(bytes(ProxyProtocol::Off, "10.77.0.10:1", "10.77.0.100:2"), b"");
    }

    #[test]
    fn of_a_check() {
        let local = |version| Header::local(version).as_bytes().to_vec();
        assert_eq!(local(ProxyProtocol::Off), b"");
        assert_eq!(local(ProxyProtocol::V1), b"PROXY UNKNOWN\r\n");
        let v2 = b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A\x20\x00\x00\x00";
        assert_eq!(local(ProxyProtocol::V2), v2);
    }

    #[test]
    fn version_1() {
        assert_eq!(
            bytes(ProxyProtocol::V1, "10.77.0.10:56324", "10.77.0.100:443"),
            b"PROXY TCP4 10.77.0.10 10.77.0.100 56324 443\r\n"
        );
        assert_eq!(
            bytes(ProxyProtocol::V1, "[fd77::10]:56324", "[fd77::100]:443"),
            b"PROXY TCP6 fd77::10 fd77::100 56324 443\r\n"
        );
    }

    #[test]
    fn the_longest_version_1_fits() {
        let long = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        // 107 in the specification counts a terminating zero.
        assert_eq!(bytes(ProxyProtocol::V1, long, long).len(), 104);
    }

    #[test]
    fn version_2() {
        let signature = b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A";
        let v4 =
            [&signature[..], b"\x21\x11\x00\x0C\x0A\x4D\x00\x0A\x0A\x4D\x00\x64\xDC\x04\x01\xBB"]
                .concat();
        assert_eq!(bytes(ProxyProtocol::V2, "10.77.0.10:56324", "10.77.0.100:443"), v4);
        let v6 = [
            &signature[..],
            b"\x21\x21\x00\x24",
            b"\xFD\x77\0\0\0\0\0\0\0\0\0\0\0\0\0\x10",
            b"\xFD\x77\0\0\0\0\0\0\0\0\0\0\0\0\x01\x00",
            b"\xDC\x04\x01\xBB",
        ]
        .concat();
        assert_eq!(bytes(ProxyProtocol::V2, "[fd77::10]:56324", "[fd77::100]:443"), v6);
    }
}
