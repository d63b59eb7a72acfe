//! The free list and the watermarks.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::addr::{PAGE_SIZE_U64, Pfn};
use crate::host_mm::{HostFault, HostMm, MmError, MmViolation, ViolationKind, pages};
use crate::sync::lock;

/// Least host memory: each vCPU needs a handful of pages resident at once to complete one
/// instruction, and reclaim needs a choice.
pub const MIN_HOST_MEMORY_BYTES: u64 = 4 << 20;
/// Most host memory: frame numbers must fit the memory object's entries.
const MAX_HOST_MEMORY_BYTES: u64 = 1 << 42;

/// Number of frames in so many bytes.
pub(super) fn count(bytes: u64) -> Result<u32, MmError> {
    let bad = |why: String| MmError::BadHostMemory { bytes, why };
    if bytes < MIN_HOST_MEMORY_BYTES {
        return Err(bad(format!("is below the minimum of {MIN_HOST_MEMORY_BYTES} bytes (4 MiB)")));
    }
    if bytes > MAX_HOST_MEMORY_BYTES {
        return Err(bad(format!("is above the maximum of {MAX_HOST_MEMORY_BYTES} bytes (4 TiB)")));
    }
    if !bytes.is_multiple_of(PAGE_SIZE_U64) {
        return Err(bad("is not a multiple of 4096 bytes".to_owned()));
    }
    u32::try_from(pages(bytes)).map_err(|_| bad("has too many frames".to_owned()))
}

/// Frames that hold no page.
#[derive(Debug)]
pub(super) struct FreeList {
    frames: Mutex<Vec<Pfn>>,
    len: AtomicU32,
    /// Background reclaim starts below this many free frames ...
    pub(super) low: u32,
    /// ... and goes on until there are this many.
    pub(super) high: u32,
}

impl FreeList {
    pub(super) fn new(frames: u32) -> Self {
        // 1/64 and 1/32 of all frames, at least two and four reclaim batches but never the lot.
        let low = (frames / 64).max(64).min(frames / 8);
        Self {
            // Low numbers first: a small guest stays within few pages of the frame table.
            frames: Mutex::new((0..frames).rev().map(Pfn::new).collect()),
            len: AtomicU32::new(frames),
            low,
            high: low * 2,
        }
    }

    /// Number of free frames; a hint.
    pub(super) fn len(&self) -> u32 {
        self.len.load(Ordering::Relaxed)
    }

    fn pop(&self) -> Option<Pfn> {
        let mut frames = lock(&self.frames);
        let pfn = frames.pop();
        self.len.store(length(&frames), Ordering::Relaxed);
        pfn
    }

    fn push(&self, pfn: Pfn) {
        let mut frames = lock(&self.frames);
        frames.push(pfn);
        self.len.store(length(&frames), Ordering::Relaxed);
    }
}

fn length(frames: &[Pfn]) -> u32 {
    // The list never holds more than the table's u32 count.
    u32::try_from(frames.len()).unwrap_or(u32::MAX)
}

/// A frame that holds no page and that only this value stands for. Dropping it gives it back.
#[must_use]
pub(super) struct FreeFrame<'a> {
    mm: &'a HostMm,
    pfn: Pfn,
}

impl<'a> FreeFrame<'a> {
    /// A frame that has just lost its page. Its translations have been revoked: only
    /// [`reclaim`](crate::host_mm::reclaim) calls this, on what came out of a flush (and, on
    /// purpose too early, one sabotage).
    pub(super) fn from_revoked(mm: &'a HostMm, pfn: Pfn) -> Self {
        Self { mm, pfn }
    }

    pub(super) fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The frame now holds a page.
    pub(super) fn into_use(self) {
        std::mem::forget(self);
    }
}

impl Drop for FreeFrame<'_> {
    fn drop(&mut self) {
        if self.mm.config.paranoid
            && self.mm.view.punch(self.pfn).is_err()
            && let Some(owner) = self.mm.last_owner(self.pfn)
        {
            // The frame is free all the same; but a stale access to it would go unseen.
            let kind = ViolationKind::NotPunched;
            self.mm.violations.report(MmViolation { kind, pfn: self.pfn, owner });
        }
        self.mm.free.push(self.pfn);
    }
}

impl HostMm {
    /// Whether enough frames are free that one can go to a page that nobody has asked for yet.
    #[must_use]
    pub fn has_spare_frames(&self) -> bool {
        self.free.len() > self.free.low
    }

    /// Takes a frame from the free list, waking background reclaim below the low watermark.
    pub(super) fn take_free_frame(&self) -> Option<FreeFrame<'_>> {
        if self.injector.as_ref().is_some_and(|one| one.strikes(HostFault::FrameEnomem)) {
            return None;
        }
        let pfn = self.free.pop()?;
        let free = self.free.len();
        let in_use = u64::from(self.table.len() - free.min(self.table.len()));
        self.counters.peak_frames_in_use.fetch_max(in_use, Ordering::Relaxed);
        if free < self.free.low {
            self.reclaimer.wake();
        }
        Some(FreeFrame { mm: self, pfn })
    }
}
