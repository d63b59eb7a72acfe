//! Several processors, evictions and cleanings at once.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::addr::{Gva, PAGE_SIZE_U64, Pfn};
use crate::export_rmap::client::LATE_INSTALL;
use crate::host_mm::HostMmConfig;
use crate::shadow_mmu::reference::cpu::{Cpu, Done, Processors};
use crate::shadow_mmu::reference::machine::{
    Machine, PAGE_SIZE_BIT, PRESENT, WRITABLE, config, gva,
};
use crate::sync::lock;

const PAGES: u64 = 40;
const DATA: u64 = 100;
const CPUS: usize = 3;
/// For the tests that run until something has happened: time for it on the slowest machine.
const GIVE_UP: Duration = Duration::from_secs(60);
const BRIEFLY: Duration = Duration::from_millis(200);

/// Address of a page's mapping number `way`: by 4 KiB pages twice, and by a large page.
fn address(page: u64, way: u64) -> Gva {
    match way {
        0 => gva([0, 0, 0, page]),
        1 => gva([0, 0, 1, 511 - page]),
        _ => gva([0, 0, 2, DATA + page]),
    }
}

fn guest(config: HostMmConfig) -> Machine {
    let machine = Machine::new(config, 64);
    let table = |gfn: u64| (gfn * PAGE_SIZE_U64) | PRESENT | WRITABLE;
    machine.set_entry(1, 0, table(2));
    machine.set_entry(2, 0, table(3));
    machine.set_entry(3, 0, table(4));
    machine.set_entry(3, 1, table(5));
    machine.set_entry(3, 2, table(0) | PAGE_SIZE_BIT);
    for page in 0..PAGES {
        machine.set_entry(4, usize::try_from(page).unwrap(), table(DATA + page));
        machine.set_entry(5, usize::try_from(511 - page).unwrap(), table(DATA + page));
    }
    machine
}

/// What each page's word is now; with its lock held, a processor is alone with the page.
type Ledger = Vec<Mutex<u64>>;

fn new_ledger() -> Ledger {
    (0..PAGES).map(|_| Mutex::new(0)).collect()
}

/// Accesses that found a wrong value, of all, until told to stop.
fn work(machine: &Machine, mut cpu: Cpu, ledger: &Ledger, stop: &AtomicBool, seed: u64) -> u64 {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut wrong = 0;
    while !stop.load(Ordering::Relaxed) {
        let page = rng.random_range(0..PAGES);
        let at = address(page, rng.random_range(0..3));
        if rng.random_ratio(1, 20) {
            machine.shadow.invlpg(cpu.root, at).unwrap();
        }
        let mut version = lock(&ledger[usize::try_from(page).unwrap()]);
        let expected = Done::Value(*version);
        let found = if rng.random_ratio(1, 3) {
            *version += 1;
            cpu.write(machine, at, *version)
        } else {
            cpu.read(machine, at)
        };
        wrong += u64::from(found != expected);
        if found != expected
            && let Done::Value(value) = found
        {
            // Go on from what is there, or one fault would be counted for ever.
            *version = (*version).max(value);
            cpu.write(machine, at, *version);
        }
    }
    wrong
}

/// Runs the processors beside random evictions and cleanings until told that it is enough, given
/// the time since the begin; returns the wrong accesses, and what `check` counted while it ran
/// beside them.
fn run(
    machine: &Machine,
    ledger: &Ledger,
    enough: impl Fn(Duration) -> bool,
    mut check: impl FnMut() -> u64,
) -> (u64, u64) {
    let cpus: Vec<Cpu> = (0..CPUS).map(|_| Cpu::new(machine, 1)).collect();
    let processors = Arc::new(Processors::of(&cpus));
    let registration = machine.mm.notifiers().register(processors).unwrap();
    let stop = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(cpus)
            .map(|(seed, cpu)| {
                let stop = &stop;
                scope.spawn(move || work(machine, cpu, ledger, stop, seed))
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(77);
        let (begin, mut found) = (Instant::now(), 0);
        while !enough(begin.elapsed()) && !threads.iter().any(|thread| thread.is_finished()) {
            // Frames are handed out from 0 up, and few are in use.
            let frames: Vec<Pfn> = (0..16).map(|_| Pfn::new(rng.random_range(0..64))).collect();
            if rng.random() {
                machine.mm.evict_frames(&frames).unwrap();
            } else {
                machine.mm.clean_frames(&frames).unwrap();
            }
            found += check();
        }
        stop.store(true, Ordering::Relaxed);
        let wrong = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        (wrong, found)
    });
    drop(registration);
    result
}

