//! Models of an IOTLB: its real entries against the real host memory.
//!
//! | here | stands in for |
//! |---|---|
//! | [`Device::access`] | `Unit::access`, `Unit::translate`: a page is one word |
//! | `invalidate_page`, `flush` | the same of `iotlb/memory.rs` |

use crate::models::exhaustive::FRAME;
use crate::models::host::Host;
use gnomon_export_rmap::addr::{Gfn, Pfn};
use gnomon_export_rmap::explore::{check, check_bounded, thread};
use gnomon_export_rmap::in_flight::{DeviceAccess, InFlight, Slots};
use gnomon_export_rmap::sync::{Arc, Ordering};
use gnomon_export_rmap::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Membership, RevokeError,
};

const PAGE: usize = 0;
const OTHER_PAGE: usize = 1;
const VALUE: u32 = 7;
const OTHER_VALUE: u32 = 8;
/// The word of a page that the device uses.
const WORD: usize = 0;

struct Device {
    slots: Slots,
}

impl Device {
    fn register(host: &Host, entries: usize) -> (Arc<Self>, Membership) {
        let reservation = host.notifiers().reserve().unwrap();
        let device = Arc::new(Self { slots: Slots::new(reservation.id(), 0, entries) });
        let membership = reservation.register(device.clone());
        (device, membership)
    }

    /// One access, started over as often as need be.
    fn access(&self, host: &Host, page: usize, write: Option<u32>) -> u32 {
        let gfn = Gfn::new(page as u64);
        let access = if write.is_some() { DeviceAccess::Write } else { DeviceAccess::Read };
        let mut begun = self.slots.begin(gfn, access);
        let in_flight = loop {
            if let Some(in_flight) = begun {
                break in_flight;
            }
            let token = host.lock_page(page).sequence();
            begun = self.slots.install(host.table(), gfn, token, true, access);
        };
        touch(host, &in_flight, write)
    }
}

fn touch(host: &Host, in_flight: &InFlight<'_>, write: Option<u32>) -> u32 {
    let word = host.word(in_flight.pfn(), WORD);
    if let Some(value) = write {
        word.store(value, Ordering::Relaxed);
    }
    word.load(Ordering::Relaxed)
}

impl ExportNotifier for Device {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        self.slots.invalidate(page, kind)
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        self.slots.age(page)
    }

    fn flush(&self, frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        self.slots.wait_for_stale(frames);
        Ok(())
    }
}

fn machine(pages: usize, frames: u32, entries: usize) -> (Arc<Host>, Arc<Device>, Membership) {
    let host = Arc::new(Host::new(pages, frames));
    let (device, membership) = Device::register(&host, entries);
    (host, device, membership)
}

fn copy(host: &Host) -> u32 {
    host.copy(PAGE, WORD)
}

/// Invariants I3 and I4, once the device has stopped.
fn check_books(host: &Host, device: &Device) {
    assert!(device.slots.differences(host.table(), || false).is_empty(), "I3");
    device.slots.forget_everything(host.table());
    host.check_books(&[]);
}

/// The same, and every write is where the page is.
fn check_end(host: &Host, device: &Device) {
    check_books(host, device);
    if let Some(frame) = host.frame_of(PAGE) {
        host.evict(&[frame]);
    }
    assert_eq!(copy(host), VALUE, "I2: a write was lost");
}

#[test]
fn a_write_in_flight_during_an_eviction_is_in_the_copy() {
    check(|| {
        let (host, device, _membership) = machine(1, 2, 1);
        device.access(&host, PAGE, None);
        let writer = thread::spawn({
            let (host, device) = (host.clone(), device.clone());
            move || device.access(&host, PAGE, Some(VALUE))
        });
        host.evict(&[FRAME]);
        assert_eq!(writer.join().unwrap(), VALUE);
        check_end(&host, &device);
    });
}

