//! What other parts of the process do to the window.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::thread;

use super::rig::{FRAMES, Rig, eventually, memory, page, pfn};
use crate::addr::{Gfn, PAGE_SIZE};
use crate::direct_mmu::DirectConfig;
use crate::direct_mmu::hooks::DROP_EVENT;
use crate::direct_mmu::shard::{Deferral, Noted};
use crate::direct_mmu::table::State;
use crate::export_rmap::Invalidation;
use crate::host_mm::HostMmConfig;
use crate::sync::lock;
use crate::sys::foreign;
use crate::sys::memory;

/// Removes four pages of the window: in a frame, in swap, back from swap and clean, and untouched.
fn remove_four(rig: &Rig) {
    for number in [20, 21, 22] {
        rig.write(number, &page(number));
    }
    rig.evict(21);
    rig.evict(22);
    assert!(rig.read(22) == page(22));
    memory::remove(rig.window().region(), 20 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn removed_pages_are_zero_wherever_they_were() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    rig.write(19, &page(19));
    rig.write(24, &page(24));
    for _ in 0..20 {
        remove_four(&rig);
        // The other way round: what is read first need not be what was freed first.
        for number in (20..24).rev() {
            assert!(rig.read(number) == page(0), "page {number}");
        }
        rig.mmu.settle();
    }
    assert!(rig.read(19) == page(19) && rig.read(24) == page(24));
    assert_eq!(rig.mmu.stats().removed, 80);
    rig.assert_sound();
    rig.mmu.settle();
    rig.object.free_pages(Gfn::new(0), FRAMES).unwrap();
    assert_eq!((rig.mm.stats().frames_in_use, rig.mm.stats().swap_slots_used), (0, 0));
    assert_eq!(rig.mm.resident_bytes().unwrap(), 0);
}

/// The worker waits for the lock of a page that is removed, while another one is touched that is removed
/// with it and stands in swap.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_fault_on_a_page_whose_removal_is_not_done_waits_for_it() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    (4..8).for_each(|number| rig.write(number, &page(number)));
    rig.evict(6);
    let handed_over = || rig.mmu.mmu.counters.snapshot().handed_over;
    thread::scope(|scope| {
        let locked = rig.object.lock_page(Gfn::new(4)).unwrap();
        memory::remove(rig.window().region(), 4 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
        let before = handed_over();
        let reader = scope.spawn(|| rig.read(6));
        eventually(|| handed_over() > before || reader.is_finished());
        drop(locked);
        assert!(reader.join().unwrap() == page(0), "the old page came back");
    });
    rig.mmu.settle();
    rig.assert_sound();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn sabotage_drop_event_brings_removed_pages_back() {
    let config = HostMmConfig { sabotage: Some(DROP_EVENT), ..memory(FRAMES) };
    let rig = Rig::new(config, DirectConfig::default());
    remove_four(&rig);
    assert!(rig.read(21) == page(21), "what was in swap is back");
}

/// The remover punches the range at any time after its event was read: here, after the page was
/// freed, used again, written out and read back.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_frame_without_memory_holds_zeros_whatever_stands_in_swap() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    let punch = |number: u64| {
        let region = rig.window().region();
        let file = region.file_offset().unwrap().file();
        crate::sys::memory::punch_hole(file, number * 4096, 4096).unwrap();
    };
    for number in [30, 31, 32, 33] {
        rig.write(number, &page(number));
        rig.evict(number);
        assert!(rig.read(number) == page(number));
    }
    rig.mm.expect_holes();
    [30, 31, 32, 33].into_iter().for_each(punch);
    assert!(rig.read(30) == page(0), "by a fault");
    let mut found = page(1);
    rig.object.read(Gfn::new(31).base(), &mut found).unwrap();
    assert!(found == page(0), "by the host");
    rig.evict(31);
    rig.evict(32);
    assert!(rig.read(31) == page(0) && rig.read(32) == page(0), "after an eviction");
    rig.write(33, &page(3));
    rig.evict(33);
    assert!(rig.read(33) == page(3));
    rig.assert_sound();
}

/// A zap of the layer's own raises the event of a removal, and removes nothing.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_zap_of_our_own_is_no_removal() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    (0..16).for_each(|number| rig.write(number, &page(number + 1)));
    let mmu = &rig.mmu.mmu;
    let before = rig.mmu.stats();
    mmu.zap(&mmu.shards[0], 0..16).unwrap();
    assert!((0..16).all(|number| rig.read(number) == page(number + 1)));
    let after = rig.mmu.stats();
    assert!(after.installs + after.already_mapped > before.installs + before.already_mapped);
    assert_eq!(after.removed, 0);
    rig.assert_sound();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_zap_beside_removals_of_the_same_range_tells_them_apart() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    let mmu = &rig.mmu.mmu;
    for round in 1..200_u64 {
        rig.write(40, &page(round));
        rig.write(41, &page(round));
        rig.write(42, &page(round));
        rig.evict(41);
        thread::scope(|scope| {
            scope.spawn(|| mmu.zap(&mmu.shards[0], 40..43).unwrap());
            memory::remove(rig.window().region(), 41 * PAGE_SIZE, PAGE_SIZE).unwrap();
            assert!(rig.read(41) == page(0), "round {round}");
        });
        assert!(rig.read(40) == page(round) && rig.read(42) == page(round));
    }
    rig.mmu.settle();
    rig.assert_sound();
}

