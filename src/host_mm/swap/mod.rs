//! Swap: where the content of evicted pages goes.
//!
//! What this module guarantees:
//!
//! - a read returns exactly the 4096 bytes of the last write to that slot by that page, or an
//!   error: a torn, lost, corrupted or misdirected page never passes for content. Each slot has a
//!   checksum over the bytes, the slot number and the page that owns it ([`owner tag`]);
//! - a slot has at most one owner: it is handed out once and must be freed before it is handed out
//!   again, and freeing it twice is an error;
//! - no lock is held during I/O, and the tables take memory only for slots that were ever used.
//!
//! The lowest free slot is always taken first, so that a sparse swap file grows no larger than the
//! most pages ever in swap at once.
//!
//! [`owner tag`]: SwapSpace::write_page

mod backend;
mod checksum;
mod error;
#[cfg(feature = "lab")]
mod faulty;
mod file;
#[cfg(feature = "lab")]
pub(crate) mod injecting;
#[cfg(feature = "testing")]
mod memory;
mod slots;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::hooks::{SLOT_FREED, SLOT_TAKEN, SWAP_FULL};
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64};
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::sync::{Mutex, lock};

pub use backend::{Slot, SwapBackend};
pub use error::{SwapError, SwapOp, SwapOpenError};
#[cfg(feature = "lab")]
pub use faulty::{CorruptingBackend, FailingBackend};
pub use file::FileSwap;
#[cfg(feature = "testing")]
pub use memory::MemorySwap;

use checksum::Checksums;
use slots::SlotMap;

/// Reads of a page before its error counts: the guest ends for want of a page, so an error that
/// goes away by itself (the kernel was out of memory for a moment) should not. A write that failed
/// is repeated by reclaim.
const READ_ATTEMPTS: u32 = 3;

/// Where swap is and how large it may grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapConfig {
    /// Where to create a file, which gets no name; there must be nothing. Takes precedence over `dir`.
    pub path: Option<PathBuf>,
    /// The directory for the file; `None`: the system's ([`std::env::temp_dir`]).
    pub dir: Option<PathBuf>,
    /// Size in bytes; an incomplete page at the end is not used. 0 is no swap.
    pub bytes: u64,
}

impl SwapConfig {
    /// The number of slots.
    ///
    /// # Errors
    /// [`SwapOpenError::TooLarge`].
    pub fn slots(&self) -> Result<u32, SwapOpenError> {
        u32::try_from(self.bytes / PAGE_SIZE_U64)
            .ok()
            .filter(|&slots| slots <= Slot::MAX_SLOTS)
            .ok_or(SwapOpenError::TooLarge {
                bytes: self.bytes,
                max_bytes: u64::from(Slot::MAX_SLOTS) * PAGE_SIZE_U64,
            })
    }
}

/// Consecutive slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    first: Slot,
    len: u32,
}

impl SlotRun {
    /// The first slot.
    #[must_use]
    pub const fn first(self) -> Slot {
        self.first
    }

    /// How many; at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a run is never empty")]
    pub const fn len(self) -> u32 {
        self.len
    }

    /// All of them, in order.
    pub fn slots(self) -> impl ExactSizeIterator<Item = Slot> {
        let first = self.first.as_u32();
        (0..self.len as usize).map(move |i| Slot::at(first, i))
    }
}

/// What swap has done and holds, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapStats {
    /// Slots there are.
    pub slots: u32,
    /// Slots in use.
    pub used: u32,
    /// Pages read and found right.
    pub pages_read: u64,
    /// Pages written.
    pub pages_written: u64,
}

/// Slots for evicted pages on some [`SwapBackend`].
pub struct SwapSpace {
    backend: Box<dyn SwapBackend>,
    map: Mutex<SlotMap>,
    checksums: Checksums,
    pages_read: AtomicU64,
    pages_written: AtomicU64,
    lab: Lab,
}

