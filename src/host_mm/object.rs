//! The memory object: a guest's memory as the host sees it, from guest frame to where the page is.
//!
//! Guarantee: an entry changes only under the page lock of the frame that it names or is about to
//! name, so whoever holds that lock and finds the entry pointing to the frame knows where the page
//! is until the lock is dropped.
//!
//! Sparse: 256 KiB of guest memory cost one leaf of 256 bytes once touched, and nothing before.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::addr::{Gfn, Gpa, PAGE_SIZE, Pfn, SwapSlot};
use crate::export_rmap::{LockedPage, Owner, PageFlags};
use crate::host_mm::commons::SharedPage;
use crate::host_mm::dirty_log::DirtyBits;
use crate::host_mm::fault::Intent;
use crate::host_mm::{HostMm, MmError, Placement, pages};
use crate::sync::lock;
use crate::sys::signal;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
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
pub(super) struct Entry(AtomicU32);

impl Entry {
    pub(super) fn load(&self) -> Place {
        // Acquire pairs with the Release of `store` and `replace`.
        Place::unpack(self.0.load(Ordering::Acquire))
    }

    /// Sets the entry; the caller holds the page lock of the frame that it names so far.
    pub(super) fn store(&self, place: Place, _page: &LockedPage<'_>) {
        self.0.store(place.pack(), Ordering::Release);
    }

    /// Sets the entry if it is still `old`; the caller holds the page lock of the frame in `new`.
    pub(super) fn replace(&self, old: Place, new: Place, _page: &LockedPage<'_>) -> bool {
        self.replace_frameless(old, new)
    }

