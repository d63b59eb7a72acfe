//! What is removed for reasons of the guest's (its flushes, and the end of all tables), in batches.
//!
//! Guarantees:
//!
//! - when a guest's flush returns, no processor uses a translation that was made from what the guest's
//!   tables said before it;
//! - the MMU lock is held for [`BATCH`] SPTEs or [`LEAVES`] leaf tables at a time, however many a guest
//!   has: whoever waits for it, the host with page locks in its hands above all, gets it in between
//!   ([`Mmu::let_others_in`]).
//!
//! Why a flush may let go of the lock half-way. Its count goes up first, under the lock. From then on
//! a fault that has read the guest's tables before it finds that it must start over, so whatever is
//! installed or given rights meanwhile is of what the tables say after. It may be zapped all the same,
//! which costs its guest a fault. What is old stands in its place until its batch, in which it is
//! cleared, flushed and taken out of the reverse map without the lock being let go: so a host that
//! takes frames away in between finds each SPTE either there, with its entry, or gone for good. An
//! SPTE that the host has cleared, and not flushed, before its batch comes is in `unflushed`, which
//! each batch flushes, the last one after all leaf tables were looked at. Two flushes at once, by two
//! vCPUs, each see to all of them: what one finds gone the other has flushed.
//!
//! That a leaf table has SPTEs of a large page is forgotten with the last of them, not before: until
//! then another vCPU's `invlpg` must find all that are left.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;

use crate::addr::{Gva, PAGE_SIZE_U64, Pfn};
use crate::export_rmap::rmap::VISIT_BATCH;
use crate::export_rmap::{ClientGuard, Gone, RevokeError, marks, trace};
use crate::shadow_mmu::hooks::{ZAP_FLUSHED, ZAPPED};
use crate::shadow_mmu::roots::{LEAF_SPAN, Root, RootTables, SptePlace, State, region_of};
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::{Mmu, ShadowMmu};
use crate::sync::lock;

/// SPTEs that are removed at a time.
pub(super) const BATCH: usize = VISIT_BATCH;
/// Leaf tables that are looked through at a time: most have few SPTEs.
const LEAVES: usize = 64;
/// The regions of all leaf tables.
pub(super) const ALL: RangeInclusive<u64> = 0..=u64::MAX;
/// Regions in a guest page of 1 GiB.
const REGIONS_OF_GIB: u64 = (1 << 30) / LEAF_SPAN;

/// Where the next batch begins: a region, and an entry of its leaf table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    region: u64,
    index: usize,
}

impl Cursor {
    /// The first of these regions.
    pub(super) fn at_first(regions: &RangeInclusive<u64>) -> Self {
        Self { region: *regions.start(), index: 0 }
    }
}

/// An SPTE that is not zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Used {
    pub(super) gva: Gva,
    pub(super) place: SptePlace,
}

/// SPTEs of a root's leaf tables, no more than may be looked at with the lock held.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) sptes: Vec<Used>,
    /// Regions of the leaf tables that were looked at to their end.
    finished: Vec<u64>,
    /// Where to go on.
    pub(super) next: Option<Cursor>,
}

impl Mmu {
    /// The SPTEs that are in use from a place on; those of leaf tables that come while the lock is
    /// let go may be among them.
    pub(super) fn batch(
        &self,
        tables: &RootTables,
        regions: &RangeInclusive<u64>,
        from: Cursor,
    ) -> Batch {
        let mut batch = Batch::default();
        for (&region, leaf) in tables.leaves.range(from.region..=*regions.end()) {
            if batch.finished.len() == LEAVES {
                batch.next = Some(Cursor { region, index: 0 });
                break;
            }
            let first = if region == from.region { from.index } else { 0 };
            for (index, _) in self.tables.used(leaf.page).filter(|&(index, _)| index >= first) {
                if batch.sptes.len() == BATCH {
                    batch.next = Some(Cursor { region, index });
                    return batch;
                }
                let gva = Gva::new(region * LEAF_SPAN + index as u64 * PAGE_SIZE_U64);
                batch.sptes.push(Used { gva, place: SptePlace { page: leaf.page, index } });
            }
            batch.finished.push(region);
        }
        batch
    }

    /// Forgets the translations in the leaf tables of these regions.
    pub(super) fn flush(
        &self,
        root: Root,
        regions: RangeInclusive<u64>,
    ) -> Result<(), RevokeError> {
        let mut state = self.lock();
        let Some(tables) = state.root_mut(root) else { return Ok(()) };
        // First of all: faults under way start over from here on.
        tables.flushes += 1;
        let mut from = Cursor::at_first(&regions);
        loop {
            // Void after a recycling, which has forgotten all.
            let Some(tables) = state.root_mut(root) else { return Ok(()) };
            let batch = self.batch(tables, &regions, from);
            self.zap(&mut state, batch.sptes.iter().map(|spte| spte.place))?;
            if let Some(tables) = state.root_mut(root) {
                self.forget_origins(tables, &batch.finished);
            }
            let Some(next) = batch.next else { return Ok(()) };
            from = next;
            state = self.let_others_in(state);
        }
    }

    /// Notes of leaf tables whose SPTEs were zapped what guest pages those that are left, installed
    /// while the lock was let go, are of.
    fn forget_origins(&self, tables: &mut RootTables, regions: &[u64]) {
        for region in regions {
            let Some(leaf) = tables.leaves.get_mut(region) else { continue };
            if !leaf.origins.is_empty() {
                let left = self.tables.used(leaf.page);
                leaf.origins = left.fold(Pte::empty(), |seen, (_, entry)| {
                    let of_large = Pte::FROM_2M.union(Pte::FROM_1G).bits();
                    seen | Pte::of(entry.load(Ordering::Relaxed) & of_large)
                });
            }
        }
    }

