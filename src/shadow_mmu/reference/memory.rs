//! The memory that a [`Machine`](super::machine::Machine) stands on, which outlives it: mappings cost
//! more than all that a short run does with them.
//!
//! Guarantee: a run finds in it what the first one found. Nothing but content is kept, and
//! [`Memory::reset`] makes that what it was, after it has seen that the run before holds none of it.

use std::sync::Arc;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::machine::WINDOW_BYTES;
use crate::addr::{PAGE_SIZE, Pfn};
use crate::host_mm::{FrameMemory, HostMm};
use crate::sys::memory::create_memfd;

/// Most shadow pages of a machine on such memory.
pub(crate) const MAX_SHADOW_PAGES: u32 = 64;
/// Frames: so few that a run of a hundred steps can use them up, and faults have to reclaim.
const FRAMES: u32 = 64;
/// What a shadow page holds that is not in use: present entries that lead nowhere.
const POISON: [u8; PAGE_SIZE] = [0xa5; PAGE_SIZE];
/// An entry of each shadow page that tells whether it was used: no SPTE looks like poison, and a
/// page that is used is cleared first.
const TELLTALE: usize = 300 * size_of::<u64>();

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(super) frames: FrameMemory,
    pub(super) tables: Arc<MmapRegion>,
    pub(super) window: Arc<MmapRegion>,
}

pub(super) fn tables(pages: u32) -> Arc<MmapRegion> {
    Arc::new(MmapRegion::new(pages as usize * PAGE_SIZE).unwrap())
}

pub(super) fn window() -> Arc<MmapRegion> {
    let file = create_memfd("window", WINDOW_BYTES).unwrap();
    let bytes = usize::try_from(WINDOW_BYTES).unwrap();
    Arc::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap())
}

impl Memory {
    pub(crate) fn new() -> Self {
        let frames = FrameMemory::new(FRAMES).unwrap();
        let memory = Self { frames, tables: tables(MAX_SHADOW_PAGES), window: window() };
        memory.poison_tables();
        memory
    }

    /// Makes all of it what it was before the run that `mm` was for, which is over: nobody else has
    /// a hold of its host memory, no frame holds a page or is mapped, nothing is in swap.
    pub(crate) fn reset(&self, mm: Arc<HostMm>) {
        let mm = Arc::try_unwrap(mm).expect("nobody else holds the host memory");
        // What pages of zeros were shared stay, until somebody wants their frames.
        let used = used_frames(&mm);
        mm.evict_frames(&used).unwrap();
        let stats = mm.stats();
        assert_eq!((stats.frames_in_use, stats.swap_slots_used), (0, 0), "frames and slots in use");
        assert_eq!(mm.shared_pages(), 0, "pages that nobody shares any more");
        for &pfn in &used {
            let frame = mm.frame_table().get(pfn).unwrap();
            assert!(!frame.is_in_use() && !frame.is_exported(), "frame {pfn} is in use");
            assert!(mm.frame_table().rmap_entries(pfn).is_empty(), "frame {pfn} is mapped");
        }
        let (violations, count) = mm.violations();
        assert_eq!(count, 0, "{violations:?}");
        for pfn in used {
            self.frames.poison(pfn).unwrap();
        }
        self.poison_tables();
        for at in (0..self.window.size()).step_by(PAGE_SIZE) {
            self.window.as_volatile_slice().write_slice(&[0; PAGE_SIZE], at).unwrap();
        }
    }

    fn poison_tables(&self) {
        let tables = self.tables.as_volatile_slice();
        for page in 0..MAX_SHADOW_PAGES as usize {
            let at = page * PAGE_SIZE;
            let telltale: [u8; 8] = tables.read_obj(at + TELLTALE).unwrap();
            if telltale != POISON[..8] {
                tables.write_slice(&POISON, at).unwrap();
            }
        }
    }

    /// Whether all of it is what it was in the beginning, byte by byte.
    pub(crate) fn is_pristine(&self) -> bool {
        let all = |region: &MmapRegion, page: &[u8; PAGE_SIZE]| {
            (0..region.size()).step_by(PAGE_SIZE).all(|at| {
                let mut found = [0; PAGE_SIZE];
                region.as_volatile_slice().read_slice(&mut found, at).unwrap();
                found == *page
            })
        };
        all(self.frames.guest_view().region(), &POISON)
            && all(&self.tables, &POISON)
            && all(&self.window, &[0; PAGE_SIZE])
    }
}

/// The frames that ever held a page, with none that is above all of them: free frames are taken
/// lowest first, and the last one freed before any that was never used.
pub(super) fn used_frames(mm: &HostMm) -> Vec<Pfn> {
    let most = u32::try_from(mm.stats().peak_frames_in_use).unwrap();
    (0..most).map(Pfn::new).collect()
}
