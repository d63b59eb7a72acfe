//! The host side as the models have it. Stand-in for `host_mm`, which does I/O and system calls
//! and cannot run under a model checker:
//!
//! | here | stands in for |
//! |---|---|
//! | [`Host::lock_page`] | `Pager::fault_in`, `bring_in` |
//! | [`Host::evict`] | `DetachedBatch::detach`, `revoke`, `evict::release_all` |
//! | [`Host::clean`] | `HostMm::clean_frames` |
//! | [`Host::lend`], [`Host::recall`] | `MemoryObject::lend_pages`, `lock_page_for_write` |
//! | [`Host::share`] | `clone::share_batch`, `Saver::make_shared` |
//! | [`Host::discard`] | `Vacator::discard_page`, `revoke_for_good` |
//! | `places` | the memory object's entries |
//! | `memory`, `copies` | frames and swap slots: some words a page instead of 4 KiB |
//!
//! Their order of steps is the original's. That the types of `host_mm/revoke/batch.rs` enforce it
//! there is the compiler's business.

use crate::addr::{Gfn, Pfn};
use crate::models::client::Client;
use crate::sync::{AtomicU32, Mutex, Ordering, lock, yield_now};
use crate::{
    FlushReason, FrameTable, Invalidation, LockedPage, NotifierList, Owner, PageFlags, RmapEntry,
};

/// Words of a page; each is written by one client only.
pub(crate) const WORDS: usize = 2;

/// `places`: the page is in swap, or was never written.
const OUT: u32 = 0;

/// The host's books and its memory.
pub(crate) struct Host {
    pub(crate) table: FrameTable,
    pub(crate) notifiers: NotifierList,
    /// Where each page is: [`OUT`], or its frame's number plus one.
    places: Box<[AtomicU32]>,
    free: Mutex<Vec<Pfn>>,
    memory: Box<[AtomicU32]>,
    copies: Box<[AtomicU32]>,
}

fn zeroed(len: usize) -> Box<[AtomicU32]> {
    (0..len).map(|_| AtomicU32::new(0)).collect()
}

impl Host {
    pub(crate) fn new(pages: usize, frames: u32) -> Self {
        Self {
            table: FrameTable::new(frames),
            notifiers: NotifierList::default(),
            places: zeroed(pages),
            free: Mutex::new((0..frames).rev().map(Pfn::new).collect()),
            memory: zeroed(frames as usize * WORDS),
            copies: zeroed(pages * WORDS),
        }
    }

    /// A word of a frame, as hardware gets at it.
    pub(crate) fn word(&self, pfn: Pfn, word: usize) -> &AtomicU32 {
        &self.memory[pfn.index() * WORDS + word]
    }

    /// A word of a page's copy in swap.
    pub(crate) fn copy(&self, page: usize, word: usize) -> &AtomicU32 {
        &self.copies[page * WORDS + word]
    }

    /// The frame in which the page is.
    pub(crate) fn frame_of(&self, page: usize) -> Option<Pfn> {
        self.places[page].load(Ordering::Acquire).checked_sub(1).map(Pfn::new)
    }

