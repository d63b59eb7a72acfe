//! Counters of host memory management.

use gnomon_export_rmap::counters::Counter;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        gnomon_export_rmap::counters::figures! {
            /// What has happened so far, in pages or operations since the start.
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
            pub struct MmStats {
                $($(#[$doc])* pub $name: u64,)*
                /// Frames in the table.
                pub frames: u64,
                /// Frames in use now.
                pub frames_in_use: u64,
                /// Slots of swap in use now.
                pub swap_slots_used: u64,
            }
        }

        /// The live side.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: Counter,)*
        }

        impl Counters {
            pub(super) fn snapshot(&self, frames: u64, free: u64, swap_slots_used: u64) -> MmStats {
                MmStats {
                    $($name: self.$name.get(),)*
                    frames,
                    frames_in_use: frames.saturating_sub(free),
                    swap_slots_used,
                }
            }
        }
    };
}

counters! {
    /// Most frames that were ever in use at once.
    peak_frames_in_use,
    /// Pages that came to life as zeros.
    zero_fills,
    /// Pages read back from swap: re-faults of evicted pages.
    swap_ins,
    /// Re-faults of the watched range of guest frames.
    watched_swap_ins,
    /// Pages taken out of their frames.
    evictions,
    /// Pages written to swap, by eviction or cleaning.
    swap_outs,
    /// Evicted without a write because their copy in swap still stood.
    clean_drops,
    /// Evicted without a write because they were all zero.
    zero_drops,
    /// Pages cleaned: made read-only, harvested and, if dirty, written.
    cleans,
    /// Frames that reclaim has looked at.
    scanned,
    /// Pages whose accessed state reclaim has found set and cleared.
    aged,
    /// Batches reclaimed in the background.
    background_reclaims,
    /// Batches reclaimed by a fault that found no free frame.
    direct_reclaims,
    /// Swap slots taken from pages in frames because swap was full.
    duplicate_slots_released,
    /// Shared pages copied because one of those who have them wrote.
    cow_copies,
    /// Shared pages that had one user left, who wrote and got them without a copy.
    cow_reuses,
    /// Pages made shared, by a clone or a merge.
    shared,
    /// Pages that joined a shared page of the same content, or of zeros.
    merges,
    /// Pages moved to another frame.
    migrations,
    /// Pages that the guest gave back.
    pages_freed,
    /// Pages whose places were exchanged with others'.
    remaps,
    /// Copies of pages lent to clients.
    lent,
    /// Pages whose copies were recalled because somebody wrote.
    recalls,
    /// Evictions given up because swap could not be written.
    failed_evictions,
}
