//! Merging: pages of the same content become one [shared page](crate::object::commons), as KSM
//! does, and pages of zeros the shared page of zeros.
//!
//! Contents are compared only once nobody can write either page any more: both have been made
//! read-only everywhere and flushed. Of two that are the same, one becomes (or is) shared; the
//! mappings of the other go, then its guest page names the shared one: clear and notify before set.

use crate::books::find::Candidate;
use crate::error::{MmError, require_notifier};
use crate::hooks::COMPARED;
use crate::memory::HostMm;
use crate::object::commons::SharedPage;
use crate::object::pages::Place;
use crate::revoke::batch::{DetachedBatch, Revoked};
use crate::revoke::vacate::Vacator;
use crate::revoke::write_out::is_zero;
use gnomon_export_rmap::Invalidation;
use gnomon_export_rmap::addr::Pfn;

/// What came of an attempt to merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// One frame is free now.
    Yes,
    /// The contents differ, or a page was in use by somebody else or not there.
    No,
}

impl HostMm {
    /// Merges the pages in two frames if they are the same. At most one of them may be shared
    /// already: of a page that is, nobody knows all users.
    ///
    /// # Errors
    /// If clients cannot give up their rights; then the pages stay as they were.
    pub fn merge_frames(&self, one: Pfn, two: Pfn) -> Result<Merged, MmError> {
        merge(&self.pager, one, two)
    }

    /// Gives up the frame of a page that is all zero: its guest page names the page of zeros.
    ///
    /// # Errors
    /// As [`merge_frames`](Self::merge_frames).
    pub fn merge_zero_frame(&self, pfn: Pfn) -> Result<Merged, MmError> {
        merge_zero(&self.pager, pfn)
    }
}

fn merge(of: &Vacator, one: Pfn, two: Pfn) -> Result<Merged, MmError> {
    require_notifier("to merge pages")?;
    of.require_any_frame("to merge pages")?;
    let objects = of.objects.load();
    let mut pages: Vec<Candidate<'_>> = of.candidates(&objects, &[one, two]).collect();
    // The one that stays first: a shared one, if there is one.
    pages.sort_by_key(|candidate| !candidate.page.owner().is_shared());
    if pages.len() != 2 || pages[1].page.owner().is_shared() {
        return Ok(Merged::No);
    }
    let revoked = DetachedBatch::detach(of, pages, Invalidation::Clean).revoke()?;
    let Ok([kept, other]) = <[Revoked<'_>; 2]>::try_from(revoked) else {
        return Ok(Merged::No);
    };
    if of.content(kept.page())? != of.content(other.page())? {
        return Ok(Merged::No);
    }
    of.lab().pause(COMPARED);
    let owner = kept.page().owner();
    let shared = if owner.is_shared() { SharedPage::of(owner) } else { of.make_shared(&kept)? };
    join_shared(of, other, shared)
}

fn merge_zero(of: &Vacator, pfn: Pfn) -> Result<Merged, MmError> {
    require_notifier("to merge pages")?;
    of.require_any_frame("to merge pages")?;
    if !of.shares_zero() {
        return Ok(Merged::No);
    }
    let objects = of.objects.load();
    let private = |candidate: &Candidate<'_>| !candidate.page.owner().is_shared();
    let pages = of.candidates(&objects, &[pfn]).filter(private).collect();
    for revoked in DetachedBatch::detach(of, pages, Invalidation::Clean).revoke()? {
        if is_zero(&of.content(revoked.page())?) {
            let zero = SharedPage::zero_for(revoked.gfn());
            return join_shared(of, revoked, zero);
        }
    }
    Ok(Merged::No)
}

/// Points the guest page of a private page, which nobody can write, to the shared page instead.
fn join_shared(of: &Vacator, page: Revoked<'_>, shared: SharedPage) -> Result<Merged, MmError> {
    let pages = vec![page.into_candidate()];
    for revoked in DetachedBatch::detach(of, pages, Invalidation::Unmap).revoke()? {
        if !of.commons.reserve(shared) {
            return Ok(Merged::No);
        }
        of.free_copy(revoked.page());
        drop(revoked.vacate(of, Place::Shared(shared))?);
        of.counters.merges.add(1);
    }
    Ok(Merged::Yes)
}
