//! Copies of a memory object that cost nothing until somebody writes: `fork`'s way.
//!
//! Each page in a frame is cleaned first (read-only everywhere, its dirty state harvested, one
//! flush for a batch), and becomes a [shared page](crate::host_mm::share). A fault that noted the
//! page's sequence before finds that it must start over, and then that it may not write.

use std::sync::Arc;

use crate::addr::Gfn;
use crate::export_rmap::Invalidation;
use crate::host_mm::fault::Intent;
use crate::host_mm::object::{ObjectPages, Place};
use crate::host_mm::reclaim::{Candidate, DetachedBatch, add_to_batch};
use crate::host_mm::{HostMm, MemoryObject, MmError, require_notifier};

impl MemoryObject {
    /// A memory object with the same content, page by page as it is when the page's turn comes:
    /// whoever wants one moment's content keeps the guest from running meanwhile.
    ///
    /// # Errors
    /// If a page cannot be read back from swap or clients cannot give up their right to write.
    pub fn copy_on_write_clone(&self) -> Result<Arc<MemoryObject>, MmError> {
        self.share_pages(self.pages.touched().map(|(gfn, _)| gfn))
    }

    /// As [`copy_on_write_clone`](Self::copy_on_write_clone) for some pages only; the others are
    /// zero in the clone. Pages outside the object are passed over.
    ///
    /// # Errors
    /// As [`copy_on_write_clone`](Self::copy_on_write_clone).
    pub fn share_pages(
        &self,
        pages: impl Iterator<Item = Gfn>,
    ) -> Result<Arc<MemoryObject>, MmError> {
        require_notifier("to clone a guest's memory")?;
        self.mm.require_any_frame("to clone a guest's memory")?;
        let clone = self.mm.create_object(self.bytes())?;
        let mut batch = Vec::new();
        for gfn in pages {
            self.mm.share_page(&self.pages, &clone.pages, gfn, &mut batch)?;
        }
        self.mm.share_batch(&clone.pages, &mut batch)?;
        Ok(clone)
    }
}

impl HostMm {
    /// Shares a page, or puts it into the batch if it is the object's own and in a frame.
    fn share_page<'a>(
        &'a self,
        from: &'a ObjectPages,
        to: &ObjectPages,
        gfn: Gfn,
        batch: &mut Vec<Candidate<'a>>,
    ) -> Result<(), MmError> {
        let Some(source) = from.touched_entry(gfn) else {
            return Ok(());
        };
        loop {
            match source.load() {
                Place::Absent => return Ok(()),
                Place::Shared(_) => {
                    let Some(copy) = to.entry(gfn) else { return Ok(()) };
                    if self.commons.name_again(source, copy) {
                        return Ok(());
                    }
                }
                Place::Swap(_) => {
                    // As page locks, faults are waited for with empty hands.
                    self.share_batch(to, batch)?;
                    drop(self.fault_in(from, gfn, Intent::Read)?);
                }
                Place::Frame(pfn) => {
                    let share = |batch: &mut _| self.share_batch(to, batch);
                    if add_to_batch(self, from, gfn, pfn, batch, share)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn share_batch<'a>(
        &'a self,
        to: &ObjectPages,
        batch: &mut Vec<Candidate<'a>>,
    ) -> Result<(), MmError> {
        let detached = DetachedBatch::detach(self, std::mem::take(batch), Invalidation::Clean);
        for revoked in detached.revoke()? {
            self.make_shared(&revoked)?;
            if let Some(copy) = to.entry(revoked.gfn()) {
                self.commons.name_again(revoked.entry()?, copy);
            }
        }
        Ok(())
    }
}
