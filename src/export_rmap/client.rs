//! What every export client does in the same way: its lock, the step from a page that was looked at to
//! a mapping that stands, and the way back.
//!
//! Guarantees, given that the client maps nothing without an [`Exported`] that it has
//! [kept](Exported::keep):
//!
//! - no mapping stands that was made of what an invalidation has ended: [`FrameTable::export`] adds
//!   the entry to the reverse map *first* and looks at the [sequence](super::sequence) *then*, so
//!   whichever of a mapping and an invalidation comes second sees the other;
//! - a fault that gives up half-way, by an error or a panic, leaves no entry behind;
//! - a frame stays exported, and whoever takes it waits for the client's lock, until a mapping that
//!   the client gives up by itself is in nobody's cache ([`FrameTable::give_up`]).
//!
//! Lock order: page lock -> [`ClientLock`] -> rmap entry.

use std::convert::Infallible;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use crate::addr::Pfn;
use crate::frame_table::FrameTable;
use crate::lock_rank::{self, Held, Rank};
use crate::page_lock::LockedPage;
use crate::rmap::RmapEntry;
use crate::sequence::SequenceToken;
use crate::sync::{Condvar, Mutex, MutexGuard, lock};

/// What happens to a client's mapping of a frame. The location is the client's own.
macro_rules! entry_point {
    ($name:literal, $pfn:expr, $entry:expr) => {
        $crate::trace::point!(
            $name,
            pfn = $pfn.index(),
            client = $entry.client().as_u16(),
            location = $entry.location()
        )
    };
}

/// A client's own lock (a shadow MMU's `mmu_lock`), in its place of the lock order: a page lock may be
/// held when it is taken, another client's or an rmap entry's not. Debug builds check that.
///
/// Who waits for it gets it before who comes later: a thread that takes it again and again, as a guest that
/// flushes all the time makes one do, keeps nobody out ([`ClientLock::let_others_in`]).
///
/// ```
/// use gnomon_export_rmap::ClientLock;
///
/// let mappings = ClientLock::new(vec![0; 512]);
/// let mut locked = mappings.lock();
/// for batch in 0..8 {
///     locked[64 * batch..][..64].fill(1);
///     // Between two batches whoever waits has its turn.
///     locked = mappings.let_others_in(locked, || {});
/// }
/// assert_eq!(locked.iter().sum::<i32>(), 512);
/// ```
#[derive(Debug, Default)]
pub struct ClientLock<T> {
    state: Mutex<T>,
    /// Held by the one who gets the lock next, while it is somebody else's.
    turn: Mutex<()>,
}

/// What a [`ClientLock`] protects, while it is held.
#[derive(Debug)]
#[must_use]
pub struct ClientGuard<'a, T> {
    // First: fields drop in order, and the rank is held as long as the lock is.
    state: MutexGuard<'a, T>,
    held: Held,
}

impl<T> Deref for ClientGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T> DerefMut for ClientGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.state
    }
}

impl<T> ClientLock<T> {
    /// A lock that protects `value`.
    pub fn new(value: T) -> Self {
        Self { state: Mutex::new(value), turn: Mutex::new(()) }
    }

