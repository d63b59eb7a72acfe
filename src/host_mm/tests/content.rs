//! Content, as the hypervisor itself reads and writes it.

use super::rig::{FRAMES, Rig, config, gfn, page};
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::host_mm::{HostMm, MmError};
use crate::sys::signal::pretended::Stop;

const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

#[test]
fn a_page_never_written_is_zero_and_costs_no_swap() {
    let rig = Rig::new(config(), 8);
    for _ in 0..3 {
        assert_eq!(rig.host_read(gfn(3)), ZEROS);
        rig.evict(gfn(3));
    }
    let stats = rig.mm.stats();
    assert_eq!((stats.zero_fills, stats.zero_drops), (3, 3));
    assert_eq!((stats.swap_outs, stats.swap_slots_used), (0, 0));
    rig.assert_sound();
}

#[test]
fn content_survives_evictions_and_is_written_only_when_it_changed() {
    let rig = Rig::new(config(), 8);
    let stats = || rig.mm.stats();

    rig.host_write(gfn(1), &page(1));
    rig.evict(gfn(1));
    assert_eq!((stats().swap_outs, stats().swap_slots_used), (1, 1));
    assert_eq!(rig.host_read(gfn(1)), page(1));

    rig.evict(gfn(1));
    assert_eq!((stats().swap_outs, stats().clean_drops), (1, 1));
    assert_eq!(rig.host_read(gfn(1)), page(1));

    rig.host_write(gfn(1), &page(2));
    rig.evict(gfn(1));
    assert_eq!((stats().swap_outs, stats().swap_slots_used), (2, 1));
    assert_eq!(rig.host_read(gfn(1)), page(2));

    rig.host_write(gfn(1), &ZEROS);
    rig.evict(gfn(1));
    assert_eq!((stats().zero_drops, stats().swap_slots_used), (1, 0));
    assert_eq!(rig.host_read(gfn(1)), ZEROS);
    assert_eq!(stats().swap_ins, 3);
    rig.assert_sound();
}

#[cfg(feature = "export-notifier")]
#[test]
fn a_cleaned_page_is_dropped_without_a_write_unless_it_was_written_again() {
    let rig = Rig::new(config(), 8);
    rig.host_write(gfn(0), &page(1));
    rig.clean(gfn(0));
    rig.clean(gfn(0));
    assert_eq!(rig.mm.stats().swap_outs, 1, "clean is clean");
    rig.evict(gfn(0));
    assert_eq!(rig.mm.stats().clean_drops, 1);
    assert_eq!(rig.host_read(gfn(0)), page(1));

    rig.host_write(gfn(0), &page(2));
    rig.clean(gfn(0));
    rig.host_write(gfn(0), &page(3));
    rig.evict(gfn(0));
    assert_eq!(rig.mm.stats().swap_outs, 3, "dirty again after the cleaning");
    assert_eq!(rig.host_read(gfn(0)), page(3));

    rig.host_write(gfn(0), &ZEROS);
    rig.clean(gfn(0));
    assert_eq!(rig.mm.stats().swap_slots_used, 0);
    rig.evict(gfn(0));
    assert_eq!(rig.host_read(gfn(0)), ZEROS);
    rig.assert_sound();
}

/// What only counts or tidies up is over at once when a stop is asked for.
#[test]
fn nothing_goes_through_all_memory_at_a_quick_end() {
    let mm = HostMm::new(config()).unwrap();
    let object = mm.create_object(200 * PAGE_SIZE_U64).unwrap();
    (0..200).for_each(|number| object.write(gfn(number).base(), &page(number + 1)).unwrap());
    let first: Vec<Pfn> = (0..50).map(|n| object.lock_page(gfn(n)).unwrap().pfn()).collect();
    assert_eq!(mm.evict_frames(&first).unwrap(), 50);
    assert_eq!((object.audit(&mm.quiet()).in_swap, object.audit(&mm.quiet()).in_frames), (50, 150));
    {
        let _stop = Stop::after(10);
        assert_eq!(
            (object.audit(&mm.quiet()).in_swap, object.audit(&mm.quiet()).in_frames),
            (10, 0)
        );
    }
    {
        let _stop = Stop::after(10);
        drop(object);
    }
    let stats = mm.stats();
    assert_eq!((stats.frames_in_use, stats.swap_slots_used), (150, 40));
}

#[test]
fn reads_and_writes_cross_page_borders() {
    let rig = Rig::new(config(), 8);
    let bytes: Vec<u8> =
        (0..3 * PAGE_SIZE + 100).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let start = Gpa::new(2 * PAGE_SIZE_U64 - 17);
    rig.object.write(start, &bytes).unwrap();
    for number in 1..=5 {
        if rig.frame(gfn(number)).is_some() {
            rig.evict(gfn(number));
        }
    }
    let mut found = vec![0; bytes.len()];
    rig.object.read(start, &mut found).unwrap();
    assert!(found == bytes);
    let first = rig.host_read(gfn(1));
    assert_eq!(first[..PAGE_SIZE - 17], ZEROS[..PAGE_SIZE - 17]);
    assert_eq!(first[PAGE_SIZE - 17..], bytes[..17]);
    assert_eq!(rig.host_read(gfn(5))[83..], ZEROS[83..], "nothing beyond");
}

