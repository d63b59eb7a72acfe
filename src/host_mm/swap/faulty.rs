//! Back ends that go wrong on purpose, around one that does not: for tests, and to show that the
//! checks of a running system catch it.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Slot, SwapBackend};
use gnomon_export_rmap::addr::PAGE_SIZE;

/// Changes one byte of every so-manieth page that is written.
#[derive(Debug)]
pub struct CorruptingBackend<B> {
    inner: B,
    every: NonZeroU64,
    written: AtomicU64,
}

impl<B: SwapBackend> CorruptingBackend<B> {
    /// Changes page number `every`, 2 x `every`, and so on, counted over all slots from 1.
    pub const fn new(inner: B, every: NonZeroU64) -> Self {
        Self { inner, every, written: AtomicU64::new(0) }
    }
}

impl<B: SwapBackend> SwapBackend for CorruptingBackend<B> {
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.inner.read(slot, page)
    }

    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        let mut pages = pages.to_vec();
        for page in pages.chunks_exact_mut(PAGE_SIZE) {
            let number = self.written.fetch_add(1, Ordering::Relaxed) + 1;
            if number.is_multiple_of(self.every.get()) {
                // Any byte will do; a different one each time.
                let place = usize::try_from(number).unwrap_or(0).wrapping_mul(2_654_435_761);
                page[place % PAGE_SIZE] ^= 0x40;
            }
        }
        self.inner.write(first, &pages)
    }

    fn slots(&self) -> u32 {
        self.inner.slots()
    }

    fn is_in_memory(&self) -> bool {
        self.inner.is_in_memory()
    }
}

/// Works for a number of calls, reads and writes together, and fails from then on.
#[derive(Debug)]
pub struct FailingBackend<B> {
    inner: B,
    good_calls: AtomicU64,
    errno: i32,
}

impl<B: SwapBackend> FailingBackend<B> {
    /// Every call after the first `good_calls` fails with `errno`. A failing write has written
    /// the first half of the first page, as a disk might.
    pub const fn new(inner: B, good_calls: u64, errno: i32) -> Self {
        Self { inner, good_calls: AtomicU64::new(good_calls), errno }
    }

    fn fails(&self) -> bool {
        let take_one = |left: u64| left.checked_sub(1);
        self.good_calls.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take_one).is_err()
    }
}

impl<B: SwapBackend> SwapBackend for FailingBackend<B> {
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        if self.fails() {
            return Err(io::Error::from_raw_os_error(self.errno));
        }
        self.inner.read(slot, page)
    }

    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        if !self.fails() {
            return self.inner.write(first, pages);
        }
        let mut torn = [0; PAGE_SIZE];
        self.inner.read(first, &mut torn)?;
        let half = pages.len().min(PAGE_SIZE / 2);
        torn[..half].copy_from_slice(&pages[..half]);
        self.inner.write(first, &torn)?;
        Err(io::Error::from_raw_os_error(self.errno))
    }

    fn slots(&self) -> u32 {
        self.inner.slots()
    }

    fn is_in_memory(&self) -> bool {
        self.inner.is_in_memory()
    }
}
