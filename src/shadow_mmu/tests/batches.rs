//! What removes many SPTEs lets go of the MMU lock in between, and what others do then: each test puts
//! it there on purpose.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::addr::{Gfn, Gpa, Gva};
use crate::host_mm::{DirtyLog, MmError};
use crate::shadow_mmu::fault::{Install, Installed, Target};
use crate::shadow_mmu::reference::cpu::{Cpu, Done};
use crate::shadow_mmu::reference::machine::{
    ACCESSED, Machine, PAGE_SIZE_BIT, PRESENT, WRITABLE, config, gva,
};
use crate::shadow_mmu::roots::LEAF_SPAN;
use crate::shadow_mmu::walk::{Access, Translation, Walk};
use crate::shadow_mmu::zap::BATCH;
use crate::shadow_mmu::{FaultOutcome, LoadRoot, Mmu, PagingContext, Root};
use crate::sync::lock;

const ROOT: u64 = 1;
const DIRECTORY: u64 = 3;
const LEAF_TABLE: u64 = 4;
const DATA: u64 = 100;
/// Leaf tables that map the page, 512 times each.
const REGIONS: u64 = 3;
const ALIASES: usize = 512 * 3;

fn table(gfn: u64) -> u64 {
    Gfn::new(gfn).base().as_u64() | PRESENT | WRITABLE
}

fn addresses() -> impl Iterator<Item = Gva> {
    (0..REGIONS).flat_map(|region| (0..512).map(move |index| gva([0, 0, region, index])))
}

/// A guest whose addresses all map one page.
fn machine() -> (Arc<Machine>, Cpu) {
    let machine = Machine::new(config(), 64);
    for level in ROOT..DIRECTORY {
        machine.set_entry(level, 0, table(level + 1));
    }
    for region in 0..REGIONS {
        machine.set_entry(DIRECTORY, usize::try_from(region).unwrap(), table(LEAF_TABLE));
    }
    for index in 0..512 {
        machine.set_entry(LEAF_TABLE, index, table(DATA) | ACCESSED);
    }
    let cpu = Cpu::new(&machine, ROOT);
    (Arc::new(machine), cpu)
}

fn read_all(machine: &Machine, cpu: &mut Cpu) {
    for address in addresses() {
        assert_eq!(cpu.read(machine, address), Done::Value(0));
    }
}

fn sptes(machine: &Machine, root: Root) -> usize {
    addresses().filter(|&address| machine.spte_value(root, address) != 0).count()
}

fn rmap_len(machine: &Machine) -> usize {
    let pfn = machine.frame(Gfn::new(DATA)).unwrap();
    machine.mm.frame_table().rmap_len(pfn)
}

/// Has `work` done each time that a batch has let go of the lock; counts the times.
fn between_batches(
    machine: &Arc<Machine>,
    mut work: impl FnMut(&Machine, usize) + Send + 'static,
) -> Arc<AtomicUsize> {
    let (machine_then, times) = (Arc::downgrade(machine), Arc::new(AtomicUsize::new(0)));
    let count = times.clone();
    *lock(&machine.shadow.mmu.between_batches) = Some(Box::new(move || {
        let before = count.fetch_add(1, Ordering::Relaxed);
        if let Some(machine) = machine_then.upgrade() {
            assert!(machine.shadow.mmu.state.is_free(), "the MMU lock is free");
            work(&machine, before);
        }
    }));
    times
}

fn translation(mmu: &Mmu, context: &PagingContext, gva: Gva, access: Access) -> Translation {
    match mmu.walk(context, gva, access).unwrap() {
        Walk::Mapped(translation) => translation,
        _ => panic!("the guest maps it"),
    }
}

#[test]
fn a_flush_lets_go_of_the_lock_after_each_batch() {
    let (machine, mut cpu) = machine();
    read_all(&machine, &mut cpu);
    assert_eq!(rmap_len(&machine), ALIASES);
    machine.assert_sound();
    let mut flushed = machine.shadow.stats().guest_flushed;
    let times = between_batches(&machine, move |machine, _| {
        let now = machine.shadow.stats().guest_flushed;
        assert!(now - flushed <= BATCH as u64, "{} at once", now - flushed);
        flushed = now;
    });
    cpu.load_cr3(&machine, ROOT);
    assert_eq!(sptes(&machine, cpu.root), 0);
    assert_eq!(rmap_len(&machine), 0);
    assert!(times.load(Ordering::Relaxed) >= ALIASES / BATCH - 1);
    machine.assert_sound();
}

