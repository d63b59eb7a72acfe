//! What each kind of invalidation does to a batch of pages chosen at random.
//!
//! None of them changes what a guest finds in its memory: a range that is remapped gets copies, a
//! page that is merged is merged with a copy of itself, or with one of another VM that is the same.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::RngExt;
use rand::rngs::StdRng;

use super::fleet::Objects;
use super::observe::Snapshot;
use super::plan::Invalidation;
use super::storms::{Source, Trouble};
use crate::addr::{Gfn, Gpa, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::host_mm::{HostMm, MAX_REMAP_PAGES, MemoryObject, Merged, MmError};
use crate::sync::{Mutex, lock};

/// Pages of the memory object that copies are made in: few, for they want frames and swap.
const SPARE_PAGES: u64 = 256;
/// What the last byte of a page differs by from one that it is not to be taken for.
const LAST: u8 = 0x80;
/// Pages that are remapped in one step.
const REMAPPED: usize = 8;

/// The source of a kind, if there is anything for a storm to do.
///
/// # Errors
/// If there is no memory object left for copies.
pub(super) fn source(
    kind: Invalidation,
    mm: &Arc<HostMm>,
    objects: &Arc<Objects>,
) -> Result<Option<Box<Source>>, MmError> {
    let spare = || mm.create_object(SPARE_PAGES * PAGE_SIZE_U64);
    let (mm, objects) = (mm.clone(), objects.clone());
    Ok(Some(match kind {
        Invalidation::Reclaim => Box::new(move |frames, _| Ok(mm.evict_frames(frames)?)),
        Invalidation::Clean => Box::new(move |frames, _| Ok(mm.clean_frames(frames)?)),
        Invalidation::Migrate => Box::new(move |frames, _| Ok(mm.migrate_frames(frames)?)),
        Invalidation::Cow => cow(objects),
        Invalidation::Merge => {
            let spare = spare()?;
            merge(objects, spare)
        }
        Invalidation::Remap => {
            let spare = spare()?;
            remap(objects, spare)
        }
        Invalidation::Zero => {
            let spare = spare()?;
            zero(mm, spare)?
        }
        // The guest's part: it gives pages back of its own accord.
        Invalidation::Free | Invalidation::Remove => return Ok(None),
    }))
}

/// A page of a VM.
type Target = (Arc<MemoryObject>, Gfn);

/// The VMs' pages in these frames. For a shared one, of which nobody knows all users, a page is
/// chosen at random: it may be one of them.
fn targets(live: &[Arc<MemoryObject>], frames: &[Pfn], random: &mut StdRng) -> Vec<Target> {
    let mut found = Vec::new();
    for &pfn in frames {
        let Some(owner) = live.first().and_then(|one| one.host_mm().last_owner(pfn)) else {
            continue;
        };
        if owner.is_shared() {
            let object = &live[random.random_range(0..live.len())];
            let gfn = random.random_range(0..(object.bytes() / PAGE_SIZE_U64).max(1));
            found.push((object.clone(), Gfn::new(gfn)));
        } else if let Some(object) = live.iter().find(|one| one.number() == owner.object) {
            found.push((object.clone(), owner.gfn));
        }
    }
    found
}

fn count(merged: Merged) -> usize {
    usize::from(merged == Merged::Yes)
}

/// do_wp_page: snapshots share the pages until the next ones are taken, and the guests' writes copy
/// them. What the snapshots hold stays what it was.
fn cow(objects: Arc<Objects>) -> Box<Source> {
    let snapshots: Mutex<Vec<Snapshot>> = Mutex::default();
    Box::new(move |frames, random| {
        let mut snapshots = lock(&snapshots);
        snapshots.iter().try_for_each(Snapshot::check)?;
        let live = objects.live();
        let pages = targets(&live, frames, random);
        let mut taken = Vec::new();
        for object in &live {
            let of_it = pages.iter().filter(|(one, _)| Arc::ptr_eq(one, object));
            let of_it: Vec<Gfn> = of_it.map(|(_, gfn)| *gfn).collect();
            if !of_it.is_empty() {
                let snapshot = object.share_pages(of_it.iter().copied())?;
                taken.push(Snapshot::of(snapshot, &of_it)?);
            }
        }
        *snapshots = taken;
        Ok(pages.len())
    })
}

/// KSM: a page is merged with the same page of another VM, if both have the same content. Or a
/// copy of it is made, and merged with it unless the guest has written since.
fn merge(objects: Arc<Objects>, spare: Arc<MemoryObject>) -> Box<Source> {
    Box::new(move |frames, random| {
        let live = objects.live();
        let mut done = 0;
        for (object, gfn) in targets(&live, frames, random) {
            let other = &live[random.random_range(0..live.len())];
            if !Arc::ptr_eq(other, &object) {
                let merged = merge_resident(&object, gfn, other, gfn)?;
                objects.merged_across.fetch_add(merged as u64, Ordering::Relaxed);
                done += merged;
                continue;
            }
            let copy = Gfn::new(gfn.as_u64() % SPARE_PAGES);
            let mut content = [0; PAGE_SIZE];
            object.read(gfn.base(), &mut content)?;
            // Now and then the copy differs in its last byte, and so is none.
            let differs = random.random_ratio(1, 4);
            content[PAGE_SIZE - 1] ^= if differs { LAST } else { 0 };
            spare.write(copy.base(), &content)?;
            done += merge_resident(&object, gfn, &spare, copy)?;
            if differs && !still_reads(&spare, copy, &content)? {
                let number = object.number();
                return Err(Trouble::Wrong(format!(
                    "I2: guest frame {gfn} of object {number} was merged with a page that differs in its last byte"
                )));
            }
        }
        Ok(done)
    })
}

/// Whether a page that nobody else writes holds what was written. Of two pages that were merged the
/// copy takes the other's content. That something was merged does not say so: frames are looked up
/// before they are locked, and may have got other pages by then, which may be the same.
fn still_reads(
    spare: &MemoryObject,
    copy: Gfn,
    written: &[u8; PAGE_SIZE],
) -> Result<bool, MmError> {
    let mut found = [0; PAGE_SIZE];
    spare.read(copy.base(), &mut found)?;
    Ok(found == *written)
}

/// Pages of zeros are merged with the shared one. Beside the guests' there are pages that are zero but
/// for their last byte, which are none, here and when they are evicted.
fn zero(mm: Arc<HostMm>, spare: Arc<MemoryObject>) -> Result<Box<Source>, MmError> {
    let last = |page: u64| Gpa::new(page * PAGE_SIZE_U64 + PAGE_SIZE_U64 - 1);
    (0..SPARE_PAGES).try_for_each(|page| spare.write(last(page), &[LAST]))?;
    Ok(Box::new(move |frames, random| {
        let almost = random.random_range(0..SPARE_PAGES);
        let frame = spare.try_lock_resident(Gfn::new(almost)).map(|page| page.pfn());
        if let Some(pfn) = frame {
            // It may have got another page, which may be zero.
            mm.merge_zero_frame(pfn)?;
        }
        let mut found = [0];
        spare.read(last(almost), &mut found)?;
        if found != [LAST] {
            return Err(Trouble::Wrong(format!(
                "I2: page {almost:#x} of object {} was taken for zeros, though its last byte is none",
                spare.number()
            )));
        }
        let merge = |done, &pfn| Ok(done + count(mm.merge_zero_frame(pfn)?));
        frames.iter().try_fold(0, merge)
    }))
}

/// Merges two pages, if both are in frames, and not in the same.
fn merge_resident(
    one: &MemoryObject,
    one_gfn: Gfn,
    two: &MemoryObject,
    two_gfn: Gfn,
) -> Result<usize, MmError> {
    let frame = |object: &MemoryObject, gfn| object.try_lock_resident(gfn).map(|page| page.pfn());
    match (frame(one, one_gfn), frame(two, two_gfn)) {
        (Some(a), Some(b)) if a != b => Ok(count(one.host_mm().merge_frames(a, b)?)),
        _ => Ok(0),
    }
}

/// mremap: ranges get other pages, copies of those that they had.
fn remap(objects: Arc<Objects>, spare: Arc<MemoryObject>) -> Box<Source> {
    const COUNT: u64 = REMAPPED as u64;
    const _: () = assert!(COUNT <= MAX_REMAP_PAGES && SPARE_PAGES.is_multiple_of(COUNT));
    Box::new(move |frames, random| {
        let mut done = 0;
        // A batch of frames stands for as many pages as it has, a few to a range.
        let live = objects.live();
        for (object, gfn) in targets(&live, frames, random).into_iter().step_by(REMAPPED) {
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

// Without the notifier nothing can be merged, shared or remapped.
#[cfg(all(test, feature = "export-notifier"))]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::host_mm::HostMmConfig;

    const PAGES: u64 = 64;

    /// The same in both objects for even pages, of its own in each for odd ones.
    fn content(object: usize, gfn: Gfn) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        let number = gfn.as_u64().to_le_bytes()[0];
        page[..3].copy_from_slice(&[
            1,
            number,
            if number.is_multiple_of(2) { 9 } else { [5, 6][object] },
        ]);
        page
    }

    /// The frame of a copy that is to differ gets another page between the look-up and the merge.
    #[test]
    fn a_merge_of_what_has_come_into_a_frame_since_is_no_finding() {
        let mm = HostMm::new(HostMmConfig::new(4 << 20)).unwrap();
        let [one, two, spare] = [(); 3].map(|()| mm.create_object(PAGES * PAGE_SIZE_U64).unwrap());
        let frame = |object: &MemoryObject, gfn: Gfn| {
            object.try_lock_resident(gfn).map(|page| page.pfn()).unwrap()
        };
        let [gfn, copy] = [Gfn::new(2), Gfn::new(0)];
        let same = content(0, gfn);
        let mut different = same;
        different[PAGE_SIZE - 1] ^= LAST;
        one.write(gfn.base(), &same).unwrap();
        spare.write(copy.base(), &different).unwrap();
        let (kept, other) = (frame(&one, gfn), frame(&spare, copy));
        assert_eq!(mm.evict_frames(&[other]).unwrap(), 1);
        let taken = (0..PAGES).map(Gfn::new).find(|&gfn| {
            two.write(gfn.base(), &same).unwrap();
            frame(&two, gfn) == other
        });
        assert!(taken.is_some(), "a frame that is free is taken in the end");
        assert_eq!(mm.merge_frames(kept, other).unwrap(), Merged::Yes);
        assert!(still_reads(&spare, copy, &different).unwrap());
        // What a merge of these two would have made of it.
        spare.write(copy.base(), &same).unwrap();
        assert!(!still_reads(&spare, copy, &different).unwrap());
    }

    #[test]
    fn no_source_changes_what_any_of_several_guests_finds() {
        let mm = HostMm::new(HostMmConfig::new(4 << 20)).unwrap();
        let objects = Arc::new(Objects::default());
        let live = [(); 2].map(|()| mm.create_object(PAGES * PAGE_SIZE_U64).unwrap());
        let every = || (0..2).flat_map(|index| (0..PAGES).map(move |raw| (index, Gfn::new(raw))));
        live.iter().for_each(|object| objects.add(object));
        for (index, gfn) in every() {
            live[index].write(gfn.base(), &content(index, gfn)).unwrap();
        }
        let mut random = StdRng::seed_from_u64(1);
        let frames: Vec<Pfn> = (0..mm.frame_count()).map(Pfn::new).collect();
        use Invalidation::{Clean, Cow, Merge, Migrate, Reclaim, Remap, Zero};
        for kind in [Merge, Cow, Remap, Zero, Migrate, Clean, Reclaim, Merge] {
            let work = source(kind, &mm, &objects).unwrap().unwrap();
            let mut done = 0;
            for some in frames.chunks(32) {
                done += work(some, &mut random).unwrap();
            }
            assert!(done > 0 || kind == Zero, "{kind:?}");
            for (index, gfn) in every() {
                let mut found = [0; PAGE_SIZE];
                live[index].read(gfn.base(), &mut found).unwrap();
                assert!(found == content(index, gfn), "{kind:?}: page {gfn} of object {index}");
            }
        }
        // Of both objects: equal pages only, or the content would not be right.
        assert!(objects.merged_across.load(Ordering::Relaxed) > 0);
    }
}
