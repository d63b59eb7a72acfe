//! Memory that several mappings share, and the calls that revoke a part of one mapping.
//!
//! Guarantee: [`discard`] and [`discard_scattered`] end every use that page tables (this process's,
//! and KVM's for the guests that run on the region) make of the given part of the region, before
//! they return, and lose no content. They refuse the mappings for which that would not hold.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::PAGE_SIZE;
#[cfg(feature = "testing")]
use crate::recording;

/// Ranges handed to the kernel in one vectored call. The kernel's limit is 1024; 512 keeps the
/// array at 8 KiB of stack.
const RANGES_PER_CALL: usize = 512;
/// 64-bit words of a page.
pub const PAGE_WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Why memory could not be mapped, with the kernel's error as it is: whoever looks for a limit of the
/// host behind it asks for its errno, which is not among the causes of vm-memory's error.
#[must_use]
pub fn mapping_error(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}

/// Makes a file of `bytes` zero bytes that lives in memory only, takes none of it until it is
/// written, and can neither shrink nor grow: no page of a mapping of it lies past the end (SIGBUS).
///
/// # Errors
///
/// `EMFILE` or `ENFILE` without a free descriptor, `ENOSYS` where the kernel has no memfd, `EFBIG`
/// for a size that no file can have.
pub fn create_memfd(name: &str, bytes: u64) -> io::Result<File> {
    let sealable = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // Hosts that forbid executable memfds (vm.memfd_noexec=2) insist on the flag; kernels before
    // 6.3 do not know it.
    let no_exec = sealable | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    let descriptor = match memfd_create(name, no_exec) {
        Err(Errno::EINVAL) => memfd_create(name, sealable),
        other => other,
    }?;
    let file = File::from(descriptor);
    file.set_len(bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Gives the memory (or disk blocks) behind a part of a file back to the host; it reads as zeros
/// afterwards, through every mapping. `offset` and `len` are in bytes; only whole pages inside are
/// freed, the rest is zeroed.
///
/// # Errors
///
/// `EOPNOTSUPP` where the file system has no holes, `EINVAL` for a `len` of 0 or beyond `i64`.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    let len = i64::try_from(len).map_err(|_| Errno::EINVAL)?;
    loop {
        match fallocate(file, mode, offset, len) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Whether there is nothing behind the file at byte `offset`: a hole, or past its end.
///
/// # Errors
///
/// `EINVAL` for an offset beyond `i64`; otherwise as `lseek`.
pub fn is_hole(file: &File, offset: u64) -> io::Result<bool> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    match lseek(file, offset, Whence::SeekData) {
        Ok(data) => Ok(data != offset),
        Err(Errno::ENXIO) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Bytes of memory (or disk) that a file takes up, holes not counted.
///
/// # Errors
///
/// As `fstat`.
pub fn allocated_bytes(file: &File) -> io::Result<u64> {
    // st_blocks counts 512 bytes whatever the file system's block size.
    Ok(file.metadata()?.blocks() * 512)
}

/// Copies what was ever touched of a region to one of the same size, which is still all zero: both
/// are whole files that live in memory only. What was not touched costs nothing, in either.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] if one is no mapping of a file, or their sizes differ; otherwise
/// the errno of `lseek`.
pub fn copy_touched(from: &MmapRegion, to: &MmapRegion) -> io::Result<()> {
    let file = from.file_offset().filter(|_| from.size() == to.size());
    let file = file.ok_or(io::ErrorKind::InvalidInput)?.file();
    let seek = |at: usize, whence| -> io::Result<Option<usize>> {
        match lseek(file, i64::try_from(at).map_err(|_| Errno::EINVAL)?, whence) {
            // No more data.
            Err(Errno::ENXIO) => Ok(None),
            found => Ok(usize::try_from(found?).ok()),
        }
    };
    let mut at = 0;
    while let Some(start) = seek(at, Whence::SeekData)? {
        let end = seek(start, Whence::SeekHole)?.unwrap_or(from.size()).min(from.size());
        let outside =
            |error: vm_memory::volatile_memory::Error| io::Error::other(error.to_string());
        let source = from.as_volatile_slice().subslice(start, end - start).map_err(outside)?;
        let target = to.as_volatile_slice().subslice(start, end - start).map_err(outside)?;
        source.copy_to_volatile_slice(target);
        at = end;
    }
    Ok(())
}

/// Drops the page-table entries of `len` bytes at byte `offset` of the region: when it returns, no
/// CPU and no vCPU uses them. The content stays in the file; the next touch maps it again.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] if the range is not whole pages inside the region, or the region
/// is not a shared file mapping (whose content would be lost); otherwise the errno of `madvise`.
pub fn discard(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    check_shared(region)?;
    check_range(region, offset, len)?;
    advise(region, offset, len, libc::MADV_DONTNEED)
}

/// Takes the content of `len` bytes at byte `offset` of the region away from everybody who maps the
/// file: it is zeros from then on. The range's userfaultfd, if it has one, is told first.
///
/// # Errors
/// As [`discard`].
pub fn remove(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    check_shared(region)?;
    check_range(region, offset, len)?;
    advise(region, offset, len, libc::MADV_REMOVE)
}

/// [`discard`] for many ranges of (byte offset, bytes) at once, in as few calls as the kernel
/// allows. Neighbours in the list that touch become one range: ascending order is the cheapest.
///
/// # Errors
///
/// As [`discard`]. All ranges are checked before the first is dropped; if the kernel fails later, a
/// part of them has been dropped, and the caller must take all of them as still in use.
pub fn discard_scattered(
    region: &MmapRegion,
    ranges: &[(usize, usize)],
    support: &ProcessMadvise,
) -> io::Result<()> {
    check_shared(region)?;
    for &(offset, len) in ranges {
        check_range(region, offset, len)?;
    }
    let mut batch = Batch::new(region, support);
    for &(offset, len) in ranges {
        batch.push(offset, len)?;
    }
    batch.flush()
}

/// The page at byte `offset` of the region as atomic words, of which others may be at work: in other
/// mappings of it, other processes or a guest's page-table walk. `None` if it is not a whole page
/// inside the region.
#[must_use]
pub fn page_words(region: &MmapRegion, offset: usize) -> Option<&[AtomicU64; PAGE_WORDS]> {
    check_range(region, offset, PAGE_SIZE).ok()?;
    let page = region.as_ptr().wrapping_add(offset).cast::<[AtomicU64; PAGE_WORDS]>();
    // SAFETY:
    // 1. The range lies inside the region (just checked), which the borrow keeps mapped.
    // 2. A page is aligned for u64: the region begins at a page, and so does the range.
    // 3. Atomics may change under a shared reference, and every u64 is one. The region is handed
    //    out through raw pointers and volatile accesses alone, never as a reference to plain memory.
    Some(unsafe { &*page })
}

/// Leaves the region out of core dumps: what a guest has in its memory is not for the disk, and writing
/// a large one takes as long as it is large, holes included.
///
/// # Errors
///
/// The errno of `madvise`.
pub fn no_core_dump(region: &MmapRegion) -> io::Result<()> {
    advise(region, 0, region.size(), libc::MADV_DONTDUMP)
}

/// Whether the kernel drops many ranges of this process in one `process_madvise` (Linux 6.13 and
/// later).
#[derive(Debug)]
pub struct ProcessMadvise {
    /// Descriptor of this process; `None` where the kernel refuses the call.
    this_process: Option<OwnedFd>,
}

impl ProcessMadvise {
    /// Asks the kernel, by dropping a page of its own and looking at the result. A refusal (no such
    /// call, not this advice, or a seccomp filter) means that [`discard_scattered`] does one
    /// `madvise` a range.
    #[must_use]
    pub fn probe() -> Self {
        Self { this_process: open_this_process().ok().filter(|fd| works(fd).unwrap_or(false)) }
    }

    /// For tests and comparisons: behave as on a kernel without the call.
    #[must_use]
    pub const fn unsupported() -> Self {
        Self { this_process: None }
    }

    /// Whether the vectored call is used.
    #[must_use]
    pub const fn is_supported(&self) -> bool {
        self.this_process.is_some()
    }
}

fn open_this_process() -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the call above succeeded, so this is a new descriptor (close-on-exec) that nothing
    // else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Writes to a private page, drops it with `process_madvise`, and sees whether it is zero again.
fn works(this_process: &OwnedFd) -> io::Result<bool> {
    use vm_memory::{Bytes, VolatileMemory};

    let page = MmapRegion::<()>::new(PAGE_SIZE).map_err(io::Error::other)?;
    let slice = page.as_volatile_slice();
    slice.write_obj(0xa5_u8, 0).map_err(io::Error::other)?;
    let vector = [libc::iovec { iov_base: page.as_ptr().cast(), iov_len: PAGE_SIZE }];
    // SAFETY: dropping loses the page's content, and nothing but this function knows the page.
    let dropped = unsafe { process_madvise(this_process, &vector) }?;
    let byte: u8 = slice.read_obj(0).map_err(io::Error::other)?;
    Ok(dropped == PAGE_SIZE && byte == 0)
}

/// `process_madvise(MADV_DONTNEED)`; returns the bytes that were dropped, from the first range on.
///
/// # Safety
///
/// Each range lies in a mapping of this process that stays mapped during the call, and whose users
/// expect its content to be dropped (private) or cannot notice (shared file mappings).
unsafe fn process_madvise(this_process: &OwnedFd, ranges: &[libc::iovec]) -> Result<usize, Errno> {
    // SAFETY: the vector is valid for reads for its length, and the kernel only reads it; what
    // happens to the ranges is this function's contract.
    let bytes = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            this_process.as_raw_fd(),
            ranges.as_ptr(),
            ranges.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    usize::try_from(Errno::result(bytes)?).map_err(|_| Errno::EIO)
}

/// Ranges collected for one vectored call. They were checked against the region.
struct Batch<'a> {
    region: &'a MmapRegion,
    support: &'a ProcessMadvise,
    ranges: [(usize, usize); RANGES_PER_CALL],
    count: usize,
}

impl<'a> Batch<'a> {
    const fn new(region: &'a MmapRegion, support: &'a ProcessMadvise) -> Self {
        Self { region, support, ranges: [(0, 0); RANGES_PER_CALL], count: 0 }
    }

    fn push(&mut self, offset: usize, len: usize) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        if let Some(last) = self.ranges[..self.count].last_mut()
            && last.0 + last.1 == offset
        {
            last.1 += len;
            return Ok(());
        }
        if self.count == RANGES_PER_CALL {
            self.flush()?;
        }
        self.ranges[self.count] = (offset, len);
        self.count += 1;
        Ok(())
    }

    /// Drops what was collected.
    fn flush(&mut self) -> io::Result<()> {
        let mut rest = &mut self.ranges[..self.count];
        self.count = 0;
        if let Some(this_process) = &self.support.this_process
            && rest.len() > 1
        {
            // One call handles at most 2 GiB less a page, and may stop earlier: go on where it
            // stopped. No progress or an error: the loop below repeats the range alone, and has the
            // errno that counts.
            while !rest.is_empty() {
                match vectored(self.region, this_process, rest) {
                    Ok(bytes) if bytes > 0 => rest = without_first(rest, bytes),
                    _ => break,
                }
            }
        }
        for &mut (offset, len) in rest {
            advise(self.region, offset, len, libc::MADV_DONTNEED)?;
        }
        Ok(())
    }
}

/// One `process_madvise` over checked ranges of a shared region; returns the bytes done.
fn vectored(
    region: &MmapRegion,
    this_process: &OwnedFd,
    ranges: &[(usize, usize)],
) -> Result<usize, Errno> {
    #[cfg(feature = "testing")]
    {
        let base = region.as_ptr().addr();
        let noted = ranges.iter().map(|&(offset, len)| recording::note(base + offset, len));
        if let Some(noted) = noted.collect::<Option<Result<(), Errno>>>() {
            return noted.map(|()| ranges.iter().map(|&(_, len)| len).sum());
        }
    }
    let mut vector = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; RANGES_PER_CALL];
    for (slot, &(offset, len)) in vector.iter_mut().zip(ranges) {
        *slot = libc::iovec { iov_base: region.as_ptr().wrapping_add(offset).cast(), iov_len: len };
    }
    // SAFETY: each range lies inside the region (checked when it was collected), which the borrow
    // keeps mapped. It is a shared file mapping (checked likewise), so a dropped page is read back
    // from the file with the same content.
    unsafe { process_madvise(this_process, &vector[..ranges.len().min(RANGES_PER_CALL)]) }
}

/// The ranges that remain after the first `done` bytes of them were handled.
fn without_first(mut ranges: &mut [(usize, usize)], mut done: usize) -> &mut [(usize, usize)] {
    while let Some(&mut (offset, len)) = ranges.first_mut() {
        if done < len {
            ranges[0] = (offset + done, len - done);
            break;
        }
        done -= len;
        ranges = &mut ranges[1..];
    }
    ranges
}

/// `madvise` on a checked range. The advice keeps the content of the mappings that it is used on.
pub(super) fn advise(
    region: &MmapRegion,
    offset: usize,
    len: usize,
    advice: i32,
) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    #[cfg(feature = "testing")]
    if advice == libc::MADV_DONTNEED
        && let Some(noted) = recording::note(region.as_ptr().addr() + offset, len)
    {
        return Ok(noted?);
    }
    // SAFETY:
    // 1. The range lies inside the region (callers checked it), which the borrow keeps mapped.
    // 2. MADV_NOHUGEPAGE, MADV_POPULATE_WRITE and MADV_DONTDUMP change no content.
    // 3. MADV_DONTNEED is used only on shared file mappings (callers called `check_shared`): it
    //    drops page-table entries and leaves the file's pages, so the next access finds the same
    //    bytes. Not even an access at the same time, by a Rust reference or a vCPU, can tell; it
    //    takes a fault and continues.
    // 4. MADV_REMOVE, on shared file mappings too, makes the content zeros, as a write by anybody who
    //    maps the file would: accesses are volatile or atomic.
    let result = unsafe { libc::madvise(region.as_ptr().wrapping_add(offset).cast(), len, advice) };
    Errno::result(result)?;
    Ok(())
}

fn check_shared(region: &MmapRegion) -> io::Result<()> {
    if region.flags() & libc::MAP_SHARED == 0 || region.file_offset().is_none() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "only a shared file mapping keeps its content when it is discarded",
        ));
    }
    Ok(())
}

pub(super) fn check_range(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    let inside = offset.checked_add(len).is_some_and(|end| end <= region.size());
    if !inside || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{len:#x} bytes at offset {offset:#x} are not whole pages of a region of {:#x} bytes",
                region.size()
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
