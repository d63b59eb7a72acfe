//! What a fault costs with direct paging: `userfaultfd` instead of shadow page tables, no KVM.
//!
//! First the minor fault, of a page that is in its frame and not mapped: a thread touches all pages
//! of a window in ascending order, with a handler that sleeps or spins between faults, and with one
//! or more pages mapped for each. Then memory four times as large as its ration, touched at random,
//! half of the touches writes; and the same touches by a client made of software SPTEs, whose faults
//! are function calls: what is left is the cost of the host's side, swap included.
//!
//! Figures, no requirement: they are the machine's and the kernel's, each the least of three runs. Where page faults cannot be
//! handled by the process the bench says why and ends.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use gnomon::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};
use gnomon::direct_mmu::{DirectConfig, DirectMmu};
use gnomon::host_mm::{
    HostMemory, HostMmConfig, MemoryObject, MmError, MmStats, Placement, SwapConfig,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use vm_memory::{Bytes, VolatileMemory};

use common::{ACCESSED, Client, DIRTY};

const RATION_BYTES: u64 = 16 << 20;
const FRAMES: u64 = RATION_BYTES / PAGE_SIZE_U64;
const OVERCOMMIT: u64 = 4;
const TOUCHES: u32 = 30_000;
const SEED: u64 = 2008;
const RUNS: u32 = 3;

fn memory(pages: u64, placement: Placement) -> Result<(HostMemory, Arc<MemoryObject>)> {
    let swap = SwapConfig { path: None, dir: None, bytes: 2 * pages * PAGE_SIZE_U64 };
    let share_zero = false;
    let config = HostMmConfig { swap, placement, share_zero, ..HostMmConfig::new(RATION_BYTES) };
    let mut mm = HostMemory::new(config)?;
    mm.start_reclaim()?;
    let object = mm.create_object(pages * PAGE_SIZE_U64)?;
    Ok((mm, object))
}

fn window(pages: u64, config: DirectConfig) -> Result<(HostMemory, DirectMmu)> {
    let placement = Placement::Identity { guest_bytes: pages * PAGE_SIZE_U64 };
    let (mm, object) = memory(pages, placement)?;
    let view = mm.map_guest_view()?;
    let mmu = DirectMmu::new(config, object, view, |error| eprintln!("{error}"))?;
    Ok((mm, mmu))
}

/// Microseconds a page, and faults.
fn minor_faults(config: DirectConfig) -> Result<(f64, u64)> {
    let pages = FRAMES / 2;
    let (_mm, mmu) = window(pages, config)?;
    for number in 0..pages {
        mmu.object().write(Gfn::new(number).base(), &(number + 1).to_le_bytes())?;
    }
    let memory = mmu.window().region().as_volatile_slice();
    let begin = Instant::now();
    for number in 0..pages {
        let found: u64 = memory.read_obj(usize::try_from(number)? * PAGE_SIZE)?;
        ensure!(found == number + 1, "page {number} holds {found}");
    }
    Ok((micros(begin.elapsed(), pages), mmu.stats().faults))
}

/// The same touches for everyone: page and whether it is written.
fn touches() -> impl Iterator<Item = (u64, bool)> {
    let mut rng = StdRng::seed_from_u64(SEED);
    (0..TOUCHES).map(move |_| (rng.random_range(0..OVERCOMMIT * FRAMES), rng.random()))
}

/// Prints the fastest of some runs.
fn report(what: &str, run: impl Fn() -> Result<(f64, MmStats)>) -> Result<()> {
    let (time, stats) = fastest(run)?;
    println!(
        "{what:>24}  {time:>8.1} us a touch  {:>6} swap-ins  {:>6} written  {:>6} dropped clean",
        stats.swap_ins, stats.swap_outs, stats.clean_drops
    );
    Ok(())
}

fn fastest<T>(run: impl Fn() -> Result<(f64, T)>) -> Result<(f64, T)> {
    let mut best = run()?;
    for _ in 1..RUNS {
        let next = run()?;
        if next.0 < best.0 {
            best = next;
        }
    }
    Ok(best)
}

fn overcommitted_window(config: DirectConfig) -> Result<(f64, MmStats)> {
    let (mm, mmu) = window(OVERCOMMIT * FRAMES, config)?;
    let memory = mmu.window().region().as_volatile_slice();
    let begin = Instant::now();
    for (number, write) in touches() {
        let at = usize::try_from(number)? * PAGE_SIZE;
        let found: u64 = memory.read_obj(at)?;
        ensure!(found == 0 || found == number + 1, "page {number} holds {found}");
        if write {
            memory.write_obj(number + 1, at)?;
        }
    }
    Ok((micros(begin.elapsed(), TOUCHES.into()), mm.stats()))
}

fn overcommitted_calls() -> Result<(f64, MmStats)> {
    let (mm, object) = memory(OVERCOMMIT * FRAMES, Placement::Anywhere)?;
    let client = Client::register(&object)?;
    let begin = Instant::now();
    for (number, write) in touches() {
        client.touch(number, if write { ACCESSED | DIRTY } else { ACCESSED })?;
        let (gpa, mut found) = (Gfn::new(number).base(), [0; 8]);
        object.read(gpa, &mut found)?;
        if write {
            object.write(gpa, &(number + 1).to_le_bytes())?;
        }
    }
    let time = micros(begin.elapsed(), TOUCHES.into());
    client.end();
    Ok((time, mm.stats()))
}

// For a figure with one decimal.
#[allow(clippy::cast_precision_loss)]
fn micros(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

fn main() -> Result<()> {
    let probe = window(FRAMES, DirectConfig::default());
    if let Err(error) = &probe
        && let Some(MmError::Uffd(reason)) = error.downcast_ref()
    {
        println!("skipped: {reason}");
        return Ok(());
    }
    drop(probe?);
    let handlers = [("sleeps", Duration::ZERO), ("spins", Duration::from_millis(1))];
    println!("minor faults, {} pages in ascending order:", FRAMES / 2);
    for (handler, spin) in handlers {
        for fault_around in [1, 8, 32] {
            let config = DirectConfig { fault_around, spin, ..DirectConfig::default() };
            let (time, faults) = fastest(|| minor_faults(config))?;
            println!(
                "  handler {handler:>6}, {fault_around:>2} pages: {time:>6.2} us a page, {faults} faults"
            );
        }
    }
    println!("{OVERCOMMIT} times the ration of {FRAMES} frames, {TOUCHES} random touches:");
    report("software SPTEs", overcommitted_calls)?;
    for (handler, spin) in handlers {
        for fault_around in [1, 8] {
            let config = DirectConfig { fault_around, spin, ..DirectConfig::default() };
            let what = format!("window, {handler}, {fault_around} pages");
            report(&what, || overcommitted_window(config))?;
        }
    }
    Ok(())
}
