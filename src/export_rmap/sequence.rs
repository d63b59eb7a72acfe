//! The invalidation sequence: a fault that read its page before an invalidation began never
//! installs after that invalidation has ended.
//!
//! Rule 2 of the protocol (`docs/protocol.md`); later kernels call the parts
//! `mmu_invalidate_begin` and `mmu_invalidate_retry`. The count stands in the frame's flags word,
//! beside `EXPORTED`, so that one word's modification order decides every race, without a fence:
//!
//! | invalidation, page lock held | fault, client's MMU lock held |
//! |---|---|
//! | counts up | adds its rmap entry: `EXPORTED` is set |
//! | looks at `EXPORTED`, notifies if set | looks at the count, backs out if it has changed |
//!
//! If the count went up before the flag was set, the fault sees the new count. If not, the
//! invalidation sees the flag, and its call into the client waits for the MMU lock and finds the
//! entry.
//!
//! An invalidation begins with the count and ends when the page lock is dropped. A fault notes the
//! count under the page lock, so never in the middle of one.

use crate::addr::Pfn;
use crate::flags::PageFlags;
use crate::frame_table::FrameTable;
use crate::lab::OfPage;
use crate::page_lock::LockedPage;
use crate::sync::Ordering;

/// The count has the upper 21 bits of the flags word: 2 million invalidations of one frame during
/// one fault would be needed to fool it.
const COUNT_SHIFT: u32 = 11;
const COUNT_ONE: u32 = 1 << COUNT_SHIFT;
const _: () = assert!(PageFlags::all().bits() < COUNT_ONE, "a flag has a bit of the count");

/// What the count of a frame was when a fault found its page there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceToken {
    pfn: Pfn,
    count: u32,
    of: OfPage,
}

impl SequenceToken {
    /// The frame in which the page was.
    #[must_use]
    pub const fn pfn(self) -> Pfn {
        self.pfn
    }

    pub(crate) const fn of(self) -> OfPage {
        self.of
    }
}

impl LockedPage<'_> {
    /// Notes the count, for a mapping that is to be installed once the page is unlocked.
    #[must_use]
    pub fn sequence(&self) -> SequenceToken {
        let flags = self.frame().flags.load(Ordering::Relaxed);
        SequenceToken { pfn: self.pfn(), count: flags >> COUNT_SHIFT, of: OfPage::of(self) }
    }

    /// Begins an invalidation, which ends when the page is unlocked. Only after this may
    /// `EXPORTED` be looked at, the clients be notified and the page's place be changed.
    pub fn begin_invalidation(&self) {
        // The carry out of the top is lost: the count wraps. AcqRel: a fault that sees the new
        // count sees what came before; what we look at next is no older than what the fault wrote.
        self.frame().flags.fetch_add(COUNT_ONE, Ordering::AcqRel);
    }
}

impl FrameTable {
    /// Whether an invalidation of the frame began since the token was taken. Call it with the
    /// client's MMU lock held and the rmap entry added; on `true` take the entry out again and
    /// start over.
    #[must_use]
    pub(crate) fn must_retry(&self, token: SequenceToken) -> bool {
        // Acquire pairs with the AcqRel in `begin_invalidation`.
        self.frame(token.pfn).flags.load(Ordering::Acquire) >> COUNT_SHIFT != token.count
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::PageFlags;

    const FRAME: Pfn = Pfn::new(0);

    #[test]
    fn an_invalidation_forces_a_retry_from_its_begin_on() {
        let table = FrameTable::new(2);
        let page = table.lock(FRAME);
        let before = page.sequence();
        assert!(!table.must_retry(before));
        page.begin_invalidation();
        assert!(table.must_retry(before), "in progress");
        drop(page);
        assert!(table.must_retry(before), "ended");
        assert!(!table.must_retry(table.lock(FRAME).sequence()));
        assert!(!table.must_retry(table.lock(Pfn::new(1)).sequence()), "another frame");
    }

    /// Whichever count is the larger one.
    #[test]
    fn a_retry_is_forced_across_the_wrap() {
        let table = FrameTable::new(1);
        let page = table.lock(FRAME);
        let first = page.sequence();
        for _ in 0..(1 << (u32::BITS - COUNT_SHIFT)) - 1 {
            page.begin_invalidation();
            assert!(table.must_retry(first));
        }
        let last = page.sequence();
        page.begin_invalidation();
        assert!(table.must_retry(last));
    }

    #[test]
    fn the_count_wraps_without_touching_the_flags() {
        let table = FrameTable::new(1);
        let page = table.lock(FRAME);
        page.set_flags(PageFlags::DIRTY | PageFlags::IN_USE);
        let flags = page.flags();
        let first = page.sequence();
        for _ in 0..1 << (u32::BITS - COUNT_SHIFT) {
            page.begin_invalidation();
        }
        assert_eq!(page.sequence(), first);
        assert_eq!(page.flags(), flags);
    }
}
