//! Touches of the demand region, checked against a model.

use core::sync::atomic::{Ordering, compiler_fence};

use super::paging::Failure;
use crate::demand::{DEMAND_PAGES, DemandRegion};
use crate::rng::Rng;
use crate::x86;

/// What each page of a vCPU's demand region must hold.
pub(super) struct DemandModel {
    /// Content of the first word; `None` for a page that is not mapped.
    words: [Option<u32>; DEMAND_PAGES as usize],
}

impl DemandModel {
    pub(super) fn new() -> DemandModel {
        DemandModel { words: [None; DEMAND_PAGES as usize] }
    }

    /// Touches a random page: it must hold what was last written or, on its first touch, fault
    /// exactly once and hold 0.
    pub(super) fn touch(&mut self, region: &DemandRegion, rng: &mut Rng) -> Result<(), Failure> {
        let page = rng.below(DEMAND_PAGES);
        let known = self.words[page as usize];
        if known.is_none() && region.is_full() {
            self.release(region, rng.percent(50));
        }
        let address = region.page(page);
        let word = address as *mut u64;
        let faults = region.faults();
        let written = rng.next_u64() as u32;
        if rng.percent(50) {
            // The first touch is a write to the second word.
            // SAFETY: the page is this vCPU's, or the fault handler makes it so.
            unsafe { word.add(1).write_volatile(u64::from(written)) };
        }
        // SAFETY: as above.
        let found = unsafe { word.read_volatile() };
        // SAFETY: as above.
        unsafe { word.write_volatile(u64::from(written)) };
        compiler_fence(Ordering::SeqCst);
        self.words[page as usize] = Some(written);

        Failure::unless_equal(address, known.map_or(0, u64::from), found)?;
        let first = u64::from(known.is_none());
        Failure::unless_equal(address, first, region.faults() - faults)
    }

    /// Unmaps every page, and forgets the translations one by one or all at once.
    pub(super) fn release(&mut self, region: &DemandRegion, one_by_one: bool) {
        for (page, word) in (0..).zip(&mut self.words) {
            if word.take().is_some() {
                region.unmap(page);
                if one_by_one {
                    x86::invlpg(region.page(page));
                }
            }
        }
        if !one_by_one {
            x86::reload_cr3();
        }
        region.reset();
    }
}
