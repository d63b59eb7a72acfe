//! Eviction: detach a batch, flush once, write out, free.
//!
//! Guarantee: the types allow a frame to be written out or freed only after the flush that revoked
//! it. [`Detached`] pages have lost their mappings, but processors may still use what they cache;
//! [`Revoked`] pages come out of [`DetachedBatch::revoke`] alone, and only they give up a frame.
//!
//! Each page stays locked, and its invalidation in progress, from before the first client is told
//! until its entry names the new place: clear and notify first, set after. An error anywhere
//! leaves the page in its frame.

use std::collections::VecDeque;
use std::time::Duration;

use crate::addr::{Gfn, Pfn, SwapSlot};
use crate::export_rmap::{FlushReason, Harvest, Invalidation, LockedPage, PageFlags, RevokeError};
use crate::host_mm::frames::FreeFrame;
use crate::host_mm::host_view::PageBuf;
use crate::host_mm::object::{Entry, ObjectPages, Place};
use crate::host_mm::reclaim::Reclaimed;
use crate::host_mm::swap::SwapError;
use crate::host_mm::{HostMm, MmError, MmViolation, PausePoint, Sabotage, ViolationKind};

/// Pages of which one duplicate in swap is given up at a time when swap is full.
const DUPLICATES_AT_ONCE: usize = 64;

/// A page that may be invalidated: its frame is locked and holds it.
pub(in crate::host_mm) struct Candidate<'a> {
    pub(in crate::host_mm) page: LockedPage<'a>,
    pub(in crate::host_mm) object: &'a ObjectPages,
    pub(in crate::host_mm) gfn: Gfn,
}

/// Most pages invalidated with one flush: their locks are all held until it is done.
pub(in crate::host_mm) const BATCH: usize = 64;

/// Locks a frame for a batch of locked pages. A page lock that somebody else holds is waited for with
/// empty hands: after `empty` has let go of the batch.
pub(in crate::host_mm) fn lock_beside_batch<'a>(
    mm: &'a HostMm,
    pfn: Pfn,
    empty: impl FnOnce() -> Result<(), MmError>,
) -> Result<LockedPage<'a>, MmError> {
    match mm.table.try_lock(pfn) {
        Some(page) => Ok(page),
        None => {
            empty()?;
            Ok(mm.table.lock(pfn))
        }
    }
}

/// A page with more mappings than this is invalidated alone: to tell the clients takes its time, in
/// which the other pages of a batch, and whoever wants them, would wait.
const HEAVY: usize = 1024;

/// Whether the page in a frame is one to be invalidated alone.
pub(in crate::host_mm) fn is_heavy(mm: &HostMm, pfn: Pfn) -> bool {
    mm.table.rmap_len(pfn) > HEAVY
}

/// Puts the page of `object` that is in frame `pfn` into the batch, locked; `false` if it is not
/// there any more. `invalidate` empties the batch: when it is full, before a page lock that somebody
/// else holds is waited for, and before and after a page with many mappings.
pub(in crate::host_mm) fn add_to_batch<'a>(
    mm: &'a HostMm,
    object: &'a ObjectPages,
    gfn: Gfn,
    pfn: Pfn,
    batch: &mut Vec<Candidate<'a>>,
    mut invalidate: impl FnMut(&mut Vec<Candidate<'a>>) -> Result<(), MmError>,
) -> Result<bool, MmError> {
    let page = lock_beside_batch(mm, pfn, || invalidate(batch))?;
    // The page may have left before the lock was ours.
    if object.touched_entry(gfn).map(Entry::load) != Some(Place::Frame(pfn)) {
        return Ok(false);
    }
    let is_heavy = is_heavy(mm, pfn);
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
pub(in crate::host_mm) struct DetachedBatch<'a> {
    mm: &'a HostMm,
    kind: Invalidation,
    pages: Vec<Detached<'a>>,
}

/// A page that nobody can touch through an old translation any more.
pub(in crate::host_mm) struct Revoked<'a>(Candidate<'a>);

impl<'a> DetachedBatch<'a> {
    /// Begins the invalidation of each page and tells the clients; what they recorded is noted in
    /// the page's `DIRTY` flag.
    pub(in crate::host_mm) fn detach(
        mm: &'a HostMm,
        candidates: Vec<Candidate<'a>>,
        kind: Invalidation,
    ) -> Self {
        let pages = candidates
            .into_iter()
            .filter_map(|candidate| {
                candidate.page.begin_invalidation();
                mm.pause(PausePoint::Counted);
                // Without the notifier nobody can be told, and exported pages stay. Looked at after
                // the count went up, as the notifier list does: a fault that is not seen backs out.
                if cfg!(not(feature = "export-notifier")) && candidate.page.frame().is_exported() {
                    return None;
                }
                let harvest = mm.notifiers.invalidate_page(&candidate.page, kind);
                mm.note_harvest(&candidate.page, harvest);
                Some(Detached(candidate))
            })
            .collect();
        Self { mm, kind, pages }
    }

