//! A processor in software, at CPL3 on the shadow tables, with a TLB that only a flush empties.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use super::machine::{ACCESSED, ADDRESS, DIRTY, Machine, NO_EXECUTE, PRESENT, USER, WRITABLE};
use super::tlb::Tlb;
use crate::addr::{Gpa, Gva, PAGE_SIZE_U64, Pfn};
use crate::export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, RevokeError,
};
use crate::shadow_mmu::walk::table_index;
use crate::shadow_mmu::{Access, FaultOutcome, PagingContext, Root};
use crate::sync::lock;

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// The word was read, or written (with what it was before).
    Value(u64),
    Fault(u32),
    Outside(Gpa),
    NeedsRecycle,
}

pub(crate) struct Cpu {
    pub(crate) context: PagingContext,
    pub(crate) root: Root,
    tlb: Arc<Mutex<Tlb>>,
    /// Faults taken by the last access.
    pub(crate) faults: u32,
    /// The SPTE that the last access used, as it was then.
    pub(crate) used: u64,
}

impl Cpu {
    pub(crate) fn new(machine: &Machine, cr3: u64) -> Self {
        let cr3 = Gpa::new(cr3 * PAGE_SIZE_U64);
        let context = PagingContext { cr3, write_protect: true, nxe: true };
        Self { context, root: machine.load_root(&context), tlb: Arc::default(), faults: 0, used: 0 }
    }

    /// The guest loads CR3; so does the hypervisor, which empties this processor's TLB.
    pub(crate) fn load_cr3(&mut self, machine: &Machine, cr3: u64) {
        self.context.cr3 = Gpa::new(cr3 * PAGE_SIZE_U64);
        self.root = machine.load_root(&self.context);
        lock(&self.tlb).clear();
    }

    pub(crate) fn tlb(&self) -> MutexGuard<'_, Tlb> {
        lock(&self.tlb)
    }

    pub(crate) fn read(&mut self, machine: &Machine, gva: Gva) -> Done {
        self.access(machine, gva, Access::Read, None)
    }

    pub(crate) fn write(&mut self, machine: &Machine, gva: Gva, value: u64) -> Done {
        self.access(machine, gva, Access::Write, Some(value))
    }

    pub(crate) fn execute(&mut self, machine: &Machine, gva: Gva) -> Done {
        self.access(machine, gva, Access::Execute, None)
    }

    /// One access to the aligned word at `gva`, with as many faults as it takes.
    pub(crate) fn access(
        &mut self,
        machine: &Machine,
        gva: Gva,
        access: Access,
        store: Option<u64>,
    ) -> Done {
        self.access_and_obey(machine, gva, access, store, |_| {})
    }

    /// As [`access`](Self::access); after each fault the TLB is to `obey` what the fault revoked.
    pub(crate) fn access_and_obey(
        &mut self,
        machine: &Machine,
        gva: Gva,
        access: Access,
        store: Option<u64>,
        mut obey: impl FnMut(&mut Tlb),
    ) -> Done {
        self.faults = 0;
        loop {
            {
                // Held until the access is made: a flush waits for it.
                let mut tlb = lock(&self.tlb);
                if let Some(spte) = look_up(machine, self.root, &mut tlb, gva, access) {
                    self.used = spte;
                    let address = (spte & ADDRESS) + gva.page_offset() as u64;
                    let word = machine.guest_word(address);
                    return Done::Value(match store {
                        Some(value) => word.swap(value, Ordering::AcqRel),
                        None => word.load(Ordering::Acquire),
                    });
                }
            }
            self.faults += 1;
            assert!(self.faults < 10_000, "{access:?} at {gva} faults without end");
            let outcome = machine.shadow.fault(&self.context, self.root, gva, access).unwrap();
            obey(&mut lock(&self.tlb));
            match outcome {
                FaultOutcome::Fixed => {}
                FaultOutcome::GuestFault { error_code } => return Done::Fault(error_code),
                FaultOutcome::OutsideRam { gpa } => return Done::Outside(gpa),
                FaultOutcome::NeedsRecycle => return Done::NeedsRecycle,
            }
        }
    }
}

/// The TLB, then the shadow tables, as a processor does it: accessed and dirty are set in one step
/// or not at all, and a translation without a right it needs is looked up again.
fn look_up(machine: &Machine, root: Root, tlb: &mut Tlb, gva: Gva, access: Access) -> Option<u64> {
    let mut needed = PRESENT | USER;
    let mut marks = ACCESSED;
    if access == Access::Write {
        needed |= WRITABLE;
        marks |= DIRTY;
    }
    let suits = |entry: u64| {
        entry & needed == needed && (access != Access::Execute || entry & NO_EXECUTE == 0)
    };
    let page = gva.as_u64() / PAGE_SIZE_U64;
    if let Some(&cached) = tlb.get(&page)
        && suits(cached)
        && cached & marks == marks
    {
        return Some(cached);
    }
    let mut table = machine.shadow.root_machine_address(root)?;
    for level in (2..=4).rev() {
        let entry = machine.shadow_entry(table, table_index(gva, level)).load(Ordering::Acquire);
        if !suits(entry) {
            return None;
        }
        table = entry & ADDRESS;
    }
    let leaf = machine.shadow_entry(table, table_index(gva, 1));
    loop {
        let old = leaf.load(Ordering::Acquire);
        if !suits(old) {
            return None;
        }
        let new = old | marks;
        if leaf.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            tlb.insert(page, new);
            return Some(new);
        }
    }
}

/// Stops the processors for a flush of the host side's, as KVM's MMU notifier does.
pub(crate) struct Processors(pub(super) Vec<Arc<Mutex<Tlb>>>);

impl Processors {
    pub(crate) fn of(cpus: &[Cpu]) -> Self {
        Self(cpus.iter().map(|cpu| cpu.tlb.clone()).collect())
    }
}

impl ExportNotifier for Processors {
    fn invalidate_page(&self, _page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        for tlb in &self.0 {
            lock(tlb).retain(|_, spte| {
                Machine::frame_offset(*spte)
                    .is_none_or(|offset| !frames.iter().any(|pfn| pfn.byte_offset() == offset))
            });
        }
        Ok(())
    }
}
