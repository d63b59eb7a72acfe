//! Random histories of operations against a reference model, on a host that goes wrong.
//!
//! Property: whatever fails, and whenever, a read gives what the model says or an error, never
//! other bytes; an operation that failed has changed nothing; once the host is mended, every page
//! is there; and in the end no frame and no slot is lost.
//!
//! To add an operation: a variant of [`Op`], its weight in [`op::ops`], its arm in [`World::apply`]. It
//! changes the model only if it succeeded.

mod op;

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{TestCaseError, TestRunner};

use super::client::Page;
use super::rig::{FRAMES, LoggedSwap, Rig, config, gfn, page};
use crate::hooks::DROP_DIRTY;
use crate::swap::{FailingBackend, SwapBackend};
use crate::{DirtyLog, HostMm, HostMmConfig, InjectionPlan, MemoryObject, MmError};
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use op::{Op, Trouble, ops, trouble};

/// Pages of each object.
const PAGES: u64 = 24;
const ZEROS: Page = [0; PAGE_SIZE];

/// The second object and what it must hold.
struct Other {
    object: Arc<MemoryObject>,
    model: Vec<Page>,
}

impl Other {
    fn new(mm: &Arc<HostMm>) -> Self {
        let object = mm.create_object(PAGES * PAGE_SIZE_U64).unwrap();
        Self { object, model: vec![ZEROS; index(PAGES)] }
    }
}

/// Host memory and the model of it.
struct World {
    rig: Rig,
    model: Vec<Page>,
    other: Other,
    /// The first object's log, and the pages written since it took them.
    log: Option<DirtyLog>,
    written: BTreeSet<u64>,
    /// Operations that failed.
    errors: u64,
}

type Checked = Result<(), TestCaseError>;

impl World {
    fn new(trouble: &Trouble, base: HostMmConfig) -> Self {
        let config = match trouble {
            Trouble::DiesAfter(_) => base,
            Trouble::Injected(plan) => HostMmConfig { inject: plan.clone(), ..base },
        };
        let rig = Rig::with_backend(config, PAGES, |log| -> Box<dyn SwapBackend> {
            let swap = LoggedSwap::new(4000, log);
            match trouble {
                Trouble::DiesAfter(calls) => Box::new(FailingBackend::new(swap, *calls, libc::EIO)),
                Trouble::Injected(_) => Box::new(swap),
            }
        });
        let other = Other::new(&rig.mm);
        let model = vec![ZEROS; index(PAGES)];
        Self { rig, model, other, log: None, written: BTreeSet::new(), errors: 0 }
    }

