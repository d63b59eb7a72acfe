//! From pages that are mapped to pages that nobody can touch: detach a batch, flush once.
//!
//! Guarantee: the types allow a frame to be written out or freed only after the flush that revoked
//! it. [`Detached`] pages have lost their mappings, but processors may still use what they cache;
//! [`Revoked`] pages come out of [`DetachedBatch::revoke`] alone, and only they give up a frame.
//!
//! Each page stays locked, and its invalidation in progress, from before the first client is told
//! until its entry names the new place: clear and notify first, set after. An error anywhere
//! leaves the page in its frame.

use crate::books::Books;
use crate::books::find::Candidate;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::host_view::HostView;
use crate::hooks::{COUNTED, DETACHED, DROP_DIRTY, FLUSHED, SKIP_FLUSH};
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::revoke::Revoker;
use gnomon_export_rmap::addr::{Gfn, Pfn};
use gnomon_export_rmap::{FlushReason, Harvest, Invalidation, LockedPage, PageFlags, RevokeError};

/// Most pages invalidated with one flush: their locks are all held until it is done.
pub(crate) const BATCH: usize = 64;

/// Locks a frame for a batch of locked pages. A page lock that somebody else holds is waited for with
/// empty hands: after `empty` has let go of the batch.
pub(crate) fn lock_beside_batch<'a, B: Backing>(
    of: &'a Books<B>,
    pfn: Pfn,
    empty: impl FnOnce() -> Result<(), MmError>,
) -> Result<LockedPage<'a>, MmError> {
    match of.table.try_lock(pfn) {
        Some(page) => Ok(page),
        None => {
            empty()?;
            Ok(of.table.lock(pfn))
        }
    }
}

/// A page with more mappings than this is invalidated alone: to tell the clients takes its time, in
/// which the other pages of a batch, and whoever wants them, would wait.
const HEAVY: usize = 1024;

/// Whether the page in a frame is one to be invalidated alone.
pub(crate) fn is_heavy<B: Backing>(of: &Books<B>, pfn: Pfn) -> bool {
    of.table.rmap_len(pfn) > HEAVY
}

/// Puts the page of `object` that is in frame `pfn` into the batch, locked; `false` if it is not
/// there any more. `invalidate` empties the batch: when it is full, before a page lock that somebody
/// else holds is waited for, and before and after a page with many mappings.
pub(crate) fn add_to_batch<'a, B: Backing>(
    of: &'a Books<B>,
    object: &'a ObjectPages,
    gfn: Gfn,
    pfn: Pfn,
    batch: &mut Vec<Candidate<'a>>,
    mut invalidate: impl FnMut(&mut Vec<Candidate<'a>>) -> Result<(), MmError>,
) -> Result<bool, MmError> {
    let page = lock_beside_batch(of, pfn, || invalidate(batch))?;
    // The page may have left before the lock was ours.
    if object.touched_entry(gfn).map(Entry::load) != Some(Place::Frame(pfn)) {
        return Ok(false);
    }
    let is_heavy = is_heavy(of, pfn);
    if is_heavy {
        invalidate(batch)?;
    }
    batch.push(Candidate { page, object, gfn });
    if is_heavy || batch.len() == BATCH {
        invalidate(batch)?;
    }
    Ok(true)
}

/// A page whose invalidation is in progress and whose clients have been told. Not flushed yet.
struct Detached<'a>(Candidate<'a>);

/// Detached pages that one flush will revoke.
#[must_use = "detached pages are still in use until they are revoked"]
pub(crate) struct DetachedBatch<'a, B: Backing = HostView> {
    of: &'a Revoker<B>,
    kind: Invalidation,
    pages: Vec<Detached<'a>>,
}

/// A page that nobody can touch through an old translation any more.
pub(crate) struct Revoked<'a>(Candidate<'a>);

impl<'a, B: Backing> DetachedBatch<'a, B> {
    /// Begins the invalidation of each page and tells the clients; what they recorded is noted in
    /// the page's `DIRTY` flag.
    pub(crate) fn detach(
        of: &'a Revoker<B>,
        candidates: Vec<Candidate<'a>>,
        kind: Invalidation,
    ) -> Self {
        let pages = candidates
            .into_iter()
            .filter_map(|candidate| {
                candidate.page.begin_invalidation();
                of.lab().pause(COUNTED);
                // Without the notifier nobody can be told, and exported pages stay. Looked at after
                // the count went up, as the notifier list does: a fault that is not seen backs out.
                if cfg!(not(feature = "export-notifier")) && candidate.page.frame().is_exported() {
                    return None;
                }
                let harvest = of.notifiers.invalidate_page(&candidate.page, kind);
                of.note_harvest(&candidate.page, harvest);
                Some(Detached(candidate))
            })
            .collect();
        Self { of, kind, pages }
    }

