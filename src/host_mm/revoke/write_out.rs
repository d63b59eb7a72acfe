//! Pages go to swap, and swap has room for them.

use std::ops::Deref;

use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::host_view::HostView;
use crate::frames::host_view::PageBuf;
use crate::revoke::Revoker;
use crate::revoke::duplicates::Duplicates;
use crate::swap::{SwapError, SwapSpace};
use gnomon_export_rmap::addr::{Pfn, SwapSlot};
use gnomon_export_rmap::{LockedPage, PageFlags};

/// Pages of which one duplicate in swap is given up at a time when swap is full.
const DUPLICATES_AT_ONCE: usize = 64;

/// A [`Revoker`] that writes pages out, too.
pub struct Saver<B: Backing = HostView> {
    revoker: Revoker<B>,
    pub(crate) swap: SwapSpace,
    pub(super) duplicates: Duplicates,
}

impl<B: Backing> Deref for Saver<B> {
    type Target = Revoker<B>;

    fn deref(&self) -> &Revoker<B> {
        &self.revoker
    }
}

impl<B: Backing> Saver<B> {
    pub(crate) fn new(revoker: Revoker<B>, swap: SwapSpace) -> Self {
        let duplicates = Duplicates::of_frames(revoker.table.len());
        Self { revoker, swap, duplicates }
    }

    /// The page in a frame, which is locked, has been given a slot, or has kept the one that it came from.
    pub(crate) fn note_duplicate(&self, page: &LockedPage<'_>) {
        self.duplicates.note(page.pfn());
    }

    /// Writes a dirty page to swap and marks it clean; `None` if it is all zero and needs no slot.
    /// Nobody can write the page: it is revoked, or read-only everywhere.
    pub(crate) fn write_out(&self, page: &LockedPage<'_>) -> Result<Option<SwapSlot>, MmError> {
        let content = self.content(page)?;
        if is_zero(&content) {
            if let Some(slot) = page.slot() {
                page.set_slot(None);
                self.swap.free(slot)?;
            }
            self.counters.zero_drops.add(1);
        } else {
            // The old copy is of no use to anyone: its slot takes the new one.
            let slot = match page.slot() {
                Some(slot) => slot,
                None => self.allocate_slot()?,
            };
            page.set_slot(Some(slot));
            self.note_duplicate(page);
            self.swap.write_page(slot, page.owner().tag(), &content)?;
            self.counters.swap_outs.add(1);
        }
        page.clear_flags(PageFlags::DIRTY);
        Ok(page.slot())
    }

    /// A free slot; where there is none, one that only duplicates a page in a frame.
    fn allocate_slot(&self) -> Result<SwapSlot, SwapError> {
        loop {
            match self.swap.try_alloc() {
                Err(SwapError::Full { .. }) if self.release_duplicates()? > 0 => {}
                other => return other,
            }
        }
    }

    /// Frees slots whose page also stands in a frame; the frame's copy is then the only one, and
    /// dirty. Returns the number of slots freed.
    fn release_duplicates(&self) -> Result<usize, SwapError> {
        let duplicates = &self.duplicates;
        let has_slot = |pfn: Pfn| self.table.get(pfn).is_some_and(|frame| frame.slot().is_some());
        let (mut released, mut busy) = (0, 0);
        while let Some(pfn) = duplicates.next(busy, has_slot) {
            if !has_slot(pfn) {
                continue;
            }
            let Some(page) = self.table.try_lock(pfn) else {
                duplicates.put_back(pfn);
                busy += 1;
                continue;
            };
            if let Some(slot) = page.slot().filter(|_| page.flags().contains(PageFlags::IN_USE)) {
                page.set_flags(PageFlags::DIRTY);
                page.set_slot(None);
                self.swap.free(slot)?;
                released += 1;
            }
            if released == DUPLICATES_AT_ONCE {
                break;
            }
        }
        self.counters.duplicate_slots_released.add(released as u64);
        Ok(released)
    }
}

pub(crate) fn is_zero(content: &PageBuf) -> bool {
    // Word-wise and without an early exit inside a line, so that it compiles to vector code.
    content.chunks_exact(64).all(|line| line.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gnomon_export_rmap::addr::PAGE_SIZE;

    #[test]
    fn a_page_is_zero_only_if_every_byte_is() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for at in 0..PAGE_SIZE {
            let mut content = [0; PAGE_SIZE];
            content[at] = 1;
            assert!(!is_zero(&content), "byte {at}");
        }
    }
}