    /// Does it, and compares what comes of it with the model.
    fn apply(&mut self, op: Op) -> Checked {
        match op {
            Op::FaultIn(number) => {
                let locked = self.rig.object.lock_page(gfn(number)).map(drop);
                self.note(locked);
            }
            Op::HostRead(number) => {
                let found = host_read(&self.rig.object, number);
                self.compare(found, number, op)?;
            }
            Op::HostWrite { page, seed, from, to } => {
                let bytes = &content(seed)[from..to];
                let gpa = gfn(page).base().checked_add(from as u64).unwrap();
                let written = self.rig.object.write(gpa, bytes);
                if self.note(written).is_some() {
                    self.model[index(page)][from..to].copy_from_slice(bytes);
                    if from < to {
                        self.written.insert(page);
                    }
                }
            }
            Op::GuestRead { processor, page } => {
                let found = self.rig.client.read(processor, gfn(page));
                self.compare(found, page, op)?;
            }
            Op::GuestWrite { processor, page, seed } => {
                let bytes = content(seed);
                let written = self.rig.client.write(processor, gfn(page), &bytes);
                if self.note(written).is_some() {
                    self.set(page, bytes);
                }
            }
            Op::Evict(number) => {
                if let Some(pfn) = self.rig.frame(gfn(number)) {
                    let evicted = self.rig.mm.evict_frames(&[pfn]);
                    self.note(evicted);
                }
            }
            Op::EvictAll => {
                let evicted = self.rig.mm.evict_frames(&self.rig.all_frames());
                self.note(evicted);
            }
            Op::Clean(number) => {
                if let Some(pfn) = self.rig.frame(gfn(number)) {
                    let cleaned = self.rig.mm.clean_frames(&[pfn]);
                    self.note(cleaned);
                }
            }
            Op::OtherRead(number) => {
                let found = host_read(&self.other.object, number);
                if let Some(found) = self.note(found) {
                    prop_assert!(found == self.other.model[index(number)], "{op:?}: wrong bytes");
                }
            }
            Op::OtherWrite { page, seed } => {
                let bytes = content(seed);
                let written = self.other.object.write(gfn(page).base(), &bytes);
                if self.note(written).is_some() {
                    self.other.model[index(page)] = bytes;
                }
            }
            Op::OtherDrop => self.other = Other::new(&self.rig.mm),
            Op::OtherClone => {
                let cloned = self.rig.object.copy_on_write_clone();
                if let Some(object) = self.note(cloned) {
                    self.other = Other { object, model: self.model.clone() };
                }
            }
            Op::Migrate(number) => {
                if let Some(pfn) = self.rig.frame(gfn(number)) {
                    let moved = self.rig.mm.migrate_frames(&[pfn]);
                    self.note(moved);
                }
            }
            Op::Merge(one, two) => {
                let frames = (self.rig.frame(gfn(one)), self.rig.frame(gfn(two)));
                if let (Some(one), Some(two)) = frames {
                    let merged = self.rig.mm.merge_frames(one, two);
                    self.note(merged);
                }
            }
            Op::MergeZero(number) => {
                if let Some(pfn) = self.rig.frame(gfn(number)) {
                    let merged = self.rig.mm.merge_zero_frame(pfn);
                    self.note(merged);
                }
            }
            Op::Free(number) => {
                let freed = self.rig.object.free_pages(gfn(number), 1);
                if self.note(freed).is_some() {
                    self.set(number, ZEROS);
                }
            }
            Op::Exchange { page, other, count } => {
                let to = &self.other.object;
                let done = self.rig.object.exchange_pages(gfn(page), to, gfn(other), count);
                if self.note(done).is_some() {
                    for number in 0..count {
                        let its = index(other + number);
                        let mine = std::mem::replace(
                            &mut self.other.model[its],
                            self.model[index(page + number)],
                        );
                        self.set(page + number, mine);
                    }
                }
            }
            Op::RemapToCopies { page, other, count } => {
                let to = &self.other.object;
                let done = self.rig.object.remap_to_copies(gfn(page), to, gfn(other), count);
                if self.note(done).is_some() {
                    for number in 0..count {
                        self.other.model[index(other + number)] = self.model[index(page + number)];
                    }
                }
            }
            Op::OtherEvict(number) => {
                if let Some(pfn) = frame(&self.other.object, number) {
                    let evicted = self.rig.mm.evict_frames(&[pfn]);
                    self.note(evicted);
                }
            }
            Op::OtherFree(number) => {
                let freed = self.other.object.free_pages(gfn(number), 1);
                if self.note(freed).is_some() {
                    self.other.model[index(number)] = ZEROS;
                }
            }
            Op::OtherMerge(number) => {
                let frames = (self.rig.frame(gfn(number)), frame(&self.other.object, number));
                if let (Some(one), Some(two)) = frames {
                    let merged = self.rig.mm.merge_frames(one, two);
                    self.note(merged);
                }
            }
            Op::OtherShare { page, count } => {
                let pages = page..(page + count).min(PAGES);
                let shared = self.rig.object.share_pages(pages.clone().map(gfn));
                if let Some(object) = self.note(shared) {
                    let of = |number| {
                        if pages.contains(&number) { self.model[index(number)] } else { ZEROS }
                    };
                    self.other = Other { object, model: (0..PAGES).map(of).collect() };
                }
            }
            Op::OtherCloneAgain => {
                let cloned = self.other.object.copy_on_write_clone();
                if let Some(object) = self.note(cloned) {
                    self.other.object = object;
                }
            }
            Op::StartLog => {
                if self.log.is_none() {
                    self.log = Some(DirtyLog::start(self.rig.object.clone()).unwrap());
                    // All count as written until they were taken once.
                    self.written.extend(0..PAGES);
                }
            }
            Op::TakeLog { page, count } => self.take_log(page, count)?,
            Op::Audit => {
                self.audit(&self.rig.object, &self.model)?;
                self.audit(&self.other.object, &self.other.model)?;
            }
            Op::Pressure { zeros } => self.press(zeros),
        }
        Ok(())
    }

