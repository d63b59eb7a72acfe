//! What happened with all peers of a server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::peer::protocol::Closing;
use crate::sync::{Mutex, lock};

/// Longest acknowledgement that is told from a longer one, in nanoseconds.
const LONGEST_NS: u64 = 60_000_000_000;

/// What happened with all peers, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PeerStats {
    /// Peers that were served.
    pub served: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// Peers that were cut off, or vanished.
    pub cut_off: u64,
    /// Copies of pages lent.
    pub lent: u64,
    /// Copies that peers gave up of their own accord.
    pub unmapped: u64,
    /// Copies invalidated.
    pub invalidated: u64,
    /// Invalidations sent; each names all copies that one flush was for.
    pub sent: u64,
    /// Invalidations acknowledged.
    pub acknowledged: u64,
}

#[derive(Default)]
struct Counts {
    served: AtomicU64,
    refused: AtomicU64,
    cut_off: AtomicU64,
    lent: AtomicU64,
    unmapped: AtomicU64,
    invalidated: AtomicU64,
    sent: AtomicU64,
    acknowledged: AtomicU64,
}

/// The live counters; relaxed, each of them right by itself.
#[derive(Default)]
pub(super) struct Tally {
    counts: Counts,
    /// From an invalidation to the end of its slots, in nanoseconds.
    latency: Mutex<Option<Histogram<u64>>>,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Tally {
    pub(super) fn served(&self) {
        add(&self.counts.served, 1);
    }

    pub(super) fn refused(&self) {
        add(&self.counts.refused, 1);
    }

    pub(super) fn lent(&self) {
        add(&self.counts.lent, 1);
    }

    pub(super) fn unmapped(&self) {
        add(&self.counts.unmapped, 1);
    }

    pub(super) fn invalidated(&self, copies: u64) {
        add(&self.counts.invalidated, copies);
    }

    pub(super) fn announced(&self) {
        add(&self.counts.sent, 1);
    }

    pub(super) fn acknowledged(&self, after: Duration) {
        add(&self.counts.acknowledged, 1);
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
            add(&self.counts.cut_off, 1);
        }
    }

    pub(super) fn stats(&self) -> PeerStats {
        let Counts { served, refused, cut_off, lent, unmapped, invalidated, sent, acknowledged } =
            &self.counts;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PeerStats {
            served: load(served),
            refused: load(refused),
            cut_off: load(cut_off),
            lent: load(lent),
            unmapped: load(unmapped),
            invalidated: load(invalidated),
            sent: load(sent),
            acknowledged: load(acknowledged),
        }
    }

    pub(super) fn latency(&self) -> Option<Histogram<u64>> {
        lock(&self.latency).clone()
    }
}
