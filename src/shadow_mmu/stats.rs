//! Counters of the shadow MMU.

crate::counters::counters! {
    /// What has happened so far.
    pub struct ShadowStats {
        /// SPTEs installed where none was.
        installs,
        /// SPTEs that were there and got more rights: dirty tracking, cleaning, guest upgrades.
        upgrades,
        /// SPTEs installed ahead of a touch, next to a fault.
        fault_around,
        /// Pages read back from swap ahead of a stream of faults.
        read_ahead,
        /// Pages that nobody had touched, given frames ahead of a stream of writes.
        zeroed_ahead,
        /// Faults started over because an invalidation or a guest flush overlapped them.
        retries,
        /// Faults that were the guest's own.
        guest_faults,
        /// SPTEs removed because the host took the frame.
        invalidated,
        /// SPTEs made read-only because the host cleaned the page.
        write_protected,
        /// SPTEs removed by the guest's `invlpg` and CR3 loads.
        guest_flushed,
        /// Frames zapped only to have their accessed bits set again; none where the host needs no zap.
        aged_zaps,
        /// Times that all shadow pages were recycled.
        recycles,
    }
    live pub(super) struct Counters;
}