    /// Notes that a page of the first object has other content now.
    fn set(&mut self, number: u64, page: Page) {
        let old = std::mem::replace(&mut self.model[index(number)], page);
        if old != page {
            self.written.insert(number);
        }
    }

    /// What was written is in what the log returns; a call that fails forgets nothing.
    fn take_log(&mut self, page: u64, count: u64) -> Checked {
        let Some(log) = &self.log else { return Ok(()) };
        let taken = log.take(gfn(page), count);
        let Some(taken) = self.note(taken) else { return Ok(()) };
        for number in page..(page + count).min(PAGES) {
            let written = self.written.remove(&number);
            prop_assert!(!written || taken.contains(&gfn(number)), "{number} was not logged");
        }
        Ok(())
    }

    /// No page that is not zero is nowhere. (Those of zeros may be anywhere.)
    fn audit(&self, object: &MemoryObject, model: &[Page]) -> Checked {
        let audit = object.audit(&object.host_mm().quiet());
        let counted = audit.in_frames + audit.in_swap + audit.lost;
        let content = model.iter().filter(|&page| *page != ZEROS).count() as u64;
        prop_assert!((content..=PAGES).contains(&counted), "{content} pages: {audit:?}");
        Ok(())
    }

    fn press(&mut self, zeros: bool) {
        let object = self.rig.mm.create_object(FRAMES * PAGE_SIZE_U64).unwrap();
        for number in 0..FRAMES {
            let done = if zeros {
                object.lock_page(gfn(number)).map(drop)
            } else {
                object.write(gfn(number).base(), &[1])
            };
            if self.note(done).is_none() {
                return;
            }
        }
    }

    fn compare(&mut self, found: Result<Page, MmError>, number: u64, op: Op) -> Checked {
        if let Some(found) = self.note(found) {
            prop_assert!(found == self.model[index(number)], "{op:?}: wrong bytes");
        }
        Ok(())
    }

    /// An operation may fail; only these errors are for what was done to the host.
    fn note<T>(&mut self, result: Result<T, MmError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(MmError::Swap(_) | MmError::OutOfFrames { .. }) => {
                self.errors += 1;
                None
            }
            Err(other) => panic!("not an error of the host's making: {other}"),
        }
    }

    /// Reads all pages: those that cannot be had are counted.
    fn unreadable(&mut self) -> Result<u64, TestCaseError> {
        let before = self.errors;
        for number in 0..PAGES {
            self.apply(Op::HostRead(number))?;
            self.apply(Op::GuestRead { processor: 0, page: number })?;
            self.apply(Op::OtherRead(number))?;
        }
        Ok(self.errors - before)
    }

    /// Everything goes; nothing may be left of it.
    fn end(self) -> Checked {
        let Self { rig, other, log, .. } = self;
        let (violations, count) = rig.mm.violations();
        prop_assert_eq!(count, 0, "{:?}", violations);
        let (mm, frames) = (rig.mm.clone(), rig.all_frames());
        drop((rig, other, log));
        // The shared pages of zeros stay, as long as nobody wants their frames.
        prop_assert!(mm.evict_frames(&frames).is_ok());
        let stats = mm.stats();
        prop_assert_eq!((stats.frames_in_use, stats.swap_slots_used), (0, 0));
        Ok(())
    }
}

fn host_read(object: &MemoryObject, number: u64) -> Result<Page, MmError> {
    let mut found = [0xee; PAGE_SIZE];
    object.read(gfn(number).base(), &mut found).map(|()| found)
}

fn frame(object: &MemoryObject, number: u64) -> Option<Pfn> {
    object.try_lock_resident(gfn(number)).map(|page| page.pfn())
}

