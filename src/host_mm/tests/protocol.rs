//! The two sides of the protocol: what clients are told, when, and what is made of their answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use proptest::prelude::*;

use super::client::Event;
use super::rig::{Rig, config, gfn, page};
use crate::hooks::{DROP_DIRTY, EARLY_REUSE, SKIP_FLUSH, SWAP_CORRUPT};
use crate::swap::SwapConfig;
use crate::{HostMm, HostMmConfig, MmError, ViolationKind};
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::lab::Rule;
use gnomon_export_rmap::sync::lock;
use gnomon_export_rmap::{
    ClientId, ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Retain, RevokeError,
    RmapEntry,
};

fn sabotaged(rule: Rule) -> HostMmConfig {
    HostMmConfig { sabotage: Some(rule), ..config() }
}

#[test]
fn eviction_tells_flushes_and_only_then_writes() {
    let rig = Rig::new(config(), 8);
    for number in 0..3 {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    rig.log.take();
    let mut frames: Vec<_> = (0..3).map(|n| rig.frame(gfn(n)).unwrap()).collect();
    assert_eq!(rig.mm.evict_frames(&frames).unwrap(), 3);
    frames.sort_unstable();
    let events = rig.log.take();
    let told = frames.iter().map(|&pfn| Event::Invalidated(pfn, Invalidation::Unmap));
    let expected: Vec<Event> =
        told.chain([Event::Flushed(frames.clone(), FlushReason::Invalidated)]).collect();
    assert_eq!(events[..4], expected, "one flush for the batch");
    assert!(
        events[4..].len() == 3
            && events[4..].iter().all(|event| matches!(event, Event::SwapWritten(_))),
        "{events:?}"
    );
    for number in 0..3 {
        assert!(!rig.client.is_mapped(gfn(number)) && !rig.client.is_cached(0, gfn(number)));
        assert!(rig.client.read(1, gfn(number)).unwrap() == page(number));
    }
    rig.assert_sound();
}

#[test]
fn cleaning_keeps_the_mapping_takes_the_right_to_write_and_then_writes() {
    let rig = Rig::new(config(), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    let pfn = rig.frame(gfn(0)).unwrap();
    rig.log.take();
    rig.clean(gfn(0));
    let events = rig.log.take();
    assert_eq!(
        events[..2],
        [
            Event::Invalidated(pfn, Invalidation::Clean),
            Event::Flushed(vec![pfn], FlushReason::Invalidated),
        ]
    );
    assert!(matches!(events[2..], [Event::SwapWritten(_)]), "{events:?}");
    assert!(rig.client.is_mapped(gfn(0)));
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(1));
    rig.evict(gfn(0));
    assert_eq!(rig.mm.stats().clean_drops, 1);

    // The first write after a cleaning is seen, also through a translation cached before it.
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(1));
    rig.clean(gfn(0));
    rig.client.write(0, gfn(0), &page(2)).unwrap();
    rig.evict(gfn(0));
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(2));
    rig.assert_sound();
}

#[test]
fn the_clients_dirty_bit_decides_about_the_write() {
    let rig = Rig::new(config(), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    rig.evict(gfn(0));
    let outs = || rig.mm.stats().swap_outs;
    assert_eq!(outs(), 1);
    // Mapped writable, but only read.
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(1));
    rig.evict(gfn(0));
    assert_eq!(outs(), 1);
    rig.client.read(0, gfn(0)).unwrap();
    rig.client.write(0, gfn(0), &page(2)).unwrap();
    rig.evict(gfn(0));
    assert_eq!(outs(), 2);
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(2));
    rig.assert_sound();
}

