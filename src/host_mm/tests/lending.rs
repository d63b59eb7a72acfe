//! Pages lent as copies: nobody writes one before its copies are recalled, and whatever takes the
//! page away tells those who hold copies.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::client::Page;
use super::rig::Rig;
use crate::hooks::SKIP_RECALL;
use crate::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, Merged, MmError};
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, Pfn};
use gnomon_export_rmap::sync::lock;
use gnomon_export_rmap::{
    ClientId, ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Membership, Owner,
    PageFlags, Retain, RevokeError, RmapEntry,
};

/// A client that holds copies, by page.
#[derive(Default)]
struct Copies {
    id: std::sync::OnceLock<ClientId>,
    /// Object and page of each copy, and its content until the flush.
    held: Mutex<BTreeMap<u64, (Owner, Box<Page>)>>,
    told: Mutex<Vec<Invalidation>>,
    flush_fails: AtomicBool,
}

impl ExportNotifier for Copies {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        lock(&self.told).push(kind);
        let mut held = lock(&self.held);
        page.table().rmap_visit(page.pfn(), *self.id.get().unwrap(), |slot| match kind {
            Invalidation::Clean => Retain::Keep,
            Invalidation::Replace(owner) if held[&slot].0 != owner => Retain::Keep,
            _ => {
                held.remove(&slot);
                Retain::Drop
            }
        });
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        if self.flush_fails.load(Ordering::Relaxed) {
            let source = std::io::ErrorKind::OutOfMemory.into();
            return Err(RevokeError { frames: frames.len(), source });
        }
        Ok(())
    }
}

struct Lender {
    mm: Arc<HostMm>,
    copies: Arc<Copies>,
    // Last: nothing is held by then.
    _membership: Membership,
}

impl Lender {
    fn new(mm: &Arc<HostMm>) -> Self {
        let copies = Arc::new(Copies::default());
        let _membership = mm.notifiers().register(copies.clone()).unwrap();
        copies.id.set(_membership.id()).unwrap();
        Self { mm: mm.clone(), copies, _membership }
    }

    /// Lends pages into the slots from `slot` on.
    fn lend(&self, object: &MemoryObject, gfns: &[Gfn], slot: u64) {
        object
            .lend_pages(gfns, |gfn, page, content| {
                let at = gfns.iter().position(|&other| other == gfn).unwrap() as u64;
                let owner = Owner { object: object.number(), gfn };
                let entry = RmapEntry::new(*self.copies.id.get().unwrap(), slot + at);
                gnomon_export_rmap::bare_entries::add_entry(page.table(), page.pfn(), entry);
                lock(&self.copies.held).insert(slot + at, (owner, Box::new(*content)));
            })
            .unwrap();
    }

    fn content(&self, slot: u64) -> Option<Page> {
        lock(&self.copies.held).get(&slot).map(|(_, content)| **content)
    }

    fn told(&self) -> Vec<Invalidation> {
        std::mem::take(&mut lock(&self.copies.told))
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        let id = *self.copies.id.get().unwrap();
        for pfn in (0..self.mm.frame_count()).map(Pfn::new) {
            self.mm.frame_table().rmap_visit(pfn, id, |_| Retain::Drop);
        }
    }
}

const ONE: Gfn = Gfn::new(1);
const TWO: Gfn = Gfn::new(2);

fn page(byte: u8) -> Page {
    [byte; PAGE_SIZE]
}

fn config() -> HostMmConfig {
    HostMmConfig { check_evictions: true, ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES) }
}

#[test]
fn a_guest_that_writes_a_lent_page_recalls_it_first() {
    let rig = Rig::new(config(), 8);
    let lender = Lender::new(&rig.mm);
    rig.client.write(0, ONE, &page(1)).unwrap();
    lender.lend(&rig.object, &[ONE], 0);
    assert_eq!(lender.told(), [Invalidation::Clean], "nobody may write it any more");
    assert_eq!(lender.content(0), Some(page(1)), "what a cached translation wrote, too");
    assert_eq!(rig.client.read(1, ONE).unwrap(), page(1), "reads go on");
    assert!(lender.content(0).is_some(), "and recall nothing");
    rig.client.write(0, ONE, &page(2)).unwrap();
    assert_eq!(lender.content(0), None);
    assert_eq!(lender.told(), [Invalidation::Recall]);
    assert_eq!((rig.mm.stats().lent, rig.mm.stats().recalls), (1, 1));
    rig.client.write(1, ONE, &page(3)).unwrap();
    rig.host_write(ONE, &page(4));
    assert_eq!(rig.mm.stats().recalls, 1, "nothing is out any more");
    lender.lend(&rig.object, &[ONE], 0);
    rig.host_write(ONE, &page(5));
    assert_eq!(lender.content(0), None, "the hypervisor's own writes recall, too");
    rig.assert_sound();
}

