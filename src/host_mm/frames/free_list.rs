//! The free list and the watermarks.

use std::sync::atomic::{AtomicU32, Ordering};

use super::placement::Placement;
use crate::error::MmError;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::sync::{Mutex, lock};

/// Least host memory: each vCPU needs a handful of pages resident at once to complete one
/// instruction, and reclaim needs a choice.
pub const MIN_HOST_MEMORY_BYTES: u64 = 4 << 20;
/// Most host memory: frame numbers must fit the memory object's entries.
pub const MAX_HOST_MEMORY_BYTES: u64 = 1 << 42;

/// Number of frames in so many bytes.
pub(crate) fn count(bytes: u64) -> Result<u32, MmError> {
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
    u32::try_from(bytes / PAGE_SIZE_U64).map_err(|_| bad("has too many frames".to_owned()))
}

/// Frames that hold no page, up to as many as may be in use at a time.
#[derive(Debug)]
pub(crate) struct FreeList {
    stock: Stock,
    /// From std under a model checker, too: where any frame will do for a page, which is what the models
    /// have, it is a hint.
    len: AtomicU32,
    /// Frames that may be in use at a time.
    pub(crate) rationed: u32,
    /// Background reclaim starts below this many free frames ...
    pub(crate) low: u32,
    /// ... and goes on until there are this many.
    high: u32,
}

/// What a free frame is taken from.
#[derive(Debug)]
enum Stock {
    /// Any frame will do for any page: these are free.
    Any(Mutex<Vec<Pfn>>),
    /// Each page has its own: only their number is rationed.
    Own,
}

impl FreeList {
    pub(crate) fn new(frames: u32, placement: Placement) -> Self {
        // 1/64 and 1/32 of all frames, at least two and four reclaim batches but never the lot.
        let low = (frames / 64).max(64).min(frames / 8);
        Self {
            stock: match placement {
                // Low numbers first: a small guest stays within few pages of the frame table.
                Placement::Anywhere => {
                    Stock::Any(Mutex::new((0..frames).rev().map(Pfn::new).collect()))
                }
                Placement::Identity { .. } => Stock::Own,
            },
            len: AtomicU32::new(frames),
            rationed: frames,
            low,
            high: low * 2,
        }
    }

    /// Number of free frames; a hint.
    pub(crate) fn len(&self) -> u32 {
        self.len.load(Ordering::Relaxed)
    }

    /// How many fewer than the high watermark are free; a hint.
    pub(crate) fn missing(&self) -> u32 {
        // Read once: others free frames meanwhile.
        self.high.saturating_sub(self.len())
    }

    /// A frame for a page; where pages have frames of their own, none without a page.
    pub(crate) fn pop(&self, page: Option<Gfn>) -> Option<Pfn> {
        match &self.stock {
            Stock::Any(frames) => {
                let mut frames = lock(frames);
                let pfn = frames.pop();
                self.len.store(length(&frames), Ordering::Relaxed);
                pfn
            }
            Stock::Own => {
                let pfn = u32::try_from(page?.as_u64()).ok().map(Pfn::new)?;
                let one_less = |len: u32| len.checked_sub(1);
                // AcqRel: the memory that a unit stands for was given back before the unit was.
                let taken = self.len.fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_less);
                taken.ok().map(|_| pfn)
            }
        }
    }

    pub(crate) fn push(&self, pfn: Pfn) {
        match &self.stock {
            Stock::Any(frames) => {
                let mut frames = lock(frames);
                frames.push(pfn);
                self.len.store(length(&frames), Ordering::Relaxed);
            }
            Stock::Own => {
                self.len.fetch_add(1, Ordering::AcqRel);
            }
        }
    }
}

fn length(frames: &[Pfn]) -> u32 {
    // The list never holds more than the table's u32 count.
    u32::try_from(frames.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames come and go while somebody asks: it is never less than nothing that is missing.
    #[test]
    fn what_is_missing_is_worked_out_from_one_look() {
        let list = FreeList::new(1024, Placement::Anywhere);
        let around = list.len() - list.high + 1;
        let mut taken: Vec<_> = (0..around).filter_map(|_| list.pop(None)).collect();
        assert_eq!(list.missing(), 1);
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| (0..300_000).map(|_| list.missing()).max());
            while !asker.is_finished() {
                taken.drain(..2).for_each(|pfn| list.push(pfn));
                taken.extend((0..2).filter_map(|_| list.pop(None)));
            }
            let most = asker.join().unwrap();
            assert!(most <= Some(1), "{most:?}");
        });
    }
}
