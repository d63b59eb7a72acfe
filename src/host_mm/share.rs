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
//!   frame's [owner](crate::export_rmap::Owner::is_shared) tells every later fault;
//! - a guest page leaves a shared page by the order that the 2008 mail could not give do_wp_page:
//!   the old mappings are cleared, the clients notified and their translations flushed, *then* the
//!   new place is set, all with both page locks held ([`HostMm::copy_on_write`]);
//! - a shared page lives exactly as long as a guest page names it.
//!
//! An entry goes from and to `Shared` under the mutex of the commons, so that a name cannot be
//! passed on while its last holder gives it up; and it leaves a shared page that is in a frame
//! under that frame's page lock.

use std::sync::Mutex;

use crate::addr::{Gfn, PAGE_SIZE_U64};
use crate::export_rmap::{FlushReason, Invalidation, LockedPage, Owner, PageFlags};
use crate::host_mm::fault::Intent;
use crate::host_mm::frames::FreeFrame;
use crate::host_mm::object::{Entry, ObjectPages, Place};
use crate::host_mm::stats::Counters;
use crate::host_mm::{HostMm, MmError, Sabotage};
use crate::sync::lock;

/// Number of the commons among memory objects.
pub(super) const COMMONS: u16 = Owner::SHARED;
/// Most shared pages at a time.
const MAX_SHARED: u32 = 1 << 28;
/// Numbers of shared pages that are all zero and that every untouched page may name. Several,
/// since leaving one costs a visit to all mappings that the client has of it.
const ZERO_PAGES: u32 = 16;

/// Number of a shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SharedPage(u32);

impl SharedPage {
    pub(super) const fn new(raw: u32) -> Self {
        Self(raw)
    }

    pub(super) const fn as_u32(self) -> u32 {
        self.0
    }

    /// The zero page that an untouched guest page names once it is read.
    pub(super) fn zero_for(gfn: Gfn) -> Self {
        // Less than `ZERO_PAGES`.
        #[allow(clippy::cast_possible_truncation)]
        let number = (gfn.as_u64() % u64::from(ZERO_PAGES)) as u32;
        Self(number)
    }

    /// The shared page that owns a frame.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn of(owner: Owner) -> Self {
        debug_assert!(owner.is_shared());
        Self(owner.gfn.as_u64() as u32)
    }

    pub(super) const fn is_zero(self) -> bool {
        self.0 < ZERO_PAGES
    }

    /// The page in the commons.
    pub(super) const fn gfn(self) -> Gfn {
        Gfn::new(self.0 as u64)
    }
}

/// The shared pages of a [`HostMm`].
#[derive(Debug)]
pub(super) struct Commons {
    pub(super) pages: std::sync::Arc<ObjectPages>,
    names: Mutex<Names>,
}

/// How many guest pages name each shared page; 0 for those that nobody names.
#[derive(Debug, Default)]
struct Names {
    users: Vec<u32>,
    /// Numbers that nobody names. First in, first out: a number rests before it is used again.
    free: std::collections::VecDeque<u32>,
}

impl Commons {
    pub(super) fn new() -> Self {
        let bytes = u64::from(MAX_SHARED) * PAGE_SIZE_U64;
        Self {
            pages: std::sync::Arc::new(ObjectPages::new(COMMONS, bytes)),
            names: Mutex::new(Names { users: vec![0; ZERO_PAGES as usize], ..Names::default() }),
        }
    }

    /// Shared pages that somebody names, without the zero pages.
    pub(super) fn len(&self) -> u64 {
        let names = lock(&self.names);
        (names.users.len() - ZERO_PAGES as usize - names.free.len()) as u64
    }

    fn entry(&self, shared: SharedPage) -> Result<&Entry, MmError> {
        self.pages.entry(shared.gfn()).ok_or(MmError::TooManyShared)
    }

    /// Gives the private page in the locked frame to the commons, in the name of `entry`, which
    /// names the frame. The page is read-only everywhere.
    pub(super) fn take_in(
        &self,
        page: &LockedPage<'_>,
        entry: &Entry,
    ) -> Result<SharedPage, MmError> {
        let mut names = lock(&self.names);
        // A late fault may have left a page of zeros under a number that nobody names any more;
        // reclaim will take it. Such a number goes to the back of the queue.
        for _ in 0..names.free.len() {
            let Some(raw) = names.free.pop_front() else { break };
            let shared = SharedPage(raw);
            if self.entry(shared)?.replace(Place::Absent, Place::Frame(page.pfn()), page) {
                names.users[raw as usize] = 1;
                self.hand_over(page, entry, shared);
                return Ok(shared);
            }
            names.free.push_back(raw);
        }
        let raw = u32::try_from(names.users.len()).ok().filter(|&raw| raw < MAX_SHARED);
        let shared = SharedPage(raw.ok_or(MmError::TooManyShared)?);
        self.entry(shared)?.store(Place::Frame(page.pfn()), page);
        names.users.push(1);
        self.hand_over(page, entry, shared);
        Ok(shared)
    }

    fn hand_over(&self, page: &LockedPage<'_>, entry: &Entry, shared: SharedPage) {
        page.set_owner(self.pages.owner(shared.gfn()));
        entry.store(Place::Shared(shared), page);
    }

    /// Lets `to`, which nobody else can be looking at, name what `from` names, unless it names
    /// something already; `false` if `from` names no shared page.
    pub(super) fn name_again(&self, from: &Entry, to: &Entry) -> bool {
        let mut names = lock(&self.names);
        let Place::Shared(shared) = from.load() else {
            return false;
        };
        if to.replace_frameless(Place::Absent, Place::Shared(shared)) {
            names.add(shared);
        }
        true
    }

