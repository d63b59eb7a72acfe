//! The order of an eviction, and what happens without a part of it.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::rig::{FRAMES, Page, Rig, eventually, memory, page, pfn};
use crate::addr::{Gfn, PAGE_SIZE, SwapSlot};
use crate::direct_mmu::DirectConfig;
use crate::direct_mmu::hooks::SKIP_WRITE_PROTECT;
use crate::export_rmap::client::{FORGET_RMAP, LATE_INSTALL};
use crate::export_rmap::lab::Rule;
use crate::host_mm::HostMmConfig;
use crate::host_mm::swap::SwapBackend;
use crate::sync::lock;

/// Swap in a map. A gate keeps a write from returning.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    waiting: AtomicBool,
    open: AtomicBool,
}

struct GatedSwap {
    pages: Mutex<HashMap<u32, Page>>,
    gate: Arc<Gate>,
}

impl SwapBackend for GatedSwap {
    fn read(&self, slot: SwapSlot, page: &mut Page) -> io::Result<()> {
        *page = lock(&self.pages).get(&slot.as_u32()).copied().unwrap_or([0; PAGE_SIZE]);
        Ok(())
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        for (number, page) in (first.as_u32()..).zip(pages.chunks_exact(PAGE_SIZE)) {
            lock(&self.pages).insert(number, page.try_into().unwrap());
        }
        if self.gate.closed.load(Ordering::SeqCst) {
            self.gate.waiting.store(true, Ordering::SeqCst);
            let begin = Instant::now();
            while !self.gate.open.load(Ordering::SeqCst)
                && begin.elapsed() < Duration::from_secs(30)
            {
                thread::yield_now();
            }
        }
        Ok(())
    }

    fn slots(&self) -> u32 {
        1000
    }
}

fn gated(sabotage: Option<Rule>) -> (Rig, Arc<Gate>) {
    let gate: Arc<Gate> = Arc::default();
    let swap = GatedSwap { pages: Mutex::default(), gate: gate.clone() };
    let config = HostMmConfig { sabotage, ..memory(FRAMES) };
    (Rig::with_backend(config, Box::new(swap)), gate)
}

/// Evicts page 5 on a thread of its own, up to the middle of its write to swap.
fn evict_half<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    rig: &'scope Rig,
    gate: &Gate,
) -> thread::ScopedJoinHandle<'scope, usize> {
    gate.closed.store(true, Ordering::SeqCst);
    let evicter = scope.spawn(|| rig.mm.evict_frames(&[pfn(5)]).unwrap());
    eventually(|| gate.waiting.load(Ordering::SeqCst));
    evicter
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_page_stays_readable_while_it_is_written_out_and_writes_wait() {
    let (rig, gate) = gated(None);
    rig.write(5, &page(1));
    thread::scope(|scope| {
        let evicter = evict_half(scope, &rig, &gate);
        let faults = rig.mmu.stats().faults;
        assert!(rig.read(5) == page(1));
        assert_eq!(rig.mmu.stats().faults, faults, "no fault");
        let writer = scope.spawn(|| rig.write(5, &page(2)));
        // Not `stats`, which waits for the worker, which waits for the page.
        eventually(|| rig.mmu.mmu.counters.snapshot().handed_over > 0);
        assert!(!writer.is_finished());
        gate.open.store(true, Ordering::SeqCst);
        assert_eq!(evicter.join().unwrap(), 1);
        writer.join().unwrap();
    });
    assert!(rig.read(5) == page(2));
    rig.assert_sound();
}

