//! Pages that are in frames, found and locked.

use std::sync::Arc;

use crate::books::Books;
use crate::frames::backing::Backing;
use crate::object::pages::{ObjectPages, Place};
use gnomon_export_rmap::addr::{Gfn, Pfn};
use gnomon_export_rmap::{LockedPage, PageFlags};

/// A page that may be invalidated: its frame is locked and holds it.
pub(crate) struct Candidate<'a> {
    pub(crate) page: LockedPage<'a>,
    pub(crate) object: &'a ObjectPages,
    pub(crate) gfn: Gfn,
}

impl<B: Backing> Books<B> {
    /// Frames that hold a page and could be locked, in ascending order.
    pub(crate) fn candidates<'a>(
        &'a self,
        objects: &'a [Arc<ObjectPages>],
        frames: &[Pfn],
    ) -> impl Iterator<Item = Candidate<'a>> {
        let mut frames = frames.to_vec();
        frames.sort_unstable();
        frames.into_iter().filter_map(move |pfn| self.candidate(objects, pfn))
    }

    /// The page in this frame, if there is one and nobody holds its lock.
    pub(crate) fn candidate<'a>(
        &'a self,
        objects: &'a [Arc<ObjectPages>],
        pfn: Pfn,
    ) -> Option<Candidate<'a>> {
        if !self.table.get(pfn)?.is_in_use() {
            return None;
        }
        let page = self.table.try_lock(pfn)?;
        // Looked at again: the page may have left before the lock was ours.
        if !page.flags().contains(PageFlags::IN_USE) {
            return None;
        }
        let owner = page.owner();
        // They are in order of their numbers, and there may be thousands.
        let at = objects.binary_search_by_key(&owner.object, |object| object.number).ok()?;
        Some(Candidate { page, object: &objects[at], gfn: owner.gfn })
    }

    pub(crate) fn try_lock_resident(
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
}
