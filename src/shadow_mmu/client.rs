//! The shadow MMU as an export client: what it does when the host takes a page away.

use std::sync::atomic::Ordering;

use crate::addr::Pfn;
use crate::export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Retain, RevokeError,
};
use crate::host_mm::PausePoint;
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::roots::SptePlace;
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::stats::Counters;

impl Mmu {
    /// Visits the SPTEs that map the page, under the MMU lock.
    fn visit_sptes(
        &self,
        page: &LockedPage<'_>,
        mut visit: impl FnMut(&std::sync::atomic::AtomicU64) -> Retain,
    ) -> u64 {
        let Some(&client) = self.client.get() else {
            return 0;
        };
        let mut state = self.lock();
        let (mut visited, mut dropped) = (0, false);
        page.table().rmap_visit(page.pfn(), client, |location| {
            let place = SptePlace::of_location(location);
            visited += 1;
            let retain = visit(self.tables.entry(place.page, place.index));
            dropped |= retain == Retain::Drop;
            retain
        });
        if dropped {
            state.unflushed.insert(page.pfn());
        }
        visited
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
            // One atomic step: a bit that hardware sets is either in `old`, or not set at all.
            let old = if keep {
                entry.fetch_and(!(Pte::WRITABLE | Pte::DIRTY).bits(), Ordering::AcqRel)
            } else {
                entry.swap(0, Ordering::AcqRel)
            };
            let old = Pte::of(old);
            harvest = harvest.or(Harvest {
                dirty: old.contains(Pte::DIRTY),
                accessed: old.contains(Pte::ACCESSED),
            });
            if keep { Retain::Keep } else { Retain::Drop }
        });
        self.mm.pause(PausePoint::Told);
        let Counters { write_protected, invalidated, .. } = &self.counters;
        let counter = if keep { write_protected } else { invalidated };
        counter.add(visited);
        harvest
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        self.visit_sptes(page, |entry| {
            let old = entry.fetch_and(!Pte::ACCESSED.bits(), Ordering::AcqRel);
            accessed |= Pte::of(old).contains(Pte::ACCESSED);
            Retain::Keep
        });
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
        self.mm.pause(PausePoint::Flushing);
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
