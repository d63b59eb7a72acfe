//! What happened with all peers of a server.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::peer::protocol::Closing;
use crate::sync::{Mutex, lock};

/// Longest acknowledgement that is told from a longer one, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;

crate::counters::counters! {
    /// What happened with all peers, since the start.
    pub struct PeerStats {
        /// Peers that were served.
        served,
        /// Connections that were refused.
        refused,
        /// Peers that were cut off, or vanished.
        cut_off,
        /// Copies of pages lent.
        lent,
        /// Copies that peers gave up of their own accord.
        unmapped,
        /// Copies invalidated.
        invalidated,
        /// Invalidations sent; each names all copies that one flush was for.
        sent,
        /// Invalidations acknowledged.
        acknowledged,
    }
    live pub(super) struct Counts;
}

/// The live side.
#[derive(Default)]
pub(super) struct Tally {
    counts: Counts,
    /// From an invalidation to the end of its slots, in nanoseconds.
    latency: Mutex<Option<Histogram<u64>>>,
}

impl Tally {
    pub(super) fn served(&self) {
        self.counts.served.add(1);
    }

    pub(super) fn refused(&self) {
        self.counts.refused.add(1);
    }

    pub(super) fn lent(&self) {
        self.counts.lent.add(1);
    }

    pub(super) fn unmapped(&self) {
        self.counts.unmapped.add(1);
    }

    pub(super) fn invalidated(&self, copies: u64) {
        self.counts.invalidated.add(copies);
    }

    pub(super) fn announced(&self) {
        self.counts.sent.add(1);
    }

    pub(super) fn acknowledged(&self, after: Duration) {
        self.counts.acknowledged.add(1);
        let mut latency = lock(&self.latency);
        if latency.is_none() {
            // Bounds that cannot be refused.
            *latency = Histogram::new_with_bounds(1, LONGEST_NS, 3).ok();
        }
        if let Some(histogram) = &mut *latency {
            histogram.saturating_record(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX).max(1));
        }
    }

    pub(super) fn closed(&self, why: Closing) {
        if !matches!(why, Closing::EndOfRun | Closing::Left) {
            self.counts.cut_off.add(1);
        }
    }

    pub(super) fn stats(&self) -> PeerStats {
        self.counts.snapshot()
    }

    pub(super) fn latency(&self) -> Option<Histogram<u64>> {
        lock(&self.latency).clone()
    }
}
