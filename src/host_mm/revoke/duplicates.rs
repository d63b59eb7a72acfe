//! The frames whose page may stand in swap as well, for when swap is full: who needs a slot finds one
//! without a look at the whole frame table, which each page to be written would need.
//!
//! Guarantees:
//!
//! - each frame with a slot is known, or is in the part of the frame table that was not looked through
//!   yet, or somebody has just taken it to look at;
//! - the frame table is looked through once for as many notes as there are frames, no further than is
//!   needed, and with no lock held: who notes a slot does not wait for who looks;
//! - 8 bytes a frame at most, and none as long as swap was not full.

use std::collections::VecDeque;
use std::ops::Range;

use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::sync::{Mutex, lock, yield_now};

/// Frames that are looked at between two looks at what is known.
const CHUNK_FRAMES: u32 = 1024;
/// Entries that memory is taken for at first.
const FIRST_ENTRIES: usize = 64;

/// See the module's documentation.
pub(crate) struct Duplicates {
    known: Mutex<Known>,
    frames: u32,
}

#[derive(Default)]
struct Known {
    frames: VecDeque<Pfn>,
    /// Frames below this were looked at, or are at the moment. 0 as long as nobody has asked.
    looked_at: u32,
    /// Threads that are looking at a part of the table.
    looking: u32,
}

impl Known {
    /// Notes a frame. Of more than twice as many as there are, some stand here more than once: then the
    /// next who asks begins anew.
    fn push(&mut self, pfn: Pfn, frames: u32) {
        let most = 2 * frames as usize;
        if self.frames.len() >= most {
            let looking = self.looking;
            *self = Self { looking, ..Self::default() };
            return;
        }
        let entries = self.frames.len();
        if entries == self.frames.capacity() {
            // As a vector grows by itself, but for the bound.
            self.frames.reserve_exact(entries.max(FIRST_ENTRIES).min(most - entries));
        }
        self.frames.push_back(pfn);
    }
}

impl Duplicates {
    /// Of a frame table with so many frames.
    pub(crate) fn of_frames(frames: u32) -> Self {
        Self { known: Mutex::default(), frames }
    }

    /// Notes that the page in a frame has been given a slot, or has kept the one that it came from.
    pub(crate) fn note(&self, pfn: Pfn) {
        let mut known = lock(&self.known);
        // The others are found when their turn comes.
        if pfn.as_u32() < known.looked_at {
            known.push(pfn, self.frames);
        }
    }

    /// A frame to look at; `None` if there is none but `busy` that were [put back](Self::put_back).
    /// `has_slot` says whether the page in a frame has a slot.
    pub(crate) fn next(&self, busy: usize, has_slot: impl Fn(Pfn) -> bool) -> Option<Pfn> {
        loop {
            let mut known = lock(&self.known);
            if known.frames.len() > busy {
                return known.frames.pop_front();
            }
            if known.looked_at < self.frames {
                let first = known.looked_at;
                known.looked_at = first.saturating_add(CHUNK_FRAMES).min(self.frames);
                known.looking += 1;
                let part = first..known.looked_at;
                drop(known);
                self.look(part, &has_slot);
            } else if known.looking > 0 {
                // What they find is ours, too, and they wait for nobody.
                drop(known);
                yield_now();
            } else {
                return None;
            }
        }
    }

    fn look(&self, part: Range<u32>, has_slot: impl Fn(Pfn) -> bool) {
        let found: Vec<Pfn> = part.map(Pfn::new).filter(|&pfn| has_slot(pfn)).collect();
        let mut known = lock(&self.known);
        found.into_iter().for_each(|pfn| known.push(pfn, self.frames));
        known.looking -= 1;
    }

    /// Puts back one that could not be looked at.
    pub(crate) fn put_back(&self, pfn: Pfn) {
        lock(&self.known).push(pfn, self.frames);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const FRAMES: u32 = 10 * CHUNK_FRAMES;

    /// With swap full, each page to be written asks: the frame table is looked through once for as
    /// many notes as there are frames, not for each.
    #[test]
    fn the_frames_with_a_slot_are_known_without_a_look_at_the_table() {
        const AT_ONCE: usize = 16;
        let looked_at = Cell::new(0);
        let has_slot = |_| {
            looked_at.set(looked_at.get() + 1);
            true
        };
        let duplicates = Duplicates::of_frames(FRAMES);
        let rounds = 20 * FRAMES;
        let mut found = 0;
        for number in 0..rounds {
            duplicates.note(Pfn::new(number % FRAMES));
            if number % 64 == 0 {
                let some = (0..AT_ONCE).map_while(|_| duplicates.next(0, has_slot));
                found += u32::try_from(some.count()).unwrap();
            }
        }
        assert!(looked_at.get() <= FRAMES + rounds, "{}", looked_at.get());
        assert!(found >= rounds / 64, "{found}");
        duplicates.put_back(Pfn::new(7));
        let rest = std::iter::from_fn(|| duplicates.next(0, |_| false));
        assert!(rest.into_iter().any(|pfn| pfn == Pfn::new(7)));
    }

    #[test]
    fn the_table_is_looked_at_no_further_than_is_needed() {
        let looked_at = Cell::new(0);
        let duplicates = Duplicates::of_frames(FRAMES);
        let found = duplicates.next(0, |pfn| {
            looked_at.set(looked_at.get() + 1);
            pfn.as_u32() >= CHUNK_FRAMES
        });
        assert_eq!((found, looked_at.get()), (Some(Pfn::new(CHUNK_FRAMES)), 2 * CHUNK_FRAMES));
    }

    /// Nor is anybody held up by it: what is given a slot meanwhile is noted, wherever it is.
    #[test]
    fn slots_are_noted_while_somebody_looks_at_the_table() {
        let duplicates = Duplicates::of_frames(FRAMES);
        let first = duplicates.next(0, |pfn| {
            duplicates.note(pfn);
            duplicates.note(Pfn::new(FRAMES - 1));
            false
        });
        // Those of the part that was looked at; the other is found by a look of its own.
        assert_eq!(first, Some(Pfn::new(0)));
        let rest = std::iter::from_fn(|| duplicates.next(0, |pfn| pfn == Pfn::new(FRAMES - 1)));
        assert_eq!(rest.last(), Some(Pfn::new(FRAMES - 1)));
    }

    /// As long as a thread has a part of the table in hand, there may be more.
    #[test]
    fn what_somebody_else_is_about_to_find_is_waited_for() {
        let duplicates = Duplicates::of_frames(2);
        let found = std::thread::scope(|scope| {
            let late = std::cell::OnceCell::new();
            let first = duplicates.next(0, |_| {
                late.get_or_init(|| {
                    scope.spawn(|| duplicates.next(0, |_| panic!("nothing is left to look at")))
                });
                true
            });
            [first, late.into_inner().unwrap().join().unwrap()]
        });
        assert!(found.contains(&Some(Pfn::new(0))) && found.contains(&Some(Pfn::new(1))));
    }

    #[test]
    fn busy_ones_are_tried_once_and_memory_is_bounded() {
        let duplicates = Duplicates::of_frames(8);
        let mut busy = 0;
        while let Some(pfn) = duplicates.next(busy, |_| true) {
            duplicates.put_back(pfn);
            busy += 1;
        }
        assert_eq!(busy, 8);
        for number in 0..1000 {
            duplicates.note(Pfn::new(number % 8));
            let known = lock(&duplicates.known);
            assert!(known.frames.len() <= 16 && known.frames.capacity() <= 16);
        }
    }
}
