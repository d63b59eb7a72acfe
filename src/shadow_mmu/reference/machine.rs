//! Host memory, a guest's memory, a shadow MMU, and the machine space that they make together.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use super::memory::{self, Memory, used_frames};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64, Pfn};
use crate::export_rmap::Owner;
use crate::host_mm::{
    GuestView, HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, SwapConfig,
};
use crate::shadow_mmu::{
    LoadRoot, MachineLayout, PagingContext, Root, ShadowConfig, ShadowMmu, TableMemory,
    walk::table_index,
};

pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const PAGE_SIZE_BIT: u64 = 1 << 7;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a guest-physical address.
pub(crate) const PHYS_BITS: u32 = 46;
/// Guest RAM: enough for pages of 1 GiB inside and outside.
pub(crate) const RAM_BYTES: u64 = 4 << 30;
pub(crate) const WINDOW_BYTES: u64 = 4 * PAGE_SIZE_U64;
/// First guest frame of the pinned window.
pub(crate) const WINDOW_GFN: Gfn = Gfn::new(1 << 27);

const TABLES_BASE: u64 = 1 << 32;
const WINDOW_BASE: u64 = 1 << 33;
const FRAMES_BASE: u64 = 1 << 34;
/// Present, not for the guest: what every root has at slot 255.
pub(crate) const MONITOR: u64 = (TABLES_BASE - PAGE_SIZE_U64) | PRESENT | WRITABLE | ACCESSED;

pub(crate) struct Machine {
    pub(crate) shadow: ShadowMmu,
    pub(crate) mm: Arc<HostMm>,
    tables: Arc<MmapRegion>,
    window: Arc<MmapRegion>,
    table_bytes: u64,
}

/// The smallest host memory, with all checks on, where each page has a frame of its own.
pub(crate) fn config() -> HostMmConfig {
    let swap = SwapConfig { path: None, dir: None, bytes: 64 << 20 };
    HostMmConfig {
        check_evictions: true,
        swap,
        share_zero: false,
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    }
}

impl Machine {
    /// On memory of its own, with swap in a file.
    pub(crate) fn new(config: HostMmConfig, shadow_pages: u32) -> Self {
        Self::with_tables(config, memory::tables(shadow_pages))
    }

    /// As [`new`](Self::new), with this memory for its shadow pages.
    pub(crate) fn with_tables(config: HostMmConfig, tables: Arc<MmapRegion>) -> Self {
        let mm = HostMm::new(config).unwrap();
        let view = mm.map_guest_view().unwrap();
        let shadow_pages = u32::try_from(tables.size() as u64 / PAGE_SIZE_U64).unwrap();
        Self::assemble(mm, view, tables, memory::window(), shadow_pages)
    }

    /// On memory that outlives it, with swap in memory, too.
    pub(crate) fn on(memory: &Memory, config: HostMmConfig, shadow_pages: u32) -> Self {
        let mm = HostMm::on_memory(config, &memory.frames).unwrap();
        let (tables, window) = (memory.tables.clone(), memory.window.clone());
        Self::assemble(mm, memory.frames.guest_view(), tables, window, shadow_pages)
    }

    fn assemble(
        mm: Arc<HostMm>,
        view: GuestView,
        tables: Arc<MmapRegion>,
        window: Arc<MmapRegion>,
        shadow_pages: u32,
    ) -> Self {
        let object = mm.create_object(RAM_BYTES).unwrap();
        let config = ShadowConfig {
            machine: MachineLayout {
                tables_base: TABLES_BASE,
                frames_base: FRAMES_BASE,
                window_base: WINDOW_BASE,
                window_gfn: WINDOW_GFN,
                window_bytes: WINDOW_BYTES,
            },
            monitor_pml4e: MONITOR,
            phys_bits: PHYS_BITS,
            zap_to_age: true,
        };
        let table_memory = TableMemory::new(tables.clone(), 0, shadow_pages).unwrap();
        let shadow = ShadowMmu::new(config, object, table_memory, view).unwrap();
        shadow.set_window(window.clone());
        let table_bytes = u64::from(shadow_pages) * PAGE_SIZE_U64;
        Self { shadow, mm, tables, window, table_bytes }
    }

    pub(crate) fn object(&self) -> &Arc<MemoryObject> {
        self.shadow.object()
    }

    /// The word at a machine address, which must be one that a guest may reach.
    pub(crate) fn guest_word(&self, address: u64) -> &AtomicU64 {
        if let Some(offset) = address.checked_sub(FRAMES_BASE) {
            word(self.shadow.guest_view().region(), offset)
        } else {
            word(&self.window, address.checked_sub(WINDOW_BASE).expect("guest memory"))
        }
    }

    /// An entry of the shadow table at a machine address, which must be a shadow page.
    pub(crate) fn shadow_entry(&self, table: u64, index: usize) -> &AtomicU64 {
        let offset = table.checked_sub(TABLES_BASE).expect("a shadow page");
        assert!(offset < self.table_bytes, "a shadow page");
        word(&self.tables, offset + index as u64 * 8)
    }

    /// The leaf SPTE of an address, if its table exists.
    pub(crate) fn spte(&self, root: Root, gva: Gva) -> Option<&AtomicU64> {
        let mut table = self.shadow.root_machine_address(root)?;
        for level in (2..=4).rev() {
            let entry = self.shadow_entry(table, table_index(gva, level)).load(Ordering::Acquire);
            if entry & PRESENT == 0 {
                return None;
            }
            table = entry & ADDRESS;
        }
        Some(self.shadow_entry(table, table_index(gva, 1)))
    }

