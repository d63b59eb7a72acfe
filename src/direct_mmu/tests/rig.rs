//! A guest whose memory is a window, and the threads that touch it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileMemory};

use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::direct_mmu::shard::Shard;
use crate::direct_mmu::{DirectConfig, DirectError, DirectMmu};
use crate::host_mm::swap::SwapBackend;
use crate::host_mm::{
    GuestView, HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, Placement, SwapConfig,
};
use crate::sync::lock;

/// Frames of the smallest ration.
pub(super) const FRAMES: u64 = MIN_HOST_MEMORY_BYTES / PAGE_SIZE_U64;

pub(super) type Page = [u8; PAGE_SIZE];

/// The smallest ration for a guest of so many pages, with all checks on.
pub(super) fn memory(pages: u64) -> HostMmConfig {
    HostMmConfig {
        placement: Placement::Identity { guest_bytes: pages.max(FRAMES) * PAGE_SIZE_U64 },
        swap: SwapConfig { path: None, dir: None, bytes: 64 << 20 },
        check_evictions: true,
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    }
}

/// A page that is different for each `seed`, and nowhere zero; zeros for 0.
pub(super) fn page(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    if seed != 0 {
        for (index, word) in page.chunks_exact_mut(8).enumerate() {
            let value = (seed << 16 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    page
}

pub(super) struct Rig {
    pub(super) mmu: DirectMmu,
    pub(super) mm: Arc<HostMm>,
    pub(super) object: Arc<MemoryObject>,
    pub(super) failures: Arc<Mutex<Vec<String>>>,
}

impl Rig {
    /// For tests that are ignored where faults cannot be handled.
    pub(super) fn new(memory: HostMmConfig, direct: DirectConfig) -> Self {
        Self::on(HostMm::new(memory).unwrap(), direct)
    }

    pub(super) fn with_backend(memory: HostMmConfig, backend: Box<dyn SwapBackend>) -> Self {
        Self::on(HostMm::with_backend(memory, backend).unwrap(), DirectConfig::default())
    }

    fn on(mm: Arc<HostMm>, direct: DirectConfig) -> Self {
        let Placement::Identity { guest_bytes } = mm.config().placement else {
            panic!("not for a window");
        };
        let object = mm.create_object(guest_bytes).unwrap();
        let failures: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = failures.clone();
        let on_failure = move |error: DirectError| lock(&told).push(error.to_string());
        let view = mm.map_guest_view().unwrap();
        let mmu = DirectMmu::new(direct, object.clone(), view, on_failure);
        let mmu = mmu.unwrap_or_else(|error| panic!("{error}"));
        Self { mmu, mm, object, failures }
    }

    pub(super) fn window(&self) -> &GuestView {
        self.mmu.window()
    }

    /// A vCPU's load of a whole page.
    pub(super) fn read(&self, number: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let at = usize::try_from(number).unwrap() * PAGE_SIZE;
        self.window().region().as_volatile_slice().read_slice(&mut page, at).unwrap();
        page
    }

    /// A vCPU's store of a whole page.
    pub(super) fn write(&self, number: u64, page: &Page) {
        let at = usize::try_from(number).unwrap() * PAGE_SIZE;
        self.window().region().as_volatile_slice().write_slice(page, at).unwrap();
    }

    /// Waits until nothing is read ahead any more: it locks pages.
    pub(super) fn settle_ahead(&self) {
        self.mmu.mmu.shards.iter().for_each(Shard::await_turns);
    }

    pub(super) fn evict(&self, number: u64) {
        self.settle_ahead();
        let evicted = self.mm.evict_frames(&[pfn(number)]).unwrap();
        assert_eq!(evicted, 1, "the page was in its frame");
    }

    pub(super) fn is_resident(&self, number: u64) -> bool {
        self.settle_ahead();
        self.object.try_lock_resident(Gfn::new(number)).is_some()
    }

    /// Nothing has failed, the layers' checks have found nothing, and the books are in line.
    #[track_caller]
    pub(super) fn assert_sound(&self) {
        assert_eq!(*lock(&self.failures), Vec::<String>::new());
        let (violations, count) = self.mm.violations();
        assert_eq!(count, 0, "{violations:?}");
        assert_eq!(self.mmu.check_reverse_map(&self.mm.quiet()).unwrap(), Vec::<String>::new());
        let stats = self.mm.stats();
        assert!(stats.peak_frames_in_use <= FRAMES, "I5: {stats:?}");
        self.assert_within_ration();
    }

    #[track_caller]
    pub(super) fn assert_within_ration(&self) {
        let bytes = self.mm.resident_bytes().unwrap();
        assert!(bytes <= MIN_HOST_MEMORY_BYTES, "I5: {bytes} bytes");
    }
}

pub(super) fn pfn(number: u64) -> Pfn {
    Pfn::new(u32::try_from(number).unwrap())
}

/// Waits for something that is about to happen.
#[track_caller]
pub(super) fn eventually(what: impl Fn() -> bool) {
    let begin = Instant::now();
    while !what() {
        assert!(begin.elapsed() < Duration::from_secs(30), "it never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}