/// So do the end of all tables, the checks, and the host's own invalidation.
#[test]
fn so_does_all_else_that_looks_at_many() {
    let (machine, mut cpu) = machine();
    type Work = fn(&Machine);
    let works: [(&str, Work); 5] = [
        ("find a mapping", |machine| {
            assert_eq!(machine.shadow.find_mapping(crate::addr::Pfn::new(0)), None);
        }),
        ("check", |machine| machine.assert_sound()),
        ("clean", |machine| machine.clean(Gfn::new(DATA))),
        ("evict", |machine| machine.evict(Gfn::new(DATA))),
        ("recycle", |machine| machine.shadow.recycle()),
    ];
    for (what, work) in works {
        read_all(&machine, &mut cpu);
        // Frame 0 holds a table, which no address maps.
        assert_ne!(machine.frame(Gfn::new(DATA)), Some(crate::addr::Pfn::new(0)));
        let times = between_batches(&machine, |_, _| {});
        work(&machine);
        assert!(times.load(Ordering::Relaxed) >= ALIASES / BATCH - 1, "{what}");
        *lock(&machine.shadow.mmu.between_batches) = None;
        machine.assert_sound();
        cpu.load_cr3(&machine, ROOT);
    }
}

/// Who waits for the lock gets it: letting it go is not enough, since a mutex lets through who is
/// running.
#[test]
fn whoever_waits_for_the_lock_gets_it_between_two_batches() {
    let (machine, _) = machine();
    let mmu = &*machine.shadow.mmu;
    let had_it = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let locked = mmu.lock();
        scope.spawn(|| {
            let _locked = mmu.lock();
            had_it.store(true, Ordering::Relaxed);
        });
        // Until it is the next.
        while !mmu.state.is_wanted() {
            std::thread::yield_now();
        }
        assert!(!had_it.load(Ordering::Relaxed));
        let _locked = mmu.let_others_in(locked);
        assert!(had_it.load(Ordering::Relaxed));
    });
}

#[test]
fn a_fault_from_before_a_flush_is_not_installed_in_the_middle_of_it_and_one_from_after_is() {
    let (machine, mut cpu) = machine();
    read_all(&machine, &mut cpu);
    let (first, context, root) = (gva([0, 0, 0, 0]), cpu.context, cpu.root);
    let before = machine.shadow.mmu.lock().flush_count(root).unwrap();
    let times = between_batches(&machine, move |machine, number| {
        if number > 0 {
            return;
        }
        assert_eq!(machine.spte_value(root, first), 0, "the first batch was its");
        let mmu = &machine.shadow.mmu;
        let target = Target::of(&machine.object().lock_page(Gfn::new(DATA)).unwrap());
        let translation = &translation(mmu, &context, first, Access::Read);
        let (gva, access, flushes) = (first, Access::Read, before);
        let late = Install { root, gva, access, translation, target, flushes };
        assert!(mmu.install(&late).unwrap() == Installed::Retry);
        machine.set_entry(LEAF_TABLE, 0, table(DATA + 1));
        let fixed = machine.shadow.fault(&context, root, first, Access::Read).unwrap();
        assert_eq!(fixed, FaultOutcome::Fixed);
    });
    assert_eq!(machine.load_root(&context), root);
    assert!(times.load(Ordering::Relaxed) > 1);
    let new = machine.spte_value(root, first);
    assert!(new != 0 && machine.leads_to(new, Gfn::new(DATA + 1)));
    // It, and perhaps neighbours that came with it, of the same leaf table.
    let is_elsewhere = |address: Gva| address.as_u64() / LEAF_SPAN != first.as_u64() / LEAF_SPAN;
    let elsewhere = addresses().filter(|&address| is_elsewhere(address));
    assert_eq!(elsewhere.filter(|&address| machine.spte_value(root, address) != 0).count(), 0);
    machine.assert_sound();
}

/// Maps a large page at `[0, 0, 1, _]`, all of it in use.
fn large_page() -> (Arc<Machine>, Cpu) {
    let (machine, mut cpu) = machine();
    machine.set_entry(DIRECTORY, 1, table(0) | PAGE_SIZE_BIT | 1 << 30);
    for index in 0..512 {
        assert_eq!(cpu.write(&machine, gva([0, 0, 1, index]), 9), Done::Value(0));
    }
    (machine, cpu)
}

#[test]
fn invlpg_finds_all_of_a_large_page_in_the_middle_of_another_flush() {
    let (machine, cpu) = large_page();
    let root = cpu.root;
    let times = between_batches(&machine, move |machine, number| {
        if number == 0 {
            machine.shadow.invlpg(root, gva([0, 0, 1, 500])).unwrap();
            assert_eq!(sptes(machine, root), 0);
        }
    });
    machine.load_root(&cpu.context);
    assert!(times.load(Ordering::Relaxed) > 0);
    machine.assert_sound();
}

