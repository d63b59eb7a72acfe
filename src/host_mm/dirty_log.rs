//! The dirty log: which pages of a memory object were written since it was last asked, as live
//! migration and snapshots want to know.
//!
//! Guarantee: no write is missed. A write that was completed before [`DirtyLog::take`] began is in
//! what that call returns or in what an earlier one did; one that comes later is in a later one's, and
//! may be in this one's, too.
//!
//! Protocol: cleaning's. The pages in frames become read-only everywhere, one flush for a batch, and
//! what clients recorded is harvested into [`PageFlags::WRITTEN`](crate::export_rmap::PageFlags::WRITTEN). A page that leaves its frame, or
//! becomes shared, takes that flag along as a bit of the object's. `take` first moves the flags to the
//! bits and then takes the bits, so that a flag is in one place or the other at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::Gfn;
use crate::export_rmap::Invalidation;
use crate::host_mm::object::{ObjectPages, Place};
use crate::host_mm::reclaim::{Candidate, DetachedBatch, add_to_batch};
use crate::host_mm::{HostMm, MemoryObject, MmError, PausePoint, pages, require_notifier};

/// One bit a page: written since the log took it last, and not in a frame that says so itself.
#[derive(Debug)]
pub(super) struct DirtyBits(Box<[AtomicU64]>);

impl DirtyBits {
    fn new(bytes: u64) -> Self {
        Self((0..pages(bytes).div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, gfn: Gfn) -> Option<(&AtomicU64, u64)> {
        let index = usize::try_from(gfn.as_u64() / 64).ok()?;
        Some((self.0.get(index)?, 1 << (gfn.as_u64() % 64)))
    }

    fn set(&self, gfn: Gfn) {
        if let Some((word, bit)) = self.word(gfn) {
            // Release pairs with the Acquire in `take`: who finds the bit finds the write.
            word.fetch_or(bit, Ordering::Release);
        }
    }

    fn take(&self, gfn: Gfn) -> bool {
        self.word(gfn).is_some_and(|(word, bit)| {
            word.load(Ordering::Relaxed) & bit != 0
                && word.fetch_and(!bit, Ordering::Acquire) & bit != 0
        })
    }
}

impl ObjectPages {
    /// Notes that a page was written which no frame speaks for any more.
    pub(super) fn note_written(&self, gfn: Gfn) {
        if let Some(bits) = self.dirty.get() {
            bits.set(gfn);
        }
    }
}

/// The log of a memory object's writes. One at a time is of use: they share what they take.
#[derive(Debug)]
pub struct DirtyLog {
    object: Arc<MemoryObject>,
}

impl DirtyLog {
    /// Starts logging: all pages count as written until they were taken once.
    ///
    /// # Errors
    /// [`MmError::NoNotifier`].
    pub fn start(object: Arc<MemoryObject>) -> Result<Self, MmError> {
        require_notifier("to log writes")?;
        let bits = object.pages.dirty.get_or_init(|| DirtyBits::new(object.bytes()));
        for word in &bits.0 {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        Ok(Self { object })
    }

    /// The pages among `count` from `first` that were written since they were last taken, in
    /// ascending order; from now on they count as not written. Pages outside the object are passed
    /// over.
    ///
    /// # Errors
    /// If clients cannot give up their right to write: nothing is forgotten then.
    pub fn take(&self, first: Gfn, count: u64) -> Result<Vec<Gfn>, MmError> {
        let (mm, object) = (&*self.object.mm, &*self.object.pages);
        let end = first.as_u64().saturating_add(count).min(pages(object.bytes));
        let range = || (first.as_u64()..end).map(Gfn::new);
        let mut batch = Vec::new();
        for gfn in range() {
            mm.harvest_page(object, gfn, &mut batch)?;
        }
        mm.harvest_batch(&mut batch)?;
        mm.pause(PausePoint::Harvested);
        let Some(bits) = object.dirty.get() else {
            return Ok(Vec::new());
        };
        Ok(range().filter(|&gfn| bits.take(gfn)).collect())
    }
}

impl HostMm {
    /// Puts the page into the batch if it is in a frame of its own: elsewhere nobody writes it.
    fn harvest_page<'a>(
        &'a self,
        object: &'a ObjectPages,
        gfn: Gfn,
        batch: &mut Vec<Candidate<'a>>,
    ) -> Result<(), MmError> {
        let Some(entry) = object.touched_entry(gfn) else {
            return Ok(());
        };
        while let Place::Frame(pfn) = entry.load() {
            let harvest = |batch: &mut _| self.harvest_batch(batch);
            if add_to_batch(self, object, gfn, pfn, batch, harvest)? {
                break;
            }
        }
        Ok(())
    }

    fn harvest_batch(&self, batch: &mut Vec<Candidate<'_>>) -> Result<(), MmError> {
        let batch = std::mem::take(batch);
        for revoked in DetachedBatch::detach(self, batch, Invalidation::Clean).revoke()? {
            revoked.log_written();
        }
        Ok(())
    }
}
