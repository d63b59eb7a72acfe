//! The other places where the host takes a page from under its clients: migration, pages given
//! back, remapped ranges.

use std::sync::atomic::Ordering;

use super::client::Event;
use super::rig::{Rig, config, gfn, page};
use crate::{MAX_REMAP_PAGES, MmError};
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::{FlushReason, Invalidation};

const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

fn written(pages: u64) -> Rig {
    let rig = Rig::new(config(), pages);
    for number in 0..pages {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    rig.log.take();
    rig
}

fn frames(rig: &Rig, pages: std::ops::Range<u64>) -> Vec<Pfn> {
    pages.map(|number| rig.frame(gfn(number)).unwrap()).collect()
}

#[test]
fn migration_moves_a_batch_with_one_flush_and_keeps_the_copy_in_swap() {
    let rig = written(6);
    let old = frames(&rig, 0..6);
    rig.clean(gfn(0));
    rig.log.take();
    assert_eq!(rig.mm.migrate_frames(&old).unwrap(), 6);
    let events = rig.log.take();
    assert_eq!(events.len(), 7, "{events:?}");
    let mut sorted = old.clone();
    sorted.sort_unstable();
    assert_eq!(events[6], Event::Flushed(sorted, FlushReason::Invalidated));
    assert!(frames(&rig, 0..6).iter().all(|pfn| !old.contains(pfn)));
    for number in 0..6 {
        assert!(!rig.client.is_mapped(gfn(number)));
        assert!(rig.client.read(0, gfn(number)).unwrap() == page(number));
    }
    let writes = rig.mm.stats().swap_outs;
    rig.evict(gfn(0));
    assert_eq!(rig.mm.stats().swap_outs, writes, "it was clean, and still is");
    rig.evict(gfn(1));
    assert_eq!(rig.mm.stats().swap_outs, writes + 1);
    for number in 0..6 {
        assert!(rig.client.read(1, gfn(number)).unwrap() == page(number));
    }
    assert_eq!(rig.mm.stats().frames_in_use, 6);
    rig.assert_sound();
}

#[test]
fn a_migration_that_cannot_revoke_moves_nothing() {
    let rig = written(2);
    let old = frames(&rig, 0..2);
    rig.client.flush_fails.store(true, Ordering::Relaxed);
    assert!(matches!(rig.mm.migrate_frames(&old), Err(MmError::Revoke(_))));
    rig.client.flush_fails.store(false, Ordering::Relaxed);
    assert_eq!(frames(&rig, 0..2), old);
    assert_eq!(rig.mm.stats().frames_in_use, 2);
    assert!(rig.host_read(gfn(1)) == page(1));
}

#[test]
fn pages_given_back_are_zero_and_cost_no_write() {
    let rig = written(8);
    rig.evict(gfn(1));
    rig.clean(gfn(2));
    let writes = rig.mm.stats().swap_outs;
    let snapshot = rig.object.share_pages([gfn(3)].into_iter()).unwrap();
    assert_eq!(rig.object.free_pages(gfn(0), 5).unwrap(), 5);
    assert_eq!(rig.object.free_pages(gfn(0), 5).unwrap(), 0, "they are free already");
    assert_eq!(rig.object.free_pages(gfn(8), u64::MAX).unwrap(), 0, "outside");
    for number in 0..8 {
        let expected = if number < 5 { ZEROS } else { page(number) };
        for processor in 0..2 {
            assert!(rig.client.read(processor, gfn(number)).unwrap() == expected);
        }
    }
    assert_eq!(rig.mm.stats().swap_outs, writes);
    assert_eq!(rig.mm.stats().swap_slots_used, 0);
    let mut kept = ZEROS;
    snapshot.read(gfn(3).base(), &mut kept).unwrap();
    assert!(kept == page(3), "the snapshot keeps what it shares");
    rig.client.write(0, gfn(0), &page(100)).unwrap();
    assert!(rig.client.read(1, gfn(0)).unwrap() == page(100));
    rig.assert_sound();
}

#[test]
fn a_range_is_given_back_with_one_flush() {
    let rig = written(6);
    let mut old = frames(&rig, 0..4);
    assert_eq!(rig.object.free_pages(gfn(0), 4).unwrap(), 4);
    let events = rig.log.take();
    assert_eq!(events.len(), 5, "{events:?}");
    old.sort_unstable();
    assert_eq!(events[4], Event::Flushed(old, FlushReason::Invalidated));
    rig.assert_sound();
}

#[test]
fn pages_that_cannot_be_revoked_are_not_given_back() {
    let rig = written(4);
    let old = frames(&rig, 0..4);
    rig.client.flush_fails.store(true, Ordering::Relaxed);
    assert!(matches!(rig.object.free_pages(gfn(0), 4), Err(MmError::Revoke(_))));
    rig.client.flush_fails.store(false, Ordering::Relaxed);
    assert_eq!(frames(&rig, 0..4), old);
    assert!(rig.host_read(gfn(3)) == page(3));
    assert_eq!(rig.mm.stats().pages_freed, 0);
}

#[test]
fn a_range_changes_places_in_one_invalidation() {
    let rig = written(8);
    let other = Rig::beside(&rig, rig.mm.create_object(8 * PAGE_SIZE_U64).unwrap());
    other.client.write(0, gfn(5), &page(55)).unwrap();
    rig.evict(gfn(2));
    rig.log.take();
    rig.object.exchange_pages(gfn(1), &other.object, gfn(4), 3).unwrap();
    let events = rig.log.take();
    let first_flush = events.iter().position(|event| matches!(event, Event::Flushed(..))).unwrap();
    let told = |event: &Event| matches!(event, Event::Invalidated(_, Invalidation::Unmap));
    assert!(events[..first_flush].iter().all(told));
    let Event::Flushed(flushed, _) = &events[first_flush] else { unreachable!() };
    assert_eq!(flushed.len(), 6, "both ranges in one: {events:?}");
    for (number, expected) in [(1, ZEROS), (2, page(55)), (3, ZEROS), (4, page(4))] {
        assert!(rig.client.read(0, gfn(number)).unwrap() == expected, "page {number}");
    }
    for (number, expected) in [(4, page(1)), (5, page(2)), (6, page(3)), (7, ZEROS)] {
        assert!(other.client.read(0, gfn(number)).unwrap() == expected, "page {number}");
    }
    rig.mm.evict_frames(&rig.all_frames()).unwrap();
    assert!(rig.client.read(0, gfn(2)).unwrap() == page(55));
    assert!(other.client.read(0, gfn(5)).unwrap() == page(2));
    rig.assert_sound();
    other.assert_sound();
}

/// Their copies in swap carry the names that they had: what is in the frames is the only one.
#[test]
fn pages_that_change_places_leave_their_copies_behind() {
    let rig = written(2);
    let other = Rig::beside(&rig, rig.mm.create_object(2 * PAGE_SIZE_U64).unwrap());
    other.client.write(0, gfn(1), &page(55)).unwrap();
    rig.clean(gfn(0));
    other.clean(gfn(1));
    assert_eq!(rig.mm.stats().swap_slots_used, 2);
    rig.object.exchange_pages(gfn(0), &other.object, gfn(1), 1).unwrap();
    assert_eq!(rig.mm.stats().swap_slots_used, 0);
    rig.evict(gfn(0));
    other.evict(gfn(1));
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(55));
    assert!(other.client.read(0, gfn(1)).unwrap() == page(0));
    rig.assert_sound();
    other.assert_sound();
}

