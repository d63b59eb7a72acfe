//! The guest view: the frames' memory as a guest's KVM sees it, and the means to revoke frames.
//!
//! Guarantee: when [`GuestView::revoke`] has returned, no vCPU uses a translation of these frames
//! that it had before. KVM's own MMU notifier gives it: dropping the page-table entries of the
//! memslot's mapping makes KVM drop its own and flush every vCPU, whether it shadows our tables in
//! software or uses nested paging. Content is not touched.

use std::io;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::host_view::{self, HostView};
use crate::error::MmError;
use crate::hooks::interrupted_or;
use gnomon_export_rmap::RevokeError;
use gnomon_export_rmap::addr::{PAGE_SIZE, Pfn};
use gnomon_export_rmap::lab::Lab;
use gnomon_sys::memory::{self, ProcessMadvise};

/// A mapping of all frames, to be given to KVM as a memslot.
#[derive(Clone, Debug)]
pub struct GuestView {
    region: Arc<MmapRegion>,
    process_madvise: Arc<ProcessMadvise>,
    lab: Lab,
}

impl GuestView {
    pub(crate) fn new(view: &HostView, lab: Lab) -> Result<Self, MmError> {
        Ok(Self {
            region: Arc::new(host_view::map(view.memfd(), view.bytes())?),
            process_madvise: Arc::new(ProcessMadvise::probe()),
            lab,
        })
    }

    /// The mapping.
    #[must_use]
    pub fn region(&self) -> &Arc<MmapRegion> {
        &self.region
    }

    /// Takes frames away from every vCPU: one call a run of neighbours, or one vectored call for
    /// all runs where the kernel has it.
    ///
    /// # Errors
    /// If the kernel refuses; the frames must then not be reused.
    pub fn revoke(&self, frames: &[Pfn]) -> Result<(), RevokeError> {
        let runs = page_runs(frames.iter().map(|pfn| pfn.index()));
        let revoked = loop {
            match interrupted_or(&self.lab, || self.discard(&runs)) {
                // A signal says nothing about the frames, and what is dropped twice is dropped.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        revoked.map_err(|source| RevokeError { frames: frames.len(), source })
    }

    /// Takes `count` frames from `first` away from the mapping, by one call that is made once: whoever
    /// is told of it (a userfaultfd) is told once.
    ///
    /// # Errors
    /// The errno of `madvise`. Nothing is injected: this call cannot be repeated.
    pub fn discard_once(&self, first: Pfn, count: usize) -> io::Result<()> {
        memory::discard(&self.region, first.index() * PAGE_SIZE, count * PAGE_SIZE)
    }

    fn discard(&self, runs: &[(usize, usize)]) -> io::Result<()> {
        match runs {
            [] => Ok(()),
            [(offset, len)] => memory::discard(&self.region, *offset, *len),
            runs => memory::discard_scattered(&self.region, runs, &self.process_madvise),
        }
    }
}

/// Pages of a mapping, by number, as (byte offset, length in bytes) of runs of neighbours, ascending.
pub fn page_runs(numbers: impl IntoIterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut sorted: Vec<usize> = numbers.into_iter().collect();
    sorted.sort_unstable();
    sorted.dedup();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in sorted {
        let offset = number * PAGE_SIZE;
        match runs.last_mut() {
            Some((start, len)) if *start + *len == offset => *len += PAGE_SIZE,
            _ => runs.push((offset, PAGE_SIZE)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_make_one_run_in_any_order() {
        assert_eq!(
            page_runs([5, 3, 9, 4, 3]),
            [(3 * PAGE_SIZE, 3 * PAGE_SIZE), (9 * PAGE_SIZE, PAGE_SIZE)]
        );
        assert!(page_runs([]).is_empty());
    }
}