    /// One flush for all of them.
    ///
    /// # Errors
    /// If a client fails: the pages stay where they are.
    pub(in crate::host_mm) fn revoke(self) -> Result<Vec<Revoked<'a>>, RevokeError> {
        let pages: Vec<&LockedPage<'_>> = self
            .pages
            .iter()
            .filter(|page| !self.mm.is_sabotaged(Sabotage::SkipFlush, page.0.gfn))
            .map(|page| &page.0.page)
            .collect();
        self.mm.pause(PausePoint::Detached);
        self.mm.notifiers.revoke(&pages, FlushReason::Invalidated)?;
        self.mm.pause(PausePoint::Flushed);
        if self.kind == Invalidation::Unmap {
            // Copies are gone as mappings are. Not before the flush: if that fails, they may not be.
            self.pages.iter().for_each(|page| page.0.page.clear_flags(PageFlags::LENT));
        }
        self.pages.iter().for_each(|page| self.mm.check_revoked(&page.0.page, self.kind));
        Ok(self.into_revoked())
    }

    /// Sabotage: pages taken for revoked, though nobody was told of anything.
    pub(in crate::host_mm) fn untold(candidates: Vec<Candidate<'a>>) -> Vec<Revoked<'a>> {
        candidates.into_iter().map(Revoked).collect()
    }

    fn into_revoked(self) -> Vec<Revoked<'a>> {
        self.pages.into_iter().map(|Detached(candidate)| Revoked(candidate)).collect()
    }
}

impl<'a> Revoked<'a> {
    pub(in crate::host_mm) fn page(&self) -> &LockedPage<'a> {
        &self.0.page
    }

    /// The page again as one that may be invalidated, for a second step under the same lock.
    pub(in crate::host_mm) fn into_candidate(self) -> Candidate<'a> {
        self.0
    }

    /// Moves the page's being written from its frame to its object: it leaves the frame, is about to
    /// be shared, or the dirty log asks.
    pub(in crate::host_mm) fn log_written(&self) {
        let Candidate { page, object, gfn } = &self.0;
        if page.flags().contains(PageFlags::WRITTEN) {
            // The bit first: it must not be nowhere for a moment.
            object.note_written(*gfn);
            page.clear_flags(PageFlags::WRITTEN);
        }
    }

    pub(in crate::host_mm) fn gfn(&self) -> Gfn {
        self.0.gfn
    }

    /// The entry of the page in its object.
    ///
    /// # Errors
    /// None that can be brought about: a page in a frame has one.
    pub(in crate::host_mm) fn entry(&self) -> Result<&'a Entry, MmError> {
        let Candidate { object, gfn, .. } = self.0;
        let none = || MmError::OutOfFrames { gfn, why: "its page has no entry".into() };
        object.entry(gfn).ok_or_else(none)
    }

    /// Takes the frame from the page, which `place` has now.
    pub(in crate::host_mm) fn vacate(
        self,
        mm: &'a HostMm,
        place: Place,
    ) -> Result<FreeFrame<'a>, MmError> {
        mm.give_memory_back(self.page().pfn(), 1)?;
        self.leave(mm, place)
    }

    /// The page's memory is given back, if it had to be.
    fn leave(self, mm: &'a HostMm, place: Place) -> Result<FreeFrame<'a>, MmError> {
        let entry = self.entry()?;
        mm.pause(PausePoint::Saved);
        self.log_written();
        let page = &self.0.page;
        entry.store(place, page);
        page.clear_flags(PageFlags::IN_USE | PageFlags::BY_WRITE | PageFlags::FRESH);
        page.set_slot(None);
        mm.check_not_exported(page);
        Ok(FreeFrame::from_revoked(mm, page.pfn()))
    }

    /// Where the page will be out of its frame: in swap, where it is written if its copy there is
    /// missing or old.
    fn save(&self, mm: &HostMm) -> Result<Place, MmError> {
        let page = &self.0.page;
        mm.settle_hole(page)?;
        let slot = if page.flags().contains(PageFlags::DIRTY) {
            mm.write_out(page)?
        } else {
            mm.drop_clean(page)?
        };
        Ok(slot.map_or(Place::Absent, Place::Swap))
    }
}

