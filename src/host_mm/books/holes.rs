//! What follows from where pages may be, and frames that lose their memory behind this layer's back:
//! somebody removed a range of the window.

use crate::books::Books;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::placement::Placement;
use gnomon_export_rmap::LockedPage;
use gnomon_export_rmap::sync::Ordering;

impl<B: Backing> Books<B> {
    pub(crate) fn is_identity(&self) -> bool {
        matches!(self.config.placement, Placement::Identity { .. })
    }

    /// That a page may be in any frame.
    pub(crate) fn require_any_frame(&self, what: &'static str) -> Result<(), MmError> {
        if self.is_identity() { Err(MmError::FixedFrames { what }) } else { Ok(()) }
    }

    /// From now on frames may lose their memory behind this layer's back: somebody removes a range
    /// of the window (`MADV_REMOVE`). Each frame is looked at before its content is used.
    pub(crate) fn expect_holes(&self) {
        // Release pairs with the Acquire in `is_hole`: whoever is told of a removal after this
        // looks.
        self.holes_expected.store(true, Ordering::Release);
    }

    /// Whether a frame with a page has lost its memory behind this layer's back.
    pub(crate) fn is_hole(&self, page: &LockedPage<'_>) -> Result<bool, MmError> {
        Ok(self.holes_expected.load(Ordering::Acquire) && self.view.is_hole(page.pfn())?)
    }

    /// Whether untouched pages that are read get a shared page of zeros. Not without the notifier:
    /// nobody could be told when the page is written.
    pub(crate) fn shares_zero(&self) -> bool {
        self.config.share_zero && !self.is_identity() && cfg!(feature = "export-notifier")
    }
}
