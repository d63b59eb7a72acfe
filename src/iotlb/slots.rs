//! The entries of an IOTLB, and the accesses that are in flight through them.
//!
//! Guarantees, given that callers keep the lock order (page lock, then the lock in here, then rmap
//! entries) and wait for no page lock while an access of theirs is in flight:
//!
//! - once [`Slots::invalidate`] has returned, no access begins through an entry, or with a right,
//!   that it took away; once [`Slots::wait_for_stale`] has returned, none is in flight either;
//! - a write is in the dirty state of its entry before it begins, so what an invalidation hands over
//!   covers the writes that it finds in flight, too;
//! - an entry is in the reverse map exactly while it is live.
//!
//! | life | in the reverse map | new accesses | ends |
//! |---|---|---|---|
//! | free | no | no | with an installation |
//! | live | yes | as its rights allow | with an invalidation, or when its place is wanted |
//! | dead | no | no | with the last access in flight: then it is free |
//!
//! Only `sync` and `export_rmap` are used here, so that a model checker can run this file.

use std::sync::OnceLock;

use crate::addr::{Gfn, Pfn};
use crate::export_rmap::lock_rank::{self, Held, Rank};
use crate::export_rmap::{
    ClientId, Differences, FrameTable, Harvest, Invalidation, LockedPage, Retain, RmapEntry,
    SequenceToken,
};
use crate::sync::{Condvar, Mutex, MutexGuard, lock};

use super::stats::IotlbStats;

/// What a device does to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceAccess {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Free,
    Live,
    Dead,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    life: Life,
    gfn: Gfn,
    pfn: Pfn,
    writable: bool,
    dirty: bool,
    accessed: bool,
    /// Used since the hand of the IOTLB's own clock came by.
    referenced: bool,
    readers: u32,
    writers: u32,
}

impl Slot {
    const FREE: Self = Self {
        life: Life::Free,
        gfn: Gfn::new(0),
        pfn: Pfn::new(0),
        writable: false,
        dirty: false,
        accessed: false,
        referenced: false,
        readers: 0,
        writers: 0,
    };

    fn users(&self) -> u32 {
        self.readers + self.writers
    }

    /// Accesses in flight that could not begin any more.
    fn stale_users(&self) -> u32 {
        match self.life {
            Life::Free => 0,
            Life::Dead => self.users(),
            Life::Live if self.writable => 0,
            Life::Live => self.writers,
        }
    }
}

struct State {
    slots: Box<[Slot]>,
    /// Where the clock goes on.
    hand: usize,
    stats: IotlbStats,
}

impl State {
    fn live(&self, gfn: Gfn) -> Option<usize> {
        self.slots.iter().position(|slot| slot.life == Life::Live && slot.gfn == gfn)
    }

    /// A free slot, or a live one that is not in use: second chance for those used lately.
    fn place(&mut self) -> Option<usize> {
        if let Some(free) = self.slots.iter().position(|slot| slot.life == Life::Free) {
            return Some(free);
        }
        for _ in 0..2 * self.slots.len() {
            let at = self.hand;
            self.hand = (at + 1) % self.slots.len();
            let slot = &mut self.slots[at];
            if slot.life == Life::Live && slot.users() == 0 {
                if !slot.referenced {
                    return Some(at);
                }
                slot.referenced = false;
            }
        }
        None
    }
}

/// The state, locked.
struct Locked<'a> {
    // First: fields drop in order, and the rank is held as long as the lock is.
    state: MutexGuard<'a, State>,
    held: Held,
}

/// See the module's documentation.
pub(super) struct Slots {
    id: OnceLock<ClientId>,
    /// Number of the memory object that the guest frames are of.
    object: u16,
    state: Mutex<State>,
    /// An access has ended that somebody may wait for.
    ended: Condvar,
}

impl Slots {
    /// `entries` free slots, at least one.
    pub(super) fn new(object: u16, entries: usize) -> Self {
        let slots = vec![Slot::FREE; entries.max(1)].into_boxed_slice();
        let state = Mutex::new(State { slots, hand: 0, stats: IotlbStats::default() });
        Self { id: OnceLock::new(), object, state, ended: Condvar::new() }
    }

    /// Sets the client's number, before the first installation.
    pub(super) fn set_client(&self, id: ClientId) {
        let _ = self.id.set(id);
    }

    pub(super) fn client(&self) -> Option<ClientId> {
        self.id.get().copied()
    }

    #[cfg(not(any(loom, shuttle)))]
    pub(super) fn stats(&self) -> IotlbStats {
        self.lock().state.stats
    }

