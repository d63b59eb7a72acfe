//! Fault-around: a fault costs the same whether it installs one SPTE or sixteen.
//!
//! Neighbours that the guest has mapped and used before (so that no accessed bit of its own is set
//! for a page that was not touched) are installed if their pages are in frames and not locked. Ahead
//! of a sequential stream of faults, pages are also read back from swap, as long as frames are
//! free for it. Neighbours' SPTEs start without the accessed bit, so that reclaim is not misled.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64};
use crate::export_rmap::LockedPage;
use crate::host_mm::MmError;
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::fault::{Install, Installed, Target};
use crate::shadow_mmu::hooks::AROUND_NOTED;
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::tables::ENTRIES;
use crate::shadow_mmu::walk::{Access, PagingContext, Translation};

/// Guest entries looked at: the aligned group around the one that faulted, and those ahead.
const GROUP: usize = 16;

/// A neighbour that could be installed.
struct Neighbour {
    gva: Gva,
    translation: Translation,
    target: Target,
}

impl Mmu {
    pub(super) fn fault_around(
        &self,
        context: &PagingContext,
        fault: &Install<'_>,
    ) -> Result<(), MmError> {
        let page = fault.gva.as_u64() / PAGE_SIZE_U64;
        let ahead = self.lock().streams.advance(page);
        let neighbours = self.neighbours(context, fault, ahead)?;
        if neighbours.is_empty() {
            return Ok(());
        }
        self.mm.lab().pause(AROUND_NOTED);
        let mut state = self.lock();
        if state.flush_count(fault.root) != Some(fault.flushes) {
            return Ok(());
        }
        for Neighbour { gva, translation, target } in &neighbours {
            let install =
                Install { gva: *gva, access: Access::Read, translation, target: *target, ..*fault };
            // The group lies in the table of the fault itself, which exists.
            let Some(place) = self.spte_place(&mut state, fault.root, *gva, Pte::empty()) else {
                break;
            };
            let entry = self.tables.entry(place.page, place.index);
            if entry.load(Ordering::Relaxed) == 0 {
                let mut spte = self.new_spte(&install);
                // Not `& !ACCESSED`: that would drop the bits without a name, the address.
                spte.remove(Pte::ACCESSED);
                if self.install_new(&state, place, spte, &install) == Installed::Done {
                    self.counters.fault_around.add(1);
                }
            }
        }
        Ok(())
    }

    fn neighbours(
        &self,
        context: &PagingContext,
        fault: &Install<'_>,
        ahead: usize,
    ) -> Result<Vec<Neighbour>, MmError> {
        let mut neighbours = Vec::new();
        let Some((table, index)) = fault.translation.leaf else {
            return Ok(neighbours);
        };
        let first = index - index % GROUP;
        let end = (first + GROUP).max(index + 1 + ahead).min(ENTRIES);
        let entries = self.read_entries(table, first..end)?;
        let group_gva = fault.gva.page_base().as_u64() - (index - first) as u64 * PAGE_SIZE_U64;
        for (number, raw) in entries.into_iter().enumerate() {
            let entry = Pte::of(raw);
            let wanted = Pte::PRESENT | Pte::ACCESSED;
            if first + number == index
                || !entry.contains(wanted)
                || self.has_reserved_bits(context, 1, entry)
            {
                continue;
            }
            let upper = fault.translation.upper;
            let translation = Translation {
                gfn: Gpa::new(entry.address()).gfn(),
                writable: upper.writable && entry.contains(Pte::WRITABLE) || !context.write_protect,
                executable: upper.executable && !entry.contains(Pte::NO_EXECUTE),
                dirty: entry.contains(Pte::DIRTY),
                ..*fault.translation
            };
            let is_ahead = (index + 1..=index + ahead).contains(&(first + number));
            let Some(page) = self.lock_neighbour(translation.gfn, is_ahead)? else {
                continue;
            };
            let target = Target::of(&page);
            let gva = Gva::new(group_gva + number as u64 * PAGE_SIZE_U64);
            neighbours.push(Neighbour { gva, translation, target });
        }
        Ok(neighbours)
    }

    fn read_entries(&self, table: Gfn, range: Range<usize>) -> Result<Vec<u64>, MmError> {
        let page = self.object.lock_page(table)?;
        range
            .map(|at| {
                let word = self.object.word(&page, at * size_of::<u64>())?;
                Ok(word.load(Ordering::Acquire))
            })
            .collect()
    }

    /// The neighbour's page, if it can be had without waiting for another; ahead of a stream also
    /// by reading it back, while that takes no frame from anyone.
    fn lock_neighbour(&self, gfn: Gfn, is_ahead: bool) -> Result<Option<LockedPage<'_>>, MmError> {
        let resident = self.object.try_lock_resident(gfn);
        if resident.is_some() || !is_ahead || !self.mm.has_spare_frames() {
            return Ok(resident);
        }
        if !self.object.is_in_swap(gfn) {
            return Ok(None);
        }
        let page = self.object.lock_page(gfn)?;
        self.counters.read_ahead.add(1);
        Ok(Some(page))
    }
}
