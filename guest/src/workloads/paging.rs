//! Page-table changes, each checked for exactly the effect that the architecture promises.
//!
//! A vCPU has a region of addresses and a block of frames for itself. Mappings stay from one
//! operation to the next, so that reclaim can strike between them; a model says what each address
//! must show. Every change except not-present to present is followed by `invlpg` or a CR3 load, as
//! it must be, and after that nothing of the old translation may be left.

use core::sync::atomic::{AtomicU64, Ordering};

use super::contested::Contested;
use super::demand::DemandModel;
use crate::exceptions::{Trap, VECTOR_PAGE_FAULT};
use crate::memory::{FreeRam, PAGE_BYTES};
use crate::pages::count;
use crate::paging::{
    self, ACCESSED, AddressSpace, DIRTY, FAULT_FETCH, FAULT_PRESENT, FAULT_WRITE, LARGE,
    NO_EXECUTE, Table, WRITE,
};
use crate::rng::Rng;
use crate::worker::Worker;
use crate::{probe, ring0, x86};
use gnomon_abi::Violation;

/// Where vCPU 0's region begins; each region has 1 GiB of addresses.
const PAGING_ADDRESS: u64 = 0x3000_0000_0000;
const REGION_BYTES: u64 = 1 << 30;
/// Offset of a 2 MiB page within the region.
const LARGE_OFFSET: u64 = 2 << 20;
const LARGE_BYTES: u64 = 2 << 20;
/// Addresses in use.
const SLOTS: usize = 64;
/// Frames behind them.
const FRAMES: usize = 16;
/// Set in `found` of a violation that is an unexpected fault, with its error code below.
const FAULTED: u64 = 0xfa17 << 48;
/// `expected` or `found` of a violation where an access went through that should have faulted.
const NO_FAULT: u64 = 0x600d << 48;
/// Machine code of `ret`.
const RET: u64 = 0xc3;

/// RAM and tables of one vCPU's region.
#[derive(Clone, Copy)]
pub struct PagingBlock {
    base: u64,
    /// Physical address of the frames; one more than [`FRAMES`], for code.
    frames: u64,
    directory: Table,
    leaves: [Table; 2],
    /// Root, PDPT, PD and PT of another address space that shows the region differently.
    other: [Table; 4],
}

impl PagingBlock {
    /// The block of a vCPU.
    pub fn new(ram: &mut FreeRam, space: AddressSpace, vcpu: u32) -> PagingBlock {
        let base = PAGING_ADDRESS + u64::from(vcpu) * REGION_BYTES;
        let frames = ram.take_pages(FRAMES as u64 + 1);
        PagingBlock {
            base,
            frames,
            directory: space.table(ram, base, 2),
            leaves: [space.table(ram, base, 1), Table::new(ram)],
            other: [(); 4].map(|()| Table::new(ram)),
        }
    }

    fn frame(&self, frame: usize) -> u64 {
        self.frames + frame as u64 * PAGE_BYTES
    }
}

/// An address that did not show what it must.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    address: u64,
    expected: u64,
    found: u64,
}

impl Failure {
    /// A failure if two values differ.
    pub(super) fn unless_equal(address: u64, expected: u64, found: u64) -> Result<(), Failure> {
        if expected == found {
            return Ok(());
        }
        Err(Failure { address, expected, found })
    }
}

pub(super) type Checked = Result<(), Failure>;

/// One vCPU's mappings and the model of them.
pub(super) struct PagingState {
    block: PagingBlock,
    main_root: u64,
    /// Which of the block's two leaf tables is in use.
    leaves: usize,
    /// The frame that each address shows, if any.
    slots: [Option<usize>; SLOTS],
    /// First word of each frame.
    stamps: [u64; FRAMES],
    demand: DemandModel,
    contested: Contested,
    rng: Rng,
}

