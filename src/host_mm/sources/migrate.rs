//! Migration: a page moves to another frame, as for compaction. The clients' mappings go, one flush
//! for a batch, then the content is copied and the page's entry set: clear and notify before set.

use crate::error::{MmError, require_notifier};
use crate::frames::backing::Backing;
use crate::hooks::MOVED;
use crate::memory::HostMm;
use crate::object::pages::Place;
use crate::revoke::batch::{DetachedBatch, Revoked, in_batches};
use crate::revoke::free_frame::{FreeFrame, Mover};
use crate::revoke::vacate::Vacator;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::{Invalidation, PageFlags};

impl HostMm {
    /// Moves the pages in these frames to free frames, as far as there are any, the frame holds a
    /// page and nobody has it locked. Returns the number of pages moved.
    ///
    /// # Errors
    /// If clients cannot give the pages up; they stay where they are.
    pub fn migrate_frames(&self, frames: &[Pfn]) -> Result<usize, MmError> {
        migrate(&self.pager, frames)
    }
}

pub(crate) fn migrate<B: Backing>(of: &Mover<B>, frames: &[Pfn]) -> Result<usize, MmError> {
    require_notifier("to migrate pages")?;
    of.require_any_frame("to migrate pages")?;
    let mut free: Vec<FreeFrame<'_, B>> = Vec::new();
    while free.len() < frames.len() && of.has_spare_frames() {
        let Some(frame) = of.take_free_frame(None) else { break };
        free.push(frame);
    }
    let objects = of.objects.load();
    let mut moved = 0;
    let candidates = of.candidates(&objects, &frames[..free.len()]);
    in_batches(of, candidates, |batch| {
        for revoked in DetachedBatch::detach(of, batch, Invalidation::Unmap).revoke()? {
            let Some(frame) = free.pop() else { break };
            drop(move_page(of, revoked, frame)?);
            moved += 1;
            of.counters.migrations.add(1);
        }
        Ok(())
    })?;
    Ok(moved)
}

/// Moves a page; returns the frame that it was in.
fn move_page<'a, B: Backing>(
    of: &'a Vacator<B>,
    revoked: Revoked<'a>,
    frame: FreeFrame<'a, B>,
) -> Result<FreeFrame<'a, B>, MmError> {
    let old = revoked.page();
    let new = frame.prepare(old.owner());
    if let Err(error) = of.view.copy(old, &new) {
        new.clear_flags(PageFlags::IN_USE);
        return Err(error);
    }
    new.set_flags(old.flags() & PageFlags::BY_WRITE);
    // The new frame speaks for the page from now on.
    old.clear_flags(PageFlags::WRITTEN);
    new.set_uses(old.flags().uses());
    if !old.flags().contains(PageFlags::FRESH) {
        new.clear_flags(PageFlags::FRESH);
    }
    // The slot's copy goes with the page.
    new.set_slot(old.slot());
    if old.slot().is_some() {
        of.note_duplicate(&new);
    }
    old.set_slot(None);
    of.lab().pause(MOVED);
    let vacated = revoked.vacate(of, Place::Frame(new.pfn()));
    if vacated.is_ok() {
        frame.into_use();
    }
    vacated
}
