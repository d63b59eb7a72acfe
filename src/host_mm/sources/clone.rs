//! Copies of a memory object that cost nothing until somebody writes: `fork`'s way.
//!
//! Each page in a frame is cleaned first (read-only everywhere, its dirty state harvested, one
//! flush for a batch), and becomes a shared page (`fault/shared.rs`). A fault that noted the
//! page's sequence before finds that it must start over, and then that it may not write. A page in
//! swap stays there: its slot belongs to the shared page from then on.

use std::sync::Arc;

use crate::books::find::Candidate;
use crate::error::{MmError, require_notifier};
use crate::fault::Pager;
use crate::frames::backing::Backing;
use crate::hooks::SKIP_CLONE_PROTECT;
use crate::memory::object::MemoryObject;
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::revoke::batch::{DetachedBatch, Revoked, add_to_batch};
use crate::revoke::free_frame::FreeFrame;
use crate::revoke::write_out::Saver;
use gnomon_export_rmap::addr::{Gfn, SwapSlot};
use gnomon_export_rmap::{Invalidation, Owner, PageFlags};

impl MemoryObject {
    /// A memory object with the same content, page by page as it is when the page's turn comes:
    /// whoever wants one moment's content keeps the guest from running meanwhile.
    ///
    /// # Errors
    /// If a page cannot be read back from swap or clients cannot give up their right to write.
    pub fn copy_on_write_clone(&self) -> Result<Arc<MemoryObject>, MmError> {
        let clone = self.mm.create_object(self.bytes())?;
        self.copy_on_write_into(&clone)?;
        Ok(clone)
    }

    /// As [`copy_on_write_clone`](Self::copy_on_write_clone), into an object of the same host memory
    /// that is all zero and that nobody uses yet. Pages that it does not have are passed over.
    ///
    /// # Errors
    /// As [`copy_on_write_clone`](Self::copy_on_write_clone).
    pub fn copy_on_write_into(&self, clone: &MemoryObject) -> Result<(), MmError> {
        self.share_pages_with(clone, self.pages.touched().map(|(gfn, _)| gfn))
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
        let clone = self.mm.create_object(self.bytes())?;
        self.share_pages_with(&clone, pages)?;
        Ok(clone)
    }

    fn share_pages_with(
        &self,
        clone: &MemoryObject,
        pages: impl Iterator<Item = Gfn>,
    ) -> Result<(), MmError> {
        share(&self.mm.pager, &self.pages, &clone.pages, pages)
    }
}

/// Lets `to` have pages of `from`.
pub(crate) fn share<B: Backing>(
    of: &Pager<B>,
    from: &ObjectPages,
    to: &ObjectPages,
    pages: impl Iterator<Item = Gfn>,
) -> Result<(), MmError> {
    require_notifier("to clone a guest's memory")?;
    of.require_any_frame("to clone a guest's memory")?;
    let mut batch = Vec::new();
    let mut stand_in = None;
    for gfn in pages {
        share_page(of, from, to, gfn, &mut batch, &mut stand_in)?;
    }
    share_batch(of, to, &mut batch)
}

impl MemoryObject {
    /// Number of its pages that name a shared page, other than one of zeros.
    #[must_use]
    pub fn shared_pages(&self) -> u64 {
        let is_shared =
            |entry: &Entry| matches!(entry.load(), Place::Shared(shared) if !shared.is_zero());
        self.pages.touched().filter(|(_, entry)| is_shared(entry)).count() as u64
    }
}

/// Shares a page, or puts it into the batch if it is the object's own and in a frame.
fn share_page<'a, B: Backing>(
    of: &'a Pager<B>,
    from: &'a ObjectPages,
    to: &ObjectPages,
    gfn: Gfn,
    batch: &mut Vec<Candidate<'a>>,
    stand_in: &mut Option<FreeFrame<'a, B>>,
) -> Result<(), MmError> {
    let Some(source) = from.touched_entry(gfn) else {
        return Ok(());
    };
    loop {
        match source.load() {
            Place::Absent => return Ok(()),
            Place::Shared(_) => {
                let Some(copy) = to.entry(gfn) else { return Ok(()) };
                if of.commons.name_again(source, copy) {
                    return Ok(());
                }
            }
            Place::Swap(slot) => {
                let frame = match stand_in.take() {
                    Some(frame) => frame,
                    None => {
                        // As page locks, reclaim is waited for with empty hands.
                        share_batch(of, to, batch)?;
                        of.allocate_frame(gfn)?
                    }
                };
                let frame = stand_in.insert(frame);
                if share_swapped(of, from.owner(gfn), source, slot, frame)?
                    && let Some(copy) = to.entry(gfn)
                    && of.commons.name_again(source, copy)
                {
                    return Ok(());
                }
            }
            Place::Frame(pfn) => {
                let share = |batch: &mut _| share_batch(of, to, batch);
                if add_to_batch(of, from, gfn, pfn, batch, share)? {
                    return Ok(());
                }
            }
        }
    }
}

/// Makes a page in swap a shared one, where it is; false if it is not there any more. Whoever
/// wants the page meanwhile waits for the lock of `frame`, which stands in for one with the page.
fn share_swapped<B: Backing>(
    of: &Saver<B>,
    owner: Owner,
    entry: &Entry,
    slot: SwapSlot,
    frame: &FreeFrame<'_, B>,
) -> Result<bool, MmError> {
    let page = frame.prepare(owner);
    let place = Place::Swap(slot);
    let is_ours = entry.replace(place, Place::Frame(frame.pfn()), &page);
    let shared = match is_ours {
        true => of.commons.take_in_swapped(&page, entry, slot, &of.swap).map(|_| true),
        false => Ok(false),
    };
    if shared.is_err() {
        entry.store(place, &page);
    }
    page.clear_flags(PageFlags::IN_USE);
    if let Ok(true) = shared {
        of.counters.shared.add(1);
    }
    shared
}

fn share_batch<'a, B: Backing>(
    of: &'a Saver<B>,
    to: &ObjectPages,
    batch: &mut Vec<Candidate<'a>>,
) -> Result<(), MmError> {
    let mut batch = std::mem::take(batch);
    if of.lab().is_broken(SKIP_CLONE_PROTECT) {
        let is_untold = |page: &mut Candidate<'_>| of.lab().breaks(SKIP_CLONE_PROTECT, || page.gfn);
        let untold = batch.extract_if(.., is_untold).collect();
        share_revoked(of, to, Revoked::untold(untold))?;
    }
    share_revoked(of, to, DetachedBatch::detach(of, batch, Invalidation::Clean).revoke()?)
}

fn share_revoked<B: Backing>(
    of: &Saver<B>,
    to: &ObjectPages,
    pages: Vec<Revoked<'_>>,
) -> Result<(), MmError> {
    for revoked in pages {
        of.make_shared(&revoked)?;
        if let Some(copy) = to.entry(revoked.gfn()) {
            of.commons.name_again(revoked.entry()?, copy);
        }
    }
    Ok(())
}
