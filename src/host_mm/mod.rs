//! Host memory management: the frames, the pages in them, and the ration.
//!
//! What this layer guarantees, given export clients that keep their side of the protocol:
//!
//! - a page's content is in exactly one place: nowhere (all zero), in a frame, or in a swap slot
//!   with a checksum; an operation that fails leaves it where it was;
//! - no frame changes hands before every client has given up its mappings of it *and* one flush
//!   has revoked what processors still cache ([`revoke`]: the flush is what turns a detached page
//!   into one that may be written out and freed, in types);
//! - never more frames are in use than were given (invariant I5).
//!
//! Faults come from above through [`MemoryObject`]; invalidations go up only through the
//! [notifier list](crate::export_rmap::NotifierList).

mod audit;
mod books;
mod config;
mod error;
mod fault;
mod frames;
mod inject;
mod memory;
mod object;
mod reclaim;
mod revoke;
mod sources;
mod stats;
pub mod swap;
mod violations;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use crate::addr::{PAGE_SIZE_U64, Pfn};
use crate::export_rmap::{FrameTable, NotifierList, Numbers};
use crate::sync::Snapshot;

pub use audit::Audit;
pub use audit::tripwire::{TripReport, TripwireWatch};
pub use config::{HostMmConfig, ReclaimPolicy};
pub use error::MmError;
pub use frames::alarm::Quiet;
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(crate) use frames::frame_memory::FrameMemory;
pub use frames::free_list::{MAX_HOST_MEMORY_BYTES, MIN_HOST_MEMORY_BYTES};
pub use frames::guest_view::GuestView;
pub(crate) use frames::guest_view::page_runs;
pub use frames::placement::Placement;
pub use inject::{
    HostFault, Injection, InjectionCount, InjectionPlan, PauseCount, PausePoint, PeerFault,
    Sabotage, When,
};
pub use memory::object::MemoryObject;
pub use memory::owner::HostMemory;
pub use reclaim::BackgroundReclaim;
pub use sources::dirty_log::DirtyLog;
pub use sources::merge::Merged;
pub use sources::remap::MAX_REMAP_PAGES;
pub use stats::MmStats;
pub use swap::SwapConfig;
pub use violations::{MmViolation, ViolationKind};

use frames::alarm::Alarm;
use frames::free_list::FreeList;
use frames::host_view::HostView;
use inject::{Injector, Lab};
use object::commons::{COMMONS, Commons};
use object::pages::ObjectPages;
use reclaim::Reclaimer;
use revoke::duplicates::Duplicates;
use stats::Counters;
use swap::SwapSpace;
use violations::Violations;

/// The frames of one process and everything that decides which page is in which.
pub struct HostMm {
    config: HostMmConfig,
    table: FrameTable,
    view: HostView,
    free: FreeList,
    swap: SwapSpace,
    objects: Snapshot<Vec<Arc<ObjectPages>>>,
    commons: Commons,
    /// Held by those who change `objects`.
    object_numbers: Mutex<Numbers>,
    notifiers: NotifierList,
    reclaimer: Reclaimer,
    alarm: Arc<Alarm>,
    duplicates: Duplicates,
    counters: Counters,
    violations: Violations,
    /// See [`HostMm::expect_holes`].
    holes_expected: AtomicBool,
    lab: Lab,
}

impl std::fmt::Debug for HostMm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMm").field("config", &self.config).finish_non_exhaustive()
    }
}

impl HostMm {
    /// Reserves the frames and opens swap. No frame takes up memory until it is used.
    ///
    /// # Errors
    /// [`MmError::BadHostMemory`] for a size that cannot be; otherwise what the host refused.
    pub fn new(config: HostMmConfig) -> Result<Arc<Self>, MmError> {
        let corrupt = config.sabotage == Some(Sabotage::SwapCorrupt);
        let injector = Injector::new(&config.inject);
        let swap = SwapSpace::open(&config.swap, corrupt, injector.as_ref())?;
        let (frames, view) = Self::frames_of(&config)?;
        Self::assemble(frames, config, view, swap, injector)
    }

