//! What stands in the shadow tables, whatever the reverse map says. Looked at in batches, as all else:
//! other VMs may be at work.

use std::sync::atomic::Ordering;

use crate::addr::{Gva, Pfn};
use crate::export_rmap::Differences;
use crate::shadow_mmu::roots::SptePlace;
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::zap::{ALL, Cursor, Used};
use crate::shadow_mmu::{Mmu, ShadowMmu};

impl ShadowMmu {
    /// An address that still has an SPTE pointing to the frame, whatever the reverse map says.
    #[must_use]
    pub fn find_mapping(&self, pfn: Pfn) -> Option<Gva> {
        self.mmu.find_spte(|spte, mapped| (mapped == pfn).then_some(spte.gva))
    }

    /// Invariant I3: compares the reverse map with the SPTEs, both ways. Returns one sentence for
    /// each difference, at most 16. No vCPU may be at work meanwhile; the host may, since it changes
    /// both under the MMU lock.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        let mmu = &*self.mmu;
        let table = mmu.mm.frame_table();
        let Some(&client) = mmu.client.get() else {
            return Vec::new();
        };
        let mut found = Differences::of(client, "SPTE");
        mmu.find_spte(|spte, pfn| {
            found.check_mapping(table, pfn, spte.place.location());
            found.is_full().then_some(())
        });
        for pfn in (0..table.len()).map(Pfn::new).filter(|&pfn| !table.is_rmap_empty(pfn)) {
            let mut from = Some(0);
            while let Some(location) = from {
                let _state = mmu.lock();
                from = found.check_entries(table, pfn, location, |location| {
                    mmu.frame_at(SptePlace::of_location(location)) == Some(pfn)
                });
            }
            if found.is_full() {
                break;
            }
        }
        found.into_sentences()
    }
}

impl Mmu {
    /// The frame that the SPTE at a place points to, if any.
    fn frame_at(&self, place: SptePlace) -> Option<Pfn> {
        self.frame_of(Pte::of(self.tables.entry(place.page, place.index).load(Ordering::Acquire)))
    }

    /// Shows `visit`, with the MMU lock held, each SPTE that points to a frame, until it has found
    /// what it looks for.
    fn find_spte<R>(&self, mut visit: impl FnMut(&Used, Pfn) -> Option<R>) -> Option<R> {
        let mut state = self.lock();
        let mut number = 0;
        while number < state.roots.len() {
            let mut from = Some(Cursor::at_first(&ALL));
            while let Some(at) = from {
                // All may be forgotten while the lock is let go.
                let batch = self.batch(state.roots.get(number)?, &ALL, at);
                for spte in &batch.sptes {
                    let found = self.frame_at(spte.place).and_then(|pfn| visit(spte, pfn));
                    if found.is_some() {
                        return found;
                    }
                }
                from = batch.next;
                state = self.let_others_in(state);
            }
            number += 1;
        }
        None
    }
}
