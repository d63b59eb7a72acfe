//! What each kind of invalidation does to a batch of pages chosen at random.
//!
//! None of them changes what the guest finds in its memory: a range that is remapped gets copies,
//! a page that is merged is merged with a copy of itself.

use std::sync::Arc;

use crate::addr::{Gfn, PAGE_SIZE, Pfn};
use crate::cli::args::Invalidate;
use crate::host_mm::{HostMm, MAX_REMAP_PAGES, MemoryObject, Merged, MmError};
use crate::sync::{Mutex, lock};

/// Pages of the memory object that copies are made in: few, for they want frames and swap.
const SPARE_PAGES: u64 = 256;
/// Pages that are remapped in one step.
const REMAPPED: usize = 8;

/// Invalidates the pages in these frames as far as possible; returns how many it did.
pub(super) type Source = dyn Fn(&[Pfn]) -> Result<usize, MmError> + Send;

/// The source of a kind, if there is anything for a storm to do.
///
/// # Errors
/// If there is no memory object left for copies.
pub(super) fn source(
    kind: Invalidate,
    mm: &Arc<HostMm>,
    object: &Arc<MemoryObject>,
) -> Result<Option<Box<Source>>, MmError> {
    let mm = mm.clone();
    let spare = || object.host_mm().create_object(SPARE_PAGES * PAGE_SIZE as u64);
    Ok(Some(match kind {
        Invalidate::Reclaim => Box::new(move |frames| mm.evict_frames(frames)),
        Invalidate::Clean => Box::new(move |frames| mm.clean_frames(frames)),
        Invalidate::Migrate => Box::new(move |frames| mm.migrate_frames(frames)),
        Invalidate::Cow => cow(object.clone()),
        Invalidate::Merge => merge(object.clone(), spare()?),
        Invalidate::Remap => remap(object.clone(), spare()?),
        Invalidate::Zero => Box::new(move |frames| {
            frames.iter().try_fold(0, |done, &pfn| Ok(done + count(mm.merge_zero_frame(pfn)?)))
        }),
        // The guest's part: it gives pages back of its own accord.
        Invalidate::Free | Invalidate::None => return Ok(None),
    }))
}

/// The guest's pages in these frames.
fn pages_of(object: &MemoryObject, frames: &[Pfn]) -> Vec<Gfn> {
    let owner = |&pfn: &Pfn| object.host_mm().last_owner(pfn);
    let owners = frames.iter().filter_map(owner);
    owners.filter(|owner| owner.object == object.number()).map(|owner| owner.gfn).collect()
}

fn count(merged: Merged) -> usize {
    usize::from(merged == Merged::Yes)
}

/// do_wp_page: a snapshot shares the pages until the next one is taken, and the guest's writes copy
/// them.
fn cow(object: Arc<MemoryObject>) -> Box<Source> {
    let snapshot: Mutex<Option<Arc<MemoryObject>>> = Mutex::new(None);
    Box::new(move |frames| {
        let pages = pages_of(&object, frames);
        let taken = object.share_pages(pages.iter().copied())?;
        *lock(&snapshot) = Some(taken);
        Ok(pages.len())
    })
}

/// KSM: a copy of each page is made, and merged with it unless the guest has written since.
fn merge(object: Arc<MemoryObject>, spare: Arc<MemoryObject>) -> Box<Source> {
    Box::new(move |frames| {
        let mut done = 0;
        for gfn in pages_of(&object, frames) {
            let copy = Gfn::new(gfn.as_u64() % SPARE_PAGES);
            let mut content = [0; PAGE_SIZE];
            object.read(gfn.base(), &mut content)?;
            spare.write(copy.base(), &content)?;
            let frame =
                |object: &MemoryObject, gfn| object.try_lock_resident(gfn).map(|page| page.pfn());
            if let (Some(one), Some(two)) = (frame(&object, gfn), frame(&spare, copy)) {
                done += count(object.host_mm().merge_frames(one, two)?);
            }
        }
        Ok(done)
    })
}

/// mremap: ranges get other pages, copies of those that they had.
fn remap(object: Arc<MemoryObject>, spare: Arc<MemoryObject>) -> Box<Source> {
    const COUNT: u64 = REMAPPED as u64;
    const _: () = assert!(COUNT <= MAX_REMAP_PAGES && SPARE_PAGES.is_multiple_of(COUNT));
    Box::new(move |frames| {
        let mut done = 0;
        // A batch of frames stands for as many pages as it has, a few to a range.
        for gfn in pages_of(&object, frames).into_iter().step_by(REMAPPED) {
            let first = gfn.as_u64() / COUNT * COUNT;
            let copies = Gfn::new(first % SPARE_PAGES);
            if object.contains(Gfn::new(first + COUNT - 1)) {
                object.remap_to_copies(Gfn::new(first), &spare, copies, COUNT)?;
                done += REMAPPED;
            }
        }
        Ok(done)
    })
}
