//! Lending: clients get *copies* of a page instead of mappings of its frame.
//!
//! Guarantee: while a copy is out, nobody writes the page, so a copy is right until its client has
//! been told otherwise. As in a cache-coherent machine, any number of copies may be read, or one
//! writer may write, and a writer waits for the copies to be gone.
//!
//! Protocol: a page is lent under its page lock. It is made read-only everywhere first, with one
//! flush for a batch, and [`PageFlags::LENT`] is set: every later fault installs it read-only. So the
//! next write comes through [`MemoryObject::lock_page_for_write`], which recalls the copies: clients
//! are told and flushed, then the flag goes, then the write is let through. What takes the page away
//! (eviction, migration, …) tells the clients that hold copies as it does those that map it.

use crate::addr::{Gfn, PAGE_SIZE};
use crate::export_rmap::{Invalidation, LockedPage, PageFlags};
use crate::host_mm::books::find::Candidate;
use crate::host_mm::error::{MmError, require_notifier};
use crate::host_mm::fault::Intent;
use crate::host_mm::frames::host_view::PageBuf;
use crate::host_mm::inject::PausePoint;
use crate::host_mm::object::pages::{Entry, Place};
use crate::host_mm::revoke::batch::{BATCH, DetachedBatch, is_heavy, lock_beside_batch};
use crate::host_mm::{HostMm, MemoryObject};

/// Takes a page that is lent: its number, its frame, whose lock is held, and its content.
type Borrow<'b> = dyn FnMut(Gfn, &LockedPage<'_>, &PageBuf) + 'b;

/// A page about to be lent: locked, with its number in the object that lends it.
struct Lending<'a> {
    candidate: Candidate<'a>,
    gfn: Gfn,
}

impl Lending<'_> {
    /// Whether somebody may have a writable mapping.
    fn may_be_written(&self) -> bool {
        !self.candidate.page.is_read_only()
    }
}

impl MemoryObject {
    /// Lends pages: each is brought into a frame, made read-only everywhere, and given to `borrow`
    /// under its page lock, in no particular order. `borrow` gets the page's number and content, and
    /// puts the copy's entry into the reverse map, or takes no copy. Its client must answer
    /// [`Invalidation::Recall`].
    ///
    /// # Errors
    /// Outside the object, without a frame to be had, when swap cannot be read, or if clients cannot
    /// give up their right to write. Pages that `borrow` was not called for are not lent.
    pub fn lend_pages(
        &self,
        pages: &[Gfn],
        mut borrow: impl FnMut(Gfn, &LockedPage<'_>, &[u8; PAGE_SIZE]),
    ) -> Result<(), MmError> {
        require_notifier("to lend pages")?;
        // A window of direct paging cannot map a page read-only on every kernel.
        self.mm.require_any_frame("to lend pages")?;
        let mut batch = Vec::new();
        for &gfn in pages {
            self.lend_page(gfn, &mut batch, &mut borrow)?;
        }
        self.mm.lend_batch(&mut batch, &mut borrow)
    }

    fn lend_page<'a>(
        &'a self,
        gfn: Gfn,
        batch: &mut Vec<Lending<'a>>,
        borrow: &mut Borrow<'_>,
    ) -> Result<(), MmError> {
        let mm = &*self.mm;
        loop {
            let place = self.place(gfn);
            let (object, number) = match place {
                Some(Place::Shared(shared)) => (&*mm.commons.pages, shared.gfn()),
                _ => (&*self.pages, gfn),
            };
            let Some(Place::Frame(pfn)) = object.touched_entry(number).map(Entry::load) else {
                // As page locks, faults are waited for with empty hands.
                mm.lend_batch(batch, borrow)?;
                drop(mm.fault_in(&self.pages, gfn, Intent::Read)?);
                continue;
            };
            let page = lock_beside_batch(mm, pfn, || mm.lend_batch(batch, borrow))?;
            // It may have left the frame, or the guest page the shared one, before the lock was ours.
            if object.touched_entry(number).map(Entry::load) != Some(Place::Frame(pfn))
                || self.place(gfn) != place
            {
                continue;
            }
            let is_heavy = is_heavy(mm, pfn);
            if is_heavy {
                mm.lend_batch(batch, borrow)?;
            }
            batch.push(Lending { candidate: Candidate { page, object, gfn: number }, gfn });
            let is_full = is_heavy || batch.len() == BATCH;
            return if is_full { mm.lend_batch(batch, borrow) } else { Ok(()) };
        }
    }

    fn place(&self, gfn: Gfn) -> Option<Place> {
        self.pages.touched_entry(gfn).map(Entry::load)
    }
}

impl HostMm {
    fn lend_batch(
        &self,
        batch: &mut Vec<Lending<'_>>,
        borrow: &mut Borrow<'_>,
    ) -> Result<(), MmError> {
        let (open, closed): (Vec<_>, Vec<_>) =
            std::mem::take(batch).into_iter().partition(Lending::may_be_written);
        for lending in &closed {
            self.lend_locked(&lending.candidate.page, lending.gfn, borrow)?;
        }
        // Before the flush, which may take its time.
        drop(closed);
        let (numbers, open): (Vec<_>, Vec<_>) =
            open.into_iter().map(|lending| (lending.gfn, lending.candidate)).unzip();
        let revoked = DetachedBatch::detach(self, open, Invalidation::Clean).revoke()?;
        for (revoked, gfn) in revoked.iter().zip(numbers) {
            self.lend_locked(revoked.page(), gfn, borrow)?;
        }
        Ok(())
    }

    /// Lends a page that nobody can write.
    fn lend_locked(
        &self,
        page: &LockedPage<'_>,
        gfn: Gfn,
        borrow: &mut Borrow<'_>,
    ) -> Result<(), MmError> {
        self.check_revoked(page, Invalidation::Clean);
        page.set_flags(PageFlags::LENT);
        self.pause(PausePoint::Lending);
        let content = self.content(page)?;
        borrow(gfn, page, &content);
        self.counters.lent.add(1);
        Ok(())
    }
}
