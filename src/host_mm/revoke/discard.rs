//! Pages that are forgotten for good.

use crate::frames::backing::Backing;
use crate::hooks::COUNTED;
use crate::object::pages::{Entry, Place};
use crate::revoke::free_frame::FreeFrame;
use crate::revoke::vacate::Vacator;
use gnomon_export_rmap::{FlushReason, Invalidation, LockedPage, Owner, PageFlags};

impl<B: Backing> Vacator<B> {
    /// Forgets a page for good, when its object goes away.
    pub(crate) fn discard_page(&self, entry: &Entry, owner: Owner) {
        loop {
            match entry.load() {
                Place::Absent => return,
                Place::Swap(slot) => {
                    // No frame, so no page lock: who takes the name of the slot away owns it.
                    if entry.replace_frameless(Place::Swap(slot), Place::Absent) {
                        self.free_slot_of(entry, slot, owner);
                        return;
                    }
                }
                Place::Shared(shared) => {
                    self.leave_shared(entry, shared, None);
                    return;
                }
                Place::Frame(pfn) => {
                    let page = self.table.lock(pfn);
                    if entry.load() == Place::Frame(pfn) {
                        self.discard_locked(&page, entry);
                        return;
                    }
                }
            }
        }
    }

    /// As [`discard_page`](Self::discard_page), for a page whose frame is locked.
    pub(crate) fn discard_locked(&self, page: &LockedPage<'_>, entry: &Entry) {
        page.begin_invalidation();
        self.lab().pause(COUNTED);
        let revoked = self.revoke_for_good(page) && self.give_memory_back(page.pfn(), 1).is_ok();
        entry.store(Place::Absent, page);
        self.free_copy(page);
        page.clear_flags(PageFlags::IN_USE | PageFlags::BY_WRITE);
        self.check_not_exported(page);
        if revoked {
            drop(FreeFrame::from_revoked(self, page.pfn()));
        }
    }

    /// Takes a frame away from clients that have outlived the memory object. `false` if that
    /// failed: then the frame is lost, for it must not go to another page.
    fn revoke_for_good(&self, page: &LockedPage<'_>) -> bool {
        if !page.must_be_flushed() {
            return true;
        }
        self.notifiers.invalidate_page(page, Invalidation::Unmap);
        let flushed = self.notifiers.revoke(&[page], FlushReason::Invalidated);
        if flushed.is_ok() {
            self.check_revoked(page, Invalidation::Unmap);
        }
        flushed.is_ok() && !page.frame().is_exported()
    }
}
