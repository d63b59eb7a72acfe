//! Counters of direct paging.

crate::counters::counters! {
    /// What has happened so far, in faults or pages.
    pub struct DirectStats {
        /// Faults read.
        faults,
        /// Faults that had to wait for something and went to a worker.
        handed_over,
        /// Pages mapped for a fault on them.
        installs,
        /// Pages mapped next to one.
        fault_around,
        /// Of these, pages brought in ahead of faults that come in sequence, or meant to be.
        read_ahead,
        /// Pages that were mapped and became writable.
        upgrades,
        /// Faults on pages that turned out to be mapped.
        already_mapped,
        /// Faults started over because an invalidation overlapped them.
        retries,
        /// Faults set aside until an event was read.
        parked,
        /// Pages taken out of the reverse map because the host took them.
        invalidated,
        /// Pages write-protected.
        write_protected,
        /// Ranges zapped to see which of their pages are used.
        aged_zaps,
        /// Pages that somebody removed from the window.
        removed,
    }
    live pub(super) struct Counters;
}
