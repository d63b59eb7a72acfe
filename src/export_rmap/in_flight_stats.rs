//! Counters of an IOTLB.

crate::counters::counters! {
    /// What has happened so far.
    pub struct IotlbStats {
        /// Accesses, of at most a page each, that found their entry.
        hits,
        /// Entries installed where none was.
        installs,
        /// Entries that were there and got the right to write.
        upgrades,
        /// Installations started over because an invalidation overlapped them.
        retries,
        /// Entries that gave way to others.
        replaced,
        /// Entries removed because the host took the frame.
        invalidated,
        /// Entries that lost the right to write because the host cleaned the page.
        write_protected,
        /// Flushes that slept until accesses in flight were over.
        waits,
    }
}

impl IotlbStats {
    /// Accesses that did not find an entry with the right that they wanted.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.installs + self.upgrades
    }
}
