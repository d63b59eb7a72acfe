//! An export client without KVM: one software SPTE for each guest frame, and processors with TLBs
//! that go on using what they have cached until a flush takes it from them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vm_memory::{Bytes, VolatileMemory};

use crate::{GuestView, MemoryObject, MmError};
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, Pfn, SwapSlot};
use gnomon_export_rmap::sync::lock;
use gnomon_export_rmap::{
    ClientId, ClientLock, ExportNotifier, FlushReason, Gone, Harvest, Invalidation, LockedPage,
    Retain, RevokeError, RmapEntry, SequenceToken,
};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const ADDRESS: u64 = !0xfff;

pub(super) type Page = [u8; PAGE_SIZE];

/// What happened, in the order in which it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Invalidated(Pfn, Invalidation),
    Flushed(Vec<Pfn>, FlushReason),
    SwapWritten(SwapSlot),
}

/// A log that the client and the swap back end share.
#[derive(Debug, Default)]
pub(super) struct Log(Mutex<Vec<Event>>);

impl Log {
    pub(super) fn push(&self, event: Event) {
        lock(&self.0).push(event);
    }

    /// The events since the last call.
    pub(super) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut lock(&self.0))
    }
}

/// What a processor has cached: SPTEs by guest frame.
type Tlb = HashMap<u64, u64>;

pub(super) struct FakeClient {
    object: Arc<MemoryObject>,
    view: GuestView,
    id: ClientId,
    mmu: ClientLock<()>,
    sptes: Box<[AtomicU64]>,
    processors: Box<[Mutex<Tlb>]>,
    log: Arc<Log>,
    /// Frames that were invalidated and not flushed since.
    unflushed: Mutex<HashSet<Pfn>>,
    /// What the count of each frame's invalidations was when it was seen last.
    counts: Mutex<HashMap<Pfn, SequenceToken>>,
    /// Frames that were given to a page although they had not been flushed, pages whose lock was free
    /// during their flush, and calls for a page whose invalidation had not begun.
    pub(super) broken_promises: AtomicU64,
    pub(super) flush_fails: AtomicBool,
    /// What overtakes the next fault between its look at the page and its install.
    overtaking: Mutex<Option<Overtaking>>,
    /// What a processor writes in the last moment in which it may: page and content.
    last_write: Mutex<Option<(Gfn, Page)>>,
    /// A fault installs although it was overtaken: the rule broken.
    pub(super) installs_late: AtomicBool,
}

type Overtaking = Box<dyn FnOnce() + Send>;

impl FakeClient {
    pub(super) fn new(
        id: ClientId,
        object: Arc<MemoryObject>,
        processors: usize,
        log: Arc<Log>,
    ) -> Self {
        let sptes = object.bytes() / PAGE_SIZE as u64;
        Self {
            view: object.host_mm().map_guest_view().unwrap(),
            object,
            id,
            mmu: ClientLock::default(),
            sptes: (0..sptes).map(|_| AtomicU64::new(0)).collect(),
            processors: (0..processors).map(|_| Mutex::default()).collect(),
            log,
            unflushed: Mutex::default(),
            counts: Mutex::default(),
            broken_promises: AtomicU64::new(0),
            flush_fails: AtomicBool::new(false),
            overtaking: Mutex::default(),
            last_write: Mutex::default(),
            installs_late: AtomicBool::new(false),
        }
    }

    /// Lets `what` happen in the middle of the next fault.
    pub(super) fn overtake_next_fault(&self, what: impl FnOnce() + Send + 'static) {
        *lock(&self.overtaking) = Some(Box::new(what));
    }

    /// Lets processor 0 write a page as the next flush begins, through what it has cached.
    pub(super) fn write_at_next_flush(&self, gfn: Gfn, page: Page) {
        *lock(&self.last_write) = Some((gfn, page));
    }

    /// Whether the write that was to come has been made.
    pub(super) fn has_written_last(&self) -> bool {
        lock(&self.last_write).is_none()
    }

    fn write_last(&self) {
        let mut last_write = lock(&self.last_write);
        let Some((gfn, page)) = last_write.as_ref() else { return };
        let cached = lock(&self.processors[0]).get(&gfn.as_u64()).copied().unwrap_or(0);
        if cached & (WRITABLE | DIRTY) == WRITABLE | DIRTY {
            let offset = usize::try_from(cached & ADDRESS).unwrap();
            self.view.region().as_volatile_slice().write_slice(page, offset).unwrap();
            *last_write = None;
        }
    }