impl PagingState {
    pub(super) fn new(worker: &Worker, rng: Rng) -> PagingState {
        let block = worker.vcpu.paging;
        let mut state = PagingState {
            block,
            main_root: worker.machine.space.root().address(),
            leaves: 0,
            slots: [None; SLOTS],
            stamps: [0; FRAMES],
            demand: DemandModel::new(),
            contested: Contested::new(worker),
            rng,
        };
        for frame in 0..FRAMES {
            state.stamp(frame);
        }
        // SAFETY: the block's last frame, mapped at its physical address.
        unsafe { (block.frame(FRAMES) as *mut u64).write_volatile(RET) };
        let [root, pdpt, pd, pt] = block.other;
        root.copy_from(worker.machine.space.root());
        root.link(block.base, 4, pdpt);
        pdpt.link(block.base, 3, pd);
        pd.link(block.base, 2, pt);
        state
    }

    /// Makes the random choices from here on by another generator.
    pub(super) fn choose_anew(&mut self, rng: Rng) {
        self.rng = rng;
    }

    /// One random change with its checks.
    pub(super) fn operation(&mut self, worker: &Worker) {
        let slot = self.rng.below(SLOTS as u64) as usize;
        let result = match self.slots[slot] {
            _ if self.rng.below(3) == 0 => self.contest(worker),
            None => self.map(slot),
            Some(frame) => match self.rng.below(16) {
                0 => self.unmap(slot),
                1 => self.remap(slot),
                2 => self.write_protect(slot, frame),
                3 => self.write_protect_and_fix(slot, frame),
                4 => self.clear_flags(slot, frame),
                5 => self.forbid_execution(),
                6 => self.remap_many(),
                7 => self.other_root(slot, frame),
                8 => self.large_page(frame),
                // CPL 3 is bound by write protection in any case.
                9 if !ring0::is_present() => self.ignore_protection(slot, frame),
                10 => self.move_leaves(),
                11 => self.detach_leaves(slot, frame),
                _ => self.demand.touch(&worker.vcpu.demand, &mut self.rng),
            },
        };
        count(&worker.counters.paging_ops, 1);
        if let Err(failure) = result {
            let gfn = self.block.frames / PAGE_BYTES;
            worker.report(Violation::Paging, failure.address, failure.expected, failure.found, gfn);
            self.start_over(worker);
        }
    }

    /// What several vCPUs do to the same addresses.
    fn contest(&mut self, worker: &Worker) -> Checked {
        if self.rng.below(2) == 0 {
            self.contested.visit(&mut self.rng);
            return Ok(());
        }
        let frame = self.rng.below(FRAMES as u64) as usize;
        let target = (frame, self.block.frame(frame));
        self.contested.remap(worker, &mut self.rng, target, &self.stamps)
    }

    fn address(&self, slot: usize) -> u64 {
        self.block.base + slot as u64 * PAGE_BYTES
    }

