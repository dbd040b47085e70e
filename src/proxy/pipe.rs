//! Pipes for splice(2), lent out by each worker for as long as bytes are in them.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// Most bytes that one direction of a session takes in before it has handed them all on.
pub(crate) const MOST: usize = 1 << 20;

/// Size asked for, in bytes; the kernel gives a slot per 4096. A received segment takes a slot
/// or more, however short it is, so slots rather than bytes are what runs out. Where the kernel
/// refuses (`fs.pipe-max-size`, `fs.pipe-user-pages-soft`), the pipe stays as it is.
const SIZE: i32 = 1 << 20;

/// Idle pipes that a worker keeps; more are closed when they come back.
const KEPT: usize = 16;

/// A worker's pipes.
#[derive(Debug)]
pub(crate) struct Pipes {
    idle: RefCell<Vec<Ends>>,
    /// Pipes that exist, lent or idle; at most `most`. At the bound [`Pipes::lend`] says `None`
    /// and the session copies through a buffer of its own instead.
    open: Cell<usize>,
    most: usize,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

/// A pipe on loan. Goes back when dropped, or is closed where bytes are left in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    ends: Option<Ends>,
    filled: usize,
    home: Rc<Pipes>,
}

impl Pipes {
    pub(crate) fn new(most: usize) -> Rc<Self> {
        Rc::new(Self { idle: RefCell::default(), open: Cell::new(0), most })
    }

    /// An empty pipe, unless the bound is reached or the process is out of descriptors.
    pub(crate) fn lend(self: &Rc<Self>) -> Option<Pipe> {
        let idle = self.idle.borrow_mut().pop();
        let ends = match idle {
            Some(ends) => ends,
            None if self.open.get() < self.most => {
                let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).ok()?;
                let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE));
                self.open.set(self.open.get() + 1);
                Ends { read, write }
            }
            None => return None,
        };
        Some(Pipe { ends: Some(ends), filled: 0, home: Rc::clone(self) })
    }
}

impl Pipe {
    /// Bytes in it.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// Takes in what `from` has, at most [`MOST`]; 0: `from` has ended.
    pub(crate) fn fill(&mut self, from: &impl AsFd) -> io::Result<usize> {
        let moved = splice(from, None, &self.ends().write, None, MOST, FLAGS)?;
        self.filled += moved;
        Ok(moved)
    }

    /// Hands on what `to` takes.
    pub(crate) fn drain(&mut self, to: &impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.ends().read, None, to, None, self.filled, FLAGS)?;
        self.filled -= moved;
        Ok(moved)
    }

    fn ends(&self) -> &Ends {
        self.ends.as_ref().expect("a pipe has its ends until it is dropped")
    }
}

const FLAGS: SpliceFFlags = SpliceFFlags::SPLICE_F_NONBLOCK.union(SpliceFFlags::SPLICE_F_MOVE);

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut idle = self.home.idle.borrow_mut();
        match self.ends.take() {
            Some(ends) if self.filled == 0 && idle.len() < KEPT => idle.push(ends),
            _ => self.home.open.set(self.home.open.get() - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_bounded_and_come_back_empty() {
        let pipes = Pipes::new(2);
        let (first, second) = (pipes.lend().unwrap(), pipes.lend().unwrap());
        assert!(pipes.lend().is_none());
        drop(first);
        let mut third = pipes.lend().unwrap();
        // One with bytes in it is closed: the next is a new one.
        third.filled = 1;
        drop(third);
        assert_eq!(pipes.open.get(), 1);
        assert!(pipes.lend().is_some());
        drop(second);
        assert_eq!(pipes.idle.borrow().len(), 2);
    }
}