#[test]
fn a_failing_flush_leaves_pages_where_they_were() {
    let rig = Rig::new(config(), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    rig.client.write(0, gfn(1), &page(2)).unwrap();
    let frames = [0, 1].map(|n| rig.frame(gfn(n)).unwrap());
    rig.client.flush_fails.store(true, Ordering::Relaxed);
    let error = rig.mm.evict_frames(&frames).unwrap_err();
    assert!(
        matches!(&error, MmError::Revoke(revoke) if revoke.frames == 2
            && revoke.source.raw_os_error() == Some(libc::ENOMEM)),
        "{error}"
    );
    assert!(matches!(rig.mm.clean_frames(&frames), Err(MmError::Revoke(_))));
    assert_eq!([0, 1].map(|n| rig.frame(gfn(n)).unwrap()), frames);
    assert_eq!(rig.mm.stats().swap_outs, 0, "nothing was written");
    // A processor goes on through what it has cached. That write must not get lost either.
    rig.client.write(0, gfn(0), &page(3)).unwrap();
    rig.client.flush_fails.store(false, Ordering::Relaxed);
    assert_eq!(rig.mm.evict_frames(&frames).unwrap(), 2);
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(3));
    assert!(rig.client.read(0, gfn(1)).unwrap() == page(2));
    rig.assert_sound();
}

#[test]
fn a_page_mapped_by_two_clients_leaves_both() {
    let rig = Rig::new(config(), 8);
    let second = Rig::with_object_of(&rig);
    rig.client.read(0, gfn(0)).unwrap();
    second.client.write(0, gfn(0), &page(5)).unwrap();
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(5), "one frame");
    rig.evict(gfn(0));
    assert!(!rig.client.is_mapped(gfn(0)) && !second.client.is_mapped(gfn(0)));
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(5));
    drop(second);
    rig.evict(gfn(0));
    rig.assert_sound();
}

