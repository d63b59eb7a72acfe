//! Shadow roots and pages: which guest CR3 has which tables, and what a guest flush removes.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use crate::addr::{Gva, Pfn};
use crate::export_rmap::{RevokeError, RmapEntry};
use crate::host_mm::{PausePoint, Streams};
use crate::shadow_mmu::spte::{ADDRESS_MASK, Pte};
use crate::shadow_mmu::tables::{ENTRIES, PageIndex};
use crate::shadow_mmu::walk::{PagingContext, table_index};
use crate::shadow_mmu::{Mmu, ShadowMmu};
use crate::sys::signal;

/// PML4 slot of the monitor, in every root.
pub(super) const MONITOR_SLOT: usize = 255;
/// Bytes mapped by one leaf table.
const LEAF_SPAN: u64 = 2 << 20;
/// Bytes of the largest guest page.
const GIB: u64 = 1 << 30;

/// Handle of the shadow tables of one guest CR3. Void once [`ShadowMmu::recycle`] was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    number: u32,
    epoch: u64,
}

/// What a guest's CR3 load came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadRoot {
    /// The root to run on.
    Root(Root),
    /// No shadow page is left for it: see [`ShadowMmu::recycle`].
    NeedsRecycle,
}

/// What a root's SPTEs depend on besides the guest's tables: vCPUs that differ in it must not share
/// one (with CR0.WP clear, an SPTE may be writable where the guest's entry is not).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Role {
    pml4: u64,
    write_protect: bool,
    nxe: bool,
}

impl Role {
    fn of(context: &PagingContext) -> Self {
        let PagingContext { cr3, write_protect, nxe } = *context;
        Self { pml4: cr3.as_u64() & ADDRESS_MASK, write_protect, nxe }
    }
}

/// A leaf table in use.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    page: PageIndex,
    /// First address that it maps.
    base: Gva,
    /// Some of its SPTEs were made from guest pages of 2 MiB / 1 GiB.
    origins: Pte,
}

#[derive(Debug)]
struct RootTables {
    page: PageIndex,
    leaves: Vec<Leaf>,
    /// Index into `leaves` by number of the 2 MiB region.
    by_region: HashMap<u64, usize>,
    /// Counts guest flushes: a fault that overlapped one must not install what it read before.
    flushes: u64,
}

/// What the MMU lock protects.
#[derive(Debug)]
pub(super) struct State {
    roots: Vec<RootTables>,
    by_role: HashMap<Role, u32>,
    pages: u32,
    next_page: PageIndex,
    /// Counts recyclings; a [`Root`] of an older one is void.
    epoch: u64,
    pub(super) streams: Streams,
    /// Frames of which the host has cleared SPTEs and which it has not flushed yet.
    pub(super) unflushed: HashSet<Pfn>,
}

/// Where an SPTE is, packed as the reverse map's location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SptePlace {
    pub(super) page: PageIndex,
    pub(super) index: usize,
}

impl SptePlace {
    pub(super) fn location(self) -> u64 {
        u64::from(self.page) * ENTRIES as u64 + self.index as u64
    }

    // A location is made of a 32-bit page number and nine bits.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn of_location(location: u64) -> Self {
        let entries = ENTRIES as u64;
        Self { page: (location / entries) as u32, index: (location % entries) as usize }
    }
}

/// When a fault's walk began, in terms of its root's flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FlushCount(u64);

impl State {
    pub(super) fn new(pages: u32) -> Self {
        Self {
            roots: Vec::new(),
            by_role: HashMap::new(),
            pages,
            next_page: 0,
            epoch: 0,
            streams: Streams::default(),
            unflushed: HashSet::new(),
        }
    }

    fn root(&self, root: Root) -> Option<&RootTables> {
        (root.epoch == self.epoch).then(|| self.roots.get(root.number as usize)).flatten()
    }

    fn root_mut(&mut self, root: Root) -> Option<&mut RootTables> {
        if root.epoch != self.epoch {
            return None;
        }
        self.roots.get_mut(root.number as usize)
    }

    /// The root's flush count; `None` for a void root.
    pub(super) fn flush_count(&self, root: Root) -> Option<FlushCount> {
        self.root(root).map(|tables| FlushCount(tables.flushes))
    }

    /// The SPTE of an address, if its leaf table exists.
    fn find(&self, root: Root, gva: Gva) -> Option<SptePlace> {
        let tables = self.root(root)?;
        let leaf = tables.leaves[*tables.by_region.get(&(gva.as_u64() / LEAF_SPAN))?];
        Some(SptePlace { page: leaf.page, index: table_index(gva, 1) })
    }

