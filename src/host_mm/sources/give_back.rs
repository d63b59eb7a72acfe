//! Pages that the guest gives back: their content is zero from now on, and their frames and slots
//! are free without any write to swap.

use crate::books::find::Candidate;
use crate::error::{MmError, require_notifier};
use crate::fault::Pager;
use crate::hooks::FREEING;
use crate::memory::object::MemoryObject;
use crate::object::pages::{ObjectPages, Place};
use crate::revoke::batch::{DetachedBatch, add_to_batch};
use crate::revoke::vacate::{Vacator, vacate_all};
use gnomon_export_rmap::addr::Gfn;
use gnomon_export_rmap::{Invalidation, PageFlags};

impl MemoryObject {
    /// Forgets the content of `count` pages from `first`; those outside the object are passed over.
    /// Returns the number of pages that were not zero already.
    ///
    /// # Errors
    /// If clients cannot give pages up; some of the pages may be zero by then, others are as they were.
    pub fn free_pages(&self, first: Gfn, count: u64) -> Result<u64, MmError> {
        let of = &self.mm.pager;
        require_notifier("to free pages")?;
        let end = first.as_u64().saturating_add(count);
        let (mut freed, mut batch) = (0, Vec::new());
        let result = (first.as_u64()..end)
            .map(Gfn::new)
            .take_while(|&gfn| self.contains(gfn))
            .try_for_each(|gfn| free_page(of, &self.pages, gfn, &mut batch, &mut freed))
            .and_then(|()| free_batch(of, &mut batch, &mut freed));
        of.counters.pages_freed.add(freed);
        result.map(|()| freed)
    }
}

/// Frees a page, or puts it into the batch of those that are freed with one flush.
fn free_page<'a>(
    of: &'a Pager,
    object: &'a ObjectPages,
    gfn: Gfn,
    batch: &mut Vec<Candidate<'a>>,
    freed: &mut u64,
) -> Result<(), MmError> {
    let Some(entry) = object.touched_entry(gfn) else {
        return Ok(());
    };
    loop {
        let place = entry.load();
        match place {
            Place::Absent => return Ok(()),
            Place::Swap(slot) => {
                // Before the page is seen to be zero: it is written by then.
                object.note_written(gfn);
                of.lab().pause(FREEING);
                if entry.replace_frameless(place, Place::Absent) {
                    // And again: the log may have taken that, and the page been read and dropped
                    // clean again, before it became zero.
                    object.note_written(gfn);
                    of.free_slot_of(entry, slot, object.owner(gfn));
                    *freed += 1;
                    return Ok(());
                }
            }
            Place::Shared(shared) if shared.is_zero() => return Ok(()),
            Place::Shared(shared) => {
                // A frame is waited for with empty hands.
                free_batch(of, batch, freed)?;
                let Some(page) = of.fault_in_shared(entry, shared)? else { continue };
                of.revoke_from(&page, object.owner(gfn))?;
                object.note_written(gfn);
                of.lab().pause(FREEING);
                of.leave_shared(entry, shared, Some(page));
                *freed += 1;
                return Ok(());
            }
            Place::Frame(pfn) => {
                let free = |batch: &mut Vec<Candidate<'a>>| free_batch(of, batch, freed);
                if add_to_batch(of, object, gfn, pfn, batch, free)? {
                    return Ok(());
                }
            }
        }
    }
}

fn free_batch(
    of: &Vacator,
    batch: &mut Vec<Candidate<'_>>,
    freed: &mut u64,
) -> Result<(), MmError> {
    let detached = DetachedBatch::detach(of, std::mem::take(batch), Invalidation::Unmap);
    let mut pages = Vec::new();
    for revoked in detached.revoke()? {
        of.free_copy(revoked.page());
        // Should the host refuse to take its memory, it is a page like any other.
        revoked.page().set_flags(PageFlags::BY_WRITE);
        pages.push((revoked, Place::Absent));
    }
    for frame in vacate_all(of, pages) {
        drop(frame?);
        *freed += 1;
    }
    Ok(())
}
