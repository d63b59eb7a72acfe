//! Direct paging as an export client: what it does when the host takes a page away.

use std::ops::Range;

use crate::addr::{Gfn, Pfn};
use crate::direct_mmu::hooks::SKIP_WRITE_PROTECT;
use crate::direct_mmu::shard::{LockedShard, Shard};
use crate::direct_mmu::table::State;
use crate::direct_mmu::zap::runs;
use crate::direct_mmu::{Mmu, offset_of};
use crate::export_rmap::client::{FLUSHING, TOLD};
use crate::export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Retain, RevokeError,
};
use crate::sys::uffd_window::InstallError;

impl Mmu {
    /// The shard that maps the page, locked, if one does.
    fn mapping(&self, page: &LockedPage<'_>) -> Option<(u64, LockedShard<'_>)> {
        let number = u64::from(page.pfn().as_u32());
        let noted = self.shard_of(number)?.lock();
        self.table.get(number).contains(State::MAPPED).then_some((number, noted))
    }

    /// Takes the right to write away from pages whose right is gone in the books.
    fn protect(&self, shard: &Shard, pages: &Range<u64>) -> Result<(), InstallError> {
        let bytes = offset_of(pages.end) - offset_of(pages.start);
        loop {
            match shard.window.write_protect(offset_of(pages.start), bytes, true) {
                // Nobody reads events any more, and nobody uses the window.
                Err(InstallError::Changing) if self.is_ending() => return Ok(()),
                // Over soon: the reader waits for nobody. A process that removes parts of the window
                // all the time slows this down.
                Err(InstallError::Changing) => std::thread::yield_now(),
                // A part of the window is gone: the rest, one by one.
                Err(InstallError::NotRegistered) if pages.end - pages.start > 1 => {
                    return pages
                        .clone()
                        .try_for_each(|page| self.protect(shard, &(page..page + 1)));
                }
                Err(InstallError::NotRegistered) => return Ok(()),
                other => return other,
            }
        }
    }

    fn protect_frames(&self, frames: &[Pfn]) -> Result<(), InstallError> {
        let mut pages: Vec<u64> = frames.iter().map(|pfn| u64::from(pfn.as_u32())).collect();
        pages.sort_unstable();
        pages.retain(|&page| {
            self.table.get(page).contains(State::PROTECT_DUE)
                && !self.mm.lab().breaks(SKIP_WRITE_PROTECT, || Gfn::new(page))
        });
        for shard in &self.shards {
            let own = pages.iter().copied().filter(|page| shard.pages.contains(page));
            for run in runs(own) {
                self.mm.lab().pause(FLUSHING);
                self.protect(shard, &run)?;
                self.counters.write_protected.add(run.end - run.start);
                for page in run {
                    self.table.clear(page, State::PROTECT_DUE);
                }
            }
        }
        Ok(())
    }
}

impl ExportNotifier for Mmu {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let Some((number, noted)) = self.mapping(page) else {
            return Harvest::default();
        };
        let gone = match kind {
            // Mappings are no copies.
            Invalidation::Recall => return Harvest::default(),
            Invalidation::Unmap | Invalidation::Replace(_) => {
                State::MAPPED | State::WRITABLE | State::ACCESSED
            }
            Invalidation::Clean => State::WRITABLE | State::ACCESSED,
        };
        let old = self.table.clear(number, gone);
        if old.contains(State::WRITABLE) {
            self.table.set(number, State::PROTECT_DUE);
        }
        if gone.contains(State::MAPPED) {
            page.table().rmap_visit(page.pfn(), self.client, |_| Retain::Drop);
            self.counters.invalidated.add(1);
        }
        drop(noted);
        self.mm.lab().pause(TOLD);
        Harvest { dirty: old.contains(State::WRITABLE), accessed: old.contains(State::ACCESSED) }
    }

    fn still_allows(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        self.has_leftovers(page, kind)
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let Some((number, _noted)) = self.mapping(page) else {
            return false;
        };
        self.table.clear(number, State::ACCESSED).contains(State::ACCESSED)
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        match reason {
            FlushReason::Recalled => Ok(()),
            FlushReason::Aged => self.zap_to_age(frames),
            FlushReason::Invalidated => self.protect_frames(frames).map_err(|error| RevokeError {
                frames: frames.len(),
                source: std::io::Error::other(error),
            }),
        }
    }
}
