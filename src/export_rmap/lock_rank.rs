//! Debug builds check the lock order: page lock -> a client's MMU lock -> rmap entry, and page
//! locks among themselves in ascending frame number (invariant I8). Release builds compile this
//! to nothing.

use crate::addr::Pfn;

/// A lock's place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// The page lock of a frame.
    Page(Pfn),
    /// An export client's own lock.
    ClientMmu,
    /// The lock bit of a frame's rmap head.
    RmapEntry(Pfn),
}

/// Proof that the current thread's lock stack holds a lock; popped on drop. Not `Send`: the stack
/// is a thread's.
#[derive(Debug)]
#[must_use]
pub struct Held {
    #[cfg(debug_assertions)]
    rank: Rank,
    not_send: std::marker::PhantomData<*const ()>,
}

#[cfg(debug_assertions)]
mod stack {
    use super::Rank;
    use std::cell::RefCell;

    thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
    }

    /// Whether a thread that holds `held` may sleep for `wanted`.
    pub(super) fn may_wait(held: Rank, wanted: Rank) -> bool {
        match (held, wanted) {
            (Rank::Page(mine), Rank::Page(other)) => mine < other,
            (Rank::Page(_), Rank::ClientMmu | Rank::RmapEntry(_))
            | (Rank::ClientMmu, Rank::RmapEntry(_)) => true,
            (Rank::ClientMmu, Rank::Page(_) | Rank::ClientMmu) | (Rank::RmapEntry(_), _) => false,
        }
    }

    pub(super) fn check(wanted: Rank) {
        HELD.with_borrow(|held| {
            for &rank in held {
                assert!(
                    may_wait(rank, wanted),
                    "lock order: waiting for {wanted:?} while holding {rank:?}"
                );
            }
        });
    }

    pub(super) fn push(rank: Rank) {
        HELD.with_borrow_mut(|held| held.push(rank));
    }

    pub(super) fn pop(rank: Rank) {
        HELD.with_borrow_mut(|held| {
            if let Some(at) = held.iter().rposition(|&other| other == rank) {
                held.remove(at);
            }
        });
    }
}

/// Checks that the thread may wait for a lock of this rank, and notes that it holds it. Call before
/// a blocking acquisition.
pub fn wait_for(rank: Rank) -> Held {
    #[cfg(debug_assertions)]
    stack::check(rank);
    note(rank)
}

/// Notes a lock that was acquired without waiting, which cannot deadlock whatever the order.
#[cfg_attr(not(debug_assertions), allow(unused_variables))]
pub fn note(rank: Rank) -> Held {
    #[cfg(debug_assertions)]
    stack::push(rank);
    Held {
        #[cfg(debug_assertions)]
        rank,
        not_send: std::marker::PhantomData,
    }
}

#[cfg(debug_assertions)]
impl Drop for Held {
    fn drop(&mut self) {
        stack::pop(self.rank);
    }
}

#[cfg(all(test, debug_assertions, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const LOW: Rank = Rank::Page(Pfn::new(1));
    const HIGH: Rank = Rank::Page(Pfn::new(2));
    const ENTRY: Rank = Rank::RmapEntry(Pfn::new(1));
    const OTHER_ENTRY: Rank = Rank::RmapEntry(Pfn::new(2));

    /// Takes the locks in this order on a thread of its own; whether the checker let it.
    fn allowed(order: &'static [Rank]) -> bool {
        std::thread::spawn(move || {
            let _held: Vec<Held> = order.iter().map(|&rank| wait_for(rank)).collect();
        })
        .join()
        .is_ok()
    }

    #[test]
    fn the_order_of_the_protocol_is_accepted() {
        assert!(allowed(&[LOW, HIGH, Rank::ClientMmu, ENTRY]));
        assert!(allowed(&[LOW, ENTRY]));
    }

    #[test]
    fn each_inversion_is_caught() {
        assert!(!allowed(&[HIGH, LOW]));
        assert!(!allowed(&[LOW, LOW]));
        assert!(!allowed(&[Rank::ClientMmu, LOW]));
        assert!(!allowed(&[Rank::ClientMmu, Rank::ClientMmu]));
        assert!(!allowed(&[ENTRY, Rank::ClientMmu]));
        assert!(!allowed(&[ENTRY, OTHER_ENTRY]));
    }

    #[test]
    fn a_released_lock_no_longer_counts() {
        drop(wait_for(HIGH));
        let _low = wait_for(LOW);
        let _tried = note(LOW);
    }
}