    fn allocate(&mut self) -> Option<PageIndex> {
        (self.next_page < self.pages).then(|| {
            self.next_page += 1;
            self.next_page - 1
        })
    }

    /// All leaf tables, with the addresses they map.
    fn leaves(&self) -> impl Iterator<Item = &Leaf> {
        self.roots.iter().flat_map(|tables| &tables.leaves)
    }
}

impl Mmu {
    /// The place of the SPTE for an address, making tables as needed. `None`: no page is left.
    pub(super) fn spte_place(
        &self,
        state: &mut State,
        root: Root,
        gva: Gva,
        origin: Pte,
    ) -> Option<SptePlace> {
        let region = gva.as_u64() / LEAF_SPAN;
        let index = table_index(gva, 1);
        if let Some(tables) = state.root_mut(root)
            && let Some(&at) = tables.by_region.get(&region)
        {
            let leaf = &mut tables.leaves[at];
            leaf.origins |= origin;
            return Some(SptePlace { page: leaf.page, index });
        }
        let mut page = state.root(root)?.page;
        for level in (2..=4).rev() {
            let at = table_index(gva, level);
            let entry = Pte::of(self.tables.entry(page, at).load(Ordering::Relaxed));
            page = if entry.is_present() {
                self.page_at(entry)?
            } else {
                let new = state.allocate()?;
                self.tables.clear(new);
                let entry = Pte::TABLE.at(self.page_address(new));
                // Release: hardware that follows the entry finds a table of zeros.
                self.tables.entry(page, at).store(entry.bits(), Ordering::Release);
                new
            };
        }
        let tables = state.root_mut(root)?;
        tables.by_region.insert(region, tables.leaves.len());
        let base = Gva::new(region * LEAF_SPAN);
        tables.leaves.push(Leaf { page, base, origins: origin });
        Some(SptePlace { page, index })
    }

    fn page_address(&self, page: PageIndex) -> u64 {
        self.config.machine.tables_base + u64::from(page) * crate::addr::PAGE_SIZE_U64
    }

    fn page_at(&self, entry: Pte) -> Option<PageIndex> {
        let offset = entry.address().checked_sub(self.config.machine.tables_base)?;
        PageIndex::try_from(offset / crate::addr::PAGE_SIZE_U64).ok()
    }

    /// The frame that an SPTE points to; `None` if it is not present or maps the pinned window.
    pub(super) fn frame_of(&self, spte: Pte) -> Option<Pfn> {
        if !spte.is_present() {
            return None;
        }
        self.config.machine.frame_at(spte.address(), self.mm.frame_count())
    }

    pub(super) fn rmap_entry(&self, place: SptePlace) -> Option<RmapEntry> {
        self.client.get().map(|&client| RmapEntry::new(client, place.location()))
    }

    /// Clears SPTEs for reasons of the guest's, with the MMU lock held: clear, flush, and only then
    /// out of the reverse map. As long as a processor may use an old translation, the frame is
    /// exported, and whoever wants to take it must ask us and so wait for the MMU lock.
    ///
    /// The flush includes what the host has cleared and not flushed yet: an SPTE that is no longer
    /// there may still be in a TLB, and the guest has just been promised that it is not.
    pub(super) fn zap(
        &self,
        state: &mut State,
        places: impl Iterator<Item = SptePlace>,
    ) -> Result<(), RevokeError> {
        let mut zapped: Vec<(SptePlace, Pte)> = Vec::new();
        for place in places {
            let entry = self.tables.entry(place.page, place.index);
            if entry.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // AcqRel: the bits that hardware set before are ours, and none is set after.
            let old = Pte::of(entry.swap(0, Ordering::AcqRel));
            if let Some(pfn) = self.frame_of(old)
                && old.contains(Pte::DIRTY)
            {
                self.mm.frame_table().note_dirty(pfn);
            }
            zapped.push((place, old));
        }
        self.mm.pause(PausePoint::Zapped);
        if let Err(error) = self.revoke(zapped.iter().map(|&(_, old)| old), &state.unflushed) {
            // Back to what processors may still use, and what the reverse map says.
            for (place, old) in zapped {
                let entry = self.tables.entry(place.page, place.index);
                entry.store(old.bits(), Ordering::Release);
            }
            return Err(error);
        }
        self.mm.pause(PausePoint::ZapFlushed);
        self.check_zapped(zapped.iter().map(|&(_, old)| old));
        state.unflushed.clear();
        self.counters.guest_flushed.add(zapped.len() as u64);
        for (place, old) in zapped {
            if let (Some(pfn), Some(entry)) = (self.frame_of(old), self.rmap_entry(place)) {
                self.mm.frame_table().rmap_remove(pfn, entry);
            }
        }
        Ok(())
    }

