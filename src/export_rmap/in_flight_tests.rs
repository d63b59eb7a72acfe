//! The entries without host memory: a frame table, and what is in flight.

use super::*;
use crate::{Owner, PageFlags};
use DeviceAccess::{Read, Write};

const OBJECT: u16 = 7;
const FRAME: Pfn = Pfn::new(0);
const PAGE: Gfn = Gfn::new(100);

fn slots(entries: usize) -> (FrameTable, Slots) {
    let slots = Slots::new(ClientId::new(3).unwrap(), OBJECT, entries);
    (FrameTable::new(8), slots)
}

fn token(table: &FrameTable, pfn: Pfn) -> SequenceToken {
    table.lock(pfn).sequence()
}

/// Maps a page by a finished access.
fn map(table: &FrameTable, slots: &Slots, gfn: Gfn, pfn: Pfn, access: DeviceAccess) {
    drop(slots.install(table, gfn, token(table, pfn), access == Write, access).unwrap());
}

/// On another thread: one with an access in flight may not wait for any of these locks.
fn elsewhere<T: Send>(step: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(step).join().unwrap())
}

fn invalidate(table: &FrameTable, slots: &Slots, pfn: Pfn, kind: Invalidation) -> Harvest {
    elsewhere(|| {
        let page = table.lock(pfn);
        page.begin_invalidation();
        slots.invalidate(&page, kind)
    })
}

fn is_exported(table: &FrameTable, pfn: Pfn) -> bool {
    table.get(pfn).unwrap().is_exported()
}

/// Flushes on a thread of its own, which must sleep; `finish` is what it waits for.
fn flush_sleeps_until(slots: &Slots, frames: &[Pfn], finish: impl FnOnce()) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let (before, over) = (elsewhere(|| slots.stats().waits), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            slots.wait_for_stale(frames);
            over.store(true, Ordering::SeqCst);
        });
        while elsewhere(|| slots.stats().waits) == before {
            assert!(!over.load(Ordering::SeqCst), "the flush did not wait");
            std::thread::yield_now();
        }
        assert!(!over.load(Ordering::SeqCst));
        finish();
    });
}

#[test]
fn an_entry_allows_what_it_was_installed_for() {
    let (table, slots) = slots(4);
    assert!(slots.begin(PAGE, Read).is_none());
    map(&table, &slots, PAGE, FRAME, Read);
    assert!(is_exported(&table, FRAME));
    assert_eq!(slots.begin(PAGE, Read).unwrap().pfn(), FRAME);
    assert!(slots.begin(PAGE, Write).is_none(), "read-only");
    map(&table, &slots, PAGE, FRAME, Write);
    assert!(slots.begin(PAGE, Write).is_some());
    assert!(slots.begin(Gfn::new(101), Read).is_none());
    let stats = slots.stats();
    assert_eq!((stats.hits, stats.misses(), stats.installs), (2, 2, 1));
    slots.forget_everything(&table);
    assert!(!is_exported(&table, FRAME));
}

#[test]
fn nothing_begins_after_an_invalidation_and_the_flush_waits_for_what_had() {
    for access in [Read, Write] {
        let (table, slots) = slots(4);
        let token = token(&table, FRAME);
        let in_flight = slots.install(&table, PAGE, token, true, access).unwrap();
        let harvest = invalidate(&table, &slots, FRAME, Invalidation::Unmap);
        assert_eq!(harvest, Harvest { dirty: access == Write, accessed: true });
        assert!(!is_exported(&table, FRAME));
        assert!(elsewhere(|| slots.begin(PAGE, Read).is_none()));
        elsewhere(|| slots.wait_for_stale(&[Pfn::new(1)]));
        flush_sleeps_until(&slots, &[FRAME], || drop(in_flight));
        slots.wait_for_stale(&[FRAME]);
        assert_eq!(slots.stats().waits, 1, "an idle flush does not wait");
        map(&table, &slots, PAGE, Pfn::new(1), Read);
    }
}

#[test]
fn a_flush_of_many_frames_waits_for_each_of_them() {
    let frames: Vec<Pfn> = (0..4).map(Pfn::new).collect();
    for used in 0..4 {
        let (table, slots) = slots(4);
        for (pfn, page) in frames.iter().zip(100..) {
            map(&table, &slots, Gfn::new(page), *pfn, Read);
        }
        let in_flight = slots.begin(Gfn::new(100 + used), Read).unwrap();
        for pfn in &frames {
            invalidate(&table, &slots, *pfn, Invalidation::Unmap);
        }
        flush_sleeps_until(&slots, &frames, || drop(in_flight));
        assert_eq!(slots.stats().waits, 1);
    }
}

