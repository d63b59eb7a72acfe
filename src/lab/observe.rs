//! Those who look on during a run: what the dirty log says is compared with what was written, and
//! what snapshots hold with what was shared.
//!
//! Guarantee: no false alarm. A page is looked at twice, and what must be so is concluded only from
//! what differs between the two looks.

use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;
use xxhash_rust::xxh3::xxh3_64;

use super::fleet::Objects;
use super::storms::{Source, Trouble};
use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};
use crate::host_mm::{DirtyLog, MemoryObject, MmError};
use crate::sync::{Mutex, lock};

/// Ranges of pages that the log is asked for at a time.
const RANGES: usize = 32;
/// Pages of a range.
const RANGE_PAGES: u64 = 16;
/// Pages for which the log has one word: its ends deserve looks of their own.
const WORD_PAGES: u64 = 64;

fn content(object: &MemoryObject, gfn: Gfn) -> Result<[u8; PAGE_SIZE], MmError> {
    let mut content = [0; PAGE_SIZE];
    object.read(gfn.base(), &mut content)?;
    Ok(content)
}

/// The page's hash, if it is in a frame and nobody has it locked.
fn resident_hash(object: &MemoryObject, gfn: Gfn) -> Result<Option<u64>, MmError> {
    // Unlocked again: it may have left by the time that it is read, and is then read back.
    let is_resident = object.try_lock_resident(gfn).is_some();
    is_resident.then(|| content(object, gfn).map(|content| xxh3_64(&content))).transpose()
}

/// What was seen of some pages after the log had taken them.
struct Taken {
    log: DirtyLog,
    object: Arc<MemoryObject>,
    ranges: Vec<Gfn>,
    seen: Vec<(Gfn, u64)>,
}

/// Whoever writes a page after the log has taken it is in what the log says next: each time, pages
/// are taken, read, and, when the next turn comes, read and taken again. One that reads differently
/// the second time was written in between.
///
/// `removes` says that parts of a window are removed behind everybody's back: then a page that has
/// become zero may have been removed by somebody who has not been told yet that it is done.
pub(super) fn dirty_log(objects: Arc<Objects>, removes: bool) -> Box<Source> {
    let taken: Mutex<Option<Taken>> = Mutex::default();
    Box::new(move |_, random| {
        let mut taken = lock(&taken);
        let done = taken.take().map_or(Ok(0), |taken| compare(&taken, removes))?;
        *taken = take_some(&objects, random)?;
        Ok(done)
    })
}

fn take_some(objects: &Objects, random: &mut StdRng) -> Result<Option<Taken>, Trouble> {
    let live = objects.live();
    if live.is_empty() {
        return Ok(None);
    }
    let object = live[random.random_range(0..live.len())].clone();
    let log = DirtyLog::start(object.clone())?;
    let words = (object.bytes() / PAGE_SIZE_U64 / WORD_PAGES).max(1);
    let ranges: Vec<Gfn> = (0..RANGES)
        .map(|number| {
            let word = random.random_range(0..words) * WORD_PAGES;
            let last = WORD_PAGES - RANGE_PAGES;
            // A word's last pages, its first ones, or any.
            let offset = [last, 0, random.random_range(0..=last)][number % 3];
            Gfn::new(word + offset)
        })
        .collect();
    let mut seen = Vec::new();
    for &first in &ranges {
        log.take(first, RANGE_PAGES)?;
    }
    for gfn in pages_of(&ranges) {
        if let Some(hash) = resident_hash(&object, gfn)? {
            seen.push((gfn, hash));
        }
    }
    Ok(Some(Taken { log, object, ranges, seen }))
}

fn pages_of(ranges: &[Gfn]) -> impl Iterator<Item = Gfn> {
    ranges.iter().flat_map(|first| (first.as_u64()..first.as_u64() + RANGE_PAGES).map(Gfn::new))
}

/// Returns the number of pages that were written and that the log has named.
fn compare(taken: &Taken, removes: bool) -> Result<usize, Trouble> {
    let Taken { log, object, ranges, seen } = taken;
    let mut written = Vec::new();
    for &(gfn, hash) in seen {
        let now = content(object, gfn)?;
        let may_be_removed = removes && now == [0; PAGE_SIZE];
        if xxh3_64(&now) != hash && !may_be_removed {
            written.push(gfn);
        }
    }
    let mut named = std::collections::HashSet::new();
    for &first in ranges {
        named.extend(log.take(first, RANGE_PAGES)?.iter().map(|gfn| gfn.as_u64()));
    }
    match written.iter().find(|gfn| !named.contains(&gfn.as_u64())) {
        None => Ok(written.len()),
        Some(gfn) => Err(Trouble::Wrong(format!(
            "I2: guest frame {gfn} of object {} was written, but the dirty log does not name it",
            object.number()
        ))),
    }
}