#[test]
fn faults_flushes_evictions_and_cleanings_at_once_lose_nothing() {
    let machine = guest(config());
    let came_to_all = || {
        let (stats, mm) = (machine.shadow.stats(), machine.mm.stats());
        [stats.invalidated, stats.write_protected, stats.guest_flushed, mm.swap_ins]
            .iter()
            .all(|&count| count > 100)
    };
    // How long that takes depends on the processor, which may be emulated.
    let enough = |time| time > GIVE_UP || time > Duration::from_secs(2) && came_to_all();
    let (wrong, differences) =
        run(&machine, &new_ledger(), enough, || machine.shadow.check_reverse_map().len() as u64);
    let (stats, mm) = (machine.shadow.stats(), machine.mm.stats());
    assert_eq!(wrong, 0, "{stats:?} {mm:?}");
    assert_eq!(differences, 0, "I3, with the MMU lock held");
    machine.assert_sound();
    assert!(came_to_all(), "{stats:?} {mm:?}");
}

#[test]
fn an_install_that_an_invalidation_overlapped_is_retried() {
    let machine = guest(config());
    let (begin, ledger) = (Instant::now(), new_ledger());
    // Overlaps are a matter of luck; they come soon on any machine.
    while machine.shadow.stats().retries == 0 && begin.elapsed() < GIVE_UP {
        let (wrong, _) = run(&machine, &ledger, |time| time > BRIEFLY, || 0);
        assert_eq!(wrong, 0);
    }
    assert!(machine.shadow.stats().retries > 0);
    machine.assert_sound();
}

#[test]
fn sabotage_late_install_is_caught() {
    let sabotage = Some(LATE_INSTALL);
    let machine = guest(HostMmConfig { sabotage, ..config() });
    let (begin, ledger) = (Instant::now(), new_ledger());
    let mut caught = 0;
    while caught == 0 && begin.elapsed() < GIVE_UP {
        let (wrong, found) = run(&machine, &ledger, |time| time > BRIEFLY, || 0);
        caught += wrong + found + machine.mm.violations().1;
    }
    assert!(caught > 0, "{:?}", machine.shadow.stats());
}

#[test]
fn recycling_beside_evictions_keeps_the_reverse_map_right() {
    let machine = guest(config());
    let stop = AtomicBool::new(false);
    let mut cpus = [Cpu::new(&machine, 1)];
    let processors = Arc::new(Processors::of(&cpus));
    let registration = machine.mm.notifiers().register(processors).unwrap();
    let [cpu] = &mut cpus;
    thread::scope(|scope| {
        let evictor = scope.spawn(|| {
            let frames: Vec<Pfn> = (0..64).map(Pfn::new).collect();
            while !stop.load(Ordering::Relaxed) {
                machine.mm.evict_frames(&frames).unwrap();
            }
        });
        // The only processor stands still while its tables are recycled, as the rule is.
        for round in 0..300 {
            for page in 0..8 {
                let at = address(page, round % 3);
                assert_eq!(cpu.write(&machine, at, round + 1), Done::Value(round));
            }
            machine.shadow.recycle();
            cpu.load_cr3(&machine, 1);
        }
        stop.store(true, Ordering::Relaxed);
        evictor.join().unwrap();
    });
    drop(registration);
    machine.assert_sound();
}
