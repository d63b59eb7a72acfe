//! The memory object: a guest's memory as the host sees it.
//!
//! Guarantee: a page that was locked through it is in its frame, and is what it was, until the lock is
//! dropped; one that was locked to be written is the object's own, and no copy of it is out.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::MmError;
use crate::fault::Intent;
use crate::frames::placement::Placement;
use crate::memory::HostMm;
use crate::object::pages::{ObjectPages, Place};
use gnomon_export_rmap::addr::{Gfn, Gpa, PAGE_SIZE};
use gnomon_export_rmap::sync::lock;
use gnomon_export_rmap::{LockedPage, PageFlags};
use gnomon_sys::signal;

/// A guest's memory. Dropping it gives back all its frames and swap slots; export clients must have
/// let go of them before. Once a [stop](signal::is_stop_asked) is asked for it gives back no more: all
/// of host memory is about to go.
///
/// ```
/// use gnomon_export_rmap::addr::{Gfn, Gpa};
/// use gnomon_host_mm::{HostMemory, HostMmConfig};
///
/// # fn main() -> Result<(), gnomon_host_mm::MmError> {
/// let mm = HostMemory::new(HostMmConfig::new(8 << 20))?;
/// let guest = mm.create_object(1 << 30)?;
/// guest.write(Gpa::new(0x1ffe), b"over a border")?;
/// // Both share each page until one of them writes it.
/// let clone = guest.copy_on_write_clone()?;
/// clone.write(Gpa::new(0x1ffe), b"OVER")?;
/// let mut bytes = [0; 13];
/// clone.read(Gpa::new(0x1ffe), &mut bytes)?;
/// assert_eq!(&bytes, b"OVER a border");
/// guest.read(Gpa::new(0x1ffe), &mut bytes)?;
/// assert_eq!(&bytes, b"over a border");
/// // What the guest gives back (a balloon) is zero from then on.
/// assert_eq!(guest.free_pages(Gfn::new(1), 1)?, 1);
/// guest.read(Gpa::new(0x1ffe), &mut bytes)?;
/// assert_eq!(&bytes, b"\0\0er a border");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct MemoryObject {
    pub(crate) mm: Arc<HostMm>,
    pub(crate) pages: Arc<ObjectPages>,
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
        if let Placement::Identity { guest_bytes } = self.pager.config.placement {
            // Beside the commons.
            if self.pager.objects.load().len() > 1 {
                self.pager.require_any_frame("to have a second memory object")?;
            }
            if memory_bytes > guest_bytes {
                self.pager.require_any_frame("to have a memory object larger than the memfd")?;
            }
        }
        let number = numbers.take().ok_or(MmError::TooManyObjects)?;
        let pages = Arc::new(ObjectPages::new(number, memory_bytes));
        let mut objects = self.pager.objects.load().to_vec();
        // In order of their numbers: see `Books::candidate`.
        let at = objects.partition_point(|object| object.number < number);
        objects.insert(at, pages.clone());
        self.pager.objects.store(objects);
        Ok(Arc::new(MemoryObject { mm: self.clone(), pages }))
    }
}

impl MemoryObject {
    /// Its number, as in [`Owner::object`](gnomon_export_rmap::Owner::object).
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
        self.pages.watch(first, count);
    }

    /// The page's frame, brought in if need be, with its page lock held: nothing can invalidate it
    /// meanwhile. Note its [sequence](LockedPage::sequence) before unlocking if a mapping is to follow.
    ///
    /// The page may be [shared](gnomon_export_rmap::Owner::is_shared): it must not be written,
    /// nor mapped writable.
    ///
    /// # Errors
    /// Outside the object, without a frame to be had, or when swap cannot be read.
    pub fn lock_page(&self, gfn: Gfn) -> Result<LockedPage<'_>, MmError> {
        self.mm.pager.fault_in(&self.pages, gfn, Intent::Read)
    }

    /// As [`lock_page`](Self::lock_page), but this object's own: what was shared is copied first,
    /// and copies that are [lent](Self::lend_pages) are recalled.
    ///
    /// # Errors
    /// As [`lock_page`](Self::lock_page), and if clients could not give the page up.
    pub fn lock_page_for_write(&self, gfn: Gfn) -> Result<LockedPage<'_>, MmError> {
        self.mm.pager.lock_for_write(&self.pages, gfn)
    }

    /// The page's frame, locked, if it is in one and nobody holds its lock: never waits, brings
    /// nothing in.
    #[must_use]
    pub fn try_lock_resident(&self, gfn: Gfn) -> Option<LockedPage<'_>> {
        self.mm.pager.try_lock_resident(&self.pages, gfn)
    }

    /// As [`lock_page_for_write`](Self::lock_page_for_write), but `None` where a page lock or a free
    /// frame would have to be waited for, or a shared page be copied. Reads swap if it must.
    ///
    /// # Errors
    /// When swap cannot be read.
    pub fn try_lock_page(&self, gfn: Gfn) -> Result<Option<LockedPage<'_>>, MmError> {
        self.mm.pager.try_fault_in(&self.pages, gfn)
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
            self.mm.pager.view.read(&page, offset, &mut buf[done..done + len])?;
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
            self.mm.pager.view.write(&page, offset, &buf[done..done + len])?;
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
        self.mm.pager.view.word(page, offset)
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
        touched.for_each(|(gfn, entry)| self.mm.pager.discard_page(entry, pages.owner(gfn)));
        let mut numbers = lock(&self.mm.object_numbers);
        numbers.give_back(self.pages.number);
        let mut objects = self.mm.pager.objects.load().to_vec();
        objects.retain(|pages| !Arc::ptr_eq(pages, &self.pages));
        self.mm.pager.objects.store(objects);
    }
}
