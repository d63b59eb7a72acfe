//! Requests whose pages are taken away in the middle.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::bindings::virtio_mmio as regs;

use super::blk::{FLUSH, header, pattern, request};
use super::disk::{Op, TestDisk};
use super::rig::{BOTH, BUFFERS, Driver, GIVE_UP, Kind, VERSION_1, all_frames, host, until};
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::export_rmap::lab::{DAWDLE, Rule};
use crate::iotlb::hooks::SKIP_IOTLB_WAIT;

const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const PAGES: u64 = 16;
const BYTES: usize = 16 * 4096;

/// Offers a request for the disk's first pages and waits until it is at the disk.
fn begin(driver: &Driver, disk: &TestDisk, kind: u32) {
    let op = if kind == VIRTIO_BLK_T_IN { Op::Read } else { Op::Write };
    disk.set(|state| state.held = Some(op));
    driver.write(STATUS, &[0xff]);
    let header = header(driver, BUFFERS, kind, 0);
    let bytes = u32::try_from(BYTES).unwrap();
    driver.add(0, &[header, (DATA, bytes, kind == VIRTIO_BLK_T_IN), (STATUS, 1, true)]);
    driver.kick(0);
    until("a request at the disk", || disk.set(|state| state.is_waiting));
}

/// Reclaim takes every page of the request, and does not wait for the disk to do it.
#[test]
fn while_the_disk_is_slow_every_page_of_a_request_can_be_taken() {
    for kind in BOTH {
        let (mm, object) = host(kind, None);
        let content = pattern(3, BYTES);
        let disk = TestDisk::new(content.clone());
        let driver = Driver::ready(disk.block(), &object, VERSION_1 | FLUSH, 16);
        for request in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            driver.write(DATA, &pattern(4, BYTES));
            begin(&driver, &disk, request);
            let frames = mm.stats().frames_in_use;
            let evicted = mm.evict_frames(&all_frames(&mm)).unwrap();
            assert_eq!(evicted as u64, frames, "{request}: a page was held");
            assert_eq!(mm.stats().frames_in_use, 0);
            disk.set(|state| state.held = None);
            driver.take(0);
            assert_eq!(driver.read(STATUS, 1), [0]);
            if request == VIRTIO_BLK_T_IN {
                assert!(driver.read(DATA, BYTES) == content);
            } else {
                assert!(disk.set(|state| state.content == pattern(4, BYTES)));
            }
        }
        assert_eq!(mm.violations().1, 0);
        assert!(driver.transport.check_reverse_map().is_empty());
    }
}

/// A reset returns while the disk has not, and what the disk then says changes nothing.
#[test]
fn a_reset_does_not_wait_for_the_disk_and_nothing_touches_memory_after_it() {
    let (mm, object) = host(BOTH[0], None);
    let disk = TestDisk::new(pattern(3, BYTES));
    let driver = Driver::ready(disk.block(), &object, VERSION_1 | FLUSH, 16);
    driver.write(DATA, &pattern(4, BYTES));
    begin(&driver, &disk, VIRTIO_BLK_T_IN);
    driver.set(regs::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.get(regs::VIRTIO_MMIO_STATUS), 0);
    assert!(disk.set(|state| state.is_waiting), "it still is at the disk");
    let before = driver.read(0, usize::try_from(DATA).unwrap() + BYTES);
    disk.set(|state| state.held = None);
    // Its next request comes after the one that was abandoned.
    let driver = &driver;
    driver.begin(VERSION_1, 16);
    let rings = 4 * PAGE_SIZE_U64 + super::rig::RINGS;
    request(driver, VIRTIO_BLK_T_OUT, 0, &[]);
    assert!(driver.read(DATA, BYTES) == pattern(4, BYTES));
    let after = driver.read(0, usize::try_from(DATA).unwrap() + BYTES);
    let differs = |gpa: &usize| before[*gpa] != after[*gpa];
    let outside = |gpa: &usize| {
        let gpa = *gpa as u64;
        // The new rings, and the request's own header and status.
        !(super::rig::RINGS..rings).contains(&gpa) && !(BUFFERS..BUFFERS + 0x200).contains(&gpa)
    };
    assert_eq!((0..before.len()).filter(differs).find(outside), None);
    until("its interrupt, and no other", || driver.line.edges() == 1);
    assert_eq!(mm.violations().1, 0);
}