#[test]
fn addresses_outside_the_object_are_refused_whole() {
    let rig = Rig::new(config(), 8);
    let end = 8 * PAGE_SIZE_U64;
    let mut buf = [0; 16];
    for (start, len) in [(end - 8, 16), (end, 1), (u64::MAX - 3, 16), (u64::MAX, 1)] {
        let gpa = Gpa::new(start);
        let write = rig.object.write(gpa, &buf[..len]).unwrap_err();
        let read = rig.object.read(gpa, &mut buf[..len]).unwrap_err();
        for error in [write, read] {
            assert!(
                matches!(error, MmError::OutsideMemory { gpa: named, memory_bytes, .. }
                    if named == gpa && memory_bytes == end),
                "{error}"
            );
        }
    }
    assert_eq!(rig.mm.stats().zero_fills, 0, "not even in part");
    rig.object.write(Gpa::new(end - 8), &buf[..8]).unwrap();
    rig.object.read(Gpa::new(end), &mut []).unwrap();
    let locked = rig.object.lock_page(gfn(8)).unwrap_err();
    assert!(matches!(locked, MmError::OutsideMemory { .. }), "{locked}");
    assert!(rig.object.try_lock_resident(gfn(8)).is_none());
}

#[test]
fn a_huge_object_costs_nothing_until_it_is_touched() {
    let bytes = 64 << 30;
    let mm = HostMm::new(config()).unwrap();
    let object = mm.create_object(bytes).unwrap();
    assert_eq!(mm.resident_bytes().unwrap(), 0);
    assert_eq!(mm.stats().frames_in_use, 0);
    let ends = [0, bytes / 2 - 8, bytes - 16];
    for at in ends {
        object.write(Gpa::new(at), &at.to_le_bytes()).unwrap();
    }
    for at in ends {
        let mut found = [0; 8];
        object.read(Gpa::new(at), &mut found).unwrap();
        assert_eq!(u64::from_le_bytes(found), at);
    }
    assert_eq!(mm.stats().frames_in_use, 3);
    assert_eq!(mm.resident_bytes().unwrap(), 3 * PAGE_SIZE_U64);
}

#[test]
fn memory_four_times_as_large_as_the_ration_keeps_its_content() {
    let rig = Rig::new(config(), 4 * FRAMES);
    for number in 0..4 * FRAMES {
        rig.host_write(gfn(number), &page(number));
    }
    for number in (0..4 * FRAMES).rev() {
        assert!(rig.host_read(gfn(number)) == page(number), "page {number}");
    }
    let stats = rig.mm.stats();
    assert_eq!(stats.frames, FRAMES);
    assert!(stats.peak_frames_in_use <= FRAMES, "I5");
    assert!(rig.mm.resident_bytes().unwrap() <= FRAMES * PAGE_SIZE_U64);
    rig.assert_sound();
}

#[test]
fn dropping_an_object_gives_back_its_frames_and_slots_and_no_others() {
    let mm = HostMm::new(config()).unwrap();
    let kept = mm.create_object(16 * PAGE_SIZE_U64).unwrap();
    kept.write(Gpa::new(0), &page(7)).unwrap();
    let before = mm.stats();
    let dropped = mm.create_object(2 * FRAMES * PAGE_SIZE_U64).unwrap();
    for number in 0..2 * FRAMES {
        dropped.write(gfn(number).base(), &page(number)).unwrap();
    }
    // Read back, so that some pages have both a frame and a slot.
    for number in 0..FRAMES {
        dropped.read(gfn(number).base(), &mut [0]).unwrap();
    }
    assert!(mm.stats().swap_slots_used >= FRAMES);
    drop(dropped);
    let mut found = ZEROS;
    kept.read(Gpa::new(0), &mut found).unwrap();
    assert!(found == page(7));
    let after = mm.stats();
    assert_eq!(after.frames_in_use, before.frames_in_use);
    assert!(after.swap_slots_used <= 1, "the kept page's at most");
    drop(kept);
    let end = mm.stats();
    assert_eq!((end.frames_in_use, end.swap_slots_used), (0, 0));
    assert_eq!(mm.violations().1, 0);
}

#[test]
fn paranoid_mode_gives_freed_frames_back_to_the_kernel() {
    let mut paranoid = config();
    paranoid.paranoid = true;
    let rig = Rig::new(paranoid, 8);
    rig.host_write(gfn(1), &page(1));
    rig.host_write(gfn(2), &page(2));
    assert_eq!(rig.mm.resident_bytes().unwrap(), 2 * PAGE_SIZE_U64);
    rig.evict(gfn(1));
    assert_eq!(rig.mm.resident_bytes().unwrap(), PAGE_SIZE_U64);
    assert!(rig.host_read(gfn(1)) == page(1));
    rig.assert_sound();
}

#[test]
fn frames_that_do_not_exist_or_hold_nothing_are_passed_over() {
    let rig = Rig::new(config(), 8);
    rig.host_write(gfn(1), &page(1));
    let pfn = rig.frame(gfn(1)).unwrap();
    let outside = Pfn::new(rig.mm.frame_count());
    let empty = Pfn::new(rig.mm.frame_count() - 1);
    let frames = [outside, pfn, empty, pfn];
    assert_eq!(rig.mm.evict_frames(&frames).unwrap(), 1);
    assert_eq!(rig.mm.evict_frames(&frames).unwrap(), 0);
    assert_eq!(rig.mm.clean_frames(&frames).unwrap(), 0);
    assert!(rig.host_read(gfn(1)) == page(1));
}

#[test]
fn host_memory_of_an_impossible_size_is_refused() {
    for bytes in [0, (4 << 20) - 4096, (4 << 20) + 1, (4 << 40) + 4096] {
        let mut config = config();
        config.host_memory_bytes = bytes;
        let error = HostMm::new(config).unwrap_err();
        assert!(
            matches!(error, MmError::BadHostMemory { bytes: named, .. } if named == bytes),
            "{error}"
        );
    }
}
