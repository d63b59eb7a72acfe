//! The machine space: what KVM takes for guest-physical memory.
//!
//! Three slots, each at a multiple of 1 GiB from 4 GiB up: the pinned tables (the monitor, then
//! the shadow page tables), the pinned window (the control block, then the ledger), and the
//! frames (the guest view of the frames' memfd). Guest code reaches the last two, and only where
//! the shadow tables say so.
//!
//! Guarantee: the slots do not overlap, and all of them lie below the end of physical addresses.

use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use crate::abi::{self, Control, VcpuCounters};
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::shadow_mmu::MachineLayout;
use crate::sys::{memory, small_pages};

use super::error::VmError;
use super::monitor::MonitorLayout;

/// Slot numbers.
pub(super) const TABLES_SLOT: u32 = 0;
/// See [`TABLES_SLOT`].
pub(super) const WINDOW_SLOT: u32 = 1;
/// See [`TABLES_SLOT`].
pub(super) const FRAMES_SLOT: u32 = 2;

/// Start of the machine space.
const MACHINE_BASE: u64 = 4 << 30;
/// Alignment of each slot.
const SLOT_ALIGNMENT: u64 = 1 << 30;

/// Bytes of the pinned window for `memory_bytes` of RAM: the control block and one version a
/// guest frame, in whole pages.
#[must_use]
pub(crate) fn window_bytes(memory_bytes: u64) -> u64 {
    let ledger = memory_bytes / PAGE_SIZE_U64 * size_of::<u32>() as u64;
    abi::CONTROL_BYTES + ledger.next_multiple_of(PAGE_SIZE_U64)
}

/// Places of the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MachinePlan {
    pub(super) tables_slot_base: u64,
    pub(super) tables_bytes: u64,
    pub(super) window_base: u64,
    pub(super) window_bytes: u64,
    pub(super) frames_base: u64,
}

impl MachinePlan {
    /// Lays out the slots one after the other.
    pub(super) fn new(
        monitor: &MonitorLayout,
        shadow_pages: u32,
        memory_bytes: u64,
        frames_bytes: u64,
        phys_bits: u32,
    ) -> Result<Self, VmError> {
        let tables_bytes = u64::from(shadow_pages)
            .checked_mul(PAGE_SIZE_U64)
            .and_then(|bytes| bytes.checked_add(monitor.bytes()));
        let window_bytes = window_bytes(memory_bytes);
        let after = |base: u64, bytes: u64| {
            base.checked_add(bytes)?.checked_next_multiple_of(SLOT_ALIGNMENT)
        };
        let planned = tables_bytes.and_then(|tables_bytes| {
            let window_base = after(MACHINE_BASE, tables_bytes)?;
            let frames_base = after(window_base, window_bytes)?;
            let end = frames_base.checked_add(frames_bytes)?;
            let tables_slot_base = MACHINE_BASE;
            let plan =
                Self { tables_slot_base, tables_bytes, window_base, window_bytes, frames_base };
            Some((plan, end))
        });
        match planned {
            Some((plan, end)) if phys_bits >= 64 || end <= 1 << phys_bits => Ok(plan),
            Some((_, end)) => Err(VmError::MachineSpace { end, phys_bits }),
            None => Err(VmError::MachineSpace { end: u64::MAX, phys_bits }),
        }
    }

    /// The same places as the shadow MMU wants them.
    pub(super) fn layout(&self, monitor: &MonitorLayout) -> MachineLayout {
        MachineLayout {
            tables_base: self.tables_slot_base + monitor.bytes(),
            frames_base: self.frames_base,
            window_base: self.window_base,
            window_gfn: Gpa::new(abi::WINDOW_GPA).gfn(),
            window_bytes: self.window_bytes,
        }
    }
}

