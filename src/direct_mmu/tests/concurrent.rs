//! Many threads at once, against an oracle that knows what each page must hold.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::rig::{FRAMES, Rig, memory, page};
use crate::addr::{Gfn, PAGE_SIZE, Pfn};
use crate::direct_mmu::DirectConfig;
use crate::direct_mmu::hooks::SKIP_WRITE_PROTECT;
use crate::host_mm::HostMmConfig;
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

/// The accesses that went wrong, and all.
#[derive(Default)]
struct Seen {
    wrong: AtomicU64,
    all: AtomicU64,
}

impl Seen {
    fn wrong(&self) -> u64 {
        self.wrong.load(Ordering::Relaxed)
    }

    fn all(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }
}

/// How long a run is at least, and at most on a slow machine.
const TIME: Duration = Duration::from_millis(1500);
const GIVE_UP: Duration = Duration::from_secs(60);

/// Three vCPUs on so many pages, and storms beside them, for [`TIME`] and until `enough` of what
/// the test is about has happened (or [`GIVE_UP`] is over). Adds to `seen`.
fn run(rig: &Rig, pages: u64, removes: bool, seen: &Seen, enough: impl Fn() -> bool) {
    let ledger = Ledger((0..pages).map(|_| Mutex::new(0)).collect());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let vcpus: Vec<_> = (0..3)
            .map(|vcpu| {
                let (ledger, stop) = (&ledger, &stop);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(vcpu);
                    while !stop.load(Ordering::Relaxed) {
                        let right = ledger.access(rig, &mut rng, removes);
                        seen.wrong.fetch_add(u64::from(!right), Ordering::Relaxed);
                        seen.all.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(99);
        let begin = Instant::now();
        let goes_on = |passed: Duration| passed < TIME || (passed < GIVE_UP && !enough());
        while goes_on(begin.elapsed()) && !vcpus.iter().any(|thread| thread.is_finished()) {
            storm(rig, &mut rng);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn faults_evictions_cleanings_and_frees_at_once_lose_nothing() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    let seen = Seen::default();
    let enough = || seen.all() > 300 && rig.mm.stats().swap_ins > 50;
    run(&rig, 48, false, &seen, enough);
    assert_eq!(seen.wrong(), 0, "of {} accesses", seen.all());
    assert!(enough(), "{}: {:?}", seen.all(), rig.mm.stats());
    rig.assert_sound();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn reclaim_and_ageing_beside_faults_lose_nothing() {
    let direct = DirectConfig { shards: 2, ..DirectConfig::default() };
    let rig = Rig::new(memory(4 * FRAMES), direct);
    let reclaim = rig.mm.start_background_reclaim().unwrap();
    let seen = Seen::default();
    let enough = || rig.mmu.stats().aged_zaps >= 20;
    run(&rig, 2 * FRAMES, false, &seen, enough);
    assert_eq!(seen.wrong(), 0, "of {} accesses", seen.all());
    assert!(enough(), "{:?}", rig.mmu.stats());
    drop(reclaim);
    rig.assert_sound();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn removals_of_the_window_beside_all_that_lose_nothing() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    let seen = Seen::default();
    let enough = || rig.mmu.stats().removed > 5;
    run(&rig, 48, true, &seen, enough);
    assert_eq!(seen.wrong(), 0, "of {} accesses", seen.all());
    assert!(enough(), "{:?}", rig.mmu.stats());
    rig.mmu.settle();
    rig.assert_sound();
}

/// The oracle of these tests, and I6, notice pages that stay writable.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn sabotage_skip_write_protect_is_noticed() {
    let sabotage = Some(SKIP_WRITE_PROTECT);
    let config = HostMmConfig { sabotage, ..memory(FRAMES) };
    let rig = Rig::new(config, DirectConfig::default());
    let seen = Seen::default();
    let noticed = || seen.wrong() > 0 || rig.mm.violations().1 > 0;
    run(&rig, 48, false, &seen, noticed);
    assert!(noticed(), "of {} accesses", seen.all());
}
