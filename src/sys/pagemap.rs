//! What the kernel's page tables map of this process's memory: `/proc/self/pagemap`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::MmapRegion;

use crate::addr::PAGE_SIZE;

/// Bytes of an entry.
const ENTRY_BYTES: usize = size_of::<u64>();

/// What is mapped of a page (admin-guide/mm/pagemap.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped(u64);

impl Mapped {
    const PRESENT: u64 = 1 << 63;
    const PROTECTED: u64 = 1 << 57;

    /// Whether it is mapped at all.
    #[must_use]
    pub fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Whether a userfaultfd keeps it from being written.
    #[must_use]
    pub fn is_protected(self) -> bool {
        self.0 & Self::PROTECTED != 0
    }
}

/// The file, opened.
///
/// # Errors
/// As `open`.
pub fn file() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// What is mapped of one page of the region.
///
/// # Errors
/// As `pread`.
pub fn entry(file: &File, region: &MmapRegion, page: u64) -> io::Result<Mapped> {
    let mut entry = [0; ENTRY_BYTES];
    file.read_exact_at(&mut entry, offset(region, page))?;
    Ok(Mapped(u64::from_ne_bytes(entry)))
}

fn offset(region: &MmapRegion, page: u64) -> u64 {
    ((region.as_ptr().addr() / PAGE_SIZE) as u64 + page) * ENTRY_BYTES as u64
}

/// The file, opened, with room for many entries: a call a page would cost a hundred times more.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    bytes: Vec<u8>,
}

impl Pagemap {
    /// For up to `pages` pages at a time.
    ///
    /// # Errors
    /// As `open`.
    pub fn open(pages: usize) -> io::Result<Self> {
        Ok(Self { file: file()?, bytes: vec![0; pages * ENTRY_BYTES] })
    }

    /// What is mapped of up to `count` pages of the region from page `first` on, in order; fewer if
    /// there is no room for so many.
    ///
    /// # Errors
    /// As `pread`.
    pub fn read(
        &mut self,
        region: &MmapRegion,
        first: u64,
        count: u64,
    ) -> io::Result<impl Iterator<Item = Mapped>> {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let len = count.saturating_mul(ENTRY_BYTES).min(self.bytes.len());
        let bytes = &mut self.bytes[..len];
        self.file.read_exact_at(bytes, offset(region, first))?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        Ok(entries.iter().map(|&entry| Mapped(u64::from_ne_bytes(entry))))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;

    #[test]
    fn what_was_touched_is_mapped_and_the_rest_is_not() {
        let bytes = 300 * PAGE_SIZE as u64;
        let file = crate::sys::memory::create_memfd("gnomon-test", bytes).unwrap();
        let region = crate::sys::small_pages::map(file, bytes).unwrap();
        for page in [0, 130, 299] {
            region.as_volatile_slice().write_obj(1u8, page * PAGE_SIZE).unwrap();
        }
        let mut pagemap = Pagemap::open(128).unwrap();
        let mut mapped = Vec::new();
        let mut first = 0;
        while first < 300 {
            let before = first;
            for entry in pagemap.read(&region, first, 300 - first).unwrap() {
                assert!(!entry.is_protected());
                if entry.is_present() {
                    mapped.push(first);
                }
                first += 1;
            }
            assert!(first - before <= 128, "no more than there is room for");
        }
        assert_eq!(mapped, [0, 130, 299]);
    }
}
