//! From guest frame to where the page is.
//!
//! Guarantee: an entry changes only under the page lock of the frame that it names or is about to
//! name, so whoever holds that lock and finds the entry pointing to the frame knows where the page
//! is until the lock is dropped.
//!
//! Entries are the model checkers' under one. The tables that lead to them are not: nothing is done in them
//! but to make entries, and nothing is ever taken out.
//!
//! Sparse: 256 KiB of guest memory cost one leaf of 256 bytes once touched, and nothing before.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use super::commons::SharedPage;
use super::dirty_bits::DirtyBits;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64, Pfn, SwapSlot};
use gnomon_export_rmap::sync::{AtomicU32, Ordering};
use gnomon_export_rmap::{LockedPage, Owner};

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere: all zero.
    Absent,
    /// In a frame.
    Frame(Pfn),
    /// In a swap slot.
    Swap(SwapSlot),
    /// Wherever this shared page is.
    Shared(SharedPage),
}

impl Place {
    /// Set for a swap slot, whose number has 31 bits.
    const SWAP: u32 = 1 << 31;
    /// A frame is stored as its number plus one, and there are at most 2^30 of them: up to this.
    /// Above it come shared pages.
    const LAST_FRAME: u32 = 1 << 30;

    fn pack(self) -> u32 {
        match self {
            Place::Absent => 0,
            Place::Frame(pfn) => pfn.as_u32() + 1,
            Place::Swap(slot) => Self::SWAP | slot.as_u32(),
            Place::Shared(shared) => Self::LAST_FRAME + 1 + shared.as_u32(),
        }
    }

    fn unpack(raw: u32) -> Self {
        match raw {
            0 => Place::Absent,
            raw if raw <= Self::LAST_FRAME => Place::Frame(Pfn::new(raw - 1)),
            raw if raw & Self::SWAP == 0 => {
                Place::Shared(SharedPage::new(raw - Self::LAST_FRAME - 1))
            }
            raw => SwapSlot::new(raw & !Self::SWAP).map_or(Place::Absent, Place::Swap),
        }
    }
}

/// One atomic entry of a memory object.
#[derive(Debug, Default)]
pub(crate) struct Entry(AtomicU32);

impl Entry {
    pub(crate) fn load(&self) -> Place {
        // Acquire pairs with the Release of `store` and `replace`.
        Place::unpack(self.0.load(Ordering::Acquire))
    }

    /// Sets the entry; the caller holds the page lock of the frame that it names so far.
    pub(crate) fn store(&self, place: Place, _page: &LockedPage<'_>) {
        self.0.store(place.pack(), Ordering::Release);
    }

    /// Sets the entry if it is still `old`; the caller holds the page lock of the frame in `new`.
    pub(crate) fn replace(&self, old: Place, new: Place, _page: &LockedPage<'_>) -> bool {
        self.replace_frameless(old, new)
    }

