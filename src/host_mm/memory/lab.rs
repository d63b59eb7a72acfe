//! Export clients of a host memory, and what is broken on purpose, as those above ask for it.

use std::sync::Arc;
use std::time::Duration;

use crate::addr::Gfn;
use crate::export_rmap::{ExportNotifier, Membership, Reservation};
use crate::host_mm::error::MmError;
use crate::host_mm::inject::{InjectionCount, PauseCount, PausePoint, PeerFault, Sabotage};
use crate::host_mm::memory::HostMm;

impl HostMm {
    /// A point of the protocol: see [`PausePoint`].
    #[inline]
    pub fn pause(&self, point: PausePoint) {
        self.pager.lab.pause(point);
    }

    /// As [`pause`](Self::pause), and a pause each time if `rule` is broken for this page, or
    /// [`Sabotage::Dawdle`] is on: what a broken rule lets happen shows the sooner.
    pub fn pause_for(&self, point: PausePoint, rule: Sabotage, gfn: Gfn) {
        self.pager.lab.pause_for(point, rule, gfn);
    }

    /// How often each point was passed and paused at so far; nothing without an item `pause`.
    #[must_use]
    pub fn pauses(&self) -> Vec<PauseCount> {
        self.pager.lab.pauses()
    }

    /// Limits the sabotage to `count` guest frames from `first`, of every memory object: to the
    /// pages that an oracle watches, so that what it reports is a page, not a guest kernel that
    /// fell over itself. Without a limit every page is fair game. (`SwapCorrupt` knows no pages.)
    pub fn limit_sabotage(&self, first: Gfn, count: u64) {
        self.pager.lab.limit_sabotage(first, count);
    }

    /// Whether this rule is to be broken for this page.
    #[must_use]
    pub fn is_sabotaged(&self, rule: Sabotage, gfn: Gfn) -> bool {
        self.pager.lab.is_sabotaged(rule, gfn)
    }

    /// What came of each injected item so far, in the plan's order.
    #[must_use]
    pub fn injected(&self) -> Vec<InjectionCount> {
        self.pager.lab.injected()
    }

    /// Nothing is injected from now on: the disk is mended. Counts stay as they are.
    pub fn end_injection(&self) {
        self.pager.lab.end_injection();
    }

    /// Counts an invalidation that is about to be sent to a peer; what is to happen to that peer.
    #[must_use]
    pub fn peer_fault(&self) -> Option<PeerFault> {
        self.pager.lab.peer_fault()
    }

    /// How much longer a device's access to a page is to take, which is asked in the middle of each.
    #[must_use]
    pub fn device_slowness(&self) -> Option<Duration> {
        self.pager.lab.device_slowness()
    }

    /// A number for an export client of this memory.
    ///
    /// # Errors
    /// [`MmError::Host`] if no number is left.
    pub fn reserve_client(&self) -> Result<Reservation, MmError> {
        self.pager.notifiers.reserve().map_err(|error| {
            let source = std::io::Error::other(error);
            MmError::Host { what: "an export client", source }
        })
    }

    /// Registers the client that was made with a [reserved](Self::reserve_client) number, as
    /// [`Reservation::register`] does, with whatever slowness is to be injected.
    pub fn register_client(
        &self,
        reservation: Reservation,
        client: Arc<dyn ExportNotifier>,
    ) -> Membership {
        reservation.register(self.pager.lab.slowed(client))
    }
}
