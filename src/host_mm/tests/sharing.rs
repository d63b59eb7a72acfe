//! Pages that several guest pages share: clones, merged pages, the page of zeros; and how a guest
//! page leaves them.

use super::client::Event;
use super::rig::{Rig, config, gfn, page};
use crate::addr::PAGE_SIZE;
use crate::export_rmap::{FlushReason, Invalidation, Owner};
use crate::host_mm::fault::Intent;
use crate::host_mm::{HostMmConfig, Merged};

const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

fn owner(rig: &Rig, number: u64) -> Owner {
    Owner { object: rig.object.number(), gfn: gfn(number) }
}

/// A rig with eight pages written by its processor 0, and a clone of it.
fn cloned() -> (Rig, Rig) {
    let parent = Rig::new(config(), 16);
    for number in 0..8 {
        parent.client.write(0, gfn(number), &page(number)).unwrap();
    }
    let object = parent.object.copy_on_write_clone().unwrap();
    let clone = Rig::beside(&parent, object);
    (parent, clone)
}

#[test]
fn a_clone_takes_no_frames_until_somebody_writes() {
    let (parent, clone) = cloned();
    let before = parent.mm.stats().frames_in_use;
    assert_eq!((before, parent.mm.shared_pages()), (8, 8));
    for number in 0..8 {
        assert!(clone.client.read(0, gfn(number)).unwrap() == page(number));
        assert!(parent.client.read(1, gfn(number)).unwrap() == page(number));
        assert_eq!(clone.frame(gfn(number)), parent.frame(gfn(number)));
    }
    assert_eq!(parent.mm.stats().frames_in_use, before);

    // Processor 0 had the right to write, in its TLB, from before the clone was made.
    parent.client.write(0, gfn(3), &page(103)).unwrap();
    assert!(clone.client.read(0, gfn(3)).unwrap() == page(3));
    assert!(parent.client.read(1, gfn(3)).unwrap() == page(103));
    assert_ne!(clone.frame(gfn(3)), parent.frame(gfn(3)));
    assert_eq!(parent.mm.stats().frames_in_use, before + 1);
    assert_eq!(parent.mm.stats().cow_copies, 1);
    parent.assert_sound();
    clone.assert_sound();
}

#[test]
fn pages_in_swap_are_shared_where_they_are() {
    let parent = Rig::new(config(), 16);
    for number in 0..8 {
        parent.client.write(0, gfn(number), &page(number)).unwrap();
    }
    for number in 0..4 {
        parent.evict(gfn(number));
    }
    let before = parent.mm.stats();
    let object = parent.object.copy_on_write_clone().unwrap();
    let clone = Rig::beside(&parent, object);
    let after = parent.mm.stats();
    assert_eq!((after.swap_ins, after.swap_outs), (before.swap_ins, before.swap_outs));
    assert_eq!((after.frames_in_use, after.swap_slots_used), (4, 4));
    assert_eq!((parent.mm.shared_pages(), clone.object.shared_pages()), (8, 8));
    // Of each, one is read first and one is written first, by either of the two.
    clone.client.write(0, gfn(0), &page(100)).unwrap();
    parent.client.write(0, gfn(1), &page(101)).unwrap();
    for number in 0..8 {
        let (mine, its) = match number {
            0 => (0, 100),
            1 => (101, 1),
            other => (other, other),
        };
        assert!(parent.client.read(0, gfn(number)).unwrap() == page(mine), "page {number}");
        assert!(clone.client.read(0, gfn(number)).unwrap() == page(its), "page {number}");
    }
    // Once more from swap, under the new names.
    parent.mm.evict_frames(&parent.all_frames()).unwrap();
    assert!(parent.client.read(0, gfn(2)).unwrap() == page(2));
    assert!(clone.client.read(0, gfn(2)).unwrap() == page(2));
    parent.assert_sound();
    clone.assert_sound();
    let mm = parent.mm.clone();
    drop((parent, clone));
    let left = mm.stats();
    assert_eq!((left.frames_in_use, left.swap_slots_used, mm.shared_pages()), (0, 0, 0));
}