    /// The page's frame, locked; brought in if it is not in one.
    pub(crate) fn lock_page(&self, page: usize) -> LockedPage<'_> {
        loop {
            if let Some(pfn) = self.frame_of(page) {
                let locked = self.table.lock(pfn);
                // The page may have left, and the frame been reused, before the lock was ours.
                if self.frame_of(page) == Some(pfn) {
                    return locked;
                }
            } else if let Some(locked) = self.bring_in(page) {
                return locked;
            }
        }
    }

    /// `None` if another thread was faster, or no frame is free.
    fn bring_in(&self, page: usize) -> Option<LockedPage<'_>> {
        let Some(pfn) = lock(&self.free).pop() else {
            let all: Vec<Pfn> = (0..self.table.len()).map(Pfn::new).collect();
            if self.evict(&all) == 0 {
                yield_now();
            }
            return None;
        };
        let locked = self.table.lock(pfn);
        locked.clear_flags(PageFlags::DIRTY | PageFlags::LENT);
        locked.set_owner(Owner { object: 0, gfn: Gfn::new(page as u64) });
        locked.set_flags(PageFlags::IN_USE);
        let here = u32::try_from(pfn.index()).unwrap() + 1;
        let place = &self.places[page];
        if place.compare_exchange(OUT, here, Ordering::AcqRel, Ordering::Acquire).is_err() {
            locked.clear_flags(PageFlags::IN_USE);
            drop(locked);
            lock(&self.free).push(pfn);
            return None;
        }
        for word in 0..WORDS {
            let content = self.copy(page, word).load(Ordering::Relaxed);
            self.word(pfn, word).store(content, Ordering::Relaxed);
        }
        Some(locked)
    }

    /// Locks those of the frames that hold a page and that nobody has locked.
    fn candidates(&self, frames: &[Pfn]) -> Vec<(LockedPage<'_>, usize)> {
        let pages = frames.iter().filter_map(|&pfn| {
            let locked = self.table.try_lock(pfn)?;
            let page = usize::try_from(locked.owner().gfn.as_u64()).unwrap();
            let holds = locked.flags().contains(PageFlags::IN_USE);
            (holds && self.frame_of(page) == Some(pfn)).then_some((locked, page))
        });
        pages.collect()
    }

    /// Begins the invalidation of each page and tells the clients.
    fn detach(&self, pages: &[(LockedPage<'_>, usize)], kind: Invalidation) {
        for (locked, _) in pages {
            locked.begin_invalidation();
            let harvest = self.notifiers.invalidate_page(locked, kind);
            if harvest.dirty {
                locked.set_flags(PageFlags::DIRTY);
            }
        }
    }

    /// `false` if a client failed.
    fn try_flush(&self, pages: &[(LockedPage<'_>, usize)]) -> bool {
        let pages: Vec<&LockedPage<'_>> = pages.iter().map(|(locked, _)| locked).collect();
        self.notifiers.revoke(&pages, FlushReason::Invalidated).is_ok()
    }

    fn flush(&self, pages: &[(LockedPage<'_>, usize)]) {
        assert!(self.try_flush(pages), "only an eviction is to fail");
    }

    fn write_out(&self, locked: &LockedPage<'_>, page: usize) {
        for word in 0..WORDS {
            let content = self.word(locked.pfn(), word).load(Ordering::Relaxed);
            self.copy(page, word).store(content, Ordering::Relaxed);
        }
        locked.clear_flags(PageFlags::DIRTY);
    }

    /// Evicts the pages in these frames as one batch: told, flushed once, written out if dirty.
    /// Returns the number of frames that are free now: none if the flush failed.
    pub(crate) fn evict(&self, frames: &[Pfn]) -> usize {
        let pages = self.candidates(frames);
        self.detach(&pages, Invalidation::Unmap);
        if !self.try_flush(&pages) {
            return 0;
        }
        let evicted = pages.len();
        for (locked, page) in pages {
            if locked.flags().contains(PageFlags::DIRTY) {
                self.write_out(&locked, page);
            } else {
                self.check_clean(&locked, page);
            }
            self.release(locked, page);
        }
        evicted
    }

    /// Cleans the pages in these frames: read-only everywhere, flushed, then written out if dirty.
    pub(crate) fn clean(&self, frames: &[Pfn]) {
        let pages = self.candidates(frames);
        self.detach(&pages, Invalidation::Clean);
        self.flush(&pages);
        for (locked, page) in &pages {
            if locked.flags().contains(PageFlags::DIRTY) {
                self.write_out(locked, *page);
            } else {
                self.check_clean(locked, *page);
            }
        }
    }

    /// Lends the page: read-only everywhere, flushed, and then copied, all under the page lock.
    #[cfg(loom)]
    pub(super) fn lend(&self, page: usize, borrow: impl FnOnce(&LockedPage<'_>, u32)) {
        let pages = [(self.lock_page(page), page)];
        if !pages[0].0.flags().contains(PageFlags::LENT) {
            self.detach(&pages, Invalidation::Clean);
            self.flush(&pages);
        }
        let [(locked, _)] = pages;
        locked.set_flags(PageFlags::LENT);
        borrow(&locked, self.word(locked.pfn(), 0).load(Ordering::Relaxed));
    }

    /// Shares the page: read-only everywhere and flushed, and only then somebody else's, too.
    #[cfg(loom)]
    pub(super) fn share(&self, page: usize) {
        let pages = [(self.lock_page(page), page)];
        self.detach(&pages, Invalidation::Clean);
        self.flush(&pages);
        let owner = Owner { object: Owner::SHARED, ..pages[0].0.owner() };
        pages[0].0.set_owner(owner);
    }

    /// Ends all copies of a page that is about to be written.
    pub(super) fn recall(&self, locked: &LockedPage<'_>) {
        if !locked.flags().contains(PageFlags::LENT) {
            return;
        }
        locked.begin_invalidation();
        self.notifiers.invalidate_page(locked, Invalidation::Recall);
        self.notifiers.revoke(&[locked], FlushReason::Recalled).unwrap();
        locked.clear_flags(PageFlags::LENT);
    }

    /// Forgets the page in a frame. Without clients there is nothing to flush, unless a flush failed.
    #[cfg(loom)]
    pub(crate) fn discard(&self, frame: Pfn) {
        let Some((locked, page)) = self.candidates(&[frame]).pop() else {
            return;
        };
        locked.begin_invalidation();
        if locked.must_be_flushed() {
            self.notifiers.invalidate_page(&locked, Invalidation::Unmap);
            self.notifiers.revoke(&[&locked], FlushReason::Invalidated).unwrap();
        }
        self.release(locked, page);
    }

    fn release(&self, locked: LockedPage<'_>, page: usize) {
        self.places[page].store(OUT, Ordering::Release);
        locked.clear_flags(PageFlags::IN_USE | PageFlags::DIRTY);
        let pfn = locked.pfn();
        drop(locked);
        lock(&self.free).push(pfn);
    }

    /// Invariant I6.
    fn check_clean(&self, locked: &LockedPage<'_>, page: usize) {
        for word in 0..WORDS {
            let content = self.word(locked.pfn(), word).load(Ordering::Relaxed);
            let copy = self.copy(page, word).load(Ordering::Relaxed);
            assert_eq!(content, copy, "I6: a page that was harvested clean differs from its copy");
        }
    }

    /// Invariants I3 and I4, once all is quiet.
    pub(crate) fn check_books(&self, clients: &[&Client]) {
        for raw in 0..self.table.len() {
            let pfn = Pfn::new(raw);
            let mut present: Vec<RmapEntry> =
                clients.iter().flat_map(|client| client.entries_for(pfn)).collect();
            let by_place = |entry: &RmapEntry| (entry.client().as_u16(), entry.location());
            present.sort_by_key(by_place);
            let mut entries = self.table.rmap_entries(pfn);
            entries.sort_by_key(by_place);
            assert_eq!(entries, present, "I3: the reverse map is not the present SPTEs");
            let exported = self.table.get(pfn).unwrap().is_exported();
            assert_eq!(exported, !entries.is_empty(), "I4: EXPORTED is not what the map says");
        }
    }
}
