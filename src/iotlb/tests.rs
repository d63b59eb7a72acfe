//! An IOTLB on real host memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vm_memory::Bytes;

use super::{DeviceAccess, Iotlb};
use crate::addr::{Gfn, Gpa, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::export_rmap::lab::{DAWDLE, Rule};
use crate::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, MmError};
use crate::iotlb::hooks::SKIP_IOTLB_WAIT;

const ENTRIES: usize = 8;
/// For what is a matter of luck: it comes soon, but on a busy machine not at once.
const GIVE_UP: Duration = Duration::from_secs(60);

fn host(sabotage: Option<Rule>) -> Arc<HostMm> {
    let config = HostMmConfig::new(MIN_HOST_MEMORY_BYTES);
    HostMm::new(HostMmConfig { check_evictions: true, sabotage, ..config }).unwrap()
}

fn object(mm: &Arc<HostMm>, pages: u64) -> Arc<MemoryObject> {
    mm.create_object(pages * PAGE_SIZE_U64).unwrap()
}

fn all_frames(mm: &HostMm) -> Vec<Pfn> {
    (0..mm.frame_count()).map(Pfn::new).collect()
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let word = |index: u64| (seed << 32 | index).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..).flat_map(|index| word(index).to_le_bytes()).take(len).collect()
}

#[test]
fn ranges_cross_pages_and_end_with_memory() {
    let mm = host(None);
    let object = object(&mm, 16);
    let iotlb = Iotlb::new(object.clone(), ENTRIES).unwrap();
    let (at, content) = (Gpa::new(PAGE_SIZE_U64 - 3), bytes(1, 3 * PAGE_SIZE));
    iotlb.write(at, &content).unwrap();
    let mut found = vec![0; content.len()];
    object.read(at, &mut found).unwrap();
    assert_eq!(found, content, "as the host sees it");
    iotlb.store(Gpa::new(8), 0x0102_0304).unwrap();
    found.truncate(4);
    iotlb.read(Gpa::new(8), &mut found).unwrap();
    assert_eq!(found, [4, 3, 2, 1]);

    let end = iotlb.bytes();
    for gpa in [end - 3, end, u64::MAX - 1] {
        let refused = iotlb.write(Gpa::new(gpa), &[0; 4]).unwrap_err();
        assert!(matches!(refused, MmError::OutsideMemory { .. }), "{refused}");
        assert!(iotlb.read(Gpa::new(gpa), &mut found).is_err());
        assert!(iotlb.store(Gpa::new(gpa), 1).is_err());
    }
    assert!(iotlb.check_reverse_map().is_empty());
}

/// The device has stopped, the host has not: the check finds no difference in the middle of a change.
#[test]
fn the_books_can_be_checked_while_the_host_takes_frames() {
    let mm = host(None);
    let object = object(&mm, ENTRIES as u64);
    let iotlb = Iotlb::new(object, ENTRIES).unwrap();
    let frames = all_frames(&mm);
    for _ in 0..200 {
        iotlb.write(Gpa::new(0), &bytes(1, ENTRIES * PAGE_SIZE)).unwrap();
        std::thread::scope(|scope| {
            let evicting = scope.spawn(|| mm.evict_frames(&frames).unwrap());
            while !evicting.is_finished() {
                assert_eq!(iotlb.check_reverse_map(), Vec::<String>::new());
            }
        });
    }
}

#[test]
fn what_was_written_outlives_every_way_of_taking_the_frame() {
    let mm = host(None);
    let object = object(&mm, 4);
    let iotlb = Iotlb::new(object.clone(), ENTRIES).unwrap();
    let frames = all_frames(&mm);
    let mut found = vec![0; PAGE_SIZE];
    let mut version = 0;
    let mut write_then = |take: &dyn Fn()| {
        version += 1;
        iotlb.write(Gpa::new(0), &bytes(version, PAGE_SIZE)).unwrap();
        take();
        iotlb.read(Gpa::new(0), &mut found).unwrap();
        assert_eq!(found, bytes(version, PAGE_SIZE), "version {version}");
    };
    write_then(&|| assert_eq!(mm.evict_frames(&frames).unwrap(), 1));
    write_then(&|| assert_eq!(mm.clean_frames(&frames).unwrap(), 1));
    // Written back, and clean: a write that were not seen would be lost with the frame.
    write_then(&|| assert_eq!(mm.evict_frames(&frames).unwrap(), 1));
    let clone = object.copy_on_write_clone().unwrap();
    write_then(&|| {});
    let mut old = vec![0; PAGE_SIZE];
    clone.read(Gpa::new(0), &mut old).unwrap();
    assert_eq!(old, bytes(3, PAGE_SIZE), "the clone's page is its own");
    write_then(&|| drop(object.lock_page(Gfn::new(0)).unwrap()));
    let stats = iotlb.stats();
    assert!(stats.invalidated >= 3 && stats.write_protected >= 1, "{stats:?}");
    assert_eq!(mm.violations().1, 0);
    assert!(iotlb.check_reverse_map().is_empty());
}

/// Mapped by a read: the right to write is not the device's until the page is the guest's own.
#[test]
fn a_read_of_a_shared_page_gives_no_right_to_write() {
    let mm = host(None);
    let object = object(&mm, 4);
    object.write(Gpa::new(0), &bytes(1, PAGE_SIZE)).unwrap();
    let clone = object.copy_on_write_clone().unwrap();
    let iotlb = Iotlb::new(object, ENTRIES).unwrap();
    let mut found = vec![0; PAGE_SIZE];
    iotlb.read(Gpa::new(0), &mut found).unwrap();
    assert_eq!(found, bytes(1, PAGE_SIZE));
    iotlb.write(Gpa::new(0), &bytes(2, PAGE_SIZE)).unwrap();
    clone.read(Gpa::new(0), &mut found).unwrap();
    assert_eq!(found, bytes(1, PAGE_SIZE), "the clone's page is its own");
    assert_eq!(mm.stats().cow_copies, 1);
    assert!(iotlb.check_reverse_map().is_empty());
}