    /// Makes every processor drop what it made of these SPTEs: frames, and the window's pages in
    /// one piece from the first to the last. And all that it has of the frames in `unflushed`.
    fn revoke(
        &self,
        sptes: impl Iterator<Item = Pte>,
        unflushed: &HashSet<Pfn>,
    ) -> Result<(), RevokeError> {
        let mut frames: Vec<Pfn> = unflushed.iter().copied().collect();
        let mut window: Option<(u64, u64)> = None;
        for spte in sptes {
            if let Some(pfn) = self.frame_of(spte) {
                frames.push(pfn);
            } else {
                let at = spte.address();
                let (first, last) = window.unwrap_or((at, at));
                window = Some((first.min(at), last.max(at)));
            }
        }
        self.guest_view.revoke(&frames)?;
        window.map_or(Ok(()), |(first, last)| self.revoke_window(first, last))
    }

    /// Drops every SPTE without a flush: for when no vCPU runs and none will before KVM has
    /// dropped all it cached.
    pub(super) fn forget_everything(&self) {
        let mut state = self.lock();
        for leaf in state.leaves() {
            for (index, entry) in self.tables.used(leaf.page) {
                let place = SptePlace { page: leaf.page, index };
                let old = Pte::of(entry.swap(0, Ordering::AcqRel));
                let Some(pfn) = self.frame_of(old) else {
                    continue;
                };
                if old.contains(Pte::DIRTY) {
                    self.mm.frame_table().note_dirty(pfn);
                }
                if let Some(entry) = self.rmap_entry(place) {
                    self.mm.frame_table().rmap_remove(pfn, entry);
                }
            }
        }
        let pages = state.pages;
        let epoch = state.epoch + 1;
        *state = State { epoch, ..State::new(pages) };
    }
}

impl ShadowMmu {
    /// A guest's load of CR3, or change of CR0.WP, CR4 or EFER.NXE: forgets the translations made
    /// from these tables before, as that flushes a TLB, and returns the root to run on.
    ///
    /// # Errors
    /// [`RevokeError`] if the flush failed; the VM must not go on.
    pub fn load_root(&self, context: &PagingContext) -> Result<LoadRoot, RevokeError> {
        let mmu = &*self.mmu;
        let mut state = mmu.lock();
        let role = Role::of(context);
        if let Some(&number) = state.by_role.get(&role) {
            let root = Root { number, epoch: state.epoch };
            flush(mmu, &mut state, root, |_| true)?;
            return Ok(LoadRoot::Root(root));
        }
        let Some(page) = state.allocate() else {
            return Ok(LoadRoot::NeedsRecycle);
        };
        mmu.tables.clear(page);
        mmu.tables.entry(page, MONITOR_SLOT).store(mmu.config.monitor_pml4e, Ordering::Release);
        let number = u32::try_from(state.roots.len()).unwrap_or(u32::MAX);
        state.roots.push(RootTables {
            page,
            leaves: Vec::new(),
            by_region: HashMap::new(),
            flushes: 0,
        });
        state.by_role.insert(role, number);
        Ok(LoadRoot::Root(Root { number, epoch: state.epoch }))
    }

    /// The root that a guest CR3 has already, without flushing it: for a vCPU that goes on after
    /// [`recycle`](Self::recycle) or starts where another one runs.
    ///
    /// # Errors
    /// As [`load_root`](Self::load_root).
    pub fn reuse_root(&self, context: &PagingContext) -> Result<LoadRoot, RevokeError> {
        {
            let state = self.mmu.lock();
            if let Some(&number) = state.by_role.get(&Role::of(context)) {
                return Ok(LoadRoot::Root(Root { number, epoch: state.epoch }));
            }
        }
        self.load_root(context)
    }

    /// The value for the real CR3; `None` for a void root.
    #[must_use]
    pub fn root_machine_address(&self, root: Root) -> Option<u64> {
        let state = self.mmu.lock();
        state.root(root).map(|tables| self.mmu.page_address(tables.page))
    }

