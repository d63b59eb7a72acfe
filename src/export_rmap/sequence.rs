//! The invalidation sequence: a fault that read its page before an invalidation began never
//! installs after that invalidation has ended.
//!
//! Rule 2 of the protocol (`docs/protocol.md`), and what later kernels call
//! `mmu_invalidate_begin`, `mmu_invalidate_end` and `mmu_invalidate_retry`. An invalidation and a
//! fault run without a common lock; each writes its own word and then reads the other's, with a
//! sequentially consistent fence between (Dekker's scheme):
//!
//! | invalidation, page lock held | fault, client's MMU lock held |
//! |---|---|
//! | `begin` counts up | adds its rmap entry, which sets `EXPORTED` |
//! | fence | fence |
//! | looks at `EXPORTED`, notifies if set | `must_retry`: looks at the count, backs out if changed |
//!
//! At least one of them sees the other. If it is the invalidation, its call into the client waits
//! for the MMU lock and finds the installed entry; if it is the fault, nothing was installed.

use crate::addr::Gfn;
use crate::export_rmap::page_lock::LockedPage;
use crate::sync::{AtomicU64, Ordering, fence};

#[cfg(not(loom))]
const SHARDS: usize = 1024;
#[cfg(loom)]
const SHARDS: usize = 1;

/// Low bits count invalidations in progress, the rest those that have ended.
const IN_PROGRESS_BITS: u32 = 16;
const IN_PROGRESS_MASK: u64 = (1 << IN_PROGRESS_BITS) - 1;

/// The sequence counts of one memory object, sharded by guest frame so that an invalidation
/// disturbs only faults near it.
#[derive(Debug)]
pub struct InvalidationSequence {
    shards: Box<[AtomicU64]>,
}

/// What the sequence was when a fault read its page.
#[derive(Clone, Copy, Debug)]
pub struct SequenceToken {
    shard: usize,
    value: u64,
}

/// An invalidation in progress; ends when dropped.
#[derive(Debug)]
#[must_use = "the invalidation ends at once"]
pub struct InvalidationInProgress<'a> {
    shard: &'a AtomicU64,
}

impl Default for InvalidationSequence {
    fn default() -> Self {
        Self::new()
    }
}

impl InvalidationSequence {
    /// A sequence in which nothing has been invalidated yet.
    #[must_use]
    pub fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| AtomicU64::new(0)).collect() }
    }

    fn shard(gfn: Gfn) -> usize {
        let raw = gfn.as_u64();
        // Reduced modulo the number of shards.
        #[allow(clippy::cast_possible_truncation)]
        let index = (raw ^ (raw >> 10)) as usize % SHARDS;
        index
    }

    /// Notes the sequence for a page that is about to be mapped. Taken under its page lock, so no
    /// invalidation of this very page is in progress (another page of the shard may be: then
    /// [`must_retry`](Self::must_retry) will say so).
    #[must_use]
    pub fn read(&self, gfn: Gfn, _page: &LockedPage<'_>) -> SequenceToken {
        let shard = Self::shard(gfn);
        SequenceToken { shard, value: self.shards[shard].load(Ordering::Acquire) }
    }

    /// Whether an invalidation began since the token was taken. Call it with the client's MMU lock
    /// held and the rmap entry added; on `true` take the entry out again and start over.
    #[must_use]
    pub fn must_retry(&self, token: SequenceToken) -> bool {
        // Pairs with the fence in `begin`.
        fence(Ordering::SeqCst);
        token.value & IN_PROGRESS_MASK != 0
            || self.shards[token.shard].load(Ordering::Acquire) != token.value
    }

    /// Begins an invalidation of the locked page at `gfn`. Only after this may the page's
    /// `EXPORTED` flag be looked at, its clients notified and its mapping changed.
    pub fn begin(&self, gfn: Gfn, _page: &LockedPage<'_>) -> InvalidationInProgress<'_> {
        let shard = &self.shards[Self::shard(gfn)];
        shard.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `must_retry`.
        fence(Ordering::SeqCst);
        InvalidationInProgress { shard }
    }
}

impl Drop for InvalidationInProgress<'_> {
    fn drop(&mut self) {
        // One step: in progress - 1, ended + 1. Release: whoever sees the end sees the new mapping.
        self.shard.fetch_add(IN_PROGRESS_MASK, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::Pfn;
    use crate::export_rmap::FrameTable;

    #[test]
    fn an_overlapping_invalidation_forces_a_retry_before_and_after_its_end() {
        let table = FrameTable::new(1);
        let sequence = InvalidationSequence::new();
        let gfn = Gfn::new(7);
        let page = table.lock(Pfn::new(0));

        let before = sequence.read(gfn, &page);
        assert!(!sequence.must_retry(before));
        let running = sequence.begin(gfn, &page);
        assert!(sequence.must_retry(before), "in progress");
        let during = sequence.read(gfn, &page);
        assert!(sequence.must_retry(during), "read while in progress");
        drop(running);
        assert!(sequence.must_retry(before), "ended");
        assert!(sequence.must_retry(during), "ended");
        assert!(!sequence.must_retry(sequence.read(gfn, &page)));
    }

    #[test]
    fn a_far_page_is_not_disturbed() {
        let table = FrameTable::new(1);
        let sequence = InvalidationSequence::new();
        let page = table.lock(Pfn::new(0));
        let token = sequence.read(Gfn::new(1), &page);
        drop(sequence.begin(Gfn::new(2), &page));
        assert!(!sequence.must_retry(token));
    }
}