/// Maps `bytes` of anonymous memory, which costs nothing until it is touched.
pub(super) fn map_pinned(what: &'static str, bytes: u64) -> Result<Arc<MmapRegion>, VmError> {
    let refused = |reason: String| VmError::Map { what, bytes, reason };
    let size = usize::try_from(bytes).map_err(|error| refused(error.to_string()))?;
    let region = MmapRegion::build(
        None,
        size,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    region.map(Arc::new).map_err(|error| refused(error.to_string()))
}

/// Maps `bytes` of a file that lives in memory only, shared: a part of the mapping can be zapped,
/// which takes it away from every vCPU, and the content stays.
pub(super) fn map_shared(what: &'static str, bytes: u64) -> Result<Arc<MmapRegion>, VmError> {
    let refused = |reason: String| VmError::Map { what, bytes, reason };
    let map = || small_pages::map(memory::create_memfd("gnomon-window", bytes)?, bytes);
    map().map(Arc::new).map_err(|error| refused(error.to_string()))
}

/// One vCPU's counters as the guest keeps them in the control block. The guest may write
/// anything there: the numbers are claims, not facts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCounters {
    /// Page accesses whose content was checked against the ledger.
    pub verified: u64,
    /// Page writes.
    pub writes: u64,
    /// Additions to shared counters.
    pub shared_adds: u64,
    /// Page-table changes made and checked.
    pub paging_ops: u64,
    /// Violations found.
    pub violations: u64,
    /// Accesses to the watched hot set.
    pub hot_accesses: u64,
    /// Commands that the DMA device has carried out.
    pub dma_ops: u64,
    /// Bytes of them.
    pub dma_bytes: u64,
}

impl GuestCounters {
    fn zip(&self, other: &Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            verified: with(self.verified, other.verified),
            writes: with(self.writes, other.writes),
            shared_adds: with(self.shared_adds, other.shared_adds),
            paging_ops: with(self.paging_ops, other.paging_ops),
            violations: with(self.violations, other.violations),
            hot_accesses: with(self.hot_accesses, other.hot_accesses),
            dma_ops: with(self.dma_ops, other.dma_ops),
            dma_bytes: with(self.dma_bytes, other.dma_bytes),
        }
    }

    /// Adds other counters.
    pub fn add(&mut self, other: &Self) {
        *self = self.zip(other, u64::wrapping_add);
    }

    fn since(&self, before: &Self) -> Self {
        self.zip(before, u64::wrapping_sub)
    }
}

/// The host's side of the control block at the start of the pinned window.
#[derive(Clone)]
pub(super) struct ControlBlock {
    window: Arc<MmapRegion>,
    vcpus: usize,
    /// What the counters were when this VM was cloned: another's work. Unset in one that booted.
    before: OnceLock<Vec<GuestCounters>>,
}

impl ControlBlock {
    /// Fills the block in `window`.
    pub(super) fn new(window: Arc<MmapRegion>, vcpus: usize, memory_bytes: u64) -> Self {
        let block = Self::unfilled(window, vcpus);
        block.store(offset_of!(Control, magic), abi::CONTROL_MAGIC);
        block.store(offset_of!(Control, vcpus), u32::try_from(vcpus).unwrap_or(u32::MAX));
        block.store(offset_of!(Control, memory_bytes), memory_bytes);
        block
    }

    /// The block in `window`, which is to become a copy of another VM's.
    pub(super) fn unfilled(window: Arc<MmapRegion>, vcpus: usize) -> Self {
        Self { window, vcpus, before: OnceLock::new() }
    }

    /// Makes the block, which is a copy by now, that of a VM of `generation` that has done nothing.
    pub(super) fn begin_generation(&self, generation: u64) {
        self.store(offset_of!(Control, generation), generation);
        let copied = self.counters();
        // Set once: only a VM that is being made gets here.
        let _ = self.before.set(copied);
    }

