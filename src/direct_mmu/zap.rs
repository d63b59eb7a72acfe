//! Ageing without accessed bits: mappings are taken away, and pages that are used fault again, which
//! is cheap since they stay in their frames. The books keep the pages as mapped; the kernel's page
//! tables then hold less than the books, never more.
//!
//! A zap raises the same event as somebody's `MADV_REMOVE` of the range would, and losing the content
//! of one's own pages would be bad luck. So the events of a range that is being zapped are counted by
//! page: each page is ours once, and removed if it comes up again. Until the zap has returned, faults
//! in its range are put off; by then both events have been read, whichever was first.

use std::ops::Range;

use crate::addr::Pfn;
use crate::direct_mmu::Mmu;
use crate::direct_mmu::shard::{Job, Noted, Shard};
use crate::export_rmap::RevokeError;
use crate::sync::lock;

use std::sync::atomic::Ordering;

/// A zap that is under way.
#[derive(Debug)]
pub(super) struct OwnZap {
    first: u64,
    /// How often each page came up in an event.
    seen: Vec<u8>,
}

impl OwnZap {
    pub(super) fn new(pages: &Range<u64>) -> Self {
        let count = usize::try_from(pages.end - pages.start).unwrap_or(0);
        Self { first: pages.start, seen: vec![0; count] }
    }

    pub(super) fn covers(&self, page: u64) -> bool {
        page >= self.first && page - self.first < self.seen.len() as u64
    }

    /// Counts a page of an event in; `false` if it is none of this zap's.
    fn count(&mut self, page: u64) -> bool {
        let index = page.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| self.seen.get_mut(index)) {
            Some(seen) => {
                *seen = seen.saturating_add(1);
                true
            }
            None => false,
        }
    }

    /// The pages that somebody else removed meanwhile, if so many of the events were our own.
    fn removed(&self, own: u8) -> Vec<Range<u64>> {
        runs((self.first..).zip(&self.seen).filter(|&(_, &seen)| seen > own).map(|(page, _)| page))
    }
}

/// Ascending pages as ranges of neighbours.
pub(super) fn runs(pages: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

impl Noted {
    /// Notes an event: the pages that it removes, but for those that are only zapped.
    pub(super) fn note_removed(&mut self, pages: Range<u64>) -> Vec<Range<u64>> {
        let removed = match &mut self.zap {
            Some(zap) => runs(pages.filter(|&page| !zap.count(page))),
            None => vec![pages],
        };
        self.removals.extend(removed.iter().cloned());
        removed
    }

    /// `own` is the number of events that the zap has raised.
    pub(super) fn end_zap(&mut self, own: u8) -> Vec<Range<u64>> {
        let removed = self.zap.take().map_or_else(Vec::new, |zap| zap.removed(own));
        self.removals.extend(removed.iter().cloned());
        removed
    }
}

impl Mmu {
    /// Takes the mappings of these frames away, and of those in between: one call for each part of
    /// the window, since each call waits for its event to be read.
    pub(super) fn zap_to_age(&self, frames: &[Pfn]) -> Result<(), RevokeError> {
        for shard in &self.shards {
            let own = || {
                let pages = frames.iter().map(|pfn| u64::from(pfn.as_u32()));
                pages.filter(|page| shard.pages.contains(page))
            };
            if let (Some(first), Some(last)) = (own().min(), own().max()) {
                self.zap(shard, first..last + 1)?;
            }
        }
        Ok(())
    }

    pub(super) fn zap(&self, shard: &Shard, pages: Range<u64>) -> Result<(), RevokeError> {
        let _one = lock(&shard.zapping);
        // Acquire pairs with the Release in the end of the layer, which then waits for the lock that
        // is held here.
        if self.ending.load(Ordering::Acquire) {
            return Ok(());
        }
        self.counters.aged_zaps.add(1);
        shard.lock().zap = Some(OwnZap::new(&pages));
        let count = usize::try_from(pages.end - pages.start).unwrap_or(0);
        // Frames have the numbers of their pages, 32 bits each.
        let zapped = match u32::try_from(pages.start) {
            Ok(first) => self.view.discard_once(Pfn::new(first), count),
            Err(_) => Ok(()),
        };
        let mut noted = shard.lock();
        // A call that failed has raised none: the kernel looks at the range before it tells of it.
        for removed in noted.end_zap(zapped.is_ok().into()) {
            self.mm.expect_holes();
            shard.hand_over(Job::Remove(removed));
        }
        zapped.map_err(|source| RevokeError { frames: count, source })
    }
}
