//! Which frame a page may be in.
//!
//! Shadow page tables can point anywhere, so any page may be in any frame. A memslot that *is* the
//! guest's memory cannot: there the frame of guest page `gfn` is frame `gfn`, always. With
//! [`Placement::Identity`] the frame table and the memfd are as large as the guest's memory, and
//! what is rationed is the number of frames in use. What this guarantees:
//!
//! - a frame that holds no page takes up no memory: it is punched out of the memfd under its page
//!   lock, before the page's entry names another place and before its unit of the ration is given
//!   back (invariant I5 holds in bytes of the memfd);
//! - so the end of every mapping of a frame that loses its page is the punch itself, and a read-only
//!   mapping may stand until then: the frame never holds anything but this one page.
//!
//! What needs another frame for the same guest page, or one frame for several, is refused.

use std::sync::atomic::Ordering;

use crate::addr::{PAGE_SIZE, Pfn};
use crate::export_rmap::{Invalidation, LockedPage, PageFlags};
use crate::host_mm::reclaim::{Candidate, DetachedBatch, add_to_batch};
use crate::host_mm::{
    Gfn, HostMm, MemoryObject, MmError, Place, Sabotage, frames, require_notifier,
};

/// Which frame a page may be in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In any.
    #[default]
    Anywhere,
    /// In the one that has the number of its guest page. There is one memory object only.
    Identity {
        /// Bytes of the guest's memory, and of the memfd: a multiple of 4096.
        guest_bytes: u64,
    },
}

impl Placement {
    /// Bytes of the memfd, and number of frames, with so much memory to ration.
    pub(super) fn extent(self, host_memory_bytes: u64) -> Result<(u64, u32), MmError> {
        let rationed = frames::count(host_memory_bytes)?;
        match self {
            Self::Anywhere => Ok((host_memory_bytes, rationed)),
            Self::Identity { guest_bytes } => Ok((guest_bytes, frames::count(guest_bytes)?)),
        }
    }
}

impl HostMm {
    pub(super) fn is_identity(&self) -> bool {
        matches!(self.config.placement, Placement::Identity { .. })
    }

    /// That a page may be in any frame.
    pub(super) fn require_any_frame(&self, what: &'static str) -> Result<(), MmError> {
        if self.is_identity() { Err(MmError::FixedFrames { what }) } else { Ok(()) }
    }

    /// Gives back the memory of `count` frames from `first`, locked and about to lose their pages,
    /// where frames are only rationed: every mapping of them ends with this.
    pub(super) fn give_memory_back(&self, first: Pfn, count: u32) -> Result<(), MmError> {
        let gfn = Gfn::new(u64::from(first.as_u32()));
        if !self.is_identity() || self.is_sabotaged(Sabotage::KeepMemory, gfn) {
            return Ok(());
        }
        self.view.punch(first, count)
    }

    /// From now on frames may lose their memory behind this layer's back: somebody removes a range
    /// of the window (`MADV_REMOVE`). Each frame is looked at before its content is used.
    pub fn expect_holes(&self) {
        // Release pairs with the Acquire in `settle_hole`: whoever is told of a removal after this
        // looks.
        self.holes_expected.store(true, Ordering::Release);
    }

    /// Makes a page whose frame has lost its memory what it is: zeros, whatever stands in swap.
    pub(super) fn settle_hole(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        if !self.holes_expected.load(Ordering::Acquire) || !self.view.is_hole(page.pfn())? {
            return Ok(());
        }
        self.free_copy(page);
        page.set_flags(PageFlags::BY_WRITE);
        self.view.write(page, 0, &[0; PAGE_SIZE])
    }
}

impl MemoryObject {
    /// Takes all mappings of `count` pages from `first` away from the clients; the pages stay where
    /// they are. For a client whose mappings are gone already, to bring the books in line.
    ///
    /// # Errors
    /// If a client cannot give a page up; pages before it have been.
    pub fn withdraw_mappings(&self, first: Gfn, count: u64) -> Result<(), MmError> {
        require_notifier("to withdraw mappings")?;
        let withdraw = |batch: &mut Vec<Candidate<'_>>| {
            let batch = std::mem::take(batch);
            DetachedBatch::detach(&self.mm, batch, Invalidation::Unmap).revoke()?;
            Ok(())
        };
        let mut batch = Vec::new();
        for raw in first.as_u64()..first.as_u64().saturating_add(count) {
            let gfn = Gfn::new(raw);
            let Some(entry) = self.pages.touched_entry(gfn) else { continue };
            while let Place::Frame(pfn) = entry.load() {
                if add_to_batch(&self.mm, &self.pages, gfn, pfn, &mut batch, withdraw)? {
                    break;
                }
            }
        }
        withdraw(&mut batch)
    }
}
