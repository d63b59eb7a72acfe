//! Shared pages: one page that several guest pages have, until one of them is written.
//!
//! A shared page belongs to a hidden memory object, the *commons*, and the guest pages that have it
//! name it by its number there ([`Place::Shared`]). So whatever moves a page (reclaim, cleaning,
//! migration) moves a shared one in the same way, without knowing who has it: the one entry that
//! changes is the commons'.
//!
//! What this module guarantees:
//!
//! - nobody writes a shared page: it is made read-only everywhere before it is shared, and the
//!   frame's [owner](gnomon_export_rmap::Owner::is_shared) tells every later fault;
//! - a guest page leaves a shared page by the order that the 2008 mail could not give do_wp_page:
//!   the old mappings are cleared, the clients notified and their translations flushed, *then* the
//!   new place is set, all with both page locks held ([`Pager::copy_on_write`]);
//! - a shared page lives exactly as long as a guest page names it.
//!
//! An entry leaves a shared page that is in a frame under that frame's page lock.

use super::Intent;
use crate::error::MmError;
use crate::fault::Pager;
use crate::frames::backing::Backing;
use crate::hooks::{COPIED, SET_FIRST};
use crate::object::commons::{Left, SharedPage};
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::revoke::free_frame::FreeFrame;
use gnomon_export_rmap::addr::Gfn;
use gnomon_export_rmap::{LockedPage, PageFlags};

impl<B: Backing> Pager<B> {
    /// The frame of a guest page that names a shared page, locked; `None` if it names it no more.
    pub(crate) fn fault_in_shared(
        &self,
        entry: &Entry,
        shared: SharedPage,
    ) -> Result<Option<LockedPage<'_>>, MmError> {
        // Pages of the commons are private to it: its zeros are not to name the zeros again.
        let page = self.fault_in(&self.commons.pages, shared.gfn(), Intent::Write)?;
        // The number may have been given up, and to another page, before the lock was ours.
        Ok((entry.load() == Place::Shared(shared)).then_some(page))
    }

    /// The mail's do_wp_page, completed: gives a guest page that names a shared page a frame of its
    /// own, and returns it locked; `None` if the page has moved meanwhile.
    pub(crate) fn copy_on_write(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
        entry: &Entry,
        shared: SharedPage,
    ) -> Result<Option<LockedPage<'_>>, MmError> {
        // First of all: reclaim may need any page lock.
        let frame = self.allocate_frame(gfn)?;
        let Some(old) = self.fault_in_shared(entry, shared)? else {
            return Ok(None);
        };
        let owner = object.owner(gfn);
        if self.commons.give_back(&old, entry, shared, owner)? {
            // Its copy in swap carries the name that it had.
            self.forget_copy(&old)?;
            self.counters.cow_reuses.add(1);
            return Ok(Some(old));
        }
        let new = frame.prepare(owner);
        if self.lab().breaks(SET_FIRST, || gfn) {
            self.set_first(&old, new, frame, entry, shared)?;
            return Ok(None);
        }
        let copied = self.revoke_from(&old, owner).and_then(|()| self.view.copy(&old, &new));
        if let Err(error) = copied {
            new.clear_flags(PageFlags::IN_USE);
            return Err(error);
        }
        new.set_flags(PageFlags::DIRTY);
        self.lab().pause(COPIED);
        let left = self.commons.leave(entry, shared, Place::Frame(new.pfn()));
        debug_assert_ne!(left, Left::NotHere, "the page lock of the old frame is ours");
        frame.into_use();
        if left == Left::Empty {
            self.discard_shared(shared, Some(&old));
        }
        self.counters.cow_copies.add(1);
        Ok(Some(new))
    }

    /// Sabotage: the right order's opposite, with time for somebody to come along in between.
    fn set_first(
        &self,
        old: &LockedPage<'_>,
        new: LockedPage<'_>,
        frame: FreeFrame<'_, B>,
        entry: &Entry,
        shared: SharedPage,
    ) -> Result<(), MmError> {
        self.view.copy(old, &new)?;
        new.set_flags(PageFlags::DIRTY);
        let owner = new.owner();
        self.commons.leave(entry, shared, Place::Frame(new.pfn()));
        frame.into_use();
        drop(new);
        std::thread::sleep(std::time::Duration::from_millis(1));
        self.revoke_from(old, owner)
    }
}