    /// As [`new`](Self::new), on swap of another kind: tests bring back ends that fail.
    #[cfg(test)]
    pub(crate) fn with_backend(
        config: HostMmConfig,
        backend: Box<dyn swap::SwapBackend>,
    ) -> Result<Arc<Self>, MmError> {
        let injector = Injector::new(&config.inject);
        let swap = SwapSpace::new(backend, injector.as_ref());
        let (frames, view) = Self::frames_of(&config)?;
        Self::assemble(frames, config, view, swap, injector)
    }

    /// As [`new`](Self::new), on memory for the frames that is there already and that no other
    /// `HostMm` is using, with swap in memory.
    #[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
    pub(crate) fn on_memory(
        config: HostMmConfig,
        memory: &FrameMemory,
    ) -> Result<Arc<Self>, MmError> {
        let config = HostMmConfig { host_memory_bytes: memory.view.bytes(), ..config };
        let injector = Injector::new(&config.inject);
        let slots = config.swap.slots().map_err(swap::SwapError::Open)?;
        let swap = SwapSpace::new(Box::new(swap::MemorySwap::new(slots)), injector.as_ref());
        let frames = u32::try_from(memory.view.bytes() / PAGE_SIZE_U64).unwrap_or(u32::MAX);
        Self::assemble(frames, config, memory.view.clone(), swap, injector)
    }

    fn frames_of(config: &HostMmConfig) -> Result<(u32, HostView), MmError> {
        let (bytes, frames) = config.placement.extent(config.host_memory_bytes)?;
        Ok((frames, HostView::new(bytes, config.placement != Placement::Anywhere)?))
    }

    fn assemble(
        frames: u32,
        config: HostMmConfig,
        view: HostView,
        swap: SwapSpace,
        injector: Option<Arc<Injector>>,
    ) -> Result<Arc<Self>, MmError> {
        // The ration; identity placement has a frame for each page beside it.
        let rationed = u32::try_from(config.host_memory_bytes / PAGE_SIZE_U64).unwrap_or(u32::MAX);
        let commons = Commons::new();
        Ok(Arc::new(Self {
            table: FrameTable::new(frames),
            view,
            free: FreeList::new(rationed, config.placement),
            swap,
            objects: Snapshot::new(vec![commons.pages.clone()]),
            commons,
            object_numbers: Mutex::new(Numbers::below(COMMONS)),
            notifiers: NotifierList::default(),
            reclaimer: Reclaimer::new(frames),
            alarm: Arc::default(),
            duplicates: Duplicates::of_frames(frames),
            counters: Counters::default(),
            violations: Violations::default(),
            holes_expected: AtomicBool::new(false),
            lab: Lab::new(config.sabotage, injector),
            config,
        }))
    }

    /// The configuration that this was made with.
    #[must_use]
    pub fn config(&self) -> &HostMmConfig {
        &self.config
    }

    /// The frame table.
    #[must_use]
    pub fn frame_table(&self) -> &FrameTable {
        &self.table
    }

    /// The list on which export clients register.
    #[must_use]
    pub fn notifiers(&self) -> &NotifierList {
        &self.notifiers
    }

    /// Maps all frames for a guest.
    ///
    /// # Errors
    /// If the host refuses the mapping.
    pub fn map_guest_view(&self) -> Result<GuestView, MmError> {
        GuestView::new(&self.view, self.lab.injector().cloned())
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> MmStats {
        self.counters.snapshot(
            u64::from(self.free.rationed),
            u64::from(self.free.len()),
            u64::from(self.swap.used()),
        )
    }

    /// Faults that the checks found, oldest first; at most a few hundred are kept. The second
    /// value counts all of them.
    #[must_use]
    pub fn violations(&self) -> (Vec<MmViolation>, u64) {
        self.violations.snapshot()
    }

    /// Number of frames in the table.
    #[must_use]
    pub fn frame_count(&self) -> u32 {
        self.table.len()
    }

    /// Host memory taken up by frames right now, in bytes, as the kernel counts it.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn resident_bytes(&self) -> Result<u64, MmError> {
        self.view.allocated_bytes()
    }

    /// The page numbers of the memory object that a frame holds, or held last. A hint.
    #[must_use]
    pub fn last_owner(&self, pfn: Pfn) -> Option<crate::export_rmap::Owner> {
        self.table.get(pfn).map(crate::export_rmap::Frame::owner)
    }
}

#[cfg(test)]
mod tests;
