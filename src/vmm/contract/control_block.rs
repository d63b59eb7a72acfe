//! The pinned window as the host has it: the control block, in which the guest counts and is asked to
//! stop, and how large the window is.
//!
//! Guarantee: what the guest writes there is read as claims; nothing that it writes moves an access
//! of the host out of the window.

use std::mem::offset_of;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use crate::abi::{self, Control, VcpuCounters};
use crate::addr::PAGE_SIZE_U64;

/// Bytes of the pinned window for `memory_bytes` of RAM: the control block and one version a
/// guest frame, in whole pages.
#[must_use]
pub fn window_bytes(memory_bytes: u64) -> u64 {
    let ledger = memory_bytes / PAGE_SIZE_U64 * size_of::<u32>() as u64;
    abi::CONTROL_BYTES + ledger.next_multiple_of(PAGE_SIZE_U64)
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
pub(in crate::vmm) struct ControlBlock {
    window: Arc<MmapRegion>,
    vcpus: usize,
    /// What the counters were when this VM was cloned: another's work. Unset in one that booted.
    before: OnceLock<Vec<GuestCounters>>,
}

impl ControlBlock {
    /// Fills the block in `window`.
    pub(in crate::vmm) fn new(window: Arc<MmapRegion>, vcpus: usize, memory_bytes: u64) -> Self {
        let block = Self::unfilled(window, vcpus);
        block.store(offset_of!(Control, magic), abi::CONTROL_MAGIC);
        block.store(offset_of!(Control, vcpus), u32::try_from(vcpus).unwrap_or(u32::MAX));
        block.store(offset_of!(Control, memory_bytes), memory_bytes);
        block
    }

    /// The block in `window`, which is to become a copy of another VM's.
    pub(in crate::vmm) fn unfilled(window: Arc<MmapRegion>, vcpus: usize) -> Self {
        Self { window, vcpus, before: OnceLock::new() }
    }

    /// Makes the block, which is a copy by now, that of a VM of `generation` that has done nothing.
    pub(in crate::vmm) fn begin_generation(&self, generation: u64) {
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

    /// How many vCPUs it has a place for.
    pub(super) fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// The window that it begins.
    pub(super) fn window(&self) -> &MmapRegion {
        &self.window
    }

    /// Asks the guest to finish.
    pub(in crate::vmm) fn request_stop(&self) {
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
    pub(in crate::vmm) fn counters(&self) -> Vec<GuestCounters> {
        (0..self.vcpus.min(abi::MAX_VCPUS)).map(|index| self.counters_of(index)).collect()
    }

    /// The sum over all vCPUs.
    pub(in crate::vmm) fn total(&self) -> GuestCounters {
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
    use crate::vmm::kvm::pinned::map_pinned;

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
