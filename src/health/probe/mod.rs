//! The probes, one small file per kind, and what they share: how far a probe got ([`Progress`]),
//! what went wrong ([`ProbeError`]), and a conversation that reads no more than it was given.
//!
//! A probe has no timeout of its own: whoever runs it drops it when its time is up, and dropping
//! it takes everything with it (sockets, processes).

use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;

use nix::errno::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::proxy::header::Header;
use crate::service::{Probe, ProxyProtocol};

mod http;
mod icmp;
mod script;
mod send_expect;
mod socks5;

/// Whom to probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Address and port; the check's own port where it names one.
    pub address: SocketAddr,
    /// Header that a TCP connection begins with.
    pub proxy_protocol: ProxyProtocol,
    /// Name of the backend, for scripts.
    pub backend: String,
    /// Name of the service, for scripts.
    pub service: String,
}

/// How far a probe got, in words; it is asked when the time is up.
#[derive(Debug, Default)]
pub struct Progress(Mutex<&'static str>);

impl Progress {
    /// The probe got here.
    pub fn reach(&self, stage: &'static str) {
        *self.0.lock().expect("no panic while it is held") = stage;
    }

    /// How far it got; empty before the first step.
    pub fn reached(&self) -> &'static str {
        *self.0.lock().expect("no panic while it is held")
    }
}

/// Why a probe failed, in lowercase words for people.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No connection, or no socket or process to begin with.
    #[error("{what}: {}", words(.source))]
    Start {
        /// What was begun.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The connection broke.
    #[error("{} ({reached})", words(.source))]
    Broken {
        /// How far the probe got.
        reached: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// The backend closed the connection before it had answered.
    #[error("closed before the answer was complete ({reached})")]
    Closed {
        /// How far the probe got.
        reached: &'static str,
    },
    /// The backend answered, but not what it should.
    #[error("{0}")]
    Answer(String),
}

impl ProbeError {
    /// Whether it was this node that ran out of something (descriptors, ports, memory,
    /// processes), which is nothing to hold against the backend.
    pub fn is_of_this_node(&self) -> bool {
        let (Self::Start { source, .. } | Self::Broken { source, .. }) = self else {
            return false;
        };
        matches!(
            source.raw_os_error(),
            Some(
                libc::EMFILE
                    | libc::ENFILE
                    | libc::ENOMEM
                    | libc::ENOBUFS
                    | libc::EADDRNOTAVAIL
                    | libc::EAGAIN
            )
        )
    }
}

/// Probes once. `Ok`: the backend answers as it should.
pub async fn run(probe: &Probe, target: &Target, progress: &Progress) -> Result<(), ProbeError> {
    match probe {
        Probe::Tcp => connect(target, progress).await.map(drop),
        Probe::Http { method, path, host, status } => {
            let request = http::request(method, path, host.as_deref(), target.address)?;
            let stream = connect(target, progress).await?;
            http::converse(stream, &request, status, progress).await
        }
        Probe::Socks5 { target: beyond, credentials } => {
            let stream = connect(target, progress).await?;
            socks5::converse(stream, beyond, credentials.as_ref(), progress).await
        }
        Probe::SendExpect { send, expect } => {
            let stream = connect(target, progress).await?;
            send_expect::converse(stream, send, expect, progress).await
        }
        Probe::Icmp => icmp::echo(target.address, progress).await,
        Probe::Script { command } => script::run(command, target, progress).await,
    }
}

async fn connect(target: &Target, progress: &Progress) -> Result<TcpStream, ProbeError> {
    progress.reach("not connected");
    let mut stream = TcpStream::connect(target.address)
        .await
        .map_err(|source| ProbeError::Start { what: "connect", source })?;
    progress.reach("connected");
    let header = Header::local(target.proxy_protocol);
    stream
        .write_all(header.as_bytes())
        .await
        .map_err(|source| ProbeError::Broken { reached: progress.reached(), source })?;
    Ok(stream)
}

/// A conversation that reads at most `left` bytes in all, whatever the backend sends.
struct Talk<'a, S> {
    stream: S,
    progress: &'a Progress,
    left: usize,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Talk<'a, S> {
    fn new(stream: S, progress: &'a Progress, bound: usize) -> Self {
        Self { stream, progress, left: bound }
    }

    /// Sends everything.
    async fn send(&mut self, bytes: &[u8], then: &'static str) -> Result<(), ProbeError> {
        self.stream.write_all(bytes).await.map_err(|source| self.broken(source))?;
        self.progress.reach(then);
        Ok(())
    }

    /// Reads exactly that many bytes; the caller asks for no more than the bound in all.
    async fn receive<const N: usize>(&mut self) -> Result<[u8; N], ProbeError> {
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            filled += self.read(&mut bytes[filled..]).await?;
        }
        Ok(bytes)
    }

    /// Reads what there is, at least a byte, and appends it.
    async fn receive_some(&mut self, to: &mut Vec<u8>) -> Result<(), ProbeError> {
        let mut chunk = [0; 2048];
        let count = self.read(&mut chunk).await?;
        to.extend_from_slice(&chunk[..count]);
        Ok(())
    }

    async fn read(&mut self, into: &mut [u8]) -> Result<usize, ProbeError> {
        if self.left == 0 {
            return Err(ProbeError::Answer(format!(
                "the answer goes on without an end ({})",
                self.progress.reached()
            )));
        }
        let room = into.len().min(self.left);
        match self.stream.read(&mut into[..room]).await {
            Ok(0) => Err(ProbeError::Closed { reached: self.progress.reached() }),
            Ok(count) => {
                self.left -= count;
                Ok(count)
            }
            Err(source) => Err(self.broken(source)),
        }
    }

    fn broken(&self, source: io::Error) -> ProbeError {
        ProbeError::Broken { reached: self.progress.reached(), source }
    }
}

