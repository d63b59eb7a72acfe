//! A frame that loses its page is exported no more: invariant I4 at that moment.

use crate::frames::backing::Backing;
use crate::revoke::Revoker;
use crate::violations::{MmViolation, ViolationKind};
use gnomon_export_rmap::LockedPage;
use gnomon_export_rmap::sync::yield_now;

/// Calls into the clients after which an rmap entry no longer counts as one that a fault is about
/// to take back: each vCPU can have at most one such fault.
const SETTLE_ROUNDS: u32 = 64;

impl<B: Backing> Revoker<B> {
    /// Invariant I4 at the moment when a frame loses its page.
    pub(crate) fn check_not_exported(&self, page: &LockedPage<'_>) {
        // A fault that will find that it must retry may have added its entry for a moment, with
        // its MMU lock held. A call into the client waits for that lock, so it sees the end of it.
        for _ in 0..SETTLE_ROUNDS {
            if !page.frame().is_exported() {
                return;
            }
            self.notifiers.age_page(page);
            if cfg!(not(feature = "export-notifier")) {
                // No call to wait in.
                yield_now();
            }
        }
        if page.frame().is_exported() {
            self.violations.report(MmViolation {
                kind: ViolationKind::StillExported,
                pfn: page.pfn(),
                owner: page.owner(),
            });
        }
    }
}
