//! Where things lie in the machine space: the physical addresses that KVM and our tables use.

use crate::addr::{Gfn, PAGE_SHIFT, Pfn};

/// Machine addresses of the memslots. All are multiples of 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineLayout {
    /// Machine address of shadow page 0.
    pub tables_base: u64,
    /// Machine address of frame 0.
    pub frames_base: u64,
    /// Machine address of the pinned window's first byte.
    pub window_base: u64,
    /// Guest frame at which the pinned window appears.
    pub window_gfn: Gfn,
    /// Bytes of the pinned window, a multiple of 4096; 0 without one.
    pub window_bytes: u64,
}

impl MachineLayout {
    pub(super) fn frame_address(&self, pfn: Pfn) -> u64 {
        self.frames_base + pfn.byte_offset()
    }

    /// The frame at a machine address, given the number of frames; `None` for window pages.
    pub(super) fn frame_at(&self, address: u64, frames: u32) -> Option<Pfn> {
        let index = address.checked_sub(self.frames_base)? >> PAGE_SHIFT;
        u32::try_from(index).ok().filter(|&index| index < frames).map(Pfn::new)
    }

    /// The machine address of a guest frame of the pinned window.
    pub(super) fn window_address(&self, gfn: Gfn) -> Option<u64> {
        let index = gfn.as_u64().checked_sub(self.window_gfn.as_u64())?;
        (index < self.window_bytes >> PAGE_SHIFT).then(|| self.window_base + (index << PAGE_SHIFT))
    }
}

/// What a shadow MMU is built for.
#[derive(Clone, Copy, Debug)]
pub struct ShadowConfig {
    /// The machine space.
    pub machine: MachineLayout,
    /// The entry, flags included, that every shadow root carries at PML4 slot 255: the monitor's.
    pub monitor_pml4e: u64,
    /// Bits of a guest-physical address; those above are reserved in the guest's entries.
    pub phys_bits: u32,
    /// Whether a cleared accessed bit is set again only after a zap (rule 4 of shadow paging; a
    /// host with nested paging sets it at the next TLB miss). `true` is right everywhere.
    pub zap_to_age: bool,
}