impl std::fmt::Debug for SwapSpace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwapSpace").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl SwapSpace {
    /// Opens swap in a file.
    ///
    /// # Errors
    /// [`SwapError::Open`]; nothing is left behind then.
    pub(crate) fn open(config: &SwapConfig, lab: &Lab) -> Result<Self, SwapError> {
        let file = FileSwap::open(config)?;
        #[cfg(feature = "lab")]
        if lab.is_on() {
            return Ok(Self::new(injecting::on_file(file, lab), lab));
        }
        Ok(Self::new(Box::new(file), lab))
    }

    /// Swap on any back end. Slots beyond [`Slot::MAX_SLOTS`] are not used.
    #[must_use]
    pub(crate) fn new(backend: Box<dyn SwapBackend>, lab: &Lab) -> Self {
        let slots = backend.slots().min(Slot::MAX_SLOTS);
        #[cfg(feature = "lab")]
        let backend = injecting::around(backend, lab);
        Self {
            backend,
            map: Mutex::new(SlotMap::new(slots)),
            checksums: Checksums::new(slots),
            pages_read: AtomicU64::new(0),
            pages_written: AtomicU64::new(0),
            lab: lab.clone(),
        }
    }

    /// Takes the lowest free slot; `None` if swap is full.
    #[must_use = "a slot that is forgotten is never free again"]
    pub fn alloc(&self) -> Option<Slot> {
        self.alloc_run(1).map(SlotRun::first)
    }

    /// Takes the lowest free slot and those that follow it as far as they are free, at most `max`
    /// in all; `None` if swap is full (or `max` is 0). Each slot is freed by itself.
    #[must_use = "slots that are forgotten are never free again"]
    pub fn alloc_run(&self, max: u32) -> Option<SlotRun> {
        if max == 0 || self.lab.strikes(SWAP_FULL) {
            return None;
        }
        let mut map = lock(&self.map);
        let first = map.lowest_free()?;
        map.take(first);
        let mut len = 1;
        while len < max && map.is_free(first + len) {
            map.take(first + len);
            len += 1;
        }
        drop(map);
        self.lab.pause(SLOT_TAKEN);
        Some(SlotRun { first: Slot::at(first, 0), len })
    }

    /// As [`alloc`](Self::alloc), with the error that says why there is none.
    ///
    /// # Errors
    /// [`SwapError::Full`].
    pub fn try_alloc(&self) -> Result<Slot, SwapError> {
        self.alloc().ok_or(SwapError::Full { slots: self.slots() })
    }

    /// Writes a page to a slot that the caller has allocated. `owner_tag` identifies the page (for
    /// one object: its guest frame number): only a read with the same tag finds the content.
    ///
    /// # Errors
    /// [`SwapError::NoSpace`] and [`SwapError::Io`], after which the slot holds nothing until it is
    /// written again; [`SwapError::NotInUse`] for a slot that is free.
    pub fn write_page(
        &self,
        slot: Slot,
        owner_tag: u64,
        page: &[u8; PAGE_SIZE],
    ) -> Result<(), SwapError> {
        self.write_run(SlotRun { first: slot, len: 1 }, &[owner_tag], page)
    }

    /// Writes one page to each slot of a run in one operation. `pages` holds them in order, 4096
    /// bytes each, and `owner_tags` one tag each.
    ///
    /// # Errors
    /// As [`write_page`](Self::write_page), for all slots of the run;
    /// [`SwapError::WrongLength`] if there are not as many tags or pages as slots.
    pub fn write_run(
        &self,
        run: SlotRun,
        owner_tags: &[u64],
        pages: &[u8],
    ) -> Result<(), SwapError> {
        let count = run.len as usize;
        if owner_tags.len() != count || pages.len() != count * PAGE_SIZE {
            return Err(SwapError::WrongLength {
                slots: count,
                tags: owner_tags.len(),
                bytes: pages.len(),
            });
        }
        self.check_in_use(run)?;
        // A write that fails half-way must not leave the sum of what was there before: part of
        // the old content could be read as whole.
        for slot in run.slots() {
            self.checksums.forget(slot);
        }
        self.backend
            .write(run.first, pages)
            .map_err(|source| SwapError::from_io(SwapOp::Write, run.first, source))?;
        for ((slot, &tag), page) in run.slots().zip(owner_tags).zip(pages.chunks_exact(PAGE_SIZE)) {
            self.checksums.set(slot, checksum::of(slot, tag, page));
        }
        self.pages_written.fetch_add(u64::from(run.len), Ordering::Relaxed);
        Ok(())
    }

    /// Reads the page that was written to the slot with the same `owner_tag`.
    ///
    /// # Errors
    /// [`SwapError::Checksum`] if that is not what the slot holds, [`SwapError::Io`],
    /// [`SwapError::NotInUse`] for a slot that is free. `page` is then of no use.
    pub fn read_page(
        &self,
        slot: Slot,
        owner_tag: u64,
        page: &mut [u8; PAGE_SIZE],
    ) -> Result<(), SwapError> {
        self.check_in_use(SlotRun { first: slot, len: 1 })?;
        self.read_patiently(slot, page)
            .map_err(|source| SwapError::from_io(SwapOp::Read, slot, source))?;
        let found = checksum::of(slot, owner_tag, page);
        let expected = self.checksums.get(slot);
        if expected != Some(found) {
            return Err(SwapError::Checksum { slot, owner_tag, expected, found });
        }
        self.pages_read.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Gives what a slot holds another owner tag, without reading it: from now on only a read with
    /// `to_tag` finds it. If `from_tag` was not its tag, none does.
    ///
    /// # Errors
    /// [`SwapError::NotInUse`] for a slot that is free.
    pub fn rename(&self, slot: Slot, from_tag: u64, to_tag: u64) -> Result<(), SwapError> {
        self.check_in_use(SlotRun { first: slot, len: 1 })?;
        if let Some(checksum) = self.checksums.get(slot) {
            self.checksums.set(slot, checksum::renamed(checksum, from_tag, to_tag));
        }
        Ok(())
    }

    fn read_patiently(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        let mut attempt = 1;
        loop {
            match self.backend.read(slot, page) {
                Err(_) if attempt < READ_ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    /// Whether the slot was last written with this content by the page of this tag, as far as the
    /// checksum tells; nothing is read.
    #[must_use]
    pub fn matches(&self, slot: Slot, owner_tag: u64, page: &[u8; PAGE_SIZE]) -> bool {
        self.checksums.get(slot) == Some(checksum::of(slot, owner_tag, page))
    }

    /// Gives a slot back. Its content cannot be read any more.
    ///
    /// # Errors
    /// [`SwapError::NotInUse`] for a slot that is free: it was freed twice, or never allocated.
    pub fn free(&self, slot: Slot) -> Result<(), SwapError> {
        let mut map = lock(&self.map);
        if !map.is_used(slot.as_u32()) {
            return Err(SwapError::NotInUse { slot });
        }
        // Under the lock, before another owner can have the slot.
        self.checksums.forget(slot);
        map.release(slot.as_u32());
        drop(map);
        self.lab.pause(SLOT_FREED);
        Ok(())
    }

    /// Slots in use.
    #[must_use]
    pub fn used(&self) -> u32 {
        lock(&self.map).used()
    }

    /// Slots there are.
    #[must_use]
    pub fn slots(&self) -> u32 {
        lock(&self.map).slots()
    }

    /// Whether the back end keeps its pages in memory after all (a file on tmpfs): then swapping
    /// to it frees nothing.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        self.backend.is_in_memory()
    }

    /// Counters and usage.
    #[must_use]
    pub fn stats(&self) -> SwapStats {
        let map = lock(&self.map);
        SwapStats {
            slots: map.slots(),
            used: map.used(),
            pages_read: self.pages_read.load(Ordering::Relaxed),
            pages_written: self.pages_written.load(Ordering::Relaxed),
        }
    }

    fn check_in_use(&self, run: SlotRun) -> Result<(), SwapError> {
        let map = lock(&self.map);
        match run.slots().find(|slot| !map.is_used(slot.as_u32())) {
            Some(slot) => Err(SwapError::NotInUse { slot }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
