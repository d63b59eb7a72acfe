//! What clients have looked at before they map a page, and who tests them.

use crate::addr::{Gfn, Pfn};
use crate::host_mm::memory::HostMm;
use crate::host_mm::memory::object::MemoryObject;

impl HostMm {
    /// A client is about to map a page to a frame, or to access it there. The client must hold what
    /// keeps an invalidation from ending: its lock, with the entry in the reverse map and the
    /// sequence looked at; or an access in flight. Then the page stays where it is meanwhile.
    pub fn check_mapping(&self, object: &MemoryObject, gfn: Gfn, pfn: Pfn, writable: bool) {
        self.pager.check_mapping(&object.pages, gfn, pfn, writable);
    }

    /// A client is about to map a page by what a guest's tables said, which the guest must not have
    /// flushed since: `is_current`.
    pub fn check_translation(&self, object: &MemoryObject, gfn: Gfn, pfn: Pfn, is_current: bool) {
        self.pager.check_translation(&object.pages, gfn, pfn, is_current);
    }

    /// A client has flushed mappings of its own accord, and has not let go of them yet: the frame must
    /// have been exported all the while.
    pub fn check_exported(&self, pfn: Pfn) {
        self.pager.check_exported(pfn);
    }

    /// What the statistics say of shared pages against what became of them: a sentence for each
    /// difference. Nothing may happen meanwhile.
    #[must_use]
    pub fn miscounted(&self) -> Vec<String> {
        self.pager.miscounted()
    }

    /// One pass of the clock's hand over all frames: those whose pages are to go, which stay all the same.
    #[cfg(all(test, feature = "export-notifier"))]
    pub(in crate::host_mm) fn judge_all(&self) -> Vec<Pfn> {
        self.pager.judge_all()
    }
}
