//! What this peer knows of the test guest's pages, beside the protocol: which of them its oracle watches, as
//! a note says, and what must be in those.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::abi::verify::{Page, Verifier, Words, Wrong};
use crate::addr::Gfn;
use crate::peer::protocol::Note;

/// Says of an object that the test guest's oracle watches `count` of its pages from `first`.
#[must_use]
pub fn watched(first: Gfn, count: u64) -> Note {
    [first.as_u64(), count]
}

/// The pages that are watched, of all objects.
#[derive(Debug, Default)]
pub(super) struct TestGuest {
    notes: BTreeMap<u32, Note>,
    verifier: Verifier,
}

impl TestGuest {
    /// The server has said this of an object.
    pub(super) fn noted(&mut self, object: u32, note: Note) {
        self.notes.insert(object, note);
    }

    /// The pages of an object with so many pages that are worth asking for: none as long as that is not known.
    pub(super) fn wanted(&self, object: u32, pages: u64) -> Range<u64> {
        let [first, count] = self.notes.get(&object).copied().unwrap_or_default();
        first.min(pages)..first.saturating_add(count).min(pages)
    }

    /// What a page that was lent is, if it is one that is watched.
    pub(super) fn look(
        &mut self,
        object: u32,
        gfn: Gfn,
        words: &Words,
    ) -> Result<Option<Page>, Wrong> {
        let is_watched = self.wanted(object, u64::MAX).contains(&gfn.as_u64());
        is_watched.then(|| self.verifier.check(gfn.as_u64(), words)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_format::WORDS;

    #[test]
    fn pages_are_wanted_as_far_as_the_note_and_the_object_go() {
        let mut guest = TestGuest::default();
        assert!(guest.wanted(0, 100).is_empty(), "nothing is known of it");
        guest.noted(0, watched(Gfn::new(10), 20));
        assert_eq!(guest.wanted(0, 100), 10..30);
        assert_eq!(guest.wanted(0, 15), 10..15);
        assert!(guest.wanted(0, 5).is_empty() && guest.wanted(1, 100).is_empty());
        guest.noted(0, [u64::MAX, u64::MAX]);
        assert!(guest.wanted(0, 100).is_empty());
    }

    #[test]
    fn only_what_is_watched_is_looked_at() {
        let mut guest = TestGuest::default();
        guest.noted(0, watched(Gfn::new(10), 1));
        let mut words = [7; WORDS];
        words[0] = 11;
        let found = Wrong::Number { found: 11 };
        assert_eq!(guest.look(0, Gfn::new(10), &words), Err(found));
        assert_eq!(guest.look(0, Gfn::new(11), &words), Ok(None));
        assert_eq!(guest.look(1, Gfn::new(10), &words), Ok(None));
        assert_eq!(guest.look(0, Gfn::new(10), &[0; WORDS]), Ok(Some(Page::Zero)));
    }
}
