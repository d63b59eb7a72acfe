//! Checks of the protocol's rules where host memory meets its clients, with
//! [`check_evictions`](crate::HostMmConfig::check_evictions): each at the moment at which
//! the rule must hold, so that a broken one is seen before anybody has read a wrong byte.
//!
//! Guarantee: no false alarm. What is compared is held still by a page lock, or by a client's lock
//! that whoever would change it has yet to wait for.

use crate::books::Books;
use crate::frames::backing::Backing;
use crate::object::commons::NameCounts;
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::violations::{MmViolation, ViolationKind};
use gnomon_export_rmap::addr::{Gfn, Pfn, SwapSlot};
use gnomon_export_rmap::{Frame, Harvest, LockedPage, Owner};

impl<B: Backing> Books<B> {
    pub(crate) fn is_checking(&self) -> bool {
        self.config.check_evictions
    }

    pub(crate) fn report(&self, kind: ViolationKind, pfn: Pfn, owner: Owner) {
        self.violations.report(MmViolation { kind, pfn, owner });
    }

    /// What the clients hand over of a page that is shared or lent: they cannot have written it.
    pub(crate) fn check_harvest(&self, page: &LockedPage<'_>, harvest: Harvest) {
        if self.is_checking() && harvest.dirty && page.is_read_only() {
            self.report(ViolationKind::WrittenReadOnly, page.pfn(), page.owner());
        }
    }

    /// A client is about to map a page to a frame, or to access it there. The client must hold what
    /// keeps an invalidation from ending: its lock, with the entry in the reverse map and the
    /// sequence looked at; or an access in flight. Then the page stays where it is meanwhile.
    pub(crate) fn check_mapping(&self, object: &ObjectPages, gfn: Gfn, pfn: Pfn, writable: bool) {
        if !self.is_checking() {
            return;
        }
        let owner = object.owner(gfn);
        if !self.is_in(object, gfn, pfn) {
            self.report(ViolationKind::MappedElsewhere, pfn, owner);
        }
        if writable && self.table.get(pfn).is_some_and(Frame::is_read_only) {
            self.report(ViolationKind::MappedWritable, pfn, owner);
        }
    }

    /// A client is about to map a page by what a guest's tables said, which the guest must not have
    /// flushed since: `is_current`.
    pub(crate) fn check_translation(
        &self,
        object: &ObjectPages,
        gfn: Gfn,
        pfn: Pfn,
        is_current: bool,
    ) {
        if self.is_checking() && !is_current {
            self.report(ViolationKind::FlushedByGuest, pfn, object.owner(gfn));
        }
    }

    /// A client has flushed mappings of its own accord, and has not let go of them yet: the frame must
    /// have been exported all the while.
    pub(crate) fn check_exported(&self, pfn: Pfn) {
        if self.is_checking()
            && let Some(frame) = self.table.get(pfn).filter(|frame| !frame.is_exported())
        {
            self.report(ViolationKind::LetGoEarly, pfn, frame.owner());
        }
    }

    /// Whether the guest page is in the frame, itself or as one of those that share it.
    fn is_in(&self, pages: &ObjectPages, gfn: Gfn, pfn: Pfn) -> bool {
        let frame = Place::Frame(pfn);
        let place = || pages.touched_entry(gfn).map(Entry::load);
        place() == Some(frame)
            || self.commons.holding_names(|commons| match place() {
                Some(Place::Shared(shared)) => {
                    commons.touched_entry(shared.gfn()).map(Entry::load) == Some(frame)
                }
                // It may have got the shared page for itself a moment ago.
                place => place == Some(frame),
            })
    }

    /// What the statistics say of shared pages against what became of them: a sentence for each
    /// difference. Nothing may happen meanwhile.
    pub(crate) fn miscounted(&self) -> Vec<String> {
        let NameCounts { taken_in, given_back, copied } = self.commons.counts();
        let counted = &self.counters;
        let figures = [
            ("pages that became shared", counted.shared.get(), taken_in),
            ("shared pages left to their last user", counted.cow_reuses.get(), given_back),
            ("copies of shared pages", counted.cow_copies.get(), copied),
        ];
        let wrong = figures.into_iter().filter(|(_, told, made)| told != made);
        let tell = |(what, told, made)| format!("there were {made} {what}, but {told} are counted");
        wrong.map(tell).collect()
    }

    /// A slot of swap is about to be free: whoever finds its number must not take it for a page's.
    pub(crate) fn check_slot_unnamed(&self, slot: SwapSlot, entry: &Entry, owner: Owner) {
        if self.is_checking() && entry.load() == Place::Swap(slot) {
            self.report(ViolationKind::SlotNamed, Pfn::new(0), owner);
        }
    }
}
