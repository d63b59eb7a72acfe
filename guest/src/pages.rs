//! The work pages: which guest frames they are, where they are mapped, and their ledger.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::memory::{FreeRam, PAGE_BYTES};
use crate::paging::{self, AddressSpace};
use gnomon_abi as abi;

/// Where the work pages are mapped, one after the other, by 4 KiB pages.
const WORK_ADDRESS: u64 = 0x1000_0000_0000;

/// Whether the entry of a work page is accessed and dirty before anybody has used the page, as kernels map
/// their memory. The others, every eighth 2 MiB of them, show that these bits are set when they must be, and
/// not before.
#[inline]
pub fn is_preset(index: u64) -> bool {
    !(index / paging::ENTRIES).is_multiple_of(8)
}

/// The work pages, by index `0 .. pages`, spread evenly over the free RAM.
#[derive(Clone, Copy)]
pub struct WorkSet {
    pages: u64,
    first_gfn: u64,
    /// Free frames that the pages are spread over; `pages` or more.
    span: u64,
}

impl WorkSet {
    /// Takes all RAM that is left, less what the page tables need, and maps at most `most` pages
    /// of it.
    pub fn new(ram: &mut FreeRam, space: AddressSpace, most: u64) -> WorkSet {
        let free = ram.pages_left();
        let span = free.saturating_sub(AddressSpace::tables_for(free.min(most)));
        let first = ram.take_pages_from_end(span);
        let work = WorkSet { pages: span.min(most), first_gfn: first / PAGE_BYTES, span };
        let flags = paging::WRITE | paging::NO_EXECUTE;
        let preset = |i| if is_preset(i) { paging::ACCESSED | paging::DIRTY } else { 0 };
        space.map_pages(ram, WORK_ADDRESS, work.pages, |i| {
            paging::leaf(work.gfn(i) * PAGE_BYTES, flags | preset(i))
        });
        work
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Guest frame number of a page.
    #[inline]
    pub fn gfn(&self, index: u64) -> u64 {
        if self.span == self.pages {
            self.first_gfn + index
        } else {
            // Below 2^27 * 2^27.
            self.first_gfn + index * self.span / self.pages
        }
    }

    /// Virtual address of a page.
    #[inline]
    pub fn address(index: u64) -> u64 {
        WORK_ADDRESS + index * PAGE_BYTES
    }

    /// Guest frames from page 0 to before page `count`.
    pub fn frames_of_first(&self, count: u64) -> (u64, u64) {
        let last = self.gfn(count.clamp(1, self.pages) - 1);
        (self.first_gfn, last + 1 - self.first_gfn)
    }
}

/// Set in a ledger entry whose page was given back since it was written last.
const FREED: u32 = 1 << 31;

/// Of a ledger entry: the version that the page must hold, 0 for all zeros, and the last written.
#[inline]
pub fn content_of(entry: u32) -> (u32, u32) {
    (if entry & FREED == 0 { entry } else { 0 }, entry & !FREED)
}

/// The version that follows a written one.
#[inline]
pub fn next_version(last: u32) -> u32 {
    ((last + 1) & !FREED).max(1)
}

/// The ledger entry of a page that was given back. One that never was written stays so: its page
/// table entry need not be dirty.
#[inline]
pub fn freed(entry: u32) -> u32 {
    if entry == 0 { 0 } else { entry | FREED }
}

/// The version of a guest frame's page, in the pinned window's ledger: 0 for never written.
#[inline]
pub fn version(gfn: u64) -> &'static AtomicU32 {
    // SAFETY: the window has an entry for every frame of RAM (checked at start), mapped at its
    // physical address, and only ever accessed as atomics.
    unsafe { &*((abi::WINDOW_GPA + abi::CONTROL_BYTES + 4 * gfn) as *const AtomicU32) }
}

/// Adds to a counter that only this vCPU writes.
#[inline]
pub fn count(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
}
