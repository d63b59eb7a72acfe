//! Remapping: a range of guest pages gets other pages, as `mremap` does to a range of addresses.
//!
//! All pages of a batch are told and flushed in one invalidation of the range before the first of
//! them has its new place, so that no client can see half of the old and half of the new range.

use crate::books::find::Candidate;
use crate::error::{MmError, require_notifier};
use crate::fault::Intent;
use crate::frames::backing::Backing;
use crate::hooks::EXCHANGING;
use crate::memory::object::MemoryObject;
use crate::object::pages::{Entry, Place};
use crate::revoke::batch::DetachedBatch;
use gnomon_export_rmap::Invalidation;
use gnomon_export_rmap::addr::{Gfn, Pfn};

/// Pages of each side that change places in one step.
pub const MAX_REMAP_PAGES: u64 = 32;
/// Attempts to have all pages in frames at once.
const ATTEMPTS: u32 = 64;

/// What becomes of the content of pages that change places.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Moves,
    Stays,
}

/// One page of a range: its object, number and entry.
#[derive(Clone, Copy)]
struct Side<'a> {
    object: &'a MemoryObject,
    gfn: Gfn,
    entry: &'a Entry,
}

impl MemoryObject {
    /// Exchanges `count` pages from `first` with those of another object from `other_first`, both of
    /// the same host memory, in one step: at most [`MAX_REMAP_PAGES`]. Shared pages become private.
    ///
    /// # Errors
    /// [`MmError::OutsideMemory`]; [`MmError::BadRemap`] if there are too many pages, or the ranges
    /// have some in common; [`MmError::OutOfFrames`] if not all pages could be in frames at the same
    /// time; if clients cannot give them up. Nothing has changed places then.
    pub fn exchange_pages(
        &self,
        first: Gfn,
        other: &MemoryObject,
        other_first: Gfn,
        count: u64,
    ) -> Result<(), MmError> {
        self.remap(first, other, other_first, count, Content::Moves)
    }

    /// As [`exchange_pages`](Self::exchange_pages), but first the pages that come are made copies of
    /// those that go: this object's content stays what it is, on other pages.
    ///
    /// # Errors
    /// As [`exchange_pages`](Self::exchange_pages).
    pub fn remap_to_copies(
        &self,
        first: Gfn,
        spare: &MemoryObject,
        spare_first: Gfn,
        count: u64,
    ) -> Result<(), MmError> {
        self.remap(first, spare, spare_first, count, Content::Stays)
    }

    fn remap(
        &self,
        first: Gfn,
        other: &MemoryObject,
        other_first: Gfn,
        count: u64,
        content: Content,
    ) -> Result<(), MmError> {
        let of = &self.mm.pager;
        require_notifier("to remap pages")?;
        of.require_any_frame("to remap pages")?;
        if count > MAX_REMAP_PAGES {
            let why = format!("{count} of them are more than {MAX_REMAP_PAGES} at once");
            return Err(MmError::BadRemap { why });
        }
        // Each page is locked once, and both sides of a pair at the same time.
        if self.number() == other.number() && first.as_u64().abs_diff(other_first.as_u64()) < count
        {
            let why = format!("{count} of them from {first} and from {other_first} overlap");
            return Err(MmError::BadRemap { why });
        }
        let mut pairs = Vec::new();
        for number in 0..count {
            pairs.push((self.side(first, number)?, other.side(other_first, number)?));
        }
        let pages = lock_all(&pairs)?;
        let revoked = DetachedBatch::detach(of, pages, Invalidation::Unmap).revoke()?;
        for (one, two) in &pairs {
            let page_of = |side: &Side<'_>| {
                revoked.iter().find(|page| page.page().owner() == side.object.pages.owner(side.gfn))
            };
            // Owners are what finds pages: looked up before either changes.
            if let (Some(a), Some(b)) = (page_of(one), page_of(two)) {
                a.log_written();
                b.log_written();
                if content == Content::Moves {
                    one.object.pages.note_written(one.gfn);
                }
                two.object.pages.note_written(two.gfn);
                let (a, b) = (a.page(), b.page());
                if content == Content::Stays {
                    of.view.copy(a, b)?;
                }
                let (owner_a, owner_b) = (a.owner(), b.owner());
                a.set_owner(owner_b);
                b.set_owner(owner_a);
                one.entry.store(Place::Frame(b.pfn()), a);
                of.lab().pause(EXCHANGING);
                two.entry.store(Place::Frame(a.pfn()), b);
                // Copies in swap carry the names that the pages had.
                of.forget_copy(a)?;
                of.forget_copy(b)?;
            }
        }
        of.counters.remaps.add(2 * count);
        Ok(())
    }

    fn side(&self, first: Gfn, number: u64) -> Result<Side<'_>, MmError> {
        let gfn = Gfn::new(first.as_u64().saturating_add(number));
        let entry = self.pages.entry(gfn).ok_or(MmError::OutsideMemory {
            gpa: gfn.base(),
            len: gnomon_export_rmap::addr::PAGE_SIZE_U64,
            memory_bytes: self.bytes(),
        })?;
        Ok(Side { object: self, gfn, entry })
    }
}

/// All pages in frames of their own, locked, in ascending order of the frames.
fn lock_all<'a>(pairs: &[(Side<'a>, Side<'a>)]) -> Result<Vec<Candidate<'a>>, MmError> {
    let sides: Vec<Side<'a>> = pairs.iter().flat_map(|&(one, two)| [one, two]).collect();
    for _ in 0..ATTEMPTS {
        for side in &sides {
            drop(side.object.mm.pager.fault_in(&side.object.pages, side.gfn, Intent::Write)?);
        }
        let mut frames: Vec<(Pfn, Side<'a>)> = sides
            .iter()
            .filter_map(|&side| match side.entry.load() {
                Place::Frame(pfn) => Some((pfn, side)),
                _ => None,
            })
            .collect();
        // In the order in which page locks are waited for.
        frames.sort_unstable_by_key(|&(pfn, _)| pfn);
        let locked: Vec<Candidate<'a>> = frames
            .into_iter()
            .map_while(|(pfn, side)| {
                let page = side.object.mm.frame_table().lock(pfn);
                (side.entry.load() == Place::Frame(pfn)).then_some(Candidate {
                    page,
                    object: &side.object.pages,
                    gfn: side.gfn,
                })
            })
            .collect();
        if locked.len() == sides.len() {
            return Ok(locked);
        }
    }
    let gfn = sides.first().map_or(Gfn::new(0), |side| side.gfn);
    Err(MmError::OutOfFrames {
        gfn,
        why: format!("{} pages to be remapped at once are never all in frames", sides.len()),
    })
}
