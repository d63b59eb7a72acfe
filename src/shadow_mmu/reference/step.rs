//! What a guest and the host may do to a guest's paging, one step at a time.

use super::machine::RAM_BYTES;
use crate::addr::{Gva, PAGE_SIZE_U64};
use crate::shadow_mmu::Access;

/// Guest frames of the PML4s; tables are in 1 to 8, data in 16 to 31. The last one is outside RAM.
pub(crate) const ROOTS: [u64; 3] = [1, 8, RAM_BYTES / PAGE_SIZE_U64];
/// Guest frames that steps use.
pub(crate) const POOL: u64 = 32;

/// Any address, or (`None`) the one used last: most faults hide in what is done twice.
pub(crate) type At = Option<Gva>;

/// Another page of the same large page.
pub(crate) fn beside(gva: Gva, distance: u64) -> Gva {
    Gva::new(gva.as_u64() ^ (distance * PAGE_SIZE_U64))
}

/// What follows a change of an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then {
    Nothing,
    /// No flush, but another access, which may or may not see the change.
    Access(Access),
    /// Of the address itself, or of a page so many pages beside it.
    Invlpg(u64),
    LoadRoot,
}

/// A change of an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    To(u64),
    /// Another page of data, with the same rights.
    Address(u64),
    Flip(u64),
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Access(At, Access, u64),
    /// An access to a page beside the last one.
    Beside(u64, Access),
    /// The emulator's access on the guest's behalf.
    Virtual(At, Access, u64),
    Edit(u64, usize, u64),
    /// Changes an entry that the walk for the address goes through: 0 is the topmost.
    EditPath(At, usize, Change, Then),
    Invlpg(At),
    LoadRoot(usize),
    Control(bool, bool),
    Evict(u64),
    EvictAll,
    Clean(u64),
    CleanAll,
    Age(u64),
    Recycle,
    Host(HostStep),
}

/// What else the host does to memory. Pages are those of the guest, and of a second object that the
/// guest does not map; only the last six change what either holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum HostStep {
    Migrate(u64),
    /// Merge two pages of the guest.
    Merge(u64, u64),
    /// Merge a page with the same one of the other object.
    MergeWithOther(u64),
    /// Merge with the page of zeros.
    MergeZero(u64),
    /// So many frames, by the clock.
    Reclaim(u64),
    /// The other object's copy is evicted.
    EvictOther(u64),
    StartLog,
    /// So many pages from the first.
    TakeLog(u64, u64),
    /// The other object's page is compared, all of it.
    ReadOther(u64),
    /// Pages are moved to others with the same content; what the other object gets of it is a copy.
    RemapToCopies(u64, u64, u64),
    /// The other object goes, and a clone of the guest's takes its place.
    Clone,
    /// The other object goes, and one of zeros takes its place.
    Renew,
    /// A word of the other object, by page and index.
    WriteOther(u64, usize, u64),
    Free(u64),
    /// So many pages of the guest from the first change places with the other's.
    Exchange(u64, u64, u64),
}
