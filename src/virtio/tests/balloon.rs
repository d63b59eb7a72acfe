//! Pages that the guest gives up.

use std::sync::Arc;

use vm_memory::{Bytes, VolatileMemory};

use super::blk::pattern;
use super::rig::{BOTH, BUFFERS, Driver, Kind, VERSION_1, all_frames, host};
use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};
use crate::direct_mmu::{DirectConfig, DirectMmu};
use crate::virtio::Balloon;

const REPORTING: u64 = 1 << 5;
const POISON: u64 = 1 << 4;
const ALL: u64 = VERSION_1 | REPORTING;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Linux's, and the specification's.
const REPORTS: [usize; 2] = [2, 4];

/// The pages that the tests give up.
const FIRST: u64 = 512;
const PAGES: u64 = 48;

fn driver(kind: Kind, features: u64) -> (Arc<crate::host_mm::HostMm>, Arc<Balloon>, Driver) {
    let (mm, object) = host(kind, None);
    let balloon = Arc::new(Balloon::new(object.clone()));
    let driver = Driver::ready(balloon.clone(), &object, features, 128);
    (mm, balloon, driver)
}

fn fill(driver: &Driver) {
    for page in FIRST - 1..FIRST + PAGES + 1 {
        driver.write(page * PAGE_SIZE_U64, &pattern(page, PAGE_SIZE));
    }
}

fn is_filled(driver: &Driver, page: u64) -> bool {
    driver.read(page * PAGE_SIZE_U64, PAGE_SIZE) == pattern(page, PAGE_SIZE)
}

fn is_zero(driver: &Driver, page: u64) -> bool {
    driver.read(page * PAGE_SIZE_U64, PAGE_SIZE).iter().all(|&byte| byte == 0)
}

/// Has the balloon told these numbers.
fn tell(driver: &Driver, queue: usize, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    driver.write(BUFFERS, &bytes);
    driver.serve(queue, &[(BUFFERS, u32::try_from(bytes.len()).unwrap(), false)]);
}

fn numbers() -> Vec<u32> {
    (FIRST..FIRST + PAGES).map(|page| u32::try_from(page).unwrap()).collect()
}

/// The frames come back at once, and nothing is written to swap for it.
#[test]
fn pages_put_into_the_balloon_leave_their_frames_without_a_write_and_are_zero() {
    for kind in BOTH {
        let (mm, balloon, driver) = driver(kind, ALL);
        fill(&driver);
        tell(&driver, DEFLATE, &[0]);
        // The buffer and the ring are in frames now: what changes is what is given up.
        driver.write(BUFFERS, &[0; 4]);
        let (before, resident) = (mm.stats(), mm.resident_bytes().unwrap());
        let mut told = numbers();
        told.reverse();
        tell(&driver, INFLATE, &told);
        let after = mm.stats();
        // The ring of the other queue takes up to three pages.
        let freed = before.frames_in_use - after.frames_in_use;
        assert!((PAGES - 3..=PAGES).contains(&freed), "{freed} frames");
        assert_eq!(after.pages_freed - before.pages_freed, PAGES);
        assert_eq!((after.swap_outs, after.evictions), (before.swap_outs, before.evictions));
        if let Kind::Identity = kind {
            let given_back = resident - mm.resident_bytes().unwrap();
            assert_eq!(given_back, freed * PAGE_SIZE_U64, "as the kernel counts it");
        }
        assert!((FIRST..FIRST + PAGES).all(|page| is_zero(&driver, page)));
        assert!(is_filled(&driver, FIRST - 1) && is_filled(&driver, FIRST + PAGES));
        let stats = balloon.stats();
        assert_eq!((stats.inflated, stats.given_up, stats.kept), (PAGES, PAGES, 0));

        // Taken out and used again.
        tell(&driver, DEFLATE, &numbers());
        assert_eq!(balloon.stats().deflated, PAGES + 1);
        fill(&driver);
        assert!((FIRST..FIRST + PAGES).all(|page| is_filled(&driver, page)));
        assert_eq!(mm.violations().1, 0);
    }
}

