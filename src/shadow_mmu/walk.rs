//! The walk of the guest's own page tables, as a processor in 4-level paging does it.
//!
//! Sources: Intel SDM vol. 3, 4.5 (formats), 4.6 (rights), 4.7 (error codes), 4.8 (accessed and
//! dirty); AMD APM vol. 2, 5.3 to 5.6. The guest runs as a kernel: its U/S bits do not matter to
//! it, and user-mode rules (SMEP, SMAP, protection keys) do not apply.
//!
//! Each entry is read under the page lock of the guest page that holds it, one at a time, so that
//! what is read is that page's content and not that of a frame's next owner.

use std::sync::atomic::Ordering;

use crate::addr::{Gfn, Gpa, Gva, PAGE_SHIFT};
use crate::export_rmap::PageFlags;
use crate::host_mm::MmError;
use crate::shadow_mmu::Mmu;
use crate::shadow_mmu::roots::MONITOR_SLOT;
use crate::shadow_mmu::spte::Pte;

/// What a guest access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Instruction fetch.
    Execute,
}

impl Access {
    /// For tracepoints.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
        }
    }
}

/// The control state that a walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingContext {
    /// Guest-physical address of the PML4; the low 12 bits are ignored.
    pub cr3: Gpa,
    /// CR0.WP: a kernel, too, may not write read-only pages.
    pub write_protect: bool,
    /// EFER.NXE: bit 63 of an entry forbids execution, and is not reserved.
    pub nxe: bool,
}

/// `#PF` error code: the page was present.
pub(super) const PF_PRESENT: u32 = 1 << 0;
/// `#PF` error code: the access was a write.
const PF_WRITE: u32 = 1 << 1;
/// `#PF` error code: a reserved bit was set.
const PF_RESERVED: u32 = 1 << 3;
/// `#PF` error code: the access was an instruction fetch.
const PF_FETCH: u32 = 1 << 4;

/// Walks that may be spoilt by another vCPU before the thread sees to its other duties.
const WALK_ATTEMPTS: u32 = 64;

/// A guest mapping of one 4 KiB page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    pub(super) gfn: Gfn,
    /// The guest may write, by its rights (CR0.WP counted in).
    pub(super) writable: bool,
    pub(super) executable: bool,
    /// The guest's leaf entry is dirty: later writes need not be seen.
    pub(super) dirty: bool,
    /// [`Pte::FROM_2M`], [`Pte::FROM_1G`] or nothing.
    pub(super) origin: Pte,
    /// What the entries above the leaf allow.
    pub(super) upper: Rights,
    /// The guest entry that maps the page, if by 4 KiB: its table and index.
    pub(super) leaf: Option<(Gfn, usize)>,
}

/// What entries allow together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rights {
    pub(super) writable: bool,
    pub(super) executable: bool,
}

impl Rights {
    fn and(self, entry: Pte) -> Self {
        Self {
            writable: self.writable && entry.contains(Pte::WRITABLE),
            executable: self.executable && !entry.contains(Pte::NO_EXECUTE),
        }
    }
}

/// What a walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walk {
    Mapped(Translation),
    /// The guest's own page fault, with its error code.
    Fault(u32),
    /// Another vCPU kept changing the entries; with the error code of a fault at the address.
    Contended(u32),
}

/// An entry that the walk went through.
#[derive(Clone, Copy, Default)]
struct Step {
    table: Gfn,
    index: usize,
    raw: u64,
}

/// Whether one level of the walk goes on, ends or fails.
enum Level {
    Table(Gfn),
    Leaf(Gfn, Pte),
    Reserved,
}

impl Mmu {
    /// Translates `gva` for `access`, setting the guest's accessed and dirty bits if it succeeds.
    pub(super) fn walk(
        &self,
        context: &PagingContext,
        gva: Gva,
        access: Access,
    ) -> Result<Walk, MmError> {
        if table_index(gva, 4) == MONITOR_SLOT {
            // Not the guest's to map. The VMM lets no such address come this far; were one to, it
            // must not lead into the tables behind the monitor's entry.
            return Ok(Walk::Fault(access_code(context, access)));
        }
        for _ in 0..WALK_ATTEMPTS {
            let mut steps = [Step::default(); 4];
            let walked = self.walk_once(context, gva, access, &mut steps)?;
            let Walk::Mapped(mut translation) = walked else {
                return Ok(walked);
            };
            if self.set_accessed_and_dirty(&steps, access)? {
                translation.dirty |= access == Access::Write;
                return Ok(Walk::Mapped(translation));
            }
            // An entry changed under the walk: another vCPU's doing. Walk anew.
        }
        Ok(Walk::Contended(access_code(context, access)))
    }

