//! An export client made of software SPTEs: no KVM, no TLB.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use gnomon::addr::{Gfn, PAGE_SIZE_U64, Pfn};
use gnomon::export_rmap::{
    ClientId, ClientLock, ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage,
    Membership, Retain, RevokeError, RmapEntry,
};
use gnomon::host_mm::MemoryObject;

const PRESENT: u64 = 1;
/// Mark of an access.
pub(crate) const ACCESSED: u64 = 1 << 1;
/// Mark of a write.
pub(crate) const DIRTY: u64 = 1 << 2;

/// Maps each guest frame at most once; the processor has no TLB.
pub(crate) struct Client {
    object: Arc<MemoryObject>,
    id: ClientId,
    mmu: ClientLock<()>,
    sptes: Vec<AtomicU64>,
    membership: Mutex<Option<Membership>>,
}

impl Client {
    fn spte(&self, index: u64) -> &AtomicU64 {
        &self.sptes[usize::try_from(index).unwrap_or(usize::MAX)]
    }

    /// A client of the object's pages.
    pub(crate) fn register(object: &Arc<MemoryObject>) -> Result<Arc<Self>> {
        let reservation = object.host_mm().notifiers().reserve()?;
        let client = Arc::new(Self {
            object: object.clone(),
            id: reservation.id(),
            mmu: ClientLock::new(()),
            sptes: (0..object.bytes() / PAGE_SIZE_U64).map(|_| AtomicU64::new(0)).collect(),
            membership: Mutex::new(None),
        });
        let membership = reservation.register(client.clone());
        *client.membership.lock().unwrap_or_else(PoisonError::into_inner) = Some(membership);
        Ok(client)
    }

    /// Forgets all mappings.
    pub(crate) fn end(&self) {
        self.sptes.iter().for_each(|spte| spte.store(0, Ordering::Relaxed));
        drop(self.membership.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// One access; the page is brought in and mapped if need be.
    pub(crate) fn touch(&self, gfn: u64, marks: u64) -> Result<()> {
        let spte = self.spte(gfn);
        while spte.load(Ordering::Acquire) & PRESENT == 0 {
            let page = self.object.lock_page(Gfn::new(gfn))?;
            let token = page.sequence();
            drop(page);
            let mmu = self.mmu.lock();
            let table = self.object.host_mm().frame_table();
            if let Some(exported) = table.export(&mmu, token, RmapEntry::new(self.id, gfn)) {
                spte.store(PRESENT, Ordering::Release);
                exported.keep();
            }
        }
        spte.fetch_or(marks, Ordering::AcqRel);
        Ok(())
    }

    fn visit(&self, page: &LockedPage<'_>, mut visit: impl FnMut(&AtomicU64) -> Retain) {
        let _mmu = self.mmu.lock();
        page.table().rmap_visit(page.pfn(), self.id, |location| visit(self.spte(location)));
    }
}

impl ExportNotifier for Client {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let mut harvest = Harvest::default();
        self.visit(page, |spte| {
            let (old, retain) = match kind {
                Invalidation::Unmap | Invalidation::Replace(_) => {
                    (spte.swap(0, Ordering::AcqRel), Retain::Drop)
                }
                // Nothing is lent here.
                Invalidation::Recall => return Retain::Keep,
                Invalidation::Clean => (spte.fetch_and(!DIRTY, Ordering::AcqRel), Retain::Keep),
            };
            harvest.dirty |= old & DIRTY != 0;
            harvest.accessed |= old & ACCESSED != 0;
            retain
        });
        harvest
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        self.visit(page, |spte| {
            accessed |= spte.fetch_and(!ACCESSED, Ordering::AcqRel) & ACCESSED != 0;
            Retain::Keep
        });
        accessed
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        Ok(())
    }
}
