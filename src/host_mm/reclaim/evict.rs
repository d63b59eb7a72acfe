//! Eviction: revoke a batch with one flush, write out, free.
//!
//! Guarantee: a page that could not be written out stays in its frame.

use std::time::Duration;

use crate::addr::SwapSlot;
use crate::export_rmap::{FlushReason, Invalidation, LockedPage, PageFlags};
use crate::host_mm::HostMm;
use crate::host_mm::books::find::Candidate;
use crate::host_mm::error::MmError;
use crate::host_mm::inject::Sabotage;
use crate::host_mm::object::pages::Place;
use crate::host_mm::reclaim::Reclaimed;
use crate::host_mm::revoke::batch::{DetachedBatch, Revoked};
use crate::host_mm::revoke::vacate::vacate_all;
use crate::host_mm::revoke::write_out::is_zero;
use crate::host_mm::violations::{MmViolation, ViolationKind};

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
            match self.save(&page) {
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
        let (frames, unflushed) = detached.unflushed();
        self.release_all(unflushed, &mut reclaimed);
        // Long enough for a vCPU to come along on most hosts; a real bug would only be rarer.
        std::thread::sleep(Duration::from_millis(2));
        let _ = self.notifiers.flush(&frames, FlushReason::Invalidated);
        reclaimed
    }

    /// Where the page will be out of its frame: in swap, where it is written if its copy there is
    /// missing or old.
    fn save(&self, page: &Revoked<'_>) -> Result<Place, MmError> {
        let page = page.page();
        self.settle_hole(page)?;
        let slot = if page.flags().contains(PageFlags::DIRTY) {
            self.write_out(page)?
        } else {
            self.drop_clean(page)?
        };
        Ok(slot.map_or(Place::Absent, Place::Swap))
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
}