    /// Clears SPTEs for reasons of the guest's, with the MMU lock held: clear, flush, and only then
    /// out of the reverse map. As long as a processor may use an old translation, the frame is
    /// exported, and whoever wants to take it must ask us and so wait for the MMU lock. At most
    /// [`BATCH`] of them.
    ///
    /// The flush includes what the host has cleared and not flushed yet: an SPTE that is no longer
    /// there may still be in a TLB, and the guest has just been promised that it is not. These frames
    /// are few: those of the batches that host threads have locked at the moment.
    pub(super) fn zap(
        &self,
        state: &mut ClientGuard<'_, State>,
        places: impl Iterator<Item = SptePlace>,
    ) -> Result<(), RevokeError> {
        let mut zapped: Vec<(SptePlace, Pte)> = Vec::new();
        for place in places {
            let entry = self.tables.entry(place.page, place.index);
            if entry.load(Ordering::Relaxed) == 0 {
                continue;
            }
            zapped.push((place, Pte::of(marks::take(entry))));
        }
        let gone: Vec<Gone> =
            zapped.iter().filter_map(|&(place, old)| self.gone(place, old)).collect();
        let flushed = self.mm.frame_table().give_up(state, &gone, || {
            self.mm.lab().pause(ZAPPED);
            self.revoke(zapped.iter().map(|&(_, old)| old), &state.unflushed)?;
            self.mm.lab().pause(ZAP_FLUSHED);
            self.check_zapped(zapped.iter().map(|&(_, old)| old));
            Ok(())
        });
        if flushed.is_err() {
            // Back to what processors may still use, and what the reverse map says.
            for (place, old) in zapped {
                let entry = self.tables.entry(place.page, place.index);
                entry.store(old.bits(), Ordering::Release);
            }
            return flushed;
        }
        state.unflushed.clear();
        self.counters.guest_flushed.add(zapped.len() as u64);
        Ok(())
    }

    /// What an SPTE that was taken away has mapped, if that was a frame.
    fn gone(&self, place: SptePlace, old: Pte) -> Option<Gone> {
        let (pfn, entry) = (self.frame_of(old)?, self.rmap_entry(place));
        Some(Gone { pfn, entry, dirty: old.contains(Pte::DIRTY) })
    }

    /// Makes every processor drop what it made of these SPTEs, of frames or of the window's pages,
    /// and all that it has of the frames in `unflushed`.
    fn revoke(
        &self,
        sptes: impl Iterator<Item = Pte>,
        unflushed: &HashSet<Pfn>,
    ) -> Result<(), RevokeError> {
        let mut frames: Vec<Pfn> = unflushed.iter().copied().collect();
        let mut window = Vec::new();
        for spte in sptes {
            match self.frame_of(spte) {
                Some(pfn) => frames.push(pfn),
                None => window.push(spte.address()),
            }
        }
        self.guest_view.revoke(&frames)?;
        self.revoke_window(&window)
    }

    /// Drops every SPTE without a flush: for when no vCPU runs and none will before KVM has dropped
    /// all it cached. The host may take frames away meanwhile.
    pub(super) fn forget_everything(&self) {
        let _alone = lock(&self.forgetting);
        let mut state = self.lock();
        state.begin_forgetting();
        let mut number = 0;
        // No root comes: none can be made.
        while number < state.roots.len() {
            let mut from = Some(Cursor::at_first(&ALL));
            while let Some(at) = from {
                let batch = self.batch(&state.roots[number], &ALL, at);
                let gone: Vec<Gone> =
                    batch.sptes.iter().filter_map(|spte| self.forget(spte.place)).collect();
                self.mm.frame_table().give_up_uncached(&state, &gone);
                from = batch.next;
                state = self.let_others_in(state);
            }
            number += 1;
        }
        state.end_forgetting();
    }

    fn forget(&self, place: SptePlace) -> Option<Gone> {
        let old = Pte::of(marks::take(self.tables.entry(place.page, place.index)));
        self.gone(place, old)
    }
}

impl ShadowMmu {
    /// A guest's `invlpg`: forgets the translation of the guest page that maps `gva`, whatever its
    /// size.
    ///
    /// # Errors
    /// [`RevokeError`] if the flush failed; the VM must not go on.
    pub fn invlpg(&self, root: Root, gva: Gva) -> Result<(), RevokeError> {
        let mmu = &*self.mmu;
        let mut state = mmu.lock();
        let Some(tables) = state.root_mut(root) else { return Ok(()) };
        let region = region_of(gva);
        // The rest of a large page has SPTEs of its own.
        let gib = region - region % REGIONS_OF_GIB..=region | (REGIONS_OF_GIB - 1);
        let has = |regions: RangeInclusive<u64>, size: Pte| {
            tables.leaves.range(regions).any(|(_, leaf)| leaf.origins.contains(size))
        };
        let large = if tables.has_1g && has(gib.clone(), Pte::FROM_1G) {
            Some(gib)
        } else {
            has(region..=region, Pte::FROM_2M).then_some(region..=region)
        };
        if let Some(regions) = large {
            drop(state);
            return mmu.flush(root, regions);
        }
        tables.flushes += 1;
        let place = state.find(root, gva);
        mmu.zap(&mut state, place.into_iter())
    }

    /// Takes all shadow pages back. Every [`Root`] is void after it.
    ///
    /// Upper-level entries may only change here, because a KVM that shadows our tables does not see
    /// it: the caller keeps every vCPU out of `KVM_RUN` from before this call until it has deleted
    /// and added a memslot again, which makes KVM drop all it knows.
    pub fn recycle(&self) {
        trace::point!("recycle", client = self.mmu.client.as_u16());
        self.mmu.forget_everything();
        self.mmu.counters.recycles.add(1);
    }
}