#[test]
fn reported_pages_leave_their_frames_or_their_slots_at_once() {
    for kind in BOTH {
        for queue in REPORTS {
            let (mm, balloon, driver) = driver(kind, ALL);
            fill(&driver);
            // Half of them are in swap.
            let in_swap: Vec<_> = all_frames(&mm)
                .into_iter()
                .filter(|&pfn| {
                    mm.last_owner(pfn).is_some_and(|owner| owner.gfn >= Gfn::new(FIRST + PAGES / 2))
                })
                .collect();
            mm.evict_frames(&in_swap).unwrap();
            let before = mm.stats();
            assert!(before.swap_slots_used >= PAGES / 2);
            let start = FIRST * PAGE_SIZE_U64;
            let half = u32::try_from(PAGES / 2 * PAGE_SIZE_U64).unwrap();
            driver.serve(queue, &[(start, half, true), (start + u64::from(half), half, true)]);
            let after = mm.stats();
            assert_eq!(after.pages_freed - before.pages_freed, PAGES);
            assert_eq!(after.swap_outs, before.swap_outs);
            assert_eq!(before.swap_slots_used - after.swap_slots_used, PAGES / 2);
            assert!((FIRST..FIRST + PAGES).all(|page| is_zero(&driver, page)));
            assert!(is_filled(&driver, FIRST - 1) && is_filled(&driver, FIRST + PAGES));
            assert_eq!((balloon.stats().reported, balloon.stats().given_up), (PAGES, PAGES));
            assert_eq!(mm.violations().1, 0);
        }
    }
}

/// A page of which only a part is reported is in use.
#[test]
fn parts_of_pages_are_not_given_up() {
    let (_mm, balloon, driver) = driver(BOTH[0], ALL);
    fill(&driver);
    let start = FIRST * PAGE_SIZE_U64;
    driver
        .serve(2, &[(start + 1, 4095, true), (start + 4096, 4095, true), (start + 8191, 2, true)]);
    assert_eq!(balloon.stats().reported, 0);
    driver.serve(2, &[(start + 1, 3 * 4096, true)]);
    assert_eq!(balloon.stats().reported, 2);
    assert!(is_filled(&driver, FIRST) && is_filled(&driver, FIRST + 3));
    assert!(is_zero(&driver, FIRST + 1) && is_zero(&driver, FIRST + 2));
}

#[test]
fn numbers_of_no_page_and_repeated_ones_are_harmless() {
    for kind in BOTH {
        let (mm, balloon, driver) = driver(kind, ALL);
        fill(&driver);
        let last = u32::try_from(driver.object.bytes() / PAGE_SIZE_U64).unwrap();
        let page = u32::try_from(FIRST).unwrap();
        let told = [u32::MAX, page, last, page, last - 1, u32::MAX - 1, page, last + 1];
        tell(&driver, INFLATE, &told);
        let stats = balloon.stats();
        assert_eq!((stats.inflated, stats.given_up, stats.kept), (8, 1, 0), "{stats:?}");
        driver.serve(INFLATE, &[(u64::MAX - 7, 8, false)]);
        driver.serve(INFLATE, &[(driver.object.bytes() - 2, 4, false)]);
        driver.serve(INFLATE, &[(BUFFERS, 3, false)]);
        driver.serve(INFLATE, &[(BUFFERS, 64, true)]);
        driver.serve(2, &[(u64::MAX - 4095, 4096, true), (driver.object.bytes(), u32::MAX, true)]);
        driver.serve(2, &[(FIRST * PAGE_SIZE_U64, 8192, false)]);
        assert!(is_zero(&driver, FIRST) && is_filled(&driver, FIRST + 1));
        assert!(!driver.needs_reset());
        assert_eq!(mm.violations().1, 0);
    }
}

