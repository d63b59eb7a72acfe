//! What a VM counts, live and at its end.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::direct_mmu::DirectStats;
use crate::shadow_mmu::{Access, ShadowStats};

crate::counters::counters! {
    /// What the VMM counted for one vCPU, or for all of a VM.
    pub struct VcpuCounts {
        /// Returns from `KVM_RUN`.
        exits,
        /// Shadow faults on reads that were fixed.
        read_faults,
        /// Shadow faults on writes that were fixed.
        write_faults,
        /// Shadow faults on instruction fetches that were fixed.
        execute_faults,
        /// Exceptions delivered to the guest, its own page faults among them.
        injected,
        /// Page faults among [`Self::injected`].
        guest_page_faults,
        /// Privileged instructions emulated.
        emulated,
        /// Accesses to ports that came as direct exits, hypercalls among them.
        port_exits,
        /// Hypercalls.
        hypercalls,
        /// Times this vCPU had all others paused to recycle the shadow pages.
        recycles,
    }
    live pub(in crate::vmm) struct LiveCounts;
}

impl VcpuCounts {
    /// Shadow faults of all kinds that were fixed.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.read_faults.saturating_add(self.write_faults).saturating_add(self.execute_faults)
    }
}

/// What was done to map a guest's memory: of the kind that it is, the others are zero.
#[derive(Clone, Copy, Debug, Default)]
pub struct PagingStats {
    /// By shadow page tables.
    pub shadow: ShadowStats,
    /// By a window.
    pub direct: DirectStats,
}

/// Longest latency that is told apart, in nanoseconds: one minute.
const MAX_LATENCY_NS: u64 = 60_000_000_000;
/// Significant decimal digits of a latency.
const LATENCY_DIGITS: u8 = 3;

/// How long the host side of a shadow fault took: from the exit's dispatch to the decision to
/// resume, in nanoseconds. The world switches around it are not in it.
#[derive(Clone, Debug, Default)]
pub struct FaultLatency {
    /// Reads.
    pub read: Latencies,
    /// Writes.
    pub write: Latencies,
    /// Instruction fetches.
    pub execute: Latencies,
}

impl FaultLatency {
    pub(in crate::vmm) fn record(&mut self, access: Access, latency: Duration) {
        match access {
            Access::Read => self.read.record(latency),
            Access::Write => self.write.record(latency),
            Access::Execute => self.execute.record(latency),
        }
    }

    /// Adds all that `other` recorded.
    pub fn merge(&mut self, other: &Self) {
        self.read.merge(&other.read);
        self.write.merge(&other.write);
        self.execute.merge(&other.execute);
    }
}

/// A histogram of nanoseconds that takes no memory before its first value.
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    histogram: Option<Histogram<u64>>,
}

impl Latencies {
    /// The histogram, or `None` when nothing was recorded.
    #[must_use]
    pub fn histogram(&self) -> Option<&Histogram<u64>> {
        self.histogram.as_ref()
    }

    fn get_or_make(&mut self) -> Option<&mut Histogram<u64>> {
        if self.histogram.is_none() {
            // The bounds are constants that the crate accepts; were they not, latencies would go
            // unrecorded.
            self.histogram = Histogram::new_with_bounds(1, MAX_LATENCY_NS, LATENCY_DIGITS).ok();
        }
        self.histogram.as_mut()
    }

    fn record(&mut self, latency: Duration) {
        if let Some(histogram) = self.get_or_make() {
            histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        }
    }

    fn merge(&mut self, other: &Self) {
        if let Some(from) = &other.histogram
            && let Some(into) = self.get_or_make()
        {
            // Equal bounds: cannot be refused.
            let _ = into.add(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_merge_by_kind() {
        let mut one = FaultLatency::default();
        one.record(Access::Read, Duration::from_micros(10));
        one.record(Access::Write, Duration::from_secs(3600));
        let mut two = FaultLatency::default();
        two.record(Access::Read, Duration::from_micros(30));
        two.merge(&one);
        assert_eq!(two.read.histogram().unwrap().len(), 2);
        assert!(two.write.histogram().unwrap().max() >= 59_000_000_000, "saturates");
        assert!(two.execute.histogram().is_none());
    }

    #[test]
    fn counts_add_up() {
        let live = LiveCounts::default();
        live.read_faults.add(1);
        live.execute_faults.add(1);
        let mut total = live.snapshot();
        total.add(&live.snapshot());
        assert_eq!(total.faults(), 4);
        assert_eq!(total.exits, 0);
    }
}
