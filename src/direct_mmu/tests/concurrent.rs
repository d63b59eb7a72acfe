//! Many threads at once, against an oracle that knows what each page must hold.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::rig::{FRAMES, Rig, memory, page};
use crate::addr::{Gfn, PAGE_SIZE, Pfn};
use crate::direct_mmu::DirectConfig;
use crate::host_mm::{HostMmConfig, Sabotage};
use crate::sync::lock;
use crate::sys::memory;

/// The version that each page has now; 0 is zeros. Holding its lock, a thread is alone with the page.
struct Ledger(Vec<Mutex<u64>>);

impl Ledger {
    /// One access to a random page; `false` if it was not what it must be.
    fn access(&self, rig: &Rig, rng: &mut StdRng, removes: bool) -> bool {
        let number = rng.random_range(0..self.0.len() as u64);
        let mut version = lock(&self.0[usize::try_from(number).unwrap()]);
        let content =
            |version: u64| if version == 0 { page(0) } else { page(number << 24 | version) };
        let expected = content(*version);
        let host_side = rng.random_ratio(1, 8);
        let (gpa, mut found) = (Gfn::new(number).base(), [0; PAGE_SIZE]);
        if host_side {
            rig.object.read(gpa, &mut found).unwrap();
        } else {
            found = rig.read(number);
        }
        match rng.random_range(0..40) {
            0 => {
                *version = 0;
                rig.object.free_pages(Gfn::new(number), 1).unwrap();
            }
            1 if removes => {
                *version = 0;
                let offset = usize::try_from(number).unwrap() * PAGE_SIZE;
                memory::remove(rig.window().region(), offset, PAGE_SIZE).unwrap();
                // The guest need not wait: only those who do not use the window.
                if rng.random() {
                    return rig.read(number) == page(0) && found == expected;
                }
                rig.mmu.settle();
            }
            2..14 => {
                *version = rng.random_range(1..1 << 20);
                if host_side && !removes {
                    rig.object.write(gpa, &content(*version)).unwrap();
                } else {
                    rig.write(number, &content(*version));
                }
            }
            _ => {}
        }
        found == expected
    }
}

fn storm(rig: &Rig, rng: &mut StdRng) {
    let first = rng.random_range(0..rig.mm.frame_count());
    let frames: Vec<_> = (first..rig.mm.frame_count()).take(64).map(Pfn::new).collect();
    if rng.random() {
        rig.mm.evict_frames(&frames).unwrap();
    } else {
        rig.mm.clean_frames(&frames).unwrap();
    }
}

/// Three vCPUs on so many pages, and storms beside them; the accesses that went wrong, and all.
fn run(rig: &Rig, pages: u64, time: Duration, removes: bool) -> (u64, u64) {
    let ledger = Ledger((0..pages).map(|_| Mutex::new(0)).collect());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let vcpus: Vec<_> = (0..3)
            .map(|vcpu| {
                let (ledger, stop) = (&ledger, &stop);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(vcpu);
                    let (mut wrong, mut all) = (0, 0);
                    while !stop.load(Ordering::Relaxed) {
                        wrong += u64::from(!ledger.access(rig, &mut rng, removes));
                        all += 1;
                    }
                    (wrong, all)
                })
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(99);
        let begin = Instant::now();
        while begin.elapsed() < time && !vcpus.iter().any(|thread| thread.is_finished()) {
            storm(rig, &mut rng);
        }
        stop.store(true, Ordering::Relaxed);
        vcpus
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    })
}

#[test]
fn faults_evictions_cleanings_and_frees_at_once_lose_nothing() {
    let Some(rig) = Rig::new(memory(FRAMES), DirectConfig::default()) else { return };
    let (wrong, all) = run(&rig, 48, Duration::from_millis(1500), false);
    assert_eq!(wrong, 0, "of {all} accesses");
    assert!(all > 300 && rig.mm.stats().swap_ins > 50, "{all}: {:?}", rig.mm.stats());
    rig.assert_sound();
}

#[test]
fn reclaim_and_ageing_beside_faults_lose_nothing() {
    let direct = DirectConfig { shards: 2, ..DirectConfig::default() };
    let Some(rig) = Rig::new(memory(4 * FRAMES), direct) else { return };
    rig.mm.start_background_reclaim().unwrap();
    let begin = Instant::now();
    let (mut wrong, mut all) = (0, 0);
    // How long it takes to fill the ration depends on the machine.
    let mut time = Duration::from_millis(1500);
    while rig.mmu.stats().aged_zaps < 20 && begin.elapsed() < Duration::from_secs(60) {
        rig.object.free_pages(Gfn::new(0), 4 * FRAMES).unwrap();
        let found = run(&rig, 2 * FRAMES, time, false);
        wrong += found.0;
        all += found.1;
        time *= 2;
    }
    assert_eq!(wrong, 0, "of {all} accesses");
    assert!(rig.mmu.stats().aged_zaps >= 20, "{:?}", rig.mmu.stats());
    rig.mm.stop_background_reclaim();
    rig.assert_sound();
}

#[test]
fn removals_of_the_window_beside_all_that_lose_nothing() {
    let Some(rig) = Rig::new(memory(FRAMES), DirectConfig::default()) else { return };
    let (wrong, all) = run(&rig, 48, Duration::from_millis(1500), true);
    assert_eq!(wrong, 0, "of {all} accesses");
    assert!(rig.mmu.stats().removed > 5, "{:?}", rig.mmu.stats());
    rig.mmu.settle();
    rig.assert_sound();
}

/// The oracle of these tests, and I6, notice pages that stay writable.
#[test]
fn sabotage_skip_write_protect_is_noticed() {
    let sabotage = Some(Sabotage::SkipWriteProtect);
    let config = HostMmConfig { sabotage, ..memory(FRAMES) };
    let Some(rig) = Rig::new(config, DirectConfig::default()) else { return };
    let (wrong, all) = run(&rig, 48, Duration::from_millis(1000), false);
    assert!(wrong > 0 || rig.mm.violations().1 > 0, "of {all} accesses");
}
