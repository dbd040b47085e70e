//! Servers in namespaces, and clients for them. A TCP server greets with its name and the
//! client's address as it sees it, on a line, and then echoes; a UDP server answers each datagram
//! with the same line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use baton::lab::netns::Netns;

use crate::net::PATIENCE;

/// Serves TCP and UDP on an address until the process ends.
pub(crate) fn serve(netns: &Netns, name: &'static str, address: &str) {
    let address: SocketAddr = address.parse().unwrap();
    let (listener, socket) = netns
        .enter(|| (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()))
        .unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            thread::spawn(move || greet_and_echo(name, stream));
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{name} {}", from.ip()).as_bytes(), from);
        }
    });
}

fn greet_and_echo(name: &str, mut stream: TcpStream) -> io::Result<()> {
    writeln!(stream, "{name} {}", stream.peer_addr()?.ip())?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    Ok(())
}

/// A client's connection, greeted.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) stream: TcpStream,
    /// The backend's name.
    pub(crate) backend: String,
    /// The client's address as the backend sees it.
    pub(crate) seen: IpAddr,
}

pub(crate) fn connect(netns: &Netns, to: &str, patience: Duration) -> io::Result<Session> {
    let address: SocketAddr = to.parse().unwrap();
    let stream = netns.enter(|| TcpStream::connect_timeout(&address, patience))??;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    // A byte at a time: nothing of what follows may stay in the buffer.
    BufReader::with_capacity(1, &stream).read_line(&mut line)?;
    let (backend, seen) = line.trim().split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
    let seen = seen.parse::<IpAddr>().map_err(io::Error::other)?;
    Ok(Session { backend: backend.to_owned(), seen, stream })
}

impl Session {
    /// Sends `size` bytes, few enough for the buffers on the way, there and back; what comes must
    /// be what went.
    pub(crate) fn try_echo(&mut self, size: usize) -> io::Result<()> {
        let sent: Vec<u8> = (0..size).map(|n| (n * 31 + n / 251) as u8).collect();
        let mut came = vec![0; size];
        self.stream.write_all(&sent)?;
        self.stream.read_exact(&mut came)?;
        if came == sent { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Sends `size` bytes there and back; what comes must be what went.
    pub(crate) fn echo(&mut self, size: usize) {
        let sent: Vec<u8> = (0..size).map(|n| (n * 31 + n / 251) as u8).collect();
        let mut writer = self.stream.try_clone().unwrap();
        let mut came = vec![0; size];
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&sent).unwrap());
            self.stream.read_exact(&mut came).unwrap();
        });
        assert!(came == sent, "{size} bytes came back changed");
    }
}

/// One datagram and its answer: the backend's name, and the client as it sees it.
pub(crate) fn ask(netns: &Netns, to: &str) -> io::Result<(String, IpAddr)> {
    let address: SocketAddr = to.parse().unwrap();
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = netns.enter(|| UdpSocket::bind(any))??;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    // Connected: an answer from anybody else is not taken.
    socket.connect(address)?;
    let mut buffer = [0; 256];
    for _ in 0..10 {
        socket.send(b"who")?;
        if let Ok(length) = socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let (name, seen) = text.split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
            return Ok((name.to_owned(), seen.parse().map_err(io::Error::other)?));
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}
