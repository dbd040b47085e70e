//! The echo server of the backends, TCP and UDP on one port: what canary traffic talks to.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// Most TCP connections at once; further ones wait in the listen queue.
const MAX_CONNECTIONS: usize = 8192;
const BACKLOG: i32 = 4096;
/// A failed accept (no descriptors left) is tried again after this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the process ends; every address of both families.
///
/// # Errors
/// The port is taken.
pub fn serve(port: u16) -> io::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let tcp = TcpListener::from_std(bind(port, Type::STREAM)?.into())?;
        let udp = UdpSocket::from_std(bind(port, Type::DGRAM)?.into())?;
        tokio::join!(serve_tcp(tcp), serve_udp(udp));
        Ok(())
    })
}

fn bind(port: u16, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
    socket.set_only_v6(false)?;
    socket.set_nonblocking(true)?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
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
    let mut buffer = [0; 16 * 1024];
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
