//! The shadow MMU as an export client: what it does when the host takes a page away.

use std::sync::atomic::AtomicU64;

use crate::addr::Pfn;
use crate::export_rmap::client::{FLUSHING, TOLD};
use crate::export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Retain, RevokeError, marks,
};
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::roots::SptePlace;
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::stats::Counters;

impl Mmu {
    /// Visits the SPTEs that map the page, under the MMU lock, which is let go after each batch of
    /// them. Its page lock is held and its invalidation under way: no fault adds one meanwhile, or a
    /// right to one, since the count has gone up (`export`, `is_current`). The guest's own flushes may take
    /// some away. They note what those have recorded, which the host looks at after this, and flush
    /// what is in `unflushed`: the first batches, which are cleared but not flushed.
    fn visit_sptes(
        &self,
        page: &LockedPage<'_>,
        mut visit: impl FnMut(&AtomicU64) -> Retain,
    ) -> u64 {
        let (mut visited, mut from) = (0, Some(0));
        let mut state = self.lock();
        while let Some(location) = from {
            let mut dropped = false;
            from = page.table().rmap_visit_batch(page.pfn(), self.client, location, |location| {
                let retain = visit(self.entry_at(location));
                visited += 1;
                dropped |= retain == Retain::Drop;
                retain
            });
            if dropped {
                state.unflushed.insert(page.pfn());
            }
            if from.is_some() {
                state = self.let_others_in(state);
            }
        }
        visited
    }

    fn entry_at(&self, location: u64) -> &AtomicU64 {
        let place = SptePlace::of_location(location);
        self.tables.entry(place.page, place.index)
    }
}

impl ExportNotifier for Mmu {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let mut harvest = Harvest::default();
        // SPTEs do not tell which of the guest's pages they map.
        let keep = match kind {
            Invalidation::Unmap => false,
            Invalidation::Replace(owner) if owner.object == self.object.number() => false,
            Invalidation::Replace(_) => return harvest,
            Invalidation::Clean => true,
            // SPTEs are no copies.
            Invalidation::Recall => return harvest,
        };
        let visited = self.visit_sptes(page, |entry| {
            let old = if keep {
                marks::restrict(entry, (Pte::WRITABLE | Pte::DIRTY).bits())
            } else {
                marks::take(entry)
            };
            let old = Pte::of(old);
            harvest = harvest.or(Harvest {
                dirty: old.contains(Pte::DIRTY),
                accessed: old.contains(Pte::ACCESSED),
            });
            if keep { Retain::Keep } else { Retain::Drop }
        });
        self.mm.lab().pause(TOLD);
        let Counters { write_protected, invalidated, .. } = &self.counters;
        let counter = if keep { write_protected } else { invalidated };
        counter.add(visited);
        harvest
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        let mut state = self.lock();
        // Of a page with more mappings than a batch has, each look sees a few, and others the next
        // time: the clock's hand must not take longer for it than for others. It goes on where the
        // last look stopped, and then from the front: all mappings of a page that has few.
        let mut from = Some(std::mem::take(&mut state.age_from));
        while let Some(first) = from {
            let next = page.table().rmap_visit_batch(page.pfn(), self.client, first, |location| {
                accessed |= marks::age(self.entry_at(location), Pte::ACCESSED.bits());
                Retain::Keep
            });
            state.age_from = next.unwrap_or(0);
            from = (first > 0 && next.is_none()).then_some(0);
        }
        accessed
    }

    fn still_allows(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        self.has_leftovers(page, kind)
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        match reason {
            FlushReason::Recalled => return Ok(()),
            FlushReason::Aged if !self.config.zap_to_age => return Ok(()),
            FlushReason::Aged => self.counters.aged_zaps.add(frames.len() as u64),
            FlushReason::Invalidated => {}
        }
        self.mm.lab().pause(FLUSHING);
        self.guest_view.revoke(frames)?;
        if reason == FlushReason::Invalidated {
            let unflushed = &mut self.lock().unflushed;
            for pfn in frames {
                unflushed.remove(pfn);
            }
        }
        Ok(())
    }
}
