//! A processor that sets the accessed and dirty bits of an SPTE in the last moment: who changes an
//! SPTE by a load and a store loses them, who exchanges it does not.
//!
//! The shadow pages are write-protected with userfaultfd. The first store to one of them, or the first
//! exchange, then waits; the processor sets what bits the entries allow, by another mapping of the
//! same memory; and the store goes on. What was loaded before knows nothing of these bits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vm_memory::{FileOffset, MmapRegion};

use super::directed::{DATA, LEAF_TABLE, ROOT, at, map_data, table};
use crate::addr::{Gfn, PAGE_SIZE};
use crate::export_rmap::{Invalidation, LockedPage, Owner, PageFlags};
use crate::shadow_mmu::reference::cpu::{Cpu, Done};
use crate::shadow_mmu::reference::machine::{
    ACCESSED, DIRTY, Machine, NO_EXECUTE, PRESENT, WRITABLE, config,
};
use crate::sys::memory::{create_memfd, page_words};
use crate::sys::uffd::Features;
use crate::sys::uffd_window::{Window, WindowEvent};

const SHADOW_PAGES: usize = 16;
const BYTES: usize = SHADOW_PAGES * PAGE_SIZE;

/// What the processor gets at the shadow pages by.
struct Hardware {
    window: Window,
    tables: MmapRegion,
    /// How often it came in the last moment before a store.
    marked: AtomicU64,
    stopped: AtomicBool,
}

impl Hardware {
    /// Sets the bits that a processor may set: accessed where an entry is present, dirty where it can
    /// be written.
    fn mark(&self, page_at: usize) {
        for entry in page_words(&self.tables, page_at).unwrap() {
            let old = entry.load(Ordering::Acquire);
            let marks = match old & (PRESENT | WRITABLE) {
                0 | WRITABLE => 0,
                PRESENT => ACCESSED,
                _ => ACCESSED | DIRTY,
            };
            entry.fetch_or(marks, Ordering::AcqRel);
        }
        self.marked.fetch_add(1, Ordering::Relaxed);
    }

    fn run(&self) {
        let mut events = Vec::new();
        while !self.stopped.load(Ordering::Relaxed) {
            if self.window.wait(Some(Duration::from_millis(20))).unwrap() {
                self.window.read(&mut events).unwrap();
            }
            for event in events.drain(..) {
                let WindowEvent::Fault { offset, protected, .. } = event else { continue };
                if protected {
                    self.mark(offset);
                    self.window.write_protect(offset, PAGE_SIZE, false).unwrap();
                } else {
                    // Of two threads that touch it first, one finds it mapped.
                    let _ = self.window.install(offset, PAGE_SIZE, false);
                }
            }
        }
    }
}

/// A guest whose page [`DATA`] is mapped at `at(0)`, dirty in its own tables. Its SPTE can be written
/// and has not been, which the processor makes up for in the middle of `step`.
fn beside_a_writer(step: impl FnOnce(&Machine, &mut Cpu, &Hardware)) {
    let file = create_memfd("shadow-pages", BYTES as u64).unwrap();
    let map =
        || MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), BYTES).unwrap();
    let (tables, seen) = (map(), Arc::new(map()));
    // All pages are there, so that the first touch by the other mapping only maps them.
    for page in 0..SHADOW_PAGES {
        page_words(&tables, page * PAGE_SIZE).unwrap()[0].store(0, Ordering::Relaxed);
    }
    let window = Window::open(seen.clone(), 0..BYTES, Features::all());
    let window = window.unwrap_or_else(|error| panic!("{error}"));
    let (marked, stopped) = (AtomicU64::new(0), AtomicBool::new(false));
    let hardware = Hardware { window, tables, marked, stopped };
    thread::scope(|scope| {
        scope.spawn(|| hardware.run());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let machine = Machine::with_tables(config(), seen);
            map_data(&machine);
            let mut cpu = Cpu::new(&machine, ROOT);
            cpu.write(&machine, at(0), 7);
            machine.clean(Gfn::new(DATA));
            cpu.load_cr3(&machine, ROOT);
            cpu.read(&machine, at(0));
            let spte = machine.spte_value(cpu.root, at(0));
            assert_eq!(spte & (PRESENT | WRITABLE | DIRTY), PRESENT | WRITABLE);
            assert!(!locked(&machine).flags().contains(PageFlags::DIRTY));
            hardware.window.write_protect(0, BYTES, true).unwrap();
            step(&machine, &mut cpu, &hardware);
            assert!(hardware.marked.load(Ordering::Relaxed) > 0, "nothing was stored");
        }));
        hardware.stopped.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

