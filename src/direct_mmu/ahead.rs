//! Reading ahead of a sequential stream of faults: pages are brought in and mapped before anyone asks,
//! as long as that takes no frame from anyone. Whoever waits for the page that was asked for goes on
//! meanwhile, so the pages are mapped a few at a time.

use crate::addr::{Gfn, PAGE_SIZE};
use crate::direct_mmu::install::Wanted;
use crate::direct_mmu::shard::{Fault, Shard};
use crate::direct_mmu::table::State;
use crate::direct_mmu::{Mmu, offset_of};

/// Pages that are mapped at a time: the stream waits for no more than these.
const STEP: usize = 4;

impl Mmu {
    /// Brings in up to `count` pages after the one that a fault was about and which is mapped now, as
    /// long as nobody else waits for this thread. Who writes in sequence is taken to go on writing.
    pub(super) fn read_ahead(&self, shard: &Shard, fault: Fault, count: usize) {
        let expected = fault.page + 1 + count as u64;
        let next = self.bring_ahead(shard, fault, count);
        if next < expected {
            shard.lock().streams.fell_short(expected, next);
        }
    }

    /// Returns the page up to which, without it, all were looked at.
    fn bring_ahead(&self, shard: &Shard, fault: Fault, count: usize) -> u64 {
        let mut pages = (fault.page + 1..shard.pages.end)
            .take(count)
            .skip_while(|&page| self.table.get(page).contains(State::MAPPED))
            .peekable();
        while let Some(&first) = pages.peek() {
            let step: Vec<Wanted> =
                pages.by_ref().take(STEP).map_while(|page| self.ahead(page, fault.write)).collect();
            self.install_ahead(shard, &step);
            // Looked at after the install: whoever came for one of these pages has it now.
            if step.len() < STEP || shard.window.is_due() {
                return first + step.len() as u64;
            }
        }
        fault.page + 1 + count as u64
    }

    /// A page that is in a frame, or goes into one that nobody needs; `None` if somebody has it
    /// locked or mapped.
    fn ahead(&self, page: u64, write: bool) -> Option<Wanted> {
        if self.table.get(page).contains(State::MAPPED) {
            return None;
        }
        let gfn = Gfn::new(page);
        if let Some(page) = self.object.try_lock_resident(gfn) {
            return Some(Wanted::of(&page, false));
        }
        if !self.mm.has_spare_frames() {
            return None;
        }
        // Who needs the page finds the error again, and tells.
        let page = self.object.try_lock_page(gfn).ok()??;
        self.counters.read_ahead.add(1);
        Some(Wanted::of(&page, write))
    }

    /// Maps pages that come one after the other, those with the same rights at once.
    fn install_ahead(&self, shard: &Shard, pages: &[Wanted]) {
        for run in pages.chunk_by(|one, next| one.writable() == next.writable()) {
            let noted = shard.lock();
            let writable = run[0].writable() || !shard.window.protects_at_install();
            let added = self.add_neighbours(shard, &noted, run, writable);
            let Some(first) = added.first() else { return };
            let (first, bytes) = (first.page, added.len() * PAGE_SIZE);
            // Whatever kept the rest from being mapped, a fault on it finds out.
            let mapped = shard.window.install(offset_of(first), bytes, !writable);
            self.settle_neighbours(added, mapped.map_or(0, |bytes| bytes / PAGE_SIZE), writable);
        }
    }
}