#[test]
fn a_large_page_that_is_used_in_the_middle_of_a_flush_is_one_after_it() {
    let (machine, cpu) = large_page();
    let (first, context, root) = (gva([0, 0, 1, 0]), cpu.context, cpu.root);
    between_batches(&machine, move |machine, number| {
        if number == 0 {
            machine.shadow.fault(&context, root, first, Access::Read).unwrap();
        }
    });
    machine.load_root(&context);
    assert_ne!(machine.spte_value(root, first), 0);
    machine.shadow.invlpg(root, gva([0, 0, 1, 300])).unwrap();
    assert_eq!(machine.spte_value(root, first), 0, "it is of the same guest page");
    machine.assert_sound();
}

/// What the first batches of an invalidation have cleared is flushed by a guest's flush in between,
/// and what the guest's flush takes away of the rest is not lost to the invalidation.
#[test]
fn a_guests_flush_in_the_middle_of_an_invalidation_flushes_and_keeps_what_was_written() {
    let (machine, mut cpu) = machine();
    read_all(&machine, &mut cpu);
    let last = gva([0, 0, REGIONS - 1, 511]);
    cpu.write(&machine, last, 7);
    let (root, spte) = (cpu.root, machine.spte_value(cpu.root, last));
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    assert!(machine.is_mapped_for_kvm(spte, &pagemap));
    let times = between_batches(&machine, move |machine, number| {
        if number == 0 {
            assert_eq!(machine.spte_value(root, last), spte, "its batch has not come");
            // An address that is not mapped any more: there is nothing to clear.
            machine.shadow.invlpg(root, gva([0, 0, 0, 0])).unwrap();
            assert!(!machine.is_mapped_for_kvm(spte, &pagemap), "the frame was flushed");
            machine.shadow.invlpg(root, last).unwrap();
        }
    });
    machine.evict(Gfn::new(DATA));
    assert!(times.load(Ordering::Relaxed) > 0);
    assert_eq!(sptes(&machine, root), 0);
    cpu.tlb().clear();
    assert_eq!(cpu.read(&machine, last), Done::Value(7), "the write was lost");
    machine.assert_sound();
}

#[test]
fn nothing_is_mapped_or_given_rights_in_the_middle_of_an_invalidation() {
    for clean in [false, true] {
        let (machine, mut cpu) = machine();
        read_all(&machine, &mut cpu);
        let (first, last) = (gva([0, 0, 0, 0]), gva([0, 0, REGIONS - 1, 511]));
        let root = cpu.root;
        let flushes = machine.shadow.mmu.lock().flush_count(root).unwrap();
        let token = machine.object().lock_page(Gfn::new(DATA)).unwrap().sequence();
        let both = [first, last]
            .map(|gva| (gva, translation(&machine.shadow.mmu, &cpu.context, gva, Access::Write)));
        let times = between_batches(&machine, move |machine, _| {
            let target = Target::Frame { token, read_only: false };
            for (gva, translation) in &both {
                let (gva, access) = (*gva, Access::Write);
                let late = Install { root, gva, access, translation, target, flushes };
                let installed = machine.shadow.mmu.install(&late).unwrap();
                assert!(installed == Installed::Retry, "{gva}");
            }
        });
        let work = if clean { Machine::clean } else { Machine::evict };
        work(&machine, Gfn::new(DATA));
        assert!(times.load(Ordering::Relaxed) > 0);
        let writable = |address| machine.spte_value(root, address) & WRITABLE != 0;
        assert!(!addresses().any(writable));
        machine.assert_sound();
    }
}

#[test]
fn the_host_takes_frames_while_all_is_forgotten_and_no_table_is_given_out() {
    let (machine, mut cpu) = machine();
    read_all(&machine, &mut cpu);
    let old = cpu.root;
    let other = PagingContext { cr3: Gpa::new(0x2000), ..cpu.context };
    let times = between_batches(&machine, move |machine, number| {
        if number == 0 {
            assert_eq!(machine.shadow.root_machine_address(old), None, "void");
            assert_eq!(machine.shadow.load_root(&other).unwrap(), LoadRoot::NeedsRecycle);
            machine.evict(Gfn::new(DATA));
        }
    });
    machine.shadow.recycle();
    assert!(times.load(Ordering::Relaxed) > 0);
    machine.assert_sound();
    assert!(machine.used_frames().iter().all(|&pfn| machine.shadow.find_mapping(pfn).is_none()));
    cpu.load_cr3(&machine, ROOT);
    assert_eq!(cpu.read(&machine, gva([0, 0, 0, 0])), Done::Value(0));
}