#[test]
fn the_write_to_a_shared_page_clears_notifies_and_flushes_before_it_sets() {
    let (parent, clone) = cloned();
    let shared = parent.frame(gfn(2)).unwrap();
    for processor in 0..4 {
        assert!(parent.client.read(processor, gfn(2)).unwrap() == page(2));
    }
    assert!(clone.client.read(0, gfn(2)).unwrap() == page(2));
    parent.log.take();
    parent.client.write(0, gfn(2), &page(102)).unwrap();
    let kind = Invalidation::Replace(owner(&parent, 2));
    let events = parent.log.take();
    // Both clients are told.
    assert_eq!(events[..2], [Event::Invalidated(shared, kind), Event::Invalidated(shared, kind)]);
    assert!(
        events[2..]
            .iter()
            .all(|event| *event == Event::Flushed(vec![shared], FlushReason::Invalidated))
            && events.len() == 4,
        "{events:?}"
    );
    for processor in 1..4 {
        assert!(!parent.client.is_cached(processor, gfn(2)), "a stale translation");
        assert!(parent.client.read(processor, gfn(2)).unwrap() == page(102));
    }
    // The other guest keeps its mapping.
    assert!(clone.client.is_mapped(gfn(2)));
    parent.assert_sound();
}

#[test]
fn the_last_user_of_a_shared_page_gets_it_without_a_copy() {
    let (parent, clone) = cloned();
    let frame = parent.frame(gfn(1));
    clone.client.write(0, gfn(1), &page(201)).unwrap();
    parent.client.write(0, gfn(1), &page(101)).unwrap();
    assert_eq!(parent.frame(gfn(1)), frame);
    let stats = parent.mm.stats();
    assert_eq!((stats.cow_copies, stats.cow_reuses), (1, 1));
    assert_eq!(parent.mm.shared_pages(), 7);
    parent.evict(gfn(1));
    assert!(parent.client.read(0, gfn(1)).unwrap() == page(101));
    assert!(clone.client.read(0, gfn(1)).unwrap() == page(201));
    parent.assert_sound();
}

#[test]
fn a_shared_page_leaves_for_swap_once_and_comes_back_once() {
    let (parent, clone) = cloned();
    for rig in [&parent, &clone] {
        assert!(rig.client.read(0, gfn(4)).unwrap() == page(4));
    }
    parent.evict(gfn(4));
    assert!(!parent.client.is_mapped(gfn(4)) && !clone.client.is_mapped(gfn(4)));
    for rig in [&parent, &clone] {
        assert!(rig.client.read(0, gfn(4)).unwrap() == page(4));
    }
    let stats = parent.mm.stats();
    assert_eq!((stats.swap_outs, stats.swap_ins), (1, 1));
    // Written while it is in swap: read back, then copied.
    parent.evict(gfn(4));
    clone.client.write(0, gfn(4), &page(204)).unwrap();
    assert!(parent.client.read(0, gfn(4)).unwrap() == page(4));
    assert!(clone.client.read(0, gfn(4)).unwrap() == page(204));
    parent.assert_sound();
}

#[test]
fn a_clone_of_a_clone_and_of_swapped_pages_is_whole() {
    let (parent, clone) = cloned();
    clone.client.write(0, gfn(0), &page(200)).unwrap();
    clone.evict(gfn(0));
    parent.evict(gfn(5));
    let third = Rig::beside(&clone, clone.object.copy_on_write_clone().unwrap());
    drop(clone);
    parent.client.write(0, gfn(6), &page(106)).unwrap();
    for number in 0..16 {
        let expected = match number {
            0 => page(200),
            1..8 => page(number),
            _ => ZEROS,
        };
        assert!(third.client.read(0, gfn(number)).unwrap() == expected, "page {number}");
    }
    third.assert_sound();
}

#[test]
fn a_page_named_twice_is_shared_once() {
    let (parent, clone) = cloned();
    let pages = [0, 0, 3, 0, 12].map(gfn);
    let third = parent.object.share_pages(pages.into_iter()).unwrap();
    let fresh = Rig::new(config(), 4);
    fresh.client.write(0, gfn(2), &page(2)).unwrap();
    let copy = fresh.object.share_pages([2, 2, 9].map(gfn).into_iter()).unwrap();
    drop((third, clone, copy));
    // Nobody is left who shares: the writes copy nothing.
    parent.client.write(0, gfn(0), &page(100)).unwrap();
    fresh.client.write(0, gfn(2), &page(102)).unwrap();
    for rig in [&parent, &fresh] {
        assert_eq!((rig.mm.stats().cow_copies, rig.mm.stats().cow_reuses), (0, 1));
        rig.assert_sound();
    }
}

