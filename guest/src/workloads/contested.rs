//! Addresses that one vCPU remaps while others read them.
//!
//! Each slot has an owner, which alone changes its entry and flushes after it; from then on the owner
//! must see the new mapping, whatever faults of the others on the slot, or on one beside it, were
//! under way. The others may see any of the owner's pages, or none: they do not flush. Slots of
//! several owners stand side by side in one group of sixteen, so that what is mapped ahead of a fault
//! on one concerns the next.

use core::sync::atomic::{AtomicU64, Ordering};

use super::paging::{Checked, Failure, expect_fault, unexpected};
use crate::memory::PAGE_BYTES;
use crate::paging::{self, ACCESSED, NO_EXECUTE};
use crate::rng::Rng;
use crate::shared::{SHARED_PAGES, SharedArea};
use crate::worker::Worker;
use crate::{probe, x86};

/// Slots that stand side by side.
const GROUP: u64 = 16;
/// Page of the table of shared counters that is the first slot; the table has room behind those.
const FIRST: u64 = 128;
/// Most slots: as many as there may be vCPUs.
const MOST: u64 = 256;

/// Slots that are looked at in one operation.
const VISITS: u64 = 4;
/// Times that a slot is looked at after it was changed.
const CHECKS: u64 = 3;
/// Turns of a loop that takes longer than a fault that pauses on its way.
const LINGER: u32 = 10_000;

const _: () = assert!(SHARED_PAGES as u64 <= FIRST && FIRST + MOST <= 512);

/// A vCPU's slots and what they must show.
pub(super) struct Contested {
    /// All slots, of all vCPUs.
    slots: u64,
    vcpus: u64,
    vcpu: u64,
    /// The frame that each of this vCPU's slots shows, if any.
    shown: [Option<usize>; GROUP as usize],
}

impl Contested {
    /// No slot shows anything.
    pub(super) fn new(worker: &Worker) -> Contested {
        let vcpus = worker.machine.vcpus.len() as u64;
        Contested {
            slots: vcpus.next_multiple_of(GROUP).min(MOST),
            vcpus,
            vcpu: u64::from(worker.vcpu.index),
            shown: [None; GROUP as usize],
        }
    }

    fn address(slot: u64) -> u64 {
        SharedArea::address(0) + (FIRST + slot) * PAGE_BYTES
    }

    /// Looks at some slots, to have faults under way there; what those of others show is theirs.
    pub(super) fn visit(&self, rng: &mut Rng) {
        for _ in 0..VISITS {
            let _ = probe::load(Contested::address(rng.below(self.slots)));
        }
    }

    /// Has one of this vCPU's slots show another of its frames, or none; checks it before and after.
    /// `frame` is the new frame's number and physical address, and `stamps` are what the frames hold.
    pub(super) fn remap(
        &mut self,
        worker: &Worker,
        rng: &mut Rng,
        (frame, physical): (usize, u64),
        stamps: &[u64],
    ) -> Checked {
        let owned = self.slots.saturating_sub(self.vcpu).div_ceil(self.vcpus).max(1);
        let own = rng.below(owned.min(GROUP));
        let address = Contested::address(self.vcpu + own * self.vcpus);
        let own = own as usize;
        self.expect(address, own, stamps)?;
        let Some(entry) = entry(worker, address) else { return Ok(()) };
        // What the vCPU has used before may be mapped ahead of it.
        let is_used = rng.below(2) * ACCESSED;
        let (shown, value) = match rng.below(4) {
            0 => (None, 0),
            _ => (Some(frame), paging::leaf(physical, NO_EXECUTE | is_used)),
        };
        entry.store(value, Ordering::Relaxed);
        match rng.below(8) {
            0 => x86::reload_cr3(),
            _ => x86::invlpg(address),
        }
        self.shown[own] = shown;
        // A fault of this vCPU's own would bring the new mapping at once: others' come first.
        if rng.below(2) == 0 {
            linger();
        }
        for _ in 0..CHECKS {
            self.expect(address, own, stamps)?;
        }
        Ok(())
    }

    /// The slot must show what it last was made to.
    fn expect(&self, address: u64, own: usize, stamps: &[u64]) -> Checked {
        let found = probe::load(address);
        match (self.shown[own], found) {
            (Some(frame), Ok(found)) => Failure::unless_equal(address, stamps[frame], found),
            (Some(frame), Err(trap)) => Err(unexpected(address, stamps[frame], trap)),
            (None, found) => expect_fault(address, 0, found.map(|_| ())),
        }
    }

    /// After a failure: none of this vCPU's slots shows anything.
    pub(super) fn clear(&mut self, worker: &Worker) {
        for own in 0..GROUP {
            let slot = self.vcpu + own * self.vcpus;
            if slot < self.slots
                && let Some(entry) = entry(worker, Contested::address(slot))
            {
                entry.store(0, Ordering::Relaxed);
            }
        }
        x86::reload_cr3();
        self.shown = [None; GROUP as usize];
    }
}

fn linger() {
    (0..LINGER).for_each(|_| core::hint::spin_loop());
}

fn entry(worker: &Worker, address: u64) -> Option<&'static AtomicU64> {
    worker.machine.space.leaf_entry(address)
}
