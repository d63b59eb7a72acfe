//! A guest's page tables and accesses, and a host that takes pages away, on the shadow MMU.
//!
//! The input is a series of steps of [`Rig`], which compares each with its model: what an access
//! finds, faults and their codes, accessed and dirty bits, that no SPTE or TLB entry grants more
//! than the guest's tables did since the last flush nor allows a shared frame to be written, what
//! the dirty log tells, invariants I2 to I4, and at the end all memory of the guest and of a second
//! object beside it.
//!
//! An input takes some hundred microseconds, since it makes no system call: memory is mapped once
//! for all inputs ([`Memory`]), swap is memory, and calls that revoke a page are taken for done.

use std::cell::Cell;

use super::{Bytes, number, one_of};
use crate::addr::{Gva, PAGE_SIZE_U64};
use crate::host_mm::HostMmConfig;
use crate::shadow_mmu::Access;
use crate::shadow_mmu::reference::machine::{
    ACCESSED, DIRTY, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, RAM_BYTES, WINDOW_GFN,
    WRITABLE, config, gva,
};
use crate::shadow_mmu::reference::memory::{MAX_SHADOW_PAGES, Memory};
use crate::shadow_mmu::reference::rig::Rig;
use crate::shadow_mmu::reference::step::{At, Change, HostStep, POOL, ROOTS, Step, Then};

/// Longer inputs find nothing that shorter ones do not, only slower.
const MAX_STEPS: usize = 100;
/// Steps between two audits, which take much longer than a step. The end of an input is audited
/// too, so an input that is cut behind a step audits that.
const AUDIT_STEPS: usize = 32;
/// Inputs between two looks at all of the memory that inputs share one after the other.
const PRISTINE_EVERY: u64 = 1 << 14;

thread_local! {
    /// Memory for this thread's next input, and how many there were. An input that finds something
    /// keeps it.
    static MEMORY: Cell<Option<(Memory, u64)>> = const { Cell::new(None) };
}

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let (config, shadow_pages) = choices(config(), &mut bytes);
    let (memory, inputs) = MEMORY.take().unwrap_or_else(|| (Memory::new(), 0));
    let mut rig = Rig::on(&memory, config, shadow_pages);
    run_steps(&mut rig, &mut bytes);
    // All but the content of this memory was made for this input, and is gone after it.
    rig.finish_on(&memory);
    if inputs % PRISTINE_EVERY == 0 {
        assert!(memory.is_pristine(), "something of this input is left, or of one before");
    }
    MEMORY.set(Some((memory, inputs + 1)));
}

/// As [`run`], on a host that may have a rule broken, with memory of its own and the kernel's word
/// for what is unmapped.
#[cfg(test)]
pub(super) fn run_on_kernel(config: HostMmConfig, data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let (config, shadow_pages) = choices(config, &mut bytes);
    let mut rig = Rig::new(config, shadow_pages);
    run_steps(&mut rig, &mut bytes);
    rig.finish();
}

/// The first byte: whether shadow pages are short, and whether pages of zeros are shared.
fn choices(config: HostMmConfig, bytes: &mut Bytes<'_>) -> (HostMmConfig, u32) {
    let choice: u8 = number(bytes);
    let shadow_pages = [12, MAX_SHADOW_PAGES][usize::from(choice & 1)];
    (HostMmConfig { share_zero: choice & 2 == 0, ..config }, shadow_pages)
}

fn run_steps(rig: &mut Rig, bytes: &mut Bytes<'_>) {
    for done in 1..=MAX_STEPS {
        if bytes.is_empty() {
            break;
        }
        rig.run(&step(bytes));
        if done % AUDIT_STEPS == 0 {
            rig.audit();
        }
    }
    rig.audit();
}

fn step(bytes: &mut Bytes<'_>) -> Step {
    match number::<u8>(bytes) % 60 {
        0..=9 => Step::Access(at(bytes), access(bytes), value(bytes)),
        10..=13 => Step::Beside(one_of(bytes, &[1, 2, 16]), access(bytes)),
        14..=15 => Step::Virtual(at(bytes), access(bytes), value(bytes)),
        16..=17 => Step::Edit(
            u64::from(number::<u8>(bytes) % 8) + 1,
            one_of(bytes, &[0, 1, 2, 3, 17, 256]),
            entry(bytes),
        ),
        18..=23 => {
            Step::EditPath(at(bytes), one_of(bytes, &[3, 0, 1, 2]), change(bytes), then(bytes))
        }
        24..=25 => Step::Invlpg(at(bytes)),
        26..=27 => Step::LoadRoot(usize::from(number::<u8>(bytes)) % ROOTS.len()),
        28 => Step::Control(number(bytes), number(bytes)),
        29..=31 => Step::Evict(page(bytes)),
        32 => Step::EvictAll,
        33..=35 => Step::Clean(page(bytes)),
        36 => Step::CleanAll,
        37..=38 => Step::Age(page(bytes)),
        39 => Step::Recycle,
        choice => Step::Host(host_step(choice - 40, bytes)),
    }
}

