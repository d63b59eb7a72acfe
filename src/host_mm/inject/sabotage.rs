//! Rules that can be broken on purpose, to show that the checks catch it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Lab;
use crate::addr::Gfn;

/// One rule of the protocol to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// SPTEs are cleared, but the frames are not zapped: translations that processors cache live on.
    SkipFlush,
    /// The dirty state that an invalidation harvests is thrown away.
    DropDirty,
    /// A mapping is installed without its reverse-map entry.
    ForgetRmap,
    /// A fault installs its mapping although an invalidation overlapped it (and dawdles, so that
    /// one often does); in shadow page tables for reading only, since the frame may be another
    /// page's by then.
    LateInstall,
    /// No rule is broken, faults only dawdle as with `LateInstall` and devices as with
    /// `SkipIotlbWait`: the control for these.
    Dawdle,
    /// The copy of a shared page is given out before the old mappings are cleared: the order that the
    /// mail left do_wp_page with.
    SetFirst,
    /// Frames are given to new pages before the flush.
    EarlyReuse,
    /// Pages that a clone shares are not made read-only first: who could write them still can.
    SkipCloneProtect,
    /// An IOTLB's flush does not wait for accesses in flight (which dawdle, so that there is often
    /// one): for reads of what goes, and for writes to what becomes read-only.
    SkipIotlbWait,
    /// Direct paging: a page that is cleaned or evicted stays writable.
    SkipWriteProtect,
    /// Direct paging: that somebody removed a range of the window is not heeded.
    DropEvent,
    /// Every so many pages, one bit of a page in swap flips.
    SwapCorrupt,
    /// A page is written while copies of it are out.
    SkipRecall,
    /// A peer's copies are not taken from it when it has given them up.
    SkipPunch,
    /// Direct paging: a frame that loses its page keeps its memory.
    KeepMemory,
}

/// The guest frames to whose pages the sabotage applies.
#[derive(Debug)]
pub(in crate::host_mm) struct SabotageRange {
    first: AtomicU64,
    end: AtomicU64,
}

impl Default for SabotageRange {
    fn default() -> Self {
        Self { first: AtomicU64::new(0), end: AtomicU64::new(u64::MAX) }
    }
}

impl Lab {
    /// Limits the sabotage to `count` guest frames from `first`, of every memory object: to the
    /// pages that an oracle watches, so that what it reports is a page, not a guest kernel that
    /// fell over itself. Without a limit every page is fair game. (`SwapCorrupt` knows no pages.)
    pub(in crate::host_mm) fn limit_sabotage(&self, first: Gfn, count: u64) {
        // Emptied first: a reader in between finds no page rather than a wrong one.
        self.range.end.store(0, Ordering::Relaxed);
        self.range.first.store(first.as_u64(), Ordering::Release);
        self.range.end.store(first.as_u64().saturating_add(count), Ordering::Release);
    }

    /// Whether this rule is to be broken for this page.
    #[must_use]
    pub(in crate::host_mm) fn is_sabotaged(&self, rule: Sabotage, gfn: Gfn) -> bool {
        self.sabotage == Some(rule)
            && gfn.as_u64() < self.range.end.load(Ordering::Acquire)
            && gfn.as_u64() >= self.range.first.load(Ordering::Acquire)
    }
}
