//! Installing: from a page that was found in its frame to a mapping in the window.
//!
//! The MMU lock is held from the rmap entry to the end of `UFFDIO_CONTINUE`: an invalidation that
//! the [sequence](crate::export_rmap::sequence) does not tell of waits for that lock and finds the
//! entry.

use std::sync::atomic::Ordering;

use crate::addr::{Gfn, PAGE_SIZE};
use crate::direct_mmu::shard::{Deferral, Fault, LockedShard, Shard};
use crate::direct_mmu::table::State;
use crate::direct_mmu::{Mmu, offset_of};
use crate::export_rmap::{LockedPage, PageFlags, RmapEntry, SequenceToken};
use crate::host_mm::{PausePoint, Sabotage};
use crate::sys::uffd_window::InstallError;

/// What a fault wants installed.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    page: u64,
    token: SequenceToken,
    /// It is to be writable: somebody writes it, or it counts as written anyway.
    writable: bool,
}

impl Wanted {
    /// The locked page, for a fault that `write`s.
    pub(super) fn of(page: &LockedPage<'_>, write: bool) -> Self {
        Self {
            page: page.owner().gfn.as_u64(),
            token: page.sequence(),
            writable: write || (page.flags().contains(PageFlags::DIRTY) && !page.is_read_only()),
        }
    }

    pub(super) fn page(&self) -> u64 {
        self.page
    }

