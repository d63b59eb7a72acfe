//! Counters of an IOTLB.

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct IotlbStats {
    /// Accesses, of at most a page each, that found their entry.
    pub hits: u64,
    /// Entries installed where none was.
    pub installs: u64,
    /// Entries that were there and got the right to write.
    pub upgrades: u64,
    /// Installations started over because an invalidation overlapped them.
    pub retries: u64,
    /// Entries that gave way to others.
    pub replaced: u64,
    /// Entries removed because the host took the frame.
    pub invalidated: u64,
    /// Entries that lost the right to write because the host cleaned the page.
    pub write_protected: u64,
    /// Flushes that slept until accesses in flight were over.
    pub waits: u64,
}

impl IotlbStats {
    /// Adds what happened in another IOTLB.
    pub fn add(&mut self, other: &Self) {
        let Self {
            hits,
            installs,
            upgrades,
            retries,
            replaced,
            invalidated,
            write_protected,
            waits,
        } = self;
        for (sum, more) in [
            (hits, other.hits),
            (installs, other.installs),
            (upgrades, other.upgrades),
            (retries, other.retries),
            (replaced, other.replaced),
            (invalidated, other.invalidated),
            (write_protected, other.write_protected),
            (waits, other.waits),
        ] {
            *sum = sum.saturating_add(more);
        }
    }

    /// Accesses that did not find an entry with the right that they wanted.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.installs + self.upgrades
    }
}
