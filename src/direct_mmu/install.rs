//! Installing: from a page that was found in its frame to a mapping in the window.
//!
//! The MMU lock is held from the rmap entry to the end of `UFFDIO_CONTINUE`: an invalidation that
//! the [sequence](crate::export_rmap::sequence) does not tell of waits for that lock and finds the
//! entry.

use std::sync::atomic::Ordering;

use crate::addr::{Gfn, PAGE_SIZE, Pfn};
use crate::direct_mmu::shard::{Deferral, Fault, LockedShard, Shard};
use crate::direct_mmu::table::State;
use crate::direct_mmu::{Mmu, offset_of};
use crate::export_rmap::client::{FAULT_CHECKED, FAULT_NOTED, LATE_INSTALL};
use crate::export_rmap::{Exported, Gone, LockedPage, PageFlags, RmapEntry, SequenceToken};
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

    pub(super) fn writable(&self) -> bool {
        self.writable
    }
}

/// A page that is mapped along with another, once the kernel has it.
pub(super) struct Neighbour<'t> {
    pub(super) page: u64,
    exported: Option<Exported<'t>>,
}

/// An invalidation was faster.
struct Overtaken;

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
        let Ok(exported) = self.export(&noted, &wanted) else {
            self.counters.retries.add(1);
            return Installed::Retry;
        };
        let writable = wanted.writable
            || self.table.get(page).contains(State::WRITABLE)
            || !shard.window.protects_at_install();
        let rights = rights(writable);
        if protected {
            // Known to be there: no need to try.
            if let Some(exported) = exported {
                exported.keep();
            }
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
        self.settle_neighbours(around, done.saturating_sub(1), writable);
        match installed {
            Ok(_) => {
                if let Some(exported) = exported {
                    exported.keep();
                }
                self.counters.installs.add(1);
                Installed::Done
            }
            Err(InstallError::Mapped) => {
                if let Some(exported) = exported {
                    exported.keep();
                }
                self.counters.already_mapped.add(1);
                self.upgrade(shard, &noted, page, writable)
            }
            Err(error) => {
                if exported.is_some() {
                    self.table.clear(page, State::all().difference(State::PROTECT_DUE));
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

    /// Exports the page's frame, unless its mapping has an entry already: then `None`.
    fn export(
        &self,
        locked: &LockedShard<'_>,
        wanted: &Wanted,
    ) -> Result<Option<Exported<'_>>, Overtaken> {
        let (table, token, gfn) = (self.mm.frame_table(), wanted.token, Gfn::new(wanted.page));
        let exported = if self.table.get(wanted.page).contains(State::MAPPED) {
            table.is_current(locked, token).then_some(None)
        } else {
            table.export(locked, token, self.entry(wanted.page)).map(Some)
        };
        let exported = exported.ok_or(Overtaken)?;
        self.mm.lab().pause(FAULT_CHECKED);
        self.mm.check_mapping(&self.object, gfn, token.pfn(), wanted.writable);
        Ok(exported)
    }

    /// The entry of a page in its frame's reverse map.
    pub(super) fn entry(&self, page: u64) -> RmapEntry {
        RmapEntry::new(self.client, page)
    }

    /// Brings the books in line with what the kernel has mapped of neighbours: the first `mapped`.
    pub(super) fn settle_neighbours(
        &self,
        mut added: Vec<Neighbour<'_>>,
        mapped: usize,
        writable: bool,
    ) {
        // The rest are exported no longer.
        added.truncate(mapped);
        self.counters.fault_around.add(added.len() as u64);
        for neighbour in added {
            self.table.set(neighbour.page, rights(writable));
            if let Some(exported) = neighbour.exported {
                exported.keep();
            }
        }
    }

    /// As many of these pages, one after the other, as can be mapped in one call.
    pub(super) fn add_neighbours(
        &self,
        shard: &Shard,
        noted: &LockedShard<'_>,
        neighbours: &[Wanted],
        writable: bool,
    ) -> Vec<Neighbour<'_>> {
        let protects = shard.window.protects_at_install();
        let mut added = Vec::new();
        for neighbour in neighbours {
            let same_rights = (neighbour.writable || !protects) == writable;
            let free = !self.table.get(neighbour.page).contains(State::MAPPED)
                && noted.deferral(neighbour.page).is_none();
            if !same_rights || !free {
                break;
            }
            let Ok(exported) = self.export(noted, neighbour) else { break };
            added.push(Neighbour { page: neighbour.page, exported });
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
            let noted = shard.lock();
            for page in shard.pages.clone() {
                let state = self.table.get(page);
                // Pages have the frames of their numbers.
                let Ok(pfn) = u32::try_from(page).map(Pfn::new) else { break };
                if state.contains(State::MAPPED) {
                    let dirty = state.contains(State::WRITABLE);
                    let gone = Gone { pfn, entry: self.entry(page), dirty };
                    self.mm.frame_table().give_up_uncached(&noted, &[gone]);
                    self.table.clear(page, State::all());
                }
            }
        }
    }

    /// Test and sabotage: lets something overtake a fault that has looked at its page.
    pub(super) fn dawdle(&self, page: u64) {
        let gfn = Gfn::new(page);
        self.mm.lab().pause_for(FAULT_NOTED, LATE_INSTALL, || gfn);
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
