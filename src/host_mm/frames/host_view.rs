//! The host view: the frames' memory as the hypervisor itself sees it. Never zapped.
//!
//! Content is read and written only under the page lock, whose guard every access takes. Guests may
//! write the same memory meanwhile through their own view; accesses are volatile or atomic.
//!
//! Frames get their memory through the mapping alone, so that it never comes in huge pages
//! ([`small_pages`]). Where they are punched each time that they lose their page, the mapping is
//! populated by a call before it is written, and whole pages are read by calls on the file: a signal
//! says less than an error.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::backing::Backing;
use crate::error::MmError;
use gnomon_export_rmap::LockedPage;
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_sys::{memory, small_pages};

/// A page's bytes outside of any frame.
pub(crate) type PageBuf = [u8; PAGE_SIZE];

/// The memfd of all frames and the mapping of it.
#[derive(Clone, Debug)]
pub struct HostView {
    memfd: Arc<File>,
    region: Arc<MmapRegion>,
    /// Frames lose their memory with their page.
    punched: bool,
}

/// Maps the whole memfd, shared.
pub(crate) fn map(memfd: &File, bytes: u64) -> Result<MmapRegion, MmError> {
    let map = || {
        let region = small_pages::map(memfd.try_clone()?, bytes)?;
        memory::no_core_dump(&region)?;
        Ok(region)
    };
    map().map_err(|source| MmError::Host { what: "a mapping of the frames", source })
}

impl HostView {
    /// So many bytes; `punched` if frames lose their memory each time that they lose their page.
    pub(crate) fn new(bytes: u64, punched: bool) -> Result<Self, MmError> {
        let memfd = memory::create_memfd("gnomon-frames", bytes)
            .map_err(|source| MmError::Host { what: "a memfd for the frames", source })?;
        Self::of(memfd, bytes, punched)
    }

    fn of(memfd: File, bytes: u64, punched: bool) -> Result<Self, MmError> {
        let region = map(&memfd, bytes)?;
        Ok(Self { memfd: Arc::new(memfd), region: Arc::new(region), punched })
    }

    pub(crate) fn memfd(&self) -> &File {
        &self.memfd
    }

    #[cfg(all(feature = "testing", feature = "export-notifier"))]
    pub(crate) fn region(&self) -> &MmapRegion {
        &self.region
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.region.size() as u64
    }

    pub(crate) fn allocated_bytes(&self) -> Result<u64, MmError> {
        memory::allocated_bytes(&self.memfd)
            .map_err(|source| MmError::Host { what: "the size of the frames' memfd", source })
    }

    /// Copies bytes out of a page. `offset + buf.len()` must not exceed the page.
    pub(crate) fn read(
        &self,
        page: &LockedPage<'_>,
        offset: usize,
        buf: &mut [u8],
    ) -> Result<(), MmError> {
        let at = position(page, offset, buf.len())?;
        self.region.as_volatile_slice().read_slice(buf, at).map_err(|error| outside(page, &error))
    }

    /// Copies bytes into a page. The caller sets `DIRTY`.
    pub(crate) fn write(
        &self,
        page: &LockedPage<'_>,
        offset: usize,
        buf: &[u8],
    ) -> Result<(), MmError> {
        let at = position(page, offset, buf.len())?;
        self.region.as_volatile_slice().write_slice(buf, at).map_err(|error| outside(page, &error))
    }

    /// The aligned 64-bit word at byte `offset` of a page: an entry of a guest page table.
    pub(crate) fn word(&self, page: &LockedPage<'_>, offset: usize) -> Result<&AtomicU64, MmError> {
        let at = position(page, offset, size_of::<u64>())?;
        self.region.get_atomic_ref(at).map_err(|error| outside(page, &error))
    }
}

impl Backing for HostView {
    fn punch(&self, first: Pfn, count: u32) -> Result<(), MmError> {
        memory::punch_hole(&self.memfd, first.byte_offset(), u64::from(count) * PAGE_SIZE_U64)
            .map_err(|source| MmError::Host { what: "to punch frames out of the memfd", source })
    }

    fn is_hole(&self, pfn: Pfn) -> Result<bool, MmError> {
        memory::is_hole(&self.memfd, pfn.byte_offset())
            .map_err(|source| MmError::Host { what: "to look for a hole in the memfd", source })
    }

    fn content(&self, page: &LockedPage<'_>) -> Result<PageBuf, MmError> {
        let mut content = [0; PAGE_SIZE];
        if self.punched {
            let read = self.memfd.read_exact_at(&mut content, page.pfn().byte_offset());
            read.map_err(|source| MmError::Host { what: "to read a frame", source })?;
        } else {
            self.read(page, 0, &mut content)?;
        }
        Ok(content)
    }

    fn fill(&self, page: &LockedPage<'_>, content: &PageBuf) -> Result<(), MmError> {
        if self.punched {
            // A write to the file would cost a huge page where the host gives shared memory some.
            small_pages::populate(&self.region, page.pfn().index() * PAGE_SIZE, PAGE_SIZE)
                .map_err(|source| MmError::Host { what: "memory for a frame", source })?;
        }
        self.write(page, 0, content)
    }
}

fn position(page: &LockedPage<'_>, offset: usize, len: usize) -> Result<usize, MmError> {
    if offset.checked_add(len).is_none_or(|end| end > PAGE_SIZE) {
        return Err(outside(page, &format!("{len} bytes at offset {offset} leave the page")));
    }
    Ok(page.pfn().index() * PAGE_SIZE + offset)
}

fn outside(page: &LockedPage<'_>, why: &dyn std::fmt::Display) -> MmError {
    MmError::View { pfn: page.pfn(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gnomon_export_rmap::FrameTable;
    use gnomon_sys::generous::on_generous_tmpfs;

    /// Invariant I5 in bytes, where a write to the file would take 2 MiB.
    #[test]
    #[cfg_attr(
        not(huge_tmpfs),
        ignore = "no tmpfs of huge pages can be mounted here: that takes root and CONFIG_TRANSPARENT_HUGEPAGE"
    )]
    fn a_frame_takes_a_page_and_gives_it_back_on_a_generous_host() {
        const BYTES: u64 = 4 << 20;
        on_generous_tmpfs(BYTES, |file| {
            for punched in [false, true] {
                let view = HostView::of(file(), BYTES, punched).unwrap();
                let table = FrameTable::new(1024);
                for number in [0, 1, 600] {
                    let page = table.lock(Pfn::new(number));
                    view.fill(&page, &[7; PAGE_SIZE]).unwrap();
                    assert!(view.content(&page).unwrap() == [7; PAGE_SIZE]);
                }
                assert_eq!(view.allocated_bytes().unwrap(), 3 * PAGE_SIZE_U64);
                view.punch(Pfn::new(0), 2).unwrap();
                assert_eq!(view.allocated_bytes().unwrap(), PAGE_SIZE_U64);
            }
        });
    }
}
