//! An export client as the models have it. Stand-in for `shadow_mmu`, which is above this crate, and for
//! the processors below it, which need KVM:
//!
//! | here | stands in for |
//! |---|---|
//! | [`Client::fault`] | `Mmu::fault`, `install`, `install_new`, `upgrade`: one level of tables, one SPTE a page |
//! | `invalidate_page` | the same of `shadow_mmu/client.rs` |
//! | [`Client::remove`] | `Mmu::zap`, at a guest's `invlpg` |
//! | [`Client::touch`] | a guest's instruction: the processor's TLB and table walk, with its way of setting accessed and dirty bits |
//! | `flush` | the zap of the guest view: comes back when no processor is in an instruction that uses an old translation |

use crate::models::host::Host;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::sync::{Arc, AtomicU32, AtomicU64, Mutex, Ordering, lock};
use gnomon_export_rmap::{
    ClientId, ClientLock, ExportNotifier, FlushReason, FrameTable, Gone, Harvest, Invalidation,
    LockedPage, Membership, Retain, RevokeError, RmapEntry, SequenceToken, marks,
};

const PRESENT: u64 = 1 << 0;
pub(super) const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 2;
pub(super) const DIRTY: u64 = 1 << 3;
const FRAME_SHIFT: u32 = 8;

fn frame(entry: u64) -> Pfn {
    Pfn::new(u32::try_from(entry >> FRAME_SHIFT).unwrap())
}

/// A guest with one processor, or with several that share a TLB.
pub(super) struct Client {
    id: ClientId,
    /// The MMU lock.
    mmu: ClientLock<()>,
    /// One for each page of the host.
    pub(super) sptes: Box<[AtomicU64]>,
    /// What the processor caches of them. Locked for the length of an instruction.
    tlb: Mutex<Vec<u64>>,
    /// The word of each page that this client writes.
    word: usize,
    pub(super) unregistered: AtomicU32,
    /// The next flush fails: 1.
    pub(super) refuses: AtomicU32,
}

impl Client {
    pub(super) fn register(host: &Host, pages: usize, word: usize) -> (Arc<Self>, Membership) {
        let reservation = host.notifiers().reserve().unwrap();
        let client = Arc::new(Self {
            id: reservation.id(),
            mmu: ClientLock::new(()),
            sptes: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            tlb: Mutex::new(vec![0; pages]),
            word,
            unregistered: AtomicU32::new(0),
            refuses: AtomicU32::new(0),
        });
        let membership = reservation.register(client.clone());
        (client, membership)
    }

    fn check_registered(&self) {
        let unregistered = self.unregistered.load(Ordering::Relaxed) == 1;
        assert!(!unregistered, "I7: called after unregister had returned");
    }

    fn entry(&self, page: usize) -> RmapEntry {
        RmapEntry::new(self.id, page as u64)
    }

    /// The reverse-map entries that the present SPTEs for a frame ought to have.
    pub(super) fn entries_for(&self, pfn: Pfn) -> Vec<RmapEntry> {
        let maps = |page: &usize| {
            let spte = self.sptes[*page].load(Ordering::Relaxed);
            spte & PRESENT != 0 && frame(spte) == pfn
        };
        (0..self.sptes.len()).filter(maps).map(|page| self.entry(page)).collect()
    }

    /// One read (`write` is `None`) or write by the guest; `None` is a page fault.
    pub(super) fn touch(&self, host: &Host, page: usize, write: Option<u32>) -> Option<u32> {
        let mut tlb = lock(&self.tlb);
        let rights = PRESENT | if write.is_some() { WRITABLE } else { 0 };
        let marks = ACCESSED | if write.is_some() { DIRTY } else { 0 };
        let mut entry = tlb[page];
        if entry & (rights | marks) != rights | marks {
            // Dropped before the walk, as a fault does; the walk marks the SPTE in one step.
            tlb[page] = 0;
            entry = self.sptes[page].load(Ordering::Acquire);
            loop {
                if entry & rights != rights {
                    return None;
                }
                let spte = &self.sptes[page];
                let marked = entry | marks;
                match spte.compare_exchange(entry, marked, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break,
                    Err(now) => entry = now,
                }
            }
            entry |= marks;
            tlb[page] = entry;
        }
        let word = host.word(frame(entry), self.word);
        if let Some(value) = write {
            word.store(value, Ordering::Relaxed);
        }
        Some(word.load(Ordering::Relaxed))
    }

