//! The memory of the shadow pages: 512 atomic entries each, in the pinned slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::MmapRegion;

use crate::addr::PAGE_SIZE;
use crate::host_mm::MmError;
use crate::sys::memory::{PAGE_WORDS, page_words};

/// Entries of a table.
pub(super) const ENTRIES: usize = PAGE_WORDS;
/// Entries of a cache line.
const LINE: usize = 8;

/// Number of a shadow page.
pub(super) type PageIndex = u32;

/// A part of a pinned memory region that holds shadow pages.
#[derive(Clone, Debug)]
pub struct TableMemory {
    region: Arc<MmapRegion>,
    offset: usize,
    pages: u32,
}

impl TableMemory {
    /// `pages` shadow pages from byte `offset` of the region.
    ///
    /// # Errors
    /// [`MmError::Host`] if the region is too small or the offset not a multiple of 4096.
    pub fn new(region: Arc<MmapRegion>, offset: usize, pages: u32) -> Result<Self, MmError> {
        let end = (pages as usize).checked_mul(PAGE_SIZE).and_then(|len| len.checked_add(offset));
        if !offset.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > region.size()) {
            let source = std::io::Error::other(format!(
                "{pages} pages from byte {offset} do not fit a region of {} bytes",
                region.size()
            ));
            return Err(MmError::Host { what: "memory for shadow pages", source });
        }
        Ok(Self { region, offset, pages })
    }

    /// Number of shadow pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// An entry. Hardware, and KVM on its behalf, sets bits in it at any time.
    ///
    /// # Panics
    /// If the page was not handed out by this memory's allocator: page numbers come from nowhere
    /// else, a guest has no say in them.
    pub(super) fn entry(&self, page: PageIndex, index: usize) -> &AtomicU64 {
        &self.page(page)[index]
    }

    fn page(&self, page: PageIndex) -> &[AtomicU64; ENTRIES] {
        assert!(page < self.pages, "no shadow page {page}");
        let at = self.offset + page as usize * PAGE_SIZE;
        match page_words(&self.region, at) {
            Some(words) => words,
            None => unreachable!("`new` checked that the region has the page at byte {at}"),
        }
    }

    /// The entries of a page that are not zero, with their indices. Most pages are nearly empty: a
    /// cache line is looked at as a whole first.
    pub(super) fn used(&self, page: PageIndex) -> impl Iterator<Item = (usize, &AtomicU64)> {
        let lines = self.page(page).chunks_exact(LINE).enumerate();
        let is_used = |line: &[AtomicU64]| {
            line.iter().fold(0, |seen, entry| seen | entry.load(Ordering::Relaxed)) != 0
        };
        lines.filter(move |&(_, line)| is_used(line)).flat_map(|(number, line)| {
            let entries = (number * LINE..).zip(line);
            entries.filter(|(_, entry)| entry.load(Ordering::Relaxed) != 0)
        })
    }

    pub(super) fn clear(&self, page: PageIndex) {
        for entry in self.page(page) {
            entry.store(0, Ordering::Relaxed);
        }
    }
}