/// Takes the frames from pages, each of which has its place outside by now. The memory of neighbours
/// is given back at once: each time, the host looks through all mappings and processors.
pub(in crate::host_mm) fn vacate_all<'a>(
    mm: &'a HostMm,
    pages: Vec<(Revoked<'a>, Place)>,
) -> impl Iterator<Item = Result<FreeFrame<'a>, MmError>> {
    let mut pages: VecDeque<_> = pages.into();
    // Pages whose memory was given back together, and is gone.
    let mut given_back = 0;
    std::iter::from_fn(move || {
        if given_back == 0 {
            let run = neighbours(pages.iter().map(|(page, _)| page.page().pfn()));
            let first = pages.front()?.0.page().pfn();
            // If the host refuses them all at once, each is told by itself.
            given_back = mm.give_memory_back(first, run).map_or(0, |()| run);
        }
        let (page, place) = pages.pop_front()?;
        if given_back == 0 {
            return Some(page.vacate(mm, place));
        }
        given_back -= 1;
        Some(page.leave(mm, place))
    })
}

/// How many frames from the first on follow each other.
fn neighbours(mut frames: impl Iterator<Item = Pfn>) -> u32 {
    let Some(first) = frames.next() else { return 0 };
    let follows = |(pfn, number): &(Pfn, u32)| pfn.as_u32() == *number;
    let next = first.as_u32().saturating_add(1)..=u32::MAX;
    let last = frames.zip(next).take_while(follows).last();
    1 + last.map_or(0, |(pfn, _)| pfn.as_u32() - first.as_u32())
}

impl HostMm {
    /// Evicts pages with one flush.
    pub(in crate::host_mm) fn evict(&self, candidates: Vec<Candidate<'_>>) -> Reclaimed {
        let mut reclaimed = Reclaimed::default();
        if candidates.is_empty() {
            return reclaimed;
        }
        let (candidates, early): (Vec<_>, Vec<_>) = candidates
            .into_iter()
            .partition(|page| !self.is_sabotaged(Sabotage::EarlyReuse, page.gfn));
        if !early.is_empty() {
            reclaimed.add(self.evict_with_early_reuse(early));
        }
        let detached = DetachedBatch::detach(self, candidates, Invalidation::Unmap);
        let revoked = match detached.revoke() {
            Ok(revoked) => revoked,
            Err(error) => {
                reclaimed.error = Some(error.into());
                return reclaimed;
            }
        };
        self.release_all(revoked, &mut reclaimed);
        reclaimed
    }

