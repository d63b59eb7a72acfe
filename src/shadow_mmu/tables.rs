//! The memory of the shadow pages: 512 atomic entries each, in the pinned slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use crate::addr::PAGE_SIZE;
use crate::host_mm::MmError;

/// Entries of a table.
pub(super) const ENTRIES: usize = 512;

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
        assert!(page < self.pages && index < ENTRIES, "no entry {index} of shadow page {page}");
        let at = self.offset + page as usize * PAGE_SIZE + index * size_of::<u64>();
        match self.region.get_atomic_ref(at) {
            Ok(entry) => entry,
            Err(error) => unreachable!("`new` checked that the region has byte {at}: {error}"),
        }
    }

    pub(super) fn clear(&self, page: PageIndex) {
        for index in 0..ENTRIES {
            self.entry(page, index).store(0, Ordering::Relaxed);
        }
    }
}
