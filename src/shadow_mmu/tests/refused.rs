//! Flushes that the kernel refuses: what processors may still use stays in the books.

use nix::errno::Errno;

use super::directed::{DATA, ROOT, at, machine};
use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::host_mm::MmError;
use crate::shadow_mmu::reference::cpu::Done;
use crate::shadow_mmu::reference::machine::Machine;
use crate::sys::recording::Recording;

/// Whether the frame has been flushed since this was asked last.
fn is_flushed(recording: &Recording, machine: &Machine, frame: usize) -> bool {
    let view = machine.shadow.guest_view().region().as_ptr().addr();
    recording.take().iter().any(|gone| gone.contains(&(view + frame * PAGE_SIZE)))
}

/// The guest's own removal is undone as a whole: had its entry been taken out of the reverse map before
/// the flush, the host could take the frame while a processor uses it.
#[test]
fn a_guests_flush_that_fails_leaves_the_mapping_and_its_entry() {
    let (machine, mut cpu) = machine();
    assert_eq!(cpu.write(&machine, at(0), 7), Done::Value(0));
    let pfn = machine.frame(Gfn::new(DATA)).unwrap();
    let recording = Recording::start();
    recording.refuse(Some(Errno::ENOMEM));
    machine.shadow.invlpg(cpu.root, at(0)).unwrap_err();
    machine.shadow.load_root(&cpu.context).unwrap_err();
    assert!(machine.mm.frame_table().get(pfn).unwrap().is_exported());
    assert_eq!(machine.shadow.find_mapping(pfn), Some(at(0)));
    machine.assert_sound();
    recording.refuse(None);
    assert!(!is_flushed(&recording, &machine, pfn.index()));
    machine.shadow.invlpg(cpu.root, at(0)).unwrap();
    assert!(is_flushed(&recording, &machine, pfn.index()));
    assert!(!machine.mm.frame_table().get(pfn).unwrap().is_exported());
    machine.assert_sound();
}

/// The host has cleared SPTEs, and its flush failed; so did the guest's own. Until one has succeeded, a
/// processor may use them, and each later flush has to include them.
#[test]
fn what_a_failed_flush_was_for_is_left_for_the_next_one() {
    for by_cr3 in [false, true] {
        let (machine, mut cpu) = machine();
        assert_eq!(cpu.write(&machine, at(0), 7), Done::Value(0));
        let pfn = machine.frame(Gfn::new(DATA)).unwrap();
        let recording = Recording::start();
        recording.refuse(Some(Errno::ENOMEM));
        machine.mm.evict_frames(&[pfn]).unwrap_err();
        assert_eq!(machine.spte_value(cpu.root, at(0)), 0);
        machine.shadow.invlpg(cpu.root, at(0)).unwrap_err();
        recording.refuse(None);
        if by_cr3 {
            cpu.load_cr3(&machine, ROOT);
        } else {
            machine.shadow.invlpg(cpu.root, at(0)).unwrap();
        }
        assert!(is_flushed(&recording, &machine, pfn.index()), "by CR3: {by_cr3}");
        machine.assert_sound();
    }
}

/// Something that takes a page from where processors may use it.
type Taking = fn(&Machine) -> Result<(), MmError>;

fn frame_of_data(machine: &Machine) -> Pfn {
    machine.frame(Gfn::new(DATA)).unwrap()
}

/// What flushes whoever maps the page, and those that a page must be shared for.
const PRIVATE: [(&str, Taking); 7] = [
    ("eviction", |machine| machine.mm.evict_frames(&[frame_of_data(machine)]).map(drop)),
    ("cleaning", |machine| machine.mm.clean_frames(&[frame_of_data(machine)]).map(drop)),
    ("migration", |machine| machine.mm.migrate_frames(&[frame_of_data(machine)]).map(drop)),
    ("the guest's giving it back", |machine| {
        machine.object().free_pages(Gfn::new(DATA), 1).map(drop)
    }),
    ("remapping", |machine| {
        let spare = machine.mm.create_object(PAGE_SIZE_U64)?;
        machine.object().exchange_pages(Gfn::new(DATA), &spare, Gfn::new(0), 1)
    }),
    ("lending", |machine| machine.object().lend_pages(&[Gfn::new(DATA)], |_, _, _| {})),
    ("sharing", |machine| machine.object().copy_on_write_clone().map(drop)),
];
const SHARED: [(&str, Taking); 4] = [
    ("copy-on-write", |machine| machine.object().lock_page_for_write(Gfn::new(DATA)).map(drop)),
    ("eviction", |machine| machine.mm.evict_frames(&[frame_of_data(machine)]).map(drop)),
    ("migration", |machine| machine.mm.migrate_frames(&[frame_of_data(machine)]).map(drop)),
    ("the guest's giving it back", |machine| {
        machine.object().free_pages(Gfn::new(DATA), 1).map(drop)
    }),
];

/// The first attempt has taken the SPTE and its entry in the reverse map, the flush failed; so a
/// processor may use a frame that is not exported. Whoever comes next must flush it, whatever for.
#[test]
fn after_a_failed_flush_each_way_to_take_the_page_flushes_though_nobody_maps_it() {
    let private = PRIVATE.iter().map(|way| (false, way));
    let ways: Vec<_> = private.chain(SHARED.iter().map(|way| (true, way))).collect();
    for &(shared, &(first, fail)) in &ways {
        // What takes the right to write alone leaves the mapping, which the next finds.
        for &(_, &(second, take)) in ways.iter().filter(|(other, _)| *other == shared) {
            let (machine, mut cpu) = machine();
            assert_eq!(cpu.write(&machine, at(0), 7), Done::Value(0));
            let _clone = shared.then(|| machine.object().copy_on_write_clone().unwrap());
            assert_eq!(cpu.read(&machine, at(0)), Done::Value(7));
            let pfn = frame_of_data(&machine);
            let recording = Recording::start();
            recording.refuse(Some(Errno::ENOMEM));
            fail(&machine).expect_err(first);
            assert_eq!(machine.frame(Gfn::new(DATA)), Some(pfn), "{first}");
            recording.refuse(None);
            assert!(!is_flushed(&recording, &machine, pfn.index()), "{first}");
            take(&machine).unwrap();
            let flushed = is_flushed(&recording, &machine, pfn.index());
            assert!(flushed, "{first} failed, then {second}; shared: {shared}");
            machine.assert_sound();
        }
    }
}
