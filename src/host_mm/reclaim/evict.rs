//! Eviction: revoke a batch with one flush, write out, free.
//!
//! Guarantee: a page that could not be written out stays in its frame.

use std::time::Duration;

use crate::books::find::Candidate;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::hooks::EARLY_REUSE;
use crate::object::pages::Place;
use crate::reclaim::Reclaimed;
use crate::revoke::batch::{DetachedBatch, Revoked};
use crate::revoke::vacate::{Vacator, vacate_all};
use crate::revoke::write_out::is_zero;
use crate::violations::{MmViolation, ViolationKind};
use gnomon_export_rmap::addr::SwapSlot;
use gnomon_export_rmap::{FlushReason, Invalidation, LockedPage, PageFlags, trace};

/// Evicts pages with one flush.
pub(super) fn evict<B: Backing>(of: &Vacator<B>, candidates: Vec<Candidate<'_>>) -> Reclaimed {
    let mut reclaimed = Reclaimed::default();
    if candidates.is_empty() {
        return reclaimed;
    }
    let candidates = if of.lab().is_broken(EARLY_REUSE) {
        evict_with_early_reuse(of, candidates, &mut reclaimed)
    } else {
        candidates
    };
    let detached = DetachedBatch::detach(of, candidates, Invalidation::Unmap);
    let revoked = match detached.revoke() {
        Ok(revoked) => revoked,
        Err(error) => {
            reclaimed.error = Some(error.into());
            return reclaimed;
        }
    };
    release_all(of, revoked, &mut reclaimed);
    reclaimed
}

fn release_all<'a, B: Backing>(
    of: &'a Vacator<B>,
    revoked: Vec<Revoked<'a>>,
    reclaimed: &mut Reclaimed,
) {
    let mut saved = Vec::with_capacity(revoked.len());
    for page in revoked {
        match save(of, &page) {
            Ok(place) => {
                told(&page, place);
                saved.push((page, place));
            }
            Err(error) => note_failed(of, error, reclaimed),
        }
    }
    for frame in vacate_all(of, saved) {
        match frame {
            Ok(frame) => {
                drop(frame);
                of.counters.evictions.add(1);
                reclaimed.frames += 1;
            }
            Err(error) => note_failed(of, error, reclaimed),
        }
    }
}

/// For whoever follows a page: it leaves its frame.
fn told(page: &Revoked<'_>, place: Place) {
    let page = page.page();
    let owner = page.owner();
    trace::point!(
        "evict",
        pfn = page.pfn().index(),
        object = owner.object,
        gfn = owner.gfn.as_u64(),
        to = if matches!(place, Place::Swap(_)) { "swap" } else { "zero" },
    );
}

fn note_failed<B: Backing>(of: &Vacator<B>, error: MmError, reclaimed: &mut Reclaimed) {
    of.counters.failed_evictions.add(1);
    reclaimed.failed += 1;
    reclaimed.error = Some(error);
}

/// Sabotage: what `revoke` exists to forbid. The frames go to new pages, then they are flushed. Returns
/// the pages for which the rule holds.
fn evict_with_early_reuse<'a, B: Backing>(
    of: &'a Vacator<B>,
    candidates: Vec<Candidate<'a>>,
    reclaimed: &mut Reclaimed,
) -> Vec<Candidate<'a>> {
    let is_early = |page: &Candidate<'_>| of.lab().breaks(EARLY_REUSE, || page.gfn);
    let (early, others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_early);
    if early.is_empty() {
        return others;
    }
    let (frames, unflushed) = DetachedBatch::detach(of, early, Invalidation::Unmap).unflushed();
    release_all(of, unflushed, reclaimed);
    // Long enough for a vCPU to come along on most hosts; a real bug would only be rarer.
    std::thread::sleep(Duration::from_millis(2));
    let _ = of.notifiers.flush(&frames, FlushReason::Invalidated);
    others
}

/// Where the page will be out of its frame: in swap, where it is written if its copy there is
/// missing or old.
fn save<B: Backing>(of: &Vacator<B>, page: &Revoked<'_>) -> Result<Place, MmError> {
    let page = page.page();
    of.settle_hole(page)?;
    let slot = if page.flags().contains(PageFlags::DIRTY) {
        of.write_out(page)?
    } else {
        drop_clean(of, page)?
    };
    Ok(slot.map_or(Place::Absent, Place::Swap))
}

/// The place of a page that is clean: its slot, or none for a page of zeros.
pub(crate) fn drop_clean<B: Backing>(
    of: &Vacator<B>,
    page: &LockedPage<'_>,
) -> Result<Option<SwapSlot>, MmError> {
    let slot = page.slot();
    if of.config.check_evictions {
        let content = of.content(page)?;
        let same = match slot {
            Some(slot) => of.swap.matches(slot, page.owner().tag(), &content),
            None => is_zero(&content),
        };
        // Its memory may have been removed since it was settled: then the frame says nothing of the page,
        // and whoever is told of the removal forgets what stands in swap.
        if !same && !of.is_hole(page)? {
            let kind = ViolationKind::CleanPageDiffers;
            let owner = page.owner();
            of.violations.report(MmViolation { kind, pfn: page.pfn(), owner });
        }
    }
    let counter = match slot {
        Some(_) => &of.counters.clean_drops,
        None => &of.counters.zero_drops,
    };
    counter.add(1);
    Ok(slot)
}
