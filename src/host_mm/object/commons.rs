//! The commons: the hidden memory object that shared pages belong to, and how many guest pages name each
//! of them.
//!
//! Guarantee: the count of a shared page is the number of entries that name it. An entry goes from and
//! to [`Place::Shared`] under the mutex here, so that a name cannot be passed on while its last holder
//! gives it up.

use std::sync::Arc;

use super::pages::{Entry, ObjectPages, Place};
use crate::error::MmError;
use crate::swap::SwapSpace;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64, SwapSlot};
use gnomon_export_rmap::sync::{Mutex, lock};
use gnomon_export_rmap::{LockedPage, Owner};

/// Number of the commons among memory objects.
pub(crate) const COMMONS: u16 = Owner::SHARED;
/// Most shared pages at a time.
const MAX_SHARED: u32 = 1 << 28;
/// Numbers of shared pages that are all zero and that every untouched page may name. Several,
/// since leaving one costs a visit to all mappings that the client has of it.
const ZERO_PAGES: u32 = 16;

/// Number of a shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SharedPage(u32);

impl SharedPage {
    pub(crate) const fn new(raw: u32) -> Self {
        Self(raw)
    }

    pub(crate) const fn as_u32(self) -> u32 {
        self.0
    }

    /// The zero page that an untouched guest page names once it is read.
    pub(crate) fn zero_for(gfn: Gfn) -> Self {
        // Less than `ZERO_PAGES`.
        #[allow(clippy::cast_possible_truncation)]
        let number = (gfn.as_u64() % u64::from(ZERO_PAGES)) as u32;
        Self(number)
    }

    /// The shared page that owns a frame.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn of(owner: Owner) -> Self {
        debug_assert!(owner.is_shared());
        Self(owner.gfn.as_u64() as u32)
    }

    pub(crate) const fn is_zero(self) -> bool {
        self.0 < ZERO_PAGES
    }

    /// The page in the commons.
    pub(crate) const fn gfn(self) -> Gfn {
        Gfn::new(self.0 as u64)
    }
}

/// The shared pages of a [`HostMm`](crate::HostMm).
#[derive(Debug)]
pub(crate) struct Commons {
    pub(crate) pages: Arc<ObjectPages>,
    names: Mutex<Names>,
}

/// How many guest pages name each shared page; 0 for those that nobody names.
#[derive(Debug, Default)]
struct Names {
    users: Vec<u32>,
    /// Numbers that nobody names. First in, first out: a number rests before it is used again.
    free: std::collections::VecDeque<u32>,
    counts: NameCounts,
}

/// How names have come and gone since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NameCounts {
    /// Pages that became shared.
    pub(crate) taken_in: u64,
    /// Shared pages that their last user got for itself.
    pub(crate) given_back: u64,
    /// Guest pages that left a shared page for a copy.
    pub(crate) copied: u64,
}

impl Commons {
    pub(crate) fn new() -> Self {
        let bytes = u64::from(MAX_SHARED) * PAGE_SIZE_U64;
        Self {
            pages: Arc::new(ObjectPages::new(COMMONS, bytes)),
            names: Mutex::new(Names { users: vec![0; ZERO_PAGES as usize], ..Names::default() }),
        }
    }

    /// Shared pages that somebody names, without the zero pages.
    pub(crate) fn len(&self) -> u64 {
        let names = lock(&self.names);
        (names.users.len() - ZERO_PAGES as usize - names.free.len()) as u64
    }

    /// Has `look` look while no entry goes from or to [`Place::Shared`].
    pub(crate) fn holding_names<T>(&self, look: impl FnOnce(&ObjectPages) -> T) -> T {
        let _names = lock(&self.names);
        look(&self.pages)
    }

    pub(crate) fn counts(&self) -> NameCounts {
        lock(&self.names).counts
    }

    fn entry(&self, shared: SharedPage) -> Result<&Entry, MmError> {
        self.pages.entry(shared.gfn()).ok_or(MmError::TooManyShared)
    }

    /// Gives the private page in the locked frame to the commons, in the name of `entry`, which
    /// names the frame. The page is read-only everywhere.
    pub(crate) fn take_in(
        &self,
        page: &LockedPage<'_>,
        entry: &Entry,
    ) -> Result<SharedPage, MmError> {
        let mut names = lock(&self.names);
        let place = Place::Frame(page.pfn());
        let shared =
            self.publish(&mut names, |_, at| Ok(at.replace(Place::Absent, place, page)))?;
        self.hand_over(page, entry, shared);
        names.counts.taken_in += 1;
        Ok(shared)
    }

