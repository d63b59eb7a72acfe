//! Background reclaim: whose it is, and who holds it back.

use std::sync::Arc;

use super::rig::{FRAMES, Rig, config, gfn, page};

/// Writes many more pages than there are frames.
fn press(rig: &Rig) {
    for number in 0..4 * FRAMES {
        rig.host_write(gfn(number), &page(number + 1));
    }
}

#[test]
fn background_reclaim_is_held_back_by_who_has_quiet_and_goes_on_after() {
    let rig = Rig::new(config(), 4 * FRAMES);
    let _reclaim = rig.mm.start_background_reclaim().unwrap();
    let rounds = || rig.mm.stats().background_reclaims;
    {
        let quiet = rig.mm.quiet();
        let other = rig.mm.quiet();
        press(&rig);
        drop(other);
        press(&rig);
        assert!(rig.mm.is_quiet(&quiet));
        assert_eq!(rounds(), 0, "faults had to reclaim for themselves");
        assert!(rig.mm.stats().direct_reclaims > 0);
    }
    // It was woken meanwhile.
    while rounds() == 0 {
        std::thread::yield_now();
    }
    let quiet = rig.mm.quiet();
    let before = rounds();
    press(&rig);
    assert_eq!(rounds(), before, "the round under way was over");
    drop(quiet);
    rig.assert_sound();
}

#[test]
fn quiet_is_of_one_host_memory() {
    let [one, other] = [(); 2].map(|()| Rig::new(config(), 1));
    let quiet = one.mm.quiet();
    assert!(one.mm.is_quiet(&quiet) && !other.mm.is_quiet(&quiet));
}

#[test]
fn who_lets_go_of_background_reclaim_has_waited_for_its_end() {
    let rig = Rig::new(config(), 4 * FRAMES);
    for _ in 0..20 {
        let before = rig.mm.stats().background_reclaims;
        let reclaim = rig.mm.start_background_reclaim().unwrap();
        while rig.mm.stats().background_reclaims == before {
            press(&rig);
        }
        drop(reclaim);
        // The thread would have a reference to host memory, weak while it sleeps.
        assert_eq!(Arc::weak_count(&rig.mm), 0);
        let after = rig.mm.stats().background_reclaims;
        press(&rig);
        assert_eq!(rig.mm.stats().background_reclaims, after);
    }
    rig.assert_sound();
}

#[test]
fn background_reclaim_may_outlive_its_host_memory() {
    let rig = Rig::new(config(), 1);
    let reclaim = rig.mm.start_background_reclaim().unwrap();
    drop(rig);
    drop(reclaim);
}
