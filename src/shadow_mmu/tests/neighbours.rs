//! What fault-around makes of the guest's entries beside the one that faulted: no more than they say.

use super::directed::{DATA, LEAF_TABLE, ROOT, at, leaf_entry, machine, table};
use crate::addr::{Gfn, Gva};
use crate::shadow_mmu::reference::cpu::{Cpu, Done};
use crate::shadow_mmu::reference::machine::{
    ACCESSED, DIRTY, Machine, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, WRITABLE, gva,
};

/// An entry that the guest has used for reading and writing.
fn used(index: u64) -> u64 {
    table(DATA + index) | ACCESSED | DIRTY
}

/// Faults at `at(0)`, whose neighbour's entry is this; the neighbour's SPTE. Its page is in a frame.
fn neighbour_of(machine: &Machine, cpu: &mut Cpu, entry: u64) -> u64 {
    machine.object().write(Gfn::new(DATA + 1).base(), &[1; 8]).unwrap();
    machine.set_entry(LEAF_TABLE, 0, used(0));
    machine.set_entry(LEAF_TABLE, 1, entry);
    assert_eq!(cpu.read(machine, at(0)), Done::Value(0));
    machine.assert_sound();
    machine.spte_value(cpu.root, at(1))
}

const RIGHTS: u64 = PRESENT | WRITABLE | ACCESSED | DIRTY | NO_EXECUTE;

#[test]
fn a_neighbour_gets_the_rights_of_its_entry() {
    for (entry, expected) in [
        (used(1), PRESENT | WRITABLE),
        (used(1) & !WRITABLE, PRESENT),
        (used(1) & !DIRTY, PRESENT),
        (used(1) | NO_EXECUTE, PRESENT | WRITABLE | NO_EXECUTE),
        (used(1) & !ACCESSED, 0),
        (used(1) & !PRESENT, 0),
        (used(1) | 1 << PHYS_BITS, 0),
    ] {
        let (machine, mut cpu) = machine();
        let spte = neighbour_of(&machine, &mut cpu, entry);
        assert_eq!(spte & RIGHTS, expected, "{entry:x}");
    }
}

/// The bit that forbids execution is reserved while EFER.NXE is clear: the neighbour's own fault is to
/// say so.
#[test]
fn a_neighbour_with_a_reserved_bit_is_left_to_its_own_fault() {
    let (machine, mut cpu) = machine();
    cpu.context.nxe = false;
    cpu.load_cr3(&machine, ROOT);
    assert_eq!(neighbour_of(&machine, &mut cpu, used(1) | NO_EXECUTE), 0);
    assert_eq!(cpu.read(&machine, at(1)), Done::Fault(0b1001));
}

#[test]
fn a_neighbour_gets_no_right_that_a_table_above_denies() {
    let above = table(LEAF_TABLE);
    for (directory, expected) in
        [(above & !WRITABLE, PRESENT), (above | NO_EXECUTE, PRESENT | WRITABLE | NO_EXECUTE)]
    {
        let (machine, mut cpu) = machine();
        machine.set_entry(LEAF_TABLE - 1, 0, directory);
        let spte = neighbour_of(&machine, &mut cpu, used(1));
        assert_eq!(spte & RIGHTS, expected, "{directory:x}");
    }
}

#[test]
fn a_neighbour_that_is_shared_or_lent_is_read_only() {
    for lent in [false, true] {
        let (machine, mut cpu) = machine();
        let object = machine.object();
        object.write(Gfn::new(DATA + 1).base(), &[1; 8]).unwrap();
        machine.set_entry(LEAF_TABLE, 0, used(0));
        machine.set_entry(LEAF_TABLE, 1, used(1));
        let page = [Gfn::new(DATA + 1)];
        let clone = (!lent).then(|| object.share_pages(page.into_iter()).unwrap());
        if lent {
            object.lend_pages(&page, |_, _, _| ()).unwrap();
        }
        assert_eq!(cpu.read(&machine, at(0)), Done::Value(0));
        let spte = machine.spte_value(cpu.root, at(1));
        assert_eq!(spte & RIGHTS, PRESENT, "lent: {lent}");
        drop(clone);
        machine.assert_sound();
    }
}

/// The walk's marks are writes to the guest's tables: they outlive the frames that these were in.
#[test]
fn a_table_that_the_walk_has_marked_is_written() {
    let (machine, mut cpu) = machine();
    for number in ROOT..=LEAF_TABLE {
        machine.clean(Gfn::new(number));
    }
    cpu.write(&machine, at(0), 7);
    for number in ROOT..=LEAF_TABLE {
        machine.evict(Gfn::new(number));
    }
    assert_eq!(machine.read_word(leaf_entry(0)), used(0));
    assert_eq!(machine.read_word(ROOT << 12), table(ROOT + 1) | ACCESSED);
    machine.assert_sound();
}

/// Maps the 512 data pages, which are in frames, by entries that the guest has used.
fn map_table(machine: &Machine) {
    for index in 0..512 {
        machine.object().write(Gfn::new(DATA + index).base(), &[1; 8]).unwrap();
        machine.set_entry(LEAF_TABLE, usize::try_from(index).unwrap(), used(index));
    }
}

/// Reads at these indices; the number of faults.
fn faults(machine: &Machine, cpu: &mut Cpu, indices: impl Iterator<Item = u64>) -> u64 {
    let faults = indices.map(|index| {
        assert!(matches!(cpu.read(machine, at(index)), Done::Value(_)));
        u64::from(cpu.faults)
    });
    faults.sum()
}

