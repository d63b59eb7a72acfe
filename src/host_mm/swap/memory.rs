//! Swap in plain memory, for tests: a file costs a system call a page.

use std::io;

use super::backend::{Slot, SwapBackend, check_range};
use gnomon_export_rmap::addr::PAGE_SIZE;
use gnomon_export_rmap::sync::{Mutex, lock};

/// Pages in memory, which is taken up by those that were ever written.
#[derive(Debug)]
pub struct MemorySwap {
    pages: Mutex<Vec<Option<Box<[u8; PAGE_SIZE]>>>>,
    slots: u32,
}

impl MemorySwap {
    /// Room for so many pages.
    pub fn new(slots: u32) -> Self {
        Self { pages: Mutex::default(), slots }
    }
}

impl SwapBackend for MemorySwap {
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        check_range(self.slots, slot, PAGE_SIZE)?;
        match lock(&self.pages).get(slot.index()) {
            Some(Some(content)) => page.copy_from_slice(&content[..]),
            _ => page.fill(0),
        }
        Ok(())
    }

    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        check_range(self.slots, first, pages.len())?;
        let mut kept = lock(&self.pages);
        for (index, page) in (first.index()..).zip(pages.chunks_exact(PAGE_SIZE)) {
            if kept.len() <= index {
                kept.resize_with(index + 1, || None);
            }
            kept[index].get_or_insert_with(|| Box::new([0; PAGE_SIZE])).copy_from_slice(page);
        }
        Ok(())
    }

    fn slots(&self) -> u32 {
        self.slots
    }
}
