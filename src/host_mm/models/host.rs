//! Host memory as the models have it: this crate's own, from the fault down to the free list, with two
//! parts replaced that a model checker cannot look into:
//!
//! | here | in place of |
//! |---|---|
//! | [`ModelMemory`] | the memfd of frames: some words a page, which hardware gets at one by one |
//! | [`ModelSwap`] | the swap file |
//!
//! What is left out is what the protocol does not need: pages of zeros are not shared, and who has to give
//! way is the page whose turn it is, whatever its use.

use std::io;
use std::sync::PoisonError;

use crate::books::Books;
use crate::config::{HostMmConfig, ReclaimPolicy};
use crate::error::MmError;
use crate::fault::{Intent, Pager};
use crate::frames::backing::Backing;
use crate::frames::host_view::PageBuf;
use crate::models::client::Client;
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::sources::clean::clean;
use crate::swap::{Slot, SwapBackend, SwapSpace};
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::sync::{Arc, AtomicU32, Ordering, yield_now};
use gnomon_export_rmap::{FrameTable, LockedPage, NotifierList, PageFlags, RmapEntry};

/// Words of a page that models use; each is written by one client only.
pub(super) const WORDS: usize = 2;
/// Pages that swap has room for: enough.
const SLOTS: u32 = 16;
/// Number of the one memory object.
const OBJECT: u16 = 0;

/// The frames' memory: the first words of each, the others being zero.
#[derive(Clone)]
pub(super) struct ModelMemory(Arc<[AtomicU32]>);

impl ModelMemory {
    fn new(frames: u32) -> Self {
        Self((0..frames as usize * WORDS).map(|_| AtomicU32::new(0)).collect())
    }

    fn words(&self, pfn: Pfn) -> &[AtomicU32] {
        &self.0[pfn.index() * WORDS..][..WORDS]
    }
}

/// The words that models use, of a page's bytes.
fn words_of(content: &PageBuf) -> [u32; WORDS] {
    std::array::from_fn(|word| u32::from_le_bytes(content[4 * word..][..4].try_into().unwrap()))
}

impl Backing for ModelMemory {
    fn content(&self, page: &LockedPage<'_>) -> Result<PageBuf, MmError> {
        let mut content = [0; PAGE_SIZE];
        for (bytes, word) in content.chunks_exact_mut(4).zip(self.words(page.pfn())) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        Ok(content)
    }

    fn fill(&self, page: &LockedPage<'_>, content: &PageBuf) -> Result<(), MmError> {
        for (word, value) in self.words(page.pfn()).iter().zip(words_of(content)) {
            word.store(value, Ordering::Relaxed);
        }
        Ok(())
    }

    fn punch(&self, _first: Pfn, _count: u32) -> Result<(), MmError> {
        Ok(())
    }

    fn is_hole(&self, _pfn: Pfn) -> Result<bool, MmError> {
        Ok(false)
    }
}

/// Swap in memory. Its lock is std's: nothing that a checker looks at is done under it, and it must not
/// order what a disk does not.
struct ModelSwap(std::sync::Mutex<Vec<PageBuf>>);

impl SwapBackend for ModelSwap {
    fn read(&self, slot: Slot, page: &mut PageBuf) -> io::Result<()> {
        *page = self.0.lock().unwrap_or_else(PoisonError::into_inner)[slot.index()];
        Ok(())
    }

    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (slot, page) in kept[first.index()..].iter_mut().zip(pages.chunks_exact(PAGE_SIZE)) {
            slot.copy_from_slice(page);
        }
        Ok(())
    }

    fn slots(&self) -> u32 {
        SLOTS
    }
}

/// Host memory with one memory object.
pub(super) struct Host {
    pub(super) pager: Pager<ModelMemory>,
    pub(super) pages: Arc<ObjectPages>,
    memory: ModelMemory,
}

pub(super) fn gfn(page: usize) -> Gfn {
    Gfn::new(page as u64)
}

impl Host {
    pub(super) fn new(pages: usize, frames: u32) -> Self {
        let config = HostMmConfig {
            policy: ReclaimPolicy::Fifo,
            check_evictions: true,
            share_zero: false,
            ..HostMmConfig::new(u64::from(frames) * PAGE_SIZE_U64)
        };
        let swap = ModelSwap(std::sync::Mutex::new(vec![[0; PAGE_SIZE]; SLOTS as usize]));
        let swap = SwapSpace::new(Box::new(swap), &Lab::default());
        let memory = ModelMemory::new(frames);
        let pager = Pager::assemble(frames, config, memory.clone(), swap, Lab::default());
        let pages = Arc::new(ObjectPages::new(OBJECT, pages as u64 * PAGE_SIZE_U64));
        // The leaf of their entries is made before there are threads: a checker does not know what std's
        // `OnceLock` orders.
        pages.entry(gfn(0));
        pager.objects.store(vec![pages.clone(), pager.commons.pages.clone()]);
        Self { pager, pages, memory }
    }