    fn lock(&self) -> Locked<'_> {
        let held = lock_rank::wait_for(Rank::ClientMmu);
        Locked { state: lock(&self.state), held }
    }

    fn wait<'a>(&self, locked: Locked<'a>) -> Locked<'a> {
        let Locked { state, held } = locked;
        let state = self.ended.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        Locked { state, held }
    }

    /// Begins an access if an entry allows it.
    pub(super) fn begin(&self, gfn: Gfn, access: DeviceAccess) -> Option<InFlight<'_>> {
        let mut locked = self.lock();
        let state = &mut *locked.state;
        let index = state.live(gfn)?;
        if access == DeviceAccess::Write && !state.slots[index].writable {
            return None;
        }
        state.stats.hits += 1;
        Some(self.enter(locked, index, access))
    }

    /// Maps the page that was found in the token's frame, and begins an access through it; `None` if
    /// an invalidation came in between: start over. `writable` must be true for a write.
    pub(super) fn install(
        &self,
        table: &FrameTable,
        gfn: Gfn,
        token: SequenceToken,
        writable: bool,
        access: DeviceAccess,
    ) -> Option<InFlight<'_>> {
        let client = self.client()?;
        let mut locked = self.lock();
        let index = loop {
            let state = &mut *locked.state;
            if let Some(index) = state.live(gfn) {
                let slot = &mut state.slots[index];
                // The entry is in the reverse map: an invalidation either is seen here or finds it.
                // One of another frame goes before the page may be in this one.
                if slot.pfn != token.pfn() || table.must_retry(token) {
                    state.stats.retries += 1;
                    return None;
                }
                if writable && !slot.writable {
                    slot.writable = true;
                    state.stats.upgrades += 1;
                }
                break index;
            }
            let Some(index) = state.place() else {
                // All are in use, which none is for long.
                locked = self.wait(locked);
                continue;
            };
            if state.slots[index].life == Life::Live {
                give_up(&mut state.slots[index], table, RmapEntry::new(client, index as u64));
                state.stats.replaced += 1;
            }
            let entry = RmapEntry::new(client, index as u64);
            table.rmap_add(token.pfn(), entry);
            if table.must_retry(token) {
                table.rmap_remove(token.pfn(), entry);
                state.stats.retries += 1;
                return None;
            }
            state.slots[index] =
                Slot { life: Life::Live, gfn, pfn: token.pfn(), writable, ..Slot::FREE };
            state.stats.installs += 1;
            break index;
        };
        Some(self.enter(locked, index, access))
    }

    /// Counts an access in. Its marks are set before it touches the page.
    fn enter(&self, mut locked: Locked<'_>, index: usize, access: DeviceAccess) -> InFlight<'_> {
        let slot = &mut locked.state.slots[index];
        slot.accessed = true;
        slot.referenced = true;
        match access {
            DeviceAccess::Read => slot.readers += 1,
            DeviceAccess::Write => {
                slot.writers += 1;
                slot.dirty = true;
            }
        }
        let pfn = slot.pfn;
        drop(locked);
        // A flush waits for an access as it does for the lock, so the access counts as the lock.
        let held = Some(lock_rank::note(Rank::ClientMmu));
        InFlight { slots: self, index, pfn, access, held }
    }

    /// What [`ExportNotifier::invalidate_page`](crate::export_rmap::ExportNotifier) asks for.
    pub(super) fn invalidate(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let mut harvest = Harvest::default();
        let Some(client) = self.client() else {
            return harvest;
        };
        let keep = match kind {
            Invalidation::Unmap | Invalidation::Replace(_) => false,
            Invalidation::Clean => true,
            // Entries are no copies.
            Invalidation::Recall => return harvest,
        };
        let mut locked = self.lock();
        let state = &mut *locked.state;
        page.table().rmap_visit(page.pfn(), client, |location| {
            let Some(slot) = slot_at(&mut state.slots, location) else {
                return Retain::Keep;
            };
            if let Invalidation::Replace(owner) = kind
                && (owner.object != self.object || owner.gfn != slot.gfn)
            {
                return Retain::Keep;
            }
            harvest = harvest.or(Harvest { dirty: slot.dirty, accessed: slot.accessed });
            (slot.dirty, slot.accessed, slot.writable) = (false, false, false);
            if keep {
                state.stats.write_protected += 1;
                Retain::Keep
            } else {
                slot.life = if slot.users() == 0 { Life::Free } else { Life::Dead };
                state.stats.invalidated += 1;
                Retain::Drop
            }
        });
        harvest
    }

    /// What [`ExportNotifier::still_allows`](crate::export_rmap::ExportNotifier::still_allows) asks for.
    #[cfg(not(any(loom, shuttle)))]
    pub(super) fn still_allows(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        let locked = self.lock();
        locked.state.slots.iter().filter(|slot| slot.pfn == page.pfn()).any(|slot| {
            let is_live = slot.life == Life::Live;
            match kind {
                Invalidation::Unmap => is_live || slot.users() > 0,
                Invalidation::Replace(owner) => {
                    let is_it = owner.object == self.object && owner.gfn == slot.gfn;
                    is_it && (is_live || slot.users() > 0)
                }
                Invalidation::Clean => is_live && slot.writable || slot.stale_users() > 0,
                Invalidation::Recall => false,
            }
        })
    }

    /// Clears the accessed state of the page's entries; whether any was set.
    pub(super) fn age(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        if let Some(client) = self.client() {
            let mut locked = self.lock();
            let slots = &mut locked.state.slots;
            page.table().rmap_visit(page.pfn(), client, |location| {
                if let Some(slot) = slot_at(slots, location) {
                    accessed |= std::mem::take(&mut slot.accessed);
                }
                Retain::Keep
            });
        }
        accessed
    }

    /// Sleeps until no access is in flight through what was invalidated of these frames. Each of
    /// them is at most a page long, and none can begin.
    pub(super) fn wait_for_stale(&self, frames: &[Pfn]) {
        self.wait_while(|slot| slot.stale_users() > 0 && frames.contains(&slot.pfn));
    }

    /// Sabotage: waits for those writes alone that would go on in a frame after it is another page's.
    #[cfg(not(any(loom, shuttle)))]
    pub(super) fn wait_for_strays(&self, frames: &[Pfn]) {
        let strays = |slot: &Slot| slot.life == Life::Dead && slot.writers > 0;
        self.wait_while(|slot| strays(slot) && frames.contains(&slot.pfn));
    }

    fn wait_while(&self, is_awaited: impl Fn(&Slot) -> bool) {
        let mut locked = self.lock();
        if locked.state.slots.iter().any(&is_awaited) {
            locked.state.stats.waits += 1;
        }
        while locked.state.slots.iter().any(&is_awaited) {
            locked = self.wait(locked);
        }
    }

    /// Gives up every entry; no access may be in flight.
    pub(super) fn forget_everything(&self, table: &FrameTable) {
        let Some(client) = self.client() else {
            return;
        };
        let mut locked = self.lock();
        for (index, slot) in (0..).zip(&mut locked.state.slots) {
            if slot.life == Life::Live {
                give_up(slot, table, RmapEntry::new(client, index));
            }
        }
    }

    /// Compares the reverse map with the live entries, while the host may go on to invalidate: it
    /// changes both in one step under the lock. Once `is_cut` says so it leaves
    /// off, with what it has found.
    pub(super) fn differences(&self, table: &FrameTable, is_cut: impl Fn() -> bool) -> Vec<String> {
        let Some(client) = self.client() else {
            return Vec::new();
        };
        let mut found = Differences::of(client, "IOTLB entry");
        for (location, pfn) in live(&self.lock().state.slots) {
            found.check_mapping(table, pfn, location);
        }
        for (location, slot) in (0..).zip(&self.lock().state.slots) {
            if slot.life == Life::Live && slot.writable {
                found.check_writer(table, slot.pfn, location);
            }
        }
        for pfn in (0..table.len()).map(Pfn::new).filter(|&pfn| !table.is_rmap_empty(pfn)) {
            let mut from = Some(0);
            while let Some(location) = from {
                let locked = self.lock();
                let slots = &locked.state.slots;
                from = found.check_entries(table, pfn, location, |location| {
                    live(slots).any(|mapping| mapping == (location, pfn))
                });
            }
            if found.is_full() || is_cut() {
                break;
            }
        }
        found.into_sentences()
    }
}

