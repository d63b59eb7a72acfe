//! Invariant I3: the reverse map lists exactly the mappings that a client has.

use crate::addr::Pfn;
use crate::frame_table::{Frame, FrameTable};
use crate::rmap::{ClientId, Retain, RmapEntry};

/// Most differences that are described.
const MOST: usize = 16;

/// What is found when the reverse map is compared with a client's mappings, one by one and both ways.
/// The client keeps its lock while it shows a mapping, or asks for a batch of entries, and may let it
/// go in between.
#[derive(Debug)]
pub struct Differences {
    client: ClientId,
    /// What the client calls a mapping.
    what: &'static str,
    sentences: Vec<String>,
}

impl Differences {
    /// None so far.
    #[must_use]
    pub const fn of(client: ClientId, what: &'static str) -> Self {
        Self { client, what, sentences: Vec::new() }
    }

    /// Whether more would not be told.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.sentences.len() >= MOST
    }

    /// One sentence for each difference, up to a bound.
    #[must_use]
    pub fn into_sentences(self) -> Vec<String> {
        self.sentences
    }

    fn tell(&mut self, sentence: impl FnOnce() -> String) {
        if !self.is_full() {
            self.sentences.push(sentence());
        }
    }

    /// Looks whether the reverse map lists a mapping of the client's.
    pub fn check_mapping(&mut self, table: &FrameTable, pfn: Pfn, location: u64) {
        if !table.rmap_contains(pfn, RmapEntry::new(self.client, location)) {
            let what = self.what;
            self.tell(|| {
                format!(
                    "I3: frame {pfn} has {what} {location:#x}, but its reverse map does not list it"
                )
            });
        }
    }

    /// Looks whether a mapping that can write is of a frame that may be written. The client holds its
    /// MMU lock, without which no page becomes shared or lent that it maps.
    pub fn check_writer(&mut self, table: &FrameTable, pfn: Pfn, location: u64) {
        if table.get(pfn).is_some_and(Frame::is_read_only) {
            let what = self.what;
            self.tell(|| {
                format!("I3: frame {pfn} is shared or lent, but {what} {location:x} may write it")
            });
        }
    }

    /// Looks whether `is_mapped` of each of the client's entries in a frame's map, a batch of them
    /// from `from` on. Returns where to go on.
    pub fn check_entries(
        &mut self,
        table: &FrameTable,
        pfn: Pfn,
        from: u64,
        is_mapped: impl Fn(u64) -> bool,
    ) -> Option<u64> {
        table.rmap_visit_batch(pfn, self.client, from, |location| {
            if !is_mapped(location) {
                let what = self.what;
                self.tell(|| {
                    format!(
                        "I3: frame {pfn} has no {what} {location:#x}, but its reverse map lists it"
                    )
                });
            }
            Retain::Keep
        })
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn an_entry_too_many_and_one_too_few_are_told() {
        let table = FrameTable::new(2);
        let [mine, other] = [1, 2].map(|raw| ClientId::new(raw).unwrap());
        table.rmap_add(Pfn::new(0), RmapEntry::new(mine, 5));
        table.rmap_add(Pfn::new(1), RmapEntry::new(other, 6));
        let differences = |mappings: &[(u64, Pfn)]| {
            let mut found = Differences::of(mine, "mapping");
            for &(location, pfn) in mappings {
                found.check_mapping(&table, pfn, location);
            }
            for pfn in [0, 1].map(Pfn::new) {
                let is_mapped = |location| mappings.contains(&(location, pfn));
                assert_eq!(found.check_entries(&table, pfn, 0, is_mapped), None);
            }
            found.into_sentences()
        };
        assert!(differences(&[(5, Pfn::new(0))]).is_empty());
        let found = differences(&[]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("frame 0x0 has no mapping 0x5"), "{}", found[0]);
        let found = differences(&[(5, Pfn::new(0)), (6, Pfn::new(1))]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("frame 0x1 has mapping 0x6"), "{}", found[0]);
    }
}
