//! The flags word of a frame: one atomic word that holds the page lock and everything that is
//! decided under it. Bits above the flags count the frame's invalidations, see
//! [`sequence`](crate::sequence).

use bitflags::bitflags;

bitflags! {
    /// Flags of one frame, as in the mail's `page-flags.h` hunk.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFlags: u32 {
        /// The page lock is held.
        const LOCKED = 1 << 0;
        /// Somebody sleeps for the page lock; only ever set together with `LOCKED`, but for the
        /// moment in which a waiter lost a race with the unlock.
        const WAITERS = 1 << 1;
        /// `PG_exported`: something outside the host's own mappings refers to the frame. Set
        /// exactly while the frame's reverse map is not empty; changed under the rmap entry lock.
        const EXPORTED = 1 << 2;
        /// The frame's content differs from its copy in swap, or has none. What clients still hold
        /// in their SPTEs comes on top: it is harvested into this flag by an invalidation.
        const DIRTY = 1 << 3;
        /// The frame belongs to a page. Clear means that it stands in the free list, or is about to.
        const IN_USE = 1 << 4;
        /// Not looked at by reclaim since the page came in: the touch that brought it in does not
        /// count as a use.
        const FRESH = 1 << 5;
        /// Low bit of the two-bit use count of reclaim.
        const USES_LOW = 1 << 6;
        /// High bit of the two-bit use count of reclaim.
        const USES_HIGH = 1 << 7;
        /// Written since the dirty log took the page last. Set with `DIRTY` where that says that
        /// somebody wrote, but not cleared by writing the page back.
        const WRITTEN = 1 << 8;
        /// Copies are out: export clients hold copies of the page, not mappings. Nobody may write it
        /// before they were recalled; all mappings of it are read-only.
        const LENT = 1 << 9;
        /// A flush of the frame failed, and none has succeeded since: somebody may use what no mapping
        /// allows any more, though the frame need not be exported
        /// ([`NotifierList::revoke`](crate::NotifierList::revoke)).
        const FLUSH_DUE = 1 << 10;
    }
}

/// Position of the use count in the flags word.
const USES_SHIFT: u32 = 6;
/// Highest use count.
pub const MAX_USES: u32 = 3;

impl PageFlags {
    /// What a write sets.
    pub const BY_WRITE: Self = Self::DIRTY.union(Self::WRITTEN);

    /// Reclaim's use count, 0 to [`MAX_USES`].
    #[must_use]
    pub const fn uses(self) -> u32 {
        (self.bits() >> USES_SHIFT) & MAX_USES
    }

    /// The same flags with another use count; counts above [`MAX_USES`] are cut to it.
    #[must_use]
    pub const fn with_uses(self, uses: u32) -> Self {
        let uses = if uses > MAX_USES { MAX_USES } else { uses };
        Self::from_bits_retain((self.bits() & !(MAX_USES << USES_SHIFT)) | (uses << USES_SHIFT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_use_count_saturates_and_leaves_the_other_flags_alone() {
        let flags = PageFlags::EXPORTED | PageFlags::DIRTY;
        assert_eq!(flags.uses(), 0);
        assert_eq!(flags.with_uses(2).uses(), 2);
        assert_eq!(flags.with_uses(9).uses(), MAX_USES);
        assert_eq!(flags.with_uses(9).with_uses(0), flags);
    }
}