    pub(super) fn writable(&self) -> bool {
        self.writable
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Installed {
    Done,
    /// An invalidation was faster: look for the page again.
    Retry,
    /// Not now.
    Deferred(Deferral),
    /// The kernel did not map it.
    Refused(InstallError),
}

impl Mmu {
    /// Maps a page, and those of `neighbours`, which come right after it, that can be had with the
    /// same rights.
    pub(super) fn install(
        &self,
        shard: &Shard,
        wanted: Wanted,
        neighbours: &[Wanted],
        protected: bool,
    ) -> Installed {
        let noted = shard.lock();
        let page = wanted.page;
        if let Some(deferral) = noted.deferral(page) {
            return Installed::Deferred(deferral);
        }
        let Some(fresh) = self.add_entry(&wanted) else {
            self.counters.retries.add(1);
            return Installed::Retry;
        };
        let writable = wanted.writable
            || self.table.get(page).contains(State::WRITABLE)
            || !shard.window.protects_at_install();
        let rights = rights(writable);
        if protected {
            // Known to be there: no need to try.
            return self.upgrade(shard, &noted, page, writable);
        }
        let around = self.add_neighbours(shard, &noted, neighbours, writable);
        let pages = 1 + around.len();
        // Before the kernel has it, in the books: those who look do not take this lock.
        self.table.set(page, rights);
        let map = |pages| shard.window.install(offset_of(page), pages * PAGE_SIZE, !writable);
        let installed = match map(pages) {
            // A neighbour may be, which is none of this fault's business.
            Err(InstallError::NotRegistered) if pages > 1 => map(1),
            other => other,
        };
        let done = installed.map_or(0, |bytes| bytes / PAGE_SIZE);
        self.settle_neighbours(&around, done.saturating_sub(1), writable);
        match installed {
            Ok(_) => {
                self.counters.installs.add(1);
                Installed::Done
            }
            Err(InstallError::Mapped) => {
                self.counters.already_mapped.add(1);
                self.upgrade(shard, &noted, page, writable)
            }
            Err(error) => {
                if fresh {
                    self.table.clear(page, State::all().difference(State::PROTECT_DUE));
                    self.remove_entry(page);
                }
                Installed::Refused(error)
            }
        }
    }

    /// Gives a page that is mapped the right to write, if it is to have it, and wakes who waits for
    /// it: the kernel wakes nobody for a page that it finds mapped.
    fn upgrade(
        &self,
        shard: &Shard,
        _locked: &LockedShard<'_>,
        page: u64,
        writable: bool,
    ) -> Installed {
        self.table.set(page, rights(writable));
        let offset = offset_of(page);
        let result = if writable {
            self.counters.upgrades.add(1);
            shard.window.write_protect(offset, PAGE_SIZE, false)
        } else {
            shard.window.wake(offset, PAGE_SIZE)
        };
        // The books may say more than the page tables: nothing to take back.
        result.map_or_else(Installed::Refused, |()| Installed::Done)
    }

    /// Adds the page's entry to the reverse map if it has none; whether it had none. `None`, and
    /// nothing added, if the page was invalidated since it was looked at.
    fn add_entry(&self, wanted: &Wanted) -> Option<bool> {
        let table = self.mm.frame_table();
        let gfn = Gfn::new(wanted.page);
        let fresh = !self.table.get(wanted.page).contains(State::MAPPED);
        if fresh && !self.mm.is_sabotaged(Sabotage::ForgetRmap, gfn) {
            table.rmap_add(wanted.token.pfn(), self.entry(wanted.page)?);
        }
        let overtaken = table.must_retry(wanted.token);
        if overtaken && !self.mm.is_sabotaged(Sabotage::LateInstall, gfn) {
            if fresh {
                self.remove_entry(wanted.page);
            }
            return None;
        }
        self.mm.pause(PausePoint::FaultChecked);
        self.mm.check_mapping(&self.object, gfn, wanted.token.pfn(), wanted.writable);
        Some(fresh)
    }

    pub(super) fn remove_entry(&self, page: u64) {
        if let (Some(entry), Ok(pfn)) = (self.entry(page), u32::try_from(page)) {
            self.mm.frame_table().rmap_remove(crate::addr::Pfn::new(pfn), entry);
        }
    }

    /// The entry of a page in its frame's reverse map.
    pub(super) fn entry(&self, page: u64) -> Option<RmapEntry> {
        self.client.get().map(|&client| RmapEntry::new(client, page))
    }

    /// Brings the books in line with what the kernel has mapped of neighbours: the first `mapped`.
    pub(super) fn settle_neighbours(&self, added: &[Wanted], mapped: usize, writable: bool) {
        let (mapped, refused) = added.split_at(mapped.min(added.len()));
        for neighbour in refused {
            self.remove_entry(neighbour.page);
        }
        for neighbour in mapped {
            self.table.set(neighbour.page, rights(writable));
        }
        self.counters.fault_around.add(mapped.len() as u64);
    }

    /// As many of these pages, one after the other, as can be mapped in one call.
    pub(super) fn add_neighbours(
        &self,
        shard: &Shard,
        noted: &LockedShard<'_>,
        neighbours: &[Wanted],
        writable: bool,
    ) -> Vec<Wanted> {
        let protects = shard.window.protects_at_install();
        let mut added = Vec::new();
        for neighbour in neighbours {
            let same_rights = (neighbour.writable || !protects) == writable;
            let free = !self.table.get(neighbour.page).contains(State::MAPPED)
                && noted.deferral(neighbour.page).is_none();
            if !same_rights || !free || self.add_entry(neighbour).is_none() {
                break;
            }
            added.push(*neighbour);
        }
        added
    }

    /// The pages after this one that are in frames and unlocked, up to the first that is not.
    pub(super) fn neighbours(&self, shard: &Shard, fault: Fault) -> Vec<Wanted> {
        (fault.page + 1..shard.pages.end)
            .take(self.config.fault_around.saturating_sub(1))
            .take_while(|&page| !self.table.get(page).contains(State::MAPPED))
            .map_while(|page| self.object.try_lock_resident(Gfn::new(page)))
            .map(|page| Wanted::of(&page, false))
            .collect()
    }

    /// Forgets every mapping; nobody uses the window any more.
    pub(super) fn forget_everything(&self) {
        for shard in &self.shards {
            let _noted = shard.lock();
            for page in shard.pages.clone() {
                let state = self.table.get(page);
                if !state.contains(State::MAPPED) {
                    continue;
                }
                if let (true, Ok(pfn)) = (state.contains(State::WRITABLE), u32::try_from(page)) {
                    self.mm.frame_table().note_dirty(crate::addr::Pfn::new(pfn));
                }
                self.remove_entry(page);
                self.table.clear(page, State::all());
            }
        }
    }

    /// Test and sabotage: lets something overtake a fault that has looked at its page.
    pub(super) fn dawdle(&self, page: u64) {
        let gfn = Gfn::new(page);
        self.mm.pause_for(PausePoint::FaultNoted, Sabotage::LateInstall, gfn);
        #[cfg(test)]
        {
            let overtaking = crate::sync::lock(&self.overtaking).take();
            if let Some(overtaking) = overtaking {
                overtaking();
            }
        }
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}

fn rights(writable: bool) -> State {
    let mapped = State::MAPPED | State::ACCESSED;
    if writable { mapped | State::WRITABLE } else { mapped }
}
