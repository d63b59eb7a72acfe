//! Host memory, one memory object and one fake client, with swap in plain memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::client::{Event, FakeClient, Log, Page};
use crate::swap::{MemorySwap, SwapBackend};
use crate::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject};
use gnomon_export_rmap::Membership;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn, SwapSlot};

/// Frames of the smallest host memory.
pub(super) const FRAMES: u64 = MIN_HOST_MEMORY_BYTES / PAGE_SIZE_U64;

/// The smallest host memory, with all checks on.
pub(super) fn config() -> HostMmConfig {
    HostMmConfig { check_evictions: true, ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES) }
}

/// A page that is different for each `seed`, and nowhere zero.
pub(super) fn page(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        let value = (seed << 16 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

pub(super) fn gfn(number: u64) -> Gfn {
    Gfn::new(number)
}

/// Swap in memory, which logs its writes.
pub(super) struct LoggedSwap {
    swap: MemorySwap,
    log: Arc<Log>,
}

impl LoggedSwap {
    pub(super) fn new(slots: u32, log: &Arc<Log>) -> Self {
        Self { swap: MemorySwap::new(slots), log: log.clone() }
    }
}

impl SwapBackend for LoggedSwap {
    fn read(&self, slot: SwapSlot, page: &mut Page) -> io::Result<()> {
        self.swap.read(slot, page)
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        for (number, _) in (first.as_u32()..).zip(pages.chunks_exact(PAGE_SIZE)) {
            self.log.push(Event::SwapWritten(SwapSlot::new(number).unwrap()));
        }
        self.swap.write(first, pages)
    }

    fn slots(&self) -> u32 {
        self.swap.slots()
    }
}

pub(super) struct Rig {
    pub(super) mm: Arc<HostMm>,
    pub(super) object: Arc<MemoryObject>,
    pub(super) client: Arc<FakeClient>,
    pub(super) log: Arc<Log>,
    // Last: the client has forgotten everything by then.
    _membership: Membership,
}

impl Rig {
    /// A memory object of so many pages, and swap for ten thousand.
    pub(super) fn new(config: HostMmConfig, pages: u64) -> Self {
        Self::with_slots(config, pages, 10_000)
    }

    pub(super) fn with_slots(config: HostMmConfig, pages: u64, slots: u32) -> Self {
        Self::with_backend(config, pages, |log| Box::new(LoggedSwap::new(slots, log)))
    }

    pub(super) fn with_backend(
        config: HostMmConfig,
        pages: u64,
        backend: impl FnOnce(&Arc<Log>) -> Box<dyn SwapBackend>,
    ) -> Self {
        let log = Arc::default();
        let mm = HostMm::with_backend(config, backend(&log)).unwrap();
        Self::on(mm, pages, log)
    }

    fn on(mm: Arc<HostMm>, pages: u64, log: Arc<Log>) -> Self {
        let object = mm.create_object(pages * PAGE_SIZE_U64).unwrap();
        Self::of(mm, object, log)
    }

    /// A client of another memory object of the same host memory.
    pub(super) fn beside(other: &Self, object: Arc<MemoryObject>) -> Self {
        Self::of(other.mm.clone(), object, other.log.clone())
    }

    /// A second client of the same pages.
    pub(super) fn with_object_of(other: &Self) -> Self {
        Self::of(other.mm.clone(), other.object.clone(), other.log.clone())
    }

    fn of(mm: Arc<HostMm>, object: Arc<MemoryObject>, log: Arc<Log>) -> Self {
        let reservation = mm.notifiers().reserve().unwrap();
        let client = FakeClient::new(reservation.id(), object.clone(), 4, log.clone());
        let client = Arc::new(client);
        let _membership = reservation.register(client.clone());
        Self { mm, object, client, log, _membership }
    }

    /// The frame that the page is in.
    pub(super) fn frame(&self, gfn: Gfn) -> Option<Pfn> {
        self.object.try_lock_resident(gfn).map(|page| page.pfn())
    }

    /// Evicts one page, which must be in a frame.
    pub(super) fn evict(&self, gfn: Gfn) {
        let pfn = self.frame(gfn).expect("the page is in a frame");
        assert_eq!(self.mm.evict_frames(&[pfn]).unwrap(), 1);
        assert_eq!(self.frame(gfn), None, "it has left its frame");
    }

    /// Cleans one page, which must be in a frame.
    pub(super) fn clean(&self, gfn: Gfn) {
        let pfn = self.frame(gfn).expect("the page is in a frame");
        assert_eq!(self.mm.clean_frames(&[pfn]).unwrap(), 1);
        assert_eq!(self.frame(gfn), Some(pfn), "it has stayed in its frame");
    }

    /// The hypervisor's read of a whole page.
    pub(super) fn host_read(&self, gfn: Gfn) -> Page {
        let mut page = [0xee; PAGE_SIZE];
        self.object.read(gfn.base(), &mut page).unwrap();
        page
    }

    /// The hypervisor's write of a whole page.
    pub(super) fn host_write(&self, gfn: Gfn, page: &Page) {
        self.object.write(gfn.base(), page).unwrap();
    }

    pub(super) fn all_frames(&self) -> Vec<Pfn> {
        (0..self.mm.frame_count()).map(Pfn::new).collect()
    }

    /// None of the layer's own checks, and none of the client's, has found anything.
    #[track_caller]
    pub(super) fn assert_sound(&self) {
        let (violations, count) = self.mm.violations();
        assert_eq!(count, 0, "{violations:?}");
        assert_eq!(self.client.broken_promises.load(Ordering::Relaxed), 0);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.client.forget_everything();
    }
}
