//! The clock's verdicts, pass by pass.

use super::rig::{Rig, config, gfn, page};

const PAGES: u64 = 3;

/// A rig whose pages have come in by one touch each, and seen one pass of the hand.
fn come_in() -> Rig {
    let rig = Rig::new(config(), PAGES);
    for number in 0..PAGES {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    assert!(victims(&rig).is_empty(), "they have just come in");
    rig
}

/// The pages that one pass of the hand over all frames would evict.
fn victims(rig: &Rig) -> Vec<u64> {
    let frames = rig.mm.judge_all();
    (0..PAGES).filter(|&number| frames.contains(&rig.frame(gfn(number)).unwrap())).collect()
}

fn touch(rig: &Rig, number: u64) {
    assert!(rig.client.read(1, gfn(number)).unwrap() == page(number));
}

#[test]
fn the_touch_that_brings_a_page_in_is_no_use() {
    assert_eq!(victims(&come_in()), [0, 1, 2]);
}

#[test]
fn each_use_keeps_a_page_for_one_more_pass_up_to_a_bound() {
    for (uses, passes) in [(1, 1), (2, 2), (3, 3), (7, 3)] {
        let rig = come_in();
        for _ in 0..uses {
            touch(&rig, 1);
            assert_eq!(victims(&rig), [0, 2], "page 1 is in use");
        }
        for pass in 0..passes {
            assert_eq!(victims(&rig), [0, 2], "after {uses} uses, pass {pass}");
        }
        assert_eq!(victims(&rig), [0, 1, 2], "after {uses} uses");
    }
}

#[test]
fn a_page_takes_its_uses_along_to_another_frame() {
    let rig = come_in();
    for _ in 0..2 {
        touch(&rig, 1);
        victims(&rig);
    }
    let frames: Vec<_> = (0..PAGES).map(|number| rig.frame(gfn(number)).unwrap()).collect();
    assert_eq!(rig.mm.migrate_frames(&frames).unwrap() as u64, PAGES);
    for _ in 0..2 {
        assert_eq!(victims(&rig), [0, 2]);
    }
    assert_eq!(victims(&rig), [0, 1, 2]);
}
