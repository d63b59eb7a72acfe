//! What a guest that checks itself tells, and who is told.
//!
//! Guarantee: a guest that reports without end costs a bounded memory; every report is counted.

use crate::addr::Gfn;
use crate::sync::{Mutex, lock};

/// Most violation reports that are kept; the rest are only counted.
pub const MAX_KEPT_REPORTS: usize = 64;

/// A violation of the guest's oracle, as the guest reported it
/// ([`abi::HC_VIOLATION`](crate::abi::HC_VIOLATION)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViolationReport {
    /// The vCPU that found it.
    pub vcpu: usize,
    /// One of [`abi::Violation`](crate::abi::Violation)'s values, if the guest is honest.
    pub kind: u64,
    /// Guest virtual address.
    pub gva: u64,
    /// What the guest expected.
    pub expected: u64,
    /// What it found.
    pub found: u64,
    /// Number of the page.
    pub page: u64,
}

/// Told of what the guest says, on its vCPU's thread: be quick.
pub trait VmObserver: Send + Sync {
    /// [`abi::HC_PHASE`](crate::abi::HC_PHASE) with one of the `PHASE_` values, and the guest frames,
    /// `count` from `first`, that the guest's oracle watches.
    fn phase(&self, _phase: u64, _first: Gfn, _count: u64) {}
    /// [`abi::HC_WATCH`](crate::abi::HC_WATCH): `count` guest frames from `first`.
    fn watch(&self, _first: Gfn, _count: u64) {}
    /// [`abi::HC_VIOLATION`](crate::abi::HC_VIOLATION).
    fn violation(&self, _report: &ViolationReport) {}
}

/// The violations reported so far: the first ones in full, the number of all.
#[derive(Default)]
pub(in crate::vmm) struct Reports {
    state: Mutex<(Vec<ViolationReport>, u64)>,
}

impl Reports {
    pub(in crate::vmm) fn add(&self, report: ViolationReport) {
        let mut state = lock(&self.state);
        state.1 = state.1.saturating_add(1);
        if state.0.len() < MAX_KEPT_REPORTS {
            state.0.push(report);
        }
    }

    pub(in crate::vmm) fn kept(&self) -> Vec<ViolationReport> {
        lock(&self.state).0.clone()
    }

    pub(in crate::vmm) fn count(&self) -> u64 {
        lock(&self.state).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_bounded_and_counted() {
        let reports = Reports::default();
        let report = ViolationReport { vcpu: 0, kind: 1, gva: 2, expected: 3, found: 4, page: 5 };
        for _ in 0..1000 {
            reports.add(report);
        }
        assert_eq!(reports.kept().len(), MAX_KEPT_REPORTS);
        assert_eq!(reports.count(), 1000);
    }
}
