//! The dirty log: no write is missed, whatever happens to the page meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::rig::{Rig, config, gfn, page};
use crate::hooks::DROP_DIRTY;
use crate::{DirtyLog, HostMmConfig};
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64, Pfn};

const PAGES: u64 = 32;

/// A log that has taken everything once.
fn started(rig: &Rig) -> DirtyLog {
    let log = DirtyLog::start(rig.object.clone()).unwrap();
    assert_eq!(taken(&log).len() as u64, PAGES, "at first every page counts as written");
    assert!(taken(&log).is_empty());
    log
}

fn taken(log: &DirtyLog) -> Vec<u64> {
    log.take(gfn(0), PAGES).unwrap().into_iter().map(|gfn| gfn.as_u64()).collect()
}

#[test]
fn a_write_is_logged_once_by_whomever_it_is_made() {
    let rig = Rig::new(config(), PAGES);
    let log = started(&rig);
    rig.client.write(0, gfn(3), &page(1)).unwrap();
    rig.host_write(gfn(5), &page(2));
    rig.client.read(0, gfn(7)).unwrap();
    assert_eq!(taken(&log), [3, 5]);
    assert!(taken(&log).is_empty());
    // Through a translation that was cached before the log was taken.
    rig.client.write(0, gfn(3), &page(3)).unwrap();
    assert_eq!(log.take(gfn(0), 3).unwrap(), []);
    assert_eq!(log.take(gfn(3), 1).unwrap(), [gfn(3)]);
    assert_eq!(log.take(gfn(PAGES), u64::MAX).unwrap(), []);
    rig.assert_sound();
}

/// More pages than words have bits: each is logged, and no other.
#[test]
fn every_page_has_a_bit_of_its_own() {
    const MANY: u64 = 130;
    let rig = Rig::new(config(), MANY);
    let log = DirtyLog::start(rig.object.clone()).unwrap();
    let all: Vec<_> = (0..MANY).map(gfn).collect();
    assert_eq!(log.take(gfn(0), MANY).unwrap(), all);
    for number in 0..MANY {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
        // In the frame's flag, then as the object's bit.
        assert_eq!(log.take(gfn(0), MANY).unwrap(), [gfn(number)]);
        rig.client.write(0, gfn(number), &page(number + 1)).unwrap();
        rig.evict(gfn(number));
        assert_eq!(log.take(gfn(0), MANY).unwrap(), [gfn(number)]);
    }
    for first in [0, 62, 63, 64, 127] {
        (0..MANY).for_each(|number| rig.host_write(gfn(number), &page(number)));
        let taken: Vec<_> = (first..first + 2).map(gfn).collect();
        assert_eq!(log.take(gfn(first), 2).unwrap(), taken, "and no others");
        let left: Vec<_> = all.iter().copied().filter(|gfn| !taken.contains(gfn)).collect();
        assert_eq!(log.take(gfn(0), MANY).unwrap(), left);
    }
    rig.assert_sound();
}

#[test]
fn a_write_is_logged_whatever_becomes_of_the_page() {
    let rig = Rig::new(config(), PAGES);
    let spare = rig.mm.create_object(PAGES * PAGE_SIZE_U64).unwrap();
    for number in 0..8 {
        rig.client.write(0, gfn(number), &page(number / 7)).unwrap();
    }
    let log = started(&rig);
    for number in 0..8 {
        rig.client.write(0, gfn(number), &page(100 + number / 5)).unwrap();
    }
    let frame = |number| rig.frame(gfn(number)).unwrap();
    rig.evict(gfn(0));
    rig.clean(gfn(1));
    rig.mm.migrate_frames(&[frame(2)]).unwrap();
    let _snapshot = rig.object.share_pages([gfn(3)].into_iter()).unwrap();
    rig.object.free_pages(gfn(4), 1).unwrap();
    rig.mm.merge_frames(frame(5), frame(6)).unwrap();
    rig.object.remap_to_copies(gfn(7), &spare, gfn(0), 1).unwrap();
    assert_eq!(taken(&log), [0, 1, 2, 3, 4, 5, 6, 7]);
    // None of this is a write.
    rig.evict(gfn(1));
    for number in 0..8 {
        rig.client.read(0, gfn(number)).unwrap();
    }
    rig.mm.migrate_frames(&[frame(2)]).unwrap();
    rig.object.remap_to_copies(gfn(7), &spare, gfn(0), 1).unwrap();
    assert!(taken(&log).is_empty());
    // Giving a page back and getting another's are.
    rig.evict(gfn(0));
    rig.object.free_pages(gfn(0), 3).unwrap();
    rig.object.exchange_pages(gfn(9), &spare, gfn(9), 1).unwrap();
    assert_eq!(taken(&log), [0, 1, 2, 9]);
    rig.assert_sound();
}

/// How long a dropped dirty bit may take to show on the slowest machine.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Live migration: pages are copied as the log names them, while processors write and the host
/// takes pages away. Once the processors stand still, one more round makes the copy whole.
fn live_migration(config: HostMmConfig) -> usize {
    let rig = Rig::new(config, PAGES);
    let log = DirtyLog::start(rig.object.clone()).unwrap();
    let writes = AtomicU64::new(0);
    let mut copy = vec![[0; PAGE_SIZE]; usize::try_from(PAGES).unwrap()];
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for processor in 0..2 {
            let (rig, stop, writes) = (&rig, &stop, &writes);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(processor as u64);
                let mut version = 0;
                while !stop.load(Ordering::Relaxed) {
                    version += 2;
                    let number = rng.random_range(0..PAGES / 2) * 2 + processor as u64;
                    rig.client.write(processor, gfn(number), &page(version)).unwrap();
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut rng = StdRng::seed_from_u64(5);
        let begin = Instant::now();
        // A migration that nobody writes beside shows nothing.
        let is_enough =
            |passed| passed > Duration::from_millis(500) && writes.load(Ordering::Relaxed) > 100;
        while !is_enough(begin.elapsed()) && begin.elapsed() < GIVE_UP {
            let frames: Vec<Pfn> = (0..8).map(|_| Pfn::new(rng.random_range(0..64))).collect();
            match rng.random_range(0..4) {
                0 => drop(rig.mm.evict_frames(&frames).unwrap()),
                1 => drop(rig.mm.clean_frames(&frames).unwrap()),
                2 => drop(rig.mm.migrate_frames(&frames).unwrap()),
                _ => {}
            }
            copy_written(&rig, &log, &mut copy);
        }
        stop.store(true, Ordering::Relaxed);
    });
    copy_written(&rig, &log, &mut copy);
    assert!(writes.load(Ordering::Relaxed) > 100);
    (0..).zip(&copy).filter(|(number, copied)| rig.host_read(gfn(*number)) != **copied).count()
}

fn copy_written(rig: &Rig, log: &DirtyLog, copy: &mut [[u8; PAGE_SIZE]]) {
    for number in taken(log) {
        copy[usize::try_from(number).unwrap()] = rig.host_read(gfn(number));
    }
}

#[test]
fn live_migration_by_the_log_is_whole() {
    assert_eq!(live_migration(config()), 0, "pages differ");
}

#[test]
fn live_migration_notices_a_dropped_dirty_bit() {
    let sabotage = Some(DROP_DIRTY);
    let begin = Instant::now();
    let mut differ = 0;
    while differ == 0 && begin.elapsed() < GIVE_UP {
        differ = live_migration(HostMmConfig { sabotage, check_evictions: false, ..config() });
    }
    assert!(differ > 0);
}
