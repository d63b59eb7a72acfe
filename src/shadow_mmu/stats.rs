//! Counters of the shadow MMU.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What has happened so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct ShadowStats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl ShadowStats {
            /// Adds what happened in another shadow MMU.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            pub(super) fn snapshot(&self) -> ShadowStats {
                ShadowStats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// SPTEs installed where none was.
    installs,
    /// SPTEs that were there and got more rights: dirty tracking, cleaning, guest upgrades.
    upgrades,
    /// SPTEs installed ahead of a touch, next to a fault.
    fault_around,
    /// Pages read back from swap ahead of a stream of faults.
    read_ahead,
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

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