    /// Takes the lock, waiting for it.
    pub fn lock(&self) -> ClientGuard<'_, T> {
        let held = lock_rank::wait_for(Rank::ClientMmu);
        match self.state.try_lock() {
            Ok(state) => ClientGuard { state, held },
            Err(_) => self.lock_in_turn(held),
        }
    }

    /// Waits for the lock in front of all who come later.
    fn lock_in_turn(&self, held: Held) -> ClientGuard<'_, T> {
        let _next = lock(&self.turn);
        ClientGuard { state: lock(&self.state), held }
    }

    /// Lets go of the lock, has `between` run, and takes the lock again: not before somebody who waits
    /// for it has had it. A mutex alone would let the one through who has just let go.
    pub fn let_others_in<'a>(
        &'a self,
        guard: ClientGuard<'a, T>,
        between: impl FnOnce(),
    ) -> ClientGuard<'a, T> {
        drop(guard);
        between();
        self.lock_in_turn(lock_rank::wait_for(Rank::ClientMmu))
    }

    /// Whether nobody holds the lock, for tests.
    #[cfg(all(feature = "testing", not(any(loom, shuttle))))]
    #[doc(hidden)]
    pub fn is_free(&self) -> bool {
        self.state.try_lock().is_ok()
    }

    /// Whether somebody waits to have the lock next, for tests.
    #[cfg(all(feature = "testing", not(any(loom, shuttle))))]
    #[doc(hidden)]
    pub fn is_wanted(&self) -> bool {
        self.turn.try_lock().is_err()
    }

    /// Sleeps until `on` is notified, without the lock meanwhile.
    pub fn wait<'a>(&self, on: &Condvar, guard: ClientGuard<'a, T>) -> ClientGuard<'a, T> {
        let ClientGuard { state, held } = guard;
        let state = on.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        ClientGuard { state, held }
    }

    /// As [`wait`](Self::wait), for no longer than `time`.
    pub fn wait_timeout<'a>(
        &self,
        on: &Condvar,
        guard: ClientGuard<'a, T>,
        time: Duration,
    ) -> ClientGuard<'a, T> {
        let ClientGuard { state, held } = guard;
        let waited = on.wait_timeout(state, time);
        let (state, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        ClientGuard { state, held }
    }
}

/// Notes that this thread does something that others wait for as they wait for a [`ClientLock`], an
/// access in flight, say: until the result is dropped, the thread may wait for nothing that it could not
/// wait for with the lock.
pub fn stand_in_for_client_lock() -> Held {
    lock_rank::note(Rank::ClientMmu)
}

/// A mapping that the client is about to make, with its entry in the reverse map: make it, still under
/// the client's lock, and [`keep`](Self::keep) this.
#[derive(Debug)]
#[must_use = "if it is dropped its entry leaves the reverse map, and the mapping must not be made"]
pub struct Exported<'t> {
    table: &'t FrameTable,
    pfn: Pfn,
    entry: RmapEntry,
}

impl Exported<'_> {
    /// The frame.
    #[must_use]
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The mapping stands.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Exported<'_> {
    fn drop(&mut self) {
        self.table.rmap_remove(self.pfn, self.entry);
    }
}

/// A mapping that a client gives up by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone {
    /// Its frame.
    pub pfn: Pfn,
    /// Its entry in the reverse map.
    pub entry: RmapEntry,
    /// The page was written through it.
    pub dirty: bool,
}

impl FrameTable {
    /// The protocol's central step, for a page that was found in the token's frame and unlocked since:
    /// adds the mapping's entry to the reverse map, *then* looks whether an invalidation of the frame
    /// began since the token was taken. `None`: it did, nothing is left behind, and the fault starts
    /// over with a new look at the page.
    ///
    /// Called with the client's lock held, until the mapping stands: an invalidation that is not seen
    /// here sees the entry, and its call waits for that lock.
    pub fn export<T>(
        &self,
        _lock: &ClientGuard<'_, T>,
        token: SequenceToken,
        entry: RmapEntry,
    ) -> Option<Exported<'_>> {
        self.rmap_add(token.pfn(), entry);
        let exported = Exported { table: self, pfn: token.pfn(), entry };
        if self.must_retry(token) {
            entry_point!("retry", token.pfn(), entry);
            return None;
        }
        entry_point!("install", token.pfn(), entry);
        Some(exported)
    }

    /// Whether a mapping that has its entry may be given rights, or its place taken by one of another
    /// frame, for a page that was looked at when the token was taken. If not, start over.
    ///
    /// Called with the client's lock held until that is done.
    #[must_use]
    pub fn is_current<T>(&self, _lock: &ClientGuard<'_, T>, token: SequenceToken) -> bool {
        !self.must_retry(token)
    }

    /// A client's own removal of mappings that it has made unusable for new uses: notes what they
    /// recorded, has `flush` end the uses that are cached or under way, and only then takes their
    /// entries out. If the flush fails, they stay.
    ///
    /// # Errors
    /// What `flush` returns.
    pub fn give_up<T, E>(
        &self,
        _lock: &ClientGuard<'_, T>,
        gone: &[Gone],
        flush: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        for gone in gone.iter().filter(|gone| gone.dirty) {
            self.note_dirty(gone.pfn);
        }
        flush()?;
        for gone in gone {
            entry_point!("give up", gone.pfn, gone.entry);
            self.rmap_remove(gone.pfn, gone.entry);
        }
        Ok(())
    }
}

