//! Guest memory through an IOTLB, in the form that rust-vmm's crates take: `virtio-queue` walks its
//! rings and descriptors through this.
//!
//! Guarantee: a slice that is given out is an access in flight, and stays one as long as it lives, or
//! any slice that was made of it. So whatever a crate does with a slice, an invalidation of its page
//! either comes before and the slice is not made, or waits in its flush until the slice is gone.
//!
//! `vm_memory` gives each slice a "bitmap" that hears of writes and is cloned with the slice: that is
//! where the access in flight sits ([`Pin`]). That a page was written need not be heard: an access
//! that may write is in the dirty state from its beginning.
//!
//! One slice at a time: somebody who keeps one and asks for the next could wait for a page lock whose
//! holder waits for the first. `vm_memory`'s [`Bytes`](vm_memory::Bytes) take them one by one, and
//! debug builds check the order of locks. What collects slices (`virtio_queue::Reader`, `Writer`) must
//! not be used on this.

use std::iter::FusedIterator;
use std::rc::Rc;

use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::addr::{Gfn, Gpa};
use crate::host_mm::MmError;
use crate::sys::slice;

use super::memory::{Iotlb, PageAccess};
use crate::export_rmap::in_flight::DeviceAccess;

/// What a slice keeps in flight.
#[derive(Clone, Debug)]
pub struct Pin<'a> {
    /// Read by nobody: what counts is when the last of them goes.
    _access: Option<Rc<PageAccess<'a>>>,
}

impl<'a> WithBitmapSlice<'a> for Pin<'_> {
    type S = Self;
}

impl BitmapSlice for Pin<'_> {}

impl Bitmap for Pin<'_> {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> Self {
        self.clone()
    }
}

/// Stands for the bitmap of all memory, which there is none of.
#[derive(Debug)]
pub struct Pins;

impl<'a> WithBitmapSlice<'a> for Pins {
    type S = Pin<'a>;
}

impl Bitmap for Pins {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) -> Pin<'_> {
        Pin { _access: None }
    }
}

/// The pages of a range, one by one.
struct Slices<'a, I> {
    iotlb: &'a Iotlb,
    /// Guest frame, offset in it, length.
    parts: I,
    access: DeviceAccess,
    has_failed: bool,
}

impl<'a, I: Iterator<Item = (Gfn, usize, usize)>> Iterator for Slices<'a, I> {
    type Item = Result<VolatileSlice<'a, Pin<'a>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_failed {
            return None;
        }
        let (gfn, offset, len) = self.parts.next()?;
        let slice = self.iotlb.begin(gfn, self.access).map_err(of_memory).and_then(|access| {
            let bytes = access.page().subslice(offset, len)?;
            access.dawdle();
            Ok(slice::carrying(bytes, Pin { _access: Some(Rc::new(access)) }))
        });
        self.has_failed = slice.is_err();
        Some(slice)
    }
}

impl<I: Iterator<Item = (Gfn, usize, usize)>> FusedIterator for Slices<'_, I> {}

impl<'a, I: Iterator<Item = (Gfn, usize, usize)>> GuestMemorySliceIterator<'a, Pin<'a>>
    for Slices<'a, I>
{
}

fn of_memory(error: MmError) -> Error {
    match error {
        MmError::OutsideMemory { gpa, .. } => {
            Error::InvalidGuestAddress(GuestAddress(gpa.as_u64()))
        }
        other => Error::IOError(std::io::Error::other(other)),
    }
}

impl GuestMemory for Iotlb {
    /// Not to be had: there is no way around the translation.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = Pins;

    /// Whether it is guest memory: all of that may be read and written.
    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        let end = u64::try_from(count).ok().and_then(|count| addr.0.checked_add(count));
        end.is_some_and(|end| end <= self.bytes())
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let parts = self.split(Gpa::new(addr.0), count).map_err(of_memory)?;
        let access = if access.has_write() { DeviceAccess::Write } else { DeviceAccess::Read };
        Ok(Slices { iotlb: self, parts, access, has_failed: false })
    }
}
