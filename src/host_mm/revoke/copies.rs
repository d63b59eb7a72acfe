//! Copies in swap that are given up: the slot is free, and what is in the frame, or nowhere, is the page.

use crate::addr::SwapSlot;
use crate::export_rmap::{LockedPage, Owner, PageFlags};
use crate::host_mm::error::MmError;
use crate::host_mm::object::pages::{Entry, Place};
use crate::host_mm::revoke::write_out::Saver;

impl Saver {
    /// Frees the slot of the page's copy in swap, if it has one.
    pub(in crate::host_mm) fn free_copy(&self, page: &LockedPage<'_>) {
        if let Some(slot) = page.slot() {
            page.set_slot(None);
            self.free_slot(slot);
        }
    }

    /// Forgets the copy in swap: what is in the frame is the only one.
    pub(in crate::host_mm) fn forget_copy(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        page.set_flags(PageFlags::DIRTY);
        if let Some(slot) = page.slot() {
            page.set_slot(None);
            self.swap.free(slot)?;
        }
        Ok(())
    }

    /// Frees the slot that an entry has named and names no more: until it does not, somebody may come
    /// to the slot, and must not find it another page's.
    pub(in crate::host_mm) fn free_slot_of(&self, entry: &Entry, slot: SwapSlot, owner: Owner) {
        self.check_slot_unnamed(slot, entry, owner);
        debug_assert_ne!(entry.load(), Place::Swap(slot), "it is named still");
        self.free_slot(slot);
    }

    fn free_slot(&self, slot: SwapSlot) {
        let freed = self.swap.free(slot);
        debug_assert!(freed.is_ok(), "a page's slot is its own: {freed:?}");
    }
}