    /// The leaf SPTE's value; 0 for none.
    pub(crate) fn spte_value(&self, root: Root, gva: Gva) -> u64 {
        self.spte(root, gva).map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// The frame that an SPTE leads to; `None` for the window.
    pub(crate) fn spte_frame(spte: u64) -> Option<Pfn> {
        let offset = Self::frame_offset(spte)?;
        Some(Pfn::new(u32::try_from(offset / PAGE_SIZE_U64).unwrap()))
    }

    /// Whether the page of the guest is where the SPTE leads, by what the memory object itself says
    /// of the page: of several that share a frame, each is.
    pub(crate) fn leads_to(&self, spte: u64, gfn: Gfn) -> bool {
        let Some(pfn) = Self::spte_frame(spte) else {
            let page = ((spte & ADDRESS) - WINDOW_BASE) / PAGE_SIZE_U64;
            return gfn == Gfn::new(WINDOW_GFN.as_u64() + page);
        };
        if self.frame(gfn) != Some(pfn) {
            return false;
        }
        let owner = self.mm.last_owner(pfn).expect("a frame");
        let mine = Owner { object: self.object().number(), gfn };
        assert!(owner.is_shared() || owner == mine, "{gfn} is in frame {pfn} of {owner:?}");
        true
    }

    /// Whether the SPTE leads to a frame that nobody may write.
    pub(crate) fn is_shared(&self, spte: u64) -> bool {
        let owner = Self::spte_frame(spte).and_then(|pfn| self.mm.last_owner(pfn));
        owner.is_some_and(Owner::is_shared)
    }

    /// The mapping behind an SPTE, and the offset of its page there.
    fn behind(&self, spte: u64) -> (&MmapRegion, u64) {
        let address = spte & ADDRESS;
        match address.checked_sub(FRAMES_BASE) {
            Some(offset) => (self.shadow.guest_view().region(), offset),
            None => (&self.window, address - WINDOW_BASE),
        }
    }

    /// Where the page behind this SPTE is mapped in this process.
    pub(crate) fn host_address(&self, spte: u64) -> usize {
        let (region, offset) = self.behind(spte);
        region.as_ptr().addr() + usize::try_from(offset).unwrap()
    }

    /// Whether the kernel has not taken the page behind this SPTE out of KVM's mapping since it
    /// was used.
    pub(crate) fn is_mapped_for_kvm(&self, spte: u64, pagemap: &File) -> bool {
        let page = self.host_address(spte) as u64 / PAGE_SIZE_U64;
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, page * 8).unwrap();
        // Bit 63: the page is present in this mapping.
        u64::from_le_bytes(entry) >> 63 == 1
    }

    /// Offset in the guest view of the frame at this machine address.
    pub(crate) fn frame_offset(address: u64) -> Option<u64> {
        (address & ADDRESS).checked_sub(FRAMES_BASE)
    }

    pub(crate) fn load_root(&self, context: &PagingContext) -> Root {
        match self.shadow.load_root(context).unwrap() {
            LoadRoot::Root(root) => root,
            LoadRoot::NeedsRecycle => panic!("no shadow page for a root"),
        }
    }

    /// Sets an entry of a guest table.
    pub(crate) fn set_entry(&self, table: u64, index: usize, entry: u64) {
        let gpa = Gpa::new(table * PAGE_SIZE_U64 + index as u64 * 8);
        self.object().write(gpa, &entry.to_le_bytes()).unwrap();
    }

    /// A word of guest memory or of the window.
    pub(crate) fn read_word(&self, gpa: u64) -> u64 {
        if let Some(offset) = gpa.checked_sub(WINDOW_GFN.base().as_u64()) {
            return word(&self.window, offset).load(Ordering::Relaxed);
        }
        let mut bytes = [0; 8];
        self.object().read(Gpa::new(gpa), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn frame(&self, gfn: Gfn) -> Option<Pfn> {
        self.object().try_lock_resident(gfn).map(|page| page.pfn())
    }

    /// Evicts the page, if it is in a frame.
    pub(crate) fn evict(&self, gfn: Gfn) {
        if let Some(pfn) = self.frame(gfn) {
            assert_eq!(self.mm.evict_frames(&[pfn]).unwrap(), 1);
            assert_eq!(self.frame(gfn), None);
        }
    }

    pub(crate) fn clean(&self, gfn: Gfn) {
        if let Some(pfn) = self.frame(gfn) {
            assert_eq!(self.mm.clean_frames(&[pfn]).unwrap(), 1);
        }
    }

    /// The frames that ever held a page.
    pub(crate) fn used_frames(&self) -> Vec<Pfn> {
        used_frames(&self.mm)
    }

    /// Invariants I3 and I4, and what the host side's own checks found.
    #[track_caller]
    pub(crate) fn assert_sound(&self) {
        let differences = self.shadow.check_reverse_map();
        assert!(differences.is_empty(), "{differences:#?}");
        let table = self.mm.frame_table();
        for pfn in self.used_frames() {
            let exported = table.get(pfn).unwrap().is_exported();
            assert_eq!(exported, !table.rmap_entries(pfn).is_empty(), "I4: frame {pfn}");
        }
        let (violations, count) = self.mm.violations();
        assert_eq!(count, 0, "{violations:?}");
    }
}

fn word(region: &MmapRegion, offset: u64) -> &AtomicU64 {
    region.get_atomic_ref(usize::try_from(offset).unwrap()).unwrap()
}

/// A guest address from its four table indices, in canonical form.
pub(crate) fn gva(indices: [u64; 4]) -> Gva {
    let raw = indices.iter().fold(0, |raw, index| raw << 9 | index) << 12;
    Gva::new(if indices[0] >= 256 { raw | 0xffff << 48 } else { raw })
}