    /// Sets the entry if it is still `old`, which is no frame; if `new` is one, its page lock is
    /// held by the caller.
    pub(super) fn replace_frameless(&self, old: Place, new: Place) -> bool {
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
pub(super) struct ObjectPages {
    pub(super) number: u16,
    pub(super) bytes: u64,
    top: Box<[OnceLock<Box<Mid>>]>,
    watched: [AtomicU64; 2],
    /// Where a [dirty log](crate::host_mm::DirtyLog) is kept.
    pub(super) dirty: OnceLock<DirtyBits>,
}

impl ObjectPages {
    pub(super) fn new(number: u16, bytes: u64) -> Self {
        let mids = pages(bytes).div_ceil((LEAF_ENTRIES * MID_LEAVES) as u64);
        Self {
            number,
            bytes,
            top: (0..mids).map(|_| OnceLock::new()).collect(),
            watched: [const { AtomicU64::new(0) }; 2],
            dirty: OnceLock::new(),
        }
    }

    pub(super) fn contains(&self, gfn: Gfn) -> bool {
        gfn.as_u64() < pages(self.bytes)
    }

    pub(super) fn owner(&self, gfn: Gfn) -> Owner {
        Owner { object: self.number, gfn }
    }

    /// Indices of the top, mid and leaf tables.
    fn indices(gfn: Gfn) -> Option<[usize; 3]> {
        let raw = usize::try_from(gfn.as_u64()).ok()?;
        let leaf = raw / LEAF_ENTRIES;
        Some([leaf / MID_LEAVES, leaf % MID_LEAVES, raw % LEAF_ENTRIES])
    }

    /// The entry of a page, making room for it; `None` outside the object.
    pub(super) fn entry(&self, gfn: Gfn) -> Option<&Entry> {
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
    pub(super) fn touched_entry(&self, gfn: Gfn) -> Option<&Entry> {
        if !self.contains(gfn) {
            return None;
        }
        let [top, mid, leaf] = Self::indices(gfn)?;
        Some(&self.top.get(top)?.get()?[mid].get()?[leaf])
    }

    /// The pages that may not be absent, in ascending order.
    pub(super) fn touched(&self) -> impl Iterator<Item = (Gfn, &Entry)> {
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

    pub(super) fn is_watched(&self, gfn: Gfn) -> bool {
        let [start, end] =
            [&self.watched[0], &self.watched[1]].map(|at| at.load(Ordering::Relaxed));
        (start..end).contains(&gfn.as_u64())
    }
}

/// A guest's memory. Dropping it gives back all its frames and swap slots; export clients must have
/// let go of them before. Once a [stop](signal::is_stop_asked) is asked for it gives back no more: all
/// of host memory is about to go.
#[derive(Debug)]
pub struct MemoryObject {
    pub(super) mm: Arc<HostMm>,
    pub(super) pages: Arc<ObjectPages>,
}

impl HostMm {
    /// A memory object of `memory_bytes` zero bytes. It takes up nothing until touched.
    ///
    /// # Errors
    /// [`MmError::TooManyObjects`] if there are 65,535 of them; [`MmError::FixedFrames`] for a second
    /// one, or one that is too large, with [`Placement::Identity`].
    pub fn create_object(
        self: &Arc<Self>,
        memory_bytes: u64,
    ) -> Result<Arc<MemoryObject>, MmError> {
        let mut numbers = lock(&self.object_numbers);
        if let Placement::Identity { guest_bytes } = self.config.placement {
            // Beside the commons.
            if self.objects.load().len() > 1 {
                self.require_any_frame("to have a second memory object")?;
            }
            if memory_bytes > guest_bytes {
                self.require_any_frame("to have a memory object larger than the memfd")?;
            }
        }
        let number = numbers.take().ok_or(MmError::TooManyObjects)?;
        let pages = Arc::new(ObjectPages::new(number, memory_bytes));
        let mut objects = self.objects.load().to_vec();
        // In order of their numbers: see `HostMm::candidate`.
        let at = objects.partition_point(|object| object.number < number);
        objects.insert(at, pages.clone());
        self.objects.store(objects);
        Ok(Arc::new(MemoryObject { mm: self.clone(), pages }))
    }
}

impl MemoryObject {
    /// Its number, as in [`Owner::object`].
    #[must_use]
    pub fn number(&self) -> u16 {
        self.pages.number
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages.bytes
    }

    /// The host memory that its frames come from.
    #[must_use]
    pub fn host_mm(&self) -> &Arc<HostMm> {
        &self.mm
    }

    /// Whether the guest frame is inside the object.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.pages.contains(gfn)
    }

    /// Counts re-faults of these guest frames separately from now on.
    pub fn watch(&self, first: Gfn, count: u64) {
        let end = first.as_u64().saturating_add(count);
        self.pages.watched[0].store(first.as_u64(), Ordering::Relaxed);
        self.pages.watched[1].store(end, Ordering::Relaxed);
    }

    /// The page's frame, brought in if need be, with its page lock held: nothing can invalidate it
    /// meanwhile. Note its [sequence](LockedPage::sequence) before unlocking if a mapping is to follow.
    ///
    /// The page may be [shared](Owner::is_shared): it must not be written, nor mapped writable.
    ///
    /// # Errors
    /// Outside the object, without a frame to be had, or when swap cannot be read.
    pub fn lock_page(&self, gfn: Gfn) -> Result<LockedPage<'_>, MmError> {
        self.mm.fault_in(&self.pages, gfn, Intent::Read)
    }

    /// As [`lock_page`](Self::lock_page), but this object's own: what was shared is copied first,
    /// and copies that are [lent](Self::lend_pages) are recalled.
    ///
    /// # Errors
    /// As [`lock_page`](Self::lock_page), and if clients could not give the page up.
    pub fn lock_page_for_write(&self, gfn: Gfn) -> Result<LockedPage<'_>, MmError> {
        let page = self.mm.fault_in(&self.pages, gfn, Intent::Write)?;
        self.mm.recall(&page)?;
        Ok(page)
    }

    /// The page's frame, locked, if it is in one and nobody holds its lock: never waits, brings
    /// nothing in.
    #[must_use]
    pub fn try_lock_resident(&self, gfn: Gfn) -> Option<LockedPage<'_>> {
        self.mm.try_lock_resident(&self.pages, gfn)
    }

