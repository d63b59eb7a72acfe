//! Faults that something overtakes between their look at the guest's tables and the host's books and
//! their install: they start over, and leave nothing behind.

use std::thread;

use super::directed::{DATA, LEAF_TABLE, ROOT, at, leaf_entry, machine, table};
use crate::addr::{Gfn, Gva};
use crate::export_rmap::{LockedPage, PageFlags};
use crate::shadow_mmu::fault::{Install, Installed, Target};
use crate::shadow_mmu::reference::cpu::{Cpu, Done};
use crate::shadow_mmu::reference::machine::{
    ACCESSED, Machine, PAGE_SIZE_BIT, PRESENT, WRITABLE, gva,
};
use crate::shadow_mmu::walk::{Access, Translation, Walk};

/// What a fault knows before it installs: what its root's flush count was, what the guest's tables
/// say, and where the page is.
fn look(machine: &Machine, cpu: &Cpu, gva: Gva, access: Access) -> (Translation, Target) {
    let walked = machine.shadow.mmu.walk(&cpu.context, gva, access).unwrap();
    let Walk::Mapped(translation) = walked else { panic!("the guest maps {gva}") };
    let object = machine.object();
    let page = match access {
        Access::Write => object.lock_page_for_write(translation.gfn),
        Access::Read | Access::Execute => object.lock_page(translation.gfn),
    };
    (translation, Target::of(&page.unwrap()))
}

/// A fault that `overtaking` comes in the middle of.
fn fault(
    machine: &Machine,
    cpu: &Cpu,
    gva: Gva,
    access: Access,
    overtaking: impl FnOnce(),
) -> Installed {
    let mmu = &*machine.shadow.mmu;
    let flushes = mmu.lock().flush_count(cpu.root).unwrap();
    let (translation, target) = look(machine, cpu, gva, access);
    overtaking();
    let root = cpu.root;
    mmu.install(&Install { root, gva, access, translation: &translation, target, flushes }).unwrap()
}

/// The SPTE stands and may only be read. A write fault looks at the page, which it may write, and is
/// about to add that right; then the page is shared with a clone, or a copy of it given out.
#[test]
fn the_right_to_write_is_not_added_once_the_page_was_shared_or_lent() {
    for lent in [false, true] {
        let (machine, mut cpu) = machine();
        assert_eq!(cpu.read(&machine, at(0)), Done::Value(0));
        let before = machine.spte_value(cpu.root, at(0));
        assert_eq!(before & (PRESENT | WRITABLE), PRESENT);
        let mut clone = None;
        let installed = fault(&machine, &cpu, at(0), Access::Write, || {
            let object = machine.object();
            if lent {
                object.lend_pages(&[Gfn::new(DATA)], |_, _, _| ()).unwrap();
            } else {
                clone = Some(object.copy_on_write_clone().unwrap());
            }
        });
        assert!(installed == Installed::Retry, "lent: {lent}");
        let after = machine.spte_value(cpu.root, at(0));
        assert_eq!(after & WRITABLE, 0, "lent: {lent}");
        assert_eq!(cpu.write(&machine, at(0), 7), Done::Value(0));
        assert_eq!(machine.mm.stats().recalls, u64::from(lent));
        if let Some(clone) = clone {
            let mut word = [0xff; 8];
            clone.read(Gfn::new(DATA).base(), &mut word).unwrap();
            assert_eq!(word, [0; 8], "the clone's page is its own");
        }
        machine.assert_sound();
    }
}

#[test]
fn neighbours_that_were_looked_at_before_a_guests_flush_are_not_installed() {
    let (machine, mut cpu) = machine();
    for index in 0..16 {
        cpu.write(&machine, at(index), index);
    }
    cpu.load_cr3(&machine, ROOT);
    let mmu = &*machine.shadow.mmu;
    let flushes = mmu.lock().flush_count(cpu.root).unwrap();
    let (root, gva, access) = (cpu.root, at(0), Access::Read);
    let (translation, target) = look(&machine, &cpu, gva, access);
    let install = Install { root, gva, access, translation: &translation, target, flushes };
    assert!(mmu.install(&install).unwrap() == Installed::Done);
    machine.shadow.invlpg(root, at(9)).unwrap();
    mmu.fault_around(&cpu.context, &install).unwrap();
    for index in 1..16 {
        assert_eq!(machine.spte_value(root, at(index)), 0, "{index}");
    }
    let flushes = mmu.lock().flush_count(root).unwrap();
    mmu.fault_around(&cpu.context, &Install { flushes, ..install }).unwrap();
    for index in 1..16 {
        assert_ne!(
            machine.spte_value(root, at(index)),
            0,
            "{index}: had it not been for the flush"
        );
    }
    machine.assert_sound();
}

