//! Cleaning, the mail's `page_mkclean`: a page becomes read-only everywhere, its dirty state is
//! harvested, then it is written to swap. It stays in its frame and mapped.
//!
//! The write comes after the flush: until then a processor may write through what it caches, and
//! that write would be in neither the copy nor the dirty state.

use crate::books::find::Candidate;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::memory::HostMm;
use crate::revoke::batch::{DetachedBatch, Revoked, in_batches};
use crate::revoke::write_out::Saver;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::{Invalidation, PageFlags};

impl HostMm {
    /// Cleans the pages in these frames, as far as they hold one and nobody has it locked. Returns
    /// the number of pages cleaned.
    ///
    /// # Errors
    /// If a page could not be written, after all others were tried; it stays dirty.
    pub fn clean_frames(&self, frames: &[Pfn]) -> Result<usize, MmError> {
        clean(&self.pager, frames)
    }
}

pub(crate) fn clean<B: Backing>(of: &Saver<B>, frames: &[Pfn]) -> Result<usize, MmError> {
    if cfg!(not(feature = "export-notifier")) {
        return Ok(0);
    }
    let objects = of.objects.load();
    let (mut cleaned, mut result) = (0, Ok(()));
    in_batches(of, of.candidates(&objects, frames), |batch| {
        clean_batch(of, batch, &mut cleaned, &mut result)
    })?;
    of.counters.cleans.add(cleaned);
    result.map(|()| usize::try_from(cleaned).unwrap_or(usize::MAX))
}

fn clean_batch<B: Backing>(
    of: &Saver<B>,
    batch: Vec<Candidate<'_>>,
    cleaned: &mut u64,
    result: &mut Result<(), MmError>,
) -> Result<(), MmError> {
    // Shared pages are read-only everywhere already, and many may map them.
    let (shared, private): (Vec<_>, Vec<_>) =
        batch.into_iter().partition(|page| page.page.owner().is_shared());
    let revoked = DetachedBatch::detach(of, private, Invalidation::Clean).revoke()?;
    let pages = revoked.iter().map(Revoked::page).chain(shared.iter().map(|page| &page.page));
    for page in pages {
        if page.flags().contains(PageFlags::DIRTY)
            && let Err(error) = of.write_out(page)
        {
            *result = Err(error);
            continue;
        }
        *cleaned += 1;
    }
    Ok(())
}