#[test]
fn a_cleaning_waits_for_writers_alone() {
    let (table, slots) = slots(4);
    map(&table, &slots, PAGE, FRAME, Write);
    let reader = slots.begin(PAGE, Read).unwrap();
    let harvest = invalidate(&table, &slots, FRAME, Invalidation::Clean);
    assert_eq!(harvest, Harvest { dirty: true, accessed: true });
    assert!(is_exported(&table, FRAME), "it may still be read");
    elsewhere(|| slots.wait_for_stale(&[FRAME]));
    drop(reader);
    assert!(slots.begin(PAGE, Read).is_some());
    assert!(slots.begin(PAGE, Write).is_none());

    map(&table, &slots, PAGE, FRAME, Write);
    let writer = slots.begin(PAGE, Write).unwrap();
    assert!(invalidate(&table, &slots, FRAME, Invalidation::Clean).dirty);
    flush_sleeps_until(&slots, &[FRAME], || drop(writer));
    assert!(!invalidate(&table, &slots, FRAME, Invalidation::Clean).dirty, "harvested already");
}

#[test]
fn a_replacement_takes_the_one_guest_page() {
    let (table, slots) = slots(4);
    let other = Gfn::new(101);
    for gfn in [PAGE, other] {
        map(&table, &slots, gfn, FRAME, Read);
    }
    let foreign = Owner { object: OBJECT + 1, gfn: PAGE };
    let kind = |owner| Invalidation::Replace(owner);
    assert_eq!(invalidate(&table, &slots, FRAME, kind(foreign)), Harvest::default());
    invalidate(&table, &slots, FRAME, kind(Owner { object: OBJECT, gfn: PAGE }));
    assert!(slots.begin(PAGE, Read).is_none());
    assert!(slots.begin(other, Read).is_some());
}

#[test]
fn aging_forgets_the_access_and_nothing_else() {
    let (table, slots) = slots(4);
    map(&table, &slots, PAGE, FRAME, Write);
    assert!(slots.age(&table.lock(FRAME)));
    assert!(!slots.age(&table.lock(FRAME)));
    drop(slots.begin(PAGE, Read).unwrap());
    assert!(slots.age(&table.lock(FRAME)));
    let harvest = invalidate(&table, &slots, FRAME, Invalidation::Unmap);
    assert_eq!(harvest, Harvest { dirty: true, accessed: false });
}

#[test]
fn an_installation_that_was_overtaken_leaves_nothing() {
    let (table, slots) = slots(4);
    let old = token(&table, FRAME);
    invalidate(&table, &slots, FRAME, Invalidation::Unmap);
    assert!(slots.install(&table, PAGE, old, true, Write).is_none());
    assert!(!is_exported(&table, FRAME));
    // Nor does one that would add a right, or that finds the page mapped elsewhere.
    map(&table, &slots, PAGE, FRAME, Read);
    let old = token(&table, FRAME);
    invalidate(&table, &slots, FRAME, Invalidation::Clean);
    assert!(slots.install(&table, PAGE, old, true, Write).is_none());
    assert!(slots.begin(PAGE, Write).is_none());
    let elsewhere = token(&table, Pfn::new(1));
    assert!(slots.install(&table, PAGE, elsewhere, true, Write).is_none());
    assert!(!is_exported(&table, Pfn::new(1)));
    assert_eq!(slots.stats().retries, 3);
}

#[test]
fn an_entry_that_gives_way_leaves_its_dirty_state_to_the_frame() {
    let (table, slots) = slots(2);
    for (raw, access) in [(0, Write), (1, Read), (2, Read)] {
        map(&table, &slots, Gfn::new(u64::from(raw)), Pfn::new(raw), access);
    }
    assert_eq!(slots.stats().replaced, 1);
    assert!(!is_exported(&table, FRAME));
    assert!(table.lock(FRAME).flags().contains(PageFlags::BY_WRITE));
    assert!(!table.lock(Pfn::new(1)).flags().contains(PageFlags::DIRTY));
    let entries: Vec<_> = live(&slots.lock().slots).collect();
    assert_eq!(entries, [(0, Pfn::new(2)), (1, Pfn::new(1))]);
}

#[test]
fn an_entry_in_use_does_not_give_way() {
    let (table, slots) = slots(1);
    let token = token(&table, FRAME);
    let in_flight = slots.install(&table, PAGE, token, false, Read).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| map(&table, &slots, Gfn::new(101), Pfn::new(1), Read));
        for _ in 0..1000 {
            assert!(!is_exported(&table, Pfn::new(1)));
            std::thread::yield_now();
        }
        assert!(is_exported(&table, FRAME));
        drop(in_flight);
        other.join().unwrap();
    });
    assert!(slots.begin(PAGE, Read).is_none());
    assert!(slots.begin(Gfn::new(101), Read).is_some());
}

/// With a page lock wanted in the middle of an access, a flush and the access could wait for each
/// other.
#[cfg(debug_assertions)]
#[test]
fn a_page_lock_in_the_middle_of_an_access_is_caught() {
    let caught = std::thread::spawn(|| {
        let (table, slots) = slots(1);
        let token = token(&table, FRAME);
        let _in_flight = slots.install(&table, PAGE, token, false, Read).unwrap();
        drop(table.lock(Pfn::new(1)));
    });
    assert!(caught.join().is_err());
}