    /// Resolves a fault. Returns how often it started over.
    pub(super) fn fault(&self, host: &Host, page: usize, write: bool) -> u32 {
        let mut retries = 0;
        while !self.try_fault(host, page, write) {
            retries += 1;
        }
        retries
    }

    fn try_fault(&self, host: &Host, page: usize, write: bool) -> bool {
        let locked = if write { host.lock_page_for_write(page) } else { host.lock_page(page) };
        let read_only = locked.is_read_only();
        let token = locked.sequence();
        drop(locked);
        let rights = if read_only { 0 } else { WRITABLE };
        self.install_with(host.table(), page, write, token, rights)
    }

    /// The second half of a fault, which adds so many rights; `false` if it must start over.
    pub(super) fn install_with(
        &self,
        table: &FrameTable,
        page: usize,
        write: bool,
        token: SequenceToken,
        rights: u64,
    ) -> bool {
        let number = token.pfn().index() as u64;
        let marks = ACCESSED | if write { DIRTY } else { 0 };
        let new = (number << FRAME_SHIFT) | PRESENT | rights | marks;
        let mmu = self.mmu.lock();
        let spte = &self.sptes[page];
        if spte.load(Ordering::Acquire) & PRESENT != 0 {
            // The entry is in the reverse map: an invalidation either is seen here or finds it.
            if !table.is_current(&mmu, token) {
                return false;
            }
            let old = marks::grant(spte, new);
            assert_eq!(frame(old), token.pfn(), "I1: the SPTE points to a frame that was lost");
            return true;
        }
        let Some(exported) = table.export(&mmu, token, self.entry(page)) else { return false };
        spte.store(new, Ordering::Release);
        exported.keep();
        true
    }

    /// Gives a mapping up without being asked: clear, flush, and only then out of the reverse map.
    pub(super) fn remove(&self, host: &Host, page: usize) {
        let mmu = self.mmu.lock();
        let old = marks::take(&self.sptes[page]);
        if old & PRESENT == 0 {
            return;
        }
        let gone = Gone { pfn: frame(old), entry: self.entry(page), dirty: old & DIRTY != 0 };
        let flushed = host.table().give_up(&mmu, &[gone], || {
            lock(&self.tlb)[page] = 0;
            Ok::<(), ()>(())
        });
        flushed.unwrap();
    }
}

impl ExportNotifier for Client {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        self.check_registered();
        let mut harvest = Harvest::default();
        let _mmu = self.mmu.lock();
        page.table().rmap_visit(page.pfn(), self.id, |location| {
            let spte = &self.sptes[usize::try_from(location).unwrap()];
            let old = match kind {
                Invalidation::Recall => return Retain::Keep,
                Invalidation::Unmap | Invalidation::Replace(_) => marks::take(spte),
                Invalidation::Clean => marks::restrict(spte, WRITABLE | DIRTY),
            };
            harvest =
                harvest.or(Harvest { dirty: old & DIRTY != 0, accessed: old & ACCESSED != 0 });
            match kind {
                Invalidation::Unmap | Invalidation::Replace(_) => Retain::Drop,
                Invalidation::Clean | Invalidation::Recall => Retain::Keep,
            }
        });
        harvest
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        self.check_registered();
        // A call waits for a fault that is about to take its entry back.
        let _mmu = self.mmu.lock();
        false
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        self.check_registered();
        if reason == FlushReason::Recalled {
            return Ok(());
        }
        if self.refuses.swap(0, Ordering::Relaxed) == 1 {
            let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
            return Err(RevokeError { frames: frames.len(), source });
        }
        for entry in lock(&self.tlb).iter_mut() {
            if *entry & PRESENT != 0 && frames.contains(&frame(*entry)) {
                *entry = 0;
            }
        }
        Ok(())
    }
}