    /// A guest's `invlpg`: forgets the translation of the guest page that maps `gva`, whatever its
    /// size.
    ///
    /// # Errors
    /// [`RevokeError`] if the flush failed; the VM must not go on.
    pub fn invlpg(&self, root: Root, gva: Gva) -> Result<(), RevokeError> {
        let mmu = &*self.mmu;
        let mut state = mmu.lock();
        let region = gva.as_u64() / LEAF_SPAN;
        // The rest of a large page has SPTEs of its own.
        let large_2m = state
            .root(root)
            .and_then(|tables| Some(tables.leaves[*tables.by_region.get(&region)?]))
            .is_some_and(|leaf| leaf.origins.contains(Pte::FROM_2M));
        let in_gib = |leaf: &Leaf| leaf.base.as_u64() / GIB == gva.as_u64() / GIB;
        let large_1g = state.root(root).is_some_and(|tables| {
            tables.leaves.iter().any(|leaf| in_gib(leaf) && leaf.origins.contains(Pte::FROM_1G))
        });
        if large_1g || large_2m {
            return flush(mmu, &mut state, root, |leaf| {
                (large_1g && in_gib(leaf)) || leaf.base.as_u64() / LEAF_SPAN == region
            });
        }
        if let Some(tables) = state.root_mut(root) {
            tables.flushes += 1;
        }
        let place = state.find(root, gva);
        mmu.zap(&mut state, place.into_iter())
    }

    /// Takes all shadow pages back. Every [`Root`] is void after it.
    ///
    /// Upper-level entries may only change here, because a KVM that shadows our tables does not see
    /// it: the caller keeps every vCPU out of `KVM_RUN` from before this call until it has deleted
    /// and added a memslot again, which makes KVM drop all it knows.
    pub fn recycle(&self) {
        self.mmu.forget_everything();
        self.mmu.counters.recycles.add(1);
    }

    /// An address that still has an SPTE pointing to the frame, whatever the reverse map says.
    #[must_use]
    pub fn find_mapping(&self, pfn: Pfn) -> Option<Gva> {
        let state = self.mmu.lock();
        let mut sptes = present_sptes(&self.mmu, &state);
        sptes.find(|&(_, _, mapped)| mapped == pfn).map(|(gva, _, _)| gva)
    }

    /// Invariant I3: compares the reverse map with the SPTEs, both ways, and their right to write with
    /// what the frames allow. Returns one sentence for each difference, at most 32. The host may
    /// invalidate meanwhile. When a [stop](signal::is_stop_asked) is asked for it leaves off, and knows
    /// of none.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        let mmu = &*self.mmu;
        let state = mmu.lock();
        let Some(&client) = mmu.client.get() else {
            return Vec::new();
        };
        let sptes = present_sptes(mmu, &state).map(|(_, place, pfn)| (place.location(), pfn));
        let mut is_cut = false;
        let sptes = sptes.take_while(|_| {
            is_cut |= signal::is_stop_asked();
            !is_cut
        });
        let mut differences = mmu.mm.frame_table().client_differences(client, "SPTEs", sptes);
        if is_cut {
            // Without all SPTEs, the reverse map has too many entries.
            return Vec::new();
        }
        let writable = present_sptes(mmu, &state).filter(|&(_, place, _)| mmu.is_writable(place));
        let writable = writable.take_while(|_| !signal::is_stop_asked());
        let writable = writable.map(|(_, place, pfn)| (place.location(), pfn));
        differences.extend(mmu.mm.frame_table().forbidden_writers("SPTE", writable));
        differences
    }
}

/// Every present SPTE that points to a frame: its address, its place, the frame.
fn present_sptes<'a>(
    mmu: &'a Mmu,
    state: &'a State,
) -> impl Iterator<Item = (Gva, SptePlace, Pfn)> + 'a {
    state.leaves().flat_map(move |leaf| {
        mmu.tables.used(leaf.page).filter_map(move |(index, entry)| {
            let place = SptePlace { page: leaf.page, index };
            let pfn = mmu.frame_of(Pte::of(entry.load(Ordering::Acquire)))?;
            let gva = leaf.base.checked_add(place.index as u64 * crate::addr::PAGE_SIZE_U64)?;
            Some((gva, place, pfn))
        })
    })
}

/// Forgets the translations in the leaf tables for which `which` holds.
fn flush(
    mmu: &Mmu,
    state: &mut State,
    root: Root,
    which: impl Fn(&Leaf) -> bool,
) -> Result<(), RevokeError> {
    let Some(tables) = state.root_mut(root) else {
        return Ok(());
    };
    tables.flushes += 1;
    let mut pages = Vec::new();
    for leaf in tables.leaves.iter_mut().filter(|leaf| which(leaf)) {
        leaf.origins = Pte::empty();
        pages.push(leaf.page);
    }
    let places = |page| mmu.tables.used(page).map(move |(index, _)| SptePlace { page, index });
    mmu.zap(state, pages.into_iter().flat_map(places))
}