fn content(seed: u64) -> Page {
    if seed == 0 { ZEROS } else { page(seed) }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// One history; returns how many operations failed.
fn live(trouble: &Trouble, ops: &[Op], base: HostMmConfig) -> Result<u64, TestCaseError> {
    let mut world = World::new(trouble, base);
    for &op in ops {
        world.apply(op)?;
    }
    world.unreadable()?;
    let errors = world.errors;
    if let Trouble::Injected(_) = trouble {
        world.rig.mm.lab().end_injection();
        prop_assert_eq!(world.unreadable()?, 0, "pages are lost although the host is mended");
    }
    world.end()?;
    Ok(errors)
}

/// Histories of a run; `GNOMON_LONG_TESTS` in the environment makes it a long one.
fn histories() -> u32 {
    if std::env::var_os("GNOMON_LONG_TESTS").is_some() { 10_000 } else { 200 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: histories(), ..ProptestConfig::default() })]

    #[test]
    fn no_trouble_of_the_host_makes_a_wrong_byte(trouble in trouble(), ops in ops()) {
        live(&trouble, &ops, config())?;
    }
}

/// The histories above are no fair-weather ones: many of them meet errors.
#[test]
fn many_histories_meet_errors() {
    let mut runner = TestRunner::deterministic();
    let (mut troubled, mut quiet) = (0, 0);
    for _ in 0..60 {
        let trouble = trouble().new_tree(&mut runner).unwrap().current();
        let ops = ops().new_tree(&mut runner).unwrap().current();
        match live(&trouble, &ops, config()).unwrap() {
            0 => quiet += 1,
            _ => troubled += 1,
        }
    }
    assert!(troubled >= 15 && quiet >= 5, "{troubled} with errors, {quiet} without");
}

/// The model notices a lost write: without that, it would prove nothing.
#[test]
fn the_model_notices_a_dropped_dirty_bit() {
    let calm = Trouble::Injected(InjectionPlan::default());
    let lossy = || HostMmConfig { sabotage: Some(DROP_DIRTY), ..config() };
    let ops = [
        Op::GuestWrite { processor: 0, page: 3, seed: 1 },
        Op::Evict(3),
        Op::GuestRead { processor: 1, page: 3 },
    ];
    assert!(live(&calm, &ops, config()).is_ok());
    let error = live(&calm, &ops, lossy()).unwrap_err().to_string();
    assert!(error.contains("wrong bytes"), "{error}");
}

/// A page that the host lost for good is an error each time, not zeros and not old bytes.
#[test]
fn the_model_notices_a_page_that_was_lost_for_good() {
    let dead = Trouble::DiesAfter(1);
    let mut world = World::new(&dead, config());
    for op in [Op::HostWrite { page: 0, seed: 1, from: 0, to: PAGE_SIZE }, Op::Evict(0)] {
        world.apply(op).unwrap();
    }
    assert_eq!(world.unreadable().unwrap(), 2, "the hypervisor's read and the processor's");
}

/// A write that the log does not tell of: here, one that somebody else has taken from it.
#[test]
fn the_model_notices_a_write_that_is_not_logged() {
    let calm = Trouble::Injected(InjectionPlan::default());
    for stolen in [false, true] {
        let mut world = World::new(&calm, config());
        let all = Op::TakeLog { page: 0, count: PAGES };
        for op in [Op::StartLog, all, Op::GuestWrite { processor: 0, page: 3, seed: 1 }] {
            world.apply(op).unwrap();
        }
        if stolen {
            assert_eq!(world.log.as_ref().unwrap().take(gfn(0), PAGES).unwrap(), [gfn(3)]);
        }
        let taken = world.apply(all);
        assert_eq!(taken.is_err(), stolen, "{taken:?}");
    }
}

/// A page that is nowhere though the model knows its content.
#[test]
fn the_model_notices_a_page_that_is_nowhere() {
    let calm = Trouble::Injected(InjectionPlan::default());
    let mut world = World::new(&calm, config());
    world.apply(Op::GuestWrite { processor: 0, page: 3, seed: 1 }).unwrap();
    world.apply(Op::Audit).unwrap();
    world.rig.object.free_pages(gfn(3), 1).unwrap();
    assert!(world.apply(Op::Audit).is_err());
}
