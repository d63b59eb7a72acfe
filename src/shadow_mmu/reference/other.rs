//! A second memory object beside the guest's, which no processor maps: a clone of the guest's memory
//! or one of its own, and what it must hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::machine::RAM_BYTES;
use super::model::{Model, PageWords};
use crate::addr::{Gfn, Gpa, PAGE_SIZE, PAGE_SIZE_U64};
use crate::host_mm::{HostMm, MemoryObject};

pub(super) struct Other {
    pub(super) object: Arc<MemoryObject>,
    /// Words that are not 0.
    words: BTreeMap<u64, u64>,
}

impl Other {
    /// Nothing but zeros.
    pub(super) fn new(mm: &Arc<HostMm>) -> Self {
        Self { object: mm.create_object(RAM_BYTES).unwrap(), words: BTreeMap::new() }
    }

    /// A clone of the guest's memory.
    pub(super) fn clone_of(object: &MemoryObject, model: &Model) -> Self {
        let words = model.words().filter(|&(gpa, value)| gpa < RAM_BYTES && value != 0).collect();
        Self { object: object.copy_on_write_clone().unwrap(), words }
    }

    pub(super) fn write(&mut self, gpa: u64, value: u64) {
        self.object.write(Gpa::new(gpa), &value.to_le_bytes()).unwrap();
        self.words.insert(gpa, value);
    }

    /// What a page must hold.
    pub(super) fn page(&self, gfn: Gfn) -> PageWords {
        let first = gfn.base().as_u64();
        let words = self.words.range(first..first + PAGE_SIZE_U64);
        words.map(|(&gpa, &value)| (gpa - first, value)).filter(|&(_, value)| value != 0).collect()
    }

    /// Notes that a page has other content now.
    pub(super) fn replace_page(&mut self, gfn: Gfn, content: &[(u64, u64)]) {
        let first = gfn.base().as_u64();
        let old: Vec<u64> =
            self.words.range(first..first + PAGE_SIZE_U64).map(|(&at, _)| at).collect();
        for gpa in old {
            self.words.remove(&gpa);
        }
        self.words.extend(content.iter().map(|&(offset, value)| (first + offset, value)));
    }

    /// Compares all that was ever written, by page.
    pub(super) fn compare(&self) {
        let mut at = None;
        for &gpa in self.words.keys() {
            let gfn = Gpa::new(gpa).gfn();
            if at.replace(gfn) != Some(gfn) {
                self.compare_page(gfn);
            }
        }
    }

    /// Compares a page, all of it.
    pub(super) fn compare_page(&self, gfn: Gfn) {
        let found = words_of(&self.object, gfn);
        assert_eq!(found, self.page(gfn), "guest frame {gfn} of the other object");
    }
}

/// What a page of a memory object holds.
pub(super) fn words_of(object: &MemoryObject, gfn: Gfn) -> PageWords {
    let mut page = [0; PAGE_SIZE];
    object.read(gfn.base(), &mut page).unwrap();
    let mut words = Vec::new();
    let (lines, _) = page.as_chunks::<64>();
    for (number, line) in lines.iter().enumerate() {
        // Most are zero, and comparing them word by word takes longer than all else.
        if line.iter().fold(0, |seen, byte| seen | byte) == 0 {
            continue;
        }
        let (line, _) = line.as_chunks::<8>();
        for (index, word) in line.iter().enumerate() {
            let offset = (number * 64 + index * 8) as u64;
            words.push((offset, u64::from_le_bytes(*word)));
        }
    }
    words.retain(|&(_, value)| value != 0);
    words
}
