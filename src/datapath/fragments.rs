//! Fragments that came ahead of the first of their datagram, which alone has the ports: held for a
//! moment and put back into the interface that they came by, once the first has shown the way.
//!
//! The kernel's programs can't hold a packet, so they hand such a fragment over (frag.h) and drop
//! it. Whether its first has come is asked of the kernel; frames are not looked at here.
//!
//! Bounds: [`MOST`] frames and [`MOST_BYTES`], beyond which the oldest is given up, and
//! [`PATIENCE`]. A fragment that is given up is put back too, for the kernel to drop and count it.
//! What the kernel hands over is bounded there (`HOLDS` in bounds.h), and so is the work done here.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libbpf_rs::{MapHandle, PerfBufferBuilder};

use super::load::{Error, Loaded};
use super::record::Record as _;
use super::skeleton::types;

/// How long a fragment is held at most: reordering on the way takes milliseconds.
const PATIENCE: Duration = Duration::from_millis(200);
/// Frames held at the same time.
const MOST: usize = 1024;
/// Their bytes together.
const MOST_BYTES: usize = 1024 * 1024;
/// Between two looks at what is held.
const TURN: Duration = Duration::from_millis(1);
/// How often the thread looks whether it is to end, while it holds nothing.
const IDLE: Duration = Duration::from_millis(100);
/// Pages of the buffer from the kernel, of each CPU: 128 KiB.
const PAGES: usize = 32;

/// The running holder; dropping it ends the thread, and what it holds is lost.
#[derive(Debug)]
pub(super) struct Fragments {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Fragments {
    /// Starts it. Where it can't read from the kernel it says so and ends: fragments that are
    /// ahead of their first are dropped then.
    pub(super) fn start(loaded: Loaded) -> std::io::Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let theirs = Arc::clone(&stop);
        let thread =
            std::thread::Builder::new().name("baton-fragments".to_owned()).spawn(move || {
                if let Err(error) = hold(&loaded, &theirs) {
                    tracing::warn!(%error, "fragments ahead of their first are dropped from now on");
                }
            })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Fragments {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hold(loaded: &Loaded, stop: &AtomicBool) -> Result<(), Error> {
    let failed = || Error::bpf("read fragments from the kernel");
    let map: MapHandle = loaded.held_fragments().map_err(failed())?;
    let waiting = RefCell::new(Waiting::default());
    let buffer = PerfBufferBuilder::new(&map)
        .pages(PAGES)
        .sample_cb(|_cpu, event| waiting.borrow_mut().take(event, Instant::now()))
        .build()
        .map_err(failed())?;
    while !stop.load(Ordering::Relaxed) {
        let idle = waiting.borrow().held.is_empty();
        match buffer.poll(if idle { IDLE } else { TURN }) {
            // This process was stopped, and goes on.
            Err(error) if error.kind() == libbpf_rs::ErrorKind::Interrupted => {}
            polled => polled.map_err(failed())?,
        }
        waiting.borrow_mut().turn(Instant::now(), |held, last| {
            loaded.reinject(held.ifindex, &held.frame, last).unwrap_or_else(|error| {
                tracing::debug!(%error, ifindex = held.ifindex, "can't put a fragment back");
                true
            })
        });
    }
    Ok(())
}

/// A frame that waits.
#[derive(Debug)]
struct Held {
    /// Where it came by.
    ifindex: u32,
    frame: Vec<u8>,
    came: Instant,
    /// When its first is asked about next.
    due: Instant,
}

/// What waits, oldest first.
#[derive(Debug, Default)]
struct Waiting {
    held: VecDeque<Held>,
    bytes: usize,
}

impl Waiting {
    /// Takes what the kernel handed over: `struct held_fragment`, the frame, padding.
    fn take(&mut self, event: &[u8], now: Instant) {
        let Some((head, rest)) = event.split_at_checked(size_of::<types::held_fragment>()) else {
            return;
        };
        let Some(head) = types::held_fragment::read(head) else { return };
        let Some(frame) = rest.get(..head.length as usize) else { return };
        self.bytes += frame.len();
        self.held.push_back(Held {
            ifindex: head.ifindex,
            frame: frame.to_vec(),
            came: now,
            due: now,
        });
    }

    /// Offers every frame that is due to `put_back`, which tells whether it has gone; `true` to it
    /// means that this is its last chance. The longer one waits, the less often it is due.
    fn turn(&mut self, now: Instant, mut put_back: impl FnMut(&Held, bool) -> bool) {
        let mut excess = self.held.len().saturating_sub(MOST);
        let mut bytes = self.bytes;
        self.held.retain_mut(|held| {
            let age = now.duration_since(held.came);
            let last = excess > 0 || bytes > MOST_BYTES || age >= PATIENCE;
            if !last && now < held.due {
                return true;
            }
            held.due = now + age.max(TURN);
            if !put_back(held, last) && !last {
                return true;
            }
            excess = excess.saturating_sub(1);
            bytes -= held.frame.len();
            false
        });
        self.bytes = bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(ifindex: u32, frame: &[u8]) -> Vec<u8> {
        let head = types::held_fragment { ifindex, length: frame.len() as u32 };
        [head.bytes(), frame, &[0; 3]].concat()
    }

    fn milliseconds(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_frame_is_asked_about_ever_less_often_and_then_given_up() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        waiting.take(&event(7, b"frame"), start);
        let mut tries = Vec::new();
        for at in 0..300 {
            waiting.turn(start + milliseconds(at), |held, last| {
                assert_eq!((held.ifindex, &held.frame[..]), (7, &b"frame"[..]));
                tries.push((at, last));
                false
            });
        }
        let expected = [0, 1, 2, 4, 8, 16, 32, 64, 128].map(|at| (at, false));
        assert_eq!(tries, [&expected[..], &[(200, true)]].concat());
        assert_eq!((waiting.held.len(), waiting.bytes), (0, 0));
    }

    #[test]
    fn a_frame_that_has_gone_is_forgotten() {
        let start = Instant::now();
        let mut waiting = Waiting::default();
        for n in 0..3 {
            waiting.take(&event(n, &[0; 100]), start);
        }
        waiting.turn(start, |held, _| held.ifindex == 1);
        assert_eq!(waiting.held.iter().map(|held| held.ifindex).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(waiting.bytes, 200);
    }

    #[test]
    fn beyond_the_bounds_the_oldest_are_given_up() {
        let start = Instant::now();
        for (size, most) in [(10, MOST), (MOST_BYTES / 8, 8)] {
            let mut waiting = Waiting::default();
            for n in 0..most as u32 + 3 {
                waiting.take(&event(n, &vec![0; size]), start);
            }
            waiting.turn(start, |_, _| false);
            assert_eq!(waiting.held.len(), most);
            assert_eq!(waiting.held[0].ifindex, 3);
            assert_eq!(waiting.bytes, most * size);
        }
    }

    #[test]
    fn what_is_cut_off_is_no_frame() {
        let whole = event(1, b"frame");
        let mut waiting = Waiting::default();
        for length in 0..size_of::<types::held_fragment>() + 5 {
            waiting.take(&whole[..length], Instant::now());
        }
        assert!(waiting.held.is_empty());
    }
}