    /// As [`take_in`](Self::take_in), for a page that stays in a slot of swap: `entry` names the
    /// locked frame, which has no content, so that nobody else comes to the slot meanwhile.
    pub(crate) fn take_in_swapped(
        &self,
        page: &LockedPage<'_>,
        entry: &Entry,
        slot: SwapSlot,
        swap: &SwapSpace,
    ) -> Result<SharedPage, MmError> {
        let mut names = lock(&self.names);
        let old = page.owner().tag();
        let shared = self.publish(&mut names, |shared, at| {
            let new = self.pages.owner(shared.gfn()).tag();
            // First of all: the name must be right when somebody finds the slot.
            swap.rename(slot, old, new)?;
            let is_placed = at.replace_frameless(Place::Absent, Place::Swap(slot));
            if !is_placed {
                swap.rename(slot, new, old)?;
            }
            Ok(is_placed)
        })?;
        entry.store(Place::Shared(shared), page);
        names.counts.taken_in += 1;
        Ok(shared)
    }

    /// Finds a number that nobody names and has `place` set its entry; false says that the entry
    /// is taken.
    fn publish(
        &self,
        names: &mut Names,
        place: impl Fn(SharedPage, &Entry) -> Result<bool, MmError>,
    ) -> Result<SharedPage, MmError> {
        // A late fault may have left a page of zeros under a number that nobody names any more;
        // reclaim will take it. Such a number goes to the back of the queue.
        for _ in 0..names.free.len() {
            let Some(raw) = names.free.pop_front() else { break };
            let shared = SharedPage(raw);
            match self.entry(shared).and_then(|at| place(shared, at)) {
                Ok(true) => {
                    names.users[raw as usize] = 1;
                    return Ok(shared);
                }
                Ok(false) => names.free.push_back(raw),
                Err(error) => {
                    names.free.push_back(raw);
                    return Err(error);
                }
            }
        }
        let raw = u32::try_from(names.users.len()).ok().filter(|&raw| raw < MAX_SHARED);
        let shared = SharedPage(raw.ok_or(MmError::TooManyShared)?);
        // Never named before: its entry is absent.
        if !place(shared, self.entry(shared)?)? {
            return Err(MmError::TooManyShared);
        }
        names.users.push(1);
        Ok(shared)
    }

    fn hand_over(&self, page: &LockedPage<'_>, entry: &Entry, shared: SharedPage) {
        page.set_owner(self.pages.owner(shared.gfn()));
        entry.store(Place::Shared(shared), page);
    }

    /// Lets `to`, which nobody else can be looking at, name what `from` names, unless it names
    /// something already; `false` if `from` names no shared page.
    pub(crate) fn name_again(&self, from: &Entry, to: &Entry) -> bool {
        let mut names = lock(&self.names);
        let Place::Shared(shared) = from.load() else {
            return false;
        };
        if to.replace_frameless(Place::Absent, Place::Shared(shared)) {
            names.add(shared);
        }
        true
    }

    /// Counts one more guest page that is about to name a shared page; `false` if nobody names it any
    /// more. Its last user may just have left, or the page in its frame may be one of zeros that a
    /// late fault left behind: then the number will be another page's.
    #[must_use]
    pub(crate) fn reserve(&self, shared: SharedPage) -> bool {
        let mut names = lock(&self.names);
        let is_named = names.is_named(shared);
        if is_named {
            names.add(shared);
        }
        is_named
    }

    /// Points `entry` away from a shared page; whether it was the last to name it.
    pub(crate) fn leave(&self, entry: &Entry, shared: SharedPage, to: Place) -> Left {
        let mut names = lock(&self.names);
        if !entry.replace_frameless(Place::Shared(shared), to) {
            return Left::NotHere;
        }
        names.counts.copied += u64::from(matches!(to, Place::Frame(_)));
        names.remove(shared)
    }

    /// Gives the shared page to `entry` alone, if nothing else names it.
    pub(crate) fn give_back(
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
        names.counts.given_back += 1;
        Ok(true)
    }

    pub(crate) fn retire(&self, shared: SharedPage) {
        lock(&self.names).free.push_back(shared.0);
    }
}

/// What came of leaving a shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// The entry did not name it any more.
    NotHere,
    /// Others name it still.
    ToOthers,
    /// Nobody names it now: its page is to be discarded and its number retired.
    Empty,
}

impl Names {
    fn is_named(&self, shared: SharedPage) -> bool {
        shared.is_zero() || self.users[shared.0 as usize] > 0
    }

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
