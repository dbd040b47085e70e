//! A session once it has its backend: both directions, and the times that end it.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tracing::debug;

use super::half::{COPIED_MOST, Half, Tools};
use super::listen;
use super::seat::{Order, Seat};
use crate::pool::ServiceCounters;
use crate::service::Limits;

/// How a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Both sides have ended properly.
    Closed {
        /// It was long or carried much: bytes may wait in the kernel still.
        settled: bool,
    },
    /// No byte for the idle or half-close timeout.
    Idle,
    /// One side reset, vanished, or failed.
    Failed(io::Error),
    /// Told so; never [`Order::Elsewhere`].
    Told(Order),
}

/// Carries bytes between the two until the session ends. The caller resets both sides unless it
/// is [`End::Closed`].
pub(crate) async fn join(
    client: &TcpStream,
    backend: &TcpStream,
    limits: &Limits,
    counters: &ServiceCounters,
    seat: &Seat,
    tools: &RefCell<Tools>,
) -> End {
    let mut joined = Joined {
        inward: Half::new(),
        outward: Half::new(),
        last_byte: Instant::now(),
        carried: 0,
        settle_at: Some(Instant::now() + SETTLED),
        limits,
        counters,
    };
    let mut timer = pin!(sleep(limits.idle_timeout.min(SETTLED)));
    let mut client_failed = pin!(client.ready(Interest::ERROR));
    let mut backend_failed = pin!(backend.ready(Interest::ERROR));
    poll_fn(|cx| {
        if let Poll::Ready(order @ (Order::Disabled | Order::Yield)) = seat.poll_order(cx.waker()) {
            return Poll::Ready(End::Told(order));
        }
        match joined.poll_halves(cx, client, backend, &mut tools.borrow_mut()) {
            Poll::Ready(Ok(())) => {
                return Poll::Ready(End::Closed { settled: joined.settle_at.is_none() });
            }
            Poll::Ready(Err(error)) => return Poll::Ready(End::Failed(error)),
            Poll::Pending => {}
        }
        // Who waits for bytes hears of a reset with them; otherwise it would go unheard.
        if !joined.inward.is_listening() && client_failed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Failed(error_of(client)));
        }
        if !joined.outward.is_listening() && backend_failed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Failed(error_of(backend)));
        }
        joined.poll_timer(cx, timer.as_mut(), backend).map(|()| End::Idle)
    })
    .await
}

/// A session that lasts so long gets what short ones do without ([`listen::settle`]).
const SETTLED: Duration = Duration::from_secs(10);

struct Joined<'a> {
    inward: Half,
    outward: Half,
    last_byte: Instant,
    /// Bytes, both ways.
    carried: usize,
    /// When the session counts as a long one; `None` once it does.
    settle_at: Option<Instant>,
    limits: &'a Limits,
    counters: &'a ServiceCounters,
}

impl Joined<'_> {
    fn poll_halves(
        &mut self,
        cx: &mut Context<'_>,
        client: &TcpStream,
        backend: &TcpStream,
        tools: &mut Tools,
    ) -> Poll<io::Result<()>> {
        let (mut bytes_in, mut bytes_out) = (0, 0);
        let last = self.outward.is_done();
        let inward = self.inward.poll(cx, client, backend, tools, last, &mut bytes_in);
        let last = self.inward.is_done();
        let outward = self.outward.poll(cx, backend, client, tools, last, &mut bytes_out);
        if bytes_in + bytes_out > 0 {
            self.last_byte = Instant::now();
            // In all, not at once: what was sent in small pieces waits in the kernel just so.
            self.carried = self.carried.saturating_add(bytes_in + bytes_out);
            if self.carried >= COPIED_MOST {
                self.settle(backend);
            }
            count(&self.counters.bytes_in, bytes_in);
            count(&self.counters.bytes_out, bytes_out);
        }
        match (inward, outward) {
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(Ok(())),
            (Poll::Pending, _) | (_, Poll::Pending) => Poll::Pending,
        }
    }

    /// Ready once no byte has moved for too long. The timer is not moved with every byte: when it
    /// goes off, it is set anew to what is left.
    fn poll_timer(
        &mut self,
        cx: &mut Context<'_>,
        mut timer: Pin<&mut Sleep>,
        backend: &TcpStream,
    ) -> Poll<()> {
        let half_closed = self.inward.is_done() || self.outward.is_done();
        let patience =
            if half_closed { self.limits.half_close_timeout } else { self.limits.idle_timeout };
        let end = self.last_byte + patience;
        if timer.deadline() > end {
            timer.as_mut().reset(end);
        }
        while timer.as_mut().poll(cx).is_ready() {
            let now = timer.deadline();
            if now >= end {
                return Poll::Ready(());
            }
            if self.settle_at.is_some_and(|at| at <= now) {
                self.settle(backend);
            }
            timer.as_mut().reset(self.settle_at.map_or(end, |at| end.min(at)));
        }
        Poll::Pending
    }

    fn settle(&mut self, backend: &TcpStream) {
        if self.settle_at.take().is_some()
            && let Err(error) = listen::settle(&SockRef::from(backend))
        {
            debug!(%error, "a long session goes without keepalive");
        }
    }
}

fn error_of(failed: &TcpStream) -> io::Error {
    let error = failed.take_error().ok().flatten();
    error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
}

fn count(counter: &AtomicU64, bytes: usize) {
    if bytes > 0 {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