    /// Counts one more guest page that is about to name a shared page. Only while the shared page's
    /// lock is held, or another guest page that names it is kept from leaving.
    pub(super) fn reserve(&self, shared: SharedPage) {
        lock(&self.names).add(shared);
    }

    /// Points `entry` away from a shared page; whether it was the last to name it.
    fn leave(&self, entry: &Entry, shared: SharedPage, to: Place) -> Left {
        let mut names = lock(&self.names);
        if !entry.replace_frameless(Place::Shared(shared), to) {
            return Left::NotHere;
        }
        names.remove(shared)
    }

    /// Gives the shared page to `entry` alone, if nothing else names it.
    fn give_back(
        &self,
        page: &LockedPage<'_>,
        entry: &Entry,
        shared: SharedPage,
        owner: Owner,
    ) -> Result<bool, MmError> {
        let mut names = lock(&self.names);
        if shared.is_zero() || names.users[shared.0 as usize] != 1 {
            return Ok(false);
        }
        self.entry(shared)?.store(Place::Absent, page);
        page.set_owner(owner);
        entry.store(Place::Frame(page.pfn()), page);
        names.remove(shared);
        names.free.push_back(shared.0);
        Ok(true)
    }

    fn retire(&self, shared: SharedPage) {
        lock(&self.names).free.push_back(shared.0);
    }
}

/// What came of leaving a shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The entry did not name it any more.
    NotHere,
    /// Others name it still.
    ToOthers,
    /// Nobody names it now: its page is to be discarded and its number retired.
    Empty,
}

impl Names {
    fn add(&mut self, shared: SharedPage) {
        if !shared.is_zero() {
            self.users[shared.0 as usize] += 1;
        }
    }

    fn remove(&mut self, shared: SharedPage) -> Left {
        if shared.is_zero() {
            return Left::ToOthers;
        }
        let users = &mut self.users[shared.0 as usize];
        *users -= 1;
        if *users == 0 { Left::Empty } else { Left::ToOthers }
    }
}

impl HostMm {
    /// Number of pages that are shared now, without the zero pages.
    #[must_use]
    pub fn shared_pages(&self) -> u64 {
        self.commons.len()
    }

    /// Whether untouched pages that are read get a shared page of zeros. Not without the notifier:
    /// nobody could be told when the page is written.
    pub(super) fn shares_zero(&self) -> bool {
        self.config.share_zero && cfg!(feature = "export-notifier")
    }

    /// The frame of a guest page that names a shared page, locked; `None` if it names it no more.
    pub(super) fn fault_in_shared(
        &self,
        entry: &Entry,
        shared: SharedPage,
    ) -> Result<Option<LockedPage<'_>>, MmError> {
        let page = self.fault_in(&self.commons.pages, shared.gfn(), Intent::Write)?;
        // The number may have been given up, and to another page, before the lock was ours.
        Ok((entry.load() == Place::Shared(shared)).then_some(page))
    }

    /// The mail's do_wp_page, completed: gives a guest page that names a shared page a frame of its
    /// own, and returns it locked; `None` if the page has moved meanwhile.
    pub(super) fn copy_on_write(
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
            Counters::add(&self.counters.cow_reuses, 1);
            return Ok(Some(old));
        }
        let new = self.prepare(&frame, owner);
        if self.is_sabotaged(Sabotage::SetFirst, gfn) {
            self.set_first(&old, new, frame, entry, shared)?;
            return Ok(None);
        }
        let copied = self.revoke_from(&old, owner).and_then(|()| self.view.copy(&old, &new));
        if let Err(error) = copied {
            new.clear_flags(PageFlags::IN_USE);
            return Err(error);
        }
        new.set_flags(PageFlags::DIRTY);
        let left = self.commons.leave(entry, shared, Place::Frame(new.pfn()));
        debug_assert_ne!(left, Left::NotHere, "the page lock of the old frame is ours");
        frame.into_use();
        if left == Left::Empty {
            self.discard_shared(shared, Some(&old));
        }
        Counters::add(&self.counters.cow_copies, 1);
        Ok(Some(new))
    }

    /// Sabotage: the right order's opposite, with time for somebody to come along in between.
    fn set_first(
        &self,
        old: &LockedPage<'_>,
        new: LockedPage<'_>,
        frame: FreeFrame<'_>,
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

    /// Takes the mappings of one guest page away from the clients that have them; others keep
    /// theirs.
    pub(super) fn revoke_from(&self, page: &LockedPage<'_>, owner: Owner) -> Result<(), MmError> {
        page.begin_invalidation();
        if page.frame().is_exported() {
            self.notifiers.invalidate_page(page, Invalidation::Replace(owner));
            self.notifiers.flush(&[page.pfn()], FlushReason::Invalidated)?;
        }
        Ok(())
    }

    /// Forgets the copy in swap: what is in the frame is the only one.
    pub(super) fn forget_copy(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        page.set_flags(PageFlags::DIRTY);
        if let Some(slot) = page.slot() {
            page.set_slot(None);
            self.swap.free(slot)?;
        }
        Ok(())
    }

    /// Ends a guest page's use of a shared page: the guest page is zero from now on. Where clients
    /// may map it, `page` is its frame, revoked from them and still locked.
    pub(super) fn leave_shared(
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
    fn discard_shared(&self, shared: SharedPage, page: Option<&LockedPage<'_>>) {
        match (self.commons.pages.entry(shared.gfn()), page) {
            (Some(entry), Some(page)) => self.discard_locked(page, entry),
            (Some(entry), None) => self.discard_page(entry),
            (None, _) => {}
        }
        self.commons.retire(shared);
    }
}
