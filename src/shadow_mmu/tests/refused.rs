//! Flushes that the kernel refuses: what processors may still use stays in the books.

use nix::errno::Errno;

use super::directed::{DATA, ROOT, at, machine};
use crate::addr::{Gfn, PAGE_SIZE};
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
