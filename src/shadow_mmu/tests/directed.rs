//! One rule a test.

use std::fs::File;
use std::sync::atomic::Ordering;
use std::thread;

use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE, PAGE_SIZE_U64};
use crate::export_rmap::FlushReason;
use crate::export_rmap::client::FORGET_RMAP;
use crate::export_rmap::pausing_client::PausingClient;
use crate::host_mm::HostMmConfig;
use crate::host_mm::hooks::SWAP_CORRUPT;
use crate::shadow_mmu::PagingContext;
use crate::shadow_mmu::fault::{Install, Installed, Target};
use crate::shadow_mmu::reference::cpu::{Cpu, Done};
use crate::shadow_mmu::reference::machine::{
    ACCESSED, DIRTY, MONITOR, Machine, NO_EXECUTE, PAGE_SIZE_BIT, PRESENT, WINDOW_GFN, WRITABLE,
    config, gva,
};
use crate::shadow_mmu::walk::{Access, Walk};
use crate::shadow_mmu::{FaultOutcome, GuestAccessError, LoadRoot};
use crate::sys::recording::Recording;

pub(super) const ROOT: u64 = 1;
/// Where the tests' leaf table is.
pub(super) const LEAF_TABLE: u64 = 4;
pub(super) const DATA: u64 = 100;

pub(super) fn table(gfn: u64) -> u64 {
    (gfn * PAGE_SIZE_U64) | PRESENT | WRITABLE
}

pub(super) fn at(index: u64) -> Gva {
    gva([0, 0, 0, index])
}

/// The byte address of the leaf entry for `at(index)`.
pub(super) fn leaf_entry(index: u64) -> u64 {
    LEAF_TABLE * PAGE_SIZE_U64 + index * 8
}

/// A guest whose addresses `at(0..16)` map the data pages from 100 on, never used so far.
pub(super) fn machine_with(config: HostMmConfig, shadow_pages: u32) -> (Machine, Cpu) {
    let machine = Machine::new(config, shadow_pages);
    map_data(&machine);
    let cpu = Cpu::new(&machine, ROOT);
    (machine, cpu)
}

pub(super) fn map_data(machine: &Machine) {
    for level in ROOT..LEAF_TABLE {
        machine.set_entry(level, 0, table(level + 1));
    }
    for index in 0..16 {
        machine.set_entry(LEAF_TABLE, usize::try_from(index).unwrap(), table(DATA + index));
    }
}

pub(super) fn machine() -> (Machine, Cpu) {
    machine_with(config(), 64)
}

#[test]
fn a_clean_page_is_read_only_until_the_write_that_makes_it_dirty() {
    let (machine, mut cpu) = machine();
    assert_eq!(cpu.read(&machine, at(0)), Done::Value(0));
    let spte = machine.spte_value(cpu.root, at(0));
    assert_eq!(spte & (PRESENT | WRITABLE | DIRTY), PRESENT);
    assert_eq!(machine.read_word(leaf_entry(0)), table(DATA) | ACCESSED);

    assert_eq!(cpu.write(&machine, at(0), 7), Done::Value(0));
    assert_eq!(cpu.faults, 1);
    assert_eq!(machine.read_word(leaf_entry(0)), table(DATA) | ACCESSED | DIRTY);
    assert_eq!(machine.shadow.stats().upgrades, 1);

    // Dirty already: one fault gives all rights, and the SPTE's dirty bit waits for the write.
    cpu.load_cr3(&machine, ROOT);
    assert_eq!(cpu.read(&machine, at(0)), Done::Value(7));
    let spte = machine.spte_value(cpu.root, at(0));
    assert_eq!(spte & (WRITABLE | DIRTY), WRITABLE);
    assert_eq!(cpu.write(&machine, at(0), 8), Done::Value(7));
    assert_eq!(cpu.faults, 0);
    machine.assert_sound();
}

