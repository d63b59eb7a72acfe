//! Counters in guest memory that all vCPUs add to: their sums show lost writes and stale copies.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{FreeRam, PAGE_BYTES};
use crate::oracle::WORDS;
use crate::paging::{self, AddressSpace};
use crate::vcpu::Vcpu;

/// Where the counters are mapped.
const SHARED_ADDRESS: u64 = 0x1800_0000_0000;
/// Pages of counters.
pub const SHARED_PAGES: usize = 64;

/// Handle of the counters. Of each page, word 0 counts the operations on that page, and the other
/// words together count them once more.
#[derive(Clone, Copy)]
pub struct SharedArea {
    frames: u64,
}

/// A page whose counters do not add up.
pub struct WrongSum {
    /// Address of the page.
    pub address: u64,
    /// Its guest frame number.
    pub gfn: u64,
    /// What the vCPUs have added.
    pub expected: u64,
    /// What the page says.
    pub found: u64,
}

impl SharedArea {
    /// Maps the counters, all 0.
    pub fn new(ram: &mut FreeRam, space: AddressSpace) -> SharedArea {
        let frames = ram.take_pages(SHARED_PAGES as u64);
        let flags = paging::WRITE | paging::NO_EXECUTE;
        space.map_pages(ram, SHARED_ADDRESS, SHARED_PAGES as u64, |i| {
            paging::leaf(frames + i * PAGE_BYTES, flags)
        });
        SharedArea { frames }
    }

    /// Address of a page.
    pub fn address(page: usize) -> u64 {
        SHARED_ADDRESS + page as u64 * PAGE_BYTES
    }

    /// Guest frame number of a page.
    pub fn gfn(self, page: usize) -> u64 {
        self.frames / PAGE_BYTES + page as u64
    }

    /// The counters of a page; that there is a `SharedArea` says that they are mapped.
    pub fn words(self, page: usize) -> &'static [AtomicU64; WORDS] {
        assert!(page < SHARED_PAGES);
        // SAFETY: mapped for good by `new`, and only ever accessed as atomics.
        unsafe { &*(SharedArea::address(page) as *const [AtomicU64; WORDS]) }
    }

    /// Compares all sums with the vCPUs' tallies, while no vCPU adds. Wrong ones are handed to
    /// `report` and put right.
    pub fn check(self, vcpus: &[Vcpu], mut report: impl FnMut(WrongSum)) {
        for page in 0..SHARED_PAGES {
            let expected =
                vcpus.iter().map(|vcpu| vcpu.tallies[page].load(Ordering::Relaxed)).sum::<u64>();
            let words = self.words(page);
            let first = words[0].load(Ordering::Relaxed);
            let rest = words[1..]
                .iter()
                .fold(0, |sum: u64, word| sum.wrapping_add(word.load(Ordering::Relaxed)));
            for (i, found) in [first, rest].into_iter().enumerate() {
                if found != expected {
                    words[i].fetch_add(expected.wrapping_sub(found), Ordering::Relaxed);
                    report(WrongSum {
                        address: SharedArea::address(page) + 8 * i as u64,
                        gfn: self.gfn(page),
                        expected,
                        found,
                    });
                }
            }
        }
    }
}
