//! Many threads at once, against an oracle that knows what each page must hold.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::rig::{FRAMES, Rig, config, gfn, page};
use crate::hooks::{DROP_DIRTY, SET_FIRST};
use crate::{HostMmConfig, MemoryObject};
use gnomon_export_rmap::addr::{Gpa, PAGE_SIZE, Pfn};
use gnomon_export_rmap::sync::lock;

/// For what must come about on any machine, however slow or busy.
const GIVE_UP: Duration = Duration::from_secs(60);

/// The version that each page has now; holding its lock, a thread is alone with the page.
struct Ledger(Vec<Mutex<u64>>);

impl Ledger {
    fn new(pages: u64) -> Self {
        Self((0..pages).map(|_| Mutex::new(0)).collect())
    }

    /// The page's content in this version.
    fn content(number: u64, version: u64) -> [u8; PAGE_SIZE] {
        match version {
            0 => [0; PAGE_SIZE],
            // Now and then all zeros again.
            version if version % 11 == 0 => [0; PAGE_SIZE],
            version => page(number << 20 | version),
        }
    }

    /// One access of `processor` to a random page; `false` if it was not what it must be.
    fn access(&self, rig: &Rig, processor: usize, rng: &mut StdRng) -> bool {
        let number = rng.random_range(0..self.0.len() as u64);
        let mut version = lock(&self.0[usize::try_from(number).unwrap()]);
        let expected = Self::content(number, *version);
        let host_side = rng.random_ratio(1, 8);
        let found = if host_side {
            rig.host_read(gfn(number))
        } else {
            rig.client.read(processor, gfn(number)).unwrap()
        };
        if rng.random_ratio(1, 40) {
            // The guest gives the page back.
            *version = version.next_multiple_of(11);
            rig.object.free_pages(gfn(number), 1).unwrap();
        } else if rng.random_ratio(1, 3) {
            *version += 1;
            let next = Self::content(number, *version);
            if host_side {
                rig.host_write(gfn(number), &next);
            } else {
                rig.client.write(processor, gfn(number), &next).unwrap();
            }
        }
        found == expected
    }
}

/// Runs processors, and beside them `beside` over and over, for at least `time` and until that was
/// `enough`, or [`GIVE_UP`]; returns the number of accesses that went wrong, and of all.
fn run(
    rig: &Rig,
    pages: u64,
    time: Duration,
    enough: impl Fn() -> bool,
    beside: impl Fn(&mut StdRng) + Sync,
) -> (u64, u64) {
    let ledger = Ledger::new(pages);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let processors: Vec<_> = (0..3)
            .map(|processor| {
                let (ledger, stop) = (&ledger, &stop);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(processor as u64);
                    let (mut wrong, mut all) = (0, 0);
                    while !stop.load(Ordering::Relaxed) {
                        wrong += u64::from(!ledger.access(rig, processor, &mut rng));
                        all += 1;
                    }
                    (wrong, all)
                })
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(99);
        let begin = Instant::now();
        let is_over = |passed| passed > GIVE_UP || passed > time && enough();
        while !is_over(begin.elapsed()) && !processors.iter().any(|thread| thread.is_finished()) {
            beside(&mut rng);
        }
        stop.store(true, Ordering::Relaxed);
        processors
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    })
}

fn evict_and_clean(rig: &Rig, rng: &mut StdRng) {
    let first = rng.random_range(0..rig.mm.frame_count());
    let frames: Vec<_> =
        (first..rig.mm.frame_count()).take(64).map(gnomon_export_rmap::addr::Pfn::new).collect();
    if rng.random() {
        rig.mm.evict_frames(&frames).unwrap();
    } else {
        rig.mm.clean_frames(&frames).unwrap();
    }
}

