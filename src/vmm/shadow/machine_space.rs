//! The machine space: what KVM takes for guest-physical memory.
//!
//! Three slots, each at a multiple of 1 GiB from 4 GiB up: the pinned tables (the monitor, then
//! the shadow page tables), the pinned window (the control block, then the ledger), and the
//! frames (the guest view of the frames' memfd). Guest code reaches the last two, and only where
//! the shadow tables say so.
//!
//! Guarantee: the slots do not overlap, and all of them lie below the end of physical addresses.

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::shadow_mmu::MachineLayout;
use crate::vmm::contract::control_block::window_bytes;
use crate::vmm::error::VmError;

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
}
