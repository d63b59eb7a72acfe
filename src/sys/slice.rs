//! A slice of memory that carries something with it.

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The same bytes, with `bitmap` as what hears of writes, and what lives as long as the slice and
/// every slice that is made of it. (`vm-memory` itself has this for its own memories alone.)
pub fn carrying<B: BitmapSlice>(slice: VolatileSlice<'_>, bitmap: B) -> VolatileSlice<'_, B> {
    let bytes = slice.len();
    // SAFETY: the address and the length are those of a slice, whose memory is valid for its
    // lifetime, which the result has, too. It was made without a mapping to look after
    // (`MmapInfo` is of Xen's memory alone), so there is none to hand on.
    unsafe { VolatileSlice::with_bitmap(slice.ptr_guard_mut().as_ptr(), bytes, bitmap, None) }
}
