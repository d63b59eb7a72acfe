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
//! A model checker runs this file as it is (`src/host_mm/models/exhaustive/iotlb.rs`).

use crate::addr::{Gfn, Pfn};
use crate::client::stand_in_for_client_lock;
use crate::lock_rank::Held;
use crate::sync::Condvar;
use crate::{
    ClientGuard, ClientId, ClientLock, Differences, FrameTable, Gone, Harvest, Invalidation,
    LockedPage, Retain, RmapEntry, SequenceToken,
};

#[path = "in_flight_stats.rs"]
mod stats;
pub use stats::IotlbStats;

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

    /// What it has mapped, once it is taken away: nothing is cached elsewhere.
    fn gone(self, entry: RmapEntry) -> Gone {
        Gone { pfn: self.pfn, entry, dirty: self.dirty }
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

/// See the module's documentation.
pub struct Slots {
    client: ClientId,
    /// Number of the memory object that the guest frames are of.
    object: u16,
    state: ClientLock<State>,
    /// An access has ended that somebody may wait for.
    ended: Condvar,
}

impl Slots {
    /// `entries` free slots, at least one, of the client with this number.
    pub fn new(client: ClientId, object: u16, entries: usize) -> Self {
        let slots = vec![Slot::FREE; entries.max(1)].into_boxed_slice();
        let state = ClientLock::new(State { slots, hand: 0, stats: IotlbStats::default() });
        Self { client, object, state, ended: Condvar::new() }
    }

    #[cfg(not(any(loom, shuttle)))]
    /// What has happened so far.
    pub fn stats(&self) -> IotlbStats {
        self.lock().stats
    }

    fn lock(&self) -> ClientGuard<'_, State> {
        self.state.lock()
    }

    /// Begins an access if an entry allows it.
    pub fn begin(&self, gfn: Gfn, access: DeviceAccess) -> Option<InFlight<'_>> {
        let mut state = self.lock();
        let index = state.live(gfn)?;
        if access == DeviceAccess::Write && !state.slots[index].writable {
            return None;
        }
        state.stats.hits += 1;
        Some(self.enter(state, index, access))
    }

    /// Maps the page that was found in the token's frame, and begins an access through it; `None` if
    /// an invalidation came in between: start over. `writable` must be true for a write.
    pub fn install(
        &self,
        table: &FrameTable,
        gfn: Gfn,
        token: SequenceToken,
        writable: bool,
        access: DeviceAccess,
    ) -> Option<InFlight<'_>> {
        let mut state = self.lock();
        let index = loop {
            if let Some(index) = state.live(gfn) {
                // One of another frame goes before the page may be in this one.
                let is_current = table.is_current(&state, token);
                if state.slots[index].pfn != token.pfn() || !is_current {
                    state.stats.retries += 1;
                    return None;
                }
                if writable && !state.slots[index].writable {
                    state.slots[index].writable = true;
                    state.stats.upgrades += 1;
                }
                break index;
            }
            let Some(index) = state.place() else {
                // All are in use, which none is for long.
                state = self.state.wait(&self.ended, state);
                continue;
            };
            let entry = RmapEntry::new(self.client, index as u64);
            if state.slots[index].life == Life::Live {
                let gone = std::mem::replace(&mut state.slots[index], Slot::FREE).gone(entry);
                table.give_up_uncached(&state, &[gone]);
                state.stats.replaced += 1;
            }
            let Some(exported) = table.export_in_time(&state, token, entry) else {
                state.stats.retries += 1;
                return None;
            };
            exported.stand();
            state.slots[index] =
                Slot { life: Life::Live, gfn, pfn: token.pfn(), writable, ..Slot::FREE };
            state.stats.installs += 1;
            break index;
        };
        Some(self.enter(state, index, access))
    }

    /// Counts an access in. Its marks are set before it touches the page.
    fn enter(
        &self,
        mut state: ClientGuard<'_, State>,
        index: usize,
        access: DeviceAccess,
    ) -> InFlight<'_> {
        let slot = &mut state.slots[index];
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
        drop(state);
        // A flush waits for an access as it does for the lock.
        let held = Some(stand_in_for_client_lock());
        InFlight { slots: self, index, pfn, access, held }
    }

    /// What [`ExportNotifier::invalidate_page`](crate::ExportNotifier) asks for.
    pub fn invalidate(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let mut harvest = Harvest::default();
        let keep = match kind {
            Invalidation::Unmap | Invalidation::Replace(_) => false,
            Invalidation::Clean => true,
            // Entries are no copies.
            Invalidation::Recall => return harvest,
        };
        let mut locked = self.lock();
        let state = &mut *locked;
        page.table().rmap_visit(page.pfn(), self.client, |location| {
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

    /// What [`ExportNotifier::still_allows`](crate::ExportNotifier::still_allows) asks for.
    #[cfg(not(any(loom, shuttle)))]
    pub fn still_allows(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        let locked = self.lock();
        locked.slots.iter().filter(|slot| slot.pfn == page.pfn()).any(|slot| {
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
    pub fn age(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        let mut state = self.lock();
        page.table().rmap_visit(page.pfn(), self.client, |location| {
            if let Some(slot) = slot_at(&mut state.slots, location) {
                accessed |= std::mem::take(&mut slot.accessed);
            }
            Retain::Keep
        });
        accessed
    }

    /// Sleeps until no access is in flight through what was invalidated of these frames. Each of
    /// them is at most a page long, and none can begin.
    pub fn wait_for_stale(&self, frames: &[Pfn]) {
        self.wait_while(|slot| slot.stale_users() > 0 && frames.contains(&slot.pfn));
    }

    /// Sabotage: waits for those writes alone that would go on in a frame after it is another page's.
    #[cfg(not(any(loom, shuttle)))]
    pub fn wait_for_strays(&self, frames: &[Pfn]) {
        let strays = |slot: &Slot| slot.life == Life::Dead && slot.writers > 0;
        self.wait_while(|slot| strays(slot) && frames.contains(&slot.pfn));
    }

    fn wait_while(&self, is_awaited: impl Fn(&Slot) -> bool) {
        let mut locked = self.lock();
        if locked.slots.iter().any(&is_awaited) {
            locked.stats.waits += 1;
        }
        while locked.slots.iter().any(&is_awaited) {
            locked = self.state.wait(&self.ended, locked);
        }
    }

    /// Gives up every entry; no access may be in flight.
    pub fn forget_everything(&self, table: &FrameTable) {
        let mut state = self.lock();
        let live = (0..).zip(&mut state.slots).filter(|(_, slot)| slot.life == Life::Live);
        let gone: Vec<Gone> = live
            .map(|(index, slot)| {
                let entry = RmapEntry::new(self.client, index);
                std::mem::replace(slot, Slot::FREE).gone(entry)
            })
            .collect();
        table.give_up_uncached(&state, &gone);
    }

    /// Compares the reverse map with the live entries, while the host may go on to invalidate: it
    /// changes both in one step under the lock. Once `is_cut` says so it leaves
    /// off, with what it has found.
    pub fn differences(&self, table: &FrameTable, is_cut: impl Fn() -> bool) -> Vec<String> {
        let mut found = Differences::of(self.client, "IOTLB entry");
        for (location, pfn) in live(&self.lock().slots) {
            found.check_mapping(table, pfn, location);
        }
        for (location, slot) in (0..).zip(&self.lock().slots) {
            if slot.life == Life::Live && slot.writable {
                found.check_writer(table, slot.pfn, location);
            }
        }
        for pfn in (0..table.len()).map(Pfn::new).filter(|&pfn| !table.is_rmap_empty(pfn)) {
            let mut from = Some(0);
            while let Some(location) = from {
                let locked = self.lock();
                let slots = &locked.slots;
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

/// An access in flight: until it is dropped, the frame stays what it is. Wait for no page lock
/// meanwhile, whose holder may wait for this.
pub struct InFlight<'a> {
    slots: &'a Slots,
    index: usize,
    pfn: Pfn,
    access: DeviceAccess,
    held: Option<Held>,
}

impl InFlight<'_> {
    /// The frame to access.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        drop(self.held.take());
        let mut locked = self.slots.lock();
        let slot = &mut locked.slots[self.index];
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
#[path = "in_flight_tests.rs"]
mod tests;