fn host_step(choice: u8, bytes: &mut Bytes<'_>) -> HostStep {
    match choice {
        0..=1 => HostStep::Migrate(page(bytes)),
        2 => HostStep::Merge(page(bytes), page(bytes)),
        3 => HostStep::MergeWithOther(page(bytes)),
        4 => HostStep::MergeZero(page(bytes)),
        5 => HostStep::Reclaim(page(bytes)),
        6 => HostStep::EvictOther(page(bytes)),
        7 => HostStep::StartLog,
        8 => HostStep::TakeLog(0, POOL),
        9 => HostStep::TakeLog(page(bytes), 1),
        10 => HostStep::ReadOther(page(bytes)),
        11 => {
            let (first, other_first, count) = range(bytes);
            HostStep::RemapToCopies(first, other_first, count)
        }
        12 => HostStep::Clone,
        13 => HostStep::Renew,
        14..=16 => {
            HostStep::WriteOther(page(bytes), one_of(bytes, &[0, 1, 2, 17, 511]), value(bytes))
        }
        17 => HostStep::Free(page(bytes)),
        _ => {
            let (first, other_first, count) = range(bytes);
            HostStep::Exchange(first, other_first, count)
        }
    }
}

/// Up to four pages, from one page of the guest and one of the other object.
fn range(bytes: &mut Bytes<'_>) -> (u64, u64, u64) {
    let (first, other_first) = (page(bytes), page(bytes));
    (first, other_first, u64::from(number::<u8>(bytes) % 4) + 1)
}

fn page(bytes: &mut Bytes<'_>) -> u64 {
    u64::from(number::<u8>(bytes)) % POOL
}

/// One byte an address: the last one again, or the indices into the four tables.
fn at(bytes: &mut Bytes<'_>) -> At {
    let choice: u8 = number(bytes);
    let bits = |shift: u8, count: u8| usize::from(choice >> shift & ((1 << count) - 1));
    let indices = [
        [0, 0, 3, 256][bits(0, 2)],
        bits(2, 1) as u64,
        bits(3, 1) as u64,
        [0, 1, 2, 17][bits(4, 2)],
    ];
    let offset = match bits(6, 2) {
        0 => return None,
        1 => 0,
        2 => 8,
        _ => 4088,
    };
    Some(Gva::new(gva(indices).as_u64() + offset))
}

fn access(bytes: &mut Bytes<'_>) -> Access {
    one_of(bytes, &[Access::Read, Access::Write, Access::Execute])
}

/// An entry that may lead anywhere.
fn entry(bytes: &mut Bytes<'_>) -> u64 {
    let which = u64::from(number::<u8>(bytes));
    let target = match which % 16 {
        0..=4 => which / 16 % 9 * PAGE_SIZE_U64,
        5..=10 => (16 + which / 16) * PAGE_SIZE_U64,
        11 => (which / 16 % 3) << 21 | PAGE_SIZE_BIT,
        12 => (which / 16 % 5 * (RAM_BYTES / 4)) | PAGE_SIZE_BIT,
        13 => RAM_BYTES + which / 16 % 4 * PAGE_SIZE_U64,
        _ => WINDOW_GFN.base().as_u64() + which / 16 % 5 * PAGE_SIZE_U64,
    };
    // The bits that a sane entry has are there unless the input says otherwise.
    let flags = number::<u8>(bytes) ^ 0b11;
    let names = [PRESENT, WRITABLE, NO_EXECUTE, ACCESSED, DIRTY, PAGE_SIZE_BIT, 1 << PHYS_BITS];
    let chosen = names.iter().enumerate().filter(|(bit, _)| flags & 1 << bit != 0);
    let entry = chosen.fold(target, |entry, (_, flag)| entry ^ flag);
    if flags & 0x80 != 0 { entry ^ 1 << 12 } else { entry }
}

/// A value that is no present entry, unless it is meant to be one.
fn value(bytes: &mut Bytes<'_>) -> u64 {
    let small: u8 = number(bytes);
    if small & 3 == 3 { entry(bytes) } else { u64::from(small) << 1 }
}

fn change(bytes: &mut Bytes<'_>) -> Change {
    match number::<u8>(bytes) % 4 {
        0 => Change::To(entry(bytes)),
        1 => Change::Address((16 + page(bytes) % 16) * PAGE_SIZE_U64),
        _ => Change::Flip(one_of(
            bytes,
            &[PRESENT, WRITABLE, NO_EXECUTE, ACCESSED, DIRTY, PAGE_SIZE_BIT],
        )),
    }
}

fn then(bytes: &mut Bytes<'_>) -> Then {
    match number::<u8>(bytes) % 4 {
        0 => Then::Nothing,
        1 => Then::Access(access(bytes)),
        2 => Then::Invlpg(one_of(bytes, &[0, 1, 2, 17])),
        _ => Then::LoadRoot,
    }
}