/// The rule at work: no write gets in between what two copies held at once say.
#[test]
fn sabotage_skip_recall_lets_a_page_change_under_a_copy() {
    for sabotage in [None, Some(SKIP_RECALL)] {
        let rig = Rig::new(HostMmConfig { sabotage, ..config() }, 8);
        let lender = Lender::new(&rig.mm);
        rig.client.write(0, ONE, &page(1)).unwrap();
        lender.lend(&rig.object, &[ONE], 0);
        rig.client.write(0, ONE, &page(2)).unwrap();
        let is_stale = lender.content(0).is_some_and(|copy| copy != rig.host_read(ONE));
        assert_eq!(is_stale, sabotage.is_some());
    }
}

#[test]
fn what_takes_a_page_away_takes_its_copies() {
    let rig = Rig::new(config(), 8);
    let lender = Lender::new(&rig.mm);
    rig.client.write(0, ONE, &page(1)).unwrap();
    lender.lend(&rig.object, &[ONE], 0);
    rig.clean(ONE);
    assert_eq!(lender.content(0), Some(page(1)), "a copy is as good as a read-only mapping");
    rig.evict(ONE);
    assert_eq!(lender.content(0), None);
    lender.lend(&rig.object, &[ONE], 0);
    assert_eq!(lender.content(0), Some(page(1)), "back from swap");
    let pfn = rig.frame(ONE).unwrap();
    assert_eq!(rig.mm.migrate_frames(&[pfn]).unwrap(), 1);
    assert_eq!(lender.content(0), None);
    let new = rig.mm.frame_table().lock(rig.frame(ONE).unwrap());
    assert!(!new.flags().contains(PageFlags::LENT), "of the new frame nothing is out");
    drop(new);
    lender.lend(&rig.object, &[ONE], 0);
    rig.object.free_pages(ONE, 1).unwrap();
    assert_eq!(lender.content(0), None);
    rig.assert_sound();
}

/// Also by a mapping that is made after the copies were.
#[test]
fn a_lent_page_is_mapped_read_only() {
    let rig = Rig::new(config(), 8);
    let lender = Lender::new(&rig.mm);
    rig.host_write(ONE, &page(1));
    lender.lend(&rig.object, &[ONE], 0);
    assert_eq!(rig.client.read(0, ONE).unwrap(), page(1));
    assert!(lender.content(0).is_some());
    rig.client.write(0, ONE, &page(2)).unwrap();
    assert_eq!(lender.content(0), None);
    assert_eq!(rig.mm.stats().recalls, 1);
    rig.assert_sound();
}

/// A page whose copies are out and which is cleaned: they stay, and the next write recalls them all the
/// same. So it is with one that was to be evicted and could not be flushed.
#[test]
fn what_leaves_a_page_where_it_is_leaves_its_copies_to_be_recalled() {
    for evicted in [false, true] {
        let rig = Rig::new(config(), 8);
        let lender = Lender::new(&rig.mm);
        rig.client.write(0, ONE, &page(1)).unwrap();
        lender.lend(&rig.object, &[ONE], 0);
        let pfn = rig.frame(ONE).unwrap();
        if evicted {
            lender.copies.flush_fails.store(true, Ordering::Relaxed);
            rig.mm.evict_frames(&[pfn]).unwrap_err();
            lender.copies.flush_fails.store(false, Ordering::Relaxed);
        } else {
            rig.clean(ONE);
        }
        lender.told();
        let before = rig.mm.stats().recalls;
        rig.client.write(0, ONE, &page(2)).unwrap();
        assert_eq!(rig.mm.stats().recalls, before + 1, "evicted: {evicted}");
        assert_eq!(lender.content(0), None, "evicted: {evicted}");
        rig.assert_sound();
    }
}

#[test]
fn pages_that_were_never_touched_are_lent_as_zeros() {
    let rig = Rig::new(config(), 64);
    let lender = Lender::new(&rig.mm);
    // They share sixteen frames, so the batch has to let go of some to get at others.
    let all: Vec<Gfn> = (0..64).map(Gfn::new).collect();
    lender.lend(&rig.object, &all, 0);
    assert!((0..64).all(|slot| lender.content(slot) == Some(page(0))));
    rig.client.write(0, ONE, &page(1)).unwrap();
    assert_eq!(lender.content(1), None);
    assert!((2..64).all(|slot| lender.content(slot).is_some()), "others share the old frame");
    rig.assert_sound();
}

