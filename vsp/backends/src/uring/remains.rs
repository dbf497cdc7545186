//! What queues leave behind when they go with operations under way, and what has become of those.
//!
//! A worker that ends for the guest's fault, for the host's or by a panic drops what it has, in
//! whatever state that is. The kernel may still write to a queue's own memory then. Who knows when it
//! does no more is the ring, which cancels and waits when it is dropped; so the memory goes with the
//! ring if the queue was dropped first, and with the queue if the ring was. It is lost only if the
//! kernel never said that it has let go.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::mem;
use std::rc::Rc;

use super::{Cqe, Tag};

/// A queue's end of the bargain, to be taken from [`Uring::remains`](super::Uring::remains) when the
/// queue is made. Clones are the same.
#[derive(Clone, Default)]
pub struct Remains(Rc<RefCell<Ring>>);

enum Ring {
    /// It lives, and keeps this until it has been drained.
    Lives(Vec<Box<dyn Any>>),
    /// It is gone, and nothing of it is under way: these completions nobody has heard of.
    Drained(Vec<Cqe>),
    /// It is gone, and the kernel may have kept some of it.
    Abandoned,
}

impl Default for Ring {
    fn default() -> Self {
        Self::Lives(Vec::new())
    }
}

impl Remains {
    /// Keeps `value`, which the kernel may be using, for as long as it may.
    pub fn keep(&self, value: impl Any) {
        match &mut *self.0.borrow_mut() {
            Ring::Lives(kept) => kept.push(Box::new(value)),
            Ring::Drained(_) => drop(value),
            Ring::Abandoned => mem::forget(value),
        }
    }

    /// How the operations of a queue ended that were under way when the ring was dropped; `None` if it
    /// was not, or if they may not have ended.
    pub fn unheard(&self, tag: Tag) -> Option<Vec<Cqe>> {
        match &*self.0.borrow() {
            Ring::Drained(unheard) => {
                Some(unheard.iter().filter(|cqe| cqe.token.tag() == tag).copied().collect())
            }
            Ring::Lives(_) | Ring::Abandoned => None,
        }
    }

    /// The ring is drained.
    pub(super) fn release(&self, unheard: Vec<Cqe>) {
        // Outside of the borrow: what was kept may have something to say here when it goes.
        let ring = mem::replace(&mut *self.0.borrow_mut(), Ring::Drained(unheard));
        drop(ring);
    }

    /// The ring could not be drained.
    pub(super) fn abandon(&self) {
        let ring = mem::replace(&mut *self.0.borrow_mut(), Ring::Abandoned);
        mem::forget(ring);
    }
}

impl fmt::Debug for Remains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remains").finish_non_exhaustive()
    }
}