fn locked(machine: &Machine) -> LockedPage<'_> {
    machine.object().try_lock_resident(Gfn::new(DATA)).unwrap()
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn an_invalidation_hands_over_the_bits_that_were_set_in_the_last_moment() {
    for number in 0..3 {
        beside_a_writer(|machine, cpu, _| {
            let page = locked(machine);
            let owner = Owner { object: machine.object().number(), gfn: Gfn::new(DATA) };
            let kinds = [Invalidation::Unmap, Invalidation::Replace(owner), Invalidation::Clean];
            page.begin_invalidation();
            let harvest = machine.mm.notifiers().invalidate_page(&page, kinds[number]);
            assert!(harvest.dirty && harvest.accessed, "{:?}: {harvest:?}", kinds[number]);
            let spte = machine.spte_value(cpu.root, at(0));
            assert_eq!(spte & (WRITABLE | DIRTY), 0, "{:?}", kinds[number]);
        });
    }
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn ageing_finds_the_last_use_and_leaves_the_page_dirty() {
    beside_a_writer(|machine, cpu, hardware| {
        let page = locked(machine);
        machine.mm.notifiers().age_page(&page);
        assert_eq!(machine.spte_value(cpu.root, at(0)) & ACCESSED, 0);
        hardware.window.write_protect(0, BYTES, true).unwrap();
        assert!(machine.mm.notifiers().age_page(&page), "it was used once more");
        assert_eq!(machine.spte_value(cpu.root, at(0)) & (ACCESSED | DIRTY), DIRTY);
    });
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_guests_flush_notes_a_write_of_the_last_moment() {
    for by_cr3 in [false, true] {
        beside_a_writer(|machine, cpu, _| {
            if by_cr3 {
                assert_eq!(machine.load_root(&cpu.context), cpu.root);
            } else {
                machine.shadow.invlpg(cpu.root, at(0)).unwrap();
            }
            assert_eq!(machine.spte_value(cpu.root, at(0)), 0);
            let flags = locked(machine).flags();
            assert!(flags.contains(PageFlags::BY_WRITE), "by CR3: {by_cr3}: {flags:?}");
        });
    }
}

/// The SPTE may be written and not executed. It gets that right as well, and the processor writes.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_right_that_is_added_leaves_the_page_dirty() {
    beside_a_writer(|machine, cpu, hardware| {
        machine.set_entry(LEAF_TABLE, 0, table(DATA) | ACCESSED | DIRTY | NO_EXECUTE);
        cpu.load_cr3(machine, ROOT);
        assert_eq!(cpu.read(machine, at(0)), Done::Value(7));
        let before = machine.spte_value(cpu.root, at(0));
        assert_eq!(before & (WRITABLE | DIRTY | NO_EXECUTE), WRITABLE | NO_EXECUTE);
        machine.set_entry(LEAF_TABLE, 0, table(DATA) | ACCESSED | DIRTY);
        hardware.window.write_protect(0, BYTES, true).unwrap();
        assert_eq!(cpu.execute(machine, at(0)), Done::Value(7));
        let after = machine.spte_value(cpu.root, at(0));
        assert_eq!(after & (WRITABLE | DIRTY | NO_EXECUTE), WRITABLE | DIRTY);
        assert_eq!(machine.shadow.stats().upgrades, 1);
    });
}
