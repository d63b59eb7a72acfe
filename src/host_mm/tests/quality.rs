//! Which pages reclaim takes: a hot set that fits survives a scan of any length.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::rig::{FRAMES, Rig, config, gfn, page};
use crate::{HostMmConfig, ReclaimPolicy};

/// Re-faults of hot pages while cold memory of `scan` pages is touched once, with `hot_per_cold`
/// random accesses to the hot set, 60 % of all frames, for each.
fn hot_refaults(policy: ReclaimPolicy, scan: u64, hot_per_cold: u32) -> u64 {
    let hot = FRAMES * 6 / 10;
    let rig = Rig::new(HostMmConfig { policy, ..config() }, hot + scan);
    let mut rng = StdRng::seed_from_u64(2008);
    let mut touch_hot = || {
        rig.client.read(0, gfn(rng.random_range(0..hot))).unwrap();
    };
    for number in 0..hot {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    (0..4 * hot).for_each(|_| touch_hot());
    rig.object.watch(gfn(0), hot);
    for number in hot..hot + scan {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
        (0..hot_per_cold).for_each(|_| touch_hot());
    }
    rig.assert_sound();
    rig.mm.stats().watched_swap_ins
}

#[test]
fn a_scan_does_not_push_out_what_is_in_use() {
    for hot_per_cold in [16, 64] {
        let clock = hot_refaults(ReclaimPolicy::Clock, 6 * FRAMES, hot_per_cold);
        let fifo = hot_refaults(ReclaimPolicy::Fifo, 6 * FRAMES, hot_per_cold);
        assert!(fifo > FRAMES, "{fifo}: the scan presses on the hot set");
        assert!(clock * 20 < fifo, "{clock} hot re-faults, FIFO {fifo}");
    }
}