/// Everything that the host does to a page, but for what the guest asks for.
fn any_source(rig: &Rig, spare: &MemoryObject, snapshot: &Snapshot, rng: &mut StdRng) {
    let mut frame = || Pfn::new(rng.random_range(0..96));
    let (one, two) = (frame(), frame());
    let some: Vec<Pfn> = (0..16).map(|_| frame()).collect();
    let first = rng.random_range(0..40);
    match rng.random_range(0..7) {
        0 => drop(rig.mm.migrate_frames(&some).unwrap()),
        1 => drop(rig.mm.merge_frames(one, two).unwrap()),
        2 => drop(rig.mm.merge_zero_frame(one).unwrap()),
        // The guest's page and the spare one that it was copied from are the same for a moment.
        3 => rig.object.remap_to_copies(gfn(first), spare, gfn(first), 8).unwrap(),
        4 => {
            let pages = (first..first + 8).map(gfn);
            let new = rig.object.share_pages(pages).unwrap();
            let was = |object: &MemoryObject| {
                let mut content = vec![0; 48 * PAGE_SIZE];
                object.read(Gpa::new(0), &mut content).unwrap();
                content
            };
            let content = was(&new);
            let old = lock(snapshot).replace((new, content));
            if let Some((old, content)) = old {
                assert!(was(&old) == content, "a snapshot changed");
            }
        }
        _ => evict_and_clean(rig, rng),
    }
}

type Snapshot = Mutex<Option<(Arc<MemoryObject>, Vec<u8>)>>;

#[test]
fn all_sources_of_invalidation_at_once_lose_nothing() {
    let rig = Rig::new(config(), 48);
    let spare = rig.mm.create_object(48 * PAGE_SIZE as u64).unwrap();
    let snapshot = Mutex::new(None);
    let came_to_all = || {
        let stats = rig.mm.stats();
        let counts = [
            stats.migrations,
            stats.merges,
            stats.cow_copies,
            stats.cow_reuses,
            stats.shared,
            stats.remaps,
            stats.pages_freed,
            stats.swap_ins,
        ];
        counts.iter().all(|&count| count > 20)
    };
    // How long it takes to come to all of it depends on the processor, which may be emulated.
    let (wrong, all) = run(&rig, 48, Duration::from_millis(1500), came_to_all, |rng| {
        any_source(&rig, &spare, &snapshot, rng);
    });
    assert_eq!(wrong, 0, "of {all} accesses");
    assert!(came_to_all(), "{:?}", rig.mm.stats());
    rig.assert_sound();
}

/// Two processors write a shared page at once while a third reads it through what it has cached;
/// returns how often the third found an older page than one whose write had been completed, or the
/// page was given a place while its old mapping stood.
fn race_for_a_copy(rig: &Rig, rounds: u64) -> u64 {
    let mut stale = 0;
    for round in 1..=rounds {
        let _snapshot = rig.object.share_pages([gfn(0)].into_iter()).unwrap();
        rig.client.read(1, gfn(0)).unwrap();
        let completed = AtomicBool::new(false);
        let writers = AtomicU64::new(2);
        thread::scope(|scope| {
            for processor in [0, 2] {
                let (completed, writers) = (&completed, &writers);
                scope.spawn(move || {
                    rig.client.write(processor, gfn(0), &page(round)).unwrap();
                    completed.store(true, Ordering::SeqCst);
                    writers.fetch_sub(1, Ordering::SeqCst);
                });
            }
            while writers.load(Ordering::SeqCst) > 0 {
                let must_be_new = completed.load(Ordering::SeqCst);
                let found = rig.client.read(1, gfn(0)).unwrap();
                stale += u64::from(must_be_new && found[..8] != page(round)[..8]);
            }
        });
    }
    stale + rig.client.broken_promises.load(Ordering::Relaxed)
}

#[test]
fn copies_are_given_out_only_after_the_old_mapping_is_gone() {
    let rig = Rig::new(config(), 1);
    assert_eq!(race_for_a_copy(&rig, 200), 0);
    assert!(rig.mm.stats().cow_copies + rig.mm.stats().cow_reuses >= 200);
    rig.assert_sound();
}

#[test]
fn a_copy_given_out_before_the_old_mapping_is_cleared_is_noticed() {
    let sabotage = Some(SET_FIRST);
    let rig = Rig::new(HostMmConfig { sabotage, ..config() }, 1);
    assert!(race_for_a_copy(&rig, 100) > 0, "{:?}", rig.mm.stats());
}

