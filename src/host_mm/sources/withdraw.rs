//! Withdrawal: mappings go, and the pages stay where they are.

use crate::addr::Gfn;
use crate::export_rmap::Invalidation;
use crate::host_mm::books::find::Candidate;
use crate::host_mm::error::{MmError, require_notifier};
use crate::host_mm::memory::object::MemoryObject;
use crate::host_mm::object::pages::{ObjectPages, Place};
use crate::host_mm::revoke::Revoker;
use crate::host_mm::revoke::batch::{DetachedBatch, add_to_batch};

impl MemoryObject {
    /// Takes all mappings of `count` pages from `first` away from the clients; the pages stay where
    /// they are. For a client whose mappings are gone already, to bring the books in line.
    ///
    /// # Errors
    /// If a client cannot give a page up; pages before it have been.
    pub fn withdraw_mappings(&self, first: Gfn, count: u64) -> Result<(), MmError> {
        withdraw(&self.mm.pager, &self.pages, first, count)
    }
}

fn withdraw(of: &Revoker, object: &ObjectPages, first: Gfn, count: u64) -> Result<(), MmError> {
    require_notifier("to withdraw mappings")?;
    let withdraw = |batch: &mut Vec<Candidate<'_>>| {
        let batch = std::mem::take(batch);
        DetachedBatch::detach(of, batch, Invalidation::Unmap).revoke()?;
        Ok(())
    };
    let mut batch = Vec::new();
    for raw in first.as_u64()..first.as_u64().saturating_add(count) {
        let gfn = Gfn::new(raw);
        let Some(entry) = object.touched_entry(gfn) else { continue };
        while let Place::Frame(pfn) = entry.load() {
            if add_to_batch(of, object, gfn, pfn, &mut batch, withdraw)? {
                break;
            }
        }
    }
    withdraw(&mut batch)
}
