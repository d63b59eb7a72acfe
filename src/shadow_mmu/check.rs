//! Checks of the rules that SPTEs keep, each where a broken one shows first. They look at what is,
//! not at what led there.

use std::sync::atomic::Ordering;

use crate::export_rmap::{Invalidation, LockedPage};
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::fault::{Install, Target};
use crate::shadow_mmu::roots::{SptePlace, State};
use crate::shadow_mmu::spte::Pte;

impl Mmu {
    /// What is about to be installed points to the frame in which the page is, does not write what must
    /// not be written, and was read of the guest's tables after its last flush. The MMU lock is held, the entry is in the reverse map, and nothing
    /// had overtaken the fault: so whoever takes the page away has yet to call here.
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
        let state = self.lock();
        // What processors may still use without an SPTE has been flushed, too.
        state.unflushed.contains(&page.pfn())
            || self.client.get().is_some_and(|&client| {
                let entries = page.table().rmap_entries(page.pfn());
                entries.iter().filter(|entry| entry.client() == client).any(|entry| {
                    let place = SptePlace::of_location(entry.location());
                    let spte = self.tables.entry(place.page, place.index);
                    Pte::of(spte.load(Ordering::Acquire)).intersects(forbidden)
                })
            })
    }
}
