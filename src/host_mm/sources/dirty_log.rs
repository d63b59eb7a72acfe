//! The dirty log: which pages of a memory object were written since it was last asked, as live
//! migration and snapshots want to know.
//!
//! Guarantee: no write is missed. A write that was completed before [`DirtyLog::take`] began is in
//! what that call returns or in what an earlier one did; one that comes later is in a later one's, and
//! may be in this one's, too.
//!
//! Protocol: cleaning's. The pages in frames become read-only everywhere, one flush for a batch, and
//! what clients recorded is harvested into
//! [`PageFlags::WRITTEN`](gnomon_export_rmap::PageFlags::WRITTEN). A page that leaves its frame, or becomes
//! shared, takes that flag along as a bit of the object's. `take` first moves the flags to the
//! bits and then takes the bits, so that a flag is in one place or the other at any time.

use std::sync::Arc;

use crate::books::find::Candidate;
use crate::error::{MmError, require_notifier};
use crate::inject::PausePoint;
use crate::memory::object::MemoryObject;
use crate::object::dirty_bits::DirtyBits;
use crate::object::pages::{ObjectPages, Place};
use crate::revoke::Revoker;
use crate::revoke::batch::{DetachedBatch, add_to_batch};
use gnomon_export_rmap::Invalidation;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64};

/// The log of a memory object's writes. One at a time is of use: they share what they take.
///
/// ```
/// use gnomon_export_rmap::addr::{Gfn, Gpa};
/// use gnomon_host_mm::{DirtyLog, HostMemory, HostMmConfig};
///
/// # fn main() -> Result<(), gnomon_host_mm::MmError> {
/// let mm = HostMemory::new(HostMmConfig::new(8 << 20))?;
/// let guest = mm.create_object(16 << 20)?;
/// let log = DirtyLog::start(guest.clone())?;
/// // Live migration: first all pages, then again and again those that were written since.
/// assert_eq!(log.take(Gfn::new(0), 4096)?.len(), 4096);
/// guest.write(Gpa::new(0x3000), &[1])?;
/// assert_eq!(log.take(Gfn::new(0), 4096)?, [Gfn::new(3)]);
/// assert!(log.take(Gfn::new(0), 4096)?.is_empty());
/// # Ok(())
/// # }
/// ```
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
        bits.set_all();
        Ok(Self { object })
    }

    /// The pages among `count` from `first` that were written since they were last taken, in
    /// ascending order; from now on they count as not written. Pages outside the object are passed
    /// over.
    ///
    /// # Errors
    /// If clients cannot give up their right to write: nothing is forgotten then.
    pub fn take(&self, first: Gfn, count: u64) -> Result<Vec<Gfn>, MmError> {
        take(&self.object.mm.pager, &self.object.pages, first, count)
    }
}

fn take(of: &Revoker, object: &ObjectPages, first: Gfn, count: u64) -> Result<Vec<Gfn>, MmError> {
    let end = first.as_u64().saturating_add(count).min(object.bytes / PAGE_SIZE_U64);
    let range = || (first.as_u64()..end).map(Gfn::new);
    let mut batch = Vec::new();
    for gfn in range() {
        harvest_page(of, object, gfn, &mut batch)?;
    }
    harvest_batch(of, &mut batch)?;
    of.pause(PausePoint::Harvested);
    let Some(bits) = object.dirty.get() else {
        return Ok(Vec::new());
    };
    Ok(range().filter(|&gfn| bits.take(gfn)).collect())
}

/// Puts the page into the batch if it is in a frame of its own: elsewhere nobody writes it.
fn harvest_page<'a>(
    of: &'a Revoker,
    object: &'a ObjectPages,
    gfn: Gfn,
    batch: &mut Vec<Candidate<'a>>,
) -> Result<(), MmError> {
    let Some(entry) = object.touched_entry(gfn) else {
        return Ok(());
    };
    while let Place::Frame(pfn) = entry.load() {
        let harvest = |batch: &mut _| harvest_batch(of, batch);
        if add_to_batch(of, object, gfn, pfn, batch, harvest)? {
            break;
        }
    }
    Ok(())
}

fn harvest_batch(of: &Revoker, batch: &mut Vec<Candidate<'_>>) -> Result<(), MmError> {
    let batch = std::mem::take(batch);
    for revoked in DetachedBatch::detach(of, batch, Invalidation::Clean).revoke()? {
        revoked.log_written();
    }
    Ok(())
}
