//! The frame table: 24 bytes for each host frame.

use std::num::NonZeroU32;

use crate::addr::{Gfn, Pfn, SwapSlot};
use crate::flags::PageFlags;
use crate::page_lock::WaitQueues;
use crate::rmap::RmapMemory;
use crate::sync::{AtomicU32, AtomicU64, Ordering, zeroed};

/// One frame's descriptor. The rmap head and the `EXPORTED` bit change under the rmap entry lock;
/// all else changes under the page lock, but that a client may set `DIRTY`
/// (`FrameTable::note_dirty`). Fields are atomics because readers look without a lock.
///
/// All zeros is a frame that is free and that nobody has to do with: so the table of a large guest takes
/// memory only for frames that were used.
#[derive(Debug, Default)]
#[cfg_attr(not(any(loom, shuttle)), derive(zerocopy::FromZeros))]
pub struct Frame {
    pub(super) flags: AtomicU32,
    /// Swap slot of the page's last written copy, plus one; 0 is none.
    pub(super) slot: AtomicU32,
    /// [`Owner`], packed.
    pub(super) owner: AtomicU64,
    /// Reverse-map head, see [`rmap`](crate::rmap).
    pub(super) rmap: AtomicU64,
}

// The issue of a frame table is its size: 24 bytes is 0.6 % of the memory that it describes.
#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<Frame>() == 24);

/// The page that a frame holds: a memory object and a guest frame number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Number of the memory object.
    pub object: u16,
    /// Guest frame inside the object; below 2^48.
    pub gfn: Gfn,
}

impl Owner {
    const GFN_BITS: u32 = 48;
    /// The number that no memory object has: the page belongs to several, and its `gfn` numbers
    /// the shared page.
    pub const SHARED: u16 = u16::MAX;

    /// Whether several objects have the page: nobody may write it.
    #[must_use]
    pub const fn is_shared(self) -> bool {
        self.object == Self::SHARED
    }

    /// The page as one number, for the checksum of its copy in swap.
    #[must_use]
    pub fn tag(self) -> u64 {
        self.pack()
    }

    fn pack(self) -> u64 {
        (u64::from(self.object) << Self::GFN_BITS)
            | (self.gfn.as_u64() & ((1 << Self::GFN_BITS) - 1))
    }

    // The object's number is the upper 16 bits.
    #[allow(clippy::cast_possible_truncation)]
    fn unpack(packed: u64) -> Self {
        Self {
            object: (packed >> Self::GFN_BITS) as u16,
            gfn: Gfn::new(packed & ((1 << Self::GFN_BITS) - 1)),
        }
    }
}

impl Frame {
    pub(super) fn flags(&self) -> PageFlags {
        PageFlags::from_bits_truncate(self.flags.load(Ordering::Relaxed))
    }

    /// Whether some client maps the frame. One relaxed load, of the same word that an
    /// invalidation has counted up before (see [`sequence`](crate::sequence)).
    #[must_use]
    pub fn is_exported(&self) -> bool {
        self.flags().contains(PageFlags::EXPORTED)
    }

    /// Whether nobody may write the page that lives here: several have it, or copies of it are out.
    /// A hint without the page lock.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flags().contains(PageFlags::LENT) || self.owner().is_shared()
    }

    /// Whether a page lives here. A hint without the page lock.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.flags().contains(PageFlags::IN_USE)
    }

    /// The page that the frame holds, or held last. A hint without the page lock.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner::unpack(self.owner.load(Ordering::Relaxed))
    }

    /// Whether a thread sleeps for the page lock.
    #[cfg(all(feature = "testing", not(any(loom, shuttle))))]
    #[doc(hidden)]
    pub fn has_waiters(&self) -> bool {
        self.flags().contains(PageFlags::WAITERS)
    }

    pub(super) fn set_owner(&self, owner: Owner) {
        self.owner.store(owner.pack(), Ordering::Relaxed);
    }

    /// The swap slot that holds the page's last written copy.
    #[must_use]
    pub fn slot(&self) -> Option<SwapSlot> {
        NonZeroU32::new(self.slot.load(Ordering::Relaxed))
            .and_then(|raw| SwapSlot::new(raw.get() - 1))
    }

    pub(super) fn set_slot(&self, slot: Option<SwapSlot>) {
        self.slot.store(slot.map_or(0, |slot| slot.as_u32() + 1), Ordering::Relaxed);
    }
}

/// Descriptors of all frames, with the wait queues of their page locks and the memory of their
/// reverse maps.
///
/// ```
/// use gnomon_export_rmap::addr::{Gfn, Pfn};
/// use gnomon_export_rmap::{FrameTable, Owner, PageFlags};
///
/// let table = FrameTable::new(1024);
/// let page = table.lock(Pfn::new(7));
/// page.set_owner(Owner { object: 1, gfn: Gfn::new(42) });
/// page.set_flags(PageFlags::IN_USE);
/// // Whoever cannot wait does not; the lock goes with the guard.
/// assert!(table.try_lock(Pfn::new(7)).is_none());
/// let before = page.sequence();
/// // From here on no mapping comes to be that was made of what was read before.
/// page.begin_invalidation();
/// assert_ne!(page.sequence(), before);
/// drop(page);
/// assert!(table.try_lock(Pfn::new(7)).is_some());
/// ```
pub struct FrameTable {
    frames: Box<[Frame]>,
    pub(super) wait_queues: WaitQueues,
    pub(super) rmap_memory: RmapMemory,
}

// Not its frames: each page lock names its table, and there may be a million of them.
impl std::fmt::Debug for FrameTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameTable").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl FrameTable {
    /// A table of `frames` free frames.
    #[must_use]
    pub fn new(frames: u32) -> Self {
        Self {
            frames: zeroed(frames as usize),
            wait_queues: WaitQueues::new(),
            rmap_memory: RmapMemory::default(),
        }
    }

    /// Number of frames.
    #[must_use]
    pub fn len(&self) -> u32 {
        // `new` took a u32.
        u32::try_from(self.frames.len()).unwrap_or(u32::MAX)
    }

    /// Whether the table has no frame.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The descriptor of `pfn`, or `None` where the table has no such frame.
    #[must_use]
    pub fn get(&self, pfn: Pfn) -> Option<&Frame> {
        self.frames.get(pfn.index())
    }

    /// The descriptor of a frame that is known to exist, since its number came out of this table.
    pub(super) fn frame(&self, pfn: Pfn) -> &Frame {
        &self.frames[pfn.index()]
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_frame_of_a_new_table_is_free_and_nobody_has_to_do_with_it() {
        let table = FrameTable::new(3);
        assert_eq!(table.len(), 3);
        for pfn in (0..3).map(Pfn::new) {
            let frame = table.frame(pfn);
            assert_eq!(frame.flags(), PageFlags::empty());
            assert_eq!((frame.slot(), frame.is_read_only()), (None, false));
            assert!(table.is_rmap_empty(pfn) && table.rmap_entries(pfn).is_empty());
            assert!(table.try_lock(pfn).is_some());
        }
    }

    #[test]
    fn owner_and_slot_survive_packing() {
        let frame = Frame::default();
        assert_eq!(frame.slot(), None);
        let owner = Owner { object: 0xabcd, gfn: Gfn::new((1 << 48) - 1) };
        frame.set_owner(owner);
        assert_eq!(frame.owner(), owner);
        for raw in [SwapSlot::MAX_SLOTS - 1, 0] {
            let slot = SwapSlot::new(raw);
            frame.set_slot(slot);
            assert_eq!(frame.slot(), slot);
        }
    }
}
