//! How long whoever wants all vCPUs to stand still waits for them.
//!
//! Guarantee: [`LIMIT`] at most, in time that this process ran, and no longer than to the next look once
//! a [stop](signal::is_stop_asked) is asked for. A vCPU may itself wait, for a disk or a peer that does
//! not answer, and so may the DMA device; who waits for them looks after the whole run.

use std::time::Duration;

use crate::sync::{Condvar, MutexGuard};
use crate::sys::Patience;
use crate::sys::signal;

/// A vCPU that waits for nothing comes within microseconds, on a busy machine within milliseconds.
pub(super) const LIMIT: Duration = Duration::from_secs(5);

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::vmm) struct BriefWait(Patience);

impl BriefWait {
    /// From now on.
    pub(in crate::vmm) fn begin() -> Self {
        Self(Patience::new(LIMIT))
    }

    /// One with a limit of its own.
    #[cfg(test)]
    pub(in crate::vmm) fn of(limit: Duration) -> Self {
        Self(Patience::new(limit))
    }

    /// Waits for a change, or a moment; lets go of the mutex, and returns `None`, when it has waited
    /// long enough.
    pub(in crate::vmm) fn wait<'a, T>(
        &mut self,
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
    ) -> Option<MutexGuard<'a, T>> {
        if signal::is_stop_asked() {
            return None;
        }
        let waited = changed.wait_timeout(guard, self.0.slice()?);
        Some(waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0)
    }
}
