//! A guest that has page tables and no processor: its faults are calls.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use gnomon::addr::{Gfn, Gpa, Gva, PAGE_SIZE, PAGE_SIZE_U64};
use gnomon::host_mm::{HostMm, HostMmConfig, MemoryObject, SwapConfig};
use gnomon::shadow_mmu::{
    Access, FaultOutcome, LoadRoot, MachineLayout, PagingContext, Root, ShadowConfig, ShadowMmu,
    TableMemory,
};
use vm_memory::MmapRegion;

/// Present and writable, accessed and dirty: what a guest's entries say once its pages were used.
const TABLE: u64 = 0b11 | 1 << 5 | 1 << 6;
const LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
/// Bytes of the guest's memory.
const MEMORY: u64 = 4 << 30;

/// The guest's frames: its tables, and the page that the aliases are of.
const PML4: u64 = 1;
const LEVELS: u64 = 4;
pub(crate) const DATA: Gfn = Gfn::new(100);
/// The first of the top tables of other address spaces.
const OTHER_PML4: u64 = 1 << 19;

/// Host memory of so many bytes, without swap worth speaking of.
pub(crate) fn host_memory(bytes: u64) -> Result<Arc<HostMm>> {
    let swap = SwapConfig { path: None, dir: None, bytes: 64 << 20 };
    Ok(HostMm::new(HostMmConfig { swap, ..HostMmConfig::new(bytes) })?)
}

pub(crate) struct Guest {
    pub(crate) shadow: ShadowMmu,
    pub(crate) object: Arc<MemoryObject>,
    pub(crate) context: PagingContext,
    pub(crate) root: Root,
}

impl Guest {
    fn new(mm: &Arc<HostMm>, sptes: u64, tables: u64) -> Result<Self> {
        let object = mm.create_object(MEMORY)?;
        // Leaf tables, those above them, and some.
        let pages = u32::try_from(2 * sptes / ENTRIES + tables + 64)?;
        let region = MmapRegion::<()>::new(pages as usize * PAGE_SIZE)?;
        let config = ShadowConfig {
            machine: MachineLayout {
                tables_base: 1 << 36,
                frames_base: 1 << 40,
                window_base: 1 << 35,
                window_gfn: Gfn::new(1 << 30),
                window_bytes: 0,
            },
            monitor_pml4e: 0,
            phys_bits: 46,
            zap_to_age: true,
        };
        let memory = TableMemory::new(Arc::new(region), 0, pages)?;
        let shadow = ShadowMmu::new(config, object.clone(), memory, mm.map_guest_view()?)?;
        let context = PagingContext { cr3: at(PML4), write_protect: true, nxe: true };
        let LoadRoot::Root(root) = shadow.load_root(&context)? else { bail!("no shadow page") };
        Ok(Self { shadow, object, context, root })
    }

    /// All of its addresses map one page: each table's entries are all the same.
    pub(crate) fn of_aliases(mm: &Arc<HostMm>, sptes: u64) -> Result<Self> {
        let guest = Self::new(mm, sptes, 0)?;
        for level in 0..LEVELS {
            let to = if level + 1 < LEVELS { at(PML4 + level + 1) } else { DATA.base() };
            guest.fill(PML4 + level, |_| to.as_u64() | TABLE)?;
        }
        Ok(guest)
    }

    /// Its addresses are its memory, in pages of 1 GiB.
    pub(crate) fn of_large_pages(mm: &Arc<HostMm>, sptes: u64) -> Result<Self> {
        let guest = Self::new(mm, sptes, 0)?;
        guest.fill(PML4, |_| at(PML4 + 1).as_u64() | TABLE)?;
        guest.fill(PML4 + 1, |index| (index % 4) << 30 | TABLE | LARGE)?;
        Ok(guest)
    }

    /// As [`of_aliases`](Self::of_aliases), in so many address spaces: see
    /// [`address_space`](Self::address_space).
    pub(crate) fn of_address_spaces(mm: &Arc<HostMm>, spaces: u64) -> Result<Self> {
        let guest = Self::new(mm, 0, 4 * spaces)?;
        for level in 0..LEVELS {
            let to = if level + 1 < LEVELS { at(PML4 + level + 1) } else { DATA.base() };
            guest.fill(PML4 + level, |_| to.as_u64() | TABLE)?;
        }
        for space in 0..spaces {
            let entry = at(PML4 + 1).as_u64() | TABLE;
            guest.object.write(at(OTHER_PML4 + space), &entry.to_le_bytes())?;
        }
        Ok(guest)
    }

    pub(crate) fn address_space(&self, number: u64) -> PagingContext {
        PagingContext { cr3: at(OTHER_PML4 + number), ..self.context }
    }

    fn fill(&self, table: u64, entry: impl Fn(u64) -> u64) -> Result<()> {
        let bytes: Vec<u8> = (0..ENTRIES).flat_map(|index| entry(index).to_le_bytes()).collect();
        Ok(self.object.write(at(table), &bytes)?)
    }

    /// A fault at page `number` of the addresses.
    pub(crate) fn touch(&self, number: u64, access: Access) -> Result<()> {
        let gva = Gva::new(number * PAGE_SIZE_U64);
        match self.shadow.fault(&self.context, self.root, gva, access)? {
            FaultOutcome::Fixed => Ok(()),
            other => bail!("a fault at {gva} came to {other:?}"),
        }
    }

    pub(crate) fn touch_all(&self, count: u64, access: Access) -> Result<()> {
        (0..count).try_for_each(|number| self.touch(number, access))
    }

    /// Touches those that the faults before have not brought along.
    pub(crate) fn touch_groups(&self, count: u64) -> Result<()> {
        (0..count).step_by(16).try_for_each(|number| self.touch(number, Access::Read))?;
        let stats = self.shadow.stats();
        let mapped = stats.installs;
        if mapped < count { bail!("{mapped} of {count} addresses are mapped") } else { Ok(()) }
    }

    /// A guest's load of CR3.
    pub(crate) fn load(&mut self, context: PagingContext) -> Result<()> {
        let LoadRoot::Root(root) = self.shadow.load_root(&context)? else {
            bail!("no shadow page")
        };
        (self.context, self.root) = (context, root);
        Ok(())
    }

    /// Takes the frame of the aliases' page away.
    pub(crate) fn evict_data(&self) -> Result<()> {
        let page = self.object.try_lock_resident(DATA).context("the page is in no frame")?;
        let pfn = page.pfn();
        drop(page);
        let evicted = self.object.host_mm().evict_frames(&[pfn])?;
        if evicted == 1 { Ok(()) } else { bail!("the page was not evicted") }
    }
}

fn at(gfn: u64) -> Gpa {
    Gfn::new(gfn).base()
}
