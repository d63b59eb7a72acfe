//! The memory of guests, as whoever runs them has it.
//!
//! Guarantee: everything that is to be had of host memory is a method here or in a room above, and each
//! hands on no more of it than it takes ([`Books`](crate::books::Books)).

mod checks;
mod clients;
pub(crate) mod object;
pub(crate) mod owner;

use std::sync::Arc;

use crate::config::HostMmConfig;
use crate::error::MmError;
use crate::fault::Pager;
use crate::frames::alarm::Quiet;
#[cfg(all(feature = "testing", feature = "export-notifier"))]
use crate::frames::frame_memory::FrameMemory;
use crate::frames::guest_view::GuestView;
use crate::frames::host_view::HostView;
use crate::frames::placement::Placement;
use crate::object::commons::COMMONS;
use crate::reclaim::BackgroundReclaim;
use crate::stats::MmStats;
use crate::swap::SwapSpace;
use crate::violations::MmViolation;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::sync::Mutex;
use gnomon_export_rmap::{FrameTable, NotifierList, Numbers};

/// The frames of one process and everything that decides which page is in which.
pub struct HostMm {
    pub(crate) pager: Pager,
    /// Held by those who change which memory objects there are.
    object_numbers: Mutex<Numbers>,
}

impl std::fmt::Debug for HostMm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMm").field("config", &self.pager.config).finish_non_exhaustive()
    }
}

impl HostMm {
    /// Reserves the frames and opens swap. No frame takes up memory until it is used.
    ///
    /// # Errors
    /// [`MmError::BadHostMemory`] for a size that cannot be; otherwise what the host refused.
    pub fn new(config: HostMmConfig) -> Result<Arc<Self>, MmError> {
        let lab = config.lab();
        let swap = SwapSpace::open(&config.swap, &lab)?;
        let (frames, view) = Self::frames_of(&config)?;
        Self::assemble(frames, config, view, swap, lab)
    }

    /// As [`new`](Self::new), on swap of another kind: tests bring back ends that fail.
    #[cfg(feature = "testing")]
    pub fn with_backend(
        config: HostMmConfig,
        backend: Box<dyn crate::swap::SwapBackend>,
    ) -> Result<Arc<Self>, MmError> {
        let lab = config.lab();
        let swap = SwapSpace::new(backend, &lab);
        let (frames, view) = Self::frames_of(&config)?;
        Self::assemble(frames, config, view, swap, lab)
    }

    /// As [`new`](Self::new), on memory for the frames that is there already and that no other
    /// `HostMm` is using, with swap in memory.
    #[cfg(all(feature = "testing", feature = "export-notifier"))]
    pub fn on_memory(config: HostMmConfig, memory: &FrameMemory) -> Result<Arc<Self>, MmError> {
        let config = HostMmConfig { host_memory_bytes: memory.view.bytes(), ..config };
        let lab = config.lab();
        let slots = config.swap.slots().map_err(crate::swap::SwapError::Open)?;
        let swap = SwapSpace::new(Box::new(crate::swap::MemorySwap::new(slots)), &lab);
        let frames = memory.view.bytes() / gnomon_export_rmap::addr::PAGE_SIZE_U64;
        let frames = u32::try_from(frames).unwrap_or(u32::MAX);
        Self::assemble(frames, config, memory.view.clone(), swap, lab)
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
        lab: Lab,
    ) -> Result<Arc<Self>, MmError> {
        Ok(Arc::new(Self {
            pager: Pager::assemble(frames, config, view, swap, lab),
            object_numbers: Mutex::new(Numbers::below(COMMONS)),
        }))
    }

    /// The configuration that this was made with.
    #[must_use]
    pub fn config(&self) -> &HostMmConfig {
        &self.pager.config
    }

    /// The frame table.
    #[must_use]
    pub fn frame_table(&self) -> &FrameTable {
        &self.pager.table
    }

    /// The list on which export clients register.
    #[must_use]
    pub fn notifiers(&self) -> &NotifierList {
        &self.pager.notifiers
    }

    /// Maps all frames for a guest.
    ///
    /// # Errors
    /// If the host refuses the mapping.
    pub fn map_guest_view(&self) -> Result<GuestView, MmError> {
        GuestView::new(&self.pager.view, self.lab().clone())
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> MmStats {
        self.pager.counters.snapshot(
            u64::from(self.pager.rationed_frames()),
            u64::from(self.pager.free_frames()),
            u64::from(self.pager.swap.used()),
        )
    }

    /// Faults that the checks found, oldest first; at most a few hundred are kept. The second
    /// value counts all of them.
    #[must_use]
    pub fn violations(&self) -> (Vec<MmViolation>, u64) {
        self.pager.violations.snapshot()
    }

    /// Number of frames in the table.
    #[must_use]
    pub fn frame_count(&self) -> u32 {
        self.pager.table.len()
    }

    /// Host memory taken up by frames right now, in bytes, as the kernel counts it.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn resident_bytes(&self) -> Result<u64, MmError> {
        self.pager.view.allocated_bytes()
    }

    /// The page numbers of the memory object that a frame holds, or held last. A hint.
    #[must_use]
    pub fn last_owner(&self, pfn: Pfn) -> Option<gnomon_export_rmap::Owner> {
        self.pager.last_owner(pfn)
    }

    /// Number of pages that are shared now, without the zero pages.
    #[must_use]
    pub fn shared_pages(&self) -> u64 {
        self.pager.commons.len()
    }

    /// Whether enough frames are free that one can go to a page that nobody has asked for yet.
    #[must_use]
    pub fn has_spare_frames(&self) -> bool {
        self.pager.has_spare_frames()
    }

    /// From now on frames may lose their memory behind this layer's back: somebody removes a range
    /// of the window (`MADV_REMOVE`). Each frame is looked at before its content is used.
    pub fn expect_holes(&self) {
        self.pager.expect_holes();
    }

    /// Evicts the pages in these frames, as far as they hold one and nobody has it locked, without
    /// regard to their use: for stress. Returns the number of frames freed.
    ///
    /// # Errors
    /// If a page could not be evicted, after all others were tried.
    pub fn evict_frames(&self, frames: &[Pfn]) -> Result<usize, MmError> {
        self.pager.evict_frames(frames)
    }

    /// Evicts pages that are not in use, as a fault without a free frame does, until so many frames
    /// were freed or there is nothing left to evict: for tests. Returns the number of frames freed.
    #[cfg(all(feature = "testing", feature = "export-notifier"))]
    pub fn reclaim_frames(&self, frames: usize) -> Result<usize, MmError> {
        self.pager.reclaim_frames(frames)
    }

    /// Starts background reclaim. One thread is enough: more of them share the work.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn start_background_reclaim(self: &Arc<Self>) -> Result<BackgroundReclaim, MmError> {
        // Weak: the thread must not keep alive what it works for.
        let mm = Arc::downgrade(self);
        let started = BackgroundReclaim::spawn(&self.pager.alarm, move |round, over| {
            mm.upgrade().map(|mm| mm.pager.refill(round, over)).is_some()
        });
        started.map_err(|source| MmError::Host { what: "a thread for background reclaim", source })
    }

    /// Holds background reclaim back, and waits for the round under way.
    pub fn quiet(&self) -> Quiet<'_> {
        self.pager.alarm.quiet()
    }

    /// Whether it is this host memory's reclaim that is held back.
    #[must_use]
    pub fn is_quiet(&self, quiet: &Quiet<'_>) -> bool {
        quiet.is_of(&self.pager.alarm)
    }
}