impl FrameTable {
    /// As [`give_up`](Self::give_up), for mappings that nobody caches and nobody is using.
    pub fn give_up_uncached<T>(&self, lock: &ClientGuard<'_, T>, gone: &[Gone]) {
        let Ok(()) = self.give_up(lock, gone, || Ok::<(), Infallible>(()));
    }
}

impl<'a> LockedPage<'a> {
    /// Adds the entry of a mapping, or of a copy, that is made while the page is locked: nothing can
    /// overtake it.
    pub fn export<T>(&self, _lock: &ClientGuard<'_, T>, entry: RmapEntry) -> Exported<'a> {
        self.table().rmap_add(self.pfn(), entry);
        entry_point!("install", self.pfn(), entry);
        Exported { table: self.table(), pfn: self.pfn(), entry }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::ClientId;

    const FRAME: Pfn = Pfn::new(0);

    fn entry() -> RmapEntry {
        RmapEntry::new(ClientId::new(1).unwrap(), 7)
    }

    fn is_exported(table: &FrameTable) -> bool {
        table.get(FRAME).unwrap().is_exported()
    }

    #[test]
    fn an_export_stands_once_it_is_kept() {
        let (table, client) = (FrameTable::new(1), ClientLock::new(()));
        let token = table.lock(FRAME).sequence();
        let guard = client.lock();
        drop(table.export(&guard, token, entry()).unwrap());
        assert!(!is_exported(&table), "a fault that gave up leaves nothing");
        table.export(&guard, token, entry()).unwrap().keep();
        assert!(is_exported(&table) && table.is_current(&guard, token));
    }

    #[test]
    fn what_was_overtaken_leaves_nothing() {
        let (table, client) = (FrameTable::new(1), ClientLock::new(()));
        let page = table.lock(FRAME);
        let token = page.sequence();
        page.begin_invalidation();
        drop(page);
        let guard = client.lock();
        assert!(table.export(&guard, token, entry()).is_none());
        assert!(!is_exported(&table) && !table.is_current(&guard, token));
    }

    #[test]
    fn what_is_given_up_is_exported_until_its_flush() {
        let (table, client) = (FrameTable::new(1), ClientLock::new(()));
        let page = table.lock(FRAME);
        let guard = client.lock();
        page.export(&guard, entry()).keep();
        drop(page);
        let gone = [Gone { pfn: FRAME, entry: entry(), dirty: true }];
        assert_eq!(table.give_up(&guard, &gone, || Err("refused")), Err("refused"));
        assert!(is_exported(&table), "a flush that failed takes nothing out");
        let flushed = table.give_up(&guard, &gone, || {
            assert!(is_exported(&table));
            Ok::<(), ()>(())
        });
        assert_eq!(flushed, Ok(()));
        assert!(!is_exported(&table));
        drop(guard);
        assert!(table.lock(FRAME).flags().contains(crate::PageFlags::BY_WRITE));
    }

    /// Whoever waits gets the lock before the one who let go has it again.
    #[test]
    fn others_are_let_in() {
        let (client, had_it) = (ClientLock::new(()), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let guard = client.lock();
            scope.spawn(|| {
                let _guard = client.lock();
                had_it.store(true, Ordering::Relaxed);
            });
            // Until it holds its turn.
            while !client.is_wanted() {
                std::thread::yield_now();
            }
            assert!(!client.is_free());
            let guard = client.let_others_in(guard, || {});
            assert!(had_it.load(Ordering::Relaxed));
            drop(guard);
        });
    }
}