    /// The walk proper. Fills `steps` with the entries used, the leaf last used; unused ones keep
    /// a raw value of 0.
    fn walk_once(
        &self,
        context: &PagingContext,
        gva: Gva,
        access: Access,
        steps: &mut [Step; 4],
    ) -> Result<Walk, MmError> {
        let code = access_code(context, access);
        let mut table = Gpa::new(context.cr3.as_u64() & super::spte::ADDRESS_MASK).gfn();
        let mut upper = Rights { writable: true, executable: true };
        for (step, level) in steps.iter_mut().zip((1..=4u32).rev()) {
            let index = table_index(gva, level);
            let Some(raw) = self.read_entry(table, index)? else {
                // A table outside RAM reads as all ones, whose reserved bits are set.
                return Ok(Walk::Fault(code | PF_PRESENT | PF_RESERVED));
            };
            let entry = Pte::of(raw);
            if !entry.is_present() {
                return Ok(Walk::Fault(code));
            }
            *step = Step { table, index, raw };
            let rights = upper.and(entry);
            match self.decode(context, level, entry, gva) {
                Level::Reserved => return Ok(Walk::Fault(code | PF_PRESENT | PF_RESERVED)),
                Level::Table(next) => (table, upper) = (next, rights),
                Level::Leaf(gfn, origin) => {
                    let writable = rights.writable || !context.write_protect;
                    let executable = rights.executable;
                    let allowed = match access {
                        Access::Read => true,
                        Access::Write => writable,
                        Access::Execute => executable,
                    };
                    if !allowed {
                        return Ok(Walk::Fault(code | PF_PRESENT));
                    }
                    let dirty = entry.contains(Pte::DIRTY);
                    let leaf = origin.is_empty().then_some((table, index));
                    return Ok(Walk::Mapped(Translation {
                        gfn,
                        writable,
                        executable,
                        dirty,
                        origin,
                        upper,
                        leaf,
                    }));
                }
            }
        }
        // Level 1 is always a leaf or reserved.
        Ok(Walk::Fault(code))
    }

    fn decode(&self, context: &PagingContext, level: u32, entry: Pte, gva: Gva) -> Level {
        if self.has_reserved_bits(context, level, entry) {
            return Level::Reserved;
        }
        if !is_leaf(level, entry) {
            return Level::Table(Gpa::new(entry.address()).gfn());
        }
        let inside = gva.as_u64() & low_bits(page_bits(level));
        let base = entry.address() & !low_bits(page_bits(level));
        let origin = match level {
            1 => Pte::empty(),
            2 => Pte::FROM_2M,
            _ => Pte::FROM_1G,
        };
        Level::Leaf(Gpa::new(base | inside).gfn(), origin)
    }

    /// Whether a present entry sets bits that must be zero at its level.
    pub(super) fn has_reserved_bits(
        &self,
        context: &PagingContext,
        level: u32,
        entry: Pte,
    ) -> bool {
        let mut reserved = !low_bits(self.config.phys_bits) & low_bits(52);
        if !context.nxe {
            reserved |= Pte::NO_EXECUTE.bits();
        }
        if level == 4 {
            reserved |= Pte::PAGE_SIZE.bits();
        }
        if is_leaf(level, entry) && level > 1 {
            // Below the page's own address only bit 12, PAT, has a meaning.
            reserved |= low_bits(page_bits(level)) & !low_bits(13);
        }
        entry.bits() & reserved != 0
    }

    /// An entry of a guest table; `None` outside the guest's RAM.
    pub(super) fn read_entry(&self, table: Gfn, index: usize) -> Result<Option<u64>, MmError> {
        if !self.object.contains(table) {
            return Ok(None);
        }
        let page = self.object.lock_page(table)?;
        // No SPTE tells reclaim of walks, and a table is worth more than any page below it.
        page.note_use();
        let word = self.object.word(&page, index * size_of::<u64>())?;
        Ok(Some(word.load(Ordering::Acquire)))
    }

    /// Sets what the access leaves behind in the entries; `false` if one is no longer what the
    /// walk read.
    fn set_accessed_and_dirty(&self, steps: &[Step; 4], access: Access) -> Result<bool, MmError> {
        let last = steps.iter().rposition(|step| step.raw != 0).unwrap_or(0);
        for (number, step) in steps[..=last].iter().enumerate() {
            let mut wanted = Pte::of(step.raw) | Pte::ACCESSED;
            if number == last && access == Access::Write {
                wanted |= Pte::DIRTY;
            }
            if wanted.bits() == step.raw {
                continue;
            }
            let page = self.object.lock_page_for_write(step.table)?;
            let word = self.object.word(&page, step.index * size_of::<u64>())?;
            let set =
                word.compare_exchange(step.raw, wanted.bits(), Ordering::AcqRel, Ordering::Relaxed);
            page.set_flags(PageFlags::BY_WRITE);
            if set.is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn access_code(context: &PagingContext, access: Access) -> u32 {
    match access {
        Access::Read => 0,
        Access::Write => PF_WRITE,
        Access::Execute if context.nxe => PF_FETCH,
        Access::Execute => 0,
    }
}

/// 4 KiB, 2 MiB and 1 GiB pages by level; 512 GiB pages do not exist.
fn is_leaf(level: u32, entry: Pte) -> bool {
    level == 1 || (level < 4 && entry.contains(Pte::PAGE_SIZE))
}

/// Bits of the offset inside a page that an entry of `level` maps.
fn page_bits(level: u32) -> u32 {
    PAGE_SHIFT + 9 * (level - 1)
}

/// Index into the table of `level` (4 is the PML4).
pub(super) fn table_index(gva: Gva, level: u32) -> usize {
    let shifted = gva.as_u64() >> page_bits(level);
    // Masked to nine bits.
    #[allow(clippy::cast_possible_truncation)]
    let index = (shifted & 0x1ff) as usize;
    index
}

const fn low_bits(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}
