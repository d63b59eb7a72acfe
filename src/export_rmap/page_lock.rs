//! The page lock: one bit of the flags word, with sleepers in hashed wait queues.
//!
//! [`LockedPage`] is both the guard and the proof: whatever may be done only under the page lock
//! takes one. The lock sleeps, as Linux's does, so that its holder may do I/O and notifier calls
//! may block.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use crate::addr::{Pfn, SwapSlot};
use crate::flags::PageFlags;
use crate::frame_table::{Frame, FrameTable, Owner};
use crate::lock_rank::{self, Held, Rank};
use crate::sync::{Condvar, Mutex, Ordering, lock, spin_loop};

/// Queues shared by all page locks, as many pages as wait are few.
#[cfg(not(any(loom, shuttle)))]
const WAIT_QUEUES: usize = 256;
#[cfg(any(loom, shuttle))]
const WAIT_QUEUES: usize = 1;

/// Tries before a waiter goes to sleep: a lock held for a look-up is back within a microsecond.
#[cfg(not(any(loom, shuttle)))]
const SPINS: u32 = 64;
#[cfg(any(loom, shuttle))]
const SPINS: u32 = 0;

#[derive(Debug, Default)]
struct WaitQueue {
    mutex: Mutex<()>,
    unlocked: Condvar,
}

/// The wait queues of a frame table.
#[derive(Debug)]
pub(super) struct WaitQueues(Box<[WaitQueue]>);

impl WaitQueues {
    pub(super) fn new() -> Self {
        Self((0..WAIT_QUEUES).map(|_| WaitQueue::default()).collect())
    }

    fn of(&self, pfn: Pfn) -> &WaitQueue {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(pfn);
        // Reduced modulo the number of queues.
        #[allow(clippy::cast_possible_truncation)]
        let index = hash as usize % self.0.len();
        &self.0[index]
    }
}

/// A frame whose page lock this thread holds; dropping it unlocks.
#[derive(Debug)]
#[must_use = "the page is unlocked at once"]
pub struct LockedPage<'a> {
    table: &'a FrameTable,
    pfn: Pfn,
    _held: Held,
}

impl FrameTable {
    /// Locks the page in frame `pfn`, sleeping while another thread holds it.
    ///
    /// # Panics
    /// If the table has no such frame. Debug builds also panic where the lock order forbids
    /// waiting (invariant I8).
    pub fn lock(&self, pfn: Pfn) -> LockedPage<'_> {
        let held = lock_rank::wait_for(Rank::Page(pfn));
        let frame = self.frame(pfn);
        let mut spins = SPINS;
        while !try_set_locked(frame) {
            if spins > 0 {
                spins -= 1;
                spin_loop();
            } else {
                self.sleep_until_unlocked(pfn, frame);
            }
        }
        LockedPage { table: self, pfn, _held: held }
    }

    /// Locks the page in frame `pfn` if nobody holds it.
    ///
    /// # Panics
    /// If the table has no such frame.
    pub fn try_lock(&self, pfn: Pfn) -> Option<LockedPage<'_>> {
        try_set_locked(self.frame(pfn)).then(|| LockedPage {
            table: self,
            pfn,
            _held: lock_rank::note(Rank::Page(pfn)),
        })
    }

    fn sleep_until_unlocked(&self, pfn: Pfn, frame: &Frame) {
        let queue = self.wait_queues.of(pfn);
        let guard = lock(&queue.mutex);
        // The bit is set and the lock looked at while the queue's mutex is held, and the unlocker
        // takes that mutex after it has cleared both: its wake-up cannot come before the wait.
        let before = frame.flags.fetch_or(PageFlags::WAITERS.bits(), Ordering::Relaxed);
        if before & PageFlags::LOCKED.bits() != 0 {
            drop(queue.unlocked.wait(guard));
        }
    }
}

fn try_set_locked(frame: &Frame) -> bool {
    let locked = PageFlags::LOCKED.bits();
    // Looked at first: a failed fetch_or would pull the cache line over for nothing.
    frame.flags.load(Ordering::Relaxed) & locked == 0
        // Acquire pairs with the Release in `LockedPage::drop`.
        && frame.flags.fetch_or(locked, Ordering::Acquire) & locked == 0
}

impl Drop for LockedPage<'_> {
    fn drop(&mut self) {
        let both = PageFlags::LOCKED | PageFlags::WAITERS;
        // Release pairs with the Acquire in `try_set_locked`.
        let before = self.frame().flags.fetch_and(!both.bits(), Ordering::Release);
        if before & PageFlags::WAITERS.bits() != 0 {
            let queue = self.table.wait_queues.of(self.pfn);
            let _guard = lock(&queue.mutex);
            // All: the queue is shared with other pages.
            queue.unlocked.notify_all();
        }
    }
}

