//! A page that is lent is about to be written: its copies are called back first.

use crate::export_rmap::{FlushReason, Invalidation, LockedPage, PageFlags};
use crate::host_mm::error::MmError;
use crate::host_mm::inject::{PausePoint, Sabotage};
use crate::host_mm::revoke::Revoker;

impl Revoker {
    /// Ends all copies of a page that is about to be written. Clients that map it keep their
    /// mappings, which are read-only until they fault.
    ///
    /// # Errors
    /// If a client's copies cannot be revoked: the page must not be written.
    pub(in crate::host_mm) fn recall(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        if !page.flags().contains(PageFlags::LENT) {
            return Ok(());
        }
        page.begin_invalidation();
        self.pause(PausePoint::Counted);
        if !self.is_sabotaged(Sabotage::SkipRecall, page.owner().gfn) {
            self.notifiers.invalidate_page(page, Invalidation::Recall);
            // Even if nobody was told: an earlier flush may have failed.
            self.notifiers.revoke(&[page], FlushReason::Recalled)?;
        }
        self.pause(PausePoint::Recalled);
        page.clear_flags(PageFlags::LENT);
        self.counters.recalls.add(1);
        Ok(())
    }
}