#[test]
fn an_event_that_comes_twice_during_a_zap_is_a_removal_once() {
    let mut noted =
        Noted { zap: Some(crate::direct_mmu::zap::OwnZap::new(&(10..14))), ..Noted::default() };
    let only = |ranges: Vec<Range<u64>>| <[_; 1]>::try_from(ranges).map(|[range]| range);
    assert!(noted.note_removed(10..14).is_empty());
    assert_eq!(noted.deferral(12), Some(Deferral::Zap));
    assert_eq!(only(noted.note_removed(12..16)), Ok(14..16));
    assert_eq!(noted.deferral(15), Some(Deferral::Removal));
    assert_eq!(noted.deferral(16), None);
    assert_eq!(only(noted.end_zap(1)), Ok(12..14));
    assert_eq!(noted.deferral(13), Some(Deferral::Removal));
    assert_eq!(noted.deferral(11), None);
    // A zap that the kernel refused has raised no event: whatever came was somebody else's.
    noted.zap = Some(crate::direct_mmu::zap::OwnZap::new(&(20..24)));
    assert!(noted.note_removed(21..22).is_empty());
    assert_eq!(only(noted.end_zap(0)), Ok(21..22));
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn an_unmapped_part_of_the_window_ends_the_guest_with_a_sentence() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    (50..54).for_each(|number| rig.write(number, &page(number)));
    foreign::unmap(rig.window().region(), 51 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
    eventually(|| rig.mmu.failure().is_some());
    let failure = rig.mmu.failure().unwrap();
    assert!(failure.starts_with("2 guest frames from 0x33 were unmapped"), "{failure}");
    // What was written is known, and can be evicted: nothing in there waits for a window.
    for number in 50..54 {
        rig.evict(number);
        let mut found = page(0);
        rig.object.read(Gfn::new(number).base(), &mut found).unwrap();
        assert!(found == page(number));
    }
    assert!(rig.read(50) == page(50));
    assert_eq!(rig.mm.violations().1, 0);
}

/// What another part of the process then has in its place is none of a guest's pages.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn memory_in_the_place_of_a_part_of_the_window_is_no_finding() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    (50..54).for_each(|number| rig.write(number, &page(number)));
    foreign::replace(rig.window().region(), 51 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
    eventually(|| rig.mmu.failure().is_some());
    for number in 51..53 {
        rig.write(number, &page(7));
        rig.evict(number);
        assert!(rig.read(number) == page(7), "it is present all the while");
    }
    assert_eq!(rig.mm.violations().1, 0, "{:?}", rig.mm.violations());
    assert_eq!(rig.mmu.check_reverse_map(&rig.mm.quiet()).unwrap(), Vec::<String>::new());
}

/// The same before anybody has read that it has happened.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn memory_in_the_place_of_a_part_of_the_window_is_no_finding_before_the_event_either() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    rig.write(51, &page(51));
    rig.settle_ahead();
    rig.object.withdraw_mappings(Gfn::new(51), 1).unwrap();
    let mmu = &rig.mmu.mmu;
    let left = || mmu.has_leftovers(&mmu.mm.frame_table().lock(pfn(51)), Invalidation::Unmap);
    assert!(!left());
    foreign::replace(rig.window().region(), 51 * PAGE_SIZE, PAGE_SIZE).unwrap();
    eventually(|| rig.mmu.failure().is_some());
    rig.write(51, &page(7));
    // As if the event had not been read.
    mmu.let_go.store(false, Ordering::Relaxed);
    assert!(!left());
    // A page that is still the window's, of which nobody knows, is found.
    let other = pfn(50);
    rig.write(50, &page(50));
    rig.settle_ahead();
    mmu.table.clear(50, State::all());
    assert!(mmu.has_leftovers(&mmu.mm.frame_table().lock(other), Invalidation::Unmap));
    mmu.table.set(50, State::MAPPED | State::WRITABLE);
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_moved_part_of_the_window_ends_the_guest_with_a_sentence() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    (50..54).for_each(|number| rig.write(number, &page(number)));
    foreign::move_away(rig.window().region(), 51 * PAGE_SIZE, PAGE_SIZE).unwrap();
    eventually(|| rig.mmu.failure().is_some());
    let failure = lock(&rig.failures).join("; ");
    assert!(failure.contains("1 guest frames from 0x33 were moved"), "{failure}");
    assert_eq!(rig.mm.evict_frames(&[pfn(51)]).unwrap(), 1);
    assert!(rig.read(50) == page(50));
}
