//! Shadow roots and pages: which guest CR3 has which tables.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;

use crate::addr::{Gva, Pfn};
use crate::export_rmap::{RevokeError, RmapEntry};
use crate::shadow_mmu::spte::{ADDRESS_MASK, Pte};
use crate::shadow_mmu::tables::{ENTRIES, PageIndex};
use crate::shadow_mmu::walk::{PagingContext, table_index};
use crate::shadow_mmu::window::Window;
use crate::shadow_mmu::zap::ALL;
use crate::shadow_mmu::{Mmu, ShadowMmu};
use crate::streams::Streams;

/// PML4 slot of the monitor, in every root.
pub(super) const MONITOR_SLOT: usize = 255;
/// Bytes mapped by one leaf table.
pub(super) const LEAF_SPAN: u64 = 2 << 20;

/// Handle of the shadow tables of one guest CR3. Void once [`ShadowMmu::recycle`] was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    number: u32,
    epoch: u64,
}

impl Root {
    /// For tracepoints: which of the shadow MMU's roots; others may have had the number before.
    pub(super) const fn number(self) -> u32 {
        self.number
    }
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
pub(super) struct Leaf {
    pub(super) page: PageIndex,
    /// Some of its SPTEs were made from guest pages of 2 MiB / 1 GiB.
    pub(super) origins: Pte,
    /// What was installed around the last fault: by which window, and the first entry and the one after the
    /// last.
    pub(super) around: Option<(Window, u16, u16)>,
}

#[derive(Debug)]
pub(super) struct RootTables {
    page: PageIndex,
    /// By number of the 2 MiB region that each maps.
    pub(super) leaves: BTreeMap<u64, Leaf>,
    /// Counts guest flushes: a fault that overlapped one must not install what it read before.
    pub(super) flushes: u64,
    /// Some leaf was given an SPTE of a guest page of 1 GiB.
    pub(super) has_1g: bool,
}

/// What the MMU lock protects.
#[derive(Debug)]
pub(super) struct State {
    pub(super) roots: Vec<RootTables>,
    by_role: HashMap<Role, u32>,
    pages: u32,
    next_page: PageIndex,
    /// Counts recyclings; a [`Root`] of an older one is void.
    epoch: u64,
    /// All is being forgotten: no page is to be had until that is done.
    is_forgetting: bool,
    pub(super) streams: Streams,
    /// What the last fault in any leaf table made of its window: where one begins of which nothing is known.
    pub(super) window: Window,
    /// Frames of which the host has cleared SPTEs and which it has not flushed yet.
    pub(super) unflushed: HashSet<Pfn>,
    /// The location from which ageing goes on in a frame with too many mappings for one look.
    pub(super) age_from: u64,
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
            is_forgetting: false,
            streams: Streams::default(),
            window: Window::START,
            unflushed: HashSet::new(),
            age_from: 0,
        }
    }

    /// Makes every root void; their tables stay until [`end_forgetting`](Self::end_forgetting).
    pub(super) fn begin_forgetting(&mut self) {
        self.is_forgetting = true;
        self.epoch += 1;
        self.by_role.clear();
    }

    /// All pages are free again.
    pub(super) fn end_forgetting(&mut self) {
        *self = Self { epoch: self.epoch, ..Self::new(self.pages) };
    }

    fn root(&self, root: Root) -> Option<&RootTables> {
        (root.epoch == self.epoch).then(|| self.roots.get(root.number as usize)).flatten()
    }

    pub(super) fn root_mut(&mut self, root: Root) -> Option<&mut RootTables> {
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
    pub(super) fn find(&self, root: Root, gva: Gva) -> Option<SptePlace> {
        let leaf = self.root(root)?.leaves.get(&region_of(gva))?;
        Some(SptePlace { page: leaf.page, index: table_index(gva, 1) })
    }

    /// The leaf table of an address, if it exists.
    pub(super) fn leaf_mut(&mut self, root: Root, gva: Gva) -> Option<&mut Leaf> {
        self.root_mut(root)?.leaves.get_mut(&region_of(gva))
    }

    fn allocate(&mut self) -> Option<PageIndex> {
        (self.next_page < self.pages && !self.is_forgetting).then(|| {
            self.next_page += 1;
            self.next_page - 1
        })
    }
}

/// Number of the 2 MiB region of an address.
pub(super) fn region_of(gva: Gva) -> u64 {
    gva.as_u64() / LEAF_SPAN
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
        let region = region_of(gva);
        let index = table_index(gva, 1);
        let tables = state.root_mut(root)?;
        tables.has_1g |= origin.contains(Pte::FROM_1G);
        if let Some(leaf) = tables.leaves.get_mut(&region) {
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
        state.root_mut(root)?.leaves.insert(region, Leaf { page, origins: origin, around: None });
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

    pub(super) fn rmap_entry(&self, place: SptePlace) -> RmapEntry {
        RmapEntry::new(self.client, place.location())
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
            drop(state);
            mmu.flush(root, ALL)?;
            return Ok(LoadRoot::Root(root));
        }
        let Some(page) = state.allocate() else {
            return Ok(LoadRoot::NeedsRecycle);
        };
        mmu.tables.clear(page);
        mmu.tables.entry(page, MONITOR_SLOT).store(mmu.config.monitor_pml4e, Ordering::Release);
        let number = u32::try_from(state.roots.len()).unwrap_or(u32::MAX);
        let leaves = BTreeMap::new();
        state.roots.push(RootTables { page, leaves, flushes: 0, has_1g: false });
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
}
