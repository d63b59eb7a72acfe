//! The memory of frames apart from the host memory that rations it, so that one mapping serves
//! thousands of short runs, one after the other: for tests and fuzzing.
//!
//! Everything else of a [`HostMm`](crate::HostMm) is made anew for each run and cannot
//! keep anything of the run before. What the frames hold is poison rather than zeros: a page that is not filled
//! before its guest sees it is noticed, which it would not be in memory that is new.

use vm_memory::{Bytes, VolatileMemory};

use super::guest_view::GuestView;
use super::host_view::HostView;
use crate::error::MmError;
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::lab::Lab;

/// What a frame holds that no page was in, byte by byte: as a page-table entry it is present, with
/// bits set that are reserved.
const POISON: u8 = 0xa5;

/// See the module's documentation.
#[derive(Debug)]
pub struct FrameMemory {
    pub(crate) view: HostView,
    guest_view: GuestView,
}

impl FrameMemory {
    /// Memory for so many frames, all of it poison. They may be fewer than
    /// [`MIN_HOST_MEMORY_BYTES`](crate::MIN_HOST_MEMORY_BYTES) has: for one processor,
    /// some dozens do.
    ///
    /// # Errors
    /// If the host refuses it.
    pub fn new(frames: u32) -> Result<Self, MmError> {
        let view = HostView::new(u64::from(frames) * PAGE_SIZE_U64, false)?;
        let guest_view = GuestView::new(&view, Lab::default())?;
        let memory = Self { view, guest_view };
        for raw in 0..frames {
            memory.poison(Pfn::new(raw))?;
        }
        Ok(memory)
    }

    /// A guest's mapping of the frames. It fails when the kernel does, and never on purpose.
    pub fn guest_view(&self) -> GuestView {
        self.guest_view.clone()
    }

    /// Makes the frame, which holds no page, as it was at the beginning.
    ///
    /// # Errors
    /// For a frame that there is not.
    pub fn poison(&self, pfn: Pfn) -> Result<(), MmError> {
        let at = pfn.index() * PAGE_SIZE;
        let slice = self.view.region().as_volatile_slice();
        slice
            .write_slice(&[POISON; PAGE_SIZE], at)
            .map_err(|error| MmError::View { pfn, why: error.to_string() })
    }
}
