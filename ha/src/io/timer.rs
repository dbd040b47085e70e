//! A timerfd: tokio's timers have a grain of a millisecond, adverts come every ten.

use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::Watched;

/// A timer of the runtime on which it was made.
#[derive(Debug)]
pub struct Timer {
    /// The descriptor that is set, and a duplicate of it that the runtime watches.
    timer: TimerFd,
    watched: Watched,
    set: Option<Instant>,
}

impl Timer {
    /// A timer that is not set.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let duplicate: OwnedFd = std::os::fd::AsFd::as_fd(&timer).try_clone_to_owned()?;
        Ok(Self { timer, watched: Watched::new(duplicate)?, set: None })
    }

    /// Sets it, or with `None` stops it. Nothing is done where it is set so already.
    pub fn set(&mut self, now: Instant, deadline: Option<Instant>) -> io::Result<()> {
        if deadline == self.set {
            return Ok(());
        }
        match deadline {
            Some(at) => {
                // Zero would stop it.
                let wait = at.saturating_duration_since(now).max(Duration::from_nanos(1));
                let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
                self.timer.set(expiration, TimerSetTimeFlags::empty())?;
            }
            None => self.timer.unset()?,
        }
        self.set = deadline;
        Ok(())
    }

    /// Ready once the deadline has passed; the timer is not set after.
    pub fn poll_expired(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.watched.poll_readable(context))?;
            let mut expirations = [0; 8];
            let read = self.watched.read(|fd| Ok(nix::unistd::read(fd, &mut expirations)?))?;
            if read.is_some() {
                self.set = None;
                return Poll::Ready(Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[test]
    fn it_expires_once_and_not_before_its_time() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut timer = Timer::new().unwrap();
            let start = Instant::now();
            timer.set(start, Some(start + Duration::from_millis(20))).unwrap();
            poll_fn(|context| timer.poll_expired(context)).await.unwrap();
            assert!(start.elapsed() >= Duration::from_millis(20));

            let again = poll_fn(|context| timer.poll_expired(context));
            assert!(tokio::time::timeout(Duration::from_millis(60), again).await.is_err());

            let now = Instant::now();
            timer.set(now, Some(now - Duration::from_secs(1))).unwrap();
            poll_fn(|context| timer.poll_expired(context)).await.unwrap();
        });
    }
}
