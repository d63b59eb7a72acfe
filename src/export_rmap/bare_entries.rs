//! Entries of the reverse map by themselves, without the look at the invalidation count that belongs to
//! them: what a client must not do, and the tests of what is above do on purpose.

use crate::addr::Pfn;
use crate::{FrameTable, RmapEntry};

/// Adds an entry; whether it was not there.
pub fn add_entry(table: &FrameTable, pfn: Pfn, entry: RmapEntry) -> bool {
    table.rmap_add(pfn, entry)
}

/// Removes an entry; whether it was there.
pub fn remove_entry(table: &FrameTable, pfn: Pfn, entry: RmapEntry) -> bool {
    table.rmap_remove(pfn, entry)
}
