//! Invariant I3 for a window: the reverse map, the table and the kernel's page tables agree.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::addr::{PAGE_SIZE, Pfn};
use crate::direct_mmu::shard::Shard;
use crate::direct_mmu::table::State;
use crate::direct_mmu::{DirectMmu, Mmu};
use crate::export_rmap::{Invalidation, LockedPage};

/// Bits of an entry of `/proc/self/pagemap` (admin-guide/mm/pagemap.rst).
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_PROTECTED: u64 = 1 << 57;
/// Differences told at most.
const MOST: usize = 16;

impl DirectMmu {
    /// Compares the reverse map with the table, and both with what the kernel says it maps. Returns
    /// one sentence for each difference, at most 16. Nothing may be under way meanwhile. A window that
    /// was [let go](Self::let_go) of is the kernel's to map: then only the books are compared.
    ///
    /// # Errors
    /// If `/proc/self/pagemap` cannot be read.
    pub fn check_reverse_map(&self) -> io::Result<Vec<String>> {
        let mmu = &*self.mmu;
        mmu.shards.iter().for_each(Shard::await_turns);
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut differences = Vec::new();
        for page in 0..mmu.table.pages() {
            if let Some(difference) = mmu.difference(page, mmu.kernel_entry(&pagemap, page)?) {
                differences.push(difference);
            }
            if differences.len() == MOST {
                break;
            }
        }
        Ok(differences)
    }
}

impl Mmu {
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
        let pagemap = self.pagemap.get_or_init(|| File::open("/proc/self/pagemap").ok());
        let kernel = pagemap.as_ref().and_then(|file| self.kernel_entry(file, number).ok());
        self.table.get(number).intersects(forbidden)
            || kernel
                .is_some_and(|entry| entry & PAGEMAP_PRESENT != 0 && entry & PAGEMAP_PROTECTED == 0)
    }

    fn kernel_entry(&self, pagemap: &File, page: u64) -> io::Result<u64> {
        let first = (self.view.region().as_ptr().addr() / PAGE_SIZE) as u64;
        let mut entry = [0; size_of::<u64>()];
        let at = (first + page) * entry.len() as u64;
        pagemap.read_exact_at(&mut entry, at)?;
        Ok(u64::from_ne_bytes(entry))
    }

    fn difference(&self, page: u64, kernel: u64) -> Option<String> {
        let state = self.table.get(page);
        let pfn = u32::try_from(page).map(Pfn::new).ok()?;
        let frame = self.mm.frame_table().get(pfn)?;
        let entries = self.mm.frame_table().rmap_entries(pfn);
        let listed = entries.iter().filter(|&&entry| Some(entry) == self.entry(page)).count();
        if listed != usize::from(state.contains(State::MAPPED)) {
            return Some(format!(
                "I3: guest frame {page:#x} is {state:?}, but its reverse map lists {listed} of it"
            ));
        }
        if kernel & PAGEMAP_PRESENT == 0 || self.let_go.load(Ordering::Relaxed) {
            return None;
        }
        let protected = kernel & PAGEMAP_PROTECTED != 0;
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