    fn entry(&self, slot: usize) -> &'static AtomicU64 {
        self.block.leaves[self.leaves].entry(slot as u64)
    }

    /// Writes a new stamp through the identity mapping.
    fn stamp(&mut self, frame: usize) {
        let stamp = self.rng.next_u64();
        // SAFETY: a frame of this block, mapped at its physical address.
        unsafe { (self.block.frame(frame) as *mut u64).write_volatile(stamp) };
        self.stamps[frame] = stamp;
    }

    /// The frame must hold its stamp, read through the identity mapping.
    fn expect_stamp(&self, frame: usize) -> Checked {
        let physical = self.block.frame(frame);
        // SAFETY: as in `stamp`.
        let found = unsafe { (physical as *const u64).read_volatile() };
        Failure::unless_equal(physical, self.stamps[frame], found)
    }

    /// A read of the address must show the frame.
    fn expect_frame(&self, address: u64, frame: usize) -> Checked {
        match probe::load(address) {
            Ok(found) => Failure::unless_equal(address, self.stamps[frame], found),
            Err(trap) => Err(unexpected(address, self.stamps[frame], trap)),
        }
    }

    /// A write to the address must reach the frame.
    fn store(&mut self, address: u64, frame: usize) -> Checked {
        let stamp = self.rng.next_u64();
        // SAFETY: right or wrong, the region's tables lead to frames of this block only.
        if let Err(trap) = unsafe { probe::store(address, stamp) } {
            return Err(unexpected(address, stamp, trap));
        }
        self.stamps[frame] = stamp;
        self.expect_stamp(frame)
    }

    /// A write to the address must fault with the error code, and leave the frame alone.
    fn expect_store_fault(&self, address: u64, frame: usize, error_code: u64) -> Checked {
        // SAFETY: as in `store`.
        expect_fault(address, error_code, unsafe { probe::store(address, 0xdead) })?;
        self.expect_stamp(frame)
    }

    /// Not present to present: no invalidation needed, though the address has just faulted.
    fn map(&mut self, slot: usize) -> Checked {
        let address = self.address(slot);
        let frame = self.rng.below(FRAMES as u64) as usize;
        expect_fault(address, 0, probe::load(address).map(|_| ()))?;
        // SAFETY: as in `store`.
        expect_fault(address, FAULT_WRITE, unsafe { probe::store(address, 0xdead) })?;
        let entry = self.entry(slot);
        let value = paging::leaf(self.block.frame(frame), WRITE | NO_EXECUTE);
        entry.store(value, Ordering::Relaxed);
        self.slots[slot] = Some(frame);
        self.expect_frame(address, frame)?;
        expect_flags(address, entry, ACCESSED)?;
        self.store(address, frame)?;
        expect_flags(address, entry, ACCESSED | DIRTY)
    }

    fn unmap(&mut self, slot: usize) -> Checked {
        let address = self.address(slot);
        self.entry(slot).store(0, Ordering::Relaxed);
        x86::invlpg(address);
        self.slots[slot] = None;
        expect_fault(address, 0, probe::load(address).map(|_| ()))
    }

    fn remap(&mut self, slot: usize) -> Checked {
        let address = self.address(slot);
        let frame = self.rng.below(FRAMES as u64) as usize;
        let value = paging::leaf(self.block.frame(frame), WRITE | NO_EXECUTE);
        self.entry(slot).store(value, Ordering::Relaxed);
        x86::invlpg(address);
        self.slots[slot] = Some(frame);
        self.expect_frame(address, frame)?;
        self.store(address, frame)
    }

    fn write_protect(&mut self, slot: usize, frame: usize) -> Checked {
        let (address, entry) = (self.address(slot), self.entry(slot));
        entry.fetch_and(!WRITE, Ordering::Relaxed);
        x86::invlpg(address);
        self.expect_frame(address, frame)?;
        self.expect_store_fault(address, frame, FAULT_PRESENT | FAULT_WRITE)?;
        entry.fetch_or(WRITE, Ordering::Relaxed);
        x86::invlpg(address);
        self.store(address, frame)
    }

    /// Write protection undone by the fault handler, which goes on without `invlpg`.
    fn write_protect_and_fix(&mut self, slot: usize, frame: usize) -> Checked {
        let (address, entry) = (self.address(slot), self.entry(slot));
        entry.fetch_and(!WRITE, Ordering::Relaxed);
        x86::invlpg(address);
        let stamp = self.rng.next_u64();
        // SAFETY: as in `store`.
        let trap = unsafe { probe::store_fixed(address, stamp, entry) };
        let result = trap.map_or(Ok(()), Err);
        expect_fault(address, FAULT_PRESENT | FAULT_WRITE, result)?;
        self.stamps[frame] = stamp;
        self.expect_stamp(frame)
    }

    fn clear_flags(&mut self, slot: usize, frame: usize) -> Checked {
        let (address, entry) = (self.address(slot), self.entry(slot));
        entry.fetch_and(!(ACCESSED | DIRTY), Ordering::Relaxed);
        x86::invlpg(address);
        expect_flags(address, entry, 0)?;
        self.expect_frame(address, frame)?;
        expect_flags(address, entry, ACCESSED)?;
        self.store(address, frame)?;
        expect_flags(address, entry, ACCESSED | DIRTY)
    }

    /// A page of code, at the address after the slots: runs, and does not once it may not.
    fn forbid_execution(&mut self) -> Checked {
        let (address, entry) = (self.address(SLOTS), self.entry(SLOTS));
        // SAFETY: the address, if mapped at all, shows the code frame, which holds a `ret`.
        let call = || unsafe { probe::call(address) };
        let value = paging::leaf(self.block.frame(FRAMES), WRITE);
        entry.store(value, Ordering::Relaxed);
        call().map_err(|trap| unexpected(address, NO_FAULT, trap))?;
        entry.fetch_or(NO_EXECUTE, Ordering::Relaxed);
        x86::invlpg(address);
        expect_fault(address, FAULT_PRESENT | FAULT_FETCH, call())?;
        entry.store(0, Ordering::Relaxed);
        x86::invlpg(address);
        expect_fault(address, FAULT_FETCH, call())
    }

    /// Other frames under many slots, and a single CR3 load.
    fn remap_many(&mut self) -> Checked {
        let shift = 1 + self.rng.below(FRAMES as u64 - 1) as usize;
        for slot in 0..SLOTS {
            if let Some(frame) = self.slots[slot] {
                let frame = (frame + shift) % FRAMES;
                let value = paging::leaf(self.block.frame(frame), WRITE | NO_EXECUTE);
                self.entry(slot).store(value, Ordering::Relaxed);
                self.slots[slot] = Some(frame);
            }
        }
        x86::reload_cr3();
        self.expect_all()
    }

    fn expect_all(&self) -> Checked {
        for (i, slot) in self.slots.iter().enumerate() {
            if let Some(frame) = *slot {
                self.expect_frame(self.address(i), frame)?;
            }
        }
        Ok(())
    }

    /// Another address space shows another frame at the same address, for as long as it is in use.
    fn other_root(&mut self, slot: usize, frame: usize) -> Checked {
        let address = self.address(slot);
        let other_frame = (frame + 1) % FRAMES;
        let [root, _, _, leaves] = self.block.other;
        let value = paging::leaf(self.block.frame(other_frame), NO_EXECUTE);
        leaves.entry(slot as u64).store(value, Ordering::Relaxed);
        // SAFETY: outside the region the other address space is the same.
        unsafe { x86::write_cr3(root.address()) };
        let seen = self.expect_frame(address, other_frame).and_then(|()| {
            self.expect_store_fault(address, other_frame, FAULT_PRESENT | FAULT_WRITE)
        });
        // SAFETY: the usual tables again.
        unsafe { x86::write_cr3(self.main_root) };
        seen?;
        self.expect_frame(address, frame)?;
        self.store(address, frame)
    }

    /// A 2 MiB page over a frame of the block.
    fn large_page(&mut self, frame: usize) -> Checked {
        let physical = self.block.frame(frame);
        let large = self.block.base + LARGE_OFFSET;
        let address = large + physical % LARGE_BYTES;
        let entry = self.block.directory.entry_for(large, 2);
        let value = paging::leaf(physical - physical % LARGE_BYTES, LARGE | WRITE | NO_EXECUTE);
        entry.store(value, Ordering::Relaxed);
        self.expect_frame(address, frame)?;
        expect_flags(address, entry, ACCESSED)?;
        self.store(address, frame)?;
        expect_flags(address, entry, ACCESSED | DIRTY)?;
        // Another address of the page: an `invlpg` of either is one of the page.
        let other = (0..FRAMES).find(|&other| {
            let start = self.block.frame(other) / LARGE_BYTES;
            other != frame && start == physical / LARGE_BYTES
        });
        let beside = other.map(|other| (large + self.block.frame(other) % LARGE_BYTES, other));
        if let Some((address, other)) = beside {
            self.store(address, other)?;
        }
        entry.fetch_and(!WRITE, Ordering::Relaxed);
        x86::invlpg(address);
        self.expect_store_fault(address, frame, FAULT_PRESENT | FAULT_WRITE)?;
        if let Some((address, other)) = beside {
            self.expect_store_fault(address, other, FAULT_PRESENT | FAULT_WRITE)?;
            self.expect_frame(address, other)?;
        }
        entry.store(0, Ordering::Relaxed);
        x86::invlpg(address);
        if let Some((address, _)) = beside {
            expect_fault(address, 0, probe::load(address).map(|_| ()))?;
        }
        expect_fault(address, 0, probe::load(address).map(|_| ()))
    }

    /// With CR0.WP clear, a kernel may write to read-only pages.
    fn ignore_protection(&mut self, slot: usize, frame: usize) -> Checked {
        let (address, entry) = (self.address(slot), self.entry(slot));
        entry.fetch_and(!WRITE, Ordering::Relaxed);
        x86::invlpg(address);
        let cr0 = x86::cr0();
        // SAFETY: allows more than before, and for the time of one write.
        unsafe { x86::write_cr0(cr0 & !x86::CR0_WP) };
        let stored = self.store(address, frame);
        // SAFETY: as it was.
        unsafe { x86::write_cr0(cr0) };
        stored?;
        self.expect_store_fault(address, frame, FAULT_PRESENT | FAULT_WRITE)?;
        entry.fetch_or(WRITE, Ordering::Relaxed);
        x86::invlpg(address);
        self.store(address, frame)
    }

    /// The leaf table moves to another page, and the old one is wiped.
    fn move_leaves(&mut self) -> Checked {
        let (old, new) = (self.leaves, 1 - self.leaves);
        let tables = self.block.leaves;
        tables[new].copy_from(tables[old]);
        self.block.directory.link(self.block.base, 2, tables[new]);
        x86::reload_cr3();
        tables[old].clear();
        self.leaves = new;
        self.expect_all()
    }

    /// The whole leaf table goes, and comes back.
    fn detach_leaves(&mut self, slot: usize, frame: usize) -> Checked {
        let address = self.address(slot);
        let entry = self.block.directory.entry_for(self.block.base, 2);
        let value = entry.swap(0, Ordering::Relaxed);
        x86::reload_cr3();
        let gone = expect_fault(address, 0, probe::load(address).map(|_| ()));
        entry.store(value, Ordering::Relaxed);
        gone?;
        self.expect_frame(address, frame)
    }

    /// After a failure: nothing mapped, frames stamped afresh, no translation left.
    fn start_over(&mut self, worker: &Worker) {
        self.demand.release(&worker.vcpu.demand, false);
        self.contested.clear(worker);
        let tables = self.block.leaves;
        tables[0].clear();
        tables[1].clear();
        self.block.directory.clear();
        self.block.directory.link(self.block.base, 2, tables[0]);
        x86::reload_cr3();
        self.leaves = 0;
        self.slots = [None; SLOTS];
        for frame in 0..FRAMES {
            self.stamp(frame);
        }
    }
}

pub(super) fn unexpected(address: u64, expected: u64, trap: Trap) -> Failure {
    Failure { address, expected, found: FAULTED | trap.vector << 32 | trap.error_code }
}

/// The accessed and dirty bits of an entry must be as expected.
fn expect_flags(address: u64, entry: &AtomicU64, expected: u64) -> Checked {
    let found = entry.load(Ordering::Relaxed) & (ACCESSED | DIRTY);
    Failure::unless_equal(address, expected, found)
}

/// An access must have ended in a page fault at the address, with the error code.
pub(super) fn expect_fault(address: u64, error_code: u64, result: Result<(), Trap>) -> Checked {
    let found = match result {
        Ok(()) => NO_FAULT,
        Err(trap) if trap.address != address => trap.address,
        Err(trap) => FAULTED | trap.vector << 32 | trap.error_code,
    };
    let expected = FAULTED | VECTOR_PAGE_FAULT << 32 | error_code;
    Failure::unless_equal(address, expected, found)
}