#[test]
fn faults_evictions_and_cleanings_at_once_lose_nothing() {
    // Few pages: they all stay in frames, so that every eviction is one of ours.
    let rig = Rig::new(config(), 48);
    let came_back = || rig.mm.stats().swap_ins > 100;
    let (wrong, all) = run(&rig, 48, Duration::from_millis(1500), came_back, |rng| {
        evict_and_clean(&rig, rng);
    });
    assert_eq!(wrong, 0, "of {all} accesses");
    assert!(came_back(), "{:?}", rig.mm.stats());
    rig.assert_sound();
}

#[test]
fn direct_and_background_reclaim_at_once_lose_nothing() {
    let pages = 2 * FRAMES;
    let rig = Rig::new(config(), pages);
    let _reclaim = rig.mm.start_background_reclaim().unwrap();
    let came_to_both = || {
        let stats = rig.mm.stats();
        stats.background_reclaims > 0 && stats.swap_ins > 100
    };
    let (wrong, all) = run(&rig, pages, Duration::from_millis(2500), came_to_both, |rng| {
        evict_and_clean(&rig, rng);
        thread::sleep(Duration::from_millis(5));
    });
    assert_eq!(wrong, 0, "of {all} accesses");
    let stats = rig.mm.stats();
    assert!(came_to_both(), "{stats:?}");
    assert!(stats.peak_frames_in_use <= FRAMES, "I5");
    rig.assert_sound();
}

#[test]
fn the_oracle_of_these_tests_notices_a_dropped_dirty_bit() {
    let rig = Rig::new(HostMmConfig { sabotage: Some(DROP_DIRTY), ..config() }, 48);
    let (begin, mut wrong, mut all) = (Instant::now(), 0, 0);
    let is_noticed = || rig.mm.violations().1 > 0;
    while !(wrong > 0 && is_noticed()) && begin.elapsed() < GIVE_UP {
        // As the oracle expects them.
        rig.object.free_pages(gfn(0), 48).unwrap();
        let found = run(&rig, 48, Duration::from_millis(300), is_noticed, |rng| {
            evict_and_clean(&rig, rng);
        });
        wrong += found.0;
        all += found.1;
    }
    assert!(wrong > 0, "of {all} accesses");
    assert!(is_noticed(), "I6");
}

#[test]
fn background_reclaim_keeps_free_frames_between_the_watermarks() {
    let rig = Rig::new(config(), 4 * FRAMES);
    let _reclaim = rig.mm.start_background_reclaim().unwrap();
    let free = || rig.mm.stats().frames - rig.mm.stats().frames_in_use;
    let wait_for_frames = |count: u64| {
        let begin = Instant::now();
        while free() < count && begin.elapsed() < GIVE_UP {
            thread::sleep(Duration::from_millis(1));
        }
    };
    for number in 0..2 * FRAMES {
        // A fault that found none would reclaim for itself, and might leave frames above the mark.
        wait_for_frames(1);
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    // Low is 64 of 1024 frames, high 128, and it stops within a batch of 64 above.
    wait_for_frames(64);
    assert!((64..192).contains(&free()), "{} free frames", free());
    let stats = rig.mm.stats();
    assert!(stats.background_reclaims > 0 && stats.direct_reclaims == 0, "{stats:?}");
    rig.assert_sound();
}

#[test]
fn the_last_owner_may_be_dropped_while_reclaim_runs() {
    for _ in 0..20 {
        let rig = Rig::new(config(), 2 * FRAMES);
        let _reclaim = rig.mm.start_background_reclaim().unwrap();
        for number in 0..FRAMES {
            rig.host_write(gfn(number), &page(1));
        }
        let mm = rig.mm.clone();
        drop(rig);
        // Reclaim may still hold a page that it will find gone, and a frame on its way to the free
        // list.
        let used = || (mm.stats().frames_in_use, mm.stats().swap_slots_used);
        let begin = Instant::now();
        while used() != (0, 0) && begin.elapsed() < GIVE_UP {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(used(), (0, 0));
        assert_eq!(mm.violations().1, 0);
    }
}
