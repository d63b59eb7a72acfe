//! The file that pages are lent to one peer in: a memfd with one page a slot.
//!
//! Guarantee: what a slot held is gone from the peer's page tables and from the file when
//! [`LentFile::take`] returns, whatever the peer has done with the file: it cannot evade, since
//! punching a hole needs none of its doing. A peer never gets a frame: it can write its own file, and
//! fool nobody but itself. The file cannot grow, and no slot that is filled here costs more than a
//! page, so what this makes the host spend is bounded by the slots.

use std::fs::File;
use std::io;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::addr::{PAGE_SIZE, PAGE_SIZE_U64};
use crate::sys::{memory, small_pages};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct LentFile {
    memfd: File,
    /// What slots are filled through; `None` without slots.
    region: Option<MmapRegion>,
    slots: u32,
}

impl LentFile {
    /// A file with so many empty slots, which takes up no memory yet.
    ///
    /// # Errors
    /// If the host has no descriptor or no address space left.
    pub(super) fn new(slots: u32) -> io::Result<Self> {
        let bytes = u64::from(slots) * PAGE_SIZE_U64;
        let memfd = memory::create_memfd("gnomon-lent", bytes)?;
        let map = || small_pages::map(memfd.try_clone()?, bytes);
        let region = (slots > 0).then(map).transpose()?;
        Ok(Self { memfd, region, slots })
    }

    /// The file, to be given to the peer.
    #[must_use]
    pub(super) fn file(&self) -> &File {
        &self.memfd
    }

    /// Puts a page into a slot.
    ///
    /// # Errors
    /// If the host has no memory for it, or there is no such slot.
    pub(super) fn put(&self, slot: u32, content: &[u8; PAGE_SIZE]) -> io::Result<()> {
        let region = self.region.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let at = usize::try_from(slot).map_err(io::Error::other)?.saturating_mul(PAGE_SIZE);
        small_pages::populate(region, at, PAGE_SIZE)?;
        region.as_volatile_slice().write_slice(content, at).map_err(io::Error::other)
    }

    /// Takes what is in these slots from the peer.
    ///
    /// # Errors
    /// As `fallocate`; some of them may be taken.
    pub(super) fn take(&self, slots: &[u32]) -> io::Result<()> {
        // Neighbours in one call.
        for run in slots.chunk_by(|one, two| one.checked_add(1) == Some(*two)) {
            let first = u64::from(run[0]) * PAGE_SIZE_U64;
            memory::punch_hole(&self.memfd, first, run.len() as u64 * PAGE_SIZE_U64)?;
        }
        Ok(())
    }

    /// Takes all from the peer.
    ///
    /// # Errors
    /// As `fallocate`.
    pub(super) fn take_all(&self) -> io::Result<()> {
        if self.slots == 0 {
            return Ok(());
        }
        memory::punch_hole(&self.memfd, 0, u64::from(self.slots) * PAGE_SIZE_U64)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::*;

    fn page_of(region: &MmapRegion, slot: usize) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        region.as_volatile_slice().read_slice(&mut page, slot * PAGE_SIZE).unwrap();
        page
    }

    #[test]
    fn what_is_taken_is_gone_from_a_mapping_that_stays() {
        let lent = LentFile::new(4).unwrap();
        let file = FileOffset::new(lent.file().try_clone().unwrap(), 0);
        let region = MmapRegion::from_file(file, 4 * PAGE_SIZE).unwrap();
        for slot in 0..4 {
            lent.put(slot, &[7; PAGE_SIZE]).unwrap();
            assert_eq!(page_of(&region, slot as usize), [7; PAGE_SIZE]);
        }
        lent.take(&[0, 1, 3]).unwrap();
        for (slot, left) in [0, 0, 7, 0].into_iter().enumerate() {
            assert_eq!(page_of(&region, slot), [left; PAGE_SIZE], "slot {slot}");
        }
        lent.take_all().unwrap();
        assert_eq!(page_of(&region, 2), [0; PAGE_SIZE]);
    }

    /// What a peer may try so that it keeps its pages, or makes the host spend memory.
    #[test]
    fn the_holder_can_neither_seal_nor_resize_the_file() {
        use std::os::unix::fs::FileExt;

        use nix::fcntl::{FcntlArg, SealFlag, fcntl};

        let lent = LentFile::new(2).unwrap();
        let theirs = lent.file().try_clone().unwrap();
        assert!(theirs.set_len(3 * PAGE_SIZE_U64).is_err());
        assert!(theirs.set_len(0).is_err());
        assert!(theirs.write_at(&[1], 2 * PAGE_SIZE_U64).is_err());
        let seal = fcntl(&theirs, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE));
        assert!(seal.is_err(), "that would forbid to punch holes");
        lent.put(0, &[1; PAGE_SIZE]).unwrap();
        lent.take_all().unwrap();
    }
}