#[test]
fn dropping_all_who_share_gives_everything_back() {
    let (parent, clone) = cloned();
    parent.evict(gfn(7));
    assert!(parent.client.read(0, gfn(9)).unwrap() == ZEROS);
    let mm = parent.mm.clone();
    drop(parent);
    assert_eq!((mm.shared_pages(), mm.stats().swap_slots_used), (8, 1));
    drop(clone);
    assert_eq!(mm.shared_pages(), 0);
    assert_eq!(mm.stats().swap_slots_used, 0);
    // One page of zeros may stay; it is reclaim's.
    assert!(mm.stats().frames_in_use <= 1);
}

#[test]
fn pages_that_are_only_read_share_zeros() {
    let rig = Rig::new(config(), 600);
    for number in 0..600 {
        assert!(rig.client.read(0, gfn(number)).unwrap() == ZEROS);
    }
    assert!(rig.mm.stats().frames_in_use <= 16, "{:?}", rig.mm.stats());
    // The mail's __xip_unmap: the first write replaces the page of zeros, for this page alone.
    for processor in 0..4 {
        assert!(rig.client.read(processor, gfn(77)).unwrap() == ZEROS);
    }
    rig.client.write(0, gfn(77), &page(77)).unwrap();
    for processor in 0..4 {
        assert!(rig.client.read(processor, gfn(77)).unwrap() == page(77));
        assert!(rig.client.read(processor, gfn(77 + 16)).unwrap() == ZEROS);
    }
    // Pages of zeros are evicted without a write.
    rig.mm.evict_frames(&rig.all_frames()).unwrap();
    assert_eq!(rig.mm.stats().swap_outs, 1);
    assert!(rig.client.read(0, gfn(3)).unwrap() == ZEROS);
    assert!(rig.client.read(0, gfn(77)).unwrap() == page(77));
    rig.assert_sound();
}

#[test]
fn without_shared_zeros_each_page_has_a_frame() {
    let rig = Rig::new(HostMmConfig { share_zero: false, ..config() }, 20);
    for number in 0..20 {
        assert!(rig.client.read(0, gfn(number)).unwrap() == ZEROS);
    }
    assert_eq!(rig.mm.stats().frames_in_use, 20);
}

/// A fault that was overtaken by the end of a shared page leaves a page of zeros under its number. That
/// number will be given to another page, so nobody may join it.
#[test]
fn a_number_that_nobody_names_is_not_merged_with() {
    let rig = Rig::new(config(), 8);
    rig.host_write(gfn(0), &page(0));
    drop(rig.object.copy_on_write_clone().unwrap());
    rig.client.write(0, gfn(0), &page(100)).unwrap();
    let mm = &*rig.mm;
    assert_eq!(mm.shared_pages(), 0, "its last user has it");
    let late =
        |number| mm.pager.fault_in(&mm.pager.commons.pages, gfn(number), Intent::Write).unwrap();
    // The first number after those of the pages of zeros.
    let left_behind = late(16).pfn();

    rig.host_write(gfn(1), &ZEROS);
    let joining = rig.frame(gfn(1)).unwrap();
    assert_eq!(mm.merge_frames(left_behind, joining).unwrap(), Merged::No);

    // Once that page is gone, the number is given again.
    mm.evict_frames(&[left_behind]).unwrap();
    rig.host_write(gfn(2), &page(2));
    let _clone = rig.object.share_pages([gfn(2)].into_iter()).unwrap();
    let given_again = late(16).pfn();
    assert_eq!(rig.frame(gfn(2)), Some(given_again));
    assert!(rig.host_read(gfn(1)) == ZEROS);
    assert!(rig.client.read(0, gfn(2)).unwrap() == page(2));
    rig.assert_sound();
}