    pub(super) fn table(&self) -> &FrameTable {
        &self.pager.table
    }

    pub(super) fn notifiers(&self) -> &NotifierList {
        &self.pager.notifiers
    }

    /// A word of a frame, as hardware gets at it.
    pub(super) fn word(&self, pfn: Pfn, word: usize) -> &AtomicU32 {
        &self.memory.words(pfn)[word]
    }

    /// The frame in which the page is.
    pub(super) fn frame_of(&self, page: usize) -> Option<Pfn> {
        match self.pages.touched_entry(gfn(page)).map(Entry::load) {
            Some(Place::Frame(pfn)) => Some(pfn),
            _ => None,
        }
    }

    /// The page's frame, locked to be read; brought in if it is not in one.
    pub(super) fn lock_page(&self, page: usize) -> LockedPage<'_> {
        patiently(|| self.pager.fault_in(&self.pages, gfn(page), Intent::Read))
    }

    /// The same to be written: copies that are out have been recalled.
    pub(super) fn lock_page_for_write(&self, page: usize) -> LockedPage<'_> {
        patiently(|| self.pager.lock_for_write(&self.pages, gfn(page)))
    }

    /// Makes this what is in a word of a page that nobody maps, and puts the page out of its frame.
    pub(super) fn put(&self, page: usize, word: usize, value: u32) {
        let locked = self.lock_page_for_write(page);
        self.word(locked.pfn(), word).store(value, Ordering::Relaxed);
        locked.set_flags(PageFlags::BY_WRITE);
        let pfn = locked.pfn();
        drop(locked);
        assert_eq!(self.evict(&[pfn]), 1);
    }

    /// A word of a page's copy outside of frames.
    pub(super) fn copy(&self, page: usize, word: usize) -> u32 {
        let place = self.pages.touched_entry(gfn(page)).map_or(Place::Absent, Entry::load);
        let slot = match place {
            Place::Frame(pfn) => self.table().get(pfn).and_then(|frame| frame.slot()),
            Place::Swap(slot) => Some(slot),
            Place::Absent => None,
            Place::Shared(_) => unreachable!("no model asks for the copy of a shared page"),
        };
        let mut content = [0; PAGE_SIZE];
        if let Some(slot) = slot {
            let tag = self.pages.owner(gfn(page)).tag();
            self.pager.swap.read_page(slot, tag, &mut content).unwrap();
        }
        words_of(&content)[word]
    }

    /// Evicts the pages in these frames as one batch. Returns the number of frames that are free now: none
    /// if the flush failed.
    pub(super) fn evict(&self, frames: &[Pfn]) -> usize {
        self.pager.evict_frames(frames).unwrap_or(0)
    }

    /// Cleans the pages in these frames.
    pub(super) fn clean(&self, frames: &[Pfn]) {
        clean(&self.pager, frames).unwrap();
    }

    /// Invariants I3 and I4, once all is quiet, and what host memory's own checks have found.
    pub(super) fn check_books(&self, clients: &[&Client]) {
        let of: &Books<ModelMemory> = &self.pager;
        for pfn in (0..of.table.len()).map(Pfn::new) {
            let mut present: Vec<RmapEntry> =
                clients.iter().flat_map(|client| client.entries_for(pfn)).collect();
            let by_place = |entry: &RmapEntry| (entry.client().as_u16(), entry.location());
            present.sort_by_key(by_place);
            let mut entries = of.table.rmap_entries(pfn);
            entries.sort_by_key(by_place);
            assert_eq!(entries, present, "I3: the reverse map is not the present SPTEs");
            let exported = of.table.get(pfn).unwrap().is_exported();
            assert_eq!(exported, !entries.is_empty(), "I4: EXPORTED is not what the map says");
        }
        assert_eq!(of.violations.snapshot().0, [], "host memory's own checks");
    }
}

/// A page that may not be had because others have all frames locked for a moment is asked for again.
fn patiently<T>(lock: impl Fn() -> Result<T, MmError>) -> T {
    loop {
        match lock() {
            Ok(locked) => return locked,
            Err(MmError::OutOfFrames { .. }) => yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}
