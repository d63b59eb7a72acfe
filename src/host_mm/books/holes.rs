//! Frames without memory: given back with their page, where each page has a frame of its own, or
//! taken by whoever removed a range of the window.

use std::sync::atomic::Ordering;

use crate::addr::{Gfn, Pfn};
use crate::export_rmap::LockedPage;
use crate::host_mm::HostMm;
use crate::host_mm::error::MmError;
use crate::host_mm::frames::placement::Placement;
use crate::host_mm::inject::Sabotage;

impl HostMm {
    pub(in crate::host_mm) fn is_identity(&self) -> bool {
        matches!(self.config.placement, Placement::Identity { .. })
    }

    /// That a page may be in any frame.
    pub(in crate::host_mm) fn require_any_frame(&self, what: &'static str) -> Result<(), MmError> {
        if self.is_identity() { Err(MmError::FixedFrames { what }) } else { Ok(()) }
    }

    /// Gives back the memory of `count` frames from `first`, locked and about to lose their pages,
    /// where frames are only rationed: every mapping of them ends with this.
    pub(in crate::host_mm) fn give_memory_back(
        &self,
        first: Pfn,
        count: u32,
    ) -> Result<(), MmError> {
        let gfn = Gfn::new(u64::from(first.as_u32()));
        if !self.is_identity() || self.is_sabotaged(Sabotage::KeepMemory, gfn) {
            return Ok(());
        }
        self.view.punch(first, count)
    }

    /// From now on frames may lose their memory behind this layer's back: somebody removes a range
    /// of the window (`MADV_REMOVE`). Each frame is looked at before its content is used.
    pub fn expect_holes(&self) {
        // Release pairs with the Acquire in `is_hole`: whoever is told of a removal after this
        // looks.
        self.holes_expected.store(true, Ordering::Release);
    }

    /// Whether a frame with a page has lost its memory behind this layer's back.
    pub(in crate::host_mm) fn is_hole(&self, page: &LockedPage<'_>) -> Result<bool, MmError> {
        Ok(self.holes_expected.load(Ordering::Acquire) && self.view.is_hole(page.pfn())?)
    }
}
