//! Bringing a page into a frame.
//!
//! The page's entry is pointed at the new frame first, with the page lock held, and filled after:
//! whoever else wants the page finds the frame and sleeps for its lock until the content is there.
//! (Linux adds a page to its page cache in the same order, for the same reason.)

mod shared;

use std::ops::Deref;

use crate::books::Books;
use crate::config::HostMmConfig;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::free_list::FreeList;
use crate::frames::host_view::HostView;
use crate::hooks::FILLING;
use crate::object::commons::SharedPage;
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::reclaim::Reclaimer;
use crate::revoke::Revoker;
use crate::revoke::free_frame::{FreeFrame, Mover, claim};
use crate::revoke::vacate::Vacator;
use crate::revoke::write_out::Saver;
use crate::swap::SwapSpace;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::{LockedPage, PageFlags, trace};

const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

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

/// Brings pages into frames, and reclaims for want of one. It holds everything that host memory is made
/// of: see [`Books`] for what is handed on of it.
pub(super) struct Pager<B: Backing = HostView> {
    reclaimer: Reclaimer<B>,
}

impl<B: Backing> Deref for Pager<B> {
    type Target = Reclaimer<B>;

    fn deref(&self) -> &Reclaimer<B> {
        &self.reclaimer
    }
}

impl<B: Backing> Pager<B> {
    /// Of so many frames, none of which holds a page yet.
    pub(super) fn assemble(
        frames: u32,
        config: HostMmConfig,
        view: B,
        swap: SwapSpace,
        lab: Lab,
    ) -> Self {
        // The ration; identity placement has a frame for each page beside it.
        let rationed = u32::try_from(config.host_memory_bytes / PAGE_SIZE_U64).unwrap_or(u32::MAX);
        let free = FreeList::new(rationed, config.placement);
        let saver = Saver::new(Revoker::new(Books::new(frames, config, view.clone(), lab)), swap);
        let mover = Mover::new(Vacator::new(saver, view, free));
        Self { reclaimer: Reclaimer::new(mover) }
    }

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

    /// The page as its object's own, and no copy of it out: it may be written.
    pub(super) fn lock_for_write(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
    ) -> Result<LockedPage<'_>, MmError> {
        let page = self.fault_in(object, gfn, Intent::Write)?;
        self.recall(&page)?;
        Ok(page)
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
            Place::Absent | Place::Swap(_) => match self.take_free_frame(Some(gfn)) {
                Some(frame) => self.bring_in(object, gfn, entry, place, frame, Wait::No),
                None => Ok(None),
            },
        }
    }

    /// A free frame, by direct reclaim if there is none.
    pub(super) fn allocate_frame(&self, gfn: Gfn) -> Result<FreeFrame<'_, B>, MmError> {
        loop {
            if let Some(frame) = self.take_free_frame(Some(gfn)) {
                return Ok(frame);
            }
            self.reclaim_directly(gfn)?;
        }
    }

    /// Fills a frame with the page; `None` if another thread was faster.
    fn bring_in<'a>(
        &'a self,
        object: &ObjectPages,
        gfn: Gfn,
        entry: &Entry,
        place: Place,
        frame: FreeFrame<'a, B>,
        wait: Wait,
    ) -> Result<Option<LockedPage<'a>>, MmError> {
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
            frame.lock()
        };
        claim(&page, object.owner(gfn));
        if !entry.replace(place, Place::Frame(frame.pfn()), &page) {
            page.clear_flags(PageFlags::IN_USE);
            return Ok(None);
        }
        self.lab().pause(FILLING);
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
        trace::point!(
            "bring in",
            pfn = page.pfn().index(),
            object = page.owner().object,
            gfn = gfn.as_u64(),
            from = if matches!(place, Place::Swap(_)) { "swap" } else { "zero" },
        );
        Ok(Some(page))
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
        self.note_duplicate(page);
        self.counters.swap_ins.add(1);
        if object.is_watched(gfn) {
            self.counters.watched_swap_ins.add(1);
        }
        Ok(())
    }
}
