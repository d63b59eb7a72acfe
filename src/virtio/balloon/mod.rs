//! virtio-balloon (VIRTIO 1.2, 5.5): the guest gives pages up, and tells of pages that it has no use
//! for at the moment (free page reporting).
//!
//! A page that the guest puts into the balloon or reports free leaves its frame, or its slot in swap,
//! at once, without a write: by [`MemoryObject::free_pages`], which is an invalidation like any other.
//! From then on it is a page of zeros, which takes up nothing until it is touched. So taking a page out
//! of the balloon needs nothing of the host, and a guest that uses a page without having said so finds
//! zeros: numbers that are wrong, repeated or of no page harm nobody but the guest.

mod give_up;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::addr::PAGE_SIZE_U64;
use crate::host_mm::MemoryObject;

use super::device::{Device, read_bytes};
use super::rings::{Request, Trouble};

const DEVICE_ID: u32 = 5;
/// Linux wants room for 32 ranges in a report.
const QUEUE_SIZE: u16 = 128;

/// Feature bits, 5.5.3. (`virtio-bindings` leaves the balloon out.)
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_POISON: u32 = 4;
const F_PAGE_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Reports are in queue 4, says 5.5.2, and those between are of features that are not offered here.
/// Linux gives queues that are not there no number, so its reports come in queue 2. Without those
/// features there is nothing else that could be meant.
const QUEUES: usize = 5;

/// Byte offsets in the configuration space, 5.5.4.
const CONFIG_TARGET: usize = 0;
const CONFIG_ACTUAL: usize = 4;
const CONFIG_POISON: usize = 12;
const CONFIG_BYTES: usize = 16;

crate::counters::counters! {
    /// What a balloon has done, in pages of 4 KiB.
    pub struct BalloonStats {
        /// Numbers of pages that the guest put into the balloon.
        inflated,
        /// Numbers of pages that it took out.
        deflated,
        /// Pages that it reported free.
        reported,
        /// Of those put in or reported: pages that were not zero already, and were given up.
        given_up,
        /// Pages that could not be given up, and stay as they are.
        kept,
    }
    live pub(super) struct Counters;
}

/// A balloon, as a kind of virtio device.
pub struct Balloon {
    memory: Arc<MemoryObject>,
    features: AtomicU64,
    /// Pages that the guest is asked to have in the balloon.
    target: AtomicU32,
    /// Pages that it says are there.
    actual: AtomicU32,
    /// What the guest fills its free pages with.
    poison: AtomicU32,
    counters: Counters,
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balloon").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Balloon {
    /// An empty balloon, which gives up pages of `memory`.
    #[must_use]
    pub fn new(memory: Arc<MemoryObject>) -> Self {
        Self {
            memory,
            features: AtomicU64::new(0),
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            counters: Counters::default(),
        }
    }

    /// Asks the guest to have so many bytes in the balloon, at most all of its memory, in whole pages.
    /// Tell it by [`MmioTransport::config_changed`](super::MmioTransport::config_changed).
    pub fn set_target(&self, bytes: u64) {
        let pages = bytes.min(self.memory.bytes()) / PAGE_SIZE_U64;
        self.target.store(u32::try_from(pages).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// How many bytes the guest says are in the balloon.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Relaxed)) * PAGE_SIZE_U64
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        self.counters.snapshot()
    }

    fn has(&self, feature: u32) -> bool {
        self.features.load(Ordering::Relaxed) >> feature & 1 != 0
    }

    /// Whether reports may be heeded: pages that are given up are zero, which a guest that checks for
    /// another filling would take for a fault (5.5.6.4).
    fn heeds_reports(&self) -> bool {
        let is_filled = self.has(F_PAGE_POISON) && self.poison.load(Ordering::Relaxed) != 0;
        self.has(F_PAGE_REPORTING) && !is_filled
    }
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        1 << F_DEFLATE_ON_OOM | 1 << F_PAGE_POISON | 1 << F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_BYTES];
        for (at, field) in [
            (CONFIG_TARGET, &self.target),
            (CONFIG_ACTUAL, &self.actual),
            (CONFIG_POISON, &self.poison),
        ] {
            space[at..][..4].copy_from_slice(&field.load(Ordering::Relaxed).to_le_bytes());
        }
        read_bytes(&space, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let Ok(&bytes) = <&[u8; 4]>::try_from(data) else { return };
        let word = u32::from_le_bytes(bytes);
        if offset == CONFIG_ACTUAL as u64 {
            self.actual.store(word, Ordering::Relaxed);
        } else if offset == CONFIG_POISON as u64 && self.has(F_PAGE_POISON) {
            self.poison.store(word, Ordering::Relaxed);
        }
    }

    fn negotiated(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    fn reset(&self) {
        for field in [&self.actual, &self.poison] {
            field.store(0, Ordering::Relaxed);
        }
        self.features.store(0, Ordering::Relaxed);
    }

    fn serve(&self, queue: usize, request: &Request<'_>) -> Result<u32, Trouble> {
        match queue {
            INFLATE => self.inflate(request)?,
            DEFLATE => self.deflate(request),
            _ => self.report(request)?,
        }
        // Nothing is ever written: a reported range is zeros when it is touched.
        Ok(0)
    }
}