    /// Sets the entry if it is still `old`, which is no frame; if `new` is one, its page lock is
    /// held by the caller.
    pub(crate) fn replace_frameless(&self, old: Place, new: Place) -> bool {
        self.0.compare_exchange(old.pack(), new.pack(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// Small leaves: a guest that touches one page here and one there costs little for each.
const LEAF_ENTRIES: usize = 64;
const MID_LEAVES: usize = 1024;

type Leaf = [Entry; LEAF_ENTRIES];
type Mid = [OnceLock<Box<Leaf>>; MID_LEAVES];

/// The pages of one memory object.
#[derive(Debug)]
pub(crate) struct ObjectPages {
    pub(crate) number: u16,
    pub(crate) bytes: u64,
    top: Box<[OnceLock<Box<Mid>>]>,
    /// From std under a model checker, too: it decides what is counted.
    watched: [AtomicU64; 2],
    /// Where a [dirty log](crate::DirtyLog) is kept.
    pub(crate) dirty: OnceLock<DirtyBits>,
}

impl ObjectPages {
    pub(crate) fn new(number: u16, bytes: u64) -> Self {
        let mids = (bytes / PAGE_SIZE_U64).div_ceil((LEAF_ENTRIES * MID_LEAVES) as u64);
        Self {
            number,
            bytes,
            top: (0..mids).map(|_| OnceLock::new()).collect(),
            watched: [const { AtomicU64::new(0) }; 2],
            dirty: OnceLock::new(),
        }
    }

    pub(crate) fn contains(&self, gfn: Gfn) -> bool {
        gfn.as_u64() < self.bytes / PAGE_SIZE_U64
    }

    pub(crate) fn owner(&self, gfn: Gfn) -> Owner {
        Owner { object: self.number, gfn }
    }

    /// Indices of the top, mid and leaf tables.
    fn indices(gfn: Gfn) -> Option<[usize; 3]> {
        let raw = usize::try_from(gfn.as_u64()).ok()?;
        let leaf = raw / LEAF_ENTRIES;
        Some([leaf / MID_LEAVES, leaf % MID_LEAVES, raw % LEAF_ENTRIES])
    }

    /// The entry of a page, making room for it; `None` outside the object.
    pub(crate) fn entry(&self, gfn: Gfn) -> Option<&Entry> {
        if !self.contains(gfn) {
            return None;
        }
        let [top, mid, leaf] = Self::indices(gfn)?;
        let mids =
            self.top.get(top)?.get_or_init(|| Box::new([const { OnceLock::new() }; MID_LEAVES]));
        let leaves = mids[mid].get_or_init(|| Box::new(std::array::from_fn(|_| Entry::default())));
        Some(&leaves[leaf])
    }

    /// The entry of a page, if any of its neighbourhood was ever touched.
    pub(crate) fn touched_entry(&self, gfn: Gfn) -> Option<&Entry> {
        if !self.contains(gfn) {
            return None;
        }
        let [top, mid, leaf] = Self::indices(gfn)?;
        Some(&self.top.get(top)?.get()?[mid].get()?[leaf])
    }

    /// The pages that may not be absent, in ascending order.
    pub(crate) fn touched(&self) -> impl Iterator<Item = (Gfn, &Entry)> {
        let mids = (0u64..).zip(&self.top).filter_map(|(at, mid)| Some((at, mid.get()?)));
        let leaves = mids.flat_map(|(top, mid)| {
            let first = top * MID_LEAVES as u64;
            (first..).zip(mid.iter()).filter_map(|(at, leaf)| Some((at, leaf.get()?)))
        });
        leaves.flat_map(|(leaf, entries)| {
            let first = leaf * LEAF_ENTRIES as u64;
            (first..).map(Gfn::new).zip(entries.iter())
        })
    }

    pub(crate) fn is_watched(&self, gfn: Gfn) -> bool {
        let [start, end] =
            [&self.watched[0], &self.watched[1]].map(|at| at.load(Ordering::Relaxed));
        (start..end).contains(&gfn.as_u64())
    }

    /// Notes that a page was written which no frame speaks for any more.
    pub(crate) fn note_written(&self, gfn: Gfn) {
        if let Some(bits) = self.dirty.get() {
            bits.set(gfn);
        }
    }

    /// Re-faults of these pages are counted separately from now on.
    pub(crate) fn watch(&self, first: Gfn, count: u64) {
        let end = first.as_u64().saturating_add(count);
        self.watched[0].store(first.as_u64(), Ordering::Relaxed);
        self.watched[1].store(end, Ordering::Relaxed);
    }
}

#[cfg(not(any(loom, shuttle)))]
const _: () = assert!(size_of::<Leaf>() == 256);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_packing() {
        let last_slot = SwapSlot::new(SwapSlot::MAX_SLOTS - 1).unwrap();
        for place in [
            Place::Absent,
            Place::Frame(Pfn::new(0)),
            Place::Frame(Pfn::new((1 << 30) - 1)),
            Place::Swap(SwapSlot::new(0).unwrap()),
            Place::Swap(last_slot),
            Place::Shared(SharedPage::new(0)),
            Place::Shared(SharedPage::new((1 << 30) - 2)),
        ] {
            assert_eq!(Place::unpack(place.pack()), place);
        }
    }
}