/// Two pages leave with one flush, and the device is in the middle of a write to either.
#[test]
fn a_write_in_flight_to_any_page_of_a_batch_is_in_the_copy() {
    for page in [PAGE, OTHER_PAGE] {
        check_bounded(move || {
            let (host, device, _membership) = machine(2, 2, 2);
            device.access(&host, PAGE, None);
            device.access(&host, OTHER_PAGE, None);
            let writer = thread::spawn({
                let (host, device) = (host.clone(), device.clone());
                // If it can without a fault.
                move || {
                    let gfn = Gfn::new(page as u64);
                    let begun = device.slots.begin(gfn, DeviceAccess::Write);
                    begun.map(|in_flight| touch(&host, &in_flight, Some(VALUE)))
                }
            });
            assert_eq!(host.evict(&[FRAME, Pfn::new(1)]), 2);
            let written = writer.join().unwrap().unwrap_or(0);
            let copy = host.copy(page, WORD);
            assert_eq!(copy, written, "I2: a write was lost");
            check_books(&host, &device);
        });
    }
}

#[test]
fn a_write_that_an_eviction_overtakes_starts_over() {
    check_bounded(|| {
        let (host, device, _membership) = machine(1, 2, 1);
        // In its frame, and not mapped by the device.
        drop(host.lock_page(PAGE));
        let writer = thread::spawn({
            let (host, device) = (host.clone(), device.clone());
            move || device.access(&host, PAGE, Some(VALUE))
        });
        host.evict(&[FRAME]);
        writer.join().unwrap();
        check_end(&host, &device);
    });
}

#[test]
fn a_write_in_flight_during_a_cleaning_is_in_the_copy_or_leaves_the_page_dirty() {
    check(|| {
        let (host, device, _membership) = machine(1, 1, 1);
        device.access(&host, PAGE, Some(VALUE - 1));
        let writer = thread::spawn({
            let (host, device) = (host.clone(), device.clone());
            move || device.access(&host, PAGE, Some(VALUE))
        });
        host.clean(&[FRAME]);
        writer.join().unwrap();
        check_end(&host, &device);
    });
}

#[test]
fn a_frame_is_reused_only_after_the_accesses_in_flight() {
    check(|| {
        let (host, device, _membership) = machine(2, 1, 2);
        host.put(OTHER_PAGE, WORD, OTHER_VALUE);
        device.access(&host, PAGE, Some(VALUE));
        let host_side = thread::spawn({
            let host = host.clone();
            move || {
                assert_eq!(host.evict(&[FRAME]), 1);
                drop(host.lock_page(OTHER_PAGE));
            }
        });
        // If it can without a fault: the two would take the frame from each other for ever.
        let begun = device.slots.begin(Gfn::new(PAGE as u64), DeviceAccess::Read);
        if let Some(in_flight) = begun {
            // An access takes its time. (Of accesses to a word, loom remembers the last alone, which
            // is the host's own: unasked it would not go back to before this read.)
            thread::yield_now();
            let found = touch(&host, &in_flight, None);
            assert_eq!(found, VALUE, "I1: another page's content");
        }
        host_side.join().unwrap();
        check_books(&host, &device);
    });
}

/// Two threads of one device with a single entry: one wants the place that the other uses.
#[test]
fn an_entry_that_gives_way_leaves_its_dirty_state_behind() {
    check(|| {
        let (host, device, _membership) = machine(2, 2, 1);
        let writer = thread::spawn({
            let (host, device) = (host.clone(), device.clone());
            move || device.access(&host, PAGE, Some(VALUE))
        });
        device.access(&host, OTHER_PAGE, Some(OTHER_VALUE));
        writer.join().unwrap();
        check_books(&host, &device);
        host.evict(&[Pfn::new(0), Pfn::new(1)]);
        assert_eq!(copy(&host), VALUE, "I2: a write was lost");
        let other = host.copy(OTHER_PAGE, WORD);
        assert_eq!(other, OTHER_VALUE, "I2: a write was lost");
    });
}