#[test]
fn reports_are_not_heeded_unless_agreed_on_nor_from_a_guest_that_fills_its_free_pages() {
    for (features, poison, is_heeded) in [
        (VERSION_1, 0, false),
        (ALL | POISON, 0xaaaa_aaaa_u32, false),
        (ALL | POISON, 0, true),
        (ALL, 0xaaaa_aaaa, true),
    ] {
        let (_mm, _balloon, driver) = driver(BOTH[0], features);
        driver.transport.write(0x10c, &poison.to_le_bytes());
        fill(&driver);
        driver.serve(2, &[(FIRST * PAGE_SIZE_U64, 4096, true)]);
        assert_eq!(is_zero(&driver, FIRST), is_heeded, "{features:#x} {poison:#x}");
    }
}

#[test]
fn a_target_is_told_and_the_guest_says_how_far_it_is() {
    let (_mm, balloon, driver) = driver(BOTH[0], ALL);
    assert_eq!(u32::from_le_bytes(driver.config(0)), 0);
    let edges = driver.line.edges();
    balloon.set_target(100 * PAGE_SIZE_U64 + 1);
    driver.transport.config_changed();
    assert_eq!(driver.line.edges(), edges + 1);
    assert_eq!(u32::from_le_bytes(driver.config(0)), 100);
    driver.transport.write(0x104, &99_u32.to_le_bytes());
    assert_eq!(balloon.actual(), 99 * PAGE_SIZE_U64);
    balloon.set_target(u64::MAX);
    let all = u64::from(u32::from_le_bytes(driver.config(0))) * PAGE_SIZE_U64;
    assert_eq!(all, driver.object.bytes());
}

/// With direct paging the window is the guest: its mapping goes with the page, and its next touch
/// finds zeros.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_page_given_up_is_zero_in_the_window_of_direct_paging() {
    let (mm, object) = host(Kind::Identity, None);
    let view = mm.map_guest_view().unwrap();
    let told = |error: crate::direct_mmu::DirectError| panic!("{error}");
    let mmu = DirectMmu::new(DirectConfig::default(), object.clone(), view, told);
    let mmu = mmu.unwrap_or_else(|error| panic!("{error}"));
    let balloon = Arc::new(Balloon::new(object.clone()));
    let driver = Driver::ready(balloon.clone(), &object, ALL, 128);
    let window = mmu.window().region().as_volatile_slice();
    let at = |page: u64| usize::try_from(page * PAGE_SIZE_U64).unwrap();
    for page in FIRST..FIRST + PAGES {
        window.write_slice(&pattern(page, PAGE_SIZE), at(page)).unwrap();
    }
    // Once nothing is read ahead any more.
    let _ = mmu.stats();
    let (before, resident) = (mm.stats(), mm.resident_bytes().unwrap());
    let bytes = u32::try_from(PAGES * PAGE_SIZE_U64).unwrap();
    driver.serve(2, &[(FIRST * PAGE_SIZE_U64, bytes, true)]);
    let after = mm.stats();
    assert_eq!((after.pages_freed - before.pages_freed, after.swap_outs), (PAGES, 0));
    // Up to five pages of the rings that were not touched before.
    let freed = (resident - mm.resident_bytes().unwrap()) / PAGE_SIZE_U64;
    assert!((PAGES - 5..=PAGES).contains(&freed), "{freed} pages");
    let mut found = [1; PAGE_SIZE];
    for page in FIRST..FIRST + PAGES {
        window.read_slice(&mut found, at(page)).unwrap();
        assert!(found.iter().all(|&byte| byte == 0), "page {page}");
        window.write_slice(&pattern(page + 1, PAGE_SIZE), at(page)).unwrap();
    }
    for page in FIRST..FIRST + PAGES {
        window.read_slice(&mut found, at(page)).unwrap();
        assert_eq!(&found[..], pattern(page + 1, PAGE_SIZE));
    }
    assert_eq!(mmu.check_reverse_map(&mm.quiet()).unwrap(), Vec::<String>::new());
    assert_eq!(mm.violations().1, 0);
}
