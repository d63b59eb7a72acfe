//! A region whose pages are mapped by the page-fault handler when they are first touched.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{FreeRam, PAGE_BYTES};
use crate::paging::{self, AddressSpace, Table};

/// Where vCPU 0's region begins.
const DEMAND_ADDRESS: u64 = 0x2000_0000_0000;
/// Pages of a region: one page table.
pub const DEMAND_PAGES: u64 = 512;
/// Frames behind it, which bounds how many pages can be mapped at a time.
pub const DEMAND_FRAMES: u64 = 32;

/// One vCPU's region; used by that vCPU alone, in normal code and in its handler.
pub struct DemandRegion {
    base: u64,
    leaves: Table,
    frames: u64,
    used: AtomicU64,
    faults: AtomicU64,
}

impl DemandRegion {
    /// An empty region.
    pub fn new(ram: &mut FreeRam, space: AddressSpace, vcpu: u32) -> DemandRegion {
        let base = DEMAND_ADDRESS + u64::from(vcpu) * DEMAND_PAGES * PAGE_BYTES;
        DemandRegion {
            base,
            leaves: space.table(ram, base, 1),
            frames: ram.take_pages(DEMAND_FRAMES),
            used: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        }
    }

    /// Address of one of its pages.
    pub fn page(&self, page: u64) -> u64 {
        self.base + page * PAGE_BYTES
    }

    /// Page faults served so far.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Whether every frame is mapped somewhere, so that another page cannot be.
    pub fn is_full(&self) -> bool {
        self.used.load(Ordering::Relaxed) == DEMAND_FRAMES
    }

    /// Takes a page's mapping away. To be followed by `invlpg` or a CR3 load.
    pub fn unmap(&self, page: u64) {
        self.leaves.entry(page).store(0, Ordering::Relaxed);
    }

    /// Makes all frames free again, once no page is mapped.
    pub fn reset(&self) {
        self.used.store(0, Ordering::Relaxed);
    }

    /// Serves a page fault if it is a first touch of this region: maps a zeroed frame.
    pub fn fault(&self, address: u64, error_code: u64) -> bool {
        let offset = address.wrapping_sub(self.base);
        let used = self.used.load(Ordering::Relaxed);
        let first_touch = error_code & (paging::FAULT_PRESENT | paging::FAULT_FETCH) == 0;
        if offset >= DEMAND_PAGES * PAGE_BYTES || !first_touch || used == DEMAND_FRAMES {
            return false;
        }
        let frame = self.frames + used * PAGE_BYTES;
        // SAFETY: the frame is this region's, mapped at its physical address, and not in use.
        unsafe { (frame as *mut u8).write_bytes(0, PAGE_BYTES as usize) };
        let flags = paging::WRITE | paging::NO_EXECUTE;
        self.leaves.entry(offset / PAGE_BYTES).store(paging::leaf(frame, flags), Ordering::Relaxed);
        self.used.store(used + 1, Ordering::Relaxed);
        self.faults.store(self.faults() + 1, Ordering::Relaxed);
        true
    }
}