/// A fault looks at its page; the page is evicted, up to the middle of its write to swap; the fault
/// goes on. Whether the write that it was for was kept.
fn write_overtaken_by_an_eviction(rig: &Rig, gate: &Arc<Gate>) -> bool {
    rig.write(5, &page(1));
    rig.evict(5);
    assert!(rig.read(5) == page(1));
    // Dirty once more, so that there is something to write out; not mapped.
    rig.object.write(Gfn::new(5).base(), &page(3)).unwrap();
    rig.object.withdraw_mappings(Gfn::new(5), 1).unwrap();
    thread::scope(|scope| {
        let (overtaken, go_on) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        *lock(&rig.mmu.mmu.overtaking) = Some(Box::new({
            let (overtaken, go_on) = (overtaken.clone(), go_on.clone());
            move || {
                overtaken.store(true, Ordering::SeqCst);
                eventually(|| go_on.load(Ordering::SeqCst));
            }
        }));
        let writer = scope.spawn(|| rig.write(5, &page(2)));
        eventually(|| overtaken.load(Ordering::SeqCst));
        let evicter = evict_half(scope, rig, gate);
        go_on.store(true, Ordering::SeqCst);
        let begin = Instant::now();
        // Long enough for a write that does not wait.
        while !writer.is_finished() && begin.elapsed() < Duration::from_millis(500) {
            thread::yield_now();
        }
        gate.open.store(true, Ordering::SeqCst);
        evicter.join().unwrap();
        writer.join().unwrap();
    });
    rig.read(5) == page(2)
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_fault_that_an_eviction_overtook_starts_over() {
    let (rig, gate) = gated(None);
    assert!(write_overtaken_by_an_eviction(&rig, &gate));
    assert!(rig.mmu.stats().retries > 0);
    rig.assert_sound();
}

/// Of pages that are taken with one flush, not all are neighbours.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn every_page_of_a_batch_loses_the_right_to_write() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    let pages = [5, 6, 9, 20];
    let frames = pages.map(pfn);
    pages.iter().for_each(|&number| rig.write(number, &page(1)));
    rig.settle_ahead();
    assert_eq!(rig.mm.clean_frames(&frames).unwrap(), pages.len());
    rig.assert_sound();
    // Each of these writes must be seen, or the page counts as clean.
    pages.iter().for_each(|&number| rig.write(number, &page(2)));
    rig.settle_ahead();
    assert_eq!(rig.mm.evict_frames(&frames).unwrap(), pages.len());
    for number in pages {
        assert!(rig.read(number) == page(2), "page {number}");
    }
    rig.assert_sound();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn what_the_window_has_written_outlives_it() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    rig.write(5, &page(1));
    rig.evict(5);
    rig.write(5, &page(2));
    let Rig { mmu, mm, object, .. } = rig;
    drop(mmu);
    assert_eq!(mm.evict_frames(&[pfn(5)]).unwrap(), 1);
    let mut content = page(0);
    object.read(Gfn::new(5).base(), &mut content).unwrap();
    assert!(content == page(2));
    assert_eq!(mm.violations().1, 0);
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn sabotage_late_install_loses_the_write_and_is_found() {
    let (rig, gate) = gated(Some(LATE_INSTALL));
    assert!(!write_overtaken_by_an_eviction(&rig, &gate));
    assert!(rig.mm.violations().1 > 0, "I4");
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn sabotage_skip_write_protect_loses_a_write_that_comes_during_the_write_out() {
    let (rig, gate) = gated(Some(SKIP_WRITE_PROTECT));
    rig.write(5, &page(1));
    thread::scope(|scope| {
        let evicter = evict_half(scope, &rig, &gate);
        rig.write(5, &page(2));
        let found = rig.mmu.check_reverse_map(&rig.mm.quiet()).unwrap();
        assert!(found.len() == 1 && found[0].contains("guest frame 0x5"), "{found:?}");
        gate.open.store(true, Ordering::SeqCst);
        evicter.join().unwrap();
    });
    assert!(rig.read(5) == page(1), "the write is lost");
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn sabotage_forget_rmap_leaves_a_mapping_that_the_check_reports() {
    let config = HostMmConfig { sabotage: Some(FORGET_RMAP), ..memory(FRAMES) };
    let rig = Rig::new(config, DirectConfig::default());
    rig.write(5, &page(1));
    let found = rig.mmu.check_reverse_map(&rig.mm.quiet()).unwrap();
    assert!(found.len() == 1 && found[0].starts_with("I3"), "{found:?}");
    let _stop = crate::sys::signal::pretended::Stop::after(0);
    assert_eq!(
        rig.mmu.check_reverse_map(&rig.mm.quiet()).unwrap(),
        Vec::<String>::new(),
        "it left off"
    );
}
