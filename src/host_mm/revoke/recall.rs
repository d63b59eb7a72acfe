//! A page that is lent is about to be written: its copies are called back first.

use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::hooks::{COUNTED, RECALLED, SKIP_RECALL};
use crate::revoke::Revoker;
use gnomon_export_rmap::{FlushReason, Invalidation, LockedPage, PageFlags};

impl<B: Backing> Revoker<B> {
    /// Ends all copies of a page that is about to be written. Clients that map it keep their
    /// mappings, which are read-only until they fault.
    ///
    /// # Errors
    /// If a client's copies cannot be revoked: the page must not be written.
    pub(crate) fn recall(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        if !page.flags().contains(PageFlags::LENT) {
            return Ok(());
        }
        page.begin_invalidation();
        self.lab().pause(COUNTED);
        if !self.lab().breaks(SKIP_RECALL, || page.owner().gfn) {
            self.notifiers.invalidate_page(page, Invalidation::Recall);
            // Even if nobody was told: an earlier flush may have failed.
            self.notifiers.revoke(&[page], FlushReason::Recalled)?;
        }
        self.lab().pause(RECALLED);
        page.clear_flags(PageFlags::LENT);
        self.counters.recalls.add(1);
        Ok(())
    }
}
