//! What fault-around makes of the guest's entries beside the one that faulted: no more than they say.

use super::directed::{DATA, LEAF_TABLE, ROOT, at, leaf_entry, machine, table};
use crate::addr::Gfn;
use crate::shadow_mmu::reference::cpu::{Cpu, Done};
use crate::shadow_mmu::reference::machine::{
    ACCESSED, DIRTY, Machine, NO_EXECUTE, PHYS_BITS, PRESENT, WRITABLE,
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
