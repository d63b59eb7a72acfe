//! Checks of the rules that SPTEs keep, each where a broken one shows first. They look at what is,
//! not at what led there; at many in batches, as all else does: other VMs are at work.

use std::sync::atomic::Ordering;

use crate::addr::{Gva, Pfn};
use crate::export_rmap::{Differences, Invalidation, LockedPage, Retain};
use crate::shadow_mmu::fault::{Install, Target};
use crate::shadow_mmu::roots::{SptePlace, State};
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::zap::{ALL, Cursor, Used};
use crate::shadow_mmu::{Mmu, ShadowMmu};
use crate::sys::signal;

impl ShadowMmu {
    /// An address that still has an SPTE pointing to the frame, whatever the reverse map says.
    #[must_use]
    pub fn find_mapping(&self, pfn: Pfn) -> Option<Gva> {
        self.mmu.find_spte(|spte, mapped| (mapped == pfn).then_some(spte.gva))
    }

    /// Invariant I3: compares the reverse map with the SPTEs, both ways, and their right to write with
    /// what the frames allow. Returns one sentence for each difference, at most 16. Guest and host may
    /// be at work meanwhile: they change both under the MMU lock. When a [stop](signal::is_stop_asked)
    /// is asked for it leaves off, with what it has found.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        let mmu = &*self.mmu;
        let table = mmu.mm.frame_table();
        let mut found = Differences::of(mmu.client, "SPTE");
        mmu.find_spte(|spte, pfn| {
            // Before the look: a check that is cut off knows of nothing.
            if signal::is_stop_asked() {
                return Some(());
            }
            let location = spte.place.location();
            found.check_mapping(table, pfn, location);
            if mmu.is_writable(spte.place) {
                found.check_writer(table, pfn, location);
            }
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
            if found.is_full() || signal::is_stop_asked() {
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

    /// What is about to be installed points to the frame in which the page is, does not write what must
    /// not be written, and was read of the guest's tables after its last flush. The MMU lock is held, the
    /// entry is in the reverse map, and nothing had overtaken the fault: so whoever takes the page away
    /// has yet to call here.
    pub(super) fn check_install(&self, locked: &State, new: Pte, install: &Install<'_>) {
        let gfn = install.translation.gfn;
        if let Target::Frame { token, .. } = install.target {
            let writable = new.contains(Pte::WRITABLE);
            self.mm.check_mapping(&self.object, gfn, token.pfn(), writable);
            let is_current = locked.flush_count(install.root) == Some(install.flushes);
            self.mm.check_translation(&self.object, gfn, token.pfn(), is_current);
        }
    }

    /// After a flush of the guest's own, the MMU lock held: the frames of the SPTEs that it cleared are
    /// exported still. Whoever wanted one of them until now had to call here, and so to wait.
    pub(super) fn check_zapped(&self, zapped: impl Iterator<Item = Pte>) {
        zapped.filter_map(|old| self.frame_of(old)).for_each(|pfn| self.mm.check_exported(pfn));
    }

    pub(super) fn is_writable(&self, place: SptePlace) -> bool {
        let entry = self.tables.entry(place.page, place.index).load(Ordering::Acquire);
        Pte::of(entry).contains(Pte::WRITABLE)
    }

    /// See [`ExportNotifier::still_allows`](crate::export_rmap::ExportNotifier::still_allows).
    pub(super) fn has_leftovers(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        let forbidden = match kind {
            Invalidation::Unmap => Pte::PRESENT,
            Invalidation::Replace(owner) if owner.object == self.object.number() => Pte::PRESENT,
            Invalidation::Clean => Pte::WRITABLE,
            Invalidation::Replace(_) | Invalidation::Recall => return false,
        };
        // What processors may still use without an SPTE has been flushed, too.
        if self.lock().unflushed.contains(&page.pfn()) {
            return true;
        }
        let (mut is_left, mut from) = (false, Some(0));
        while let Some(location) = from.filter(|_| !is_left) {
            let _state = self.lock();
            from = page.table().rmap_visit_batch(page.pfn(), self.client, location, |location| {
                let place = SptePlace::of_location(location);
                let spte = self.tables.entry(place.page, place.index);
                is_left |= Pte::of(spte.load(Ordering::Acquire)).intersects(forbidden);
                Retain::Keep
            });
        }
        is_left
    }
}