    /// As [`lock_page_for_write`](Self::lock_page_for_write), but `None` where a page lock or a free
    /// frame would have to be waited for, or a shared page be copied. Reads swap if it must.
    ///
    /// # Errors
    /// When swap cannot be read.
    pub fn try_lock_page(&self, gfn: Gfn) -> Result<Option<LockedPage<'_>>, MmError> {
        self.mm.try_fault_in(&self.pages, gfn)
    }

    /// Whether the page is in swap at this moment. A hint: it may move at any time.
    #[must_use]
    pub fn is_in_swap(&self, gfn: Gfn) -> bool {
        self.pages.touched_entry(gfn).is_some_and(|entry| matches!(entry.load(), Place::Swap(_)))
    }

    /// Copies guest memory out. A page at a time: not atomic against the guest's own writes.
    ///
    /// # Errors
    /// As [`lock_page`](Self::lock_page).
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MmError> {
        let mut done = 0;
        for (gfn, offset, len) in self.split(gpa, buf.len())? {
            let page = self.lock_page(gfn)?;
            self.mm.view.read(&page, offset, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    /// Copies bytes into guest memory. A page at a time, as [`read`](Self::read).
    ///
    /// # Errors
    /// As [`lock_page`](Self::lock_page); pages before the failing one have been written.
    pub fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), MmError> {
        let mut done = 0;
        for (gfn, offset, len) in self.split(gpa, buf.len())? {
            let page = self.lock_page_for_write(gfn)?;
            self.mm.view.write(&page, offset, &buf[done..done + len])?;
            page.set_flags(PageFlags::BY_WRITE);
            done += len;
        }
        Ok(())
    }

    /// The aligned 64-bit word at `offset` of a locked page of this object. The guest may change it
    /// at the same time. Whoever writes it sets [`PageFlags::BY_WRITE`].
    ///
    /// # Errors
    /// [`MmError::View`] if the word leaves the page or is not aligned.
    pub fn word<'a>(
        &'a self,
        page: &LockedPage<'_>,
        offset: usize,
    ) -> Result<&'a AtomicU64, MmError> {
        self.mm.view.word(page, offset)
    }

    /// The bytes as (guest frame, offset in it, length); checked to lie inside the object.
    ///
    /// # Errors
    /// [`MmError::OutsideMemory`].
    pub fn split(
        &self,
        gpa: Gpa,
        len: usize,
    ) -> Result<impl Iterator<Item = (Gfn, usize, usize)> + use<>, MmError> {
        let bytes = len as u64;
        if gpa.checked_add(bytes).is_none_or(|end| end.as_u64() > self.pages.bytes) {
            return Err(MmError::OutsideMemory { gpa, len: bytes, memory_bytes: self.pages.bytes });
        }
        let (mut at, mut left) = (gpa.as_u64(), len);
        Ok(std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let offset = Gpa::new(at).page_offset();
            let chunk = left.min(PAGE_SIZE - offset);
            let gfn = Gpa::new(at).gfn();
            at += chunk as u64;
            left -= chunk;
            Some((gfn, offset, chunk))
        }))
    }
}

impl Drop for MemoryObject {
    fn drop(&mut self) {
        let pages = &self.pages;
        let touched = pages.touched().take_while(|_| !signal::is_stop_asked());
        touched.for_each(|(gfn, entry)| self.mm.discard_page(entry, pages.owner(gfn)));
        let mut numbers = lock(&self.mm.object_numbers);
        numbers.give_back(self.pages.number);
        let mut objects = self.mm.objects.load().to_vec();
        objects.retain(|pages| !Arc::ptr_eq(pages, &self.pages));
        self.mm.objects.store(objects);
    }
}

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