impl<'a> LockedPage<'a> {
    /// The locked frame's number.
    #[must_use]
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The locked frame's descriptor.
    #[must_use]
    pub fn frame(&self) -> &'a Frame {
        self.table.frame(self.pfn)
    }

    /// The frame table that the frame belongs to.
    #[must_use]
    pub fn table(&self) -> &'a FrameTable {
        self.table
    }

    /// The page that the frame holds.
    #[must_use]
    pub fn owner(&self) -> Owner {
        self.frame().owner()
    }

    /// Whether nobody may map the page writable as it is: several guest pages share it, or copies of
    /// it are out.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.frame().is_read_only()
    }

    /// Whether the frame must be flushed before it, or the page in it, is anybody else's: a client maps
    /// it, or may have been left with what it cached when a flush failed. Look after
    /// [`begin_invalidation`](Self::begin_invalidation).
    #[must_use]
    pub fn must_be_flushed(&self) -> bool {
        self.flags().intersects(PageFlags::EXPORTED | PageFlags::FLUSH_DUE)
    }

    /// Gives the frame to a page.
    pub fn set_owner(&self, owner: Owner) {
        crate::trace::point!(
            "own",
            pfn = self.pfn.index(),
            object = owner.object,
            gfn = owner.gfn.as_u64()
        );
        self.frame().set_owner(owner);
    }

    /// The flags as they stand. `EXPORTED` may change at any time, the others not.
    #[must_use]
    pub fn flags(&self) -> PageFlags {
        self.frame().flags()
    }

    /// Sets flags. Not for the lock bits and `EXPORTED`, which have owners of their own.
    pub fn set_flags(&self, flags: PageFlags) {
        self.frame().flags.fetch_or(own(flags).bits(), Ordering::Relaxed);
    }

    /// Clears flags. Not for the lock bits and `EXPORTED`, which have owners of their own.
    pub fn clear_flags(&self, flags: PageFlags) {
        self.frame().flags.fetch_and(!own(flags).bits(), Ordering::Relaxed);
    }

    /// Notes a use that leaves no accessed bit: the page survives one more pass of reclaim.
    pub fn note_use(&self) {
        if self.flags().uses() == 0 {
            self.set_uses(1);
        }
    }

    /// Sets reclaim's use count, cut to [`MAX_USES`](crate::flags::MAX_USES).
    pub fn set_uses(&self, uses: u32) {
        let all = PageFlags::USES_LOW | PageFlags::USES_HIGH;
        let wanted = PageFlags::empty().with_uses(uses);
        self.clear_flags(all.difference(wanted));
        self.set_flags(wanted);
    }

    /// The swap slot that holds the page's last written copy.
    #[must_use]
    pub fn slot(&self) -> Option<SwapSlot> {
        self.frame().slot()
    }

    /// Notes or forgets the swap slot of the page's copy.
    pub fn set_slot(&self, slot: Option<SwapSlot>) {
        self.frame().set_slot(slot);
    }
}

/// The flags that the page lock protects.
fn own(flags: PageFlags) -> PageFlags {
    flags.difference(PageFlags::LOCKED | PageFlags::WAITERS | PageFlags::EXPORTED)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    #[test]
    fn try_lock_fails_exactly_while_the_page_is_locked() {
        let table = FrameTable::new(2);
        let page = table.lock(Pfn::new(0));
        assert!(table.try_lock(Pfn::new(0)).is_none());
        assert!(table.try_lock(Pfn::new(1)).is_some());
        drop(page);
        assert!(table.try_lock(Pfn::new(0)).is_some());
    }

    #[test]
    fn the_lock_bits_cannot_be_changed_through_the_guard() {
        let table = FrameTable::new(1);
        let page = table.lock(Pfn::new(0));
        page.clear_flags(PageFlags::all());
        assert!(page.flags().contains(PageFlags::LOCKED));
        page.set_flags(PageFlags::all());
        assert!(!page.flags().contains(PageFlags::EXPORTED));
        page.set_uses(2);
        assert_eq!(page.flags().uses(), 2);
        assert!(page.flags().contains(PageFlags::DIRTY));
    }

    #[test]
    fn a_holder_is_alone_and_every_waiter_is_woken() {
        let table = Arc::new(FrameTable::new(1));
        let inside = Arc::new(AtomicBool::new(false));
        let total = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (table, inside, total) = (table.clone(), inside.clone(), total.clone());
                std::thread::spawn(move || {
                    for round in 0..2000 {
                        let _page = table.lock(Pfn::new(0));
                        assert!(!inside.swap(true, Ordering::Relaxed), "two holders at once");
                        if round % 64 == 0 {
                            std::thread::yield_now();
                        }
                        inside.store(false, Ordering::Relaxed);
                        total.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(total.load(Ordering::Relaxed), 8000);
    }
}