#[test]
fn pages_of_the_same_content_are_merged_until_one_is_written() {
    let rig = Rig::new(config(), 8);
    for number in 0..4 {
        rig.client.write(0, gfn(number), &page(number / 3)).unwrap();
    }
    let frame = |number| rig.frame(gfn(number)).unwrap();
    assert_eq!(rig.mm.merge_frames(frame(0), frame(3)).unwrap(), Merged::No);
    assert_eq!(rig.mm.merge_frames(frame(0), frame(1)).unwrap(), Merged::Yes);
    // A third joins, whichever way round it is asked.
    assert_eq!(rig.mm.merge_frames(frame(2), frame(0)).unwrap(), Merged::Yes);
    assert_eq!(frame(2), frame(1));
    assert_eq!(rig.mm.stats().frames_in_use, 2);
    assert_eq!(rig.mm.merge_frames(frame(0), frame(0)).unwrap(), Merged::No);
    rig.client.write(1, gfn(1), &page(50)).unwrap();
    for (number, content) in [(0, 0), (1, 50), (2, 0), (3, 1)] {
        for processor in 0..2 {
            assert!(rig.client.read(processor, gfn(number)).unwrap() == page(content));
        }
    }
    assert_eq!(rig.mm.stats().merges, 2);
    rig.assert_sound();
}

/// Every byte counts, wherever in the page it is.
#[test]
fn pages_that_differ_in_one_byte_are_not_merged() {
    let rig = Rig::new(config(), 8);
    for at in [0, 7, 8, 63, 64, 2047, 2048, 4031, 4032, 4087, 4088, 4095] {
        for base in [page(1), ZEROS] {
            let mut other = base;
            other[at] ^= 0x80;
            for (number, content) in [(0, base), (1, other)] {
                rig.client.write(0, gfn(number), &content).unwrap();
            }
            let [one, two] = [0, 1].map(|number| rig.frame(gfn(number)).unwrap());
            assert_eq!(rig.mm.merge_frames(one, two).unwrap(), Merged::No, "byte {at}");
            assert_eq!(rig.mm.merge_zero_frame(two).unwrap(), Merged::No, "byte {at}");
            rig.evict(gfn(1));
            assert!(rig.client.read(1, gfn(1)).unwrap() == other, "byte {at}");
            assert!(rig.client.read(1, gfn(0)).unwrap() == base, "byte {at}");
        }
    }
    rig.assert_sound();
}

/// Somebody wanted to write it, got a copy, and did not write: that copy is the page's content now, and
/// stands nowhere else.
#[test]
fn a_copy_that_nobody_writes_is_kept_all_the_same() {
    let (parent, clone) = cloned();
    drop(parent.object.lock_page_for_write(gfn(2)).unwrap());
    // The last user of the shared page gets it without a copy, and does not write it either.
    parent.evict(gfn(2));
    assert!(parent.client.read(0, gfn(2)).unwrap() == page(2));
    drop(clone.object.lock_page_for_write(gfn(2)).unwrap());
    assert_eq!((parent.mm.stats().cow_copies, parent.mm.stats().cow_reuses), (1, 1));
    clone.evict(gfn(2));
    assert!(clone.client.read(0, gfn(2)).unwrap() == page(2));
    parent.assert_sound();
    clone.assert_sound();
}

#[test]
fn a_page_of_zeros_joins_the_shared_zeros() {
    let rig = Rig::new(config(), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    assert_eq!(rig.mm.merge_zero_frame(rig.frame(gfn(0)).unwrap()).unwrap(), Merged::No);
    rig.client.write(0, gfn(0), &ZEROS).unwrap();
    assert_eq!(rig.mm.merge_zero_frame(rig.frame(gfn(0)).unwrap()).unwrap(), Merged::Yes);
    assert!(rig.client.read(0, gfn(0)).unwrap() == ZEROS);
    rig.client.write(0, gfn(0), &page(2)).unwrap();
    assert!(rig.client.read(1, gfn(0)).unwrap() == page(2));
    rig.assert_sound();
}

#[test]
fn a_copy_that_cannot_be_revoked_leaves_all_as_it_was() {
    let (parent, clone) = cloned();
    assert!(parent.client.read(0, gfn(2)).unwrap() == page(2));
    let frames = parent.mm.stats().frames_in_use;
    parent.client.flush_fails.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(parent.client.write(0, gfn(2), &page(102)).is_err());
    parent.client.flush_fails.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(parent.mm.stats().frames_in_use, frames);
    assert!(parent.client.read(1, gfn(2)).unwrap() == page(2));
    parent.client.write(1, gfn(2), &page(102)).unwrap();
    assert!(clone.client.read(0, gfn(2)).unwrap() == page(2));
    assert!(parent.client.read(0, gfn(2)).unwrap() == page(102));
}