/// Pages that were shared with a snapshot, as they were then.
pub(super) struct Snapshot {
    object: Arc<MemoryObject>,
    seen: Vec<(Gfn, u64)>,
}

impl Snapshot {
    /// Reads a snapshot's pages for the first time.
    pub(super) fn of(object: Arc<MemoryObject>, pages: &[Gfn]) -> Result<Self, MmError> {
        let mut seen = Vec::new();
        for &gfn in pages {
            if let Some(hash) = resident_hash(&object, gfn)? {
                seen.push((gfn, hash));
            }
        }
        Ok(Self { object, seen })
    }

    /// Reads them again: nobody may have changed one meanwhile, wherever they were.
    pub(super) fn check(&self) -> Result<(), Trouble> {
        for &(gfn, hash) in &self.seen {
            if xxh3_64(&content(&self.object, gfn)?) != hash {
                let number = self.object.number();
                return Err(Trouble::Wrong(format!(
                    "I1: guest frame {gfn} of object {number}, a snapshot, has changed since it was taken"
                )));
            }
        }
        Ok(())
    }
}

// Without the notifier there is no dirty log, and nothing is shared.
#[cfg(all(test, feature = "export-notifier"))]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::host_mm::{HostMm, HostMmConfig};

    const PAGES: u64 = 256;

    fn objects() -> (Arc<HostMm>, Arc<MemoryObject>, Arc<Objects>) {
        let mm = HostMm::new(HostMmConfig::new(4 << 20)).unwrap();
        let object = mm.create_object(PAGES * PAGE_SIZE_U64).unwrap();
        let objects = Arc::new(Objects::default());
        objects.add(&object);
        (0..PAGES).for_each(|raw| object.write(Gfn::new(raw).base(), &[1]).unwrap());
        (mm, object, objects)
    }

    fn write_all(object: &MemoryObject, byte: u8) {
        (0..PAGES).for_each(|raw| object.write(Gfn::new(raw).base(), &[byte]).unwrap());
    }

    #[test]
    fn pages_that_are_written_between_two_looks_are_named_by_the_log() {
        let (_mm, object, objects) = objects();
        let source = dirty_log(objects, false);
        let mut random = StdRng::seed_from_u64(1);
        assert_eq!(source(&[], &mut random).ok(), Some(0), "nothing was taken before");
        write_all(&object, 2);
        let named = source(&[], &mut random).ok().unwrap();
        assert!(named >= RANGES * 8, "{named}");
        assert_eq!(source(&[], &mut random).ok(), Some(0), "nobody has written since");
    }

    /// Somebody else has asked the log meanwhile, so what it says is not all.
    #[test]
    fn a_log_that_misses_a_write_is_noticed() {
        let (_mm, object, objects) = objects();
        let source = dirty_log(objects, false);
        let mut random = StdRng::seed_from_u64(1);
        source(&[], &mut random).ok().unwrap();
        write_all(&object, 2);
        let thief = DirtyLog::start(object.clone()).unwrap();
        thief.take(Gfn::new(0), PAGES).unwrap();
        let Err(Trouble::Wrong(said)) = source(&[], &mut random) else { panic!("not noticed") };
        assert!(said.contains("was written, but the dirty log"), "{said}");
    }

    #[test]
    fn what_may_have_been_removed_is_no_finding() {
        let (_mm, object, objects) = objects();
        let source = dirty_log(objects, true);
        let mut random = StdRng::seed_from_u64(1);
        source(&[], &mut random).ok().unwrap();
        object.free_pages(Gfn::new(0), PAGES).unwrap();
        DirtyLog::start(object.clone()).unwrap().take(Gfn::new(0), PAGES).unwrap();
        assert_eq!(source(&[], &mut random).ok(), Some(0));
    }

    #[test]
    fn a_snapshot_that_changes_is_noticed() {
        let (_mm, object, _) = objects();
        let pages: Vec<Gfn> = (0..8).map(Gfn::new).collect();
        let copy = object.share_pages(pages.iter().copied()).unwrap();
        let snapshot = Snapshot::of(copy.clone(), &pages).unwrap();
        write_all(&object, 2);
        assert!(snapshot.check().is_ok(), "the writer got a copy");
        copy.write(Gfn::new(3).base(), &[9]).unwrap();
        let Err(Trouble::Wrong(said)) = snapshot.check() else { panic!("not noticed") };
        assert!(said.contains("guest frame 0x3 of object"), "{said}");
    }
}
