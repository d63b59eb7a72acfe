//! Bringing a page into a frame.
//!
//! The page's entry is pointed at the new frame first, with the page lock held, and filled after:
//! whoever else wants the page finds the frame and sleeps for its lock until the content is there.
//! (Linux adds a page to its page cache in the same order, for the same reason.)

use crate::addr::{Gfn, PAGE_SIZE, SwapSlot};
use crate::export_rmap::{FlushReason, Invalidation, LockedPage, Owner, PageFlags};
use crate::host_mm::commons::SharedPage;
use crate::host_mm::frames::FreeFrame;
use crate::host_mm::object::{Entry, ObjectPages, Place};
use crate::host_mm::{HostMm, MmError, MmViolation, PausePoint, ViolationKind};

const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Calls into the clients after which an rmap entry no longer counts as one that a fault is about
/// to take back: each vCPU can have at most one such fault.
const SETTLE_ROUNDS: u32 = 64;

/// Whether a fault may wait: for a page lock, or for a frame to be freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Yes,
    No,
}

/// What a page is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    /// To be read: a shared page will do.
    Read,
    /// To be written: it must be the object's own.
    Write,
}

impl HostMm {
    pub(super) fn fault_in(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
        intent: Intent,
    ) -> Result<LockedPage<'_>, MmError> {
        let entry = object.entry(gfn).ok_or(MmError::OutsideMemory {
            gpa: gfn.base(),
            len: PAGE_SIZE as u64,
            memory_bytes: object.bytes,
        })?;
        loop {
            let place = entry.load();
            let found = match (place, intent) {
                (Place::Frame(pfn), _) => {
                    let page = self.table.lock(pfn);
                    // The page may have left, and the frame been reused, before the lock was ours.
                    let page = (entry.load() == place).then_some(page);
                    page.as_ref().map_or(Ok(()), |page| self.settle_hole(page))?;
                    page
                }
                (Place::Shared(shared), Intent::Read) => self.fault_in_shared(entry, shared)?,
                (Place::Shared(shared), Intent::Write) => {
                    self.copy_on_write(object, gfn, entry, shared)?
                }
                (Place::Absent, Intent::Read) if self.shares_zero() => {
                    entry.replace_frameless(place, Place::Shared(SharedPage::zero_for(gfn)));
                    None
                }
                (Place::Absent | Place::Swap(_), _) => {
                    let frame = self.allocate_frame(gfn)?;
                    self.bring_in(object, gfn, entry, place, frame, Wait::Yes)?
                }
            };
            if let Some(page) = found {
                return Ok(page);
            }
        }
    }

    /// As [`fault_in`](Self::fault_in), but neither waits for a page lock nor for a frame; `None`
    /// where that would be needed. Reads swap if it must.
    pub(super) fn try_fault_in(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
    ) -> Result<Option<LockedPage<'_>>, MmError> {
        let Some(entry) = object.entry(gfn) else { return Ok(None) };
        let place = entry.load();
        match place {
            Place::Frame(_) => {
                let page = self.try_lock_resident(object, gfn);
                page.as_ref().map_or(Ok(()), |page| self.settle_hole(page))?;
                Ok(page)
            }
            Place::Shared(_) => Ok(None),
            Place::Absent if self.shares_zero() => Ok(None),
            Place::Absent | Place::Swap(_) => match self.take_free_frame(Some(gfn)) {
                Some(frame) => self.bring_in(object, gfn, entry, place, frame, Wait::No),
                None => Ok(None),
            },
        }
    }

    pub(super) fn try_lock_resident(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
    ) -> Option<LockedPage<'_>> {
        let entry = object.touched_entry(gfn)?;
        let place = entry.load();
        let page = match place {
            Place::Frame(pfn) => self.table.try_lock(pfn)?,
            Place::Shared(shared) => self.try_lock_resident(&self.commons.pages, shared.gfn())?,
            Place::Absent | Place::Swap(_) => return None,
        };
        (entry.load() == place).then_some(page)
    }

    /// A free frame, by direct reclaim if there is none.
    pub(super) fn allocate_frame(&self, gfn: Gfn) -> Result<FreeFrame<'_>, MmError> {
        loop {
            if let Some(frame) = self.take_free_frame(Some(gfn)) {
                return Ok(frame);
            }
            self.reclaim_directly(gfn)?;
        }
    }

    /// Fills a frame with the page; `None` if another thread was faster.
    fn bring_in(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
        entry: &Entry,
        place: Place,
        frame: FreeFrame<'_>,
        wait: Wait,
    ) -> Result<Option<LockedPage<'_>>, MmError> {
        let page = if self.is_identity() {
            // Another fault on the page may be filling this very frame, or somebody may just be
            // taking the page out of it.
            let pfn = frame.pfn();
            let locked = match wait {
                Wait::Yes => Some(self.table.lock(pfn)),
                Wait::No => self.table.try_lock(pfn),
            };
            let Some(page) = locked.filter(|_| entry.load() == place) else { return Ok(None) };
            page
        } else {
            self.lock_free_frame(&frame)
        };
        Self::claim(&page, object.owner(gfn));
        if !entry.replace(place, Place::Frame(frame.pfn()), &page) {
            page.clear_flags(PageFlags::IN_USE);
            return Ok(None);
        }
        self.pause(PausePoint::Filling);
        if let Err(error) = self.fill(object, gfn, place, &page) {
            if self.give_memory_back(page.pfn(), 1).is_err() {
                // It is taken up for good, and so is its unit of the ration.
                frame.into_use();
            }
            entry.store(place, &page);
            page.clear_flags(PageFlags::IN_USE);
            page.set_slot(None);
            return Err(error);
        }
        frame.into_use();
        Ok(Some(page))
    }

    /// Locks a free frame and makes it the owner's, without content.
    pub(super) fn prepare(&self, frame: &FreeFrame<'_>, owner: Owner) -> LockedPage<'_> {
        let page = self.lock_free_frame(frame);
        Self::claim(&page, owner);
        page
    }

    fn lock_free_frame(&self, frame: &FreeFrame<'_>) -> LockedPage<'_> {
        // Only a thread that lost sight of an older page of this frame can hold the lock, and it
        // waits for nothing. So no wait that the order of page locks would have to allow.
        loop {
            match self.table.try_lock(frame.pfn()) {
                Some(page) => return page,
                None => std::thread::yield_now(),
            }
        }
    }

    fn claim(page: &LockedPage<'_>, owner: Owner) {
        page.clear_flags(PageFlags::BY_WRITE | PageFlags::LENT);
        page.set_uses(0);
        page.set_slot(None);
        page.set_owner(owner);
        page.set_flags(PageFlags::IN_USE | PageFlags::FRESH);
    }

    fn fill(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
        place: Place,
        page: &LockedPage<'_>,
    ) -> Result<(), MmError> {
        let Place::Swap(slot) = place else {
            self.counters.zero_fills.add(1);
            return self.view.fill(page, &ZEROS);
        };
        let mut content = ZEROS;
        self.swap.read_page(slot, page.owner().tag(), &mut content)?;
        self.view.fill(page, &content)?;
        // The copy in swap stands: as long as the page stays clean it need not be written again.
        page.set_slot(Some(slot));
        self.reclaimer.note_duplicate(page);
        self.counters.swap_ins.add(1);
        if object.is_watched(gfn) {
            self.counters.watched_swap_ins.add(1);
        }
        Ok(())
    }

    /// Forgets a page for good, when its object goes away.
    pub(super) fn discard_page(&self, entry: &Entry, owner: Owner) {
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
    pub(super) fn discard_locked(&self, page: &LockedPage<'_>, entry: &Entry) {
        page.begin_invalidation();
        self.pause(PausePoint::Counted);
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

    /// Frees the slot of the page's copy in swap, if it has one.
    pub(super) fn free_copy(&self, page: &LockedPage<'_>) {
        if let Some(slot) = page.slot() {
            page.set_slot(None);
            self.free_slot(slot);
        }
    }

    /// Frees the slot that an entry has named and names no more: until it does not, somebody may come
    /// to the slot, and must not find it another page's.
    pub(super) fn free_slot_of(&self, entry: &Entry, slot: SwapSlot, owner: Owner) {
        self.check_slot_unnamed(slot, entry, owner);
        debug_assert_ne!(entry.load(), Place::Swap(slot), "it is named still");
        self.free_slot(slot);
    }

    fn free_slot(&self, slot: SwapSlot) {
        let freed = self.swap.free(slot);
        debug_assert!(freed.is_ok(), "a page's slot is its own: {freed:?}");
    }

    /// Invariant I4 at the moment when a frame loses its page.
    pub(super) fn check_not_exported(&self, page: &LockedPage<'_>) {
        // A fault that will find that it must retry may have added its entry for a moment, with
        // its MMU lock held. A call into the client waits for that lock, so it sees the end of it.
        for _ in 0..SETTLE_ROUNDS {
            if !page.frame().is_exported() {
                return;
            }
            self.notifiers.age_page(page);
            if cfg!(not(feature = "export-notifier")) {
                // No call to wait in.
                std::thread::yield_now();
            }
        }
        if page.frame().is_exported() {
            self.violations.report(MmViolation {
                kind: ViolationKind::StillExported,
                pfn: page.pfn(),
                owner: page.owner(),
            });
        }
    }
}