/// The location of each live entry, and its frame.
fn live(slots: &[Slot]) -> impl Iterator<Item = (u64, Pfn)> {
    let slots = (0..).zip(slots);
    slots.filter(|(_, slot)| slot.life == Life::Live).map(|(at, slot)| (at, slot.pfn))
}

fn slot_at(slots: &mut [Slot], location: u64) -> Option<&mut Slot> {
    usize::try_from(location).ok().and_then(|index| slots.get_mut(index))
}

/// Frees a live slot that is not in use. Its dirty state is noted before it leaves the reverse map,
/// as for every removal of a client's own; nothing is cached elsewhere, so there is no flush.
fn give_up(slot: &mut Slot, table: &FrameTable, entry: RmapEntry) {
    if slot.dirty {
        table.note_dirty(slot.pfn);
    }
    table.rmap_remove(slot.pfn, entry);
    *slot = Slot::FREE;
}

/// An access in flight: until it is dropped, the frame stays what it is. Wait for no page lock
/// meanwhile, whose holder may wait for this.
pub(super) struct InFlight<'a> {
    slots: &'a Slots,
    index: usize,
    pfn: Pfn,
    access: DeviceAccess,
    held: Option<Held>,
}

impl InFlight<'_> {
    /// The frame to access.
    pub(super) fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        drop(self.held.take());
        let mut locked = self.slots.lock();
        let slot = &mut locked.state.slots[self.index];
        match self.access {
            DeviceAccess::Read => slot.readers -= 1,
            DeviceAccess::Write => slot.writers -= 1,
        }
        if slot.life == Life::Dead && slot.users() == 0 {
            *slot = Slot::FREE;
        }
        // A flush waits for a stale access, an installation for a slot that nobody uses.
        if slot.users() == 0 || slot.writers == 0 {
            self.slots.ended.notify_all();
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "slots_tests.rs"]
mod tests;
