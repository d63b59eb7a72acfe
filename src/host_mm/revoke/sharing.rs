//! Pages become shared, and guest pages leave shared ones.

use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::hooks::SHARING;
use crate::object::commons::{Left, SharedPage};
use crate::object::pages::{Entry, Place};
use crate::revoke::batch::Revoked;
use crate::revoke::vacate::Vacator;
use crate::revoke::write_out::Saver;
use gnomon_export_rmap::{Invalidation, LockedPage};

impl<B: Backing> Saver<B> {
    /// Makes a private page, which nobody can write, a shared one that its guest page alone names.
    pub(crate) fn make_shared(&self, page: &Revoked<'_>) -> Result<SharedPage, MmError> {
        self.check_revoked(page.page(), Invalidation::Clean);
        self.lab().pause(SHARING);
        page.log_written();
        let shared = self.commons.take_in(page.page(), page.entry()?)?;
        // The copy in swap carries the name that the page had.
        self.forget_copy(page.page())?;
        self.counters.shared.add(1);
        Ok(shared)
    }
}

impl<B: Backing> Vacator<B> {
    /// Ends a guest page's use of a shared page: the guest page is zero from now on. Where clients
    /// may map it, `page` is its frame, revoked from them and still locked.
    pub(crate) fn leave_shared(
        &self,
        entry: &Entry,
        shared: SharedPage,
        page: Option<LockedPage<'_>>,
    ) {
        if self.commons.leave(entry, shared, Place::Absent) == Left::Empty {
            self.discard_shared(shared, page.as_ref());
        }
    }

    /// Forgets a shared page that nobody names; `page` is its frame where that is locked.
    pub(crate) fn discard_shared(&self, shared: SharedPage, page: Option<&LockedPage<'_>>) {
        match (self.commons.pages.entry(shared.gfn()), page) {
            (Some(entry), Some(page)) => self.discard_locked(page, entry),
            (Some(entry), None) => {
                self.discard_page(entry, self.commons.pages.owner(shared.gfn()));
            }
            (None, _) => {}
        }
        self.commons.retire(shared);
    }
}