#[test]
fn a_table_that_is_used_throughout_takes_a_fault_for_twice_as_many_pages_each_time() {
    let (machine, mut cpu) = machine();
    map_table(&machine);
    // At 0, 16, 32, 64, 128 and 256.
    assert_eq!(faults(&machine, &mut cpu, 0..512), 6);
    assert_eq!(machine.shadow.stats().fault_around, 512 - 6);
    // What was learnt there holds where nothing is known.
    machine.set_entry(LEAF_TABLE - 1, 1, table(LEAF_TABLE));
    assert_eq!(cpu.read(&machine, gva([0, 0, 1, 7])), Done::Value(0x0101_0101_0101_0101));
    assert_eq!(machine.shadow.stats().fault_around, 512 - 6 + 511);
    machine.assert_sound();
}

#[test]
fn where_neighbours_are_not_used_few_are_installed() {
    let (machine, mut cpu) = machine();
    map_table(&machine);
    let alone = (0..512).step_by(32);
    assert_eq!(faults(&machine, &mut cpu, alone), 16);
    // 16 at first, then 8, then 4 each time.
    assert_eq!(machine.shadow.stats().fault_around, 15 + 7 + 14 * 3);
    machine.assert_sound();
}

/// Faults at page 2 of a large page with this entry, whose page 1 is in a frame; the SPTE of page 1.
fn neighbour_in_large_page(machine: &Machine, cpu: &mut Cpu, entry: u64) -> u64 {
    machine.object().write(Gfn::new(513).base(), &[1; 8]).unwrap();
    machine.set_entry(LEAF_TABLE - 1, 1, table(512) | PAGE_SIZE_BIT | entry);
    assert_eq!(cpu.read(machine, gva([0, 0, 1, 2])), Done::Value(0));
    machine.assert_sound();
    machine.spte_value(cpu.root, gva([0, 0, 1, 1]))
}

#[test]
fn the_pages_of_a_large_page_are_neighbours_by_its_one_entry() {
    for (entry, expected) in [
        (0, PRESENT),
        (ACCESSED | DIRTY, PRESENT | WRITABLE),
        (ACCESSED | DIRTY | NO_EXECUTE, PRESENT | WRITABLE | NO_EXECUTE),
    ] {
        let (machine, mut cpu) = machine();
        let spte = neighbour_in_large_page(&machine, &mut cpu, entry);
        assert_eq!(spte & RIGHTS, expected, "{entry:x}");
        assert!(machine.leads_to(spte, Gfn::new(513)));
        assert_eq!(machine.shadow.stats().fault_around, 1, "the others are in no frame");
        // The guest's flush of any of its addresses is one of all.
        machine.shadow.invlpg(cpu.root, gva([0, 0, 1, 300])).unwrap();
        for index in [1, 2] {
            assert_eq!(machine.spte_value(cpu.root, gva([0, 0, 1, index])), 0);
        }
    }
}

/// Writes one page after the other, none of which was ever touched, by entries with these bits beside
/// `used`; the number of faults.
fn write_untouched(machine: &Machine, cpu: &mut Cpu, missing: u64, pages: u64) -> u64 {
    for index in 0..pages {
        machine.set_entry(LEAF_TABLE, usize::try_from(index).unwrap(), used(index) & !missing);
    }
    let write = |at: Gva, cpu: &mut Cpu| {
        assert_eq!(cpu.write(machine, at, 7), Done::Value(0));
        u64::from(cpu.faults)
    };
    (0..pages).map(|index| write(at(index), cpu)).sum()
}

#[test]
fn ahead_of_a_stream_of_writes_pages_that_nobody_has_touched_get_frames() {
    let (machine, mut cpu) = machine();
    let faults = write_untouched(&machine, &mut cpu, 0, 128);
    let ahead = machine.shadow.stats().zeroed_ahead;
    assert_eq!(faults + ahead, 128, "each page once");
    assert!(faults < 16, "{faults}");
    machine.assert_sound();
}

/// The first write must be seen where the guest's entry is not dirty yet, and nothing is brought for an
/// entry that was never used.
#[test]
fn ahead_of_a_stream_of_writes_nothing_is_brought_that_its_entry_would_not_let_be_written() {
    for missing in [DIRTY, ACCESSED, WRITABLE] {
        let (machine, mut cpu) = machine();
        cpu.context.write_protect = missing != WRITABLE;
        cpu.load_cr3(&machine, ROOT);
        let faults = write_untouched(&machine, &mut cpu, missing, 64);
        let is_denied = missing != WRITABLE;
        assert_eq!(faults == 64, is_denied, "{faults}");
        assert_eq!(machine.shadow.stats().zeroed_ahead == 0, is_denied);
        machine.assert_sound();
    }
}

/// Frames that others need are left to them: nothing is evicted for what may never be touched.
#[test]
fn ahead_of_a_stream_of_writes_no_frame_is_taken_from_anyone() {
    let (machine, mut cpu) = machine();
    let frames = u64::from(machine.mm.frame_count());
    let mut page = 10_000;
    while machine.mm.has_spare_frames() {
        machine.object().write(Gfn::new(page).base(), &[1; 8]).unwrap();
        page += 1;
    }
    assert!(page - 10_000 < frames);
    let evictions = machine.mm.stats().evictions;
    assert_eq!(write_untouched(&machine, &mut cpu, 0, 8), 8);
    assert_eq!(machine.shadow.stats().zeroed_ahead, 0);
    assert_eq!(machine.mm.stats().evictions, evictions);
    machine.assert_sound();
}
