//! Where a worker reaches its sessions: what each is doing, and the order that ends it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use crate::pool::{Admin, Member};

/// The sessions of a service in one worker.
#[derive(Debug, Default)]
pub(crate) struct Seats {
    taken: RefCell<HashMap<u64, Rc<Seat>>>,
    next: Cell<u64>,
}

/// Which sessions are meant.
#[derive(Debug, Clone)]
pub(crate) enum Which {
    /// All of them.
    All,
    /// Those of clients that came to one of these addresses.
    At(Arc<[IpAddr]>),
}

/// A session, as its worker sees it.
#[derive(Debug)]
pub(crate) struct Seat {
    /// The address that the client came to.
    at: IpAddr,
    member: RefCell<Option<(Arc<Member>, Phase)>>,
    order: Cell<Option<Order>>,
    waker: RefCell<Option<Waker>>,
}

/// How far a session is with a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Tries to connect to it.
    Connecting,
    /// Is joined to it.
    Joined,
}

/// What a session is told from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Leave the member that is being tried and try another.
    Elsewhere,
    /// Reset both sides: the member has been disabled.
    Disabled,
    /// Reset both sides: this node stops being Active, or shuts down.
    Yield,
}

/// A seat, left when dropped.
pub(crate) struct Seated {
    seats: Rc<Seats>,
    key: u64,
    seat: Rc<Seat>,
}

impl Seats {
    /// A seat for a client that came to that address.
    pub(crate) fn sit(self: &Rc<Self>, at: IpAddr) -> Seated {
        let seat = Rc::new(Seat {
            at,
            member: RefCell::default(),
            order: Cell::default(),
            waker: RefCell::default(),
        });
        let key = self.next.get();
        self.next.set(key + 1);
        self.taken.borrow_mut().insert(key, Rc::clone(&seat));
        Seated { seats: Rc::clone(self), key, seat }
    }

    pub(crate) fn len(&self) -> usize {
        self.taken.borrow().len()
    }

    /// Resets sessions; how many.
    pub(crate) fn reset(&self, which: &Which) -> usize {
        let taken = self.taken.borrow();
        let meant = taken.values().filter(|seat| which.covers(seat.at));
        meant.inspect(|seat| seat.tell(Order::Yield)).count()
    }

    /// Tells the sessions whose member has changed in a way that matters to them.
    pub(crate) fn heed_members(&self) {
        for seat in self.taken.borrow().values() {
            if let Some(order) = seat.order_by_member() {
                seat.tell(order);
            }
        }
    }
}

impl Which {
    pub(crate) fn covers(&self, at: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::At(addresses) => addresses.contains(&at),
        }
    }
}

impl Seat {
    /// Says which member the session has now, and how far it is with it.
    pub(crate) fn has(&self, member: &Arc<Member>, phase: Phase) {
        *self.member.borrow_mut() = Some((Arc::clone(member), phase));
    }

    /// The order given, if there is one; [`Order::Elsewhere`] is given once.
    pub(crate) fn poll_order(&self, waker: &Waker) -> Poll<Order> {
        match self.order.get() {
            Some(order) => {
                if order == Order::Elsewhere {
                    self.order.set(None);
                }
                Poll::Ready(order)
            }
            None => {
                let mut known = self.waker.borrow_mut();
                if !known.as_ref().is_some_and(|known| known.will_wake(waker)) {
                    *known = Some(waker.clone());
                }
                Poll::Pending
            }
        }
    }

    fn order_by_member(&self) -> Option<Order> {
        match &*self.member.borrow() {
            Some((member, Phase::Connecting)) if !member.usable() => Some(Order::Elsewhere),
            Some((member, Phase::Joined)) if member.admin() == Admin::Disabled => {
                Some(Order::Disabled)
            }
            _ => None,
        }
    }

    fn tell(&self, order: Order) {
        // Nothing takes back a reset.
        if matches!(self.order.get(), None | Some(Order::Elsewhere)) {
            self.order.set(Some(order));
        }
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

impl std::ops::Deref for Seated {
    type Target = Seat;

    fn deref(&self) -> &Seat {
        &self.seat
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.seats.taken.borrow_mut().remove(&self.key);
    }
}