    /// Notes the count of a locked page's frame; whether it has changed since.
    fn note_count(&self, page: &LockedPage<'_>) -> bool {
        let now = page.sequence();
        lock(&self.counts).insert(page.pfn(), now) != Some(now)
    }

    fn spte(&self, gfn: Gfn) -> &AtomicU64 {
        &self.sptes[usize::try_from(gfn.as_u64()).unwrap()]
    }

    /// A load of the whole page by a processor.
    pub(super) fn read(&self, processor: usize, gfn: Gfn) -> Result<Page, MmError> {
        let (_running, offset) = self.translate(processor, gfn, false)?;
        let mut page = [0; PAGE_SIZE];
        let memory = self.view.region().as_volatile_slice();
        memory.read_slice(&mut page, offset).unwrap();
        Ok(page)
    }

    /// A store of the whole page by a processor.
    pub(super) fn write(&self, processor: usize, gfn: Gfn, page: &Page) -> Result<(), MmError> {
        let (_running, offset) = self.translate(processor, gfn, true)?;
        let memory = self.view.region().as_volatile_slice();
        memory.write_slice(page, offset).unwrap();
        Ok(())
    }

    /// Whether a processor could use a translation of the page without asking anybody.
    pub(super) fn is_cached(&self, processor: usize, gfn: Gfn) -> bool {
        lock(&self.processors[processor]).contains_key(&gfn.as_u64())
    }

    pub(super) fn is_mapped(&self, gfn: Gfn) -> bool {
        self.spte(gfn).load(Ordering::Acquire) != 0
    }

    /// Frames that were invalidated and not flushed since.
    pub(super) fn unflushed(&self) -> usize {
        lock(&self.unflushed).len()
    }

    /// Byte offset of the page in the view. While the guard lives, the processor is in the middle
    /// of the access, and a flush waits for it as an inter-processor interrupt would.
    fn translate(
        &self,
        processor: usize,
        gfn: Gfn,
        write: bool,
    ) -> Result<(MutexGuard<'_, Tlb>, usize), MmError> {
        loop {
            let mut tlb = lock(&self.processors[processor]);
            if let Some(spte) = self.look_up(&mut tlb, gfn, write) {
                return Ok((tlb, usize::try_from(spte & ADDRESS).unwrap()));
            }
            drop(tlb);
            self.fault(gfn, write)?;
        }
    }

    /// The TLB, then the table; as a processor does, A and D are set in one step or not at all.
    fn look_up(&self, tlb: &mut Tlb, gfn: Gfn, write: bool) -> Option<u64> {
        let (rights, marks) =
            if write { (PRESENT | WRITABLE, ACCESSED | DIRTY) } else { (PRESENT, ACCESSED) };
        let cached = tlb.get(&gfn.as_u64()).copied().unwrap_or(0);
        if cached & (rights | marks) == rights | marks {
            return Some(cached);
        }
        let spte = self.spte(gfn);
        loop {
            let old = spte.load(Ordering::Acquire);
            if old & rights != rights {
                return None;
            }
            let new = old | marks;
            if spte.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                tlb.insert(gfn.as_u64(), new);
                return Some(new);
            }
        }
    }

    fn fault(&self, gfn: Gfn, write: bool) -> Result<(), MmError> {
        loop {
            let page = if write {
                self.object.lock_page_for_write(gfn)?
            } else {
                self.object.lock_page(gfn)?
            };
            let read_only = page.is_read_only();
            let writable = if read_only { 0 } else { WRITABLE };
            let token = page.sequence();
            self.note_count(&page);
            let (table, pfn) = (self.object.host_mm().frame_table(), page.pfn());
            // Nobody can be in the middle of taking a frame whose page lock is ours.
            if lock(&self.unflushed).contains(&pfn) {
                self.broken_promises.fetch_add(1, Ordering::Relaxed);
            }
            drop(page);
            let overtaking = lock(&self.overtaking).take();
            if let Some(overtaking) = overtaking {
                overtaking();
            }
            let mmu = self.mmu.lock();
            let late = self.installs_late.load(Ordering::Relaxed);
            let spte = self.spte(gfn);
            let old = spte.load(Ordering::Acquire);
            if old & PRESENT != 0 {
                if !table.is_current(&mmu, token) && !late {
                    continue;
                }
                if old & ADDRESS != pfn.byte_offset() {
                    // The page was given a place while its old mapping stood.
                    self.broken_promises.fetch_add(1, Ordering::Relaxed);
                }
                if write {
                    spte.fetch_or(WRITABLE, Ordering::AcqRel);
                }
                return Ok(());
            }
            let entry = RmapEntry::new(self.id, gfn.as_u64());
            let exported = table.export(&mmu, token, entry);
            if exported.is_none() {
                if !late {
                    continue;
                }
                gnomon_export_rmap::bare_entries::add_entry(table, pfn, entry);
            }
            // Writable from the start: whether it was written, the dirty bit alone tells.
            spte.store(pfn.byte_offset() | PRESENT | writable, Ordering::Release);
            if let Some(exported) = exported {
                exported.keep();
            }
            return Ok(());
        }
    }

    /// Gives up every mapping; the processors have stopped.
    pub(super) fn forget_everything(&self) {
        let mmu = self.mmu.lock();
        let table = self.object.host_mm().frame_table();
        for (index, spte) in self.sptes.iter().enumerate() {
            let old = spte.swap(0, Ordering::AcqRel);
            if old & PRESENT != 0 {
                let pfn = Pfn::new(u32::try_from((old & ADDRESS) / PAGE_SIZE as u64).unwrap());
                let entry = RmapEntry::new(self.id, index as u64);
                assert!(table.rmap_contains(pfn, entry));
                table.give_up_uncached(&mmu, &[Gone { pfn, entry, dirty: old & DIRTY != 0 }]);
            }
        }
        for processor in &self.processors {
            lock(processor).clear();
        }
    }
}

