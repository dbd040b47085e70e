//! The echo server of the backends, TCP and UDP on one port: what canary traffic talks to.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// Most TCP connections at once; further ones wait in the listen queue.
const MAX_CONNECTIONS: usize = 40_000;
const BACKLOG: i32 = 4096;
/// A failed accept (no descriptors left) is tried again after this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the process ends; every address of both families. Datagrams to an address of
/// `also` are answered from it; others from the address that leads to the client.
///
/// # Errors
/// The port is taken, or an address is not here.
pub fn serve(port: u16, also: &[IpAddr]) -> io::Result<()> {
    let any = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    // As many descriptors as there may be; where there are fewer, so many fewer are accepted.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        for address in also.iter().chain([&any]) {
            let udp = bind(SocketAddr::new(*address, port), Type::DGRAM)?;
            tokio::spawn(serve_udp(UdpSocket::from_std(udp.into())?));
        }
        let tcp = bind(SocketAddr::new(any, port), Type::STREAM)?;
        serve_tcp(TcpListener::from_std(tcp.into())?).await;
        Ok(())
    })
}

fn bind(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

async fn serve_tcp(listener: TcpListener) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(async move {
                    // A client that is gone is no error of the server's.
                    let _ = echo(stream).await;
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4 * 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            read => stream.write_all(&buffer[..read]).await?,
        }
    }
}

async fn serve_udp(socket: UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        // Errors are those of earlier answers (a client that is gone): nothing to do.
        if let Ok((read, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..read], from).await;
        }
    }
}
