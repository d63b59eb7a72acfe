//! Memory of memfds that never comes in huge pages, whatever the host's settings for shared memory
//! (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` and those of each size).
//!
//! Guarantee: a page that a memfd gets through a mapping that [`map`] made costs a page of memory,
//! and punching it gives that page back. The advice of the mapping is what gives it: the kernel
//! asks for it whenever a page is missing there, before any setting. It asks for nothing where a page
//! is missing in a call on the file itself (`write`, `fallocate`): with `always`, `within_size` or
//! `force` one byte written so takes 2 MiB, and punching a part of those frees nothing. So the rule for
//! every memfd is: pages come to it through such a mapping, and calls on the file only read and punch.
//!
//! [`PageCost::measure`] tries it.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::memory::{
    advise, allocated_bytes, check_range, create_memfd, mapping_error, punch_hole,
};
use crate::{PAGE_SIZE, PAGE_SIZE_U64};

/// Size of the file that is tried: two huge pages of a page-table entry each.
const TRIED_BYTES: u64 = 4 << 20;

/// Maps the first `bytes` bytes of a file that lives in memory only, shared.
///
/// # Errors
///
/// The errno of `mmap` or `madvise`.
pub fn map(file: File, bytes: u64) -> io::Result<MmapRegion> {
    let bytes = usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?;
    let region = MmapRegion::from_file(FileOffset::new(file, 0), bytes).map_err(mapping_error)?;
    match advise(&region, 0, region.size(), libc::MADV_NOHUGEPAGE) {
        // A kernel without huge pages.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        other => other?,
    }
    Ok(region)
}

/// Brings in what is missing of `len` bytes at byte `offset` of the region, so that writing there
/// cannot fail, which would be a signal. Kernels before 5.14 cannot: there it does nothing.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] if the range is not whole pages inside the region; `ENOMEM` or
/// `EFAULT` if there is no memory for it.
pub fn populate(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    check_range(region, offset, len)?;
    loop {
        match advise(region, offset, len, libc::MADV_POPULATE_WRITE) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            other => return other,
        }
    }
}

/// Brings the first page of the region in and writes to it, as frames are filled. The write is what
/// counts where `populate` can do nothing.
fn fill_first_page(
    region: &MmapRegion,
    populate: impl FnOnce(&MmapRegion, usize, usize) -> io::Result<()>,
) -> io::Result<()> {
    populate(region, 0, PAGE_SIZE)?;
    region.as_volatile_slice().write_obj(1_u8, 0).map_err(io::Error::other)
}

/// What one page costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCost {
    /// Bytes of memory that a file takes up with a page written.
    pub taken_bytes: u64,
    /// Bytes that it takes up when the page was punched.
    pub left_bytes: u64,
}

impl PageCost {
    /// As it has to be.
    pub const RIGHT: Self = Self { taken_bytes: PAGE_SIZE_U64, left_bytes: 0 };

    /// Tries it with a memfd of its own.
    ///
    /// # Errors
    ///
    /// The errno of whatever the host refused.
    pub fn measure() -> io::Result<Self> {
        let file = create_memfd("gnomon-page-cost", TRIED_BYTES)?;
        let region = map(file.try_clone()?, TRIED_BYTES)?;
        Self::of(&file, || fill_first_page(&region, populate))
    }

    /// With `write`, which is to write to the first page of the file, or populate it.
    fn of(file: &File, write: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        write()?;
        let taken_bytes = allocated_bytes(file)?;
        punch_hole(file, 0, PAGE_SIZE_U64)?;
        Ok(Self { taken_bytes, left_bytes: allocated_bytes(file)? })
    }
}

#[cfg(test)]
#[path = "small_pages_tests.rs"]
mod tests;
