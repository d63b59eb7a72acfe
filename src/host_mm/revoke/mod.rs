//! The core of the protocol: from a page that clients map to a frame that is free, and what each step
//! needs.
//!
//! Guarantee, in types: clients are told ([`batch`]), one flush revokes what processors cache, and only
//! then is a page written out ([`write_out`]) or its frame free ([`vacate`]). And by what each is given:
//! a [`Revoker`] cannot free a frame, nor can a [`Saver`](write_out::Saver); a
//! [`Vacator`](vacate::Vacator) cannot take one, which a [`Mover`](free_frame::Mover) can. Every source of
//! invalidation, reclaim and faults are made of these steps; nothing here decides which page goes, or
//! waits for one to come.

pub(crate) mod batch;
mod copies;
mod discard;
mod duplicates;
pub(crate) mod free_frame;
mod recall;
mod sharing;
mod unexported;
pub(crate) mod vacate;
pub(crate) mod write_out;

use std::ops::Deref;

use crate::books::Books;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::host_view::HostView;
use crate::hooks::{COUNTED, DETACHED};
use crate::violations::ViolationKind;
use gnomon_export_rmap::{FlushReason, Invalidation, LockedPage, NotifierList, Owner};

/// Takes rights and mappings away from clients; pages stay where they are.
pub struct Revoker<B: Backing = HostView> {
    books: Books<B>,
    pub(crate) notifiers: NotifierList,
}

impl<B: Backing> Deref for Revoker<B> {
    type Target = Books<B>;

    fn deref(&self) -> &Books<B> {
        &self.books
    }
}

impl<B: Backing> Revoker<B> {
    pub(crate) fn new(books: Books<B>) -> Self {
        Self { books, notifiers: NotifierList::default() }
    }

    /// Takes the mappings of one guest page away from the clients that have them; others keep
    /// theirs.
    pub(crate) fn revoke_from(&self, page: &LockedPage<'_>, owner: Owner) -> Result<(), MmError> {
        let kind = Invalidation::Replace(owner);
        page.begin_invalidation();
        self.lab().pause(COUNTED);
        if page.must_be_flushed() {
            let harvest = self.notifiers.invalidate_page(page, kind);
            self.check_harvest(page, harvest);
            self.lab().pause(DETACHED);
            self.notifiers.revoke(&[page], FlushReason::Invalidated)?;
        }
        self.check_revoked(page, kind);
        Ok(())
    }

    /// After the flush of an invalidation, the page lock held: nobody may have kept, or have got
    /// back, what it ended. A fault that noted the sequence before starts over, and none can note it
    /// meanwhile.
    pub(crate) fn check_revoked(&self, page: &LockedPage<'_>, kind: Invalidation) {
        if self.is_checking() && self.notifiers.still_allowed(page, kind) {
            self.report(ViolationKind::NotRevoked, page.pfn(), page.owner());
        }
    }
}
