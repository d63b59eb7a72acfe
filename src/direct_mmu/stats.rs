//! Counters of direct paging.

use std::sync::atomic::{AtomicU64, Ordering};

/// What has happened so far, in faults or pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct DirectStats {
    /// Faults read.
    pub faults: u64,
    /// Faults that had to wait for something and went to a worker.
    pub handed_over: u64,
    /// Pages mapped for a fault on them.
    pub installs: u64,
    /// Pages mapped next to one.
    pub fault_around: u64,
    /// Of these, pages brought in ahead of faults that come in sequence, or meant to be.
    pub read_ahead: u64,
    /// Pages that were mapped and became writable.
    pub upgrades: u64,
    /// Faults on pages that turned out to be mapped.
    pub already_mapped: u64,
    /// Faults started over because an invalidation overlapped them.
    pub retries: u64,
    /// Faults set aside until an event was read.
    pub parked: u64,
    /// Pages taken out of the reverse map because the host took them.
    pub invalidated: u64,
    /// Pages write-protected.
    pub write_protected: u64,
    /// Ranges zapped to see which of their pages are used.
    pub aged_zaps: u64,
    /// Pages that somebody removed from the window.
    pub removed: u64,
}

macro_rules! live {
    ($($name:ident),*) => {
        impl DirectStats {
            /// Adds what has happened in another window.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)*
            }
        }

        /// The live counters; relaxed, each of them right by itself.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            pub(super) fn snapshot(&self) -> DirectStats {
                DirectStats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

live! {
    faults, handed_over, installs, fault_around, read_ahead, upgrades, already_mapped, retries, parked,
    invalidated, write_protected, aged_zaps, removed
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}