/// A page with very many mappings costs the clock no more than two batches, and each of the mappings
/// has its turn.
#[test]
fn ageing_looks_at_a_bounded_number_of_mappings_and_at_all_in_turn() {
    let (machine, mut cpu) = machine();
    read_all(&machine, &mut cpu);
    let root = cpu.root;
    let accessed = || {
        let spte = |address| machine.spte_value(root, address);
        addresses().filter(|&address| spte(address) & ACCESSED != 0).count()
    };
    // Neighbours of a fault begin without the mark.
    cpu.tlb().clear();
    read_all(&machine, &mut cpu);
    let page = machine.object().lock_page(Gfn::new(DATA)).unwrap();
    let mut left = accessed();
    assert_eq!(left, ALIASES);
    let mut looks = 0;
    while left > 0 {
        let used = machine.mm.notifiers().age_page(&page);
        let now = accessed();
        assert!(left - now <= 2 * BATCH, "{} at once", left - now);
        assert_eq!(used, now < left, "what was found is told");
        left = now;
        looks += 1;
        assert!(looks <= ALIASES / BATCH + 1, "{left} are left");
    }
    assert!(!machine.mm.notifiers().age_page(&page));
}

/// While a page with many mappings is evicted no other page is locked.
#[test]
fn a_page_with_many_mappings_is_evicted_alone() {
    let (machine, mut cpu) = machine();
    read_all(&machine, &mut cpu);
    for gfn in 200..300 {
        machine.object().write(Gfn::new(gfn).base(), &[1]).unwrap();
    }
    let times = between_batches(&machine, move |machine, _| {
        let is_locked = |pfn: &_| machine.mm.frame_table().try_lock(*pfn).is_none();
        assert_eq!(machine.used_frames().iter().filter(|pfn| is_locked(pfn)).count(), 1);
    });
    // All there are, whatever the clock thinks of them.
    while machine.frame(Gfn::new(DATA)).is_some() {
        machine.mm.reclaim_frames(64).unwrap();
    }
    assert!(times.load(Ordering::Relaxed) >= ALIASES / BATCH - 1);
    *lock(&machine.shadow.mmu.between_batches) = None;
    machine.assert_sound();
}

/// Whoever takes it, with others or one after the other: they are let go before.
#[test]
fn a_page_with_many_mappings_is_invalidated_alone_whatever_for() {
    type Way = fn(&Machine) -> Result<(), MmError>;
    let (first, count) = (Gfn::new(50), 250);
    let ways: [(&str, Way); 7] = [
        ("eviction", |machine| machine.mm.evict_frames(&machine.used_frames()).map(drop)),
        ("cleaning", |machine| machine.mm.clean_frames(&machine.used_frames()).map(drop)),
        ("migration", |machine| machine.mm.migrate_frames(&machine.used_frames()).map(drop)),
        ("the guest's giving it back", |machine| {
            machine.object().free_pages(Gfn::new(50), 250).map(drop)
        }),
        ("the dirty log", |machine| {
            DirtyLog::start(machine.object().clone())?.take(Gfn::new(50), 250).map(drop)
        }),
        ("sharing", |machine| machine.object().copy_on_write_clone().map(drop)),
        ("lending", |machine| {
            let pages: Vec<Gfn> = (50..300).map(Gfn::new).collect();
            machine.object().lend_pages(&pages, |_, _, _| {})
        }),
    ];
    for (what, way) in ways {
        let (machine, mut cpu) = machine();
        let others = (0..count).map(|at| Gfn::new(first.as_u64() + at));
        let (below, above): (Vec<Gfn>, Vec<Gfn>) = others.partition(|&gfn| gfn < Gfn::new(DATA));
        // In this order they are in the frame table, too.
        below.iter().for_each(|gfn| machine.object().write(gfn.base(), &[1]).unwrap());
        read_all(&machine, &mut cpu);
        above.iter().skip(1).for_each(|gfn| machine.object().write(gfn.base(), &[1]).unwrap());
        let most = Arc::new(AtomicUsize::new(0));
        let seen = most.clone();
        let times = between_batches(&machine, move |machine, _| {
            let is_locked = |pfn: &_| machine.mm.frame_table().try_lock(*pfn).is_none();
            let locked = machine.used_frames().iter().filter(|pfn| is_locked(pfn)).count();
            seen.fetch_max(locked, Ordering::Relaxed);
        });
        way(&machine).unwrap();
        assert!(times.load(Ordering::Relaxed) >= ALIASES / BATCH - 1, "{what}");
        assert_eq!(most.load(Ordering::Relaxed), 1, "{what}");
        *lock(&machine.shadow.mmu.between_batches) = None;
        machine.assert_sound();
    }
}
