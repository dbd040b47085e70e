//! The kernel's ring of events, read without waiting.

use std::cell::RefCell;
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

use libbpf_rs::{RingBuffer, RingBufferBuilder};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::load::{Error, Loaded};
use super::skeleton::types;

/// Events that are read, and not yet handed on.
type Events = Rc<RefCell<Vec<u8>>>;

/// The ring.
pub struct Ring {
    ready: AsyncFd<OwnedFd>,
    ring: RingBuffer<'static>,
    /// One after the other, each [`EVENT`] bytes.
    events: Events,
}

/// Bytes of an event.
const EVENT: usize = size_of::<types::event>();

impl Ring {
    /// Opens the ring of a datapath, in a runtime.
    pub fn open(loaded: &Loaded) -> Result<Self, Error> {
        let map = loaded.events()?;
        let events = Events::default();
        let theirs = Rc::clone(&events);
        let failed = || Error::bpf("open the ring of events");
        let mut builder = RingBufferBuilder::new();
        builder
            .add(&map, move |event| {
                if event.len() >= EVENT {
                    theirs.borrow_mut().extend_from_slice(&event[..EVENT]);
                }
                0
            })
            .map_err(failed())?;
        let ring = builder.build().map_err(failed())?;
        // SAFETY: the ring's descriptor, open as long as the ring.
        let epoll = unsafe { BorrowedFd::borrow_raw(ring.epoll_fd()) };
        let waiting = || Error::io("wait for the ring of events");
        let epoll = epoll.try_clone_to_owned().map_err(waiting())?;
        // SAFETY: it owns its descriptor, which nobody replaces or closes.
        let ready = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) };
        let ready = ready.map_err(|error| waiting()(error.into()))?;
        Ok(Self { ready, ring, events })
    }

    /// Waits until there may be events.
    pub async fn readable(&self) {
        if let Ok(mut guard) = self.ready.readable().await {
            guard.clear_ready();
        }
    }

    /// Hands on all that there are.
    pub fn drain(&mut self, mut take: impl FnMut(&[u8])) -> Result<(), Error> {
        self.ring.consume().map_err(Error::bpf("read the ring of events"))?;
        let mut events = self.events.borrow_mut();
        events.chunks_exact(EVENT).for_each(&mut take);
        events.clear();
        Ok(())
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