    fn release_all<'a>(&'a self, revoked: Vec<Revoked<'a>>, reclaimed: &mut Reclaimed) {
        let mut saved = Vec::with_capacity(revoked.len());
        for page in revoked {
            match page.save(self) {
                Ok(place) => saved.push((page, place)),
                Err(error) => self.note_failed(error, reclaimed),
            }
        }
        for frame in vacate_all(self, saved) {
            match frame {
                Ok(frame) => {
                    drop(frame);
                    self.counters.evictions.add(1);
                    reclaimed.frames += 1;
                }
                Err(error) => self.note_failed(error, reclaimed),
            }
        }
    }

    fn note_failed(&self, error: MmError, reclaimed: &mut Reclaimed) {
        self.counters.failed_evictions.add(1);
        reclaimed.failed += 1;
        reclaimed.error = Some(error);
    }

    /// Sabotage: what `revoke` exists to forbid. The frames go to new pages, then they are flushed.
    fn evict_with_early_reuse<'a>(&'a self, candidates: Vec<Candidate<'a>>) -> Reclaimed {
        let detached = DetachedBatch::detach(self, candidates, Invalidation::Unmap);
        let mut reclaimed = Reclaimed::default();
        let frames: Vec<Pfn> = detached.pages.iter().map(|page| page.0.page.pfn()).collect();
        self.release_all(detached.into_revoked(), &mut reclaimed);
        // Long enough for a vCPU to come along on most hosts; a real bug would only be rarer.
        std::thread::sleep(Duration::from_millis(2));
        let _ = self.notifiers.flush(&frames, FlushReason::Invalidated);
        reclaimed
    }

    fn note_harvest(&self, page: &LockedPage<'_>, harvest: Harvest) {
        self.check_harvest(page, harvest);
        if harvest.dirty && !self.is_sabotaged(Sabotage::DropDirty, page.owner().gfn) {
            page.set_flags(PageFlags::BY_WRITE);
        }
    }

    /// Writes a dirty page to swap and marks it clean; `None` if it is all zero and needs no slot.
    /// Nobody can write the page: it is revoked, or read-only everywhere.
    pub(in crate::host_mm) fn write_out(
        &self,
        page: &LockedPage<'_>,
    ) -> Result<Option<SwapSlot>, MmError> {
        let content = self.content(page)?;
        if is_zero(&content) {
            if let Some(slot) = page.slot() {
                page.set_slot(None);
                self.swap.free(slot)?;
            }
            self.counters.zero_drops.add(1);
        } else {
            // The old copy is of no use to anyone: its slot takes the new one.
            let slot = match page.slot() {
                Some(slot) => slot,
                None => self.allocate_slot()?,
            };
            page.set_slot(Some(slot));
            self.reclaimer.note_duplicate(page);
            self.swap.write_page(slot, page.owner().tag(), &content)?;
            self.counters.swap_outs.add(1);
        }
        page.clear_flags(PageFlags::DIRTY);
        Ok(page.slot())
    }

    /// The place of a page that is clean: its slot, or none for a page of zeros.
    fn drop_clean(&self, page: &LockedPage<'_>) -> Result<Option<SwapSlot>, MmError> {
        let slot = page.slot();
        if self.config.check_evictions {
            let content = self.content(page)?;
            let same = match slot {
                Some(slot) => self.swap.matches(slot, page.owner().tag(), &content),
                None => is_zero(&content),
            };
            if !same {
                let kind = ViolationKind::CleanPageDiffers;
                let owner = page.owner();
                self.violations.report(MmViolation { kind, pfn: page.pfn(), owner });
            }
        }
        let counter = match slot {
            Some(_) => &self.counters.clean_drops,
            None => &self.counters.zero_drops,
        };
        counter.add(1);
        Ok(slot)
    }

    pub(in crate::host_mm) fn content(&self, page: &LockedPage<'_>) -> Result<PageBuf, MmError> {
        self.view.content(page)
    }

    /// A free slot; where there is none, one that only duplicates a page in a frame.
    fn allocate_slot(&self) -> Result<SwapSlot, SwapError> {
        loop {
            match self.swap.try_alloc() {
                Err(SwapError::Full { .. }) if self.release_duplicates()? > 0 => {}
                other => return other,
            }
        }
    }

    /// Frees slots whose page also stands in a frame; the frame's copy is then the only one, and
    /// dirty. Returns the number of slots freed.
    fn release_duplicates(&self) -> Result<usize, SwapError> {
        let duplicates = &self.reclaimer.duplicates;
        let has_slot = |pfn: Pfn| self.table.get(pfn).is_some_and(|frame| frame.slot().is_some());
        let (mut released, mut busy) = (0, 0);
        while let Some(pfn) = duplicates.next(busy, has_slot) {
            if !has_slot(pfn) {
                continue;
            }
            let Some(page) = self.table.try_lock(pfn) else {
                duplicates.put_back(pfn);
                busy += 1;
                continue;
            };
            if let Some(slot) = page.slot().filter(|_| page.flags().contains(PageFlags::IN_USE)) {
                page.set_flags(PageFlags::DIRTY);
                page.set_slot(None);
                self.swap.free(slot)?;
                released += 1;
            }
            if released == DUPLICATES_AT_ONCE {
                break;
            }
        }
        self.counters.duplicate_slots_released.add(released as u64);
        Ok(released)
    }
}

pub(in crate::host_mm) fn is_zero(content: &PageBuf) -> bool {
    // Word-wise and without an early exit inside a line, so that it compiles to vector code.
    content.chunks_exact(64).all(|line| line.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;

    #[test]
    fn a_page_is_zero_only_if_every_byte_is() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for at in 0..PAGE_SIZE {
            let mut content = [0; PAGE_SIZE];
            content[at] = 1;
            assert!(!is_zero(&content), "byte {at}");
        }
    }

    #[test]
    fn frames_are_neighbours_up_to_the_first_gap() {
        let count = |frames: &[u32]| neighbours(frames.iter().copied().map(Pfn::new));
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[7]), 1);
        assert_eq!(count(&[7, 8, 9, 11, 12]), 3);
        assert_eq!(count(&[7, 6, 5]), 1);
        assert_eq!(count(&[u32::MAX - 1, u32::MAX]), 2);
    }
}
