//! What the kernel's page tables map of this process's memory: `/proc/self/pagemap`.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::MmapRegion;

use crate::PAGE_SIZE;

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
    read_entry(file, offset(region, page))
}

/// What is mapped at an address.
///
/// # Errors
/// As `pread`.
#[cfg(feature = "testing")]
#[doc(hidden)]
pub fn entry_at(file: &File, address: usize) -> io::Result<Mapped> {
    read_entry(file, (address / PAGE_SIZE * ENTRY_BYTES) as u64)
}

fn read_entry(file: &File, offset: u64) -> io::Result<Mapped> {
    let mut entry = [0; ENTRY_BYTES];
    file.read_exact_at(&mut entry, offset)?;
    Ok(Mapped(u64::from_ne_bytes(entry)))
}

/// Whether the page of the region still shows the region's file, or another part of this process has
/// mapped something else there. Goes through all mappings of the process.
///
/// # Errors
/// If `/proc/self/maps` cannot be read, or the file asked who it is.
pub fn is_own(region: &MmapRegion, page: u64) -> io::Result<bool> {
    let Some(own) = region.file_offset() else { return Ok(false) };
    let (from, start) = (page * PAGE_SIZE as u64, own.start());
    let shown = (own.file().metadata()?.ino(), start + from);
    let address = region.as_ptr().addr() as u64 + from;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().find_map(|line| shown_at(line, address)) == Some(shown))
}

/// The inode and the byte of it that a line of `/proc/PID/maps` has at an address, if it has anything.
fn shown_at(line: &str, address: u64) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (first, end) = words.next()?.split_once('-')?;
    let number = |hex: &str| u64::from_str_radix(hex, 16).ok();
    let (first, end) = (number(first)?, number(end)?);
    let (_rights, offset, _device, inode) =
        (words.next()?, words.next()?, words.next()?, words.next()?);
    let at = (first..end).contains(&address).then(|| address - first)?;
    Some((inode.parse().ok()?, number(offset)?.checked_add(at)?))
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
    use crate::foreign;

    #[test]
    fn a_page_is_its_own_until_something_else_is_mapped_there() {
        let bytes = 8 * PAGE_SIZE as u64;
        let file = crate::memory::create_memfd("gnomon-test", bytes).unwrap();
        let region = crate::small_pages::map(file, bytes).unwrap();
        assert!((0..8).all(|page| is_own(&region, page).unwrap()));
        foreign::replace(&region, 3 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        let own: Vec<u64> = (0..8).filter(|&page| is_own(&region, page).unwrap()).collect();
        assert_eq!(own, [0, 1, 2, 5, 6, 7]);
    }

    #[test]
    fn a_line_of_the_maps_says_what_is_where() {
        let line = "7f00-8f00 rw-s 00002000 00:01 1234    /memfd:gnomon-frames (deleted)";
        assert_eq!(shown_at(line, 0x7f00), Some((1234, 0x2000)));
        assert_eq!(shown_at(line, 0x8eff), Some((1234, 0x2fff)));
        assert_eq!([0x7eff, 0x8f00].map(|address| shown_at(line, address)), [None; 2]);
        let anonymous = "7f00-8f00 rw-p 00000000 00:00 0 ";
        assert_eq!(shown_at(anonymous, 0x7f00), Some((0, 0)));
        assert_eq!(shown_at("", 0), None);
    }

    #[test]
    fn what_was_touched_is_mapped_and_the_rest_is_not() {
        let bytes = 300 * PAGE_SIZE as u64;
        let file = crate::memory::create_memfd("gnomon-test", bytes).unwrap();
        let region = crate::small_pages::map(file, bytes).unwrap();
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
