//! Invariant I3 for a window: the reverse map, the table and the kernel's page tables agree.

use std::io;
use std::sync::atomic::Ordering;

use crate::addr::Pfn;
use crate::direct_mmu::shard::Shard;
use crate::direct_mmu::table::State;
use crate::direct_mmu::{DirectMmu, Mmu};
use crate::export_rmap::{Invalidation, LockedPage};
use crate::host_mm::Quiet;
use crate::sys::pagemap::{self, Mapped, Pagemap};
use crate::sys::signal;

/// Pages of which the kernel is asked at a time.
const CHUNK_PAGES: usize = 1 << 15;
/// Differences told at most.
const MOST: usize = 16;

impl DirectMmu {
    /// Compares the reverse map with the table, and both with what the kernel says it maps. Returns
    /// one sentence for each difference, at most 16. Nothing may be under way meanwhile: `quiet` is the
    /// proof for background reclaim. A window that
    /// was [let go](Self::let_go) of, or has lost a part, is the kernel's to map: then only the books are
    /// compared. It
    /// leaves off when a [stop](signal::is_stop_asked) is asked for.
    ///
    /// # Errors
    /// If `/proc/self/pagemap` cannot be read.
    pub fn check_reverse_map(&self, quiet: &Quiet<'_>) -> io::Result<Vec<String>> {
        let mmu = &*self.mmu;
        debug_assert!(mmu.mm.is_quiet(quiet), "it is another host memory's");
        mmu.shards.iter().for_each(Shard::await_turns);
        let mut pagemap = Pagemap::open(CHUNK_PAGES)?;
        let mut differences = Vec::new();
        let mut page = 0;
        while page < mmu.table.pages() && !signal::is_stop_asked() {
            for kernel in pagemap.read(mmu.view.region(), page, mmu.table.pages() - page)? {
                if mmu.has_to_do_with(page, kernel) {
                    differences.extend(mmu.difference(page, kernel));
                }
                if differences.len() == MOST {
                    return Ok(differences);
                }
                page += 1;
            }
        }
        Ok(differences)
    }
}

impl Mmu {
    /// Whether anybody maps the page, or says so: most of a large guest's memory nobody does.
    fn has_to_do_with(&self, page: u64, kernel: Mapped) -> bool {
        let is_listed = |pfn| !self.mm.frame_table().is_rmap_empty(Pfn::new(pfn));
        kernel.is_present()
            || !self.table.get(page).is_empty()
            || u32::try_from(page).is_ok_and(is_listed)
    }

    /// See [`ExportNotifier::still_allows`](crate::export_rmap::ExportNotifier::still_allows). A page
    /// that is about to leave its frame may be read until that is punched.
    pub(super) fn has_leftovers(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        let number = u64::from(page.pfn().as_u32());
        let forbidden = match kind {
            Invalidation::Recall => return false,
            Invalidation::Clean => State::WRITABLE | State::PROTECT_DUE,
            Invalidation::Unmap | Invalidation::Replace(_) => {
                State::MAPPED | State::WRITABLE | State::PROTECT_DUE
            }
        };
        // Faults of the page are installed under this lock.
        let Some(_noted) = self.shard_of(number).map(Shard::lock) else { return false };
        if self.is_ending() || self.let_go.load(Ordering::Relaxed) {
            return false;
        }
        let file = self.pagemap.get_or_init(|| pagemap::file().ok());
        let region = self.view.region();
        let kernel = file.as_ref().and_then(|file| pagemap::entry(file, region, number).ok());
        self.table.get(number).intersects(forbidden)
            || kernel.is_some_and(|kernel| kernel.is_present() && !kernel.is_protected())
                // Somebody may have mapped something else there, and the event be on its way.
                && pagemap::is_own(region, number).unwrap_or(false)
    }

    fn difference(&self, page: u64, kernel: Mapped) -> Option<String> {
        let state = self.table.get(page);
        let pfn = u32::try_from(page).map(Pfn::new).ok()?;
        let frame = self.mm.frame_table().get(pfn)?;
        let entries = self.mm.frame_table().rmap_entries(pfn);
        let listed = entries.iter().filter(|&&entry| entry == self.entry(page)).count();
        if listed != usize::from(state.contains(State::MAPPED)) {
            return Some(format!(
                "I3: guest frame {page:#x} is {state:?}, but its reverse map lists {listed} of it"
            ));
        }
        if !kernel.is_present() || self.let_go.load(Ordering::Relaxed) {
            return None;
        }
        let protected = kernel.is_protected();
        // Taken back, not punched: the page could not be written out.
        let readable_still = protected && frame.is_in_use();
        if !(state.contains(State::MAPPED) || readable_still) {
            return Some(format!(
                "I3: guest frame {page:#x} is mapped by the kernel, but {state:?} in the table"
            ));
        }
        if !protected && !state.contains(State::WRITABLE) {
            return Some(format!(
                "I6: guest frame {page:#x} can be written, but is {state:?} in the table"
            ));
        }
        None
    }
}