#[test]
fn of_a_shared_page_only_the_writers_copy_goes() {
    let rig = Rig::new(config(), 8);
    let lender = Lender::new(&rig.mm);
    rig.client.write(0, ONE, &page(1)).unwrap();
    lender.lend(&rig.object, &[ONE], 0);
    let clone = rig.object.copy_on_write_clone().unwrap();
    assert_eq!(lender.content(0), Some(page(1)), "sharing changes nothing");
    lender.lend(&clone, &[ONE], 10);
    rig.host_write(ONE, &page(2));
    assert_eq!((lender.content(0), lender.content(10)), (None, Some(page(1))));
    // The last user of the shared page gets the frame, and with it the flag.
    clone.write(ONE.base(), &page(3)).unwrap();
    assert_eq!(rig.mm.stats().cow_reuses, 1);
    assert_eq!(lender.content(10), None);
    assert!(lender.told().contains(&Invalidation::Recall));
    rig.assert_sound();
}

#[test]
fn a_copy_of_one_of_two_merged_pages_stays() {
    let rig = Rig::new(config(), 8);
    let lender = Lender::new(&rig.mm);
    rig.host_write(ONE, &page(7));
    rig.host_write(TWO, &page(7));
    lender.lend(&rig.object, &[ONE, TWO], 0);
    let frames = [rig.frame(ONE).unwrap(), rig.frame(TWO).unwrap()];
    assert_eq!(rig.mm.merge_frames(frames[0], frames[1]).unwrap(), Merged::Yes);
    let left: Vec<u64> = (0..2).filter(|&slot| lender.content(slot).is_some()).collect();
    assert_eq!(left.len(), 1, "of the one whose frame stayed");
    rig.host_write(ONE, &page(8));
    rig.host_write(TWO, &page(9));
    assert_eq!((lender.content(0), lender.content(1)), (None, None));
    rig.assert_sound();
}

#[test]
fn a_copy_that_cannot_be_revoked_keeps_the_page_from_being_written() {
    let rig = Rig::new(config(), 8);
    let lender = Lender::new(&rig.mm);
    rig.host_write(ONE, &page(1));
    lender.lend(&rig.object, &[ONE], 0);
    lender.copies.flush_fails.store(true, Ordering::Relaxed);
    assert!(rig.object.write(ONE.base(), &page(2)).is_err());
    assert!(rig.object.write(ONE.base(), &page(2)).is_err(), "nor the second time");
    assert_eq!(rig.host_read(ONE), page(1));
    lender.copies.flush_fails.store(false, Ordering::Relaxed);
    rig.host_write(ONE, &page(2));
    assert_eq!(rig.host_read(ONE), page(2));
}

#[test]
fn pages_outside_are_not_lent() {
    let rig = Rig::new(config(), 8);
    let outside = rig.object.lend_pages(&[Gfn::new(8)], |_, _, _| panic!("lent"));
    assert!(matches!(outside, Err(MmError::OutsideMemory { .. })));
}

/// Copies and the guest's pages, with everything at once that may happen to them.
#[test]
fn copies_are_what_the_pages_are_while_everything_happens() {
    const PAGES: u64 = 24;
    let rig = Rig::new(config(), PAGES);
    let lender = Lender::new(&rig.mm);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for processor in 0..2usize {
            let (rig, is_over) = (&rig, &is_over);
            scope.spawn(move || {
                for round in 0..u64::MAX {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    // Each page has one writer.
                    let gfn = Gfn::new(round * 7 % (PAGES / 2) * 2 + processor as u64);
                    let byte = u8::try_from(round % 250 + 1).unwrap();
                    rig.client.write(processor, gfn, &page(byte)).unwrap();
                }
            });
        }
        scope.spawn(|| {
            let frames = rig.all_frames();
            while !is_over.load(Ordering::Relaxed) {
                let _ = rig.mm.evict_frames(&frames[..32]);
                let _ = rig.mm.clean_frames(&frames[..64]);
            }
        });
        let mut compared = 0u32;
        for round in 0..u64::MAX {
            let (slot, gfn) = (round % PAGES, Gfn::new(round % PAGES));
            if lender.content(slot).is_none() {
                lender.lend(&rig.object, &[gfn], slot);
            }
            // While the page lock is held neither page nor copy can change.
            let locked = rig.object.lock_page(gfn).unwrap();
            if let Some(copy) = lender.content(slot) {
                let mut now = [0; PAGE_SIZE];
                rig.mm.pager.view.read(&locked, 0, &mut now).unwrap();
                assert!(copy == now, "page {gfn} is not what its copy says");
                compared += 1;
            }
            drop(locked);
            let stats = rig.mm.stats();
            if compared > 1000 && stats.recalls > 100 && stats.evictions > 100 {
                break;
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    rig.assert_sound();
}