/// What the disk says once the device was stopped reaches no memory.
#[test]
fn a_device_that_is_stopped_in_the_middle_of_a_request_touches_memory_no_more() {
    let (_mm, object) = host(BOTH[0], None);
    let disk = TestDisk::new(pattern(3, BYTES));
    let driver = Driver::ready(disk.block(), &object, VERSION_1 | FLUSH, 16);
    driver.write(DATA, &pattern(4, BYTES));
    begin(&driver, &disk, VIRTIO_BLK_T_IN);
    driver.transport.stop();
    disk.set(|state| state.held = None);
    until("the disk's answer", || !disk.set(|state| state.is_waiting));
    // Its thread is over after this.
    drop(driver);
    let mut found = vec![0; BYTES];
    object.read(Gpa::new(DATA), &mut found).unwrap();
    assert!(found == pattern(4, BYTES));
    let mut status = [0];
    object.read(Gpa::new(STATUS), &mut status).unwrap();
    assert_eq!(status, [0xff], "not answered");
}

/// The end of a device waits for the disk, and for nothing else.
#[test]
fn a_device_that_is_dropped_in_the_middle_of_a_request_ends() {
    let (mm, object) = host(BOTH[0], None);
    let disk = TestDisk::new(pattern(3, BYTES));
    let driver = Driver::ready(disk.block(), &object, VERSION_1 | FLUSH, 16);
    begin(&driver, &disk, VIRTIO_BLK_T_IN);
    thread::scope(|scope| {
        let ending = scope.spawn(move || drop(driver));
        disk.set(|state| state.held = None);
        ending.join().unwrap();
    });
    for pfn in all_frames(&mm) {
        assert!(!mm.frame_table().get(pfn).unwrap().is_exported());
    }
}

/// What a storm has seen.
#[derive(Debug, Default)]
struct Seen {
    requests: u64,
    wrong: u64,
    waits: u64,
    invalidated: u64,
}

/// Requests on more pages than there are translations, each compared with what it must be, while all
/// pages are evicted and cleaned again and again, until `enough`.
fn storm(kind: Kind, sabotage: Option<Rule>, enough: impl Fn(&Seen) -> bool) -> Seen {
    let (mm, object) = host(kind, sabotage);
    // The rings stay whole: it is the pages of the requests that the oracle looks at.
    mm.lab().limit_sabotage(Gpa::new(DATA).gfn(), 2 * PAGES);
    let disk = TestDisk::new(vec![0; BYTES]);
    let driver = Driver::ready(disk.block(), &object, VERSION_1 | FLUSH, 16);
    let over = AtomicBool::new(false);
    let mut seen = Seen::default();
    let bytes = u32::try_from(BYTES).unwrap();
    thread::scope(|scope| {
        let taker = scope.spawn(|| {
            let frames = all_frames(&mm);
            while !over.load(Ordering::Relaxed) {
                mm.clean_frames(&frames).unwrap();
                mm.evict_frames(&frames).unwrap();
                thread::yield_now();
            }
        });
        let begun = Instant::now();
        while !enough(&seen) {
            assert!(begun.elapsed() < GIVE_UP, "{seen:?}");
            let content = pattern(seen.requests + 1, BYTES);
            driver.write(DATA, &content);
            let out = request(&driver, VIRTIO_BLK_T_OUT, 0, &[(DATA, bytes, false)]);
            let on_disk = disk.set(|state| state.content.clone());
            let back = DATA + PAGES * PAGE_SIZE_U64;
            let into = request(&driver, VIRTIO_BLK_T_IN, 0, &[(back, bytes, true)]);
            assert_eq!((out.0, into.0), (VIRTIO_BLK_S_OK, VIRTIO_BLK_S_OK));
            seen.wrong += u64::from(on_disk != content);
            seen.wrong += u64::from(driver.read(back, BYTES) != on_disk) + mm.violations().1;
            seen.requests += 2;
            let stats = driver.transport.iotlb_stats();
            (seen.waits, seen.invalidated) = (stats.waits, stats.invalidated);
        }
        over.store(true, Ordering::Relaxed);
        taker.join().unwrap();
    });
    assert!(driver.transport.check_reverse_map().is_empty());
    seen
}

#[test]
fn requests_lose_nothing_while_all_pages_are_taken_again_and_again() {
    for kind in BOTH {
        let seen = storm(kind, None, |seen| seen.requests >= 100 && seen.invalidated >= 500);
        assert_eq!(seen.wrong, 0, "{seen:?}");
        // With accesses that dawdle, some are in flight when their page is taken.
        let seen = storm(kind, Some(DAWDLE), |seen| seen.waits >= 10);
        assert_eq!(seen.wrong, 0, "{seen:?}");
    }
}

/// The wait is what keeps them whole: without it, what is in flight is lost, and that is noticed.
#[test]
fn sabotage_skip_iotlb_wait_loses_what_is_in_flight() {
    for kind in BOTH {
        let seen = storm(kind, Some(SKIP_IOTLB_WAIT), |seen| seen.wrong > 0);
        assert!(seen.wrong > 0);
    }
}
