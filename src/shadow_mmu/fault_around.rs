//! Fault-around: a fault costs the same whether it installs one SPTE or a leaf table of them.
//!
//! Guarantees:
//!
//! - a neighbour is installed with no more rights than the guest's own entry gives it, and only if the guest
//!   has used that entry before (its accessed bit is set), so that no bit of the guest's claims a touch that
//!   was none. Of a large guest page one entry speaks for all of it;
//! - nobody waits for a neighbour, and none takes a frame that somebody else could need: its page is in a
//!   frame that nobody has locked. Ahead of a sequential stream of faults, as long as frames are free for it,
//!   pages are also read back from swap, and one that was never touched gets a frame if the stream writes;
//! - neighbours' SPTEs start without the accessed bit, so that reclaim is not misled. By that bit it is
//!   learnt how many neighbours are worth it ([`Window`](super::window::Window));
//! - the MMU lock is held for [`CHUNK`] SPTEs at a time.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64};
use crate::export_rmap::LockedPage;
use crate::host_mm::MmError;
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::fault::{Install, Installed, Target};
use crate::shadow_mmu::hooks::AROUND_NOTED;
use crate::shadow_mmu::roots::{SptePlace, State};
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::tables::ENTRIES;
use crate::shadow_mmu::walk::{Access, PagingContext, Translation, table_index};

/// SPTEs that are installed at a time.
const CHUNK: usize = 64;

/// An entry of the fault's leaf table that may have an SPTE.
struct Allowed {
    index: usize,
    translation: Translation,
}

