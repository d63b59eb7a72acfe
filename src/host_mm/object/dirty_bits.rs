//! One bit a page of a memory object: it was written, and no frame says so.
//!
//! Guarantee: who finds a bit finds the write that it was set for.

use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64};
use gnomon_export_rmap::sync::{AtomicU64, Ordering};

/// One bit a page: written since the log took it last, and not in a frame that says so itself.
#[derive(Debug)]
pub(crate) struct DirtyBits(Box<[AtomicU64]>);

impl DirtyBits {
    pub(crate) fn new(bytes: u64) -> Self {
        Self((0..bytes.div_ceil(64 * PAGE_SIZE_U64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, gfn: Gfn) -> Option<(&AtomicU64, u64)> {
        let index = usize::try_from(gfn.as_u64() / 64).ok()?;
        Some((self.0.get(index)?, 1 << (gfn.as_u64() % 64)))
    }

    pub(crate) fn set(&self, gfn: Gfn) {
        if let Some((word, bit)) = self.word(gfn) {
            // Release pairs with the Acquire in `take`: who finds the bit finds the write.
            word.fetch_or(bit, Ordering::Release);
        }
    }

    pub(crate) fn take(&self, gfn: Gfn) -> bool {
        self.word(gfn).is_some_and(|(word, bit)| {
            word.load(Ordering::Relaxed) & bit != 0
                && word.fetch_and(!bit, Ordering::Acquire) & bit != 0
        })
    }

    /// All pages count as written.
    pub(crate) fn set_all(&self) {
        for word in &self.0 {
            word.store(u64::MAX, Ordering::Relaxed);
        }
    }
}