    // Every offset comes from the block's own layout, and the window is at least as large, so
    // neither access can fail; if one did, losing it is better than ending the process.
    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        let _ = self.window.as_volatile_slice().store(value, offset, Ordering::Relaxed);
    }

    fn load(&self, offset: usize) -> u64 {
        self.window.as_volatile_slice().load(offset, Ordering::Relaxed).unwrap_or(0)
    }

    /// Asks the guest to finish.
    pub(super) fn request_stop(&self) {
        self.store(offset_of!(Control, stop), 1u32);
    }

    /// The counters of vCPU `index`, without what they were when the VM was cloned.
    fn counters_of(&self, index: usize) -> GuestCounters {
        let base = offset_of!(Control, counters) + index * size_of::<VcpuCounters>();
        let read = |offset| self.load(base + offset);
        let counters = GuestCounters {
            verified: read(offset_of!(VcpuCounters, verified)),
            writes: read(offset_of!(VcpuCounters, writes)),
            shared_adds: read(offset_of!(VcpuCounters, shared_adds)),
            paging_ops: read(offset_of!(VcpuCounters, paging_ops)),
            violations: read(offset_of!(VcpuCounters, violations)),
            hot_accesses: read(offset_of!(VcpuCounters, hot_accesses)),
            dma_ops: read(offset_of!(VcpuCounters, dma_ops)),
            dma_bytes: read(offset_of!(VcpuCounters, dma_bytes)),
        };
        let before = self.before.get().and_then(|before| before.get(index));
        before.map_or(counters, |before| counters.since(before))
    }

    /// The counters of every vCPU, by index.
    pub(super) fn counters(&self) -> Vec<GuestCounters> {
        (0..self.vcpus.min(abi::MAX_VCPUS)).map(|index| self.counters_of(index)).collect()
    }

    /// The sum over all vCPUs.
    pub(super) fn total(&self) -> GuestCounters {
        let mut total = GuestCounters::default();
        for counters in self.counters() {
            total.add(&counters);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_and_apart() {
        let monitor = MonitorLayout::new(4);
        let plan = MachinePlan::new(&monitor, 300_000, 64 << 30, 3 << 30, 40).unwrap();
        let slots = [
            (plan.tables_slot_base, plan.tables_bytes),
            (plan.window_base, plan.window_bytes),
            (plan.frames_base, 3 << 30),
        ];
        for (base, _) in slots {
            assert_eq!(base % SLOT_ALIGNMENT, 0);
        }
        for pair in slots.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        assert_eq!(plan.layout(&monitor).tables_base, MACHINE_BASE + monitor.bytes());
    }

    #[test]
    fn a_machine_space_beyond_physical_addresses_is_refused() {
        let monitor = MonitorLayout::new(1);
        let refused = MachinePlan::new(&monitor, 1000, 1 << 30, 64 << 30, 36).unwrap_err();
        assert!(matches!(refused, VmError::MachineSpace { phys_bits: 36, .. }), "{refused}");
        assert!(MachinePlan::new(&monitor, u32::MAX, 1 << 30, 1 << 30, 40).is_err());
        assert!(MachinePlan::new(&monitor, 1000, 1 << 30, u64::MAX, 52).is_err());
    }

    #[test]
    fn the_window_holds_a_version_for_each_frame() {
        assert_eq!(window_bytes(4096), abi::CONTROL_BYTES + 4096);
        assert_eq!(window_bytes(64 << 20), abi::CONTROL_BYTES + 64 * 1024);
    }

    #[test]
    fn the_control_block_is_filled_and_counters_are_summed() {
        let window = map_pinned("window", window_bytes(1 << 20)).unwrap();
        let block = ControlBlock::new(window.clone(), 2, 1 << 20);
        assert_eq!(block.load(0), abi::CONTROL_MAGIC);
        for index in 0..2usize {
            let at = offset_of!(Control, counters) + index * 64;
            window.as_volatile_slice().store(5u64 + index as u64, at, Ordering::Relaxed).unwrap();
        }
        assert_eq!(block.total(), GuestCounters { verified: 11, ..Default::default() });
        block.request_stop();
        let clone = ControlBlock::unfilled(window.clone(), 2);
        clone.begin_generation(3);
        assert_eq!(clone.load(offset_of!(Control, generation)), 3);
        window
            .as_volatile_slice()
            .store(9u64, offset_of!(Control, counters), Ordering::Relaxed)
            .unwrap();
        assert_eq!(clone.total(), GuestCounters { verified: 4, ..Default::default() }, "its own");
        assert_eq!(block.total(), GuestCounters { verified: 15, ..Default::default() });
        let stop: u32 =
            window.as_volatile_slice().load(offset_of!(Control, stop), Ordering::Relaxed).unwrap();
        assert_eq!(stop, 1);
    }
}
