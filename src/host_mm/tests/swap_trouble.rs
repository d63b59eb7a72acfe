//! Swap that is full, fails, or lies.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::{io, num::NonZeroU64};

use super::client::{Log, Page};
use super::rig::{FRAMES, LoggedSwap, Rig, config, gfn, page};
use crate::swap::{CorruptingBackend, FailingBackend, SwapBackend, SwapError};
use crate::{HostMmConfig, MmError};
use gnomon_export_rmap::addr::SwapSlot;

/// A back end that fails with an errno as long as one is set.
struct Switchable {
    inner: LoggedSwap,
    errno: Arc<AtomicI32>,
    attempts: Arc<AtomicU64>,
}

impl Switchable {
    fn attempt(&self) -> io::Result<()> {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        match self.errno.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl SwapBackend for Switchable {
    fn read(&self, slot: SwapSlot, page: &mut Page) -> io::Result<()> {
        self.attempt()?;
        self.inner.read(slot, page)
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.attempt()?;
        self.inner.write(first, pages)
    }

    fn slots(&self) -> u32 {
        self.inner.slots()
    }
}

struct Switch {
    errno: Arc<AtomicI32>,
    attempts: Arc<AtomicU64>,
}

fn switchable(pages: u64) -> (Rig, Switch) {
    let errno: Arc<AtomicI32> = Arc::default();
    let attempts: Arc<AtomicU64> = Arc::default();
    let switch = Switch { errno: errno.clone(), attempts: attempts.clone() };
    let backend = |log: &Arc<Log>| -> Box<dyn SwapBackend> {
        Box::new(Switchable { inner: LoggedSwap::new(10_000, log), errno, attempts })
    };
    (Rig::with_backend(config(), pages, backend), switch)
}

/// Writes pages until one cannot be had; returns how many could, and the error.
fn write_until_refused(rig: &Rig, pages: u64) -> (u64, MmError) {
    for number in 0..pages {
        if let Err(error) = rig.object.write(gfn(number).base(), &page(number)) {
            return (number, error);
        }
    }
    panic!("{pages} pages fitted");
}

#[test]
fn a_full_swap_is_a_clear_error_after_a_bounded_search_and_loses_nothing() {
    const SLOTS: u32 = 100;
    let rig = Rig::with_slots(config(), 4 * FRAMES, SLOTS);
    let (written, error) = write_until_refused(&rig, 4 * FRAMES);
    let before = rig.mm.stats().scanned;
    rig.object.write(gfn(written).base(), &page(written)).unwrap_err();
    let looked_at = rig.mm.stats().scanned - before;
    assert!((1..=32 * FRAMES).contains(&looked_at), "{looked_at} frames of {FRAMES}");
    assert!(matches!(error, MmError::Swap(SwapError::Full { slots: SLOTS })), "{error}");
    assert_eq!(written, FRAMES + u64::from(SLOTS), "all of both was used");
    // Nothing can change places now, but making room helps.
    let resident: Vec<u64> =
        (0..written).filter(|&number| rig.frame(gfn(number)).is_some()).collect();
    assert_eq!(resident.len() as u64, FRAMES);
    for &number in &resident {
        assert!(rig.host_read(gfn(number)) == page(number), "page {number}");
    }
    let given_up = &resident[..40];
    for &number in given_up {
        rig.host_write(gfn(number), &[0; 4096]);
    }
    for number in (0..written).filter(|number| !given_up.contains(number)) {
        assert!(rig.host_read(gfn(number)) == page(number), "page {number}");
    }
    rig.host_write(gfn(written), &page(written));
    assert!(rig.host_read(gfn(written)) == page(written));
    rig.assert_sound();
}

#[test]
fn a_full_swap_gives_up_slots_that_only_duplicate_a_page_in_a_frame() {
    const SLOTS: u32 = 64;
    let rig = Rig::with_slots(config(), 2 * FRAMES, SLOTS);
    for number in 0..u64::from(SLOTS) {
        rig.host_write(gfn(number), &page(number));
        rig.evict(gfn(number));
    }
    for number in 0..u64::from(SLOTS) {
        assert!(rig.host_read(gfn(number)) == page(number));
    }
    assert_eq!(rig.mm.stats().swap_slots_used, u64::from(SLOTS));
    let last = u64::from(SLOTS);
    rig.host_write(gfn(last), &page(last));
    rig.evict(gfn(last));
    assert!(rig.mm.stats().duplicate_slots_released > 0);
    rig.mm.evict_frames(&rig.all_frames()).unwrap_err();
    for number in 0..=last {
        assert!(rig.host_read(gfn(number)) == page(number), "page {number}");
    }
    rig.assert_sound();
}

#[test]
fn without_swap_zero_pages_can_still_be_reclaimed() {
    let config = HostMmConfig { share_zero: false, ..config() };
    let rig = Rig::with_slots(config, 8 * FRAMES, 0);
    for number in 0..8 * FRAMES {
        assert_eq!(rig.host_read(gfn(number))[0], 0);
    }
    let (written, error) = write_until_refused(&rig, 2 * FRAMES);
    assert!(matches!(error, MmError::Swap(SwapError::Full { slots: 0 })), "{error}");
    assert_eq!(written, FRAMES);
    rig.assert_sound();
}

#[test]
fn a_failing_write_leaves_the_page_in_its_frame_and_dirty() {
    let (rig, switch) = switchable(8);
    for number in 0..3 {
        rig.host_write(gfn(number), &page(number));
    }
    // This one has an old copy in swap, which the failing write must not pass for content.
    rig.evict(gfn(0));
    rig.host_write(gfn(0), &page(10));
    switch.errno.store(libc::EIO, Ordering::Relaxed);
    let frames = [0, 1, 2].map(|n| rig.frame(gfn(n)).unwrap());
    let error = rig.mm.evict_frames(&frames).unwrap_err();
    assert!(
        matches!(&error, MmError::Swap(SwapError::Io { source, .. })
            if source.raw_os_error() == Some(libc::EIO)),
        "{error}"
    );
    assert_eq!([0, 1, 2].map(|n| rig.frame(gfn(n)).unwrap()), frames);
    assert_eq!(rig.mm.stats().failed_evictions, 3);
    #[cfg(feature = "export-notifier")]
    rig.mm.clean_frames(&frames).unwrap_err();
    switch.errno.store(0, Ordering::Relaxed);
    assert_eq!(rig.mm.evict_frames(&frames).unwrap(), 3);
    assert!(rig.host_read(gfn(0)) == page(10));
    assert!(rig.host_read(gfn(1)) == page(1));
    assert!(rig.host_read(gfn(2)) == page(2));
    rig.assert_sound();
}

#[test]
fn a_failing_read_leaves_the_page_in_swap() {
    let (rig, switch) = switchable(8);
    rig.host_write(gfn(0), &page(1));
    rig.evict(gfn(0));
    switch.errno.store(libc::EIO, Ordering::Relaxed);
    for _ in 0..2000 {
        // More often than there are frames: none may be lost on the way.
        let error = rig.object.lock_page(gfn(0)).unwrap_err();
        assert!(matches!(error, MmError::Swap(SwapError::Io { .. })));
    }
    assert_eq!(rig.mm.stats().frames_in_use, 0);
    assert_eq!(rig.mm.stats().swap_slots_used, 1);
    switch.errno.store(0, Ordering::Relaxed);
    assert!(rig.host_read(gfn(0)) == page(1));
    rig.assert_sound();
}

#[test]
fn a_fault_on_failing_swap_gives_up_after_a_bounded_number_of_writes() {
    let (rig, switch) = switchable(2 * FRAMES);
    switch.errno.store(libc::EIO, Ordering::Relaxed);
    let (written, error) = write_until_refused(&rig, 2 * FRAMES);
    assert_eq!(written, FRAMES);
    assert!(matches!(error, MmError::Swap(SwapError::Io { .. })), "{error}");
    let attempts = switch.attempts.load(Ordering::Relaxed);
    assert!(attempts <= 20 * FRAMES, "{attempts} writes for one fault");
    switch.errno.store(0, Ordering::Relaxed);
    for number in 0..written {
        assert!(rig.host_read(gfn(number)) == page(number));
    }
    rig.host_write(gfn(written), &page(written));
    rig.assert_sound();
}

#[test]
fn what_leaves_without_a_write_is_enough_when_swap_fails() {
    const ZEROS: u64 = 16;
    let (rig, switch) = switchable(2 * FRAMES);
    for number in 0..FRAMES - ZEROS {
        rig.host_write(gfn(number), &page(number));
    }
    for number in FRAMES - ZEROS..FRAMES {
        rig.host_read(gfn(number));
    }
    switch.errno.store(libc::EIO, Ordering::Relaxed);
    for number in FRAMES..FRAMES + ZEROS {
        rig.host_read(gfn(number));
    }
    let attempts = switch.attempts.load(Ordering::Relaxed);
    assert!(attempts <= 2 * FRAMES, "{attempts} writes for the {ZEROS} frames that could be had");
    for number in 0..FRAMES - ZEROS {
        assert!(rig.host_read(gfn(number)) == page(number));
    }
    rig.assert_sound();
}

#[test]
fn torn_writes_of_a_dying_disk_never_pass_for_content() {
    let good_calls = 20;
    let rig = Rig::with_backend(config(), 64, |log| {
        let inner = LoggedSwap::new(1000, log);
        Box::new(FailingBackend::new(inner, good_calls, libc::EIO))
    });
    for number in 0..32 {
        rig.host_write(gfn(number), &page(number));
    }
    rig.mm.evict_frames(&rig.all_frames()).unwrap_err();
    let mut resident = 0;
    for number in 0..32 {
        let mut found = [0xee; 4096];
        match rig.object.read(gfn(number).base(), &mut found) {
            Ok(()) => {
                assert!(found == page(number));
                resident += 1;
            }
            Err(error) => assert!(matches!(error, MmError::Swap(SwapError::Io { .. }))),
        }
    }
    assert_eq!(resident, 12, "those whose write failed stayed");
}

#[test]
fn a_corrupt_page_is_found_on_read_and_not_handed_out() {
    let rig = Rig::with_backend(config(), 8, |log| {
        let inner = LoggedSwap::new(1000, log);
        Box::new(CorruptingBackend::new(inner, NonZeroU64::MIN))
    });
    rig.host_write(gfn(5), &page(1));
    rig.evict(gfn(5));
    for _ in 0..2 {
        let error = rig.object.lock_page(gfn(5)).unwrap_err();
        assert!(matches!(error, MmError::Swap(SwapError::Checksum { .. })), "{error}");
        let mut found = [0xee; 16];
        rig.object.read(gfn(5).base(), &mut found).unwrap_err();
        assert_eq!(found, [0xee; 16]);
    }
    assert_eq!(rig.frame(gfn(5)), None);
    assert_eq!(rig.mm.stats().frames_in_use, 0);
}
