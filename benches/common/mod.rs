//! An export client made of software SPTEs: no KVM, no TLB.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result};
use gnomon::addr::{Gfn, PAGE_SIZE_U64, Pfn};
use gnomon::export_rmap::{
    ClientId, ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Registration, Retain,
    RevokeError, RmapEntry,
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
    id: OnceLock<ClientId>,
    mmu: Mutex<()>,
    sptes: Vec<AtomicU64>,
    registration: Mutex<Option<Registration>>,
}

impl Client {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.mmu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spte(&self, index: u64) -> &AtomicU64 {
        &self.sptes[usize::try_from(index).unwrap_or(usize::MAX)]
    }

    /// A client of the object's pages.
    pub(crate) fn register(object: &Arc<MemoryObject>) -> Result<Arc<Self>> {
        let client = Arc::new(Self {
            object: object.clone(),
            id: OnceLock::new(),
            mmu: Mutex::new(()),
            sptes: (0..object.bytes() / PAGE_SIZE_U64).map(|_| AtomicU64::new(0)).collect(),
            registration: Mutex::new(None),
        });
        let registration = object.host_mm().notifiers().register(client.clone())?;
        let _ = client.id.set(registration.id());
        *client.registration.lock().unwrap_or_else(PoisonError::into_inner) = Some(registration);
        Ok(client)
    }

    /// Forgets all mappings.
    pub(crate) fn end(&self) {
        self.sptes.iter().for_each(|spte| spte.store(0, Ordering::Relaxed));
        let registration = self.registration.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(registration) = registration {
            self.object.host_mm().notifiers().unregister(registration);
        }
    }

    /// One access; the page is brought in and mapped if need be.
    pub(crate) fn touch(&self, gfn: u64, marks: u64) -> Result<()> {
        let spte = self.spte(gfn);
        while spte.load(Ordering::Acquire) & PRESENT == 0 {
            let page = self.object.lock_page(Gfn::new(gfn))?;
            let (token, pfn) = (page.sequence(), page.pfn());
            drop(page);
            let _mmu = self.lock();
            let table = self.object.host_mm().frame_table();
            let entry = RmapEntry::new(*self.id.get().context("not registered")?, gfn);
            table.rmap_add(pfn, entry);
            if table.must_retry(token) {
                table.rmap_remove(pfn, entry);
            } else {
                spte.store(PRESENT, Ordering::Release);
            }
        }
        spte.fetch_or(marks, Ordering::AcqRel);
        Ok(())
    }

    fn visit(&self, page: &LockedPage<'_>, mut visit: impl FnMut(&AtomicU64) -> Retain) {
        let _mmu = self.lock();
        if let Some(&id) = self.id.get() {
            page.table().rmap_visit(page.pfn(), id, |location| visit(self.spte(location)));
        }
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