/// What the system says, in lowercase and without its number.
fn words(error: &io::Error) -> String {
    let text = match error.raw_os_error() {
        Some(number) => Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    };
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => text,
    }
}

/// Bytes of a stranger as printable text, at most 40 characters of it.
fn printable(bytes: &[u8]) -> String {
    let shown: String =
        bytes.iter().take(40).flat_map(|byte| byte.escape_ascii()).map(char::from).collect();
    if bytes.len() > 40 { format!("\"{shown}…\"") } else { format!("\"{shown}\"") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use tokio::io::ReadBuf;

    /// A peer that says what it was given in pieces, then closes, and takes everything.
    pub(super) struct Canned {
        answer: Vec<u8>,
        pub(super) read: usize,
        piece: usize,
    }

    impl Canned {
        pub(super) fn new(answer: &[u8], piece: usize) -> Self {
            Self { answer: answer.to_vec(), read: 0, piece: piece.max(1) }
        }
    }

    impl AsyncRead for &mut Canned {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let count = (self.answer.len() - self.read).min(self.piece).min(buf.remaining());
            let from = self.read;
            buf.put_slice(&self.answer[from..from + count]);
            self.read += count;
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for &mut Canned {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(buf.len()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// Runs a conversation that never has to wait.
    pub(super) fn at_once<T>(conversation: impl Future<Output = T>) -> T {
        let mut conversation = std::pin::pin!(conversation);
        match conversation.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("the canned peer never lets anyone wait"),
        }
    }

    #[test]
    fn words_are_lowercase_and_without_a_number() {
        let refused = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        assert_eq!(words(&refused), "connection refused");
        assert_eq!(
            ProbeError::Start { what: "connect", source: refused }.to_string(),
            "connect: connection refused"
        );
        assert_eq!(words(&io::Error::other("Odd thing")), "odd thing");
    }

    #[test]
    fn what_a_stranger_sent_is_shown_short_and_harmless() {
        assert_eq!(printable(b"SSH-2.0\r\n\x1b[2J"), r#""SSH-2.0\r\n\x1b[2J""#);
        assert_eq!(printable(&[b'a'; 1000]).chars().count(), 43);
    }

    #[test]
    fn a_conversation_reads_no_more_than_its_bound() {
        let progress = Progress::default();
        let mut canned = Canned::new(&[b'x'; 100], 7);
        let mut talk = Talk::new(&mut canned, &progress, 10);
        assert_eq!(at_once(talk.receive::<9>()).expect("within the bound"), [b'x'; 9]);
        let mut rest = Vec::new();
        at_once(talk.receive_some(&mut rest)).expect("a byte is left");
        assert_eq!(rest, b"x");
        let error = at_once(talk.receive_some(&mut rest)).expect_err("none is left");
        assert!(error.to_string().starts_with("the answer goes on without an end"), "{error}");
        assert_eq!(canned.read, 10);
    }
}