/// A neighbour that could be installed.
struct Neighbour {
    index: usize,
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
        let index = table_index(fault.gva, 1);
        let (window, asked) = {
            let mut state = self.lock();
            let asked = state.streams.advance(page);
            (self.window(&mut state, fault, index), asked)
        };
        let ahead = index + 1..(index + 1 + asked).min(ENTRIES);
        let range = window.start..window.end.max(ahead.end);
        let allowed = self.allowed(context, fault, range)?;
        for chunk in allowed.chunks(CHUNK) {
            let mut found = Vec::with_capacity(chunk.len());
            for &Allowed { index, translation } in chunk {
                let is_ahead = ahead.contains(&index);
                if let Some(page) = self.lock_neighbour(fault.access, &translation, is_ahead)? {
                    found.push(Neighbour { index, translation, target: Target::of(&page) });
                }
            }
            if !found.is_empty() && !self.install_neighbours(fault, &found) {
                return Ok(());
            }
        }
        if asked > 0 {
            self.note_stream(fault, page, asked, ahead);
        }
        Ok(())
    }

    /// How far around a fault to go: by what became of the neighbours of the one before in its leaf table.
    fn window(&self, state: &mut State, fault: &Install<'_>, index: usize) -> Range<usize> {
        let last = state.window;
        let Some(leaf) = state.leaf_mut(fault.root, fault.gva) else { return index..index + 1 };
        let window = match leaf.around {
            Some((window, first, end)) => {
                let sptes = (first..end).filter(|&at| usize::from(at) != index);
                let sptes = sptes.map(|at| {
                    Pte::of(self.tables.entry(leaf.page, at.into()).load(Ordering::Relaxed))
                });
                let standing = sptes.filter(|spte| spte.is_present());
                let (standing, used) = standing.fold((0, 0), |(standing, used), spte| {
                    (standing + 1, used + usize::from(spte.contains(Pte::ACCESSED)))
                });
                window.judged(standing, used)
            }
            None => last,
        };
        let range = window.around(index);
        leaf.around = Some((window, index_of(range.start), index_of(range.end)));
        state.window = window;
        range
    }

    /// The entries of the fault's leaf table in `range` that may have SPTEs, by the guest's own entries.
    fn allowed(
        &self,
        context: &PagingContext,
        fault: &Install<'_>,
        range: Range<usize>,
    ) -> Result<Vec<Allowed>, MmError> {
        let own = table_index(fault.gva, 1);
        let neighbours = range.clone().filter(|&index| index != own);
        let Some((table, _)) = fault.translation.leaf else {
            // One entry for all of them: as far from the fault's page in the guest's memory as in its
            // addresses, since a leaf table of ours spans no more than the large page.
            let first = fault.translation.gfn.as_u64() - own as u64;
            let neighbour = |index| Allowed {
                index,
                translation: Translation {
                    gfn: Gfn::new(first + index as u64),
                    ..*fault.translation
                },
            };
            return Ok(neighbours.map(neighbour).collect());
        };
        let entries = self.read_entries(table, range.clone())?;
        let upper = fault.translation.upper;
        let allowed = neighbours.filter_map(|index| {
            let entry = Pte::of(entries[index - range.start]);
            let wanted = Pte::PRESENT | Pte::ACCESSED;
            if !entry.contains(wanted) || self.has_reserved_bits(context, 1, entry) {
                return None;
            }
            let translation = Translation {
                gfn: Gpa::new(entry.address()).gfn(),
                writable: upper.writable && entry.contains(Pte::WRITABLE) || !context.write_protect,
                executable: upper.executable && !entry.contains(Pte::NO_EXECUTE),
                dirty: entry.contains(Pte::DIRTY),
                ..*fault.translation
            };
            Some(Allowed { index, translation })
        });
        Ok(allowed.collect())
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
    /// by bringing it in, while that takes no frame from anyone.
    fn lock_neighbour(
        &self,
        access: Access,
        translation: &Translation,
        is_ahead: bool,
    ) -> Result<Option<LockedPage<'_>>, MmError> {
        let gfn = translation.gfn;
        let resident = self.object.try_lock_resident(gfn);
        if resident.is_some() || !is_ahead || !self.mm.has_spare_frames() {
            return Ok(resident);
        }
        if self.object.is_in_swap(gfn) {
            let page = self.object.lock_page(gfn)?;
            self.counters.read_ahead.add(1);
            return Ok(Some(page));
        }
        // Who writes in sequence is taken to go on writing, and finds the page writable only if the guest's
        // entry says that it is dirty already.
        if access != Access::Write || !translation.writable || !translation.dirty {
            return Ok(None);
        }
        let page = self.object.try_lock_page(gfn)?;
        self.counters.zeroed_ahead.add(u64::from(page.is_some()));
        Ok(page)
    }

    /// Installs what is not there; `false` if the guest has flushed since the fault's walk, so that what was
    /// read of its tables is worth nothing.
    fn install_neighbours(&self, fault: &Install<'_>, found: &[Neighbour]) -> bool {
        self.mm.lab().pause(AROUND_NOTED);
        let state = self.lock();
        if state.flush_count(fault.root) != Some(fault.flushes) {
            return false;
        }
        // The fault's own SPTE is in it.
        let Some(leaf) = state.find(fault.root, fault.gva) else { return false };
        let first_gva = fault.gva.page_base().as_u64() - leaf.index as u64 * PAGE_SIZE_U64;
        for Neighbour { index, translation, target } in found {
            let place = SptePlace { index: *index, ..leaf };
            if self.tables.entry(place.page, place.index).load(Ordering::Relaxed) != 0 {
                continue;
            }
            let gva = Gva::new(first_gva + *index as u64 * PAGE_SIZE_U64);
            let install =
                Install { gva, access: Access::Read, translation, target: *target, ..*fault };
            let mut spte = self.new_spte(&install);
            // Not `& !ACCESSED`: that would drop the bits without a name, the address.
            spte.remove(Pte::ACCESSED);
            if self.install_new(&state, place, spte, &install) == Installed::Done {
                self.counters.fault_around.add(1);
            }
        }
        true
    }

    /// Where the stream of the fault at `page` goes on, if not all of the pages that were `asked` for ahead of
    /// it can be touched now as it touches them.
    fn note_stream(&self, fault: &Install<'_>, page: u64, asked: usize, ahead: Range<usize>) {
        let mut state = self.lock();
        let Some(leaf) = state.find(fault.root, fault.gva) else { return };
        let wanted = match fault.access {
            Access::Write => Pte::PRESENT | Pte::WRITABLE,
            Access::Read | Access::Execute => Pte::PRESENT,
        };
        let can_be_touched = |&at: &usize| {
            Pte::of(self.tables.entry(leaf.page, at).load(Ordering::Relaxed)).contains(wanted)
        };
        let count = ahead.take_while(can_be_touched).count();
        if count < asked {
            let next = page + 1;
            state.streams.fell_short(next + asked as u64, next + count as u64);
        }
    }
}

/// Of an entry, or after the last one: of a table there are fewer than 65,536.
#[allow(clippy::cast_possible_truncation)]
fn index_of(index: usize) -> u16 {
    index as u16
}
