//! Models of the protocol for the loom model checker, on the code that runs:
//! `RUSTFLAGS="--cfg loom" cargo test --release --lib models`.
//!
//! Each explores every interleaving of its two or three threads with at most
//! [`PREEMPTIONS`] preemptions, under the C11 memory model, and fails on a deadlock too.

use crate::addr::Pfn;
use crate::export_rmap::{
    ClientId, ExportNotifier, FlushReason, FrameTable, Harvest, Invalidation, LockedPage,
    NotifierList, PageFlags, Retain, RevokeError, RmapEntry,
};
use crate::sync::{Arc, AtomicU32, Mutex, Ordering, lock};
use loom::thread;

/// Bound of the search; three found every known mutation of these protocols.
const PREEMPTIONS: usize = 3;

const FRAME: Pfn = Pfn::new(0);

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

#[test]
fn the_page_lock_excludes_and_wakes() {
    check(|| {
        let table = Arc::new(FrameTable::new(1));
        let inside = Arc::new(AtomicU32::new(0));
        let enter = |table: &FrameTable, inside: &AtomicU32| {
            let _page = table.lock(FRAME);
            assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0, "two holders at once");
            inside.fetch_sub(1, Ordering::Relaxed);
        };
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (table, inside) = (table.clone(), inside.clone());
                thread::spawn(move || enter(&table, &inside))
            })
            .collect();
        enter(&table, &inside);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// A client with one SPTE, and a page that is in the frame or not.
struct Machine {
    table: FrameTable,
    mmu: Mutex<()>,
    spte: AtomicU32,
    resident: AtomicU32,
}

const ENTRY: RmapEntry = RmapEntry::new(ClientId::new(1).unwrap(), 7);

impl Machine {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            table: FrameTable::new(1),
            mmu: Mutex::new(()),
            spte: AtomicU32::new(0),
            resident: AtomicU32::new(1),
        })
    }

    /// The fault path of the shadow MMU.
    fn fault(&self) {
        let token = {
            let page = self.table.lock(FRAME);
            if self.resident.load(Ordering::Relaxed) == 0 {
                return;
            }
            page.sequence()
        };
        let _mmu = lock(&self.mmu);
        self.table.rmap_add(FRAME, ENTRY);
        if self.table.must_retry(token) {
            self.table.rmap_remove(FRAME, ENTRY);
            return;
        }
        self.spte.store(1, Ordering::Release);
    }

    /// Eviction, the host's and the client's part.
    fn evict(&self) {
        let page = self.table.lock(FRAME);
        page.begin_invalidation();
        if page.frame().is_exported() {
            let _mmu = lock(&self.mmu);
            self.table.rmap_visit(FRAME, ENTRY.client(), |_| {
                self.spte.swap(0, Ordering::AcqRel);
                Retain::Drop
            });
        }
        self.resident.store(0, Ordering::Relaxed);
    }
}

#[test]
fn a_fault_never_installs_after_the_invalidation_that_overlapped_it() {
    check(|| {
        let machine = Machine::new();
        let other = machine.clone();
        let evictor = thread::spawn(move || other.evict());
        machine.fault();
        evictor.join().unwrap();
        assert_eq!(machine.spte.load(Ordering::Relaxed), 0, "an SPTE outlived its frame");
        let _page = machine.table.lock(FRAME);
        assert!(machine.table.rmap_entries(FRAME).is_empty());
        assert!(!machine.table.get(FRAME).unwrap().is_exported());
    });
}

#[test]
fn a_clients_own_removal_leaves_the_dirty_state_to_the_invalidation() {
    check(|| {
        let machine = Machine::new();
        machine.fault();
        let other = machine.clone();
        // A guest's invlpg of a dirty SPTE: cleared, noted, then out of the reverse map.
        let guest = thread::spawn(move || {
            let _mmu = lock(&other.mmu);
            if other.spte.swap(0, Ordering::AcqRel) == 1 {
                other.table.note_dirty(FRAME);
                other.table.rmap_remove(FRAME, ENTRY);
            }
        });
        let page = machine.table.lock(FRAME);
        page.begin_invalidation();
        let mut harvested = false;
        if page.frame().is_exported() {
            let _mmu = lock(&machine.mmu);
            machine.table.rmap_visit(FRAME, ENTRY.client(), |_| {
                harvested |= machine.spte.swap(0, Ordering::AcqRel) == 1;
                Retain::Drop
            });
        }
        assert!(harvested || page.flags().contains(PageFlags::DIRTY), "a write was lost");
        drop(page);
        guest.join().unwrap();
    });
}

/// Asserts in each call that it is still registered.
struct Alive(AtomicU32);

impl ExportNotifier for Alive {
    fn invalidate_page(&self, _page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        assert_eq!(self.0.load(Ordering::Relaxed), 1, "called after unregister had returned");
        Ok(())
    }
}

#[test]
fn no_call_reaches_a_notifier_after_unregister_has_returned() {
    check(|| {
        let list = Arc::new(NotifierList::default());
        let notifier = Arc::new(Alive(AtomicU32::new(1)));
        let registration = list.register(notifier.clone()).unwrap();
        let walkers = list.clone();
        let walker = thread::spawn(move || {
            walkers.flush(&[FRAME], FlushReason::Invalidated).unwrap();
        });
        list.unregister(registration);
        notifier.0.store(0, Ordering::Relaxed);
        walker.join().unwrap();
    });
}
