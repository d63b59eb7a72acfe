//! Pages that the guest gives back: their content is zero from now on, and their frames and slots
//! are free without any write to swap.

use crate::addr::Gfn;
use crate::export_rmap::Invalidation;
use crate::host_mm::object::Place;
use crate::host_mm::reclaim::{Candidate, DetachedBatch};
use crate::host_mm::stats::Counters;
use crate::host_mm::{MemoryObject, MmError, require_notifier};

impl MemoryObject {
    /// Forgets the content of `count` pages from `first`; those outside the object are passed over.
    /// Returns the number of pages that were not zero already.
    ///
    /// # Errors
    /// If clients cannot give a page up; pages before it are zero by then.
    pub fn free_pages(&self, first: Gfn, count: u64) -> Result<u64, MmError> {
        require_notifier("to free pages")?;
        let end = first.as_u64().saturating_add(count);
        let mut freed = 0;
        for raw in first.as_u64()..end {
            let gfn = Gfn::new(raw);
            if !self.contains(gfn) {
                break;
            }
            freed += u64::from(self.free_page(gfn)?);
        }
        Counters::add(&self.mm.counters.pages_freed, freed);
        Ok(freed)
    }

    fn free_page(&self, gfn: Gfn) -> Result<bool, MmError> {
        let mm = &*self.mm;
        let Some(entry) = self.pages.touched_entry(gfn) else {
            return Ok(false);
        };
        loop {
            let place = entry.load();
            match place {
                Place::Absent => return Ok(false),
                Place::Swap(slot) => {
                    if entry.replace_frameless(place, Place::Absent) {
                        self.pages.note_written(gfn);
                        mm.free_slot(slot);
                        return Ok(true);
                    }
                }
                Place::Shared(shared) if shared.is_zero() => return Ok(false),
                Place::Shared(shared) => {
                    let Some(page) = mm.fault_in_shared(entry, shared)? else { continue };
                    mm.revoke_from(&page, self.pages.owner(gfn))?;
                    self.pages.note_written(gfn);
                    mm.leave_shared(entry, shared, Some(page));
                    return Ok(true);
                }
                Place::Frame(pfn) => {
                    let page = mm.frame_table().lock(pfn);
                    if entry.load() != place {
                        continue;
                    }
                    let candidate = Candidate { page, object: &self.pages, gfn };
                    let batch = DetachedBatch::detach(mm, vec![candidate], Invalidation::Unmap);
                    for revoked in batch.revoke()? {
                        mm.free_copy(revoked.page());
                        self.pages.note_written(gfn);
                        drop(revoked.vacate(mm, Place::Absent)?);
                    }
                    return Ok(true);
                }
            }
        }
    }
}
