//! A SOCKS5 client (RFC 1928) as small as can be, with BIND and UDP ASSOCIATE.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};

use socket2::{Domain, Socket, Type};

use crate::pool::{PATIENCE, VIP, socket};

pub(crate) const CONNECT: u8 = 1;
pub(crate) const BIND: u8 = 2;
pub(crate) const UDP_ASSOCIATE: u8 = 3;

/// Connects to the VIP from this address and greets; to be called inside the client.
pub(crate) fn greet(source: Ipv4Addr) -> io::Result<TcpStream> {
    let control = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    control.bind(&SocketAddr::from((source, 0)).into())?;
    control.connect_timeout(&socket(VIP).into(), PATIENCE)?;
    let mut control = TcpStream::from(control);
    control.set_read_timeout(Some(PATIENCE))?;
    control.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    control.read_exact(&mut method)?;
    assert_eq!(method, [5, 0]);
    Ok(control)
}

/// Sends a request and reads its reply.
pub(crate) fn request(
    control: &mut TcpStream,
    command: u8,
    address: SocketAddrV4,
) -> io::Result<Result<SocketAddrV4, u8>> {
    let mut bytes = vec![5, command, 0, 1];
    bytes.extend(address.ip().octets());
    bytes.extend(address.port().to_be_bytes());
    control.write_all(&bytes)?;
    reply(control)
}

/// Reads a reply: BND.ADDR and BND.PORT, or the code of the refusal.
pub(crate) fn reply(control: &mut TcpStream) -> io::Result<Result<SocketAddrV4, u8>> {
    let mut bytes = [0; 10];
    control.read_exact(&mut bytes)?;
    let [5, code, 0, 1, a, b, c, d, high, low] = bytes else { panic!("{bytes:?}") };
    let bound = SocketAddrV4::new([a, b, c, d].into(), u16::from_be_bytes([high, low]));
    Ok(if code == 0 { Ok(bound) } else { Err(code) })
}

/// Fetches what the web server says through the VIP: the address of the Dante server that came.
pub(crate) fn fetch(source: Ipv4Addr, web: SocketAddrV4) -> io::Result<IpAddr> {
    let mut control = greet(source)?;
    request(&mut control, CONNECT, web)?.expect("it connects");
    control.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    control.read_to_string(&mut text)?;
    let body = text.rsplit("\r\n").next().expect("a body");
    Ok(body.parse().unwrap_or_else(|_| panic!("{text}")))
}

/// A datagram with the header of UDP ASSOCIATE for this destination.
pub(crate) fn datagram(to: SocketAddrV4, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 1];
    bytes.extend(to.ip().octets());
    bytes.extend(to.port().to_be_bytes());
    bytes.extend(data);
    bytes
}