/// The guest maps another page at the address while a fault there is under way, and flushes: by an
/// `invlpg` of the address, of another address in the same large page, or by a load of CR3.
#[test]
fn every_flush_of_the_guests_counts_for_faults_that_are_under_way() {
    let [small, large, huge] = [(LEAF_TABLE, 0), (3, 1), (2, 1)];
    let addresses = [
        (small, [at(0), at(0)], table(DATA), table(DATA + 1)),
        (large, [gva([0, 0, 1, 5]), gva([0, 0, 1, 9])], PAGE_SIZE_BIT | table(0), 0),
        (huge, [gva([0, 1, 7, 5]), gva([0, 1, 8, 9])], PAGE_SIZE_BIT | table(0), 0),
    ];
    for ((level_table, index), [one, other], before, after) in addresses {
        for by_cr3 in [false, true] {
            let (machine, mut cpu) = machine();
            machine.set_entry(level_table, index, before);
            if one != other {
                cpu.read(&machine, other);
            }
            let installed = fault(&machine, &cpu, one, Access::Read, || {
                machine.set_entry(level_table, index, after);
                if by_cr3 {
                    assert_eq!(machine.load_root(&cpu.context), cpu.root);
                } else {
                    machine.shadow.invlpg(cpu.root, other).unwrap();
                }
            });
            assert!(installed == Installed::Retry, "{one}, by CR3: {by_cr3}");
            assert_eq!(machine.spte_value(cpu.root, one), 0, "{one}, by CR3: {by_cr3}");
            machine.assert_sound();
        }
    }
}

/// A flush that comes while the walk reads the tables: what it has read may be of before.
#[test]
fn a_flush_during_the_walk_makes_the_fault_start_over() {
    let (machine, mut cpu) = machine();
    let root = cpu.root;
    thread::scope(|scope| {
        let table_page = machine.object().lock_page(Gfn::new(LEAF_TABLE)).unwrap();
        let (reached, cpu) = (&machine, &mut cpu);
        let reader = scope.spawn(move || cpu.read(reached, at(0)));
        // The walk has come to the last table.
        wait_until_wanted(&table_page);
        machine.shadow.invlpg(root, at(0)).unwrap();
        drop(table_page);
        assert_eq!(reader.join().unwrap(), Done::Value(0));
    });
    assert_eq!(machine.shadow.stats().retries, 1);
    machine.assert_sound();
}

/// Between the walk's look at an entry and its mark there, another vCPU maps another page.
#[test]
fn a_mark_is_not_set_in_an_entry_that_has_changed() {
    let (machine, mut cpu) = machine();
    machine.object().write(Gfn::new(DATA + 1).base(), &9u64.to_le_bytes()).unwrap();
    let lock = |gfn| machine.object().try_lock_resident(Gfn::new(gfn)).unwrap();
    thread::scope(|scope| {
        let leaf_table = lock(LEAF_TABLE);
        let (reached, cpu) = (&machine, &mut cpu);
        let reader = scope.spawn(move || cpu.read(reached, at(0)));
        wait_until_wanted(&leaf_table);
        // It has been through the root, and is to come there again to mark it, before any other.
        let root_table = lock(ROOT);
        drop(leaf_table);
        wait_until_wanted(&root_table);
        machine.set_entry(LEAF_TABLE, 0, table(DATA + 1));
        drop(root_table);
        assert_eq!(reader.join().unwrap(), Done::Value(9), "of the page that is mapped now");
    });
    assert_eq!(machine.read_word(leaf_entry(0)), table(DATA + 1) | ACCESSED);
    machine.assert_sound();
}

/// Waits until another thread sleeps for this page's lock.
fn wait_until_wanted(page: &LockedPage<'_>) {
    while !page.flags().contains(PageFlags::WAITERS) {
        thread::yield_now();
    }
}
