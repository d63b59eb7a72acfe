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

use crate::books::find::Candidate;
use crate::error::{MmError, require_notifier};
use crate::fault::{Intent, Pager};
use crate::frames::backing::Backing;
use crate::frames::host_view::PageBuf;
use crate::hooks::LENDING;
use crate::memory::object::MemoryObject;
use crate::object::pages::{Entry, ObjectPages, Place};
use crate::revoke::Revoker;
use crate::revoke::batch::{BATCH, DetachedBatch, is_heavy, lock_beside_batch};
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE};
use gnomon_export_rmap::{Invalidation, LockedPage, PageFlags};

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
        lend(&self.mm.pager, &self.pages, pages, &mut borrow)
    }
}

pub(crate) fn lend<B: Backing>(
    of: &Pager<B>,
    own: &ObjectPages,
    pages: &[Gfn],
    borrow: &mut Borrow<'_>,
) -> Result<(), MmError> {
    require_notifier("to lend pages")?;
    // A window of direct paging cannot map a page read-only on every kernel.
    of.require_any_frame("to lend pages")?;
    let mut batch = Vec::new();
    for &gfn in pages {
        lend_page(of, own, gfn, &mut batch, borrow)?;
    }
    lend_batch(of, &mut batch, borrow)
}

fn lend_page<'a, B: Backing>(
    of: &'a Pager<B>,
    own: &'a ObjectPages,
    gfn: Gfn,
    batch: &mut Vec<Lending<'a>>,
    borrow: &mut Borrow<'_>,
) -> Result<(), MmError> {
    loop {
        let place = place_of(own, gfn);
        let (object, number) = match place {
            Some(Place::Shared(shared)) => (&*of.commons.pages, shared.gfn()),
            _ => (own, gfn),
        };
        let Some(Place::Frame(pfn)) = object.touched_entry(number).map(Entry::load) else {
            // As page locks, faults are waited for with empty hands.
            lend_batch(of, batch, borrow)?;
            drop(of.fault_in(own, gfn, Intent::Read)?);
            continue;
        };
        let page = lock_beside_batch(of, pfn, || lend_batch(of, batch, borrow))?;
        // It may have left the frame, or the guest page the shared one, before the lock was ours.
        if object.touched_entry(number).map(Entry::load) != Some(Place::Frame(pfn))
            || place_of(own, gfn) != place
        {
            continue;
        }
        let is_heavy = is_heavy(of, pfn);
        if is_heavy {
            lend_batch(of, batch, borrow)?;
        }
        batch.push(Lending { candidate: Candidate { page, object, gfn: number }, gfn });
        let is_full = is_heavy || batch.len() == BATCH;
        return if is_full { lend_batch(of, batch, borrow) } else { Ok(()) };
    }
}

fn place_of(own: &ObjectPages, gfn: Gfn) -> Option<Place> {
    own.touched_entry(gfn).map(Entry::load)
}

fn lend_batch<B: Backing>(
    of: &Revoker<B>,
    batch: &mut Vec<Lending<'_>>,
    borrow: &mut Borrow<'_>,
) -> Result<(), MmError> {
    let (open, closed): (Vec<_>, Vec<_>) =
        std::mem::take(batch).into_iter().partition(Lending::may_be_written);
    for lending in &closed {
        lend_locked(of, &lending.candidate.page, lending.gfn, borrow)?;
    }
    // Before the flush, which may take its time.
    drop(closed);
    let (numbers, open): (Vec<_>, Vec<_>) =
        open.into_iter().map(|lending| (lending.gfn, lending.candidate)).unzip();
    let revoked = DetachedBatch::detach(of, open, Invalidation::Clean).revoke()?;
    for (revoked, gfn) in revoked.iter().zip(numbers) {
        lend_locked(of, revoked.page(), gfn, borrow)?;
    }
    Ok(())
}

/// Lends a page that nobody can write.
fn lend_locked<B: Backing>(
    of: &Revoker<B>,
    page: &LockedPage<'_>,
    gfn: Gfn,
    borrow: &mut Borrow<'_>,
) -> Result<(), MmError> {
    of.check_revoked(page, Invalidation::Clean);
    page.set_flags(PageFlags::LENT);
    of.lab().pause(LENDING);
    let content = of.content(page)?;
    borrow(gfn, page, &content);
    of.counters.lent.add(1);
    Ok(())
}
