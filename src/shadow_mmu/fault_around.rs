//! Fault-around: a fault costs the same whether it installs one SPTE or sixteen.
//!
//! Only what needs no waiting is installed: neighbours that the guest has mapped and used before
//! (so that no accessed bit is set for a page that was not touched), whose pages are in frames and
//! not locked. Their SPTEs start without the accessed bit, so that reclaim is not misled.

use std::sync::atomic::Ordering;

use crate::addr::{Gpa, Gva, PAGE_SIZE_U64};
use crate::host_mm::MmError;
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::fault::{Install, Target};
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::stats::Counters;
use crate::shadow_mmu::walk::{Access, PagingContext, Translation};
use crate::sync::lock;

/// Guest entries looked at, an aligned group around the one that faulted.
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
        let neighbours = self.neighbours(context, fault)?;
        if neighbours.is_empty() {
            return Ok(());
        }
        let mut state = lock(&self.state);
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
                self.install_new(&state, place, spte, *target);
                Counters::add(&self.counters.fault_around, 1);
            }
        }
        Ok(())
    }

    fn neighbours(
        &self,
        context: &PagingContext,
        fault: &Install<'_>,
    ) -> Result<Vec<Neighbour>, MmError> {
        let mut neighbours = Vec::new();
        let Some((table, index)) = fault.translation.leaf else {
            return Ok(neighbours);
        };
        let first = index - index % GROUP;
        let mut entries = [0; GROUP];
        {
            let page = self.object.lock_page(table)?;
            for (entry, at) in entries.iter_mut().zip(first..) {
                let word = self.object.word(&page, at * size_of::<u64>())?;
                *entry = word.load(Ordering::Acquire);
            }
        }
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
            let Some(page) = self.object.try_lock_resident(translation.gfn) else {
                continue;
            };
            let target = Target::Frame(page.sequence());
            let gva = Gva::new(group_gva + number as u64 * PAGE_SIZE_U64);
            neighbours.push(Neighbour { gva, translation, target });
        }
        Ok(neighbours)
    }
}
