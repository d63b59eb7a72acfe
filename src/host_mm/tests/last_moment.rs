//! A processor that writes in the last moment in which it may: through what it has cached, after the
//! clients were told and before the flush takes that away. Whatever the host does to a page, it looks
//! at the content after the flush.

use super::rig::{Rig, config, gfn, page};
use crate::{DirtyLog, Merged};
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};

const ONE: Gfn = Gfn::new(1);
const TWO: Gfn = Gfn::new(2);
const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// A rig in which processor 0 has written `page(1)` to page 1, and can go on until it is stopped; when
/// it is, it writes `page(2)`.
fn about_to_write() -> Rig {
    let rig = Rig::new(config(), 4);
    rig.client.write(0, ONE, &page(1)).unwrap();
    rig.client.write_at_next_flush(ONE, page(2));
    rig
}

/// The write came, and is what everybody finds, whatever becomes of the page now.
#[track_caller]
fn assert_kept(rig: &Rig) {
    assert!(rig.client.has_written_last(), "the flush came too late for the write, or never");
    assert!(rig.host_read(ONE) == page(2), "the write is lost");
    rig.mm.evict_frames(&rig.all_frames()).unwrap();
    assert!(rig.client.read(1, ONE).unwrap() == page(2), "the write is lost with the frame");
    rig.assert_sound();
}

#[test]
fn an_eviction_writes_out_what_was_written_last() {
    let rig = about_to_write();
    rig.evict(ONE);
    assert_kept(&rig);
}

#[test]
fn a_cleaning_writes_out_what_was_written_last() {
    let rig = about_to_write();
    rig.clean(ONE);
    let writes = rig.mm.stats().swap_outs;
    rig.evict(ONE);
    assert_eq!(rig.mm.stats().swap_outs, writes, "it was clean");
    assert_kept(&rig);
}

#[test]
fn a_migration_moves_what_was_written_last() {
    let rig = about_to_write();
    assert_eq!(rig.mm.migrate_frames(&[rig.frame(ONE).unwrap()]).unwrap(), 1);
    assert_kept(&rig);
}

#[test]
fn pages_that_become_different_in_the_last_moment_are_not_merged() {
    for first in [ONE, TWO] {
        let rig = about_to_write();
        rig.host_write(TWO, &page(1));
        let second = if first == ONE { TWO } else { ONE };
        let frames = [first, second].map(|gfn| rig.frame(gfn).unwrap());
        assert_eq!(rig.mm.merge_frames(frames[0], frames[1]).unwrap(), Merged::No);
        assert!(rig.host_read(TWO) == page(1));
        assert_kept(&rig);
    }
}

#[test]
fn a_page_that_is_no_longer_zero_in_the_last_moment_is_not_merged() {
    let rig = Rig::new(config(), 4);
    rig.client.write(0, ONE, &ZEROS).unwrap();
    rig.client.write_at_next_flush(ONE, page(2));
    assert_eq!(rig.mm.merge_zero_frame(rig.frame(ONE).unwrap()).unwrap(), Merged::No);
    assert_kept(&rig);
}

#[test]
fn a_clone_has_what_was_written_last() {
    let rig = about_to_write();
    let clone = rig.object.copy_on_write_clone().unwrap();
    rig.client.write(0, TWO, &page(7)).unwrap();
    let mut content = ZEROS;
    clone.read(ONE.base(), &mut content).unwrap();
    assert!(content == page(2));
    drop(clone);
    assert_kept(&rig);
}

#[test]
fn a_copy_that_is_lent_has_what_was_written_last() {
    let rig = about_to_write();
    let mut copy = ZEROS;
    rig.object.lend_pages(&[ONE], |_, _, content| copy = *content).unwrap();
    assert!(copy == page(2));
    assert_kept(&rig);
}

#[test]
fn a_page_moved_to_its_copy_has_what_was_written_last() {
    let rig = about_to_write();
    let spare = rig.mm.create_object(4 * PAGE_SIZE_U64).unwrap();
    rig.object.remap_to_copies(ONE, &spare, ONE, 1).unwrap();
    assert_kept(&rig);
}

#[test]
fn a_page_that_changes_places_takes_along_what_was_written_last() {
    let rig = about_to_write();
    let other = rig.mm.create_object(4 * PAGE_SIZE_U64).unwrap();
    rig.object.exchange_pages(ONE, &other, TWO, 1).unwrap();
    let mut content = ZEROS;
    other.read(TWO.base(), &mut content).unwrap();
    assert!(content == page(2));
    assert!(rig.host_read(ONE) == ZEROS);
    rig.assert_sound();
}

#[test]
fn the_dirty_log_has_the_page_that_was_written_last() {
    let rig = about_to_write();
    let log = DirtyLog::start(rig.object.clone()).unwrap();
    assert!(log.take(gfn(0), 4).unwrap().contains(&ONE));
    assert_kept(&rig);
    assert_eq!(log.take(gfn(0), 4).unwrap(), [], "all of it was in the first answer");
}

#[test]
fn a_page_given_back_is_zero_whatever_was_written_last() {
    let rig = about_to_write();
    assert_eq!(rig.object.free_pages(ONE, 1).unwrap(), 1);
    assert!(rig.client.has_written_last());
    assert!(rig.client.read(0, ONE).unwrap() == ZEROS);
    rig.assert_sound();
}
