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
