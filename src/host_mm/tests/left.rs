//! A page that leaves its frame while somebody waits for the frame's lock: who gets the lock then has
//! that of a frame without a page, or with another one, and must look again.

use std::sync::Arc;
use std::thread;

use super::rig::{Rig, config, gfn, page};
use crate::{DirtyLog, MemoryObject};
use gnomon_export_rmap::PageFlags;
use gnomon_export_rmap::addr::{Gfn, Gpa, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::pausing_client::PausingClient;

const ONE: Gfn = Gfn::new(1);
const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Page 1 holds `page(1)` and is being evicted. `wait_for_it` comes to its frame in the middle of that,
/// and goes on when the page has left.
fn leaves_under<T: Send>(wait_for_it: impl FnOnce(&Arc<MemoryObject>) -> T + Send) -> (Rig, T) {
    let rig = Rig::new(config(), 4);
    rig.client.write(0, ONE, &page(1)).unwrap();
    let pfn = rig.frame(ONE).unwrap();
    let (client, pause) = PausingClient::new();
    let registration = rig.mm.notifiers().register(client).unwrap();
    let result = thread::scope(|scope| {
        let evicting = scope.spawn(|| rig.mm.evict_frames(&[pfn]).unwrap());
        pause.wait();
        let waiting = scope.spawn(|| wait_for_it(&rig.object));
        while !rig.mm.frame_table().get(pfn).unwrap().has_waiters() {
            assert!(!waiting.is_finished(), "it did not wait for the page");
            thread::yield_now();
        }
        pause.end();
        assert_eq!(evicting.join().unwrap(), 1);
        waiting.join().unwrap()
    });
    drop(registration);
    (rig, result)
}

fn read(object: &MemoryObject) -> [u8; PAGE_SIZE] {
    let mut content = [0xee; PAGE_SIZE];
    object.read(ONE.base(), &mut content).unwrap();
    content
}

/// The books say that so many frames and slots are in use, and all of it comes back in the end.
#[track_caller]
fn assert_books(rig: Rig, frames_and_slots: (u64, u64)) {
    let used = |rig: &Rig| (rig.mm.stats().frames_in_use, rig.mm.stats().swap_slots_used);
    assert_eq!(used(&rig), frames_and_slots);
    rig.assert_sound();
    let mm = rig.mm.clone();
    drop(rig);
    // Of a page of zeros that was shared the frame stays until somebody wants it.
    let frames: Vec<Pfn> = (0..mm.frame_count()).map(Pfn::new).collect();
    mm.evict_frames(&frames).unwrap();
    assert_eq!((mm.stats().frames_in_use, mm.stats().swap_slots_used), (0, 0));
    assert_eq!(mm.violations().1, 0);
}

#[test]
fn who_wants_to_read_or_write_the_page_gets_the_frame_that_it_is_in() {
    for write in [false, true] {
        let (rig, found) = leaves_under(|object| {
            let page = if write { object.lock_page_for_write(ONE) } else { object.lock_page(ONE) };
            let page = page.unwrap();
            (page.flags().contains(PageFlags::IN_USE), page.owner().gfn, page.pfn())
        });
        assert_eq!(found, (true, ONE, rig.frame(ONE).unwrap()), "write: {write}");
        assert!(rig.host_read(ONE) == page(1));
        assert_books(rig, (1, 1));
    }
}

/// Two writers have seen that the page is shared, and wait for its frame. The first gets a page of its
/// own; the second must find that its guest page has moved there.
#[test]
fn who_wants_a_shared_page_that_another_has_left_follows() {
    let rig = Rig::new(config(), 4);
    rig.host_write(ONE, &page(1));
    let clone = rig.object.copy_on_write_clone().unwrap();
    let used = || rig.mm.stats().frames_in_use;
    let before = used();
    thread::scope(|scope| {
        let shared = clone.try_lock_resident(ONE).unwrap();
        let writers = [8, 16].map(|at| {
            let object = &rig.object;
            scope.spawn(move || {
                let at = Gpa::new(PAGE_SIZE_U64 + at);
                object.write(at, &[7; 8]).unwrap();
            })
        });
        // Each has taken a frame for its copy, and waits, or is about to.
        while used() < before + 2 {
            thread::yield_now();
        }
        drop(shared);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
    let mut expected = page(1);
    expected[8..24].fill(7);
    assert!(rig.host_read(ONE) == expected, "one of the two writes is lost");
    assert!(read(&clone) == page(1));
    assert_eq!((used(), rig.mm.stats().cow_copies), (before + 1, 1));
    drop(clone);
    rig.object.free_pages(gfn(0), 4).unwrap();
    assert_books(rig, (0, 0));
}

#[test]
fn who_gives_the_page_back_gives_back_its_slot() {
    let (rig, freed) = leaves_under(|object| object.free_pages(ONE, 1).unwrap());
    assert_eq!(freed, 1);
    assert!(rig.host_read(ONE) == ZEROS);
    rig.mm.evict_frames(&rig.all_frames()).unwrap();
    assert_books(rig, (0, 0));
}

#[test]
fn who_clones_the_page_shares_its_slot() {
    let (rig, clone) = leaves_under(|object| object.share_pages([ONE].into_iter()).unwrap());
    assert!(read(&clone) == page(1) && rig.host_read(ONE) == page(1));
    drop(clone);
    assert_books(rig, (1, 1));
}

#[test]
fn who_lends_the_page_brings_it_back() {
    let (rig, copy) = leaves_under(|object| {
        let mut copy = ZEROS;
        object
            .lend_pages(&[ONE], |_, page, content| {
                assert!(page.flags().contains(PageFlags::IN_USE));
                copy = *content;
            })
            .unwrap();
        copy
    });
    assert!(copy == page(1));
    assert_books(rig, (1, 1));
}

#[test]
fn who_exchanges_the_page_brings_it_back() {
    let (rig, other) = leaves_under(|object| {
        let other = object.host_mm().create_object(4 * PAGE_SIZE_U64).unwrap();
        object.exchange_pages(ONE, &other, ONE, 1).unwrap();
        other
    });
    assert!(read(&other) == page(1));
    assert!(rig.host_read(ONE) == ZEROS);
    drop(other);
    rig.object.free_pages(gfn(0), 4).unwrap();
    assert_books(rig, (0, 0));
}

#[test]
fn who_asks_whether_the_page_was_written_is_told() {
    let (rig, written) = leaves_under(|object| {
        let log = DirtyLog::start(object.clone()).unwrap();
        assert_eq!(log.take(gfn(2), 2).unwrap(), [2, 3].map(gfn), "at first all count");
        log.take(ONE, 1).unwrap()
    });
    assert_eq!(written, [ONE]);
    assert!(rig.host_read(ONE) == page(1));
    assert_books(rig, (1, 1));
}

#[test]
fn who_withdraws_its_mappings_leaves_it_where_it_is() {
    let (rig, ()) = leaves_under(|object| object.withdraw_mappings(ONE, 1).unwrap());
    assert_eq!(rig.frame(ONE), None);
    assert!(rig.host_read(ONE) == page(1));
    assert_books(rig, (1, 1));
}