impl ExportNotifier for FakeClient {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        // A fault that has looked at the page must find that out before it is told of here.
        if !self.note_count(page) {
            self.broken_promises.fetch_add(1, Ordering::Relaxed);
        }
        if kind == Invalidation::Recall {
            // It has mappings and no copies.
            return Harvest::default();
        }
        let _mmu = self.mmu.lock();
        let mut harvest = Harvest::default();
        page.table().rmap_visit(page.pfn(), self.id, |location| {
            let spte = self.spte(Gfn::new(location));
            if let Invalidation::Replace(owner) = kind
                && (owner.object != self.object.number() || owner.gfn != Gfn::new(location))
            {
                return Retain::Keep;
            }
            let (old, retain) = match kind {
                Invalidation::Unmap | Invalidation::Replace(_) => {
                    (spte.swap(0, Ordering::AcqRel), Retain::Drop)
                }
                Invalidation::Clean | Invalidation::Recall => {
                    (spte.fetch_and(!(WRITABLE | DIRTY), Ordering::AcqRel), Retain::Keep)
                }
            };
            harvest.dirty |= old & DIRTY != 0;
            harvest.accessed |= old & ACCESSED != 0;
            retain
        });
        self.log.push(Event::Invalidated(page.pfn(), kind));
        lock(&self.unflushed).insert(page.pfn());
        harvest
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let _mmu = self.mmu.lock();
        let mut accessed = false;
        page.table().rmap_visit(page.pfn(), self.id, |location| {
            let old = self.spte(Gfn::new(location)).fetch_and(!ACCESSED, Ordering::AcqRel);
            accessed |= old & ACCESSED != 0;
            Retain::Keep
        });
        accessed
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        self.log.push(Event::Flushed(frames.to_vec(), reason));
        if self.flush_fails.load(Ordering::Relaxed) {
            return Err(RevokeError {
                frames: frames.len(),
                source: std::io::Error::from_raw_os_error(libc::ENOMEM),
            });
        }
        self.write_last();
        let gone: HashSet<u64> = frames.iter().map(|pfn| pfn.byte_offset()).collect();
        for processor in &self.processors {
            lock(processor).retain(|_, spte| !gone.contains(&(*spte & ADDRESS)));
        }
        if reason == FlushReason::Invalidated {
            let table = self.object.host_mm().frame_table();
            for &pfn in frames {
                if table.try_lock(pfn).is_some() {
                    self.broken_promises.fetch_add(1, Ordering::Relaxed);
                }
                lock(&self.unflushed).remove(&pfn);
            }
        }
        Ok(())
    }
}
