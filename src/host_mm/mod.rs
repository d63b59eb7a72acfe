//! Host memory management: the frames, the pages in them, and the ration.
//!
//! What this layer guarantees, given export clients that keep their side of the protocol:
//!
//! - a page's content is in exactly one place: nowhere (all zero), in a frame, or in a swap slot
//!   with a checksum; an operation that fails leaves it where it was;
//! - no frame changes hands before every client has given up its mappings of it *and* one flush
//!   has revoked what processors still cache ([`batch`]: the flush is what turns a detached page
//!   into one that may be written out and freed, in types);
//! - never more frames are in use than were given (invariant I5).
//!
//! Faults come from above through [`MemoryObject`]; invalidations go up only through the
//! [notifier list](crate::export_rmap::NotifierList).

mod alarm;
mod audit;
mod batch;
mod checks;
mod clean;
mod clone;
mod commons;
mod config;
mod copies;
mod dirty_bits;
mod dirty_log;
mod discard;
mod duplicates;
mod error;
mod fault;
mod find;
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
mod frame_memory;
mod frames;
mod free;
mod free_frame;
mod guest_view;
mod holes;
mod host_view;
mod inject;
mod lend;
mod merge;
mod migrate;
mod object;
mod pages;
mod placement;
mod recall;
pub mod reclaim;
mod remap;
mod sabotage;
mod share;
mod stats;
pub mod swap;
mod tripwire;
mod unexported;
mod vacate;
mod violations;
mod withdraw;
mod write_out;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use crate::addr::{PAGE_SIZE_U64, Pfn};
use crate::export_rmap::{FrameTable, NotifierList, Numbers};
use crate::sync::Snapshot;

pub use audit::Audit;
pub use config::{HostMmConfig, ReclaimPolicy};
pub use dirty_log::DirtyLog;
pub use error::MmError;
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(crate) use frame_memory::FrameMemory;
pub use frames::{MAX_HOST_MEMORY_BYTES, MIN_HOST_MEMORY_BYTES};
pub use guest_view::GuestView;
pub(crate) use guest_view::page_runs;
pub use inject::{
    HostFault, Injection, InjectionCount, InjectionPlan, PauseCount, PausePoint, PeerFault, When,
};
pub use merge::Merged;
pub use object::MemoryObject;
pub use placement::Placement;
pub use remap::MAX_REMAP_PAGES;
pub use sabotage::Sabotage;
pub use stats::MmStats;
pub use swap::SwapConfig;
pub use tripwire::{TripReport, TripwireWatch};
pub use violations::{MmViolation, ViolationKind};

use alarm::Alarm;
use commons::{COMMONS, Commons};
use duplicates::Duplicates;
use frames::FreeList;
use host_view::HostView;
use inject::Injector;
use pages::ObjectPages;
use reclaim::Reclaimer;
use sabotage::SabotageRange;
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
    sabotage_range: SabotageRange,
    /// See [`HostMm::expect_holes`].
    holes_expected: AtomicBool,
    injector: Option<Arc<Injector>>,
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
        let frames = u32::try_from(pages(memory.view.bytes())).unwrap_or(u32::MAX);
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
        let rationed = u32::try_from(pages(config.host_memory_bytes)).unwrap_or(u32::MAX);
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
            sabotage_range: SabotageRange::default(),
            holes_expected: AtomicBool::new(false),
            injector,
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
        GuestView::new(&self.view, self.injector.clone())
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

/// That the clients can be told.
fn require_notifier(what: &'static str) -> Result<(), MmError> {
    if cfg!(feature = "export-notifier") { Ok(()) } else { Err(MmError::NoNotifier { what }) }
}

/// Whole pages in `bytes`, which is a multiple of the page size.
fn pages(bytes: u64) -> u64 {
    bytes / PAGE_SIZE_U64
}

#[cfg(test)]
mod tests;