/// Reads, writes and looks at whether a write would do, by the emulator and for pushes.
#[test]
fn an_access_across_pages_faults_at_the_first_byte_that_is_missing() {
    let (machine, cpu) = machine();
    let (shadow, context) = (&machine.shadow, &cpu.context);
    let mut bytes = [7; 8];
    // The second page is not mapped, then neither is; the third is, and read-only.
    for (start, first_missing, write_code) in [
        (at(16).as_u64() - 3, at(16), 2),
        (at(17).as_u64() - 3, Gva::new(at(17).as_u64() - 3), 2),
        (at(2).as_u64() - 3, at(2), 3),
    ] {
        machine.set_entry(LEAF_TABLE, 2, table(DATA + 2) & !WRITABLE);
        let start = Gva::new(start);
        let expected = |done, code| match done {
            Err(GuestAccessError::PageFault { gva, error_code }) => {
                assert_eq!((gva, error_code), (first_missing, code), "at {start}");
            }
            other => panic!("{other:?} at {start}"),
        };
        expected(shadow.write_virtual(context, start, &[9; 8]), write_code);
        expected(shadow.check_write_virtual(context, start, 8), write_code);
        if write_code == 2 {
            expected(shadow.read_virtual(context, start, &mut bytes, Access::Read), 0);
            expected(shadow.read_virtual(context, start, &mut bytes, Access::Execute), 0x10);
        }
    }
    // Nothing of what did not fit was written.
    shadow.read_virtual(context, at(1), &mut bytes, Access::Read).unwrap();
    let last = Gva::new(at(2).as_u64() - 3);
    shadow.read_virtual(context, last, &mut bytes[..3], Access::Read).unwrap();
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn a_write_sets_no_bit_if_it_is_not_allowed() {
    let (machine, mut cpu) = machine();
    let read_only = (DATA * PAGE_SIZE_U64) | PRESENT;
    machine.set_entry(LEAF_TABLE, 0, read_only | NO_EXECUTE);
    assert_eq!(cpu.write(&machine, at(0), 1), Done::Fault(0b00011));
    assert_eq!(cpu.execute(&machine, at(0)), Done::Fault(0b10001));
    assert_eq!(machine.read_word(leaf_entry(0)), read_only | NO_EXECUTE);
    machine.set_entry(LEAF_TABLE, 1, 0);
    assert_eq!(cpu.write(&machine, at(1), 1), Done::Fault(0b00010));
    // With CR0.WP clear a kernel writes where it likes.
    cpu.context.write_protect = false;
    cpu.load_cr3(&machine, ROOT);
    assert_eq!(cpu.write(&machine, at(0), 1), Done::Value(0));
    assert_eq!(machine.shadow.stats().guest_faults, 3);
}

#[test]
fn the_zero_fill_of_one_page_installs_its_used_neighbours() {
    let (machine, mut cpu) = machine();
    for index in 0..16 {
        cpu.write(&machine, at(index), index);
    }
    cpu.load_cr3(&machine, ROOT);
    machine.evict(Gfn::new(DATA + 3));
    assert_eq!(cpu.read(&machine, at(0)), Done::Value(0));
    assert_eq!(machine.shadow.stats().fault_around, 14, "not the page that is in no frame");
    for index in (1..16).filter(|&index| index != 3) {
        let spte = machine.spte_value(cpu.root, at(index));
        assert_eq!(spte & (PRESENT | ACCESSED | DIRTY), PRESENT, "reclaim is not misled");
        assert_eq!(cpu.read(&machine, at(index)), Done::Value(index));
        assert_eq!(cpu.faults, 0);
    }
    machine.assert_sound();
}

#[test]
fn eviction_removes_and_cleaning_write_protects_every_mapping() {
    let (machine, mut cpu) = machine();
    // Two addresses, one page.
    machine.set_entry(LEAF_TABLE, 1, table(DATA));
    cpu.write(&machine, at(0), 5);
    cpu.write(&machine, at(1), 6);
    machine.clean(Gfn::new(DATA));
    for index in 0..2 {
        let spte = machine.spte_value(cpu.root, at(index));
        assert_eq!(spte & (PRESENT | WRITABLE | DIRTY), PRESENT);
    }
    assert_eq!(machine.shadow.stats().write_protected, 2);
    cpu.tlb().clear();
    cpu.write(&machine, at(0), 7);
    assert_eq!(cpu.faults, 1, "the write after a cleaning is seen");
    machine.evict(Gfn::new(DATA));
    for index in 0..2 {
        assert_eq!(machine.spte_value(cpu.root, at(index)), 0);
    }
    cpu.tlb().clear();
    assert_eq!(cpu.read(&machine, at(1)), Done::Value(7));
    machine.assert_sound();
}

#[test]
fn ageing_reports_each_use_once() {
    let (machine, mut cpu) = machine();
    cpu.read(&machine, at(0));
    let age = || {
        let page = machine.object().try_lock_resident(Gfn::new(DATA)).unwrap();
        let used = machine.mm.notifiers().age_page(&page);
        machine.mm.notifiers().flush(&[page.pfn()], FlushReason::Aged).unwrap();
        used
    };
    assert!(age());
    assert!(!age());
    cpu.tlb().clear();
    cpu.read(&machine, at(0));
    assert_eq!(cpu.faults, 0, "it is still mapped");
    assert!(age());
}

/// Maps a large page at `[0, 0, 1, _]`, touches pages of it, and takes it away again.
fn large_page_is_flushed_whole(level_table: u64, index: usize, addresses: [Gva; 3]) {
    let (machine, mut cpu) = machine();
    machine.set_entry(level_table, index, table(0) | PAGE_SIZE_BIT | 1 << 30);
    for address in addresses {
        assert_eq!(cpu.write(&machine, address, 9), Done::Value(0), "{address}");
    }
    let entry = machine.read_word(level_table * PAGE_SIZE_U64 + index as u64 * 8);
    assert_eq!(entry & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    machine.set_entry(level_table, index, 0);
    machine.shadow.invlpg(cpu.root, Gva::new(addresses[0].as_u64() + 0x123)).unwrap();
    for address in addresses {
        assert_eq!(machine.spte_value(cpu.root, address), 0, "{address}");
    }
    cpu.tlb().clear();
    for address in addresses {
        assert_eq!(cpu.read(&machine, address), Done::Fault(0), "{address}");
    }
    machine.assert_sound();
}

#[test]
fn invlpg_forgets_all_of_a_2_mib_page() {
    let addresses = [gva([0, 0, 1, 5]), gva([0, 0, 1, 0]), gva([0, 0, 1, 511])];
    large_page_is_flushed_whole(3, 1, addresses);
}

#[test]
fn invlpg_forgets_all_of_a_1_gib_page() {
    let addresses = [gva([0, 1, 7, 5]), gva([0, 1, 0, 0]), gva([0, 1, 511, 511])];
    large_page_is_flushed_whole(2, 1, addresses);
}

#[test]
fn invlpg_of_a_small_page_leaves_its_neighbours() {
    let (machine, mut cpu) = machine();
    cpu.read(&machine, at(0));
    cpu.read(&machine, at(1));
    machine.shadow.invlpg(cpu.root, at(0)).unwrap();
    assert_eq!(machine.spte_value(cpu.root, at(0)), 0);
    assert_ne!(machine.spte_value(cpu.root, at(1)), 0);
}

#[test]
fn tables_that_lead_out_of_ram_or_in_a_circle_end_the_walk() {
    let (machine, mut cpu) = machine();
    // The PML4 as its own lower tables: the address maps the PML4 itself.
    machine.set_entry(ROOT, 1, table(ROOT));
    let itself = gva([1, 1, 1, 1]);
    let entry = table(ROOT) | ACCESSED;
    assert_eq!(cpu.read(&machine, Gva::new(itself.as_u64() + 8)), Done::Value(entry));
    // Not dirty: the write makes it so, and then overwrites it.
    assert_eq!(cpu.write(&machine, Gva::new(itself.as_u64() + 8), 0), Done::Value(entry | DIRTY));
    assert_eq!(machine.read_word(ROOT * PAGE_SIZE_U64 + 8), 0);
    machine.set_entry(ROOT, 2, table(1 << 30));
    assert_eq!(cpu.read(&machine, gva([2, 0, 0, 0])), Done::Fault(0b1001));
    machine.set_entry(LEAF_TABLE, 0, table((1 << 30) + 5));
    let outside = Gpa::new(((1 << 30) + 5) * PAGE_SIZE_U64 + 16);
    assert_eq!(cpu.read(&machine, Gva::new(16)), Done::Outside(outside));
    machine.assert_sound();
}

#[test]
fn the_pinned_window_is_mapped_and_not_in_the_reverse_map() {
    let (machine, mut cpu) = machine();
    machine.set_entry(LEAF_TABLE, 0, table(WINDOW_GFN.as_u64() + 3));
    assert_eq!(cpu.write(&machine, at(0), 77), Done::Value(0));
    assert_eq!(cpu.read(&machine, at(0)), Done::Value(77));
    machine.set_entry(LEAF_TABLE, 1, table(WINDOW_GFN.as_u64() + 4));
    assert!(matches!(cpu.read(&machine, at(1)), Done::Outside(_)), "past its end");
    machine.assert_sound();
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let spte = machine.spte_value(cpu.root, at(0));
    assert!(machine.is_mapped_for_kvm(spte, &pagemap));
    machine.shadow.invlpg(cpu.root, at(0)).unwrap();
    assert_eq!(machine.spte_value(cpu.root, at(0)), 0);
    assert!(!machine.is_mapped_for_kvm(spte, &pagemap), "no processor has it any more");
    cpu.tlb().clear();
    assert_eq!(cpu.read(&machine, at(0)), Done::Value(77));
}

#[test]
fn every_root_has_the_monitor_and_a_guest_cannot_reach_it() {
    let (machine, mut cpu) = machine();
    let other = PagingContext { cr3: Gpa::new(0x2000), ..cpu.context };
    let other = machine.load_root(&other);
    for root in [cpu.root, other] {
        let address = machine.shadow.root_machine_address(root).unwrap();
        assert_eq!(machine.shadow_entry(address, 255).load(Ordering::Relaxed), MONITOR);
    }
    machine.set_entry(ROOT, 255, table(2));
    let inside = gva([255, 0, 0, 0]);
    let outcome = machine.shadow.fault(&cpu.context, cpu.root, inside, Access::Read).unwrap();
    assert_eq!(outcome, FaultOutcome::GuestFault { error_code: 0 });
    assert_eq!(cpu.read(&machine, inside), Done::Fault(0));
    let address = machine.shadow.root_machine_address(cpu.root).unwrap();
    assert_eq!(machine.shadow_entry(address, 255).load(Ordering::Relaxed), MONITOR);
}

#[test]
fn when_shadow_pages_run_out_recycling_helps_and_voids_the_roots() {
    let (machine, mut cpu) = machine_with(config(), 6);
    for slot in 1..4 {
        machine.set_entry(ROOT, slot, table(2));
    }
    assert_eq!(cpu.write(&machine, at(0), 3), Done::Value(0));
    assert_eq!(cpu.read(&machine, gva([1, 0, 0, 1])), Done::NeedsRecycle);
    let other = PagingContext { cr3: Gpa::new(0x5000), ..cpu.context };
    assert_eq!(machine.shadow.load_root(&other).unwrap(), LoadRoot::NeedsRecycle);
    assert_eq!(cpu.read(&machine, at(0)), Done::Value(3), "what is there stays usable");

    let old = cpu.root;
    machine.shadow.recycle();
    machine.assert_sound();
    assert!(machine.used_frames().iter().all(|&pfn| machine.shadow.find_mapping(pfn).is_none()));
    assert_eq!(machine.shadow.root_machine_address(old), None);
    let outcome = machine.shadow.fault(&cpu.context, old, at(0), Access::Read).unwrap();
    assert_eq!(outcome, FaultOutcome::Fixed, "a fault on a void root is repeated on the new one");
    machine.shadow.invlpg(old, at(0)).unwrap();

    machine.evict(Gfn::new(DATA));
    cpu.load_cr3(&machine, ROOT);
    assert_eq!(cpu.read(&machine, gva([1, 0, 0, 0])), Done::Value(3), "dirty was not forgotten");
    assert_eq!(machine.shadow.stats().recycles, 1);
    machine.assert_sound();
}

#[test]
fn a_mapping_whose_page_was_invalidated_meanwhile_is_not_installed() {
    let (machine, mut cpu) = machine();
    cpu.read(&machine, at(1));
    let mmu = &*machine.shadow.mmu;
    let gfn = Gfn::new(DATA);
    for clean_only in [false, true] {
        let token = machine.object().lock_page(gfn).unwrap().sequence();
        if clean_only {
            machine.clean(gfn);
        } else {
            machine.evict(gfn);
        }
        let Walk::Mapped(translation) = mmu.walk(&cpu.context, at(0), Access::Read).unwrap() else {
            panic!("the guest maps it");
        };
        let flushes = mmu.lock().flush_count(cpu.root).unwrap();
        let installed = mmu.install(&Install {
            root: cpu.root,
            gva: at(0),
            access: Access::Read,
            translation: &translation,
            target: Target::Frame { token, read_only: false },
            flushes,
        });
        assert!(matches!(installed, Ok(Installed::Retry)));
        assert_eq!(machine.spte_value(cpu.root, at(0)), 0);
        assert!(machine.mm.frame_table().rmap_entries(token.pfn()).is_empty());
        machine.assert_sound();
    }
}

#[test]
fn sabotage_forget_rmap_leaves_an_spte_that_the_check_reports() {
    let sabotage = Some(FORGET_RMAP);
    let (machine, mut cpu) = machine_with(HostMmConfig { sabotage, ..config() }, 64);
    cpu.write(&machine, at(0), 1);
    let differences = machine.shadow.check_reverse_map();
    assert_eq!(differences.len(), 1, "{differences:?}");
    let pfn = machine.frame(Gfn::new(DATA)).unwrap();
    assert!(differences[0].contains(&format!("frame {pfn}")), "{differences:?}");
    assert_eq!(machine.shadow.find_mapping(pfn), Some(at(0)));
    {
        let _stop = crate::sys::signal::pretended::Stop::after(0);
        assert!(machine.shadow.check_reverse_map().is_empty(), "it left off");
    }
    machine.evict(Gfn::new(DATA));
    assert_ne!(machine.spte_value(cpu.root, at(0)), 0, "nobody was told");
}

#[test]
fn dropping_the_shadow_mmu_leaves_nothing_exported_and_keeps_the_content() {
    let (machine, mut cpu) = machine();
    cpu.write(&machine, at(0), 42);
    let (mm, object) = (machine.mm.clone(), machine.shadow.object().clone());
    drop(machine);
    let frames: Vec<_> = (0..mm.frame_count()).map(crate::addr::Pfn::new).collect();
    for &pfn in &frames {
        assert!(!mm.frame_table().get(pfn).unwrap().is_exported());
    }
    mm.evict_frames(&frames).unwrap();
    let mut word = [0; 8];
    object.read(Gfn::new(DATA).base(), &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), 42);
    assert_eq!(mm.violations().1, 0);
}

#[test]
fn a_bad_page_ahead_of_a_stream_troubles_only_those_who_ask_for_it() {
    let sabotage = Some(SWAP_CORRUPT);
    let (machine, mut cpu) = machine_with(HostMmConfig { sabotage, ..config() }, 64);
    let indices = 0..200;
    for index in indices.clone() {
        let entry = table(DATA + index) | ACCESSED | DIRTY;
        machine.set_entry(LEAF_TABLE, usize::try_from(index).unwrap(), entry);
        cpu.write(&machine, at(index), index + 1);
    }
    let data: Vec<_> =
        indices.clone().map(|index| machine.frame(Gfn::new(DATA + index)).unwrap()).collect();
    machine.mm.evict_frames(&data).unwrap();
    cpu.tlb().clear();
    let mut bad = 0;
    for index in indices {
        match machine.shadow.fault(&cpu.context, cpu.root, at(index), Access::Read) {
            Ok(outcome) => {
                assert_eq!(outcome, FaultOutcome::Fixed);
                assert_eq!(cpu.read(&machine, at(index)), Done::Value(index + 1));
            }
            Err(error) => {
                assert!(error.to_string().contains("checksum"), "{error}");
                machine.object().lock_page(Gfn::new(DATA + index)).unwrap_err();
                bad += 1;
            }
        }
    }
    assert_eq!(bad, 200 / 16);
    assert!(machine.shadow.stats().read_ahead > 0, "{:?}", machine.shadow.stats());
}

#[test]
fn vcpus_that_differ_in_what_sptes_depend_on_share_no_root() {
    let (machine, cpu) = machine();
    let same = machine.load_root(&PagingContext { ..cpu.context });
    assert_eq!(same, cpu.root);
    let unprotected = PagingContext { write_protect: false, ..cpu.context };
    let executable = PagingContext { nxe: false, ..cpu.context };
    assert_ne!(machine.load_root(&unprotected), cpu.root);
    assert_ne!(machine.load_root(&executable), cpu.root);
}

/// The SPTE is gone, but a processor may still use it until the host has flushed. A guest that
/// flushes in between must not be told that it is done before it is.
#[test]
fn a_guests_flush_includes_what_the_host_has_cleared_and_not_flushed_yet() {
    for by_cr3 in [false, true] {
        let (machine, mut cpu) = machine();
        let gfn = Gfn::new(DATA);
        // It is called after the SPTEs were cleared, and the flush comes after it.
        let (client, before_the_flush) = PausingClient::new();
        let registration = machine.mm.notifiers().register(client).unwrap();
        assert_eq!(cpu.write(&machine, at(0), 7), Done::Value(0));
        let view = machine.shadow.guest_view().region().as_ptr().addr();
        let frame = view + machine.frame(gfn).unwrap().index() * PAGE_SIZE;
        let mut is_flushed = || {
            let recording = Recording::start();
            if by_cr3 {
                cpu.load_cr3(&machine, ROOT);
            } else {
                machine.shadow.invlpg(cpu.root, at(0)).unwrap();
            }
            recording.take().iter().any(|gone| gone.contains(&frame))
        };
        thread::scope(|scope| {
            let evicting = scope.spawn(|| machine.evict(gfn));
            before_the_flush.wait();
            let flushed = [is_flushed(), is_flushed()];
            // Let go first: one that fails must not be waited for.
            before_the_flush.end();
            evicting.join().unwrap();
            assert!(flushed[0], "the SPTE is gone, and its frame is flushed all the same");
            assert!(!flushed[1], "once");
        });
        assert!(!is_flushed(), "and not after the host has done it");
        drop(registration);
        machine.assert_sound();
    }
}
