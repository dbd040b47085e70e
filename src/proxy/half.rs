//! One direction of a session: bytes from one socket to the other, and the end of them.
//!
//! Little is copied through the worker's buffer, a lot is spliced through a pipe. Bytes are taken
//! in only once all that were taken in before are handed on, so what a direction holds is bounded
//! by one buffer or one filled pipe, whatever either side does; and a direction that waits for
//! its sender holds neither.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use nix::sys::socket::{MsgFlags, recv, send};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::inq;
use super::pipe::{MOST, Pipe, Pipes};

/// One direction of a session.
#[derive(Debug)]
pub(crate) struct Half {
    stage: Stage,
    /// The sender was last seen to send more than the buffer takes: splice.
    bulk: bool,
}

#[derive(Debug)]
enum Stage {
    /// Nothing is held; waits for the sender.
    Taking,
    /// Bytes that the receiver didn't take yet.
    HandingOn(Held),
    /// The sender has ended, the receiver has been told.
    Done,
}

#[derive(Debug)]
enum Held {
    /// The rest of a buffer, from the index on.
    Bytes(Box<[u8]>, usize),
    /// What is left in a pipe.
    Piped(Pipe),
}

/// What a worker lends to the direction that it is polling.
pub(crate) struct Tools {
    pub(crate) pipes: Rc<Pipes>,
    /// Also the most that is copied at once.
    pub(crate) buffer: Box<[u8; COPIED_MOST]>,
}

/// Most bytes copied at once. A read that fills it shows that splicing is worth a pipe.
pub(crate) const COPIED_MOST: usize = 16 << 10;

impl Half {
    pub(crate) fn new() -> Self {
        Self { stage: Stage::Taking, bulk: false }
    }

    pub(crate) fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    /// Whether it hears of its sender: it waits for nothing else.
    pub(crate) fn is_listening(&self) -> bool {
        matches!(self.stage, Stage::Taking)
    }

    /// Moves what can be moved now, and adds it to `moved`. `Ready(Ok(()))`: the end has been
    /// handed on, or, where `last` says that the other direction has ended already, is left to
    /// the closing of the sockets. An error is that of either socket: the session can't go on.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
        tools: &mut Tools,
        last: bool,
        moved: &mut usize,
    ) -> Poll<io::Result<()>> {
        let start = *moved;
        loop {
            match &mut self.stage {
                Stage::Done => return Poll::Ready(Ok(())),
                Stage::HandingOn(held) => {
                    ready!(held.poll_hand_on(cx, to, moved))?;
                    self.stage = Stage::Taking;
                }
                Stage::Taking if *moved - start >= MOST => {
                    // The others' turn.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Stage::Taking => {
                    ready!(from.poll_read_ready(cx))?;
                    let taken = match self.bulk.then(|| tools.pipes.lend()).flatten() {
                        Some(pipe) => self.splice(pipe, from),
                        None => self.copy(from, to, &mut tools.buffer[..], moved),
                    };
                    match taken {
                        Ok(0) => {
                            if !last {
                                SockRef::from(to).shutdown(Shutdown::Write)?;
                            }
                            self.stage = Stage::Done;
                        }
                        Ok(_) => {}
                        // Not ready after all; the next round waits for it.
                        Err(error) if is_transient(&error) => {}
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
            }
        }
    }

    /// Takes in through a pipe; how much, 0 at the end.
    fn splice(&mut self, mut pipe: Pipe, from: &TcpStream) -> io::Result<usize> {
        let taken = from.try_io(Interest::READABLE, || match pipe.fill(from) {
            // In front of urgent data splice finds nothing, or even an end. Reading goes past it.
            Ok(0) => peek(from),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => peek(from),
            other => other,
        });
        if !matches!(&taken, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
            self.bulk = pipe.filled() >= COPIED_MOST / 2;
        }
        let taken = taken?;
        if taken > 0 {
            self.stage = Stage::HandingOn(Held::Piped(pipe));
        }
        Ok(taken)
    }

    /// Takes in through the buffer and hands on at once what the receiver takes; how much came
    /// in, 0 at the end.
    fn copy(
        &mut self,
        from: &TcpStream,
        to: &TcpStream,
        buffer: &mut [u8],
        moved: &mut usize,
    ) -> io::Result<usize> {
        // Where the end is known to be next, the last bytes wait the moment until it is read, and
        // leave in one segment with it.
        let more = if end_is_near(from) { libc::MSG_MORE } else { 0 };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::from_bits_retain(more);
        let mut taken = 0;
        let read = from.try_io(Interest::READABLE, || {
            let emptied;
            (taken, emptied) = inq::receive(from.as_raw_fd(), buffer)?;
            // To say so now spares the read that would find it empty; what arrives from here on
            // is announced anew.
            if emptied { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        if taken == 0 {
            return read.map(|()| 0);
        }
        self.bulk = taken == buffer.len();
        let send = || Ok(send(to.as_raw_fd(), &buffer[..taken], flags)?);
        let written = match to.try_io(Interest::WRITABLE, send) {
            Err(error) if is_transient(&error) => 0,
            other => other?,
        };
        *moved += written;
        if written < taken {
            self.stage = Stage::HandingOn(Held::Bytes(buffer[written..taken].into(), 0));
        }
        Ok(taken)
    }
}

impl Held {
    fn poll_hand_on(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
        moved: &mut usize,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            ready!(to.poll_write_ready(cx))?;
            let written = match self {
                Held::Bytes(bytes, start) => {
                    to.try_write(&bytes[*start..]).inspect(|written| *start += written)
                }
                Held::Piped(pipe) => to.try_io(Interest::WRITABLE, || pipe.drain(to)),
            };
            match written {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(written) => *moved += written,
                Err(error) if is_transient(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn is_empty(&self) -> bool {
        match self {
            Held::Bytes(bytes, start) => *start == bytes.len(),
            Held::Piped(pipe) => pipe.filled() == 0,
        }
    }
}

/// For a socket that splice got nothing from: 0 at its end, an error where it is empty, and
/// [`io::ErrorKind::Interrupted`] where it has bytes to read.
fn peek(from: &TcpStream) -> io::Result<usize> {
    match recv(from.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK)? {
        0 => Ok(0),
        _ => Err(io::ErrorKind::Interrupted.into()),
    }
}

/// Whether the end of a socket that is ready for reading has arrived already.
fn end_is_near(from: &TcpStream) -> bool {
    let ready = pin!(from.ready(Interest::READABLE));
    let now = ready.poll(&mut Context::from_waker(Waker::noop()));
    matches!(now, Poll::Ready(Ok(ready)) if ready.is_read_closed())
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