#[test]
fn a_range_moved_to_copies_keeps_its_content() {
    let rig = written(4);
    let spare = rig.mm.create_object(4 * PAGE_SIZE_U64).unwrap();
    let old = frames(&rig, 0..4);
    rig.object.remap_to_copies(gfn(0), &spare, gfn(0), 4).unwrap();
    assert!(frames(&rig, 0..4).iter().all(|pfn| !old.contains(pfn)));
    for number in 0..4 {
        assert!(rig.client.read(1, gfn(number)).unwrap() == page(number));
    }
    rig.assert_sound();
}

#[test]
fn a_range_that_cannot_be_remapped_says_why() {
    let rig = written(2);
    let other = rig.mm.create_object(2 * PAGE_SIZE_U64).unwrap();
    let outside = rig.object.exchange_pages(gfn(1), &other, gfn(0), 2).unwrap_err();
    assert!(matches!(outside, MmError::OutsideMemory { .. }), "{outside}");
    let many = rig.object.exchange_pages(gfn(0), &other, gfn(0), MAX_REMAP_PAGES + 1);
    assert!(matches!(many, Err(MmError::BadRemap { .. })));
    let overlapping = rig.object.exchange_pages(gfn(0), &rig.object, gfn(1), 2);
    assert!(matches!(overlapping, Err(MmError::BadRemap { .. })));
    rig.object.exchange_pages(gfn(0), &rig.object, gfn(1), 1).unwrap();
    assert!(rig.host_read(gfn(0)) == page(1) && rig.host_read(gfn(1)) == page(0));
}
