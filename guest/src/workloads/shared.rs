//! Additions to counters that every vCPU adds to.

use core::sync::atomic::Ordering;

use crate::oracle::WORDS;
use crate::pages::count;
use crate::rng::Rng;
use crate::shared::{SHARED_PAGES, SharedArea};
use crate::worker::Worker;
use gnomon_abi::Violation;

/// What one vCPU remembers of the shared counters.
pub(super) struct SharedState {
    /// The least that word 0 of each page can be: what this vCPU last saw, plus what it added.
    least: [u64; SHARED_PAGES],
}

impl SharedState {
    pub(super) fn new() -> SharedState {
        SharedState { least: [0; SHARED_PAGES] }
    }

    /// Adds 1 to word 0 of a page, which must never be seen going back, and 1 to another word.
    pub(super) fn operation(&mut self, worker: &Worker, rng: &mut Rng) {
        let area = worker.machine.shared;
        let page = rng.below(SHARED_PAGES as u64) as usize;
        let other = 1 + rng.below(WORDS as u64 - 1) as usize;
        let words = area.words(page);
        let before = words[0].fetch_add(1, Ordering::Relaxed);
        words[other].fetch_add(1, Ordering::Relaxed);
        count(&worker.vcpu.tallies[page], 1);
        count(&worker.counters.shared_adds, 2);
        let least = self.least[page];
        if before < least {
            let (address, gfn) = (SharedArea::address(page), area.gfn(page));
            worker.report(Violation::SharedSum, address, least, before, gfn);
        }
        self.least[page] = before + 1;
    }
}
