//! Copies in swap that are given up: the slot is free, and what is in the frame, or nowhere, is the page.

use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::object::pages::{Entry, Place};
use crate::revoke::write_out::Saver;
use gnomon_export_rmap::addr::SwapSlot;
use gnomon_export_rmap::{LockedPage, Owner, PageFlags};

impl<B: Backing> Saver<B> {
    /// Frees the slot of the page's copy in swap, if it has one.
    pub(crate) fn free_copy(&self, page: &LockedPage<'_>) {
        if let Some(slot) = page.slot() {
            page.set_slot(None);
            self.free_slot(slot);
        }
    }

    /// Forgets the copy in swap: what is in the frame is the only one.
    pub(crate) fn forget_copy(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        page.set_flags(PageFlags::DIRTY);
        if let Some(slot) = page.slot() {
            page.set_slot(None);
            self.swap.free(slot)?;
        }
        Ok(())
    }

    /// Frees the slot that an entry has named and names no more: until it does not, somebody may come
    /// to the slot, and must not find it another page's.
    pub(crate) fn free_slot_of(&self, entry: &Entry, slot: SwapSlot, owner: Owner) {
        self.check_slot_unnamed(slot, entry, owner);
        debug_assert_ne!(entry.load(), Place::Swap(slot), "it is named still");
        self.free_slot(slot);
    }

    fn free_slot(&self, slot: SwapSlot) {
        let freed = self.swap.free(slot);
        debug_assert!(freed.is_ok(), "a page's slot is its own: {freed:?}");
    }
}