/// Of a batch of pages that are taken with one flush, a device is in the middle of an access to one.
#[test]
fn a_batch_is_taken_only_after_the_access_to_any_of_its_pages() {
    const PAGES: u64 = 4;
    for used in 0..PAGES {
        let mm = host(None);
        let object = object(&mm, PAGES);
        let iotlb = Iotlb::new(object, ENTRIES).unwrap();
        iotlb.write(Gpa::new(0), &bytes(1, 4 * PAGE_SIZE)).unwrap();
        let access = iotlb.begin(Gfn::new(used), DeviceAccess::Write).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // In the middle of an access no lock is to be waited for: all else is done elsewhere.
            let (over, mm, iotlb) = (&over, &mm, &iotlb);
            scope.spawn(move || {
                mm.evict_frames(&all_frames(mm)).unwrap();
                over.store(true, Ordering::SeqCst);
            });
            let waits = scope.spawn(move || {
                while iotlb.stats().waits == 0 && !over.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                iotlb.stats().waits
            });
            assert_eq!(waits.join().unwrap(), 1, "page {used} is in use");
            assert!(!over.load(Ordering::SeqCst), "page {used} is in use");
            access.page().write_slice(&bytes(2, PAGE_SIZE), 0).unwrap();
            drop(access);
        });
        let mut found = vec![0; PAGE_SIZE];
        iotlb.read(Gpa::new(used * PAGE_SIZE_U64), &mut found).unwrap();
        assert_eq!(found, bytes(2, PAGE_SIZE), "the write was in the copy");
        assert_eq!(mm.violations().1, 0);
    }
}

#[test]
fn a_dropped_iotlb_maps_nothing_and_its_writes_stay() {
    let mm = host(None);
    let object = object(&mm, 4);
    let iotlb = Iotlb::new(object.clone(), ENTRIES).unwrap();
    iotlb.write(Gpa::new(0), &bytes(1, PAGE_SIZE)).unwrap();
    drop(iotlb);
    for pfn in all_frames(&mm) {
        assert!(!mm.frame_table().get(pfn).unwrap().is_exported());
    }
    assert_eq!(mm.evict_frames(&all_frames(&mm)).unwrap(), 1);
    let mut found = vec![0; PAGE_SIZE];
    object.read(Gpa::new(0), &mut found).unwrap();
    assert_eq!(found, bytes(1, PAGE_SIZE));
}

/// Two devices' threads write and read pages of their own, more than there are entries, while all
/// frames are evicted and cleaned again and again, until so many rounds were `enough`, or
/// [`GIVE_UP`]. Returns the number of pages found wrong, up to the first round with one, and how
/// often a flush slept.
fn storm(sabotage: Option<Rule>, enough: impl Fn(u64, &Iotlb) -> bool + Sync) -> (u64, u64) {
    const PAGES: u64 = 16;
    let mm = host(sabotage);
    let object = object(&mm, 2 * PAGES);
    let iotlb = Iotlb::new(object, ENTRIES).unwrap();
    let (wrong, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let begin = Instant::now();
    let device = |first: u64| {
        let mut found = vec![0; PAGE_SIZE];
        let at = |page: u64| Gpa::new((first + page) * PAGE_SIZE_U64);
        for round in 1.. {
            let content = |page| bytes(round * 1000 + first + page, PAGE_SIZE);
            for page in 0..PAGES {
                iotlb.write(at(page), &content(page)).unwrap();
            }
            for page in 0..PAGES {
                iotlb.read(at(page), &mut found).unwrap();
                if found != content(page) {
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
            }
            let is_wrong = wrong.load(Ordering::Relaxed) + mm.violations().1 > 0;
            if is_wrong || enough(round, &iotlb) || begin.elapsed() > GIVE_UP {
                break;
            }
        }
    };
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| {
            let frames = all_frames(&mm);
            while !over.load(Ordering::Relaxed) {
                mm.clean_frames(&frames).unwrap();
                mm.evict_frames(&frames).unwrap();
                std::thread::yield_now();
            }
        });
        let other = scope.spawn(|| device(PAGES));
        device(0);
        other.join().unwrap();
        over.store(true, Ordering::Relaxed);
        taker.join().unwrap();
    });
    assert!(iotlb.check_reverse_map().is_empty());
    (wrong.into_inner() + mm.violations().1, iotlb.stats().waits)
}

#[test]
fn devices_lose_nothing_in_a_storm() {
    assert_eq!(storm(None, |rounds, _| rounds == 200).0, 0);
    let was_waited_for = |rounds, iotlb: &Iotlb| rounds >= 4 && iotlb.stats().waits > 0;
    let (wrong, waits) = storm(Some(DAWDLE), was_waited_for);
    assert_eq!(wrong, 0);
    assert!(waits > 0, "accesses that dawdle were waited for");
}

/// The check that can fail: without the wait, content is lost, and that is noticed.
#[test]
fn sabotage_skip_iotlb_wait_loses_content() {
    assert!(storm(Some(SKIP_IOTLB_WAIT), |_, _| false).0 > 0);
}