#[test]
fn dropping_the_object_of_a_client_that_let_go_leaves_nothing_exported() {
    let rig = Rig::new(config(), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    let mm = rig.mm.clone();
    drop(rig);
    assert_eq!(mm.violations().1, 0);
    assert_eq!(mm.stats().frames_in_use, 0);
}

#[test]
fn sabotage_drop_dirty_is_found_by_i6_and_by_the_content() {
    let rig = Rig::new(sabotaged(DROP_DIRTY), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    let pfn = rig.frame(gfn(0)).unwrap();
    rig.evict(gfn(0));
    let (violations, count) = rig.mm.violations();
    assert_eq!(count, 1);
    assert_eq!(violations[0].kind, ViolationKind::CleanPageDiffers);
    assert_eq!((violations[0].pfn, violations[0].owner.gfn), (pfn, gfn(0)), "{}", violations[0]);
    assert!(rig.client.read(0, gfn(0)).unwrap() != page(1));
}

#[test]
fn sabotage_skip_flush_is_seen_by_the_client_and_in_the_content() {
    let rig = Rig::new(sabotaged(SKIP_FLUSH), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    rig.evict(gfn(0));
    assert_eq!(rig.client.unflushed(), 1);
    assert!(rig.client.is_cached(0, gfn(0)));
    // The frame's next page: the free list is a stack.
    rig.client.write(1, gfn(1), &page(2)).unwrap();
    assert!(rig.client.broken_promises.load(Ordering::Relaxed) > 0);
    assert!(rig.client.read(0, gfn(0)).unwrap() == page(2), "stale (I1)");
}

#[test]
fn sabotage_early_reuse_is_seen_by_the_client() {
    let rig = Rig::new(sabotaged(EARLY_REUSE), 8);
    rig.client.write(0, gfn(0), &page(1)).unwrap();
    rig.evict(gfn(0));
    assert_eq!(
        rig.client.broken_promises.load(Ordering::Relaxed),
        1,
        "its page lock was free at the flush"
    );
}

#[test]
fn sabotage_swap_corrupt_is_found_on_read_and_nothing_is_handed_out() {
    let swap = SwapConfig { path: None, dir: None, bytes: 1 << 20 };
    let mm = HostMm::new(HostMmConfig { swap, ..sabotaged(SWAP_CORRUPT) }).unwrap();
    let object = mm.create_object(64 * PAGE_SIZE_U64).unwrap();
    let mut corrupt = 0;
    for number in 0..32 {
        object.write(gfn(number).base(), &page(number)).unwrap();
    }
    let frames: Vec<_> = (0..mm.frame_count()).map(Pfn::new).collect();
    assert_eq!(mm.evict_frames(&frames).unwrap(), 32);
    for number in 0..32 {
        let mut found = [0xee; PAGE_SIZE];
        match object.read(gfn(number).base(), &mut found) {
            Ok(()) => assert!(found == page(number)),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("checksum"), "{text}");
                assert_eq!(found, [0xee; PAGE_SIZE], "nothing was handed out");
                assert!(object.try_lock_resident(gfn(number)).is_none());
                corrupt += 1;
            }
        }
    }
    assert_eq!(corrupt, 2, "every sixteenth");
    assert_eq!(mm.stats().frames_in_use, 30, "no frame was lost");
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    Write(usize, u64, u64),
    Read(usize, u64),
    HostWrite(u64, u64),
    HostRead(u64),
    Zero(usize, u64),
    Clean(u64),
    Evict(u64),
    EvictAll,
    CleanAll,
    FailingEviction(u64),
}

const PAGES: u64 = 6;

fn step() -> impl Strategy<Value = Step> {
    let (cpu, at) = (0..4usize, 0..PAGES);
    prop_oneof![
        4 => (cpu.clone(), at.clone(), 1..u64::from(u32::MAX))
            .prop_map(|(cpu, at, seed)| Step::Write(cpu, at, seed)),
        3 => (cpu.clone(), at.clone()).prop_map(|(cpu, at)| Step::Read(cpu, at)),
        1 => (at.clone(), 1..u64::from(u32::MAX))
            .prop_map(|(at, seed)| Step::HostWrite(at, seed)),
        1 => at.clone().prop_map(Step::HostRead),
        1 => (cpu, at.clone()).prop_map(|(cpu, at)| Step::Zero(cpu, at)),
        3 => at.clone().prop_map(Step::Clean),
        3 => at.clone().prop_map(Step::Evict),
        1 => Just(Step::EvictAll),
        1 => Just(Step::CleanAll),
        1 => at.prop_map(Step::FailingEviction),
    ]
}

impl Rig {
    fn run(&self, step: &Step, model: &mut [[u8; PAGE_SIZE]]) -> Result<(), TestCaseError> {
        let place = |at: u64| usize::try_from(at).unwrap();
        match *step {
            Step::Write(cpu, at, seed) => {
                model[place(at)] = page(seed);
                self.client.write(cpu, gfn(at), &page(seed)).unwrap();
            }
            Step::Read(cpu, at) => {
                prop_assert!(self.client.read(cpu, gfn(at)).unwrap() == model[place(at)]);
            }
            Step::HostWrite(at, seed) => {
                model[place(at)] = page(seed);
                self.host_write(gfn(at), &page(seed));
            }
            Step::HostRead(at) => prop_assert!(self.host_read(gfn(at)) == model[place(at)]),
            Step::Zero(cpu, at) => {
                model[place(at)] = [0; PAGE_SIZE];
                self.client.write(cpu, gfn(at), &[0; PAGE_SIZE]).unwrap();
            }
            Step::Clean(at) if self.frame(gfn(at)).is_some() => self.clean(gfn(at)),
            Step::Evict(at) if self.frame(gfn(at)).is_some() => self.evict(gfn(at)),
            Step::Clean(_) | Step::Evict(_) => {}
            Step::EvictAll => drop(self.mm.evict_frames(&self.all_frames()).unwrap()),
            Step::CleanAll => drop(self.mm.clean_frames(&self.all_frames()).unwrap()),
            Step::FailingEviction(at) => {
                if let Some(pfn) = self.frame(gfn(at)) {
                    self.client.flush_fails.store(true, Ordering::Relaxed);
                    prop_assert!(self.mm.evict_frames(&[pfn]).is_err());
                    self.client.flush_fails.store(false, Ordering::Relaxed);
                    // What the failure left behind is not this property's business.
                    self.mm.evict_frames(&[pfn]).unwrap();
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever happens to the pages, processors and hypervisor read what was written last (I2),
    /// the checks find nothing (I4, I6), and in the end everything is given back.
    #[test]
    fn no_history_loses_a_write(steps in prop::collection::vec(step(), 0..60)) {
        let rig = Rig::new(config(), PAGES);
        let mut model = vec![[0; PAGE_SIZE]; usize::try_from(PAGES).unwrap()];
        for step in &steps {
            rig.run(step, &mut model)?;
        }
        for (at, expected) in (0..).zip(&model) {
            prop_assert!(rig.client.read(0, gfn(at)).unwrap() == *expected);
        }
        rig.assert_sound();
        let (mm, frames) = (rig.mm.clone(), rig.all_frames());
        drop(rig);
        // The shared pages of zeros stay, as long as nobody wants their frames.
        mm.evict_frames(&frames).unwrap();
        let stats = mm.stats();
        prop_assert_eq!((stats.frames_in_use, stats.swap_slots_used), (0, 0));
        prop_assert_eq!(mm.violations().1, 0);
    }
}

/// A client of one frame that keeps nothing of the object alive.
#[derive(Default)]
struct Late {
    id: OnceLock<ClientId>,
    calls: Mutex<Vec<&'static str>>,
    flush_fails: AtomicBool,
}

impl ExportNotifier for Late {
    fn invalidate_page(&self, page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        lock(&self.calls).push("invalidate");
        page.table().rmap_visit(page.pfn(), *self.id.get().unwrap(), |_| Retain::Drop);
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        lock(&self.calls).push("flush");
        if self.flush_fails.load(Ordering::Relaxed) {
            let source = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(RevokeError { frames: frames.len(), source });
        }
        Ok(())
    }
}

/// Drops an object of which a client maps a page, after `before`; what the client was told, and the
/// frames in use afterwards.
fn drop_under(late: Late, before: impl FnOnce(&HostMm, Pfn, &Late)) -> (Vec<&'static str>, u64) {
    let mm = HostMm::new(config()).unwrap();
    let object = mm.create_object(4 * PAGE_SIZE_U64).unwrap();
    let late = Arc::new(late);
    let registration = mm.notifiers().register(late.clone()).unwrap();
    late.id.set(registration.id()).unwrap();
    let page = object.lock_page_for_write(gfn(0)).unwrap();
    let pfn = page.pfn();
    gnomon_export_rmap::bare_entries::add_entry(
        mm.frame_table(),
        pfn,
        RmapEntry::new(registration.id(), 0),
    );
    drop(page);
    before(&mm, pfn, &late);
    drop(object);
    assert_eq!(mm.violations().1, 0);
    drop(registration);
    let calls = std::mem::take(&mut *lock(&late.calls));
    (calls, mm.stats().frames_in_use)
}

#[test]
fn a_client_that_outlives_the_object_loses_its_mappings_before_the_frame_is_free() {
    let told = drop_under(Late::default(), |_, _, _| {});
    assert_eq!(told, (vec!["invalidate", "flush"], 0));
}

#[test]
fn a_frame_that_cannot_be_revoked_is_lost_rather_than_shared() {
    let late = Late { flush_fails: true.into(), ..Late::default() };
    assert_eq!(drop_under(late, |_, _, _| {}), (vec!["invalidate", "flush"], 1));
}

/// The client has given its entry up, so the frame is not exported; but what it caches may be in use.
#[test]
fn a_frame_whose_flush_failed_is_flushed_before_it_is_free_though_nobody_maps_it() {
    for fails_again in [false, true] {
        let late = Late { flush_fails: true.into(), ..Late::default() };
        let told = drop_under(late, |mm, pfn, late| {
            mm.evict_frames(&[pfn]).unwrap_err();
            assert!(!mm.frame_table().get(pfn).unwrap().is_exported());
            late.flush_fails.store(fails_again, Ordering::Relaxed);
        });
        assert_eq!(told, (vec!["invalidate", "flush", "flush"], u64::from(fails_again)));
    }
}

/// A flush that succeeds is enough: nothing is due after it.
#[test]
fn a_frame_that_was_flushed_at_last_is_free_without_another() {
    let late = Late { flush_fails: true.into(), ..Late::default() };
    let told = drop_under(late, |mm, pfn, late| {
        mm.evict_frames(&[pfn]).unwrap_err();
        late.flush_fails.store(false, Ordering::Relaxed);
        assert_eq!(mm.clean_frames(&[pfn]).unwrap(), 1);
    });
    assert_eq!(told, (vec!["invalidate", "flush", "flush"], 0));
}
