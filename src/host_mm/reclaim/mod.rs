//! Reclaim: taking frames away from pages.
//!
//! `clock.rs` chooses the pages, `evict.rs` takes them out in batches with one flush each. A thread
//! keeps the number of free frames between two watermarks; a fault that finds none left reclaims
//! for itself.

mod background;
mod clock;
pub(crate) mod evict;

use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::host_view::HostView;
use crate::revoke::batch::in_batches;
use crate::revoke::free_frame::Mover;
use gnomon_export_rmap::addr::{Gfn, Pfn};
use gnomon_export_rmap::sync::yield_now;

use clock::Hand;
use evict::evict;

pub use background::BackgroundReclaim;

/// Frames that a fault without a free frame asks for: enough to amortise the flush.
const DIRECT_TARGET: usize = 32;
/// Attempts of a fault before it gives up; each scans the whole table several times.
const DIRECT_ATTEMPTS: u32 = 64;
/// Attempts if pages could be locked but not evicted, each of which tries every page several
/// times: swap that is full or broken does not get better by asking more often.
const FAILING_ATTEMPTS: u32 = 3;
/// Faults in a row that got fewer frames than they asked for, though every page was tried and swap
/// failed for some: what few clean pages there are go round and round, and the guest with them.
const STARVED_FAULTS: u32 = 8;

/// Takes frames away from pages until there are enough, with the state that this has.
pub(super) struct Reclaimer<B: Backing = HostView> {
    mover: Mover<B>,
    hand: Hand,
    /// Faults in a row that starved: see [`STARVED_FAULTS`]. From std under a model checker, too: it
    /// orders nothing.
    starved: AtomicU32,
}

/// What a call of reclaim came to.
#[derive(Debug, Default)]
pub(super) struct Reclaimed {
    /// Frames that are free now.
    pub(super) frames: usize,
    /// Attempts at pages that could not be written.
    pub(super) failed: usize,
    /// The last page that could not be evicted says why.
    pub(super) error: Option<MmError>,
}

impl Reclaimed {
    pub(super) fn add(&mut self, other: Self) {
        self.frames += other.frames;
        self.failed += other.failed;
        if other.error.is_some() {
            self.error = other.error;
        }
    }
}

impl<B: Backing> Deref for Reclaimer<B> {
    type Target = Mover<B>;

    fn deref(&self) -> &Mover<B> {
        &self.mover
    }
}

impl<B: Backing> Reclaimer<B> {
    pub(super) fn new(mover: Mover<B>) -> Self {
        Self { hand: Hand::new(mover.table.len()), mover, starved: AtomicU32::new(0) }
    }

    /// Notes whether a fault starved; `true` if too many have in a row.
    fn note_starved(&self, starved: bool) -> bool {
        // Relaxed: a heuristic orders nothing.
        if !starved {
            self.starved.store(0, Ordering::Relaxed);
            return false;
        }
        self.starved.fetch_add(1, Ordering::Relaxed) + 1 >= STARVED_FAULTS
    }

    /// Reclaim on behalf of a fault: returns once a frame was freed, by anyone.
    pub(super) fn reclaim_directly(&self, gfn: Gfn) -> Result<(), MmError> {
        self.counters.direct_reclaims.add(1);
        let mut error = None;
        for attempt in 1..=DIRECT_ATTEMPTS {
            let reclaimed = self.reclaim(DIRECT_TARGET);
            let starved = reclaimed.frames < DIRECT_TARGET && reclaimed.error.is_some();
            if self.note_starved(starved) {
                error = reclaimed.error.or(error);
                break;
            }
            if reclaimed.frames > 0 || self.free_frames() > 0 {
                return Ok(());
            }
            error = reclaimed.error.or(error);
            if error.is_some() && attempt >= FAILING_ATTEMPTS {
                break;
            }
            // Every page is locked by somebody who is about to free it or to use it.
            yield_now();
        }
        Err(error.unwrap_or(MmError::OutOfFrames {
            gfn,
            why: format!(
                "all {} frames are in use and none can be evicted; give more host memory",
                self.rationed_frames()
            ),
        }))
    }

    /// Evicts the pages in these frames, as far as they hold one and nobody has it locked, without
    /// regard to their use: for stress. Returns the number of frames freed.
    ///
    /// # Errors
    /// If a page could not be evicted, after all others were tried.
    pub(crate) fn evict_frames(&self, frames: &[Pfn]) -> Result<usize, MmError> {
        let objects = self.objects.load();
        let mut reclaimed = Reclaimed::default();
        in_batches(self, self.candidates(&objects, frames), |batch| {
            reclaimed.add(evict(self, batch));
            Ok(())
        })?;
        reclaimed.error.map_or(Ok(reclaimed.frames), Err)
    }

    /// Evicts pages that are not in use, as a fault without a free frame does, until so many frames
    /// were freed or there is nothing left to evict: for tests. Returns the number of frames freed.
    #[cfg(all(feature = "testing", feature = "export-notifier"))]
    pub(crate) fn reclaim_frames(&self, frames: usize) -> Result<usize, MmError> {
        let reclaimed = self.reclaim(frames);
        reclaimed.error.map_or(Ok(reclaimed.frames), Err)
    }
}