    /// One flush for all of them.
    ///
    /// # Errors
    /// If a client fails: the pages stay where they are.
    pub(crate) fn revoke(self) -> Result<Vec<Revoked<'a>>, RevokeError> {
        let pages: Vec<&LockedPage<'_>> = self
            .pages
            .iter()
            .filter(|page| !self.of.lab().breaks(SKIP_FLUSH, || page.0.gfn))
            .map(|page| &page.0.page)
            .collect();
        self.of.lab().pause(DETACHED);
        self.of.notifiers.revoke(&pages, FlushReason::Invalidated)?;
        self.of.lab().pause(FLUSHED);
        if self.kind == Invalidation::Unmap {
            // Copies are gone as mappings are. Not before the flush: if that fails, they may not be.
            self.pages.iter().for_each(|page| page.0.page.clear_flags(PageFlags::LENT));
        }
        self.pages.iter().for_each(|page| self.of.check_revoked(&page.0.page, self.kind));
        Ok(self.into_revoked())
    }

    /// Sabotage: pages taken for revoked before the flush, and the frames that it would have been of.
    pub(crate) fn unflushed(self) -> (Vec<Pfn>, Vec<Revoked<'a>>) {
        (self.pages.iter().map(|page| page.0.page.pfn()).collect(), self.into_revoked())
    }

    fn into_revoked(self) -> Vec<Revoked<'a>> {
        self.pages.into_iter().map(|Detached(candidate)| Revoked(candidate)).collect()
    }
}

impl<'a> Revoked<'a> {
    /// Sabotage: pages taken for revoked, though nobody was told of anything.
    pub(crate) fn untold(candidates: Vec<Candidate<'a>>) -> Vec<Self> {
        candidates.into_iter().map(Self).collect()
    }

    pub(crate) fn page(&self) -> &LockedPage<'a> {
        &self.0.page
    }

    /// The page again as one that may be invalidated, for a second step under the same lock.
    pub(crate) fn into_candidate(self) -> Candidate<'a> {
        self.0
    }

    /// Moves the page's being written from its frame to its object: it leaves the frame, is about to
    /// be shared, or the dirty log asks.
    pub(crate) fn log_written(&self) {
        let Candidate { page, object, gfn } = &self.0;
        if page.flags().contains(PageFlags::WRITTEN) {
            // The bit first: it must not be nowhere for a moment.
            object.note_written(*gfn);
            page.clear_flags(PageFlags::WRITTEN);
        }
    }

    pub(crate) fn gfn(&self) -> Gfn {
        self.0.gfn
    }

    /// The entry of the page in its object.
    ///
    /// # Errors
    /// None that can be brought about: a page in a frame has one.
    pub(crate) fn entry(&self) -> Result<&'a Entry, MmError> {
        let Candidate { object, gfn, .. } = self.0;
        let none = || MmError::OutOfFrames { gfn, why: "its page has no entry".into() };
        object.entry(gfn).ok_or_else(none)
    }
}

/// Has pages invalidated in batches of at most [`BATCH`], those with many mappings alone.
pub(crate) fn in_batches<'a, B: Backing>(
    of: &Books<B>,
    candidates: impl Iterator<Item = Candidate<'a>>,
    mut invalidate: impl FnMut(Vec<Candidate<'a>>) -> Result<(), MmError>,
) -> Result<(), MmError> {
    let mut batch = Vec::new();
    for candidate in candidates {
        let is_heavy = is_heavy(of, candidate.page.pfn());
        if is_heavy && !batch.is_empty() {
            invalidate(std::mem::take(&mut batch))?;
        }
        batch.push(candidate);
        if is_heavy || batch.len() == BATCH {
            invalidate(std::mem::take(&mut batch))?;
        }
    }
    if batch.is_empty() { Ok(()) } else { invalidate(batch) }
}

impl<B: Backing> Revoker<B> {
    fn note_harvest(&self, page: &LockedPage<'_>, harvest: Harvest) {
        self.check_harvest(page, harvest);
        if harvest.dirty && !self.lab().breaks(DROP_DIRTY, || page.owner().gfn) {
            page.set_flags(PageFlags::BY_WRITE);
        }
    }
}
