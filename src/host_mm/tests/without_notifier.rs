//! Built without the notifier, exported frames are never reclaimed; all else works.

use super::rig::{FRAMES, Rig, config, gfn, page};
use crate::MmError;

#[test]
fn exported_frames_stay_and_the_others_of_their_batch_leave() {
    let rig = Rig::new(config(), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    rig.host_write(gfn(1), &page(2));
    let pfn = rig.frame(gfn(0)).unwrap();
    assert_eq!(rig.mm.evict_frames(&rig.all_frames()).unwrap(), 1);
    assert_eq!(rig.mm.clean_frames(&rig.all_frames()).unwrap(), 0);
    assert_eq!(rig.frame(gfn(0)), Some(pfn));
    assert_eq!(rig.frame(gfn(1)), None);
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(1));
    assert!(rig.host_read(gfn(1)) == page(2));
    rig.assert_sound();
}

#[test]
fn reclaim_lives_off_what_is_not_exported() {
    let rig = Rig::new(config(), 4 * FRAMES);
    let exported = FRAMES / 2;
    for number in 0..exported {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    for number in exported..4 * FRAMES {
        rig.host_write(gfn(number), &page(number));
    }
    for number in 0..4 * FRAMES {
        if number < exported {
            assert!(rig.client.is_mapped(gfn(number)), "page {number}");
        }
        assert!(rig.host_read(gfn(number)) == page(number), "page {number}");
    }
    rig.assert_sound();
}

#[test]
fn with_everything_exported_the_next_fault_is_refused() {
    let rig = Rig::new(config(), 2 * FRAMES);
    for number in 0..FRAMES {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    let error = rig.client.write(0, gfn(FRAMES), &page(0)).unwrap_err();
    assert!(matches!(error, MmError::OutOfFrames { .. }), "{error}");
    rig.client.forget_everything();
    rig.client.write(0, gfn(FRAMES), &page(7)).unwrap();
    assert!(rig.client.read(0, gfn(3)).unwrap() == page(3));
    rig.assert_sound();
}
